"""A stage's folder: begun for its inputs, sealed with its outputs, held by one process at a time."""

import json
import os
import subprocess
import sys
import time

import pytest

from sami_jax.errors import BadConfigError, BadDataError, RunInUseError, SaveFailedError
from sami_jax.files import file_hash, write_json, write_text
from sami_jax.stage_folder import begin, check_sealed, locked, seal, seal_of


def write_outputs(folder) -> None:
    write_json(folder / "a.json", [1, 2, 3])
    write_text(folder / "deep" / "b.txt", "text")


class TestSeal:
    def test_round_trip(self, tmp_path):
        assert seal_of(tmp_path, inputs={"seed": 1}) is None
        begin(tmp_path, inputs={"seed": 1})
        write_outputs(tmp_path)
        assert seal_of(tmp_path, inputs={"seed": 1}) is None
        fingerprint = seal(tmp_path, inputs={"seed": 1}, counts={"kept": 3})
        assert seal_of(tmp_path, inputs={"seed": 1}) == fingerprint
        done = json.loads((tmp_path / "DONE.json").read_text())
        assert [output["path"] for output in done["outputs"]] == ["PLAN.json", "a.json", "deep/b.txt"]
        assert done["outputs"][2] == {
            "path": "deep/b.txt",
            "bytes": 4,
            "sha256": file_hash(tmp_path / "deep" / "b.txt"),
        }
        assert done["counts"] == {"kept": 3}

    def test_equal_stages_have_equal_bytes_and_others_do_not(self, tmp_path):
        def make(name: str, *, inputs=1, counts=2, text="text") -> tuple[str, bytes]:
            begin(tmp_path / name, inputs=inputs)
            write_text(tmp_path / name / "out.txt", text)
            return seal(tmp_path / name, inputs=inputs, counts=counts), (tmp_path / name / "DONE.json").read_bytes()

        one = make("one")
        assert make("two") == one and make("one") == one  # elsewhere, and again
        others = [make("three", inputs=9), make("four", counts=9), make("five", text="texT")]
        assert len({fingerprint for fingerprint, _ in [one, *others]}) == 4

    def test_what_equal_runs_write_differently_is_left_out(self, tmp_path):
        write_outputs(tmp_path)
        before = seal(tmp_path, inputs=1, counts=0, outside="checkpoints")
        write_text(tmp_path / "checkpoints" / "uuid", "random")
        (tmp_path / ".half.tmp").write_text("x")
        assert seal(tmp_path, inputs=1, counts=0, outside="checkpoints") == before
        with locked(tmp_path):
            assert seal(tmp_path, inputs=1, counts=0, outside="checkpoints") == before
        assert seal(tmp_path, inputs=1, counts=0) != before

    def test_a_lost_or_shortened_output_is_bad_data_with_the_remedy(self, tmp_path):
        write_outputs(tmp_path)
        seal(tmp_path, inputs=1, counts=0)
        write_text(tmp_path / "deep" / "b.txt", "tex")
        with pytest.raises(BadDataError, match=r"deep/b.txt is missing or has changed its size .*delete"):
            seal_of(tmp_path, inputs=1)
        (tmp_path / "deep" / "b.txt").unlink()
        with pytest.raises(BadDataError, match=r"deep/b.txt is missing"):
            seal_of(tmp_path, inputs=1)

    def flipped(self, path, *, keep_time: bool) -> None:
        state, data = path.stat(), bytearray(path.read_bytes())
        data[0] ^= 1
        path.write_bytes(data)
        if keep_time:
            os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))

    def test_a_bit_flipped_after_the_seal_is_noticed_at_the_next_start(self, tmp_path):
        write_outputs(tmp_path)
        seal(tmp_path, inputs=1, counts=0)
        self.flipped(tmp_path / "deep" / "b.txt", keep_time=False)
        with pytest.raises(BadDataError, match=r"deep/b.txt has other bytes than .*DONE.json sealed.*delete"):
            seal_of(tmp_path, inputs=1)

    @pytest.mark.parametrize("keep_time", [False, True])
    def test_what_is_used_is_hashed_first(self, tmp_path, keep_time):
        folder = tmp_path / "stage"
        write_outputs(folder)
        seal(folder, inputs=1, counts=0)
        self.flipped(folder / "deep" / "b.txt", keep_time=keep_time)
        for path in (folder, folder / "deep"):
            with pytest.raises(BadDataError, match=r"deep/b.txt has other bytes"):
                check_sealed(path)
        (folder / "deep" / "b.txt").unlink()
        check_sealed(folder / "a.json")  # what is not used need not even be there

    def test_what_cannot_be_made_alone_says_what_to_delete_with_it(self, tmp_path):
        folder = tmp_path / "export"
        write_outputs(folder)
        plain = seal(folder, inputs=1, counts=0)
        assert seal(folder, inputs=1, counts=0, made_of="train") == plain
        self.flipped(folder / "a.json", keep_time=False)
        for look in (check_sealed, lambda path: seal_of(path, inputs=1)):
            with pytest.raises(BadDataError, match=f"delete {folder} and {tmp_path}/train, which it is made of, to"):
                look(folder)

    def test_bytes_are_hashed_again_where_size_or_time_changed_only(self, tmp_path):
        path = tmp_path / "a.bin"
        path.write_bytes(b"x" * 100)
        os.utime(path, ns=(0, 10))
        seal(tmp_path, inputs=1, counts=0)
        check_sealed(path)
        self.flipped(path, keep_time=True)
        check_sealed(path)  # the same size and time: not read again in this process
        os.utime(path, ns=(0, 11))
        with pytest.raises(BadDataError, match=r"a.bin has other bytes"):
            check_sealed(path)

    def test_what_nobody_sealed_is_left_alone(self, tmp_path):
        write_outputs(tmp_path)
        check_sealed(tmp_path)
        (tmp_path / "DONE.json").write_text('"somebody else\'s"')
        check_sealed(tmp_path)

    def test_a_seal_that_is_none_is_refused(self, tmp_path):
        (tmp_path / "DONE.json").write_text("{}")
        with pytest.raises(BadDataError, match=r"DONE.json is no seal; delete"):
            seal_of(tmp_path, inputs=1)

    def test_a_folder_of_something_else_is_refused_and_kept(self, tmp_path):
        (tmp_path / ".precious.tmp.txt").write_text("")
        with pytest.raises(BadDataError, match="already holds files"):
            begin(tmp_path, inputs=1)
        assert [path.name for path in tmp_path.iterdir()] == [".precious.tmp.txt"]

    def test_other_inputs_are_refused(self, tmp_path):
        begin(tmp_path, inputs={"rate": 1e-6})
        begin(tmp_path, inputs={"rate": 1e-6})  # the same go on
        with pytest.raises(BadConfigError, match="made from other inputs"):
            begin(tmp_path, inputs={"rate": 1e-7})
        seal(tmp_path, inputs={"rate": 1e-6}, counts=0)
        with pytest.raises(BadConfigError, match=str(tmp_path)):
            seal_of(tmp_path, inputs={"rate": 1e-7})


