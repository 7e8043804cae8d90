"""A model's whole way through the library, on the devices of one process or of several.

`python multiprocess_worker.py PORT PROCESS FOLDER LIMIT_S` goes it as one of two processes; test_multiprocess starts
both. What process N saw of family F is in FOLDER/F/process-N.npz and .json.
"""

import dataclasses
import faulthandler
import functools
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import doubles
from sami_jax.chat.opening import make_chat, open_answers
from sami_jax.chat.questions import Question, reply_to_json
from sami_jax.checkpoints import Checkpoints, fingerprint
from sami_jax.config.chat import WriterConfig
from sami_jax.config.data import ConstitutionsConfig, QueriesConfig
from sami_jax.config.evaluation import EvaluationConfig
from sami_jax.config.mesh import MeshConfig
from sami_jax.config.run import RunConfig
from sami_jax.config.sampling import SamplingConfig
from sami_jax.config.training import TrainConfig
from sami_jax.data.principles import read_principles
from sami_jax.data.rendering import plain_prompt
from sami_jax.errors import BadDataError
from sami_jax.files import read_json, write_json
from sami_jax.huggingface.folder import save_finetuned
from sami_jax.huggingface.opened import load_model
from sami_jax.processes import agreed, check_same, from_writer, is_writer
from sami_jax.responding import respond
from sami_jax.run.agreement import check_seen, read_given, refuse_unseen
from sami_jax.run.chats import given_source
from sami_jax.safe_point import stop_on_signal
from sami_jax.scoring.matrices import all_logits, shardings_of_rows
from sami_jax.scoring.reference import KeptReference, group_hidden, head_of
from sami_jax.sharding import batch_sharding, gather, make_mesh, put_on_devices
from sami_jax.stages.export import convert
from sami_jax.stages.judge import Judge
from sami_jax.stages.score import Scoring, matrices, packed
from sami_jax.stages.stage import Output, Stage, complete, file_source
from sami_jax.stages.train import abstract_train_state, fresh_state
from sami_jax.stages.write_principles import WritePrinciples
from sami_jax.training import make_train_step, nonfinite_examples
from sami_jax.types import TrainState

PROCESSES, DEVICES = 2, 8
# The first four devices are process 0's. Over fsdp and expert each process has half of every weight or of the experts;
# over data each has a copy.
MESHES = {
    "mistral": MeshConfig(fsdp=8),
    "llama3": MeshConfig(data=2, fsdp=2, tensor=2),
    "mixtral": MeshConfig(expert=4, tensor=2),
}
QUERIES, PROMPTS = 16, ("The post is about", "Human: How do I bake bread?", "Sum")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WhoWrites(Stage):
    """Its files hold the number of the process that wrote them."""

    name = "who writes"

    whole: bool

    def make(self, out: Output, safe_point: Callable[[], None]) -> Any:
        if self.whole:
            out.build()
        else:
            out.begin()
            assert out.part("part.jsonl", lambda: [jax.process_index()]) == [0]
        out.write("writer.json", write_json, jax.process_index())
        assert out.alone(jax.process_index) == (0 if jax.process_index() == 0 else None)
        out.log({"writer": jax.process_index()})
        return {}


def stages(folder: Path) -> dict[str, Any]:
    """What this process saw of stages that are completed twice: what it logged, and whether it made them."""
    logged: list[Any] = []
    seen = []
    # A disk that shows the other process' files late: what stands is what the one that writes sees.
    place = folder / "late" / str(jax.process_index())
    if is_writer():
        write_json(place / "there.json", 0)
    out = Output(place, {}, logged.append)
    assert out.stands("there.json") and not out.stands("missing.json")
    for name in ("begun", "begun", "whole", "whole"):
        stage = WhoWrites(whole=name == "whole")
        done = complete(stage, folder / "stages" / name, safe_point=lambda: None, log=logged.append)
        seen.append([done.source.fingerprint, done.seconds is not None])
    return {"logged": logged, "completed": seen}


