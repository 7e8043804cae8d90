"""A stage is made once for its inputs and reads no setting they lack; a file's parts are kept until it stands."""

import dataclasses
import os
import pathlib
import threading
from typing import Any

import pytest

from chat_server import chatting, says
from sami_jax.config.chat import WriterConfig
from sami_jax.config.evaluation import EvaluationConfig
from sami_jax.config.run import RunConfig
from sami_jax.config.sampling import SamplingConfig
from sami_jax.errors import BadConfigError, BadDataError, NonFiniteError, SaveFailedError, StoppedError
from sami_jax.files import read_json, read_jsonl, write_json
from sami_jax.stage_folder import check_stage_file, locked
from sami_jax.stages.evaluate import Evaluate
from sami_jax.stages.export import Export
from sami_jax.stages.generate import Generate
from sami_jax.stages.judge import Judge
from sami_jax.stages.sample import Sample
from sami_jax.stages.score import Score
from sami_jax.stages.score_principles import ScorePrinciples
from sami_jax.stages.stage import (
    FileStage,
    Output,
    Source,
    Stage,
    complete,
    complete_file,
    file_source,
    model_source,
    settings_but,
)
from sami_jax.stages.train import Train
from sami_jax.stages.write_principles import WritePrinciples
from tiny_run import tiny_run_config


