"""What a person gets for bad input: one sentence that names it, and an exit code of the contract, never a traceback."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sami_jax.cli.main import main
from sami_jax.config.fields import describe_fields
from sami_jax.config.run import RunConfig
from sami_jax.files import read_jsonl

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "miniature.py")
COMMANDS = ("run", "pretrain", "generate", "score", "train", "evaluate", "report", "export")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
    """A random model of the miniature's kind, with its tokenizer."""
    from sami_jax.config.pretraining import PretrainingConfig
    from sami_jax.miniature.pretraining import pretrain

    config = PretrainingConfig(
        cache_dir=str(tmp_path_factory.mktemp("base")),
        vocab_size=512,
        embed_dim=16,
        n_layers=1,
        n_heads=2,
        n_kv_heads=1,
        mlp_dim=16,
        max_positions=256,
        steps=1,
        batch_size=2,
        train_queries=4,
        validation_queries=1,
        test_queries=1,
    )
    return pretrain(config, safe_point=lambda: None) / "model"


@pytest.fixture
def copy(model, tmp_path) -> pathlib.Path:
    """The model in a folder of its own, to be damaged."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def entries(**changes) -> dict:
    entry = {"prompt": "Summary:", "response": "ahoy, great.", "example_id": 7, **changes}
    return {"0": [entry, {**entry, "response": "hello, awful."}]}


def write(path: pathlib.Path, value) -> pathlib.Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def fails(capsys, code: int, *words: str, says: tuple[str, ...]) -> None:
    """Runs a command that must end with `code` and one sentence that holds all of `says`."""
    assert main(words) == code
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"sami {words[0]}: ")
    for part in says:
        assert part in message, message


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_flags_settings_and_an_example(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and f"sami {name} --" in text and "example:" in text and "Exit codes:" in text


def test_help_of_run_shows_every_setting_with_default_and_meaning(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = capsys.readouterr().out
    for field, default, meaning in describe_fields(RunConfig):
        assert f"--{field} = {default}" in text and meaning in text


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["unknown"],
        ["run"],
        ["run", "--workdir=w", "--what"],
        ["run", "--workdir=w", "--distributed=host,2,0"],
        ["run", "--workdir=w", "--distributed=host:80,2,2"],
        ["run", "--workdir=w", "--join-timeout=0"],
        ["report", "--workdir=w", "--distributed=auto"],
    ],
)
def test_wrong_usage_is_64(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 64 and "usage:" in capsys.readouterr().err


def test_a_place_that_the_environment_says_in_part_is_64(monkeypatch, capsys):
    monkeypatch.setenv("SAMI_COORDINATOR", "10.0.0.1:8476")
    with pytest.raises(SystemExit) as end:
        main(["run", "--workdir=w"])
    assert end.value.code == 64
    assert "not all of HOST:PORT,N,I (SAMI_NUM_PROCESSES, SAMI_PROCESS_ID would be" in capsys.readouterr().err


def test_no_cluster_to_be_found_is_78(tmp_path, capsys):
    words = [f"--config={CONFIG}", f"--workdir={tmp_path / 'w'}", "--distributed=auto", "--join-timeout=1"]
    fails(capsys, 78, "run", *words, says=("JAX finds no cluster here", "--distributed=HOST:PORT,N,I"))
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("number", ["0", "-1", "x", "1.5", "", "9" * 5000])
def test_a_number_that_is_none_is_64(number, capsys):
    with pytest.raises(SystemExit) as end:
        main(["export", "--workdir=w", f"--iteration={number}", "--out=o"])
    assert end.value.code == 64
    assert f"argument --iteration: {number!r} is no whole number from 1 on\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--workdir=gs://b/x"],
        ["run", "--workdir=w", "--config=gs://b/x.py"],
        ["score", "--model=gs://b/x", "--pairs=p"],
        ["score", "--model=m", "--pairs=gs://b/x"],
        ["generate", "--model=m", "--prompts=p", "--out=gs://b/x"],
        ["generate", "--model=m", "--prompts=gs://b/x", "--out=o"],
        ["evaluate", f"--config={CONFIG}", "--model=m", "--out=o", "--baseline=gs://b/x"],
    ],
)
def test_a_store_is_no_local_folder(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 64 and "is no local path; mount the store" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_is_a_file_is_65(tmp_path, capsys):
    file = f"--workdir={write(tmp_path / 'file', '')}"
    fails(capsys, 65, "run", f"--config={CONFIG}", file, says=("file is a file; name a folder",))
    fails(capsys, 65, "report", file, says=("file/RUN.json cannot be read (Not a directory)",))
    fails(capsys, 65, "export", file, "--iteration=1", f"--out={tmp_path / 'o'}", says=("no finished export",))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["export", "--workdir=w", "--iteration=1", "--out=o"], "config.seed is no setting of `sami export`"),
        (["report", "--workdir=w"], "config.seed is no setting of `sami report`, which has none"),
        (["generate", "--model=m", "--prompts=p", "--out=o"], "`sami generate` does not read config.iterations"),
        (["score", "--model=m", "--pairs=p"], "`sami score` does not read config.seed"),
        (["pretrain", f"--config={CONFIG}"], "`sami pretrain` does not read config.seed"),
    ],
)
def test_a_setting_that_a_command_does_not_read_is_78(words, says, capsys):
    setting = "iterations" if "iterations" in says else "seed"
    fails(capsys, 78, *words, f"--config.{setting}=1", says=(says,))


def test_what_a_command_does_not_read_does_not_stop_it(model, tmp_path, capsys):
    """48 queries a step are no multiple of 5 devices, but a scorer and a sampler make no steps."""
    pairs, prompts = write(tmp_path / "pairs.json", entries()), write(tmp_path / "prompts.jsonl", {"prompt": "a"})
    fives = "--config.mesh.data=5"
    assert main(["score", f"--model={model}", f"--pairs={pairs}", fives]) == 0
    flags = [f"--out={tmp_path / 'out'}", fives, "--config.sampling.max_new_tokens=2"]
    assert main(["generate", f"--model={model}", f"--prompts={prompts}", *flags]) == 0


SETTINGS = {
    "generate": ("sampling.max_new_tokens", "sampling.stop", "compute_dtype", "mesh.fsdp"),
    "score": ("train.normalize", "train.rows_per_device", "prompts.boundary", "compute_dtype", "mesh.fsdp"),
    "train": ("seed", "train.steps", "train.kl_beta", "prompts.boundary", "compute_dtype", "mesh.fsdp"),
    "evaluate": (
        "seed",
        "queries.train",
        "queries.evaluation",
        "queries.evaluation_count",
        "constitutions.principles_per_query",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_help_shows_the_settings_that_are_read_and_no_others(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = capsys.readouterr().out
    shown = {field for field, _, _ in describe_fields(RunConfig) if f"--{field} = " in text}
    assert {f"config.{field}" for field in SETTINGS[name]} <= shown
    unread = {"config.iterations", "config.filters.sentence_ends", "config.constitutions.reshuffle"}
    assert not shown & unread
    for field in shown:  # each is accepted, and the file is what the command stumbles on
        words = [name, "--model=m", "--config=nowhere.py", *(["--out=o"] if name != "score" else [])]
        words += {"generate": ["--prompts=p"], "evaluate": []}.get(name, ["--pairs=p"])
        fails(capsys, 78, *words, f"--{field}=1", says=("nowhere.py does not exist",))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--config=nowhere.py"], ("nowhere.py", "does not exist")),
        ([f"--config={CONFIG}:tiny"], ("unknown variant 'tiny'",)),
        ([f"--config={CONFIG}", "--config.train.learning_rat=1"], ("did you mean config.train.learning_rate?",)),
        ([f"--config={CONFIG}", "--config.train.learning_rate=fast"], ("learning_rate is 'fast'", "a number")),
        ([f"--config={CONFIG}", "--config.train.learning_rate=-1"], ("above 0",)),
        ([f"--config={CONFIG}", "--config.iterations=2.5"], ("config.iterations is '2.5'", "whole number")),
        ([f"--config={CONFIG}", "--config.train.optimizer=adam"], ("adamw, rmsprop",)),
        ([f"--config={CONFIG}", "--config.train.steps=(2,)"], ("train.steps", "each iteration (3)")),
        ([f"--config={CONFIG}", "--config.constitutions.count=5"], ("config.constitutions.count is 5",)),
        ([f"--config={CONFIG}", "--config.model=gs://b/x"], ("gs://b/x is no local path",)),
        ([f"--config={CONFIG}", "--config.train=3"], ("config.train is a section",)),
        ([f"--config={CONFIG}", "--config.evaluation.judge=gpt"], ("judge is 'gpt'; choose one of none, miniature",)),
        ([f"--config={CONFIG}", "--config.prompts.training=hello"], ("config.prompts.training", "{constitution}")),
    ],
)  # fmt: skip
def test_bad_settings_are_78(flags, says, capsys, tmp_path):
    fails(capsys, 78, "run", *flags, f"--workdir={tmp_path / 'w'}", says=says)
    assert not (tmp_path / "w").exists()


def test_score_gives_matrix_loss_and_bound(model, tmp_path, capsys):
    out = tmp_path / "scores.jsonl"
    pairs = write(tmp_path / "pairs.json", entries())
    assert main(["score", f"--model={model}", f"--pairs={pairs}", f"--out={out}", "--normalize=sum"]) == 0
    (line,) = read_jsonl(out)
    matrix = np.array(line["logps"])
    assert line["example_id"] == 7 and line["normalize"] == "sum" and matrix.shape == (2, 2) and (matrix < 0).all()
    # Equal prompts: nothing tells the constitutions apart, so over_constitutions is log 2 and the bound 0.
    assert line["over_constitutions"] == pytest.approx(np.log(2), abs=1e-6)
    assert line["mi_nats"] == pytest.approx(0.0, abs=1e-6)
    assert "1 queries, 2 constitutions" in capsys.readouterr().err
    assert main(["score", f"--model={model}", f"--pairs={pairs}", "--normalize=sum"]) == 0
    assert json.loads(capsys.readouterr().out) == line


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ("", ("line 1", "not valid JSON")),
        ('{"0": [', ("not valid JSON",)),
        ({}, ("holds no pairs",)),
        ('{"0":\n[{"prompt": "a", "score": Infinity}]}', ("line 2", "Infinity is no finite number")),
        ([], ("one key per query",)),
        ({"0": []}, ("query '0'", "at least two")),
        ({"0": entries()["0"], "1": entries()["0"] * 2}, ("query '1'", "4 constitutions")),
        (entries(response=3), ("query '0', entry 0", "response must be text")),
        (entries(prompt=""), ("prompt is empty",)),
        (entries(example_id=None), ("example_id",)),
        (entries(response=" "), ("entry 0", "no tokens")),
        (entries(response_ids=[]), ("no tokens",)),
        (entries(response_ids=[100000]), ("outside the model's vocabulary",)),
        (entries(prompt="word " * 300), ("query '0'", "room for 25")),
        ({"0": [entries()["0"][0], entries(example_id=8)["0"][1]]}, ("different example_ids [7, 8]",)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["score", "train"])
def test_bad_pairs_are_65_and_name_file_and_entry(name, pairs, says, model, tmp_path, capsys):
    path, out = write(tmp_path / "pairs.json", pairs), tmp_path / "out"
    fails(capsys, 65, name, f"--model={model}", f"--pairs={path}", f"--out={out}", says=("pairs.json", *says))
    assert not out.exists()


def test_a_missing_file_or_folder_is_65(model, tmp_path, capsys):
    pairs = write(tmp_path / "pairs.json", entries())
    fails(capsys, 65, "score", "--model=./nowhere", f"--pairs={pairs}", says=("no model folder nowhere",))
    fails(capsys, 65, "score", f"--model={model}", "--pairs=nowhere.json", says=("nowhere.json", "does not exist"))
    fails(capsys, 65, "report", f"--workdir={tmp_path}", says=("RUN.json",))
    fails(capsys, 65, "export", f"--workdir={tmp_path}", "--iteration=1", "--out=o", says=("no finished export",))


@pytest.mark.parametrize(
    ("mesh", "says"),
    [
        ({"data": 16}, ("data=16", "= 16 devices", "there are 8", "lower config.mesh")),
        ({"tensor": 4}, ("kv_heads axis has 1 entries", "4 devices", "config.mesh.tensor")),
        ({"fsdp": 3}, ("embed axis has 16 entries", "3 devices", "config.mesh.fsdp", "divisors of 16")),
    ],
)
def test_a_mesh_that_does_not_fit_is_78_and_writes_nothing(mesh, says, model, tmp_path, capsys):
    pairs, out = write(tmp_path / "pairs.json", entries()), tmp_path / "out"
    flags = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    flags += ["--config.train.queries_per_step=48", "--config.train.steps=(1,)", "--config.train.passes=48"]
    fails(capsys, 78, "train", f"--model={model}", f"--pairs={pairs}", f"--out={out}", *flags, says=says)
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.json"]


@pytest.mark.parametrize("name", ["generate", "score", "train"])
def test_another_platform_than_the_one_named_is_78_and_writes_nothing(name, model, tmp_path, capsys):
    prompts, pairs = write(tmp_path / "prompts.jsonl", {"prompt": "a"}), write(tmp_path / "pairs.json", entries())
    words = {"generate": f"--prompts={prompts}"}.get(name, f"--pairs={pairs}"), f"--out={tmp_path / 'out'}"
    words += (f"--config={CONFIG}:smoke",) if name == "train" else ()
    says = ("config.platform is gpu, but JAX finds cpu here",)
    fails(capsys, 78, name, f"--model={model}", *words, "--config.platform=gpu", says=says)
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "pairs.json"}
    if name == "score":
        assert main([name, f"--model={model}", *words, "--config.platform=cpu"]) == 0


def test_damaged_weights_are_65_and_named(copy, tmp_path, capsys):
    pairs, weights = write(tmp_path / "pairs.json", entries()), copy / "model.safetensors"
    score = ["score", f"--model={copy}", f"--pairs={pairs}"]
    whole, tensors = weights.read_bytes(), load_file(weights)
    weights.write_bytes(whole[:-100])
    fails(capsys, 65, *score, says=("model.safetensors", "damaged"))
    save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, weights)
    fails(capsys, 65, *score, says=("missing: model.norm.weight",))
    save_file({**tensors, "model.extra.weight": np.zeros(2, np.float32)}, weights)
    fails(capsys, 65, *score, says=("unknown: model.extra.weight",))


def test_nan_logps_are_70_and_name_the_queries(copy, tmp_path, capsys):
    pairs, weights = write(tmp_path / "pairs.json", entries()), copy / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][:] = 3e38  # finite, but no logit is
    save_file(tensors, weights)
    fails(capsys, 70, "score", f"--model={copy}", f"--pairs={pairs}", says=("[7]", "not finite"))
    flags = ["--config.train.queries_per_step=1", "--config.train.steps=(1,)"]
    out = tmp_path / "out"
    fails(capsys, 70, "train", f"--model={copy}", f"--pairs={pairs}", f"--out={out}", *flags, says=("Step 1", "[7]"))
    assert not out.exists()


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ("", ("holds no prompts",)),
        ('{"prompt": "a"}\n{"prompt": 3}\n', ("entry 2",)),
        ('{"prompt": "a"}\n{"prompt"\n', ("line 2", "not valid JSON")),
        ('{"prompt": "a"}\n{"prompt": "x", "score": NaN}\n', ("prompts.jsonl, line 2", "NaN is no finite number")),
        ('{"prompt": "half a \\ud83d"}\n', ("prompts.jsonl, line 1", "half of a surrogate pair")),
        (json.dumps({"prompt": "word " * 300}), ("Prompt 1", "256 positions")),
    ],
)  # fmt: skip
def test_bad_prompts_are_65_and_name_the_entry(prompts, says, model, tmp_path, capsys):
    path, out = write(tmp_path / "prompts.jsonl", prompts), tmp_path / "out.jsonl"
    short = "--config.sampling.max_new_tokens=8"
    fails(capsys, 65, "generate", f"--model={model}", f"--prompts={path}", f"--out={out}", short, says=says)
    assert not out.exists()


def test_bad_files_are_refused_before_a_model_is_looked_for(tmp_path, capsys):
    prompts = write(tmp_path / "prompts.jsonl", '{"prompt": "x", "score": NaN}')
    pairs = write(tmp_path / "pairs.json", '{"0": [NaN]}')
    nowhere = "--model=./nowhere"
    says = ("line 1: NaN is no finite number of 64 bits",)
    fails(capsys, 65, "generate", nowhere, f"--prompts={prompts}", f"--out={tmp_path / 'o'}", says=says)
    fails(capsys, 65, "score", nowhere, f"--pairs={pairs}", says=says)
    fails(capsys, 65, "train", nowhere, f"--pairs={pairs}", f"--out={tmp_path / 'o'}", says=says)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ("NaN", ("config.json, line 3: NaN is no finite number",)),
        ("1" * 5000, ("config.json, line 3: a number of 5000 characters",)),
        ("[" * 3000 + "]" * 3000, ("config.json, line 3", "more than 100 lists")),
        ("1" + "0" * 40, ("config.json: hidden_size is 1000", "whole number from 1 to 2147483647")),
    ],
)
def test_a_config_json_that_cannot_be_used_is_65(changes, says, copy, tmp_path, capsys):
    pairs, config = write(tmp_path / "pairs.json", entries()), json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(
        f'{{"a": 1,\n"b": 2,\n"hidden_size": {changes},\n'
        + json.dumps({k: v for k, v in config.items() if k != "hidden_size"})[1:]
    )
    fails(capsys, 65, "score", f"--model={copy}", f"--pairs={pairs}", says=says)


@pytest.mark.parametrize(
    ("name", "place", "code", "says"),
    [
        ("generate", ".", 65, ". is a folder; name a file"),
        ("generate", "/", 65, "/ is a folder"),
        ("generate", "file/out", 74, "file/out could not be written"),
        ("score", "/proc/out", 74, "/proc/out could not be written"),
        ("train", "file", 65, "file is a file; name a folder"),
        ("train", "/", 65, "/ already holds files"),
        ("train", "full", 65, "full already holds files"),
        ("evaluate", "file", 65, "file is a file; name a folder"),
        ("evaluate", "full", 65, "full already holds files"),
        ("export", "file", 65, "file is a file; name a folder"),
        ("export", "full", 65, "full already holds files"),
    ],
)
def test_an_out_that_cannot_be_written_is_noticed_before_the_work(
    name, place, code, says, model, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("full").mkdir()
    for path in ("file", "full/file"):
        pathlib.Path(path).write_text("")
    prompts, pairs = write(tmp_path / "prompts.jsonl", {"prompt": "a"}), write(tmp_path / "pairs.json", entries())
    before = sorted(tmp_path.rglob("*"))
    words = {
        "generate": ["--model=./nowhere", f"--prompts={prompts}"],  # the model is not even looked for
        "score": ["--model=./nowhere", f"--pairs={pairs}"],
        "train": [f"--model={model}", f"--pairs={pairs}"],
        "evaluate": [f"--model={model}", f"--config={CONFIG}"],
        "export": ["--workdir=./nowhere", "--iteration=1"],
    }
    fails(capsys, code, name, *words[name], f"--out={place}", says=(says,))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def settings(model, tmp_path) -> dict:
    """Of a run on files of one's own: 3 training queries, so that odd iterations sample from 2 and even ones from 1."""
    write(
        tmp_path / "train.jsonl", "".join(json.dumps({"example_id": f"t{i}", "text": "a b"}) + "\n" for i in range(3))
    )
    write(tmp_path / "evaluation.jsonl", {"example_id": "e0", "text": "a b"})
    principles = [{"name": f"p{i}", "definition": "Be short.", "antithesis": "Be long."} for i in range(2)]
    write(tmp_path / "principles.json", principles)
    return {
        "model": str(model),
        "queries": {"train": str(tmp_path / "train.jsonl"), "evaluation": str(tmp_path / "evaluation.jsonl")},
        "constitutions": {"principles": str(tmp_path / "principles.json")},
        "sampling": {"max_new_tokens": 8},
        "train": {"steps": [1], "queries_per_step": 1},
        "iterations": 1,
    }