def chats(folder: Path) -> dict[str, Any]:
    """What this process sees of principles that a server writes, and a model on all devices; each stage twice."""
    seen: dict[str, Any] = {"asked": [], "written": {}}
    writers = {
        "server": WriterConfig(base_url=(folder / "url").read_text(), chat_model="big", about="posts", count=2),
        "model": WriterConfig(model=str(folder / "talking"), about="posts", count=2, max_tokens=40),
    }
    for name, writer in writers.items():
        constitutions = ConstitutionsConfig(principles_per_query=1, writer=writer)
        stage = WritePrinciples.of(
            RunConfig(mesh=MeshConfig(data=DEVICES), constitutions=constitutions), given=given_source(writer)
        )
        for _ in range(2):
            done = complete(stage, folder / "written" / name, safe_point=lambda: None)
        seen["written"][name] = [p.definition for p in read_principles(done.source.path / "principles.json")]
    # What is on its way, and what was answered, comes from the process that asks; a failure does, too.
    chat = make_chat(writers["server"], None, mesh=MeshConfig(data=DEVICES), compute_dtype="float32", say=print)
    log = folder / "asked" / "answers.jsonl"
    with open_answers(writers["server"], chat, log, safe_point=lambda: None, say=print) as answers:
        for user in ("one", "two", "one", "refuse"):
            [reply] = answers.ask([Question(user)])
            seen["asked"].append(reply_to_json(reply))
    return seen


def judges(folder: Path) -> dict[str, Any]:
    """What this process sees of comparisons by a server and by a model on all devices; each stage twice."""
    seen: dict[str, Any] = {}
    asked = {
        "server": EvaluationConfig(judge="server", base_url=(folder / "url").read_text(), judge_model="big"),
        "model": EvaluationConfig(judge=f"model:{folder / 'talking'}"),
    }
    for name, evaluation in asked.items():
        place = folder / "judged" / name
        stage = Judge.of(
            RunConfig(mesh=MeshConfig(data=DEVICES), evaluation=evaluation),
            responses=file_source(folder / "ours.json"),
            baseline=file_source(folder / "theirs.json"),
            split="",
            given=given_source(evaluation.chat),
            log=place / "answers" / "answers.jsonl",
        )
        for _ in range(2):
            complete(stage, place, safe_point=lambda: None)
        summary = read_json(place / "summary.json")
        seen[name] = {key: summary[key] for key in ("n", "wins", "losses", "ties", "inconsistent", "excluded")}
    return seen


def way_through(
    model: Path, mesh: MeshConfig, out: Path
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, TrainState]]:
    """Loads, scores, trains one step, saves, restores, exports, samples.

    Args:
      model: Hugging Face folder.
      mesh: the devices.
      out: gets `checkpoints/` and `export/`.

    Returns:
      Arrays and JSON values to compare, and the trained state as it was "stepped" and "restored".
    """
    config = RunConfig(
        mesh=mesh,
        # eps: an update that feels the gradient's size.
        train=TrainConfig(queries_per_step=QUERIES, learning_rate=1e-2, eps=1e-3, kl_beta=0.1, remat="none"),
        sampling=SamplingConfig(max_new_tokens=12, stop=("##",)),
    )
    loaded = load_model(model, mesh, config.compute_dtype)
    shape = loaded.model.config
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, (8, 11)).astype(np.int32)
    of = jax.jit(functools.partial(all_logits, loaded.model.rows))
    logits = of(loaded.params, put_on_devices(tokens, batch_sharding(loaded.mesh)))
    arrays = {"logits": gather(logits)}
    pairs = doubles.random_pairs(QUERIES, vocab=shape.vocab_size, seed=5)
    arrays["matrices"] = matrices(loaded, loaded.params, pairs, Scoring.of(config.train))
    responses = respond(loaded, [plain_prompt(loaded.tokenizer, text) for text in PROMPTS], config.sampling)

    state = fresh_state(loaded, config.train)
    untrained = fingerprint(state)
    rows = packed(loaded, [pairs], Scoring.of(config.train))
    batch = put_on_devices(rows.stacked(0), shardings_of_rows(loaded.mesh, stacked=True))
    # The policy is still the base: KL is 0 where every process kept, and put back, what belongs to its own rows.
    hidden = {0: group_hidden(loaded.model.rows, loaded.params, rows, 0, loaded.mesh)}
    reference = KeptReference(head_of(loaded.model.rows, loaded.params), hidden).of(0)
    state, metrics = make_train_step(loaded.model.rows, config.train)(state, reference, batch)
    assert abs(float(metrics.kl)) < 1e-5, metrics.kl
    arrays |= {f"metrics.{name}": gather(value) for name, value in metrics._asdict().items()}
    arrays |= named(gather(state))
    with Checkpoints(out / "checkpoints") as checkpoints:
        checkpoints.save(state)
        restored = checkpoints.restore_latest(abstract_train_state(loaded, config.train))
    assert restored is not None
    save_finetuned(out / "export", restored.params, shape, dtype="float32", source=model, card="# Trained\n")
    facts = {
        "responses": [[response.text, response.ids, response.finished] for response in responses],
        "loss": float(metrics.loss),
        "nonfinite": nonfinite_examples(metrics, [pair.example_id for pair in pairs]),
        "fingerprints": [untrained, fingerprint(state), fingerprint(restored)],
    }
    return arrays, facts, {"stepped": state, "restored": restored}


