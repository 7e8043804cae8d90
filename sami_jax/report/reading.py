"""Reads the files of a run directory into frozen structs."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sami_jax.errors import BadDataError
from sami_jax.evaluation.results import QueryResult, naming, read_results
from sami_jax.evaluation.statistics import Estimate
from sami_jax.files import read_json, read_log
from sami_jax.report.comparisons import Comparison, read_comparisons
from sami_jax.report.measures import METRICS, SPLIT_LABELS, WIN_RATE
from sami_jax.stage_folder import check_sealed

ESTIMATES = [key for metric in METRICS for key in (metric.key, metric.gain_key) if key]


@dataclasses.dataclass(frozen=True)
class SplitSummary:
    """The numbers of one split at one iteration."""

    n_queries: int
    n_unscored: int  # queries with an empty response, which has no log-probability
    estimates: Mapping[str, Estimate]  # metric or gain key -> estimate; what was not measured is absent
    per_principle: Mapping[str, Estimate]  # principle -> adherence
    wins: int | None
    ties: int | None
    losses: int | None
    win_rate_t: float | None  # (win rate - 0.5) / its standard error
    judge: str | None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One eval/summary.json."""

    iteration: int
    normalize: str  # "mean" or "sum": which log-probabilities the mutual information was computed from
    ceiling_nats: float
    splits: Mapping[str, SplitSummary]  # learned first
    comparisons: Sequence[Comparison] = ()  # by a judge of pairs


@dataclasses.dataclass(frozen=True)
class Funnel:
    """What became of an iteration's queries: `counts` of sample/DONE.json."""

    queries: int
    sampled: int
    kept: int
    dropped: Mapping[str, int]  # rule -> queries


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """How an iteration's training was laid out: of `counts` of train/DONE.json."""

    rows: int  # in memory at once
    row_tokens: int
    real_share: float  # of the slots, those that hold a token


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """One line of metrics.jsonl, as far as it is drawn; all in nats, on the training batch."""

    step: int
    loss: float
    mi_nats: float
    kl: float  # per response token; 0 where it was not computed


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything the page is made from."""

    info: Mapping[str, Any]
    config: Mapping[str, Any]
    train_eos: bool  # training scored the end of sequence too; evaluation never does
    evaluations: Sequence[Evaluation]  # the base first
    base_results: Sequence[QueryResult]
    last_results: Sequence[QueryResult] | None  # the same queries; None: only the base has been evaluated
    funnels: Mapping[int, Funnel]  # by iteration
    packed_rows: Mapping[int, PackedRows]  # by iteration
    train_steps: Mapping[int, Sequence[TrainStep]]  # by iteration, then step
    stage_times: Mapping[tuple[int, str], float]  # (iteration, stage) -> seconds
    unfinished: Sequence[int]  # iterations that began and have no evaluation

    @property
    def base(self) -> Evaluation:
        return self.evaluations[0]

    @property
    def last(self) -> Evaluation:
        return self.evaluations[-1]

    @property
    def comparisons(self) -> list[Comparison]:
        """Those of every iteration, in their order."""
        return [comparison for evaluation in self.evaluations for comparison in evaluation.comparisons]


def read_run(run_dir: Path) -> Run:
    """Reads a run directory.

    Raises:
      BadDataError: this is no run, its base was not evaluated, or a file is malformed; the message names it.
    """
    info = read_json(run_dir / "RUN.json")  # first: where another folder was meant, this is the file to miss
    evaluations = read_evaluations(run_dir)
    folders = _iteration_folders(run_dir)
    evaluated = [evaluation.iteration for evaluation in evaluations]
    last = evaluated[-1]
    base_results = read_results(folders[0] / "eval" / "results.jsonl")
    last_results = read_results(folders[last] / "eval" / "results.jsonl") if last else None
    if last_results is not None and _ids(last_results) != _ids(base_results):
        raise BadDataError(
            f"{folders[last] / 'eval' / 'results.jsonl'} holds other queries than iter_000's, or in another order; "
            f"delete {folders[last] / 'eval'} and go on with the run."
        )
    config = read_json(run_dir / "config.json")
    with naming(run_dir / "config.json"):
        train_eos = bool(config["train"]["train_eos"])
    return Run(
        info=info,
        config=config,
        train_eos=train_eos,
        evaluations=evaluations,
        base_results=base_results,
        last_results=last_results,
        funnels=_read_counts(folders, "sample", Funnel),
        packed_rows=_read_counts(folders, "train", PackedRows),
        train_steps=_read_train_steps(run_dir / "metrics.jsonl"),
        stage_times=_read_stage_times(run_dir / "events.jsonl"),
        unfinished=[iteration for iteration in folders if iteration not in evaluated],
    )


def read_evaluations(run_dir: Path) -> list[Evaluation]:
    """The evaluations of a run, the base first.

    Raises:
      BadDataError: the base was not evaluated, or a summary is malformed.
    """
    paths = {i: folder / "eval" / "summary.json" for i, folder in _iteration_folders(run_dir).items()}
    found = [_read_evaluation(path, iteration) for iteration, path in paths.items() if path.exists()]
    found = [_with_comparisons(one, read_comparisons(one.iteration, paths[one.iteration].parents[1])) for one in found]
    if not found or found[0].iteration != 0:
        raise BadDataError(f"{run_dir} has no evaluation of its base (iter_000); go on with `sami run` first.")
    return found


def _iteration_folders(run_dir: Path) -> dict[int, Path]:
    folders = {path.name.removeprefix("iter_"): path for path in run_dir.glob("iter_*")}
    return dict(sorted((int(number), path) for number, path in folders.items() if number.isdecimal()))


def _fields(struct: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a struct's fields, by name."""
    return {field.name: row[field.name] for field in dataclasses.fields(struct)}