def test_evaluate_needs_no_training_queries(settings, tmp_path):
    del settings["queries"]["train"]
    config, out = write(tmp_path / "config.json", settings), tmp_path / "out"
    assert main(["evaluate", f"--config={config}", f"--model={settings['model']}", f"--out={out}"]) == 0
    assert json.loads((out / "summary.json").read_text())["splits"]["learned"]["n_queries"] == 1


def test_evaluate_reads_a_folder_of_constitutions(settings, tmp_path):
    folder = tmp_path / "constitutions"
    folder.mkdir()
    for name in ("10", "2"):
        sides = {"positive": f"1. Be {name}.\r\n2. Be kind.", "negative": "Be long.\nBe kind."}
        write(folder / f"{name}.json", sides)
    settings["constitutions"] = {"folder": str(folder)}
    config, out = write(tmp_path / "config.json", settings), tmp_path / "out"
    assert main(["evaluate", f"--config={config}", f"--model={settings['model']}", f"--out={out}"]) == 0
    [result] = read_jsonl(out / "results.jsonl")
    assert result["constitutions"] in [[f"1. Be {n}.\n2. Be kind.", "1. Be long.\n2. Be kind."] for n in ("10", "2")]


SHORT = {"example_id": "short", "text": "a b"}
LONG = {"example_id": "long", "text": "wórd " * 300}


