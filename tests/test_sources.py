"""Queries by name: their own columns, from files, functions and the Hub; cleaned, counted, split, and kept by a run."""

import gzip
import json
import pathlib
import re
import socket
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from hub_server import Hub, serving
from sami_jax.cli.main import main
from sami_jax.config.fields import to_dict
from sami_jax.data.hub_rows import HubFiles
from sami_jax.data.queries import Query, read_queries
from sami_jax.data.sources import REASONS, first_human_turn, open_source, source_name
from sami_jax.errors import BadConfigError, BadDataError
from sami_jax.files import read_json, read_jsonl
from sami_jax.stages.prepare import Prepare
from sami_jax.stages.stage import complete
from test_hub import commands
from tiny_run import tiny_run_config


def post(name: str, text: str | None, title: str | None = None) -> dict:
    """A row as `openai/summarize_from_feedback` has them."""
    return {"info": {"id": name, "post": text, "title": title, "subreddit": "pets", "article": None}, "choice": 0}


POSTS = [
    post("t3_a", " My dog ate it.\n", "Dog"),
    post("t3_b", None),
    post("t3_a", "My dog ate it.", "Dog"),
    post("t3_c", " \n ", "Nothing"),
    post("t3_d", "x" * 101, "Long"),
    post("t3_e", "I moved.", "Moved"),
]
DIALOGUES = [
    {"chosen": "\n\nHuman: How do I knit?\n\nAssistant: Slowly.\n\nHuman: And?\n\nAssistant: No.", "rejected": "x"},
    {"chosen": "\n\nHuman: How do I knit?\n\nAssistant: Fast.", "rejected": "x"},
    {"chosen": "\n\nAssistant: Hello.", "rejected": "x"},
    {"chosen": "\n\nHuman: \n\nAssistant: ?", "rejected": "x"},
    {"chosen": None, "rejected": "x"},
    {"chosen": "\n\nHuman: Line one\n\nline two, Human: too\n\nHuman: more\n\nAssistant: a", "rejected": "x"},
]
OWN = [
    {"example_id": "a", "text": "One", "facts": {"n": 1}, "score": 3.5},
    {"example_id": 7, "text": "Two"},
    {"example_id": "b", "text": ""},
    {"example_id": "c", "text": None},
    {"example_id": "d", "text": float("nan")},
    {"example_id": None, "text": "Whose?"},
    {"example_id": "a", "text": "Again"},
    {"example_id": "e", "text": "y" * 101},
]