def named(tree: Any) -> dict[str, Any]:
    """Leaves by their path."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def placed(state: TrainState) -> dict[str, tuple[str, list[int]]]:
    """How each leaf is split, and the bytes of it on each of this process' devices."""
    return {
        name: (str(leaf.sharding.spec), [shard.data.nbytes for shard in leaf.addressable_shards])
        for name, leaf in named(state).items()
    }


def failures(folder: Path, state: TrainState, process: int) -> dict[str, list[str]]:
    """What each process raises where only one of them has a reason to, or where their values differ."""
    model, out, config = folder / "mistral" / "model-0", folder / "failed", RunConfig(mesh=MESHES["mistral"])
    loaded = load_model(folder / "mistral" / f"model-{process}", config.mesh, config.compute_dtype)

    def export(place: Path) -> None:
        save_finetuned(place, state.params, loaded.model.config, dtype="float32", source=model, card="# Trained\n")

    def full_disk() -> None:
        # A limit on the size of files stands for the disk of the process that writes.
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if process else 100_000, hard))
        try:
            export(out / "full")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def damaged_checkpoint() -> None:
        with Checkpoints(out / "checkpoints") as checkpoints:
            checkpoints.save(state)
            meta = out / "checkpoints" / "step_00000001" / "meta" / "metadata"
            if process == 0:
                meta.write_text(json.dumps({"fingerprint": "0" * 16}))
            gather(put_on_devices(np.zeros(DEVICES), batch_sharding(loaded.mesh)))  # wait for it
            checkpoints.restore_latest(abstract_train_state(loaded, config.train))

    @agreed()
    def unseen(path: Path) -> None:
        refuse_unseen(path)

    def crossed() -> None:
        with agreed():
            if process == 1:
                raise BadDataError("alone")
            from_writer(lambda: "heard where the other was to end its block")

    def asked_to_stop() -> None:
        with stop_on_signal() as safe_point:
            safe_point()
            if process == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            safe_point()

    def given_differs() -> None:
        card = str(model / "README.md")
        queries = QueriesConfig(train=card, evaluation=card)
        mine = str(folder / "mistral" / f"model-{process}")
        read_given(RunConfig(model=mine, queries=queries, constitutions=ConstitutionsConfig(principles=card)))

    attempts: dict[str, Callable[[], Any]] = {
        "given differs": given_differs,
        "mesh of one process": lambda: make_mesh(MeshConfig(fsdp=4)),
        "model unseen": lambda: unseen(folder / "nowhere" if process else model),
        "crossed": crossed,
        "facts differ": lambda: check_same({"train": {"steps": process, "passes": 1}}, remedy="Mend it."),
        "folder unseen": lambda: check_seen(out / ("elsewhere" if process else "seen")),
        "asked to stop": asked_to_stop,
        "full disk": full_disk,
        "folder taken": lambda: export(folder / "taken"),
        "stage's folder taken": lambda: complete(WhoWrites(whole=False), folder / "taken", safe_point=lambda: None),
        "model missing": lambda: load_model(folder / "nowhere" if process else model, config.mesh, "float32"),
        "damaged checkpoint": damaged_checkpoint,
        "values differ": lambda: put_on_devices(np.full(DEVICES, process), batch_sharding(loaded.mesh)),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = ["", ""]
        except Exception as error:
            found[name] = [type(error).__name__, str(error)]
    return found


def main(port: str, process: int, folder: Path) -> None:
    jax.config.update("jax_num_cpu_devices", DEVICES // PROCESSES)
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, process)
    for family, mesh in MESHES.items():
        out = folder / family
        arrays, facts, states = way_through(out / f"model-{process}", mesh, out)
        facts |= {name: placed(state) for name, state in states.items()}
        if family == "mistral":
            facts["failures"] = failures(folder, states["restored"], process)
            facts |= stages(folder)
            facts["chats"] = chats(folder)
            facts["judges"] = judges(folder)
            # The untrained weights, of which this process reads its own half.
            model = out / f"model-{process}"
            convert(mesh, model=model, out=out / "converted", dtype="float16", verify=True)
        np.savez(out / f"process-{process}.npz", **arrays)
        (out / f"process-{process}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(float(sys.argv[4]), exit=True)  # who waits for ever says where, and ends
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
