"""The stage that writes a run's queries into it: each source read once, cleaned, and split where both are one."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sami_jax.data.queries import Query, read_queries
from sami_jax.data.sources import OpenSource, SourceName, open_source
from sami_jax.files import replacing, write_json, write_jsonl
from sami_jax.safe_point import SafePoint
from sami_jax.seeds import number
from sami_jax.stages.stage import Output, Stage

TRAIN, EVALUATION, SOURCES = "train.jsonl", "evaluation.jsonl", "sources.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare(Stage):
    """Queries from where a config says, in files that a run reads from there on.

    Attributes:
      train: source of the training queries; None where nothing is trained.
      evaluation: source of the evaluation queries.
      evaluation_count: held out of a source that is both; else the first so many.
      max_characters: a longer text is dropped.
      seed: decides which queries are held out.
    """

    name = "prepare"

    train: SourceName | None
    evaluation: SourceName
    evaluation_count: int
    max_characters: int
    seed: int

    def make(self, out: Output, safe_point: SafePoint) -> Any:
        """Makes `train.jsonl`, `evaluation.jsonl` and `sources.json`, which has revision and counts of each.

        Raises:
          BadConfigError: there is no such function.
          BadDataError: a source cannot be used.
          FetchFailedError: the Hub cannot be reached.
        """
        out.build()
        about = out.alone(lambda: self._written(out.folder))
        out.write(SOURCES, write_json, about)
        return about

    def _written(self, folder: Path) -> dict[str, Any]:
        """Writes the queries, one after the other, so that a source of any size fits into memory."""
        if self.train is not None and self.train.same(self.evaluation):
            return self._split(folder, self.train)
        about = {}
        if self.train is not None:
            source = self._open(self.train)
            write_queries(folder / TRAIN, source.queries)
            about["train"] = _about(self.train, source)
        source = self._open(self.evaluation)
        write_queries(folder / EVALUATION, itertools.islice(source.queries, self.evaluation_count))
        for _ in source.queries:  # the rest is counted, and checked
            pass
        about["evaluation"] = _about(self.evaluation, source, at_most=self.evaluation_count)
        if self.train is not None:
            about["evaluation"]["also_in_train"] = _in_both(folder)
        return about

    def _open(self, name: SourceName) -> OpenSource:
        return open_source(name, max_characters=self.max_characters)

    def _split(self, folder: Path, name: SourceName) -> dict[str, Any]:
        source = self._open(name)
        everything, draws = folder / f".{TRAIN}.tmp", []

        def drawn() -> Iterator[Query]:
            for query in source.queries:
                draws.append(number(self.seed, "held_out", query.example_id))
                yield query

        write_queries(everything, drawn())
        count, total = min(self.evaluation_count, len(draws)), len(draws)
        highest = sorted(draws)[count - 1]  # of those that are held out: the lowest ones, in whatever order they come
        with (
            everything.open("rb") as lines,
            replacing(folder / TRAIN) as train,
            replacing(folder / EVALUATION) as evaluation,
            train.open("wb") as trained,
            evaluation.open("wb") as evaluated,
        ):
            for line, draw in zip(lines, draws, strict=True):
                (evaluated if draw <= highest else trained).write(line)
        everything.unlink()
        about = _about(name, source)
        return {
            "train": {**about, "queries": total - count, "held_out": count},
            "evaluation": {**about, "queries": count, "held_out": count},
        }


def write_queries(path: Path, queries: Iterable[Query]) -> None:
    """Writes queries as `read_queries` reads them."""
    write_jsonl(path, ({"example_id": q.example_id, "text": q.text, "facts": q.facts} for q in queries))


def _about(name: SourceName, source: OpenSource, at_most: int | None = None) -> dict[str, Any]:
    """What sources.json says of a source that has been read, of which so many queries at most are used."""
    tally = source.tally
    kept = tally.rows - sum(tally.dropped.values())
    return {
        "source": str(name),
        "revision": source.revision or None,
        "rows": tally.rows,
        "dropped": tally.dropped,
        "kept": kept,
        "queries": kept if at_most is None else min(kept, at_most),
    }


def _in_both(folder: Path) -> int:
    """How many texts of evaluation queries are a training query's, too."""
    asked = {query.text for query in read_queries(folder / EVALUATION)}
    return len({query.text for query in read_queries(folder / TRAIN) if query.text in asked})