@pytest.mark.parametrize(
    ("flags", "changed", "code", "says"),
    [
        (["mesh.data=9", "train.queries_per_step=9"], {}, 78, ("data=9", "there are 8", "lower config.mesh")),
        (["mesh.tensor=4"], {}, 78, ("kv_heads axis has 1 entries", "config.mesh.tensor")),
        (["platform=tpu"], {}, 78, ("config.platform is tpu, but JAX finds cpu here (JAX_PLATFORMS: cpu)", "=any")),
        (["constitutions.count=5"], {}, 78, ("config.constitutions.count is 5", "4 sign patterns")),
        (["constitutions.principles_per_query=3"], {}, 78, ("3 principles each cannot be drawn from 2 principles",)),
        (["train.queries_per_step=3"], {}, 65, ("train.jsonl: iteration 1 samples from 2 queries", "need 3")),
        (["iterations=2", "train.steps=(1, 2)"], {}, 65, ("iteration 2 samples from 1 queries", "2 steps need 2")),
        ([], {"evaluation.jsonl": LONG}, 65, ("evaluation.jsonl: the generation prompt of query 'long' has ", "256")),
        ([], {"train.jsonl": LONG}, 65, ("train.jsonl: the generation prompt of query 'long' has ", "8 new ones")),
        (
            [],
            {"train.jsonl": "".join(json.dumps(q) + "\n" for q in (SHORT, SHORT | {"example_id": "s2"}, LONG))},
            65,
            ("train.jsonl: the generation prompt of query 'long' has ",),
        ),
        (["prompts.training=" + "word " * 300 + "{constitution}\n\n{query}\n\n"], {}, 65, ("the training prompt of",)),
        (["constitutions.folder=nowhere", "constitutions.principles="], {}, 78, ("'nowhere', which is not a folder",)),
        (["constitutions.principles="], {}, 78, ("config.constitutions.principles is '', which is not a file",)),
        ([], {"principles.json": "[NaN]"}, 65, ("principles.json, line 1: NaN is no finite number",)),
        (["model=./nowhere"], {}, 65, ("no model folder nowhere",)),
        (["model={pretrained}/model"], {}, 78, ("config.pretraining.enabled is false",)),
    ],
    ids=str,
)
def test_a_refused_run_leaves_nothing(flags, changed, code, says, settings, tmp_path, capsys):
    config = write(tmp_path / "config.json", settings)
    for name, value in changed.items():
        write(tmp_path / name, value)
    words = [f"--config={config}", f"--workdir={tmp_path / 'run'}", *(f"--config.{flag}" for flag in flags)]
    fails(capsys, code, "run", *words, says=says)
    assert not (tmp_path / "run").exists()
    if "train" not in says[0] and not any(flag.startswith("train.") for flag in flags):
        evaluate = ["--model=" + settings["model"], f"--out={tmp_path / 'evaluated'}", words[0], *words[2:]]
        fails(capsys, code, "evaluate", *evaluate, says=says)
        assert not (tmp_path / "evaluated").exists()


