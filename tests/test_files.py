"""Files are whole or not there, logs survive a torn line, and what is read is what may be used."""

import json
import re
import signal
import subprocess
import sys

import pytest

from sami_jax.errors import BadDataError, SaveFailedError
from sami_jax.files import (
    append_jsonl,
    canonical_json,
    content_hash,
    file_hash,
    read_json,
    read_jsonl,
    read_log,
    replacing,
    write_json,
    write_jsonl,
    write_text,
)
from sami_jax.stage_folder import begin


class TestHashes:
    def test_one_text_per_value(self):
        assert canonical_json({"b": [1, None], "a": "é"}) == '{"a": "é", "b": [1, null]}'
        assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
        assert content_hash({"a": 1}) != content_hash({"a": "1"}) != content_hash({"a": [1]})

    def test_known_digest(self, tmp_path):
        # SHA-256 of "abc", from FIPS 180-4.
        (tmp_path / "abc").write_bytes(b"abc")
        expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        assert file_hash(tmp_path / "abc") == expected

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, {"a": float("-inf")}]])
    def test_nan_and_infinity_are_refused(self, tmp_path, value):
        for write in (canonical_json, content_hash, lambda x: write_json(tmp_path / "x", x)):
            with pytest.raises(ValueError):
                write(value)
        assert list(tmp_path.iterdir()) == []


