"""A name on the Hub stands for a folder: fetched from a real server, found in the cache, or refused in a sentence."""

import http.server
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from hub_server import Hub, serving
from sami_jax.config.training import TrainConfig
from sami_jax.files import read_json, read_jsonl
from sami_jax.huggingface.families import config_to_huggingface
from sami_jax.huggingface.folder import save_model
from sami_jax.huggingface.hub import fetch_model, model_name
from sami_jax.stages.export import model_card
from tiny_models import random_params, tiny_config, write_tokenizer

ROOT = pathlib.Path(__file__).parents[1]
FIRST, SECOND = "1" * 40, "2" * 40  # commits

COMMANDS = """
import contextlib, io, json, sys, time
from sami_jax.cli.main import main

results = []
for words in json.load(sys.stdin):
    started, said = time.monotonic(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = int(main(words))
    results.append([code, said.getvalue().strip().splitlines()[-1], time.monotonic() - started])
print(json.dumps(results))
"""


def commands(cache: pathlib.Path, endpoint: str, *lists: list[str], offline: bool = False) -> list[Any]:
    """Runs `sami` with each list of words, in one process. Returns exit code, last line of stderr, seconds of each."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "HF_", "TRANSFORMERS_"))}
    environment |= {"JAX_PLATFORMS": "cpu", "HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input=json.dumps(lists),
        cwd=ROOT,
        env=environment | ({"HF_HUB_OFFLINE": "1"} if offline else {}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """The files of a repository: a tiny model in three files with an index, and what others put beside them."""
    folder = tmp_path_factory.mktemp("model")
    size = write_tokenizer(folder / "tokenizer", "byte_level", bos=True).get_vocab_size()
    config = tiny_config(vocab_size=size, max_positions=256)
    save_model(
        folder / "model",
        random_params(config),
        config,
        dtype="bfloat16",
        huggingface_config=config_to_huggingface(config, bos_token_id=1, eos_token_id=2),
        generation_config={"eos_token_id": 2},
        tokenizer_folder=folder / "tokenizer",
        card="# Tiny\n",
        shard_bytes=20_000,
    )
    model = {path.name: path.read_bytes() for path in (folder / "model").iterdir()}
    others = ("consolidated.safetensors", "pytorch_model.bin", "original/model.safetensors", "params.json")
    return model | dict.fromkeys(others, b"not read")


@pytest.fixture
def hub(files) -> Iterator[Hub]:
    with serving(Hub({"acme/tiny": dict.fromkeys(("main", FIRST), (FIRST, files))})) as hub:
        yield hub


@pytest.fixture
def pairs(tmp_path) -> pathlib.Path:
    entry = {"prompt": "Be brief:", "response": "yes.", "example_id": 7}
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps({"0": [entry, {"prompt": "Be long:", "response": "yes, it is.", "example_id": 7}]}))
    return path


def score(model: str, pairs: pathlib.Path, out: pathlib.Path) -> list[str]:
    return ["score", f"--model={model}", f"--pairs={pairs}", f"--out={out}"]


def test_a_name_is_fetched_once_and_then_found_in_the_cache(hub, files, pairs, tmp_path):
    train = ["train", "--model=acme/tiny", f"--pairs={pairs}", f"--out={tmp_path / 'trained'}"]
    train += ["--config.train.steps=(1,)", "--config.train.queries_per_step=1"]
    out, unfit = tmp_path / "scores.jsonl", tmp_path / "unfit.json"
    entry = {"prompt": "Summary:", "response": "", "example_id": 7, "response_ids": [10**6]}
    unfit.write_text(json.dumps({"0": [entry, entry]}))
    again = [score("acme/tiny", unfit, out), score(f"acme/tiny@{FIRST}", unfit, out)]
    (trained, *found) = commands(tmp_path / "cache", hub.url, train, *again)
    assert trained[0] == 0, trained
    card = (tmp_path / "trained" / "README.md").read_text()
    assert card.startswith("# acme/tiny after SAMI") and f"Trained from `acme/tiny@{FIRST}` by" in card
    for code, sentence, _ in found:  # the model is there, the pairs are another's
        assert code == 65 and "outside the model's vocabulary" in sentence
    read = {name for name in files if name.startswith(("model-0", "model.safetensors.index", "tokenizer"))}
    fetched = [path.split("/")[-1] for path in hub.asked if "/resolve/" in path]
    assert sorted(fetched) == sorted(2 * list(read | {"config.json", "generation_config.json"}))  # HEAD and GET
    # What `main` is may change, a commit does not.
    listed, tree = "/api/models/acme/tiny/revision/main", f"/api/models/acme/tiny/tree/{FIRST}"
    assert [path.split("?")[0] for path in hub.asked if "/models/acme" in path] == [listed, tree, listed]
    (offline,) = commands(tmp_path / "cache", hub.url, score("acme/tiny", pairs, out), offline=True)
    assert offline[0] == 0 and read_jsonl(out)[0]["example_id"] == 7, offline


def test_a_single_file_is_fetched_before_an_index_as_transformers_does(hub, files, pairs, tmp_path):
    shards = [name for name in files if name.startswith("model-0")]
    one: dict[str, np.ndarray] = {}
    for name in shards:
        (tmp_path / name).write_bytes(files[name])
        one |= load_file(tmp_path / name)
    hub.repositories["acme/both"] = {FIRST: (FIRST, files | {"model.safetensors": save(one)})}
    outs = [tmp_path / name for name in ("shards.jsonl", "single.jsonl", "offline.jsonl")]
    name = f"acme/both@{FIRST}"
    ran = commands(tmp_path / "cache", hub.url, score("acme/tiny", pairs, outs[0]), score(name, pairs, outs[1]))
    assert [code for code, *_ in ran] == [0, 0], ran
    (offline,) = commands(tmp_path / "cache", hub.url, score(name, pairs, outs[2]), offline=True)
    assert offline[0] == 0 and len({out.read_text() for out in outs}) == 1
    fetched = {path.split("/")[-1] for path in hub.asked if "acme/both/resolve" in path}
    assert "model.safetensors" in fetched and not fetched & set(shards)


def test_what_the_hub_refuses_is_one_sentence(hub, files, pairs, tmp_path):
    config = json.loads(files["config.json"])
    other = files | {"config.json": json.dumps(config | {"model_type": "gpt2"}).encode()}
    pickled = {name: content for name, content in files.items() if ".safetensors" not in name or "/" in name}
    short = {name: content for name, content in files.items() if not name.startswith("model-00002")}
    hub.repositories |= {
        "acme/gated": hub.repositories["acme/tiny"],
        "acme/locked": (401, "RepoNotFound"),
        "acme/forbidden": (403, ""),
        "acme/busy": (500, ""),
        "acme/other": dict.fromkeys(("main", FIRST), (FIRST, other)),
        "acme/pickled": dict.fromkeys(("main", FIRST), (FIRST, pickled)),
        "acme/short": dict.fromkeys(("main", FIRST), (FIRST, short)),
    }
    hub.gated.add("acme/gated")
    expected = {
        "runs/foo": (65, "no folder runs/foo", "no repository runs/foo that you may read", "`hf auth login`"),
        "acme/locked": (65, "no repository acme/locked that you may read", "`hf auth login`"),
        "acme/gated": (65, "does not let you read acme/gated", "accept its terms", "`hf auth login`"),
        "acme/forbidden": (65, "does not let you read acme/forbidden", "`hf auth login`"),
        "acme/tiny@v9": (65, "acme/tiny on the Hugging Face Hub has no revision v9", "branch, tag or commit"),
        "acme/busy": (74, "acme/busy could not be fetched", "500", "try again"),
        "acme/other": (65, "config.json: model_type is 'gpt2'", "llama, mistral, mixtral"),
        "acme/pickled": (65, "models--acme--pickled", "neither model.safetensors nor", "convert"),
        "acme/short": (65, "model-00002-of-0000", "does not exist"),
        "not a name": (65, "The model 'not a name' is neither a folder nor a name", "owner/name"),
        str(pairs): (65, f"There is no model folder {pairs};"),
        "./acme/tiny": (65, "There is no model folder acme/tiny;",),
        "a/b/c": (65, "There is no model folder a/b/c;",),
        "acme/tiny/": (65, "There is no model folder acme/tiny;",),
    }  # fmt: skip
    out = tmp_path / "out.jsonl"
    ran = commands(tmp_path / "cache", hub.url, *(score(model, pairs, out) for model in expected))
    for (model, (code, *says)), (found, sentence, seconds) in zip(expected.items(), ran, strict=True):
        assert found == code and sentence.startswith("sami score: ") and seconds < 10, (model, sentence, seconds)
        assert all(part in sentence for part in says), sentence
    assert not out.exists()
    assert not [path for path in hub.asked if "acme/other" in path and "model-0" in path]  # refused before its weights


def test_an_unreachable_hub_is_74_and_soon(pairs, tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as closed:
        port = closed.server_port
    command = score("acme/tiny", pairs, tmp_path / "out.jsonl")
    ((code, sentence, seconds),) = commands(tmp_path / "cache", f"http://127.0.0.1:{port}", command)
    assert code == 74 and seconds < 30, sentence
    assert "no folder acme/tiny" in sentence and "could not be fetched" in sentence and "try again" in sentence


def test_a_run_stays_with_the_commit_it_began_with(hub, files, tmp_path):
    for name in ("queries", "evaluation"):
        lines = [json.dumps({"example_id": f"{name}-{i}", "text": f"Post {i}"}) + "\n" for i in range(2)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    principles = [{"name": n, "definition": f"Be {n}.", "antithesis": f"Do not be {n}."} for n in ("brief", "kind")]
    (tmp_path / "principles.json").write_text(json.dumps(principles))
    settings = {
        "model": "acme/tiny",
        "queries": {"train": str(tmp_path / "queries.jsonl"), "evaluation": str(tmp_path / "evaluation.jsonl")},
        "constitutions": {"principles": str(tmp_path / "principles.json")},
        "sampling": {"max_new_tokens": 2},  # nothing is worth training on: the run begins, and ends soon
        "train": {"steps": [1], "queries_per_step": 1},
        "iterations": 1,
    }
    config, workdir = tmp_path / "config.json", tmp_path / "run"
    config.write_text(json.dumps(settings))
    command = ["run", f"--config={config}", f"--workdir={workdir}"]
    (begun,) = commands(tmp_path / "cache", hub.url, command)
    assert begun[0] == 65 and "kept 0 pairs of 1 queries" in begun[1], begun
    assert read_json(workdir / "RUN.json")["model"] == f"acme/tiny@{FIRST}"
    assert read_json(workdir / "config.json")["model"] == "acme/tiny"
    hub.repositories["acme/tiny"]["main"] = (SECOND, files | {"config.json": b"{}"})
    (again,) = commands(tmp_path / "cache", hub.url, command)
    assert again[:2] == begun[:2]


def test_a_name_is_not_looked_up_where_the_cache_is_all_there_is():
    with pytest.raises(Exception, match="no folder acme/tiny, and the Hugging Face cache .* unset HF_HUB_OFFLINE") as e:
        fetch_model("acme/tiny")  # HF_HUB_OFFLINE is set for all tests
    assert getattr(e.value, "exit_code", None) == 65


def test_an_existing_folder_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "tiny").mkdir(parents=True)
    assert fetch_model("acme/tiny") == pathlib.Path("acme/tiny")


def test_a_model_is_called_by_its_folder_or_its_name_on_the_hub():
    cache = pathlib.Path("/home/me/.cache/huggingface/hub")
    name = model_name(cache / "models--mistralai--Mistral-7B-v0.1" / "snapshots" / FIRST)
    assert name == f"mistralai/Mistral-7B-v0.1@{FIRST}"
    assert model_name(cache / "models--gpt2" / "snapshots" / FIRST) == f"gpt2@{FIRST}"
    assert model_name(pathlib.Path("runs/base/model")) == "model"
    card = model_card(TrainConfig(), 1, base=name)
    assert card.startswith("# mistralai/Mistral-7B-v0.1 after SAMI, iteration 1\n") and f"Trained from `{name}`" in card