def test_a_disk_that_is_too_small_is_74_before_the_first_file(settings, copy, tmp_path, capsys):
    """A config.json of 10^6 layers, each 2^20 wide: petabytes, of which nothing is there."""
    huge = {**json.loads((copy / "config.json").read_text()), "num_hidden_layers": 10**6, "intermediate_size": 2**20}
    write(copy / "config.json", huge)
    config, keep = write(tmp_path / "config.json", settings), "--config.train.keep_checkpoints=True"
    run = ["run", f"--config={config}", f"--workdir={tmp_path / 'run'}", f"--config.model={copy}"]
    # 3 x 16 x 2^20 weights a layer, and little else; four bytes each, and two moments beside them in a checkpoint.
    says = ("/run will need up to 805", "(a checkpoint takes 603", "an exported model 201", "are free there; free some")
    fails(capsys, 74, *run, says=says)
    fails(capsys, 74, *run, keep, says=("set config.train.keep_checkpoints=false, or choose",))
    assert not (tmp_path / "run").exists()


def test_a_run_refused_behind_its_first_files_leaves_nothing_and_the_mended_command_starts(
    settings, copy, tmp_path, capsys
):
    """Damaged weights are found when they are read; a base's queries when it is made."""
    config, tensors = write(tmp_path / "config.json", settings), load_file(copy / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, copy / "model.safetensors")
    run = ["run", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    (tmp_path / "run" / "attempts").mkdir(parents=True)
    mine = write(tmp_path / "run" / "attempts" / "notes.txt", "somebody's own")
    fails(capsys, 65, *run, f"--config.model={copy}", says=("missing: model.norm.weight",))
    assert [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()] == ["LOCK", "notes.txt"]
    mine.unlink()
    fails(capsys, 65, *run, f"--config.model={copy}", says=("missing: model.norm.weight",))
    assert not (tmp_path / "run").exists()
    tiny = {"vocab_size": 512, "embed_dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "mlp_dim": 16}
    tiny |= {"steps": 1, "batch_size": 2, "train_queries": 4, "max_positions": 64, "cache_dir": str(tmp_path / "base")}
    base = {"enabled": True, **tiny, "validation_queries": 1, "test_queries": 1}
    queries = {"train": "{pretrained}/data/train.jsonl", "evaluation": "{pretrained}/data/test.jsonl"}
    write(config, {**settings, "model": "{pretrained}/model", "queries": queries, "pretraining": base})
    fails(capsys, 65, *run, says=("data/test.jsonl: the generation prompt of query 'test-", "64 positions"))
    assert not (tmp_path / "run").exists() and list((tmp_path / "base").glob("*/DONE.json"))
    # With room for it, the same folder takes the run, up to where it finds nothing worth training on.
    write(config, settings)
    fails(capsys, 65, *run, says=("kept 0 pairs of 2 queries",))
    assert (tmp_path / "run" / "config.json").exists()


def test_out_of_memory_is_70_with_what_helps_and_no_traceback(model, tmp_path, capsys):
    """2^45 rows are more than any machine addresses."""
    pairs = write(tmp_path / "pairs.json", entries())
    huge = 2**45
    given = [f"--model={model}", f"--pairs={pairs}", f"--config.train.rows_per_device={huge}"]
    says = (
        f"out of memory scoring {huge} rows of 64 tokens",
        f"more at once): lower config.train.rows_per_device, now {huge}",
    )
    fails(capsys, 70, "score", *given, says=(*says, "; share the weights", "config.mesh.fsdp, now 1"))
    train = ["--config.train.queries_per_step=2", "--config.train.steps=(1,)", "--config.train.passes=2"]
    says = (f"in step 1 of iteration 1, on {huge} rows of 64 tokens", f"rows_per_device, now {huge}", "stochastic")
    assert main(["train", *given, *train, f"--out={tmp_path / 'out'}"]) == 70
    message = capsys.readouterr().err
    assert all(part in message for part in says) and "Traceback" not in message and "defect" not in message
    far = shutil.copytree(model, tmp_path / "far")
    settings = json.loads((far / "config.json").read_text())
    (far / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 2**31 - 1}))
    many = write(tmp_path / "many.jsonl", 16 * '{"prompt": "a"}\n')  # as many as there are slots, of terabytes
    generate = [f"--model={far}", f"--prompts={many}", f"--out={tmp_path / 'o'}"]
    generate += [f"--config.sampling.max_new_tokens={2**31 - 1000}"]
    fails(capsys, 70, "generate", *generate, says=("sampling 16 responses at once (", "lower --rows, now 16"))
