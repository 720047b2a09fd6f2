"""Files are written whole or not at all; user's mistakes end with exit status 2."""

import errno
import os
import re
import stat
import subprocess
import sys
import time

import click
import pytest
from click.testing import CliRunner

from aimnet2mult.utils import files
from aimnet2mult.utils.cli import error_message, user_errors
from aimnet2mult.utils.files import (
    ABANDONED_AFTER,
    atomic_path,
    check_writable,
    remove_stale,
    sync_folder,
    write_text_atomic,
)


def test_atomic_path_moves_the_finished_file_and_keeps_the_suffix(tmp_path):
    target = tmp_path / "sae.yaml"
    with atomic_path(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".yaml"
        temporary.write_text("1: -0.5\n")
        assert not target.exists()
    assert target.read_text() == "1: -0.5\n"
    assert os.listdir(tmp_path) == ["sae.yaml"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failed_block_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "model.pt"
    target.write_text("old")

    def write_half() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["model.pt"]


def test_content_and_name_are_on_disk_when_the_block_ends(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        steps.append("sync folder" if is_folder else "sync file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", lambda old, new: (steps.append("move"), replace(old, new)))
    write_text_atomic(tmp_path / "a.txt", "text")
    assert steps == ["sync file", "move", "sync folder"]


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_only_systems_that_cannot_sync_folders_are_excused(tmp_path, monkeypatch, number, passes):
    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    if passes:
        sync_folder(tmp_path)
    else:
        with pytest.raises(OSError, match="Input/output error"):
            sync_folder(tmp_path)


KILLED = """
import os, signal, sys
from aimnet2mult.utils.files import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed(tmp_path):
    target = tmp_path / "model.v1.pt"
    target.write_text("old")
    status = subprocess.run([sys.executable, "-c", KILLED, str(target)]).returncode
    assert status < 0
    (left,) = (name for name in os.listdir(tmp_path) if name != target.name)
    assert re.fullmatch(r"\.model\.v1\.[0-9a-f]{8}-\d+-[0-9a-f]{6}\.pt", left)
    assert remove_stale(tmp_path) == [tmp_path / left]
    assert os.listdir(tmp_path) == [target.name]
    assert target.read_text() == "old"


def test_what_is_being_written_and_what_is_not_ours_stays(tmp_path):
    here, dead, gone = files._place(), 2**22 + 1, time.time() - ABANDONED_AFTER - 100  # no such process
    kept = [
        f".a.{here}-{os.getppid()}-abcdef.pt",  # of a process that runs
        f".b.00000000-{dead}-abcdef.pt",  # perhaps of one that runs elsewhere
        f"c.{here}-{dead}-abcdef.pt",
        f".d.{dead}-abcdef.pt",
        f".e.{here}-{dead}-abcdefg.pt",
        f".f.{here}-{dead}-abcdef.pt.bak",
        f".{here}-{dead}-abcdef.pt",
        ".hidden",
        "model.pt",
    ]
    stale = [
        f".g.{here}-{dead}-abcdef.pt",
        f".h.{here}-{dead}-abcdef",
        f".i\n.j.{here}-{dead}-abcdef.jsonl",
        f".k.00000000-{os.getppid()}-abcdef.pt",  # written elsewhere, long ago
        f".l.{here}-{os.getpid()}-abcdef.pt",  # of a process that had our number
        f".m.{here}-{10**30}-abcdef.pt",
    ]
    for name in kept + stale:
        (tmp_path / name).touch()
    os.utime(tmp_path / f".k.00000000-{os.getppid()}-abcdef.pt", (gone, gone))
    folder = tmp_path / f".n.{here}-{dead}-abcdef.pt"
    folder.mkdir()
    link = tmp_path / f".o.{here}-{dead}-abcdef.pt"
    link.symlink_to(tmp_path / "model.pt")
    with atomic_path(tmp_path / "new.pt") as temporary:
        temporary.touch()
        assert {path.name for path in remove_stale(tmp_path)} == set(stale)
        assert temporary.exists()
    assert set(os.listdir(tmp_path)) == {*kept, folder.name, link.name, "new.pt"}


def test_stale_file_that_cannot_be_removed_is_named(tmp_path, monkeypatch, caplog):
    path = tmp_path / f".a.{files._place()}-{2**22 + 1}-abcdef.pt"
    path.touch()

    def fail(self, missing_ok=False):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(path), "unlink", fail)
    assert remove_stale(tmp_path) == []
    assert f"{path}: left behind by a process that was killed, cannot be removed (Permission denied)" in caplog.text


def test_symbolic_link_stays_a_link(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    write_text_atomic(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_written_file_follows_the_umask(tmp_path):
    write_text_atomic(tmp_path / "a.txt", "text")
    (tmp_path / "b.txt").write_text("text")
    modes = {stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("a.txt", "b.txt")}
    assert len(modes) == 1


def test_check_writable_names_what_is_wrong(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match=r"the folder .*missing does not exist"):
        check_writable(tmp_path / "missing" / "sae.yaml")
    with pytest.raises(NotADirectoryError, match="file is not a folder"):
        check_writable(tmp_path / "file" / "sae.yaml")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_writable(tmp_path)
    assert check_writable(str(tmp_path / "new.yaml")) == tmp_path / "new.yaml"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder in which nobody may write")
def test_check_writable_finds_out_by_trying():
    with pytest.raises(PermissionError, match="cannot be written"):
        check_writable("/proc/self/sae.yaml")


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ValueError("sae.yaml: empty"), 2, "Error: sae.yaml: empty\n"),
        (FileNotFoundError(2, "No such file or directory", "x.h5"), 2, "Error: x.h5: No such file or directory\n"),
        (RuntimeError("a defect"), 1, ""),
    ],
)
def test_command_turns_user_errors_into_status_2(error, status, text):
    @click.command()
    @user_errors
    def main() -> None:
        raise error

    result = CliRunner().invoke(main, [])
    assert result.exit_code == status
    assert result.output == text


def test_error_message_of_an_error_without_text():
    assert error_message(ValueError()) == "ValueError"
