"""Weights & Biases without a network."""

import logging
import time
from types import SimpleNamespace

import pytest

from aimnet2mult.train import loggers
from aimnet2mult.train.loggers import wandb_obstacle
from aimnet2mult.train.schema import WandbConfig, WandbInitConfig


@pytest.fixture
def no_login(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path


def settings(**init):
    wandb = WandbConfig(init=WandbInitConfig(**init))
    return SimpleNamespace(wandb=wandb, run_name="run", project_name="project")


def test_without_login_the_obstacle_is_named(no_login):
    assert "no login for api.wandb.ai" in wandb_obstacle()


def test_login_in_netrc_is_found_and_a_silent_server_is_named_at_once(no_login, monkeypatch):
    (no_login / "netrc").write_text("machine 127.0.0.1 login user password 0123\n")
    (no_login / "netrc").chmod(0o600)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    start = time.monotonic()
    assert "127.0.0.1 does not answer" in wandb_obstacle()
    assert time.monotonic() - start < loggers.WANDB_TIMEOUT + 1


def test_disabled_or_absent_starts_nothing(tmp_path):
    assert loggers.start_wandb(settings(mode="disabled"), tmp_path, {}) is None
    assert loggers.start_wandb(SimpleNamespace(wandb=None), tmp_path, {}) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("default")  # wandb starts threads and files of its own
def test_online_without_login_goes_on_offline(no_login, caplog):
    pytest.importorskip("wandb")
    folder = no_login / "run"
    folder.mkdir()
    with caplog.at_level(logging.INFO, logger="aimnet2mult"):
        run = loggers.start_wandb(settings(mode="online"), folder, {"seed": 1})
    try:
        run.log({"val/loss": 1.0}, step=1)
    finally:
        run.finish()
    assert "logged offline" in caplog.text
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))


# --------------------------------------------------------------------------------------------------
