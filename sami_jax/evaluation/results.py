"""The line of results.jsonl: what one evaluated query was asked, answered and found to be worth."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sami_jax.errors import BadDataError
from sami_jax.evaluation.verdicts import Verdict
from sami_jax.files import read_jsonl, write_jsonl
from sami_jax.stage_folder import check_sealed


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryResult:
    """A query under C constitutions, one response each.

    Attributes:
      split: "learned" or "held_out", of its principles.
      example_id: the query's.
      query: its text.
      constitutions: C texts.
      responses: C texts.
      response_tokens: C lengths in tokens.
      logps: [C, R] log p(response r | query, constitution c) in nats, by the run's `normalize`; None where a response
        is empty, which has none.
      base_logps: [C] of each response under its own constitution and the base model, in nats; None likewise.
      mi_nats: lower bound on the mutual information of `logps`; None likewise.
      verdicts: C of them; None without a judge.
      response_prefix: what every response was made to begin with.
    """

    split: str
    example_id: str
    query: str
    constitutions: Sequence[str]
    responses: Sequence[str]
    response_tokens: Sequence[int]
    logps: np.ndarray | None
    base_logps: np.ndarray | None
    mi_nats: float | None
    verdicts: Sequence[Verdict] | None
    response_prefix: str = ""

    def __post_init__(self) -> None:
        count = len(self.constitutions)
        lists = [self.responses, self.response_tokens, self.verdicts, self.logps, self.base_logps]
        if any(values is not None and len(values) != count for values in lists):
            raise ValueError(f"{self.example_id} has not one value of each kind for each of {count} constitutions")
        if self.logps is not None and self.logps.shape != (count, count):
            raise ValueError(f"the logps of {self.example_id} are no matrix of {count} x {count}")

    def per_query(self, key: str) -> float | None:
        """This query's value of a metric, the mean over its constitutions; None where it is not known."""
        if key == "mi_nats":
            return self.mi_nats
        if key == "distinct":
            return float(len(set(self.responses)) == len(self.responses))
        if key == "length_tokens":
            return float(np.mean(self.response_tokens))
        if key not in ("adherence", "well_formed", "faithful") or self.verdicts is None:
            return None
        return float(np.mean([float(getattr(verdict, key)) for verdict in self.verdicts]))


def write_results(path: Path, results: Sequence[QueryResult]) -> None:
    """Writes one result a line, atomically."""
    write_jsonl(path, [_to_json(result) for result in results])


def read_results(path: Path) -> list[QueryResult]:
    """Reads what `write_results` wrote.

    Raises:
      BadDataError: the file has other bytes than were sealed, or a line is not of that form; it is named.
    """
    check_sealed(path)
    results = []
    for number, row in enumerate(read_jsonl(path), start=1):
        with naming(f"{path}, entry {number}"):
            results.append(_from_json(row))
    return results


@contextlib.contextmanager
def naming(where: object) -> Iterator[None]:
    """Turns what goes wrong while a malformed file of a run is taken apart into one sentence that names it."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadDataError(
            f"{where} is not as a run writes it ({type(error).__name__}: {error}); restore it, or delete its stage's "
            "folder and go on with the run to have it made anew."
        ) from error


def _to_json(result: QueryResult) -> dict[str, Any]:
    arrays = {"logps": result.logps, "base_logps": result.base_logps}
    verdicts = None if result.verdicts is None else [_verdict_to_json(verdict) for verdict in result.verdicts]
    return {
        **{field.name: getattr(result, field.name) for field in dataclasses.fields(result)},
        **{name: None if array is None else array.tolist() for name, array in arrays.items()},
        "verdicts": verdicts,
    }


def _from_json(row: Mapping[str, Any]) -> QueryResult:
    arrays = {
        name: None if row[name] is None else np.array(row[name], dtype=np.float64) for name in ("logps", "base_logps")
    }
    verdicts = None if row["verdicts"] is None else [_verdict_from_json(verdict) for verdict in row["verdicts"]]
    return QueryResult(**{**row, **arrays, "verdicts": verdicts})


def _verdict_to_json(verdict: Verdict) -> dict[str, Any]:
    derived = {name: getattr(verdict, name) for name in ("adherence", "score", "strict_score")}
    return {**dataclasses.asdict(verdict), **derived}


def _verdict_from_json(row: Mapping[str, Any]) -> Verdict:
    verdict = Verdict(row["well_formed"], row["faithful"], row["followed"])
    if _verdict_to_json(verdict) != row:
        raise ValueError(f"a verdict's scores do not follow from what it found: {dict(row)}")
    return verdict
