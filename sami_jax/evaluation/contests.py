"""Two files of responses to the contests between them: matched by question, for whole constitutions or principles."""

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sami_jax.data.authors import read_responses
from sami_jax.data.constitutions import read_statements
from sami_jax.errors import BadDataError
from sami_jax.evaluation.pairwise_judge import Contest
from sami_jax.evaluation.results import read_results
from sami_jax.evaluation.verdicts import Verdict


class Answered(NamedTuple):
    """A response of a file.

    Attributes:
      name: of the query in messages: its example id, or its row.
      question: the query's text.
      constitution: that the response was asked to follow.
      response: its text.
      verdict: of a judge of responses, where there was one.
    """

    name: str
    question: str
    constitution: str
    response: str
    verdict: Verdict | None = None

    @property
    def statements(self) -> list[str]:
        return read_statements(self.constitution)


class Pairing(NamedTuple):
    """A response and the one that it is compared with.

    Attributes:
      ours: the policy's; its constitution is the one that counts.
      theirs: the baseline's.
    """

    ours: Answered
    theirs: Answered

    def contests(self, *, per_principle: bool) -> list[Contest]:
        """One about the whole constitution, or one about each of its principles."""
        asked = self.ours.statements if per_principle else [self.ours.constitution]
        return [Contest(self.ours.question, text, self.ours.response, self.theirs.response) for text in asked]


@dataclasses.dataclass(frozen=True)
class Matched:
    """What two files have in common, and what they have not.

    Attributes:
      pairings: in the order of the policy's file.
      only_ours: names of the policy's responses that the baseline's file has no counterpart of.
      only_theirs: names of the baseline's.
      other_constitution: names of those that the baseline gave under another constitution.
    """

    pairings: list[Pairing]
    only_ours: list[str]
    only_theirs: list[str]
    other_constitution: list[str]


def read_answered(path: Path, *, split: str = "") -> list[Answered]:
    """The responses of a results.jsonl, C for each query, or of a file in the authors' format.

    Args:
      path: the file; one whose name ends in .jsonl is a results.jsonl.
      split: of a results.jsonl, "learned" or "held_out"; "" for both.

    Raises:
      BadDataError: the file cannot be used, or has no such split.
    """
    if path.suffix != ".jsonl":
        rows = [
            Answered(f"row {i}", *(row.question, row.constitution, row.response))
            for i, row in enumerate(read_responses(path))
        ]
    else:
        results = [result for result in read_results(path) if split in ("", result.split)]
        if not results:
            raise BadDataError(f"{path} holds no results" + (f" of the split {split!r}." if split else "."))
        rows = [
            Answered(result.example_id, result.query, constitution, response, verdict)
            for result in results
            for constitution, response, verdict in zip(
                result.constitutions,
                result.responses,
                result.verdicts or (None,) * len(result.responses),
                strict=True,
            )
        ]
    return rows


def match(ours: Sequence[Answered], theirs: Sequence[Answered], *, files: tuple[Path, Path]) -> Matched:
    """Pairs responses to the same question.

    Where a question is answered once in each file, that is all that counts. Where it is answered under several
    constitutions, the same statements, in any order, make a pair.

    Args:
      ours: of the policy.
      theirs: of the baseline.
      files: they are from, to be named.

    Raises:
      BadDataError: one of the policy's constitutions is empty, a file answers a question twice under one constitution,
        or nothing is in common.
    """
    if empty := next((row for row in ours if not row.statements), None):
        raise BadDataError(f"{files[0]}: {empty.name} has an empty constitution; there is nothing to judge it by.")
    by_question = [_by_question(rows, file) for rows, file in zip((ours, theirs), files, strict=True)]
    pairings: list[Pairing] = []
    only_ours: list[str] = []
    found: set[int] = set()
    for row in ours:
        mine, others = (questions[row.question] for questions in by_question)
        alone = len(mine) == len(others) == 1
        other = next(iter(others.values())) if alone else others.get(_key(row))
        if other is None:
            only_ours.append(row.name)
            continue
        found.add(id(other))
        pairings.append(Pairing(row, other))
    if not pairings:
        raise BadDataError(
            f"{files[0]} and {files[1]} have no question in common; name two files that answer the same queries "
            f"(their first questions: {ours[0].question[:60]!r}..., {theirs[0].question[:60]!r}...)."
        )
    return Matched(
        pairings,
        only_ours=only_ours,
        only_theirs=[row.name for row in theirs if id(row) not in found],
        other_constitution=[pair.ours.name for pair in pairings if _key(pair.ours) != _key(pair.theirs)],
    )


def _key(row: Answered) -> frozenset[str]:
    return frozenset(row.statements)


def _by_question(rows: Sequence[Answered], file: Path) -> dict[str, dict[frozenset[str], Answered]]:
    found: dict[str, dict[frozenset[str], Answered]] = collections.defaultdict(dict)
    for row in rows:
        if _key(row) in found[row.question]:
            raise BadDataError(
                f"{file} answers a question twice under one constitution ({row.name}: {row.question[:60]!r}...); leave "
                "one of the answers."
            )
        found[row.question][_key(row)] = row
    return found
