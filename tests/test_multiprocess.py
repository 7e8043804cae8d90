"""Two processes with four devices each do what one device does, and where one of them fails, both do."""

import dataclasses
import functools
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import multiprocess_worker as worker
from chat_server import ChatHandler, chatting, completion
from sami_jax.checkpoints import Checkpoints, fingerprint
from sami_jax.config.mesh import MeshConfig
from sami_jax.data.authors import AnsweredQuestion, responses_text
from sami_jax.huggingface.families import config_to_huggingface
from sami_jax.huggingface.folder import read_config, save_finetuned, save_model
from sami_jax.model.decoder import abstract_params
from sami_jax.model.shape import DecoderConfig
from sami_jax.sharding import make_mesh, param_shardings
from server_judges import parts, shorter
from talking_model import write_talking_model
from tiny_models import FAMILIES, random_params, write_tokenizer

ROOT = Path(__file__).parents[1]
PRINCIPLES_TEXT = """Principle: short
Definition: Posts should be short.
Antithesis: Posts should be long.
Principle: kind
Definition: Posts should be kind.
Antithesis: Posts should be rude."""
LIMIT_S = 400  # two cores to themselves take less than 60
pytestmark = pytest.mark.slow


def write_models(folder: Path) -> None:
    """FOLDER/F/model-N for every family F and process N, with weights of 64 KiB and more."""
    size = write_tokenizer(folder / "tokenizer", "byte_level", bos=True).get_vocab_size()
    for family, shape in FAMILIES.items():
        shape = dataclasses.replace(shape, vocab_size=size, embed_dim=64, mlp_dim=128, max_positions=256)
        params = random_params(shape)
        save(folder / family / "model", params, shape, tokenizer=folder / "tokenizer")
        for process in range(worker.PROCESSES):
            save(folder / family / f"model-{process}", params, shape, tokenizer=folder / "tokenizer")
            if family == "mistral":
                hide(folder, folder / family / f"model-{process}", shape, worker.MESHES[family], process)


def save(folder: Path, params: Any, shape: DecoderConfig, *, tokenizer: Path) -> None:
    save_model(
        folder,
        params,
        shape,
        dtype="float32",
        huggingface_config=config_to_huggingface(shape, bos_token_id=1, eos_token_id=2),
        generation_config=None,
        tokenizer_folder=tokenizer,
        card="# Tiny\n",
    )


def hide(folder: Path, model: Path, shape: DecoderConfig, mesh: MeshConfig, process: int) -> None:
    """Makes NaN, which loading refuses, of whatever is on no device of the process."""
    shapes, axes = abstract_params(shape)
    devices = jax.devices()[process * 4 : process * 4 + 4]

    def held(spec: jax.ShapeDtypeStruct, sharding: jax.sharding.NamedSharding) -> np.ndarray:
        mask = np.zeros(spec.shape, np.float32)
        for device, index in sharding.devices_indices_map(spec.shape).items():
            mask[index] = max(mask[index].max(), device in devices)
        return mask

    masks = jax.tree.map(held, shapes, param_shardings(make_mesh(mesh), shapes, axes))
    save(folder / "masks" / str(process), masks, shape, tokenizer=folder / "tokenizer")
    masks, weights = (load_file(place / "model.safetensors") for place in (folder / "masks" / str(process), model))
    assert all(mask.mean() == 0.5 for mask in masks.values())
    hidden = {name: np.where(masks[name], weight, np.nan) for name, weight in weights.items()}
    save_file(hidden, model / "model.safetensors", metadata={"format": "pt"})


