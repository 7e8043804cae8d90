"""The loop of Algorithm 1 over a run directory: each stage done once, resumed where it was left."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sami_jax import files, stage_folder, stages
from sami_jax.config import PRETRAINED, RunConfig, check_training, from_dict, to_dict
from sami_jax.data.principles import read_principles
from sami_jax.data.queries import read_queries
from sami_jax.disk import check_disk
from sami_jax.errors import BadConfigError, BadDataError, ExitCode, SamiError, exit_code
from sami_jax.model.config import DecoderConfig
from sami_jax.model.hub import fetch_model, model_name
from sami_jax.model.huggingface import find_weights, read_config
from sami_jax.outputs import check_folder, refuse_file
from sami_jax.pretraining import base_shape, pretrain
from sami_jax.report.page import write_report
from sami_jax.safe_point import SafePoint, stop_on_signal

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def run(config: RunConfig | None, workdir: Path, *, say: Callable[[str], None] = print) -> Path:
    """Runs SAMI, or what is left of it, and writes the report.

    Args:
      config: the settings, or None to go on with those the run directory was started with.
      workdir: the run directory; made if missing.
      say: takes sentences for the person who watches.

    Returns:
      The report's page.

    Raises:
      BadConfigError: the settings are not those the run was started with.
      RunInUseError: another process works on it.
      StoppedError: someone asked it to stop; the same command goes on from here.
    """
    if config is not None:
        check_training(config, iterations=config.iterations)
    with stage_folder.locked(workdir):
        config = _open_run(config, workdir, say)
        to_check = _needs_pretraining(config) and not _has_begun(workdir)
        # Only now: a download has no safe points, and SIGTERM is to end it.
        with stop_on_signal() as safe_point, _forgotten_if_refused(workdir), _attempt(workdir):
            config = with_pretrained(config, safe_point)
            if to_check:
                stages.check_queries(config, iterations=config.iterations)
            return _Run(config, workdir, safe_point, say).finish()


def train_folder(config: RunConfig, *, model: Path, pairs: Path, out: Path) -> Path:
    """Trains a model folder on a pairs file and writes the trained folder `out`.

    `out` with ".training" behind its name keeps metrics.jsonl and checkpoints: an interrupted training goes on there,
    and a finished one is not done again.

    Raises:
      BadConfigError: `out` was begun with other settings, model or pairs.
      BadDataError: model or pairs cannot be used.
    """
    check_training(config, iterations=1)
    refuse_file(out)
    out = Path(os.path.realpath(out))
    folder = out.with_name(f"{out.name}.training") if out.name else check_folder(out)
    read_config(model)
    inputs = [*_training_inputs(config), stages.folder_hash(model), files.file_hash(pairs)]
    card = stages.model_card(config, 1, base=model_name(model))
    with stage_folder.locked(folder), stop_on_signal() as safe_point:
        trained = stage_folder.seal_of(folder, inputs=inputs) is not None
        if trained and out.exists() and any(out.iterdir()):
            stages.drop_checkpoints(config.train, trained=folder)
            return out  # finished before; only a finished training writes there
        check_folder(out)
        if not trained:
            stages.train_stage(
                config,
                base=model,
                pairs=pairs,
                iteration=1,
                inputs=inputs,
                out=folder,
                log=lambda record: files.append_jsonl(folder / "metrics.jsonl", record),
                safe_point=safe_point,
            )
        stages.save_trained(config, base=model, trained=folder, out=out, card=card)
        stages.drop_checkpoints(config.train, trained=folder)
    return out


def evaluate_folder(config: RunConfig, *, model: str, baseline: Path | None, out: Path) -> Path:
    """Evaluates a model as a run would, against the base's evaluation folder where one is given.

    Args:
      config: the settings; its model is the base.
      model: a folder, or a name on the Hub.
      baseline: the base's evaluation folder, or None.
      out: gets summary.json and results.jsonl.

    Returns:
      `out/summary.json`.

    Raises:
      BadDataError: a folder cannot be used.
    """
    stage_folder.refuse_foreign(out)
    config = _with_files(config, iterations=0)
    stages.check_mesh(config, _base_shape(config))
    folder = fetch_model(model)
    read_config(folder)
    with stage_folder.locked(out), stop_on_signal() as safe_point:
        config = with_pretrained(config, safe_point)
        base = Path(config.model)
        model_hash, base_hash = stages.folder_hash(folder), stages.folder_hash(base)
        iteration = 0 if model_hash == base_hash else 1
        compared = files.file_hash(baseline / "results.jsonl") if baseline else None
        inputs = _evaluation_inputs(config, iteration, model=model_hash, base=base_hash, baseline=compared)
        if stage_folder.seal_of(out, inputs=inputs) is None:
            stages.check_queries(config, iterations=0)
            stages.evaluate_stage(
                config,
                model=folder,
                base=base,
                baseline=baseline,
                iteration=iteration,
                inputs=inputs,
                out=out,
                safe_point=safe_point,
            )
    return out / "summary.json"


def export_folder(workdir: Path, iteration: int, out: Path, *, dtype: str, verify: bool) -> Path:
    """Writes the Hugging Face folder of a run's iteration elsewhere, in any dtype.

    Args:
      workdir: the run directory.
      iteration: 1, 2, ....
      out: new folder.
      dtype: of its weights.
      verify: load it again, and compare the logits of random tokens, which must be those of the rounded weights.

    Raises:
      BadDataError: the iteration has no finished export, or `out` holds files.
      NonFiniteError: a weight is not finite in `dtype`.
      SaveFailedError: the disk is full or not writable, or what was written gives other logits.
    """
    out = check_folder(out)
    exported = workdir / f"iter_{iteration:03d}" / "export"
    if not (exported / stage_folder.DONE).is_file():
        raise BadDataError(f"{workdir} has no finished export of iteration {iteration}; go on with `sami run` first.")
    stage_folder.read_done(exported)
    config = from_dict(files.read_json(workdir / "config.json"))
    stages.convert(config, model=exported, out=out, dtype=dtype, verify=verify)
    return out


class _Run:
    """One attempt at a run; holds what its stages share."""

    def __init__(self, config: RunConfig, workdir: Path, safe_point: SafePoint, say: Callable[[str], None]):
        self.config, self.workdir, self.safe_point, self.say = config, workdir, safe_point, say
        self.base = Path(config.model)
        self.worked = False

    def finish(self) -> Path:
        """Every stage in order, then the report."""
        base_hash = stages.folder_hash(self.base)
        baseline_folder, baseline = self._evaluate(0, self.base, base_hash, base_hash, None)
        model, model_hash = self.base, base_hash
        for iteration in range(1, self.config.iterations + 1):
            folder = self._folder(iteration)
            sampled = self._sample(iteration, model, model_hash)
            trained = self._train(iteration, base_hash, sampled)
            model, model_hash = folder / "export", self._export(iteration, base_hash, trained)
            stages.drop_checkpoints(self.config.train, trained=folder / "train")
            self._evaluate(iteration, model, model_hash, base_hash, (baseline_folder, baseline))
        page = self.workdir / "report" / "index.html"
        if self.worked or not page.exists():
            page = write_report(self.workdir)
        else:
            self.say(f"This run is finished; nothing to do. Its report: {page}")
        return page

    def _sample(self, iteration: int, model: Path, model_hash: str) -> str:
        c = self.config
        inputs = {
            **_shared_inputs(c, "sample", iteration),
            "model": model_hash,
            "queries": files.file_hash(Path(c.queries.train)),
            "needed": [c.train.steps[iteration - 1], c.train.queries_per_step, c.train.passes],
            "settings": [to_dict(c.prompts), to_dict(c.sampling), to_dict(c.filters)],
        }
        return self._stage("sample", iteration, inputs, stages.sample_stage, model=model, iteration=iteration)

    def _train(self, iteration: int, base_hash: str, sampled: str) -> str:
        folder = self._folder(iteration)
        inputs = {"stage": "train", "iteration": iteration, "base": base_hash, "sample": sampled}
        return self._stage(
            "train",
            iteration,
            inputs | {"settings": _training_inputs(self.config)},
            stages.train_stage,
            base=self.base,
            pairs=folder / "sample" / "pairs.json",
            iteration=iteration,
            log=lambda record: files.append_jsonl(self.workdir / "metrics.jsonl", record),
        )

    def _export(self, iteration: int, base_hash: str, trained: str) -> str:
        folder, card = self._folder(iteration), stages.model_card(self.config, iteration, base=model_name(self.base))
        inputs = {"stage": "export", "iteration": iteration, "base": base_hash, "train": trained, "card": card}
        return self._stage(
            "export", iteration, inputs, stages.export_stage, base=self.base, trained=folder / "train", card=card
        )

    def _evaluate(
        self, iteration: int, model: Path, model_hash: str, base_hash: str, baseline: tuple[Path, str] | None
    ) -> tuple[Path, str]:
        compared = baseline[1] if baseline else None
        inputs = _evaluation_inputs(self.config, iteration, model=model_hash, base=base_hash, baseline=compared)
        fingerprint = self._stage(
            "eval",
            iteration,
            inputs,
            stages.evaluate_stage,
            model=model,
            base=self.base,
            baseline=baseline[0] if baseline else None,
            iteration=iteration,
        )
        return self._folder(iteration) / "eval", fingerprint

    def _stage(self, name: str, iteration: int, inputs: Any, make: Callable[..., str], /, **arguments: Any) -> str:
        out = self._folder(iteration) / name
        fingerprint = stage_folder.seal_of(out, inputs=inputs)
        if fingerprint is None:
            self.safe_point()
            self.worked = True
            started = time.monotonic()
            fingerprint = make(self.config, inputs=inputs, out=out, safe_point=self.safe_point, **arguments)
            seconds = round(time.monotonic() - started, 3)
            event = {"event": "stage_done", "iteration": iteration, "stage": name, "seconds": seconds, "time": _now()}
            files.append_jsonl(self.workdir / "events.jsonl", event)
        return fingerprint

    def _folder(self, iteration: int) -> Path:
        return self.workdir / f"iter_{iteration:03d}"


def _shared_inputs(config: RunConfig, stage: str, iteration: int) -> dict[str, Any]:
    constitutions = {k: v for k, v in to_dict(config.constitutions).items() if k != "principles"}
    principles = files.file_hash(Path(config.constitutions.principles))
    return {
        "stage": stage,
        "iteration": iteration,
        "seed": config.seed,
        "constitutions": [constitutions, principles],
        "compute_dtype": config.compute_dtype,
        "mesh": to_dict(config.mesh),
    }


def _training_inputs(config: RunConfig) -> list[Any]:
    """The settings that trained weights depend on. How often they are saved, and for how long, is none of them."""
    train = {k: v for k, v in to_dict(config.train).items() if k not in ("checkpoint_every", "keep_checkpoints")}
    return [config.seed, train, config.prompts.boundary, config.compute_dtype, to_dict(config.mesh)]


def _evaluation_inputs(
    config: RunConfig, iteration: int, *, model: str, base: str, baseline: str | None
) -> dict[str, Any]:
    c = config
    return {
        **_shared_inputs(c, "evaluate", iteration),
        "model": model,
        "base": base,
        "baseline": baseline,
        "queries": [files.file_hash(Path(c.queries.evaluation)), c.queries.evaluation_count],
        "settings": [to_dict(c.prompts), to_dict(c.sampling), to_dict(c.evaluation)],
        "scoring": [c.train.normalize, c.train.micro_batch_queries, c.train.round_tokens_to, c.train.remat],
    }


def _open_run(config: RunConfig | None, workdir: Path, say: Callable[[str], None]) -> RunConfig:
    """Writes RUN.json and config.json once; afterwards compares. The model is its folder, fetched where it is a name.

    RUN.json keeps the commit of such a name: what moves on the Hub later does not change the run.
    """
    stored = workdir / "config.json"
    if not stored.exists():
        if config is None:
            raise BadConfigError(f"{workdir} holds no run to go on with; start one with --config=configs/....py.")
        found = _with_files(config, iterations=config.iterations)
        stages.check_mesh(found, _base_shape(found))
        _check_disk(found, workdir, say)
        if not _needs_pretraining(found):
            stages.check_queries(found, iterations=found.iterations)
        plain = to_dict(config)
        fetched = Path(found.model) != Path(config.model)
        model = model_name(Path(found.model)) if fetched else config.model
        about = {
            "run_id": str(uuid.uuid4()),
            "schema_version": 1,
            "created": _now(),
            "seed": config.seed,
            "model": model,
        }
        files.write_json(workdir / "RUN.json", {**about, "config_sha256": files.content_hash(plain)})
        files.write_json(stored, plain)  # last: where it stands, the run has begun
        return found
    before = files.read_json(stored)
    if config is not None:
        # A setting that was not there yet had its default.
        changed = list(_differences(to_dict(from_dict(before)), to_dict(config), ""))
        if changed:
            raise BadConfigError(
                f"{workdir} was started with other settings ({'; '.join(changed)}); choose another --workdir for "
                "the new ones, or leave out --config to go on with the old."
            )
    begun = from_dict(before)
    model = files.read_json(workdir / "RUN.json").get("model", begun.model)
    found = _with_files(dataclasses.replace(begun, model=model), iterations=begun.iterations)
    _check_disk(found, workdir, say)
    return found


def _check_disk(config: RunConfig, workdir: Path, say: Callable[[str], None]) -> None:
    if sentence := check_disk(config, _base_shape(config), workdir):
        say(sentence)


def _with_files(config: RunConfig, *, iterations: int) -> RunConfig:
    """The config, its model fetched. Refuses one whose files are missing or hold something else.

    Args:
      config: the settings.
      iterations: how many there are; 0 for an evaluation alone, which needs no training queries.
    """
    if _needs_pretraining(config) and not config.pretraining.enabled:
        raise BadConfigError(f"A path of the config holds {PRETRAINED}, but config.pretraining.enabled is false.")
    named = {
        "queries.evaluation": config.queries.evaluation,
        "constitutions.principles": config.constitutions.principles,
    }
    if iterations:
        named["queries.train"] = config.queries.train
    for field, name in named.items():
        if PRETRAINED not in name:
            if not Path(name).is_file():
                raise BadConfigError(f"config.{field} is {name!r}, which is not a file; name one.")
            (read_principles if field == "constitutions.principles" else read_queries)(Path(name))
    if PRETRAINED not in config.queries.evaluation + config.constitutions.principles:
        stages.evaluation_tasks(config)  # for what it refuses, before anything is written
    if PRETRAINED not in config.model:
        folder = fetch_model(config.model)
        read_config(folder)
        find_weights(folder)
        config = dataclasses.replace(config, model=str(folder))
    return config


def _base_shape(config: RunConfig) -> DecoderConfig:
    """Of the base model, also of one that is still to be pretrained."""
    return base_shape(config.pretraining) if PRETRAINED in config.model else read_config(Path(config.model))


def _has_begun(workdir: Path) -> bool:
    return any(workdir.glob("iter_*"))


def _needs_pretraining(config: RunConfig) -> bool:
    return PRETRAINED in json.dumps(to_dict(config))


def _differences(before: Any, after: Any, prefix: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            yield from _differences(before.get(key), after.get(key), f"{prefix}{key}.")
    elif before != after:
        yield f"{prefix.rstrip('.')}: {before!r} -> {after!r}"


def with_pretrained(config: RunConfig, safe_point: SafePoint) -> RunConfig:
    """The config with `{pretrained}` in its paths replaced by the base's folder, made first if it is missing."""
    if not _needs_pretraining(config):
        return config
    folder = str(pretrain(config.pretraining, safe_point=safe_point))
    return from_dict(_replaced(to_dict(config), folder))