HOLDER = """
import pathlib, sys
from sami_jax.stage_folder import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


class TestLock:
    def test_is_held_by_another_process_and_freed_by_kill_9(self, tmp_path):
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert holder.stdout.readline() == "held\n"
            for _ in range(2):  # and being refused does not take it away
                with pytest.raises(RunInUseError, match=f"in use by process {holder.pid};"), locked(tmp_path):
                    raise AssertionError("two processes hold one lock")
        finally:
            holder.kill()
            holder.communicate(timeout=60)
        assert (tmp_path / "LOCK").exists()
        with locked(tmp_path):
            assert (tmp_path / "LOCK").read_text() == str(os.getpid())

    def test_a_file_is_refused(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(BadDataError, match=r"file is a file; name a folder"), locked(tmp_path / "file"):
            raise AssertionError
        with pytest.raises(SaveFailedError, match=r"file/run could not be written"), locked(tmp_path / "file" / "run"):
            raise AssertionError
        assert (tmp_path / "file").read_text() == ""

    def test_is_free_after_use_and_after_a_failure(self, tmp_path):
        started = time.monotonic()
        for _ in range(2):
            with pytest.raises(ZeroDivisionError), locked(tmp_path / "new"):
                raise ZeroDivisionError
        assert time.monotonic() - started < 5