class TestAtomicWrites:
    def test_round_trip_and_no_leftovers(self, tmp_path):
        value = {"text": "zwölf\n", "list": [1, 2.5, None, True]}
        write_json(tmp_path / "deep" / "value.json", value)
        write_jsonl(tmp_path / "deep" / "values.jsonl", [value, {"a": 1}])
        assert read_json(tmp_path / "deep" / "value.json") == value
        assert read_jsonl(tmp_path / "deep" / "values.jsonl") == [value, {"a": 1}]
        assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["value.json", "values.jsonl"]

    def test_a_failure_half_way_leaves_the_old_file(self, tmp_path):
        path = tmp_path / "value.txt"
        write_text(path, "old")

        class PowerCut(Exception):
            pass

        with pytest.raises(PowerCut), replacing(path) as temporary:
            temporary.write_text("ne")
            assert path.read_text() == "old"  # nothing shows before the end
            raise PowerCut
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]

    def test_a_reader_sees_the_old_file_or_the_new_one_and_never_a_piece(self, tmp_path):
        path = tmp_path / "value.txt"
        write_text(path, "old")
        with path.open() as reader:
            write_text(path, "the new text")
            assert reader.read() == "old"  # the new text is another file, which took the name
        assert path.read_text() == "the new text"

    def test_killed_half_way_leaves_the_old_file_and_begin_clears_up(self, tmp_path):
        begin(tmp_path, inputs=1)
        write_text(tmp_path / "value.txt", "old")
        code = (
            "import os, sys, pathlib\n"
            "from sami_jax.files import replacing\n"
            "with replacing(pathlib.Path(sys.argv[1])) as temporary:\n"
            "    temporary.write_text('ne')\n"
            "    os.kill(os.getpid(), 9)\n"
        )
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "value.txt")], timeout=60)
        assert done.returncode == -signal.SIGKILL
        assert (tmp_path / "value.txt").read_text() == "old"
        assert len(list(tmp_path.glob(".value.txt.*.tmp"))) == 1
        begin(tmp_path, inputs=1)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["PLAN.json", "value.txt"]

    def test_a_place_that_cannot_be_written_is_a_save_failure(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(SaveFailedError, match="file/value.json could not be written"):
            write_json(tmp_path / "file" / "value.json", 1)


class TestReading:
    @pytest.mark.parametrize("read", [read_json, read_jsonl])
    def test_errors_name_the_file(self, tmp_path, read):
        with pytest.raises(BadDataError, match=r"missing.json does not exist"):
            read(tmp_path / "missing.json")
        (tmp_path / "latin.json").write_bytes('"é"'.encode("latin-1"))
        with pytest.raises(BadDataError, match=r"latin.json is not UTF-8"):
            read(tmp_path / "latin.json")

    def test_errors_name_the_line(self, tmp_path):
        (tmp_path / "a.json").write_text('{"a": 1,\n"b": }')
        with pytest.raises(BadDataError, match=r"a.json, line 2: not valid JSON"):
            read_json(tmp_path / "a.json")
        (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"b": \n')
        with pytest.raises(BadDataError, match=r"a.jsonl, line 3: not valid JSON"):
            read_jsonl(tmp_path / "a.jsonl")

    def test_a_key_that_stands_twice_is_refused(self, tmp_path):
        (tmp_path / "a.json").write_text('{"0": {"b": 1}, "1": {"c": 1, "b": 2, "c": 3}}')
        with pytest.raises(BadDataError, match=r"a.json: the key 'c' stands twice in one object; remove or rename"):
            read_json(tmp_path / "a.json")
        (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 1, "a": 1}\n')
        with pytest.raises(BadDataError, match=r"a.jsonl, line 2: the key 'a' stands twice"):
            read_jsonl(tmp_path / "a.jsonl")

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            ("NaN", "NaN is no finite number of 64 bits"),
            ("-Infinity", "-Infinity is no finite"),
            ("1e999", "1e999 is no finite"),
            ("1" * 5000, "a number of 5000 characters is no finite"),
            ("1" * 400, "a number of 400 characters is no finite"),
            (r'"half a \ud83d"', r"holds \ud83d, half of a surrogate pair"),
            (r'{"\ude00\ud83d": 1}', r"holds \ude00, half of a surrogate pair"),
            ("[" * 3000 + "]" * 3000, "more than 100 lists and objects inside one another"),
            ('{"a":' * 101 + "1" + "}" * 101, "more than 100 lists"),
        ],
    )
    def test_what_cannot_be_used_or_written_is_refused_with_its_line(self, tmp_path, value, reason):
        (tmp_path / "a.json").write_text('{"a": ["[NaN, 1e999",\n 1.5e-3],\n "b": ' + value + "}")
        with pytest.raises(BadDataError, match=f"a.json, line 3: .*{re.escape(reason)}"):
            read_json(tmp_path / "a.json")
        (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"b": ' + value + "}\n")
        with pytest.raises(BadDataError, match="a.jsonl, line 3: "):
            read_jsonl(tmp_path / "a.jsonl")

    def test_what_only_looks_like_it_is_read_and_written(self, tmp_path):
        text = (
            r'{"a": "\ud83d\ude00 \\ud83d NaN \"1e999\" ' + "[" * 200 + '", "b": [[], -1e-300, 12345678901234567890]}'
        )
        (tmp_path / "a.json").write_text(text)
        value = read_json(tmp_path / "a.json")
        assert value == json.loads(text) and value["a"].startswith("\U0001f600 \\ud83d NaN")
        write_json(tmp_path / "b.json", value)
        deepest = json.loads("[" * 100 + "]" * 100)
        write_jsonl(tmp_path / "b.jsonl", [value, deepest])
        assert read_json(tmp_path / "b.json") == value and read_jsonl(tmp_path / "b.jsonl") == [value, deepest]

    def test_a_byte_order_mark_in_front_is_none_of_the_text(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}\r\n{"a": 2}\r\n')
        assert read_jsonl(tmp_path / "a.jsonl") == [{"a": 1}, {"a": 2}]
        (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[1]")
        assert read_json(tmp_path / "a.json") == [1]
        (tmp_path / "two.jsonl").write_bytes(b"[1]\n\xef\xbb\xbf[2]\n")  # two such files put together
        with pytest.raises(BadDataError, match="line 2: not valid JSON"):
            read_jsonl(tmp_path / "two.jsonl")

    def test_only_newlines_end_a_record(self, tmp_path):
        # U+2028 and U+0085 are line ends to str.splitlines, and both occur in Reddit posts.
        records = [{"text": "a\u2028b\u0085c\x0bd"}, {"text": "e"}]
        write_jsonl(tmp_path / "a.jsonl", records)
        assert read_jsonl(tmp_path / "a.jsonl") == records


class TestLogs:
    def test_append_and_read(self, tmp_path):
        assert read_log(tmp_path / "log.jsonl") == []
        for step in range(3):
            append_jsonl(tmp_path / "deep" / "log.jsonl", {"step": step})
        assert read_log(tmp_path / "deep" / "log.jsonl") == [{"step": 0}, {"step": 1}, {"step": 2}]

    def test_a_line_torn_at_any_byte_is_left_out_and_stays_alone(self, tmp_path):
        whole = (canonical_json({"note": "größer", "step": 2}) + "\n").encode()
        for cut in range(len(whole)):
            path = tmp_path / f"{cut}.jsonl"
            append_jsonl(path, {"step": 1})
            with path.open("ab") as file:
                file.write(whole[:cut])
            complete = cut == len(whole) - 1  # only the newline is missing: nothing is lost
            kept = [{"step": 1}, {"note": "größer", "step": 2}] if complete else [{"step": 1}]
            assert read_log(path) == kept, cut
            append_jsonl(path, {"step": 3})
            assert read_log(path) == [*kept, {"step": 3}], cut