def _replaced(value: Any, folder: str) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(item, folder) for key, item in value.items()}
    return value.replace(PRETRAINED, folder) if isinstance(value, str) else value


@contextlib.contextmanager
def _forgotten_if_refused(workdir: Path) -> Iterator[None]:
    """Takes away what a run wrote that was refused before its first stage: the mended command is another run's."""
    try:
        yield
    except (BadConfigError, BadDataError):
        if not _has_begun(workdir):
            attempts = workdir / "attempts"
            for path in (*_records(attempts), workdir / "RUN.json", workdir / "config.json"):
                path.unlink(missing_ok=True)
            if attempts.is_dir() and not any(attempts.iterdir()):
                attempts.rmdir()
        raise


@contextlib.contextmanager
def _attempt(workdir: Path) -> Iterator[None]:
    """Keeps a record of this start: what was called, with which versions, and how it ended."""
    folder = workdir / "attempts"
    number = 1 + max((int(path.stem) for path in _records(folder)), default=0)
    record = {
        "argv": sys.argv,
        "python": sys.version.split()[0],
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "started": _now(),
        "ended": None,
        "exit_code": None,
        "reason": None,
    }
    path = folder / f"{number:04d}.json"
    files.write_json(path, record)
    code, reason = int(ExitCode.DONE), "done"
    try:
        yield
    except SamiError as error:
        code, reason = exit_code(error), str(error)
        raise
    except BaseException as error:
        code, reason = exit_code(error), f"{type(error).__name__}: {error}"
        raise
    finally:
        files.write_json(path, {**record, "ended": _now(), "exit_code": code, "reason": reason})


def _records(attempts: Path) -> list[Path]:
    return [path for path in attempts.glob("[0-9]*.json") if path.stem.isdigit()]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
