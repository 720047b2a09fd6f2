"""Files are written whole or not at all; user's mistakes end with exit status 2."""

import os
import stat

import click
import pytest
from click.testing import CliRunner

from aimnet2mult.utils.cli import error_message, user_errors
from aimnet2mult.utils.files import atomic_path, check_writable, write_text_atomic


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
