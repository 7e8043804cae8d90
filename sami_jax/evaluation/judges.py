"""Judges: how well a response follows a constitution, decided by a program."""

import dataclasses
from collections.abc import Callable, Sequence

from sami_jax.data.constitutions import Constitution
from sami_jax.data.principles import Principle
from sami_jax.data.queries import Query
from sami_jax.errors import BadDataError
from sami_jax.miniature import world


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a judge says of one response.

    Attributes:
      well_formed: the response has the form that was asked for.
      faithful: its content is the query's own; False where it is not well-formed.
      followed: principle name -> the response does as the constitution asks; all False where it is not well-formed.
    """

    well_formed: bool
    faithful: bool
    followed: dict[str, bool]

    @property
    def adherence(self) -> float:
        """Share of the constitution's principles that were followed."""
        return sum(self.followed.values()) / len(self.followed)

    @property
    def score(self) -> float:
        """What a comparison goes by: adherence; a malformed response loses against any other."""
        return self.adherence if self.well_formed else -1.0

    @property
    def strict_score(self) -> float:
        """`score`, but wrong content counts as malformed."""
        return self.score if self.faithful else -1.0


Judge = Callable[[Query, Constitution, str], Verdict]


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


def check_judged(name: str, queries: Sequence[Query], principles: Sequence[Principle]) -> None:
    """Refuses what the judge of this name cannot read, before anything is sampled for it.

    Raises:
      BadDataError: the query or principle, and the remedy.
    """
    if name != "miniature":
        return
    remedy = "so the miniature judge cannot read its summaries; set config.evaluation.judge=none for other data."
    for query in queries:
        if missing := [fact for fact in world.REPORTED if fact not in query.facts]:
            raise BadDataError(f"Query {query.example_id!r} has no fact {missing[0]!r}, {remedy}")
    for principle in principles:
        if principle.name not in world.MARKERS:
            raise BadDataError(f"The principle {principle.name!r} is none of the miniature world's, {remedy}")


def get_judge(name: str) -> Judge | None:
    """The judge of a config's name; None for "none"."""
    return {"none": None, "miniature": judge_miniature}[name]