def launch(folder: Path) -> None:
    """Runs both processes to their end. One that fails or is late ends the other, and says why."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_"))} | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is what takes the time
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    errors = [folder / f"stderr-{process}" for process in range(worker.PROCESSES)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for process, path in enumerate(errors):
            words = [sys.executable, worker.__file__, str(port), str(process), str(folder), str(LIMIT_S)]
            with path.open("wb") as stderr:
                processes.append(
                    subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=stderr, cwd=folder)
                )
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    codes = [process.returncode for process in processes]
    assert codes == [0, 0], f"exit codes {codes}\n" + "\n".join(path.read_text()[-5000:] for path in errors)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind."""
    folder = tmp_path_factory.mktemp("processes")
    write_models(folder)
    (folder / "taken").mkdir()
    (folder / "taken" / "thesis.txt").write_text("mine")
    write_talking_model(folder / "talking", BLOCKS)
    for name, texts in (("ours", ("a", "b", "longer")), ("theirs", ("longer", "longer", "a"))):
        rows = [AnsweredQuestion("1. Be brief.", f"Post {i}", text) for i, text in enumerate(texts)]
        (folder / f"{name}.json").write_text(responses_text(rows))
    with chatting(writes_or_echoes) as chat:
        (folder / "url").write_text(chat.url)
        launch(folder)
    (folder / "asked.json").write_text(json.dumps([request["messages"][-1]["content"] for request in chat.requests]))
    return folder


BLOCKS = [f"{label}\n" for label in PRINCIPLES_TEXT.split("\n")]


def writes_or_echoes(handler: ChatHandler, asked: dict[str, Any]) -> None:
    user = asked["messages"][-1]["content"]
    if user == "refuse":
        handler.send(200, completion(None, refusal="I cannot."))
    elif "Verdict: A" in user:
        handler.send(200, completion(shorter(parts(asked))))
    else:
        handler.send(200, completion(PRINCIPLES_TEXT if user.startswith("Write") else user[::-1]))


@pytest.fixture(scope="module")
def one_device(folder: Path) -> Any:
    """The same way on one device of this process: family -> arrays, facts, states."""
    return functools.cache(
        lambda family: worker.way_through(folder / family / "model", MeshConfig(), folder / "one" / family)
    )