def go_on() -> None:
    """A safe point at which nobody asks to stop."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Count(Stage):
    """Writes its number, and logs."""

    name = "count"

    number: int
    fails: bool = False
    whole: bool = False

    def make(self, out: Output, safe_point: Any) -> Any:
        if self.fails:
            raise NonFiniteError("refused")
        out.log({"number": self.number})
        if self.whole:
            out.build()
        else:
            out.begin()
        out.write("number.json", write_json, self.number)
        return {"numbers": 1}


class TestComplete:
    def test_is_made_once_and_timed(self, tmp_path):
        logged: list[Any] = []
        first, second = (
            complete(Count(number=3), tmp_path / "out", safe_point=go_on, log=logged.append) for _ in range(2)
        )
        assert logged == [{"number": 3}] and read_json(tmp_path / "out" / "number.json") == 3
        assert first.seconds is not None and first.seconds >= 0 and second.seconds is None
        done = read_json(tmp_path / "out" / "DONE.json")
        assert first.source == second.source == Source(tmp_path / "out", done["fingerprint"])
        assert done["counts"] == {"numbers": 1}

    @pytest.mark.parametrize("whole", [False, True])
    def test_other_inputs_are_refused_complete_or_begun(self, tmp_path, whole):
        out = tmp_path / "out"
        complete(Count(number=3, whole=whole), out, safe_point=go_on, log=print)
        for _ in range(2):
            with pytest.raises(BadConfigError, match="made from other inputs"):
                complete(Count(number=4), out, safe_point=go_on, log=print)
            (out / "DONE.json").unlink(missing_ok=True)
            if whole:  # nothing says whose the files are
                with pytest.raises(BadDataError, match="already holds files"):
                    complete(Count(number=3, whole=True), out, safe_point=go_on, log=print)
                break
        assert read_json(out / "number.json") == 3

    def test_what_is_refused_leaves_nothing(self, tmp_path):
        with pytest.raises(NonFiniteError):
            complete(Count(number=3, fails=True), tmp_path / "out", safe_point=go_on)
        assert list(tmp_path.iterdir()) == []

    def test_a_stage_stops_before_it_begins(self, tmp_path):
        def stop() -> None:
            raise StoppedError("stop")

        with pytest.raises(StoppedError):
            complete(Count(number=3), tmp_path / "out", safe_point=stop)
        assert list(tmp_path.iterdir()) == []

    def test_what_is_built_whole_has_its_seal_inside_and_no_plan(self, tmp_path):
        complete(Count(number=3, whole=True), tmp_path / "out", safe_point=go_on, log=print)
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["DONE.json", "number.json"]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_metrics_that_nobody_takes_are_noticed(self, tmp_path):
        with pytest.raises(ValueError, match="nothing takes them"):
            complete(Count(number=3), tmp_path / "out", safe_point=go_on)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Squares(FileStage):
    """The squares of 0 ... count - 1, two a part."""

    name = "squares"

    count: int
    made: list[int] = dataclasses.field(default_factory=list)

    def inputs(self) -> dict[str, Any]:
        return {"count": self.count}

    def make(self, out: Output, safe_point: Any) -> list[Any]:
        out.begin()
        lines: list[Any] = []
        for start in range(0, self.count, 2):

            def two(start: int = start) -> list[Any]:
                self.made.append(start)
                return [n * n for n in range(start, min(start + 2, self.count))]

            lines += out.part(f"{start:05d}.jsonl", two)
            safe_point()
        return lines


def stop_at(call: int) -> Any:
    """A safe point that stops at its n-th call."""
    calls: list[None] = []

    def safe_point() -> None:
        calls.append(None)
        if len(calls) == call:
            raise StoppedError("stop")

    return safe_point


class TestCompleteFile:
    def names(self, folder: pathlib.Path) -> list[str]:
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    def test_parts_are_kept_until_the_file_stands(self, tmp_path):
        file, made = tmp_path / "squares.jsonl", []
        with pytest.raises(StoppedError):
            complete_file(Squares(count=5, made=made), file, safe_point=stop_at(2))
        assert {"squares.jsonl.parts/00000.jsonl", "squares.jsonl.parts/00002.jsonl"} < set(self.names(tmp_path))
        assert not file.exists() and made == [0, 2]
        assert complete_file(Squares(count=5, made=made), file, safe_point=go_on) == [0, 1, 4, 9, 16]
        assert made == [0, 2, 4] and read_jsonl(file) == [0, 1, 4, 9, 16]
        assert self.names(tmp_path) == ["squares.jsonl", "squares.jsonl.DONE.json"]
        assert complete_file(Squares(count=5, made=made), file, safe_point=go_on) == [0, 1, 4, 9, 16]
        assert made == [0, 2, 4] and self.names(tmp_path) == ["squares.jsonl", "squares.jsonl.DONE.json"]

    def test_other_inputs_are_refused_finished_or_begun(self, tmp_path):
        file = tmp_path / "squares.jsonl"
        with pytest.raises(StoppedError):
            complete_file(Squares(count=5), file, safe_point=stop_at(1))
        with pytest.raises(BadConfigError, match=r"squares.jsonl.parts was made from other inputs"):
            complete_file(Squares(count=4), file, safe_point=go_on)
        complete_file(Squares(count=5), file, safe_point=go_on)
        with pytest.raises(BadConfigError, match=r"squares.jsonl was made from other inputs"):
            complete_file(Squares(count=4), file, safe_point=go_on)
        assert read_jsonl(file) == [0, 1, 4, 9, 16]

    def test_a_file_of_something_else_or_changed_since_is_refused_and_kept(self, tmp_path):
        file = tmp_path / "squares.jsonl"
        file.write_text("mine")
        with pytest.raises(BadDataError, match="already exists, and no such command made it"):
            complete_file(Squares(count=5), file, safe_point=go_on)
        assert file.read_text() == "mine" and self.names(tmp_path) == ["squares.jsonl"]
        file.unlink()
        complete_file(Squares(count=5), file, safe_point=go_on)
        file.write_text("0\n")
        with pytest.raises(BadDataError, match="changed after it was made"):
            complete_file(Squares(count=5), file, safe_point=go_on)
        assert file.read_text() == "0\n"
        file.unlink()  # which the sentence offers
        assert complete_file(Squares(count=5), file, safe_point=go_on) == [0, 1, 4, 9, 16]

    def test_killed_between_the_file_and_its_seal_it_is_finished(self, tmp_path):
        file, made = tmp_path / "squares.jsonl", []
        with pytest.raises(StoppedError):
            complete_file(Squares(count=5, made=made), file, safe_point=stop_at(3))
        file.write_text("0\n1\n4\n9\n16\n")
        complete_file(Squares(count=5, made=made), file, safe_point=go_on)
        assert made == [0, 2, 4] and self.names(tmp_path) == ["squares.jsonl", "squares.jsonl.DONE.json"]

    def test_a_file_that_came_there_beside_the_parts_is_refused_and_kept(self, tmp_path):
        file = tmp_path / "squares.jsonl"
        with pytest.raises(StoppedError):
            complete_file(Squares(count=5), file, safe_point=stop_at(1))
        file.write_text("mine")
        with pytest.raises(BadDataError, match="squares.jsonl came there meanwhile, with other lines; move it away"):
            complete_file(Squares(count=5), file, safe_point=go_on)
        assert file.read_text() == "mine"
        file.unlink()
        made: list[int] = []
        assert complete_file(Squares(count=5, made=made), file, safe_point=go_on) == [0, 1, 4, 9, 16] and made == []

    @pytest.mark.parametrize(
        ("name", "kind", "says"),
        [
            ("folder", BadDataError, "folder is a folder"),
            ("mine", BadDataError, "mine already exists, and no such command made it"),
            ("taken", BadDataError, "taken.DONE.json is a folder"),
            ("n" * 240, SaveFailedError, "File name too long"),  # with what its seal's name has more
        ],
    )
    def test_what_cannot_be_written_or_is_somebodys_is_refused_before_the_work(self, tmp_path, name, kind, says):
        (tmp_path / "folder").mkdir()
        (tmp_path / "taken.DONE.json").mkdir()
        (tmp_path / "mine").write_text("mine")
        with pytest.raises(kind, match=says):
            check_stage_file(tmp_path / name)
        check_stage_file(tmp_path / "new")
        check_stage_file(pathlib.Path("/dev/null"))
        assert self.names(tmp_path) == ["mine"]

    def test_what_fails_at_once_leaves_nothing(self, tmp_path):
        class Refused(Squares):
            def make(self, out: Output, safe_point: Any) -> list[Any]:
                raise BadDataError("refused")

        with pytest.raises(BadDataError, match="refused"):
            complete_file(Refused(count=5), tmp_path / "squares.jsonl", safe_point=go_on)
        assert list(tmp_path.iterdir()) == []

    def test_another_process_is_refused(self, tmp_path):
        from sami_jax.errors import RunInUseError

        with locked(tmp_path / "squares.jsonl.parts"), pytest.raises(RunInUseError):
            complete_file(Squares(count=5), tmp_path / "squares.jsonl", safe_point=go_on)

    def test_a_pipe_has_no_parts_and_gets_everything_at_the_end(self, tmp_path):
        pipe, got = tmp_path / "pipe", []
        os.mkfifo(pipe)
        reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
        reader.start()
        complete_file(Squares(count=3), pipe, safe_point=go_on)
        reader.join(60)
        assert got == ["0\n1\n4\n"] and self.names(tmp_path) == [] and [p.name for p in tmp_path.iterdir()] == ["pipe"]

    def test_without_a_file_the_lines_come_back(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert complete_file(Squares(count=3), None, safe_point=go_on) == [0, 1, 4]
        assert list(tmp_path.iterdir()) == []


# What a stage reads and its inputs lack, each with the reason in the stage's own docstring. Another one is a bug: the
# finished folder of other settings would be taken for this one's.
NO_INPUTS = {("train", "train", "checkpoint_every"), ("train", "train", "keep_checkpoints")}
NO_INPUTS |= {("export", "train", "keep_checkpoints")}
NO_INPUTS |= {("judge", "evaluation", "judge")}  # whose model or record is an input by its contents
NO_INPUTS |= {
    (stage, section, name)  # who pays, how much, how fast
    for stage, section in (("write_principles", "writer"), ("judge", "evaluation"))
    for name in (
        "api_key_env",
        "concurrency",
        "timeout_s",
        "max_cost_usd",
        "usd_per_million_input_tokens",
        "usd_per_million_output_tokens",
    )
}


def recording(section: Any, seen: set[str]) -> Any:
    """The section, in a copy that writes down which of its settings are read."""
    kind = type(section)
    names = {field.name for field in dataclasses.fields(kind)}

    def read(self: Any, name: str) -> Any:
        if name in names:
            seen.add(name)
        return object.__getattribute__(self, name)

    return copied(section, type(kind.__name__, (kind,), {"__getattribute__": read}))


def copied(section: Any, kind: type, **changes: Any) -> Any:
    """A section of another kind, with changes that nobody checks."""
    copy = object.__new__(kind)
    for field in dataclasses.fields(section):
        object.__setattr__(copy, field.name, changes.get(field.name, getattr(section, field.name)))
    return copy


def read_without_being_inputs(stage: Stage, make: Any) -> set[tuple[str, str, str]]:
    """(stage, field, setting) of what `make(stage)` reads, though the inputs are the same with another value."""
    sections = {
        field.name: getattr(stage, field.name)
        for field in dataclasses.fields(stage)
        if dataclasses.is_dataclass(value := getattr(stage, field.name)) and not isinstance(value, Source)
    }
    seen: dict[str, set[str]] = {name: set() for name in sections}
    recorded = {name: recording(section, seen[name]) for name, section in sections.items()}
    inputs = dataclasses.replace(stage, **recorded).inputs()  # reads everything
    for names in seen.values():
        names.clear()

    class Known(type(stage)):  # type: ignore[misc]
        def inputs(self) -> dict[str, Any]:
            return inputs

    make(copied(stage, Known, **recorded))
    assert any(seen.values()), "nothing was read: the recording is broken"
    missing = set()
    for name, section in sections.items():
        for setting in seen[name]:
            other = copied(section, type(section), **{setting: ["another value"]})
            if dataclasses.replace(stage, **{name: other}).inputs() == stage.inputs():
                missing.add((stage.name, name, setting))
    return missing


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    return tiny_run_config(tmp_path_factory.mktemp("files"))


@pytest.mark.slow
def test_no_stage_reads_a_setting_that_its_inputs_lack(config, tmp_path):
    base = model_source(pathlib.Path(config.model))
    queries, evaluated, principles = (
        file_source(pathlib.Path(path))
        for path in (config.queries.train, config.queries.evaluation, config.constitutions.principles)
    )
    found: set[tuple[str, str, str]] = set()

    def completed(stage: Stage) -> Source:
        folder = tmp_path / stage.name
        found.update(
            read_without_being_inputs(stage, lambda recorded: complete(recorded, folder, safe_point=go_on, log=id))
        )
        return Source(folder, read_json(folder / "DONE.json")["fingerprint"])

    def completed_file(stage: FileStage) -> None:
        file = tmp_path / f"{stage.name}.jsonl"
        found.update(read_without_being_inputs(stage, lambda recorded: complete_file(recorded, file, safe_point=go_on)))

    sampled = completed(Sample.of(config, 1, model=base, queries=queries, principles=principles))
    pairs = Source(sampled.path / "pairs.json", sampled.fingerprint)
    trained = completed(Train.of(config, 1, base=base, pairs=pairs))
    completed(Export.of(config, 1, base=base, trained=trained))
    given: dict[str, Any] = {"queries": evaluated, "principles": principles, "base": base}
    results = Source(completed(Evaluate.of(config, 0, model=base, baseline=None, **given)).path / "results.jsonl", "x")
    with chatting(says("Verdict: A")) as chat:
        judge = EvaluationConfig(judge="server", base_url=chat.url, judge_model="big")
        files: dict[str, Any] = {"responses": results, "baseline": results, "split": "learned"}
        judging = dataclasses.replace(config, evaluation=judge)
        completed(Judge.of(judging, **files, given=None, log=tmp_path / "judge" / "answers" / "answers.jsonl"))
    written = "Principle: short\nDefinition: Posts should be short.\nAntithesis: Posts should be long."
    with chatting(says(written)) as chat:
        writer = WriterConfig(base_url=chat.url, chat_model="big", about="posts", count=1)
        constitutions = dataclasses.replace(config.constitutions, principles="", principles_per_query=1, writer=writer)
        completed(WritePrinciples.of(dataclasses.replace(config, constitutions=constitutions), given=None))
    completed_file(Score.of(config, model=base, pairs=pairs))
    completed_file(ScorePrinciples.of(config, model=base, principles=principles, queries=evaluated))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Post"}\n{"constitution": "1. Be brief.", "question": "Post"}\n')
    completed_file(Generate.of(config, model=base, prompts=file_source(prompts), rows=2, samples=1, format="jsonl"))
    assert found == NO_INPUTS


def test_a_setting_that_is_read_and_no_input_would_be_found(tmp_path):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Careless(Stage):
        name = "careless"

        sampling: SamplingConfig = settings_but("stop")

        def make(self, out: Output, safe_point: Any) -> Any:
            out.begin()
            return [self.sampling.stop, self.sampling.max_new_tokens]

    found = read_without_being_inputs(
        Careless(sampling=SamplingConfig()), lambda stage: complete(stage, tmp_path / "out", safe_point=go_on)
    )
    assert found == {("careless", "sampling", "stop")}


def test_every_field_of_a_stage_is_an_input(config):
    source = Source(pathlib.Path("x"), "digest")
    stage = Train.of(config, 1, base=source, pairs=source)
    changes: dict[str, Any] = {
        "iteration": 2,
        "base": Source(pathlib.Path("x"), "other"),
        "pairs": Source(pathlib.Path("x"), "other"),
        "seed": 9,
        "train": dataclasses.replace(config.train, learning_rate=1.0),
        "boundary": "authors",
        "compute_dtype": "bfloat16",
        "mesh": dataclasses.replace(config.mesh, data=2),
    }
    assert changes.keys() == {field.name for field in dataclasses.fields(Train)}
    others = [dataclasses.replace(stage, **{name: value}).inputs() for name, value in changes.items()]
    assert all(other != stage.inputs() for other in others)
    elsewhere = dataclasses.replace(stage, base=Source(pathlib.Path("y"), "digest"))
    assert elsewhere.inputs() == stage.inputs()  # the contents count, not the place
