"""What several processes agree on before a run's first stage: one disk, one config, the same code, model and data."""

import socket
import uuid
from pathlib import Path
from typing import NamedTuple

from sami_jax.config.fields import to_dict
from sami_jax.config.run import RunConfig
from sami_jax.errors import BadConfigError, BadDataError
from sami_jax.files import read_json, write_json
from sami_jax.processes import agreed, check_same, from_writer, is_writer, process_count
from sami_jax.run.attempts import code_version
from sami_jax.stages.stage import Source, constitutions_source, file_source, model_source


class Given(NamedTuple):
    """The files that a run is given, by their contents."""

    model: Source
    train: Source
    evaluation: Source
    principles: Source


def check_seen(workdir: Path) -> None:
    """Raises BadConfigError in every process where one does not see what process 0 writes into the run directory."""
    if process_count() == 1:
        return
    nonce = uuid.uuid4().hex

    def written() -> list[str]:
        write_json(workdir / f".{nonce}.tmp", nonce)
        return [f".{nonce}.tmp", nonce]

    name, content = from_writer(written)
    try:
        with agreed():
            if _seen(workdir / name) != content:
                raise BadConfigError(
                    f"{socket.gethostname()} does not see in {workdir} what process 0 writes there; mount one disk for "
                    "--workdir, model and data on all hosts (NFS, a bucket with gcsfuse or its like)."
                )
    finally:
        if is_writer():
            (workdir / name).unlink(missing_ok=True)


def refuse_unseen(path: Path) -> None:
    """Raises BadConfigError in a process that does not see a model or data where process 0 does."""
    if not is_writer() and not path.exists():
        raise BadConfigError(
            f"{socket.gethostname()} does not see {path.absolute()}; put model and data on a disk that all hosts share "
            "(for models of the Hub, set HF_HOME to a folder there)."
        )


def _seen(path: Path) -> object:
    try:
        return read_json(path)
    except (BadDataError, OSError):
        return None


def check_alike(config: RunConfig | None) -> None:
    """Raises BadConfigError in every process where one has other settings, other code or other libraries."""
    remedy = "Install the same on all hosts, and start all processes with the same command."
    check_same({**code_version(), "--config": "left out" if config is None else "given"}, remedy=remedy)
    if config is not None:
        check_same({"config": to_dict(config)}, remedy=remedy)


def read_given(config: RunConfig) -> Given:
    """The run's model and data, hashed by each process.

    Raises:
      BadConfigError: in every process where one has other contents.
      BadDataError: a file cannot be read.
    """
    named = {
        "model": config.model,
        "queries.train": config.queries.train,
        "queries.evaluation": config.queries.evaluation,
        "constitutions": config.constitutions.place,
    }
    with agreed():
        for path in named.values():
            refuse_unseen(Path(path))
        given = Given(
            model=model_source(Path(config.model)),
            train=file_source(Path(config.queries.train)),
            evaluation=file_source(Path(config.queries.evaluation)),
            principles=constitutions_source(Path(config.constitutions.place)),
        )
    facts = {f"SHA-256 of config.{name}": source.fingerprint[:12] for name, source in zip(named, given, strict=True)}
    check_same(facts, remedy="Put model and data on a disk that all hosts share, or bring the same files to each.")
    return given