def seen(folder: Path, family: str, process: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    path = folder / family / f"process-{process}"
    return dict(np.load(f"{path}.npz")), json.loads(path.with_suffix(".json").read_text())


def test_a_server_is_asked_by_one_process_and_a_model_by_both(folder):
    chats, others = (seen(folder, "mistral", process)[1]["chats"] for process in (0, 1))
    assert chats == others
    posts = ["Posts should be short.", "Posts should be kind."]
    assert chats["written"] == {"server": posts, "model": posts}
    texts = [reply["answer"]["text"] if "answer" in reply else reply["failure"]["kind"] for reply in chats["asked"]]
    assert texts == ["eno", "owt", "eno", "refused"]
    asked = json.loads((folder / "asked.json").read_text())
    assert [user for user in asked if not user.startswith(("Write", "You compare"))] == ["one", "two", "refuse"]
    assert len([user for user in asked if user.startswith("Write")]) == 1


def test_a_judge_is_asked_by_one_process_or_by_both_and_both_know_who_won(folder):
    judged, others = (seen(folder, "mistral", process)[1]["judges"] for process in (0, 1))
    assert judged == others
    nothing = {"n": 3, "wins": 0, "losses": 0, "ties": 0, "inconsistent": 0, "excluded": 0}
    # To the model all but its own lines is equally likely.
    assert judged == {"server": nothing | {"wins": 2, "losses": 1}, "model": nothing | {"ties": 3}}
    asked = json.loads((folder / "asked.json").read_text())
    assert len([user for user in asked if user.startswith("You compare")]) == 6


@pytest.mark.parametrize("family", FAMILIES)
class TestTwoProcesses:
    def test_both_see_the_same(self, folder, family):
        (arrays, facts), (others, other_facts) = (seen(folder, family, process) for process in (0, 1))
        assert arrays.keys() == others.keys()
        for name, values in arrays.items():
            np.testing.assert_array_equal(others[name], values, err_msg=name)
        for name in ("responses", "fingerprints"):
            assert facts[name] == other_facts[name]

    def test_logits_matrices_and_losses_are_those_of_one_device(self, folder, family, one_device):
        (two, _), (one, *_) = seen(folder, family, 0), one_device(family)
        # Logits of size 10 from sums in another order: they differ by 2e-5, the matrices by 5e-6.
        np.testing.assert_allclose(two["logits"], one["logits"], rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(two["matrices"], one["matrices"], rtol=1e-5, atol=1e-5)
        # The promise D1: 1e-6 relative in float32; a query alone, of which nothing averages out, 1e-5.
        np.testing.assert_allclose(two["metrics.loss"], one["metrics.loss"], rtol=1e-6)
        for name in one:
            if name.startswith("metrics."):
                np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-5, err_msg=name)

    def test_gradients_and_the_updated_weights_are_those_of_one_device(self, folder, family, one_device):
        (two, facts), (one, *_) = seen(folder, family, 0), one_device(family)
        assert facts["loss"] == two["metrics.loss"] and facts["nonfinite"] == []
        names = [name for name in one if name.startswith((".params", ".opt_state", ".step"))]
        assert names == [name for name in two if name.startswith(".")]
        for name in names:
            # The first moment is 0.1 x the gradient. Sums of a few hundred float32 terms in another order differ by up
            # to 5e-6 of the largest entry. An update is 1e-2 x g / (|g| + 1e-3) and so feels an error of 1e-6 in a
            # small g by 1e-5: 4e-6 was seen, where a whole update is 1e-2.
            atol = 2e-5 if name.startswith(".params") else 2e-5 * np.abs(one[name]).max()
            np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=atol, err_msg=name)
        assert one["metrics.share_changed"] > 0.5

    def test_the_checkpoint_is_the_one_that_one_process_reads(self, folder, family, one_device, tmp_path):
        _, facts = seen(folder, family, 0)
        untrained, stepped, restored = facts["fingerprints"]
        _, one_facts, states = one_device(family)
        assert untrained == one_facts["fingerprints"][0] != stepped == restored
        with Checkpoints(folder / family / "checkpoints") as checkpoints:
            state = checkpoints.restore_latest(states["restored"])
        assert fingerprint(state) == stepped
        # One process exports the same bytes, the other files included.
        source = folder / family / "model-0"
        shape = read_config(folder / family / "model")
        save_finetuned(tmp_path / "export", state.params, shape, dtype="float32", source=source, card="# Trained\n")
        mine, theirs = (
            {path.name: path.read_bytes() for path in place.iterdir()}
            for place in (tmp_path / "export", folder / family / "export")
        )
        assert mine == theirs

    def test_the_exported_tensors_are_those_of_one_device(self, folder, family, one_device):
        one_device(family)
        two, one = (load_file(place / family / "export/model.safetensors") for place in (folder, folder / "one"))
        assert two.keys() == one.keys()
        for name, values in one.items():
            # As the weights above.
            np.testing.assert_allclose(two[name], values, rtol=1e-5, atol=2e-5, err_msg=name)

    def test_responses_are_those_of_one_device(self, folder, family, one_device):
        _, facts = seen(folder, family, 0)
        assert facts["responses"] == json.loads(json.dumps(one_device(family)[1]["responses"]))
        assert any(text for text, *_ in facts["responses"])

    def test_every_leaf_is_split_by_the_rules_and_evenly(self, folder, family):
        shape = read_config(folder / family / "model")
        shapes, axes = abstract_params(shape)
        mesh = worker.MESHES[family]
        shardings = worker.named(param_shardings(make_mesh(mesh), shapes, axes))
        sizes = {name: 4 * spec.size for name, spec in worker.named(shapes).items()}
        large = 0
        for process in range(worker.PROCESSES):
            for leaves in (seen(folder, family, process)[1][key] for key in ("stepped", "restored")):
                for name, (spec, held) in leaves.items():
                    leaf = re.search(r"\.(?:params|mu|nu)(\[.*)", name)
                    assert spec == str(shardings[leaf[1]].spec if leaf else jax.sharding.PartitionSpec()), name
                    assert len(held) == worker.DEVICES // worker.PROCESSES
                    if leaf and sizes[leaf[1]] >= 65536:
                        assert max(held) <= 1.1 * sizes[leaf[1]] * mesh.data / worker.DEVICES, name
                        large += 1
        assert large >= 2 * 2 * 3 * 2  # processes, states, weights and their two moments


