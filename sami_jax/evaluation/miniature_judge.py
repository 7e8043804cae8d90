"""The judge of the miniature world: a program that reads summaries by their grammar."""

from collections.abc import Sequence

from sami_jax.data.constitutions import Constitution
from sami_jax.data.queries import Query
from sami_jax.errors import BadDataError
from sami_jax.evaluation.verdicts import Judge, Verdict
from sami_jax.miniature import world


def judge_miniature(query: Query, constitution: Constitution, response: str) -> Verdict:
    """Reads a summary of the miniature world by its grammar, as a whole.

    Raises:
      BadDataError: the query has no facts of that world.
    """
    try:
        reading = world.read_summary(response, query.facts)
    except KeyError as missing:
        raise BadDataError(
            f"Query {query.example_id!r} has no fact {missing}, so the miniature judge cannot read its summary; "
            "set config.evaluation.judge=none for other data."
        ) from missing
    if reading is None:
        return Verdict(False, False, dict.fromkeys(constitution.asked, False))
    followed = {name: reading.followed[name] == asked for name, asked in constitution.asked.items()}
    return Verdict(True, reading.faithful, followed)


def check_miniature(queries: Sequence[Query], principles: Sequence[str]) -> None:
    """Refuses queries and principles of another world.

    Raises:
      BadDataError: the query or principle, and the remedy.
    """
    remedy = "so the miniature judge cannot read its summaries; set config.evaluation.judge=none for other data."
    for query in queries:
        if missing := [fact for fact in world.REPORTED if fact not in query.facts]:
            raise BadDataError(f"Query {query.example_id!r} has no fact {missing[0]!r}, {remedy}")
    for principle in principles:
        if principle not in world.MARKERS:
            raise BadDataError(f"The principle {principle!r} is none of the miniature world's, {remedy}")


MINIATURE = Judge(check_miniature, judge_miniature)