def write(path: pathlib.Path, rows: list) -> pathlib.Path:
    """Writes rows by the file's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def read(name: str, max_characters: int = 100):
    """(queries, dropped) of a source; `dropped` without the reasons that did not occur."""
    source = open_source(source_name(name, setting="config.queries.train"), max_characters=max_characters)
    queries = list(source.queries)
    assert set(source.tally.dropped) == set(REASONS)
    assert source.tally.rows == len(queries) + sum(source.tally.dropped.values())
    return queries, {reason: count for reason, count in source.tally.dropped.items() if count}


class TestColumns:
    @pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
    def test_tldr(self, tmp_path, ending):
        queries, dropped = read(f"tldr:{write(tmp_path / f'posts{ending}', POSTS)}")
        assert queries == [
            Query("t3_a", "My dog ate it.", {"title": "Dog", "subreddit": "pets"}),
            Query("t3_e", "I moved.", {"title": "Moved", "subreddit": "pets"}),
        ]
        assert dropped == {"null": 1, "duplicate": 1, "empty": 1, "too_long": 1}

    def test_tldr_with_flattened_columns(self, tmp_path):
        rows = [{f"info.{name}": value for name, value in row["info"].items()} for row in POSTS]
        for ending in ("jsonl", "parquet"):
            queries, dropped = read(f"tldr:{write(tmp_path / f'posts.{ending}', rows)}")
            assert [query.example_id for query in queries] == ["t3_a", "t3_e"] and sum(dropped.values()) == 4
            assert queries[0].facts == {"title": "Dog", "subreddit": "pets"}

    @pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
    def test_hh_takes_the_first_human_turn(self, tmp_path, ending):
        queries, dropped = read(f"hh_helpful:{write(tmp_path / f'dialogues{ending}', DIALOGUES)}")
        assert [query.text for query in queries] == ["How do I knit?", "Line one\n\nline two, Human: too"]
        assert dropped == {"duplicate": 1, "no_human_turn": 1, "empty": 1, "null": 1}
        assert queries == read(f"hh_harmless:{tmp_path / f'dialogues{ending}'}")[0]  # the same ids, wherever it stands
        assert len({query.example_id for query in queries}) == 2

    def test_first_human_turn(self):
        assert first_human_turn("\n\nHuman: a\nAssistant: not yet\n\nAssistant: b") == " a\nAssistant: not yet"
        assert first_human_turn("Hello") is None

    @pytest.mark.parametrize("name", ["jsonl:own.jsonl", "parquet:own.parquet", "own.parquet", "jsonl:own.jsonl.gz"])
    def test_ones_own(self, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        file = pathlib.Path(name.partition(":")[2] or name)
        typed = [{**row, "example_id": row["example_id"] and str(row["example_id"])} for row in OWN]
        typed[4]["text"] = None  # a column of texts has no NaN
        write(file, typed if file.suffix == ".parquet" else OWN)
        queries, dropped = read(name)
        assert [(query.example_id, query.text) for query in queries] == [("a", "One"), ("7", "Two")]
        assert queries[0].facts == {"n": 1} and queries[1].facts == {}
        assert (dropped.pop("nan", 0), dropped.pop("null")) == ((0, 2) if file.suffix == ".parquet" else (1, 1))
        assert dropped == {"empty": 1, "no_id": 1, "duplicate": 1, "too_long": 1}

    def test_nan_in_parquet(self, tmp_path):
        table = pyarrow.table({"example_id": ["a"], "text": pyarrow.array([float("nan")])})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(BadDataError, match=r"no usable query in 1 rows \(dropped: 1 nan\)"):
            read(f"parquet:{tmp_path / 'a.parquet'}")

    def test_a_plain_file_is_taken_as_it_is_or_refused(self, tmp_path):
        path = write(tmp_path / "plain.jsonl", [{"example_id": "a", "text": "z" * 500}])
        assert read(str(path)) == ([Query("a", "z" * 500)], {})
        write(path, [{"example_id": "a", "text": ""}])
        with pytest.raises(BadDataError, match=r"plain.jsonl, line 1: .*text must be non-empty"):
            read(str(path))

    def test_a_folder_gives_its_training_rows_in_order(self, tmp_path):
        for number in (0, 1):
            row = POSTS[0] | {"info": POSTS[0]["info"] | {"id": f"t{number}"}}
            write(tmp_path / "hub" / "comparisons" / "train" / f"000{number}.parquet", [row])
        write(tmp_path / "hub" / "comparisons" / "validation" / "0000.parquet", POSTS)
        write(tmp_path / "hub" / "axis" / "train" / "0000.parquet", POSTS)
        assert [query.example_id for query in read(f"tldr:{tmp_path / 'hub'}")[0]] == ["t0", "t1"]
        for name in ("helpful-base/train", "helpful-base/test", "harmless-base/train"):
            write(tmp_path / "hh" / f"{name}.jsonl.gz", [{"chosen": f"\n\nHuman: {name}"}])
        for kind in ("helpful", "harmless"):
            assert [query.text for query in read(f"hh_{kind}:{tmp_path / 'hh'}")[0]] == [f"{kind}-base/train"]
        write(tmp_path / "parts" / "b.jsonl", DIALOGUES[:1])
        write(tmp_path / "parts" / "a.jsonl", DIALOGUES[5:])
        assert [query.text[:4] for query in read(f"hh_helpful:{tmp_path / 'parts'}")[0]] == ["Line", "How "]


class TestFunction:
    def test_rows_of_a_module_in_the_current_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "mine_of_test.py").write_text(
            "from sami_jax.data.queries import Query\n"
            "def posts():\n"
            "    yield {'example_id': 1, 'text': 'One'}\n"
            "    yield Query('b', 'Two', {'n': 2})\n"
            "    yield {'example_id': 'c', 'text': None}\n"
            "def half():\n    yield {'example_id': 'a', 'text': 'half a \\ud83d'}\n"
            "def dates():\n"
            "    import datetime\n"
            "    return [{'example_id': 'a', 'text': 'b', 'facts': {'day': datetime.date.today()}}]\n"
            "def broken():\n    raise KeyError('key')\n"
        )
        before = list(sys.path)
        assert read("mine_of_test:posts") == ([Query("1", "One"), Query("b", "Two", {"n": 2})], {"null": 1})
        for name, says in (
            ("half", "mine_of_test:half, row 1: it cannot be written as JSON"),
            ("dates", "mine_of_test:dates, row 1: it cannot be written as JSON"),
            ("broken", r"mine_of_test:broken failed \(KeyError: 'key'\)"),
        ):
            with pytest.raises(BadDataError, match=says):
                read(f"mine_of_test:{name}")
        with pytest.raises(BadConfigError, match="has no function post; did you mean mine_of_test:posts"):
            read("mine_of_test:post")
        assert sys.path == before


class TestMistakes:
    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("tlrd", "config.queries.train is 'tlrd', which is neither .*; did you mean tldr"),
            ("tlrd:posts", "there is no module tlrd; did you mean tldr:posts"),
            ("hh_helpfull:/x/y", "did you mean hh_helpful:/x/y"),
            ("reddit", "known are tldr, hh_helpful, hh_harmless .*jsonl:FILE, parquet:FILE, module:function"),
            ("tldr:/no/such", "there is no file /no/such"),
            ("jsonl:nothing.jsonl", "there is no file nothing.jsonl"),
            ("nothing.jsonl", "'nothing.jsonl', which is not a file"),
            ("", "is '', which is neither"),
        ],
    )
    def test_unknown_names(self, name, says):
        with pytest.raises(BadConfigError, match=says):
            source_name(name, setting="config.queries.train")

    @pytest.mark.parametrize("ending", ["jsonl", "parquet"])
    def test_missing_columns(self, tmp_path, ending):
        posts = write(tmp_path / f"posts.{ending}", [{"id": 1, "body": "a"}])
        for name, says in (("tldr", "info.id, info.post"), ("hh_helpful", "chosen"), (ending, "example_id, text")):
            with pytest.raises(BadDataError, match=rf"{name}:.*posts.{ending} has no column {says}; its .* id, body"):
                read(f"{name}:{posts}")

    def test_damaged_files(self, tmp_path):
        path = write(tmp_path / "a.jsonl.gz", OWN * 200)
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(BadDataError, match="a.jsonl.gz cannot be unpacked"):
            read(f"jsonl:{path}")
        path = write(tmp_path / "a.parquet", [{"example_id": str(i), "text": "t"} for i in range(9)])
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(BadDataError, match="a.parquet cannot be read as parquet"):
            read(f"parquet:{path}")
        (tmp_path / "b.jsonl").write_bytes(b'{"example_id": "a", "text": "b"}\n\xff\n')
        with pytest.raises(BadDataError, match="b.jsonl is not UTF-8 text in line 2"):
            read(f"jsonl:{tmp_path / 'b.jsonl'}")
        (tmp_path / "c.jsonl").write_text('{"example_id": "a", "text": "b"}\n\n["a"]\n')
        with pytest.raises(BadDataError, match="c.jsonl, line 3: expected an object with example_id, text"):
            read(f"jsonl:{tmp_path / 'c.jsonl'}")
        (tmp_path / "d.jsonl").write_text('{"example_id": "a", "text": 5}\n')
        with pytest.raises(BadDataError, match="d.jsonl, line 1: the text is 5; it must be text"):
            read(f"jsonl:{tmp_path / 'd.jsonl'}")
        (tmp_path / "empty").mkdir()
        with pytest.raises(BadDataError, match="empty holds no file that ends in .jsonl"):
            read(f"tldr:{tmp_path / 'empty'}")


def prepare(folder, train, evaluation, *, count=3, seed=0, max_characters=10_000):
    """The ids that are trained and evaluated on, and what sources.json says."""
    train, evaluation = (source_name(name, setting="a source") for name in (train, evaluation))
    stage = Prepare(
        train=train, evaluation=evaluation, evaluation_count=count, max_characters=max_characters, seed=seed
    )
    complete(stage, folder, safe_point=lambda: None)
    ids = ([query.example_id for query in read_queries(folder / f"{name}.jsonl")] for name in ("train", "evaluation"))
    return *ids, read_json(folder / "sources.json")


class TestSplit:
    ROWS = [{"example_id": f"q{i}", "text": f"Text {i}"} for i in range(40)]

    def test_one_source_holds_out_by_seed_whatever_its_order(self, tmp_path):
        path = str(write(tmp_path / "a.jsonl", self.ROWS))
        train, evaluation, about = prepare(tmp_path / "1", path, f"{tmp_path}/../{tmp_path.name}/a.jsonl")
        assert len(train) == 37 and len(evaluation) == 3 and not set(train) & set(evaluation)
        assert train == [f"q{i}" for i in range(40) if f"q{i}" in train]  # in the source's order
        assert about["train"]["held_out"] == 3 and about["evaluation"]["queries"] == 3
        reversed_rows = str(write(tmp_path / "b.jsonl", self.ROWS[::-1]))
        assert set(prepare(tmp_path / "2", reversed_rows, reversed_rows)[1]) == set(evaluation)
        others = [set(prepare(tmp_path / f"s{seed}", path, path, seed=seed)[1]) for seed in range(1, 6)]
        assert len({frozenset(ids) for ids in [*others, set(evaluation)]}) > 4

    def test_different_sources_are_not_split(self, tmp_path):
        one, two = write(tmp_path / "a.jsonl", self.ROWS), write(tmp_path / "b.jsonl", self.ROWS[10:])
        train, evaluation, about = prepare(tmp_path / "out", f"jsonl:{one}", f"jsonl:{two}")
        assert train == [f"q{i}" for i in range(40)] and evaluation == ["q10", "q11", "q12"]
        assert (about["evaluation"]["kept"], about["evaluation"]["queries"]) == (30, 3)
        assert about["evaluation"]["also_in_train"] == 3

    def test_nothing_left_to_train_on(self, tmp_path, capsys):
        path = str(write(tmp_path / "a.jsonl", self.ROWS))
        words = run_flags(tmp_path, path, path)
        assert main([*words, "--config.queries.evaluation_count=40"]) == 65
        assert "has 40 usable queries: with 40 held out for evaluation none is left" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_100_000_rows_add_less_than_200_mb(tmp_path):
    """Of real posts' length: 150 MB of text, read from JSON lines and parquet in a process of its own each."""
    rows = [{"info": {"id": f"t{i}", "post": f"{i} " + "a post " * 215, "title": "t"}} for i in range(1000)]
    with pyarrow.parquet.ParquetWriter(tmp_path / "a.parquet", pyarrow.Table.from_pylist(rows).schema) as writer:
        chunks = []
        for start in range(0, 100_000, 1000):
            for i, row in enumerate(rows):
                row["info"] = row["info"] | {"id": f"t{start + i}"}
            chunks.append(pyarrow.Table.from_pylist(rows))
        writer.write_table(pyarrow.concat_tables(chunks))
    measured = """
import resource, sys
import pyarrow.parquet
from sami_jax.cli.main import main
from sami_jax.config.fields import to_dict
from sami_jax.data.hub_rows import HubFiles
from sami_jax.data.queries import read_queries
from test_sources import *
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
train, evaluation, about = prepare(pathlib.Path(sys.argv[2]), sys.argv[1], sys.argv[1])
assert len(train) == 99_997 and len(evaluation) == 3
print(peak() - before)
"""
    words = [sys.executable, "-c", measured, f"tldr:{tmp_path / 'a.parquet'}", str(tmp_path / "out")]
    tests = pathlib.Path(__file__).parent
    done = subprocess.run(words, capture_output=True, text=True, cwd=tests, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 120  # 50 measured; 150 where a row group is read at once


TLDR = HubFiles("openai/summarize_from_feedback", "refs/convert/parquet", "comparisons/train/*.parquet")
COMMITS = ["3" * 40, "4" * 40, "5" * 40]


@pytest.fixture
def hub(tmp_path):
    """A Hub with both data sets, the posts of which have moved to a second commit when `move` is called."""

    def parquet(ids: str) -> bytes:
        return write(tmp_path / "hub.parquet", [post(i, f"Post {i}") for i in ids]).read_bytes()

    hh = {
        f"{kind}-base/{split}.jsonl.gz": f"{kind} {split}"
        for kind in ("helpful", "harmless")
        for split in ("train", "test")
    }
    hh = {
        name: write(tmp_path / "hub.jsonl.gz", [{"chosen": f"\n\nHuman: {text}"}]).read_bytes()
        for name, text in hh.items()
    }
    first = {
        "comparisons/train/0000.parquet": parquet("abcdefgh"),
        "comparisons/validation/0000.parquet": parquet("xyz"),
    }
    second = {"comparisons/train/0000.parquet": parquet("ijklmnop")}
    tldr = {COMMITS[0]: (COMMITS[0], first), COMMITS[1]: (COMMITS[1], second), TLDR.revision: (COMMITS[0], first)}
    repositories = {TLDR.repository: tldr, "Anthropic/hh-rlhf": dict.fromkeys(("main", COMMITS[2]), (COMMITS[2], hh))}
    with serving(Hub(repositories)) as server:
        yield server


def run_flags(tmp_path, train: str, evaluation: str) -> list[str]:
    """Of a run that begins, and ends soon, since nothing that a random model writes is kept."""
    config = tiny_run_config(tmp_path)
    settings = to_dict(config) | {"filters": {}, "iterations": 1}
    settings["queries"] = {"train": train, "evaluation": evaluation, "evaluation_count": 2}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return ["run", f"--config={tmp_path / 'config.json'}", f"--workdir={tmp_path / 'run'}"]


def test_a_hub_that_moves_does_not_change_a_resumed_run(hub, tmp_path):
    words, tldr, answer = run_flags(tmp_path, "tldr", "tldr"), hub.repositories[TLDR.repository], hub.answer

    def moving(path: str):
        """Moves as soon as somebody has heard where it is."""
        answered = answer(path)
        if "/revision/refs" in path:
            tldr[TLDR.revision] = tldr[COMMITS[1]]
        return answered

    hub.answer = moving
    ((code, sentence, _),) = commands(tmp_path / "cache", hub.url, words)
    assert code == 65 and "kept 0 pairs of 3 queries" in sentence, sentence
    about = read_json(tmp_path / "run/queries/sources.json")
    assert about["train"]["source"] == "tldr" and about["train"]["revision"] == COMMITS[0]
    assert (about["train"]["rows"], about["train"]["queries"], about["evaluation"]["queries"]) == (8, 6, 2)
    files = {path: path.read_bytes() for path in (tmp_path / "run/queries").iterdir()}
    lines = [line for name in ("train", "evaluation") for line in read_jsonl(tmp_path / f"run/queries/{name}.jsonl")]
    assert sorted(line["example_id"] for line in lines) == list("abcdefgh")
    assert tldr[TLDR.revision][0] == COMMITS[1]
    asked = len(hub.asked)
    ((again, same, _),) = commands(tmp_path / "cache", hub.url, words)
    assert (again, same) == (code, sentence)
    assert not [path for path in hub.asked[asked:] if "summarize" in path]
    assert files == {path: path.read_bytes() for path in (tmp_path / "run/queries").iterdir()}


def test_the_paper_s_three_data_sets_come_from_the_hub(hub, tmp_path):
    words = run_flags(tmp_path, "hh_helpful", "hh_harmless")
    ((code, sentence, _),) = commands(tmp_path / "cache", hub.url, words)
    assert code == 65 and "hh_helpful: iteration 1 samples from 1 queries, every second one of 1" in sentence, sentence
    assert not (tmp_path / "run").exists()
    ((code, sentence, _),) = commands(tmp_path / "cache", hub.url, words, offline=True)
    assert code == 65 and "HF_HUB_OFFLINE" in sentence
    [copy] = re.findall(r"hh_helpful:(\S+)\.$", sentence)
    assert [query.text for query in read(f"hh_helpful:{copy}")[0]] == ["helpful train"]


@pytest.mark.parametrize("status", [403, 404, 500])
def test_a_hub_that_refuses_says_how_to_give_a_copy(hub, tmp_path, status):
    hub.repositories[TLDR.repository] = (status, "")
    ((code, sentence, seconds),) = commands(tmp_path / "cache", hub.url, run_flags(tmp_path, "tldr", "tldr"))
    assert code == (74 if status == 500 else 65) and "as tldr:PATH" in sentence and seconds < 30, sentence
    assert not (tmp_path / "run").exists()


def test_a_hub_that_never_answers_is_74_within_30_s(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        ((code, sentence, seconds),) = commands(tmp_path / "cache", endpoint, run_flags(tmp_path, "tldr", "tldr"))
    assert code == 74 and "as tldr:PATH" in sentence and seconds < 30, (sentence, seconds)


def test_a_run_reads_its_own_copy_and_calls_no_function_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "counting_of_test.py").write_text(
        "import pathlib\n"
        "def posts():\n"
        "    with pathlib.Path('calls').open('a') as file:\n        file.write('x')\n"
        "    return [{'example_id': i, 'text': f'Post {i}'} for i in range(9)]\n"
    )
    evaluation = write(tmp_path / "evaluation.parquet", [{"example_id": "e", "text": "Evaluate"}])
    words = run_flags(tmp_path, "counting_of_test:posts", "evaluation.parquet")
    assert main(words) == 65
    assert "queries of counting_of_test:posts: 9 rows, none dropped; 9 for train" in capsys.readouterr().out
    evaluation.unlink()
    (tmp_path / "counting_of_test.py").unlink()
    sys.modules.pop("counting_of_test")
    assert main(words) == 65
    assert (tmp_path / "calls").read_text() == "x" and "kept 0 pairs of 5 queries" in capsys.readouterr().err
    with (tmp_path / "run/queries/train.jsonl").open("a") as file:
        file.write("\n")
    assert main(words) == 65 and "train.jsonl is missing or has changed its size" in capsys.readouterr().err


def test_a_folder_of_ones_own_in_the_run_directory_stays(tmp_path, capsys):
    path = str(write(tmp_path / "a.jsonl", TestSplit.ROWS))
    mine = write(tmp_path / "run" / "queries" / "mine.jsonl", TestSplit.ROWS)
    assert main(run_flags(tmp_path, path, path)) == 65
    assert "run/queries already holds files; choose another folder" in capsys.readouterr().err
    assert [file for file in (tmp_path / "run").rglob("*") if file.is_file() and file.name != "LOCK"] == [mine]


def test_too_few_queries_are_refused_before_a_model_is_fetched(hub, tmp_path):
    words = [*run_flags(tmp_path, "tldr", "tldr"), "--config.train.queries_per_step=4", "--config.model=acme/none"]
    ((code, sentence, _),) = commands(tmp_path / "cache", hub.url, words)
    says = "tldr: iteration 1 samples from 3 queries, every second one of 6, but its 1 steps need 4"
    assert code == 65 and says in sentence, sentence
    assert not (tmp_path / "run").exists() and not [path for path in hub.asked if "acme" in path]
