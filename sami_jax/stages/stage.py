"""What a stage is, and the one way in which it is completed: once, for its inputs, with one process that writes."""

import abc
import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from sami_jax import stage_folder
from sami_jax.config.fields import to_dict
from sami_jax.data.authors import constitution_files
from sami_jax.errors import BadDataError
from sami_jax.files import building, content_hash, file_hash, jsonl, read_jsonl, write_jsonl, write_text
from sami_jax.huggingface.folder import folder_hash, read_config
from sami_jax.outputs import is_stream
from sami_jax.processes import agreed, from_writer, is_writer
from sami_jax.safe_point import SafePoint
from sami_jax.stage_folder import file_stands, locked, parts_folder, seal_file

T = TypeVar("T")
Log = Callable[[dict[str, Any]], None]  # takes one line of metrics.jsonl


@dataclasses.dataclass(frozen=True)
class Source:
    """Something a stage reads. It depends on the contents, wherever they lie.

    Attributes:
      path: file or folder.
      fingerprint: of the contents, or of the stage that made them.
    """

    path: Path
    fingerprint: str


def file_source(path: Path) -> Source:
    """A file by the hash of its bytes. Raises BadDataError where it cannot be read."""
    return Source(path, file_hash(path))


def constitutions_source(place: Path) -> Source:
    """A file of principles, or the files of a folder of constitutions, by their bytes. Raises BadDataError as above."""
    if not place.is_dir():
        return file_source(place)
    return Source(place, content_hash([(path.name, file_hash(path)) for path in constitution_files(place)]))


def model_source(folder: Path) -> Source:
    """A model folder by the hash of what is read of it. Raises BadDataError where it is none that can be run."""
    read_config(folder)
    return Source(folder, folder_hash(folder))


def settings_but(*names: str) -> Any:
    """A field for a section of settings. Those named here are no inputs, since no output depends on them."""
    return dataclasses.field(metadata={"but": names})


