"""Results go where they were meant to go, or are refused before the work; nothing is replaced but a file."""

import os
import pathlib
import socket
import stat
import subprocess
import sys
import threading

import pytest

from sami_jax.errors import BadDataError, SaveFailedError
from sami_jax.files import building, write_text
from sami_jax.outputs import check_file, check_folder, is_stream


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


class TestFiles:
    def test_what_can_be_written_leaves_no_trace(self, tmp_path):
        (tmp_path / "old").write_text("old")
        for name in ("new", "old", "deep/er/new"):
            check_file(tmp_path / name)
        assert names(tmp_path) == ["old"] and (tmp_path / "old").read_text() == "old"

    @pytest.mark.parametrize(
        ("place", "kind", "says"),
        [
            (".", BadDataError, "is a folder; name a file"),
            ("file/new", SaveFailedError, "file/new could not be written"),
            ("file/deep/new", SaveFailedError, "could not be written"),
            ("n" * 250, SaveFailedError, "File name too long"),  # with what a temporary name has more
            ("deep/" + "n" * 250, SaveFailedError, "File name too long"),
            ("/proc/new", SaveFailedError, "could not be written"),
            ("socket", BadDataError, "socket is a socket"),
        ],
    )
    def test_what_cannot_is_refused_and_leaves_no_trace(self, tmp_path, monkeypatch, place, kind, says):
        (tmp_path / "file").write_text("")
        monkeypatch.chdir(tmp_path)  # a socket's path is short
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("socket")
            with pytest.raises(kind, match=says):
                check_file(tmp_path / place)
        assert names(tmp_path) == ["file", "socket"]

    @pytest.mark.parametrize("where", [".", "far/away"])
    def test_a_link_stays_and_what_it_leads_to_is_written(self, tmp_path, where):
        (tmp_path / "far" / "away").mkdir(parents=True)
        target, link = tmp_path / where / "target", tmp_path / "link"
        link.symlink_to(target.relative_to(tmp_path))
        for text in ("first", "second"):  # a link to nothing yet, and to a file
            check_file(link)
            write_text(link, text)
            assert link.is_symlink() and not target.is_symlink() and target.read_text() == text
        assert names(tmp_path) == ["away", "far", "link", "target"]

    def test_a_pipe_is_written_to(self, tmp_path):
        pipe, got = tmp_path / "pipe", []
        os.mkfifo(pipe)
        check_file(pipe)
        reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
        reader.start()
        write_text(pipe, "text\n")
        reader.join(60)
        assert got == ["text\n"] and stat.S_ISFIFO(pipe.stat().st_mode) and names(tmp_path) == ["pipe"]

    def test_a_device_is_written_to_also_through_a_link(self, tmp_path):
        (tmp_path / "link").symlink_to("/dev/null")
        for path in (pathlib.Path("/dev/null"), tmp_path / "link"):
            before = os.stat(path)
            check_file(path)
            write_text(path, "text")
            assert os.path.samestat(before, os.stat(path)) and stat.S_ISCHR(os.stat(path).st_mode)
        assert (tmp_path / "link").is_symlink()

    @pytest.mark.parametrize("place", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
    @pytest.mark.parametrize("to", ["pipe", "file"])
    def test_standard_output_is_written_to_whatever_it_is(self, tmp_path, place, to):
        code = (
            "import pathlib, sys\n"
            "from sami_jax.files import write_text\n"
            "from sami_jax.outputs import check_file\n"
            "print('before')\n"
            "check_file(pathlib.Path(sys.argv[1]))\n"
            "write_text(pathlib.Path(sys.argv[1]), 'text\\n')\n"
            "print('behind')\n"
        )
        with (tmp_path / "file").open("w+") as file:
            words = [sys.executable, "-c", code, place]
            done = subprocess.run(words, stdout=file if to == "file" else subprocess.PIPE, text=True, timeout=60)
            text = (tmp_path / "file").read_text() if to == "file" else done.stdout
        assert done.returncode == 0 and text == "before\ntext\nbehind\n" and names(tmp_path) == ["file"]

    def test_an_ordinary_path_is_no_stream(self, tmp_path):
        (tmp_path / "file").write_text("")
        (tmp_path / "link").symlink_to("file")
        (tmp_path / "loop").symlink_to("loop")
        assert not any(map(is_stream, [tmp_path, *(tmp_path / name for name in ("file", "link", "loop", "none"))]))


class TestFolders:
    def test_missing_and_empty_ones_pass_and_links_are_followed(self, tmp_path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "link").symlink_to("empty")
        assert check_folder(tmp_path / "deep" / "new") == tmp_path / "deep" / "new"
        assert check_folder(tmp_path / "link") == check_folder(tmp_path / "empty") == tmp_path / "empty"
        assert names(tmp_path) == ["empty", "link"]
        with building(tmp_path / "link") as place:
            (place / "a").write_text("a")
        assert (tmp_path / "link").is_symlink() and names(tmp_path / "empty") == ["a"]

    @pytest.mark.parametrize(
        ("place", "kind", "says"),
        [
            ("file", BadDataError, "file is a file; name a folder"),
            ("file/new", SaveFailedError, "file/new could not be written"),
            ("full", BadDataError, "full already holds files"),
            ("/", BadDataError, "/ already holds files"),
            ("/dev/null", BadDataError, "/dev/null is a file"),
            ("/dev/shm/", BadDataError, "/dev/shm (already holds files|is a mount point)"),
        ],
    )
    def test_others_are_refused(self, tmp_path, place, kind, says):
        (tmp_path / "full").mkdir()
        for name in ("file", "full/file"):
            (tmp_path / name).write_text("")
        with pytest.raises(kind, match=says):
            check_folder(tmp_path / place)
        assert names(tmp_path) == ["file", "file", "full"]