def test_a_folder_is_converted(folder):
    original, converted = (
        load_file(folder / "mistral" / name / "model.safetensors") for name in ("model", "converted")
    )
    assert converted.keys() == original.keys()
    for name, values in original.items():
        np.testing.assert_array_equal(converted[name], values.astype(np.float16), err_msg=name)


@pytest.mark.parametrize(
    ("attempt", "kind", "writer_says", "other_says"),
    [
        ("full disk", "SaveFailedError", r"^\S+ could not be written .* free some", r"^process 0: \S+ could not be"),
        ("folder taken", "BadDataError", r"^\S+ already holds files", r"^process 0: \S+ already holds files"),
        ("stage's folder taken", "BadDataError", r"^\S+ already holds files", r"^process 0: \S+ already holds files"),
        ("model missing", "BadDataError", "^process 1: There is no model folder", "^There is no model folder"),
        ("crossed", "BadDataError", "^process 1: alone$", "^alone$"),
        (
            "facts differ",
            "BadConfigError",
            "^process 1: train.steps is 0 in process 0, 1 in process 1. Mend",
            "^train.st",
        ),
        ("folder unseen", "BadConfigError", r"^process 1: \S+ does not see in .*/elsewhere what", r"^\S+ does not see"),
        ("model unseen", "BadConfigError", r"^process 1: \S+ does not see /.*/nowhere; put", r"^\S+ does not see /"),
        (
            "given differs",
            "BadConfigError",
            r"^process 1: SHA-256 of config.model is '\w{12}' in process 0, '",
            "^SHA-256 of config.model is",
        ),
        (
            "mesh of one process",
            "BadConfigError",
            "leaves none to process 1; raise",
            "4 of 8 devices, and leaves none to",
        ),
        ("asked to stop", "StoppedError", "^Stopped by SIGTERM at process 1;", "^Stopped by SIGTERM at process 1;"),
        ("damaged checkpoint", "BadDataError", "no checkpoint can be read", "no checkpoint can be read"),
        ("values differ", "AssertionError", "Expected", "Expected"),
    ],
)
def test_where_one_process_fails_both_do(folder, attempt, kind, writer_says, other_says):
    for process, says in enumerate((writer_says, other_says)):
        raised, message = seen(folder, "mistral", process)[1]["failures"][attempt]
        assert raised == kind and re.search(says, message), message


def test_a_failure_leaves_nothing_half_written(folder):
    assert sorted(path.name for path in (folder / "failed").iterdir()) == ["checkpoints", "seen"]
    assert list((folder / "failed/seen").iterdir()) == []
    assert [path.name for path in (folder / "failed/checkpoints").iterdir()] == ["damaged-step-1"]
    assert [path.name for path in (folder / "taken").iterdir()] == ["thesis.txt"]


def test_a_stage_is_made_once_by_all_and_written_by_one(folder):
    ours, theirs = (seen(folder, "mistral", process)[1] for process in range(worker.PROCESSES))
    assert ours["completed"] == theirs["completed"] and [made for _, made in ours["completed"]] == [True, False] * 2
    assert ours["logged"] == [{"writer": 0}] * 2 and theirs["logged"] == []
    found = {
        str(path.relative_to(folder / "stages")): path.read_text()
        for path in (folder / "stages").rglob("*")
        if path.is_file() and path.name not in ("DONE.json", "PLAN.json")
    }
    assert found == {"begun/part.jsonl": "0\n", "begun/writer.json": "0\n", "whole/writer.json": "0\n"}