def no_input() -> Any:
    """A field that is no input, since no output depends on it."""
    return dataclasses.field(metadata={"no_input": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage(abc.ABC):
    """Work that reads files and writes a folder: the same inputs, the same bytes.

    A subclass is a frozen dataclass whose fields are its inputs, every one of them, so that `make` reads no setting
    that `inputs` lacks: a setting that changes no output is named by `settings_but`, a field by `no_input`.

    Attributes:
      name: of the stage, in inputs and messages.
      outside: subfolder that equal stages write differently, and that is not sealed.
    """

    name: ClassVar[str]
    outside: ClassVar[str] = ""

    @property
    def made_of(self) -> str:
        """Name of the folder beside it without which this stage cannot be made anew; "" where there is none."""
        return ""

    def inputs(self) -> dict[str, Any]:
        """JSON value of everything that the outputs depend on."""
        fields = [field for field in dataclasses.fields(self) if not field.metadata.get("no_input")]
        return {"stage": self.name, **{field.name: _plain(getattr(self, field.name), field) for field in fields}}

    @abc.abstractmethod
    def make(self, out: "Output", safe_point: SafePoint) -> Any:
        """Makes what `out` is to hold, or what an interrupted attempt left of it.

        Args:
          out: where to. What refuses the inputs comes before `out.begin()`, so that a refusal leaves nothing.
          safe_point: called where the stage may stop; raises StoppedError.

        Returns:
          Counts: JSON value for people, a pure function of the inputs.
        """


def _plain(value: Any, field: dataclasses.Field) -> Any:
    if isinstance(value, Source):
        return value.fingerprint
    if dataclasses.is_dataclass(value):
        return {name: item for name, item in to_dict(value).items() if name not in field.metadata.get("but", ())}
    return list(value) if isinstance(value, tuple) else value


class Output:
    """Where a stage's outputs go: written by one process for all, each file whole or not at all."""

    def __init__(self, folder: Path | None, inputs: Any, log: Log, *, outside: str = ""):
        """Prepares for a stage's folder, or for None where nothing is kept; nothing is written yet."""
        self._folder, self._inputs, self._log, self._outside = folder, inputs, log, outside
        self._stack = contextlib.ExitStack()
        self.is_open = False

    @property
    def folder(self) -> Path:
        """Where files go. Raises ValueError where nothing is kept."""
        if self._folder is None:
            raise ValueError("Nothing of this stage is kept: its lines go to a device or a pipe.")
        return self._folder

    def begin(self) -> None:
        """Opens the folder, or goes on with what an attempt of the same inputs left there.

        Raises:
          BadConfigError: it holds the beginnings of other inputs.
          BadDataError: it holds files that no stage began with.
        """
        with agreed():
            if is_writer() and self._folder is not None:
                stage_folder.begin(self._folder, inputs=self._inputs, outside=self._outside)

    def withdraw(self) -> None:
        """Takes `begin` back on the way out of a failure, where nothing was made that is worth keeping.

        No process waits for another here: only one of them may have failed.
        """
        if is_writer() and self._folder is not None:
            stage_folder.withdraw(self._folder)

    def leave_open(self) -> None:
        """Keeps the stage from being sealed: what it wrote stands, and the next attempt makes it better."""
        self.is_open = True

    def build(self) -> None:
        """Opens a folder beside the stage's, which replaces it when it is sealed: whole, or not at all.

        Raises:
          BadDataError: the stage's holds files already.
        """
        with agreed():
            if is_writer():
                self._folder = self._stack.enter_context(building(self.folder))

    def write(self, name: str, write: Callable[[Path, Any], None], value: Any) -> None:
        """Has one process write a file, by a function of path and value that writes it whole or not at all."""
        with agreed():
            if is_writer():
                write(self.folder / name, value)

    def part(self, name: str, make: Callable[[], list[Any]]) -> list[Any]:
        """The lines of a part: read where they stand, else made and written."""
        if self._folder is None:
            return make()
        if not self.stands(name):
            self.write(name, write_jsonl, make())
        return read_jsonl(self.folder / name)

    def stands(self, name: str) -> bool:
        """Whether a part was written before. Every process asks, and hears what the one that writes sees."""
        folder = self._folder
        return folder is not None and from_writer(lambda: (folder / name).exists())

    def alone(self, make: Callable[[], T]) -> T | None:
        """What the one process makes that also writes: what costs money, or time, is done once. None in the others."""
        with agreed():
            return make() if is_writer() else None

    def log(self, record: dict[str, Any]) -> None:
        """Appends a line to the metrics."""
        if is_writer():
            self._log(record)

    def seal(self, stage: Stage, counts: Any) -> str:
        """Declares the stage complete, and moves what was built to the stage's folder. Returns its fingerprint."""

        def sealed() -> str:
            outside, made_of = stage.outside, stage.made_of
            fingerprint = stage_folder.seal(
                self.folder, inputs=self._inputs, counts=counts, outside=outside, made_of=made_of
            )
            self._stack.close()
            return fingerprint

        return from_writer(sealed)

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


class Completed(NamedTuple):
    """A stage that stands.

    Attributes:
      source: its folder, for the stages that read it; without a fingerprint where it was left open.
      seconds: that it took; None where it stood before.
    """

    source: Source
    seconds: float | None


def _no_log(record: dict[str, Any]) -> None:
    raise ValueError(f"This stage logs metrics ({sorted(record)}), but nothing takes them.")


def complete(stage: Stage, folder: Path, *, safe_point: SafePoint, log: Log = _no_log) -> Completed:
    """Makes a stage in its folder, unless it stands there. Every process calls this; one of them writes.

    Args:
      stage: with its inputs.
      folder: locked by whoever calls.
      safe_point: see `Stage.make`.
      log: takes lines of metrics.

    Raises:
      BadConfigError: the folder holds another stage, complete or begun.
      BadDataError: an output was changed after the seal, or `folder` holds files that no stage began with.
      SamiError: what the stage raises.
    """
    inputs, seconds = stage.inputs(), None
    fingerprint = from_writer(lambda: stage_folder.seal_of(folder, inputs=inputs))
    if fingerprint is None:
        safe_point()
        started = time.monotonic()
        with Output(folder, inputs, log, outside=stage.outside) as out:
            counts = stage.make(out, safe_point)
            fingerprint = "" if out.is_open else out.seal(stage, counts)
        seconds = time.monotonic() - started
    return Completed(Source(folder, fingerprint), seconds)


class FileStage(Stage):
    """A stage that makes the lines of one file, in parts."""

    @abc.abstractmethod
    def make(self, out: Output, safe_point: SafePoint) -> list[Any]:
        """The file's lines, of `out.part`s with a safe point behind each; see `Stage.make`."""

    def text(self, lines: list[Any]) -> str:
        """The file's text: JSON lines, unless the stage has a format of its own."""
        return jsonl(lines)

    def read(self, file: Path) -> list[Any]:
        """What `text` was made of, as far as the file keeps it."""
        return read_jsonl(file)

    def counts(self, lines: list[Any]) -> Any:
        """JSON value for people, a pure function of the inputs."""
        return len(lines)


def complete_file(stage: FileStage, file: Path | None, *, safe_point: SafePoint) -> list[Any]:
    """The lines of a file, which is made unless it stands.

    What is done lies in `FILE.parts/`, from which an interrupted command goes on, until FILE stands; what it was made
    from, and its hash, stay in `FILE.DONE.json`. A device or a pipe is written to at the end, and has neither.

    Args:
      stage: with its inputs.
      file: where to; None gives the lines back and writes nothing.
      safe_point: see `Stage.make`.

    Raises:
      BadConfigError: the file, or its parts, were made from other inputs.
      BadDataError: the file is none of this command's, or was changed since.
      RunInUseError: another process makes it.
      SaveFailedError: the disk is full or not writable.
      SamiError: what the stage raises.
    """
    if file is None or is_stream(file):
        lines = stage.make(Output(None, None, _no_log), safe_point)
        if file:
            write_text(file, stage.text(lines))
        return lines
    inputs, parts = stage.inputs(), parts_folder(file)
    if not file_stands(file, inputs=inputs):
        with locked(parts):
            if not file_stands(file, inputs=inputs):
                with Output(parts, inputs, _no_log) as out:
                    lines = stage.make(out, safe_point)
                text = stage.text(lines)
                if file.exists() and file.read_bytes() != text.encode():  # not ours, cut off before its seal
                    raise BadDataError(f"{file} came there meanwhile, with other lines; move it away, then run again.")
                write_text(file, text)
                seal_file(file, inputs=inputs, counts=stage.counts(lines))
            shutil.rmtree(parts)
    return stage.read(file)
