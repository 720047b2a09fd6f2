"""Where a run comes from is recorded, and never stands in its way."""

import json
import re
import shlex
import subprocess
import sys
import time

import numpy as np

from aimnet2mult.train import provenance as module
from aimnet2mult.train.provenance import provenance, source_commit


def git(folder, *command):
    subprocess.run(
        ["git", "-c", "user.name=A", "-c", "user.email=a@b.c", "-C", str(folder), *command],
        check=True,
        capture_output=True,
    )


def test_provenance_is_json_and_names_the_software():
    record = provenance()
    assert json.loads(json.dumps(record)) == record
    assert {"aimnet2mult", "torch", "python", "numpy", "h5py", "pytorch-ignite", "omegaconf"} <= set(record["versions"])
    assert record["versions"]["numpy"] == np.__version__
    assert record["command"].startswith(shlex.quote(sys.orig_argv[0]))


def test_commit_of_a_checkout(tmp_path):
    checkout = tmp_path / "checkout"
    (checkout / "package").mkdir(parents=True)
    git(tmp_path, "init", "-q", "checkout")
    assert source_commit(checkout) is None  # no commit yet
    (checkout / "package" / "a.py").write_text("a = 1\n")
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "first")
    record = source_commit(checkout)
    assert re.fullmatch("[0-9a-f]{40}", record["commit"])
    (checkout / "package" / "untracked.py").touch()
    assert record["dirty"] is source_commit(checkout)["dirty"] is False
    (checkout / "package" / "a.py").write_text("a = 2\n")
    assert source_commit(checkout) == {"commit": record["commit"], "dirty": True}
    assert source_commit(checkout / "package") is None  # inside somebody's checkout


def test_git_that_is_missing_fails_or_hangs(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    assert source_commit(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert source_commit(tmp_path) is None
    (tmp_path / "git").write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setattr(module, "GIT_TIMEOUT", 0.2)
    start = time.monotonic()
    assert source_commit(tmp_path) is None
    assert time.monotonic() - start < 5


def test_provenance_without_a_working_folder(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert provenance()["cwd"] is None