def _read_evaluation(path: Path, iteration: int) -> Evaluation:
    check_sealed(path)
    raw = read_json(path)
    with naming(path):
        names = sorted(raw["splits"], key=list(SPLIT_LABELS).index)
        splits = {name: _split_summary(raw["splits"][name]) for name in names}
        return Evaluation(iteration, raw["normalize"], float(raw["ceiling_nats"]), splits)


def _with_comparisons(evaluation: Evaluation, comparisons: Sequence[Comparison]) -> Evaluation:
    """The evaluation with its comparisons; a win rate against the base that a language model judged is its own."""
    splits = dict(evaluation.splits)
    for comparison in comparisons:
        split = splits.get(comparison.split)
        if split is None or split.judge or comparison.opponent != "base":
            continue
        won = {} if comparison.win_rate is None else {WIN_RATE.key: comparison.win_rate}
        splits[comparison.split] = dataclasses.replace(
            split,
            estimates={**split.estimates, **won},
            wins=comparison.summary["wins"],
            losses=comparison.summary["losses"],
            ties=comparison.summary["ties"] + comparison.summary["inconsistent"],  # all queries at 0.5
            win_rate_t=comparison.summary["t"],
            judge=comparison.judge,
        )
    return dataclasses.replace(evaluation, splits=splits, comparisons=comparisons)


def _split_summary(raw: Mapping[str, Any]) -> SplitSummary:
    return SplitSummary(
        estimates={key: Estimate(**raw[key]) for key in ESTIMATES if raw[key] is not None},
        per_principle={name: Estimate(**value) for name, value in (raw["per_principle"] or {}).items()},
        win_rate_t=raw.get("win_rate_t"),  # runs of before it was written have none
        **{key: raw[key] for key in ("n_queries", "n_unscored", "wins", "ties", "losses", "judge")},
    )


def _ids(results: Sequence[QueryResult]) -> list[tuple[str, str]]:
    return [(result.split, result.example_id) for result in results]


def _read_counts(folders: Mapping[int, Path], stage: str, struct: Any) -> dict[int, Any]:
    """By iteration, what a finished stage counted; a run of an earlier version may not have counted it."""
    found = {}
    for iteration, folder in folders.items():
        path = folder / stage / "DONE.json"
        if path.exists():
            done = read_json(path)
            with naming(path):
                if stage == "sample" or "row_tokens" in done["counts"]:
                    found[iteration] = struct(**_fields(struct, done["counts"]))
    return found


def _read_train_steps(path: Path) -> dict[int, list[TrainStep]]:
    latest: dict[int, dict[int, TrainStep]] = {}
    with naming(path):
        for row in read_log(path):  # a resumed run repeats steps: the last line wins
            latest.setdefault(row["iteration"], {})[row["step"]] = TrainStep(**_fields(TrainStep, row))
    return {iteration: [steps[step] for step in sorted(steps)] for iteration, steps in sorted(latest.items())}


def _read_stage_times(path: Path) -> dict[tuple[int, str], float]:
    with naming(path):
        done = [row for row in read_log(path) if row["event"] == "stage_done"]
        return {(row["iteration"], row["stage"]): float(row["seconds"]) for row in done}
