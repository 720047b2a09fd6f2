"""Loggers: what they are given arrives, in order, and nothing that happens to them reaches the training."""

import importlib.util
import json
import logging
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from aimnet2mult.train import loggers
from aimnet2mult.train.loggers import (
    Logger,
    Loggers,
    check_loggers,
    module_tree,
    start_loggers,
    wandb_mode,
    wandb_obstacle,
    watched_values,
)
from aimnet2mult.train.schema import TensorBoardConfig, WandbConfig, WandbInitConfig, WatchModelConfig

KEY = "0" * 40
"""What W&B takes for a key until a server is asked."""

SETTINGS = {"seed": 1, "data": {"fidelity_weights": {0: 2.0}}, "path": Path("a.h5")}


def settings(mode=None, tensorboard=False, watch=None, **init):
    """Return the sections that loggers look at; W&B is off without a mode."""
    return SimpleNamespace(
        wandb=None if mode is None else WandbConfig(init=WandbInitConfig(mode=mode, **init), watch_model=watch),
        tensorboard=TensorBoardConfig() if tensorboard else None,
        run_name="water",
        project_name="molecules",
    )


@pytest.fixture(autouse=True)
def no_login(monkeypatch, tmp_path):
    """A user who has never logged in."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    return tmp_path


@pytest.fixture
def wandb():
    """W&B as a process finds it that has not used it yet."""
    wandb = pytest.importorskip("wandb")
    wandb.teardown()
    yield wandb
    wandb.teardown()


@pytest.fixture
def messages(caplog):
    """What the package logs: a function that returns lines of at least this level."""
    caplog.set_level(logging.INFO, logger="aimnet2mult")

    def lines(level=logging.INFO):
        ours = (record for record in caplog.records if record.name.startswith("aimnet2mult"))
        return [record.getMessage() for record in ours if record.levelno >= level]

    return lines


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    model(torch.ones(2, 3)).sum().backward()
    return model


# --------------------------------------------------------------------------------------------------
# the thread
# --------------------------------------------------------------------------------------------------


class Notebook:
    """A sink that writes down what it gets, and opens when it is told."""

    name, place = "notebook", "the drawer"

    def __init__(self, bad=(), opens=True):
        self.bad = bad
        self.may_open = threading.Event()
        if opens:
            self.may_open.set()
        self.rows, self.exit_code = [], None

    def open(self):
        self.may_open.wait()
        if "open" in self.bad:
            raise RuntimeError("no\nink")

    def write(self, numbers, iteration):
        if iteration in self.bad:
            raise ValueError("blot")
        self.rows.append((iteration, numbers))

    def close(self, exit_code):
        if "close" in self.bad:
            raise RuntimeError("stuck")
        self.exit_code = exit_code


def test_what_is_logged_before_a_logger_is_ready_arrives_in_order(messages):
    sink = Notebook(opens=False)
    with Loggers([Logger(sink)], None, {}) as log:
        numbers = {"loss": 0.0}
        for i in range(1000):
            numbers["loss"] = float(i)  # a row is what it was when it was logged
            log.log(numbers, i)
        assert sink.rows == []
        sink.may_open.set()
    assert sink.rows == [(i, {"loss": float(i)}) for i in range(1000)]
    assert sink.exit_code == 0
    assert messages() == []


def test_a_logger_that_cannot_start_is_a_warning(messages):
    log = Loggers([Logger(Notebook(bad=["open"])), Logger(good := Notebook())], None, {})
    for i in range(5):
        log.log({"loss": 1.0}, i)
    log.close()
    log.log({"loss": 1.0}, 5)
    assert messages() == ["notebook: no ink; the run goes on without it"]
    assert len(good.rows) == 5


def test_a_row_that_cannot_be_written_is_a_warning_once_and_the_others_arrive(messages):
    sink = Notebook(bad=[1, 2])
    with Loggers([Logger(sink)], None, {}) as log:
        for i in range(5):
            log.log({}, i)
    assert [iteration for iteration, _ in sink.rows] == [0, 3, 4]
    assert messages() == ["notebook: blot; not all numbers are logged"]
    assert sink.exit_code == 0


def test_a_logger_that_cannot_finish_is_a_warning(messages):
    Loggers([Logger(Notebook(bad=["close"]))], None, {}).close()
    assert messages() == ["notebook: stuck; the run goes on without it"]


def test_a_logger_that_hangs_does_not_hold_up_the_end(messages, monkeypatch):
    monkeypatch.setattr(loggers, "CLOSE_TIMEOUT", 0.2)
    sink = Notebook(opens=False)
    log = Loggers([Logger(sink)], None, {})
    log.log({"loss": 1.0}, 1)
    start = time.monotonic()
    log.close()
    assert time.monotonic() - start < 2
    assert messages() == ["notebook: not finished after 0 s; what it holds is in the drawer"]
    sink.may_open.set()


def test_the_exit_code_says_how_a_run_ended():
    def ends_with(error):
        sink = Notebook()
        with pytest.raises(type(error)), Loggers([Logger(sink)], None, {}):
            raise error
        return sink.exit_code

    assert ends_with(ValueError()) == 1
    assert ends_with(KeyboardInterrupt()) == 255


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_reader_processes_are_forked_when_no_logger_imports():
    importing, done = threading.Event(), []

    def imports():
        with loggers._importing:
            importing.set()
            time.sleep(0.3)
            done.append(True)

    thread = threading.Thread(target=imports)
    thread.start()
    importing.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if done and loggers._importing.acquire(blocking=False) else 1)
    assert os.waitpid(child, 0)[1] == 0
    thread.join()


# --------------------------------------------------------------------------------------------------
# Weights & Biases
# --------------------------------------------------------------------------------------------------


def test_without_login_the_obstacle_is_named():
    known = SimpleNamespace(base_url="https://api.wandb.ai", api_key=None)
    assert "no login for api.wandb.ai" in wandb_obstacle(known)


@pytest.mark.parametrize("machine", ["127.0.0.1", "127.0.0.1:9"])
def test_login_in_netrc_is_found_and_a_silent_server_is_named_at_once(no_login, machine):
    known = SimpleNamespace(base_url="http://127.0.0.1:9", api_key=None)
    (no_login / "netrc").write_text(f"machine {machine} login user password 0123\n")
    (no_login / "netrc").chmod(0o600)
    start = time.monotonic()
    assert "127.0.0.1:9 does not answer" in wandb_obstacle(known)
    assert time.monotonic() - start < loggers.REACH_TIMEOUT + 1


def test_a_server_that_takes_calls_and_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(loggers, "REACH_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        start = time.monotonic()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert "timed out" in wandb_obstacle(SimpleNamespace(base_url=url, api_key=KEY))
        assert time.monotonic() - start < 2


@pytest.mark.parametrize("url", ["nonsense", "http://127.0.0.1:9:9", "file:///nowhere"])
def test_a_server_that_cannot_be_one_does_not_answer(url):
    assert "does not answer" in wandb_obstacle(SimpleNamespace(base_url=url, api_key=KEY))


def test_disabled_or_absent_or_another_rank_starts_nothing(tmp_path, monkeypatch):
    threads = threading.active_count()
    for config in (settings(), settings("disabled")):
        with start_loggers(config, tmp_path, {}) as log:
            log.log({"loss": 1.0}, 1)
            assert log.loggers == []
    monkeypatch.setattr(loggers.idist, "get_rank", lambda: 1)
    resumed = {"wandb_id": "abcd1234"}
    with start_loggers(settings("offline", tensorboard=True), tmp_path, {}, resumed) as log:
        assert log.loggers == []
    assert threading.active_count() == threads
    assert list(tmp_path.iterdir()) == []


def test_the_environment_may_keep_a_run_offline(monkeypatch):
    assert wandb_mode(WandbInitConfig(mode="online")) == "online"
    for mode in ("offline", "disabled"):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert wandb_mode(WandbInitConfig(mode="online")) == mode
        assert wandb_mode(WandbInitConfig(mode="offline")) == "offline"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert wandb_mode(WandbInitConfig(mode="offline")) == "offline"


def read_wandb(folder):
    """Return what the file of a W&B run holds: history {step: {name: value}}, config, summary, exit code, records.

    The file is a log of LevelDB: blocks of 32 KiB with pieces of records, each behind its checksum (4 bytes), length
    (2) and kind (1: whole, 2: first, 3: middle, 4: last).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = Path(folder).glob("*.wandb")
    data, place, piece, records = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if place % 32768 > 32768 - 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if kind == 0:
            break
        piece += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(piece))
            piece = b""
    run = next(record.run for record in records if record.HasField("run"))
    rows = [items(record.history.item) for record in records if record.HasField("history")]
    exits = [record.exit.exit_code for record in records if record.HasField("exit")]
    return SimpleNamespace(
        history={row.pop("_step"): row for row in rows},
        config=items(run.config.update),
        run=run,
        exit_code=exits[0] if exits else None,
        kinds={record.WhichOneof("record_type") for record in records},
        summary=items(item for record in records if record.HasField("summary") for item in record.summary.update),
    )


def items(found):
    named = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in found}
    return {name: value for name, value in named.items() if name == "_step" or not name.startswith("_")}


class Refusing(BaseHTTPRequestHandler):
    """A server that answers, and lets nobody in."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        self.send_response(401)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def refusing_server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.filterwarnings("default")  # wandb starts threads and files of its own
@pytest.mark.parametrize("trouble", ["no login", "no network", "bad key", "refused"])
def test_online_goes_on_offline_without_losing_anything(
    trouble, wandb, model, tmp_path, messages, monkeypatch, request
):
    if trouble != "no login":
        monkeypatch.setenv("WANDB_API_KEY", "short" if trouble == "bad key" else KEY)
        url = "http://127.0.0.1:9" if trouble == "no network" else request.getfixturevalue("refusing_server")
        monkeypatch.setenv("WANDB_BASE_URL", url)
    watch = WatchModelConfig(log="all", log_freq=2, log_graph=True)
    config = settings("online", watch=watch, notes="of a test", tags=["a", "b"], group="tests")
    start = time.monotonic()
    log = start_loggers(config, tmp_path / "run", SETTINGS)
    for i in range(1, 6):
        log.log({"epoch": 1, "train/loss": 1 / i}, i)
        log.log({"val/loss": 2 / i}, i)
        log.watch(model, i)
    assert time.monotonic() - start < 0.2  # about what the four histograms take
    log.close()

    reason = {
        "no login": "no login for",
        "no network": "does not answer",
        "bad key": "API key must have",
        "refused": "401",
    }[trouble]
    (warning,) = messages(logging.WARNING)
    assert reason in warning
    assert warning.endswith("the run is logged offline")
    (folder,) = (tmp_path / "run/wandb").glob("offline-run-*")
    assert f"wandb: offline run in {folder}; `wandb sync` with this folder uploads it" in messages()
    wandb.teardown()  # as at the end of a process
    found = read_wandb(folder)
    assert folder.name.endswith(log.state_dict()["wandb_id"])
    assert sorted(found.history) == [1, 2, 3, 4, 5]
    assert [found.history[i]["train/loss"] for i in range(1, 6)] == [1 / i for i in range(1, 6)]
    assert [found.history[i]["val/loss"] for i in range(1, 6)] == [2 / i for i in range(1, 6)]
    watched = {f"{kind}/{name}/bins" for kind in ("parameters", "gradients") for name, _ in model.named_parameters()}
    assert watched < set(found.history[2])
    assert not watched & set(found.history[3])
    assert sum(found.history[4]["parameters/0.weight/values"]) == 12
    assert found.config == {"seed": 1, "data": {"fidelity_weights": {"0": 2.0}}, "path": "a.h5"}
    assert (found.run.display_name, found.run.project, found.run.run_group) == ("water", "molecules", "tests")
    assert (found.run.notes, list(found.run.tags)) == ("of a test", ["a", "b"])
    assert found.summary["val/loss"] == 2 / 5
    assert (folder / "files" / found.summary["graph_0"]["path"]).exists()
    assert found.exit_code == 0
    assert {"environment", "stats"} <= found.kinds


@pytest.mark.filterwarnings("default")  # wandb starts threads and files of its own
def test_a_continued_run_is_the_same_run(wandb, tmp_path, messages):
    with start_loggers(settings("offline"), tmp_path, SETTINGS) as log:
        for i in (10, 20):
            log.log({"val/loss": np.float64(i)}, i)
            log.log({"lr/all": 0.1, "name": "text"}, i)
            if i == 10:
                torch.save(log.state_dict(), tmp_path / "state.pt")
    (first,) = (tmp_path / "wandb").glob("offline-run-*")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state == {"wandb_id": first.name[-8:], "iteration": 10, "numbers": {"val/loss": 10.0, "lr/all": 0.1}}
    time.sleep(1)  # names of folders have seconds
    with start_loggers(settings("offline"), tmp_path, SETTINGS, state) as log:
        log.log({"val/loss": 20.0}, 20)
        assert log.state_dict()["wandb_id"] == state["wandb_id"]
    wandb.teardown()
    (second,) = set((tmp_path / "wandb").glob("offline-run-*")) - {first}
    assert second.name[-8:] == state["wandb_id"]
    # What was logged last is logged again: a killed run may not have written it.
    assert read_wandb(second).history == {10: {"val/loss": 10.0, "lr/all": 0.1}, 20: {"val/loss": 20.0}}
    assert messages(logging.WARNING) == []


def test_an_id_is_kept_while_wandb_is_off(tmp_path):
    with start_loggers(settings("disabled"), tmp_path, {}, {"wandb_id": "abcd1234"}) as log:
        assert log.state_dict()["wandb_id"] == "abcd1234"


@pytest.mark.filterwarnings("default")  # wandb starts threads and files of its own
def test_wandb_that_raises_is_a_warning(wandb, tmp_path, messages, monkeypatch):
    def init(mode, **_):
        raise RuntimeError(f"broken {mode}")

    monkeypatch.setattr(wandb, "init", init)
    with start_loggers(settings("online"), tmp_path, SETTINGS) as log:
        log.log({"loss": 1.0}, 1)
    assert messages(logging.WARNING)[1:] == ["wandb: broken offline; the run goes on without it"]


PROGRAM = """
import logging, os, signal, sys, time
from pathlib import Path
from tests.train.test_loggers import settings
from aimnet2mult.train.loggers import start_loggers

logging.basicConfig(level=logging.INFO)
log = start_loggers(settings("online"), Path(sys.argv[1]), {})
for i in range(1, 7):
    log.log({"loss": 1 / i}, i)
while not any(b"loss" in path.read_bytes() for path in Path(sys.argv[1]).glob("wandb/offline-run-*/*.wandb")):
    time.sleep(0.1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_on_a_terminal_without_login(wandb, tmp_path):
    controller, terminal = pty.openpty()
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=subprocess.PIPE, text=True)
    _, errors = process.communicate(timeout=100)  # a question would wait for ever
    os.close(terminal)
    os.close(controller)
    assert "no login for" in errors
    assert process.returncode == -signal.SIGKILL
    killed = read_wandb(next((tmp_path / "wandb").glob("offline-run-*")))
    # Step 6 is kept back until the next one, see Loggers.state_dict.
    assert killed.history == {i: {"loss": 1 / i} for i in range(1, 6)}
    assert killed.exit_code is None


# --------------------------------------------------------------------------------------------------
# TensorBoard
# --------------------------------------------------------------------------------------------------


def read_tensorboard(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return events


def test_tensorboard_holds_curves_histograms_and_settings(model, tmp_path):
    pytest.importorskip("tensorboard")
    with start_loggers(settings(tensorboard=True), tmp_path, SETTINGS) as log:
        for i in (10, 20, 30):
            log.log({"val/loss": 1 / i, "epoch": i, "name": "text", "weights": np.arange(4.0)}, i)
    events = read_tensorboard(tmp_path / "tensorboard")
    assert {e.step: e.value for e in events.Scalars("val/loss")} == pytest.approx({i: 1 / i for i in (10, 20, 30)})
    assert set(events.Tags()["scalars"]) == {"val/loss", "epoch"}
    histogram = events.Histograms("weights")[0].histogram_value
    assert (histogram.min, histogram.max, histogram.num, histogram.sum, histogram.sum_squares) == (0, 3, 4, 6, 14)
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"fidelity_weights": {\n   "0": 2.0' in text


def test_what_a_continued_run_logs_again_replaces_what_was_there(tmp_path):
    pytest.importorskip("tensorboard")
    with start_loggers(settings(tensorboard=True), tmp_path, SETTINGS) as log:
        for i in range(1, 8):
            log.log({"loss": float(i)}, i)
            if i == 4:
                state = log.state_dict()
    time.sleep(1)  # files are read in the order of their names, which hold seconds
    with start_loggers(settings(tensorboard=True), tmp_path, SETTINGS, state) as log:
        for i in range(5, 10):
            log.log({"loss": -float(i)}, i)
    found = [(e.step, e.value) for e in read_tensorboard(tmp_path / "tensorboard").Scalars("loss")]
    assert found == [(i, i) for i in range(1, 5)] + [(i, -i) for i in range(5, 10)]


def test_tensorboard_shows_numbers_while_the_run_goes_on(tmp_path):
    pytest.importorskip("tensorboard")
    config = settings(tensorboard=True)
    config.tensorboard.dir = tmp_path / "curves"
    with start_loggers(config, tmp_path, {}) as log:
        log.log({"loss": 0.5}, 1)
        for _ in range(100):
            time.sleep(0.1)
            if (tmp_path / "curves").exists() and "loss" in read_tensorboard(tmp_path / "curves").Tags()["scalars"]:
                break
        assert read_tensorboard(tmp_path / "curves").Scalars("loss")[0].value == 0.5


# --------------------------------------------------------------------------------------------------
# the model, the settings
# --------------------------------------------------------------------------------------------------


def test_watched_values_are_copies_of_what_is_finite(model):
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
        model[1].bias.fill_(torch.inf)
    model[0].bias.grad = None
    found = watched_values(model, "all")
    names = ["0.weight", "0.bias", "1.weight"]
    assert sorted(found) == sorted(
        [*(f"parameters/{n}" for n in names), "gradients/1.bias"] + [f"gradients/{n}" for n in ("0.weight", "1.weight")]
    )
    assert found["parameters/0.weight"].size == 11
    gradient = model[1].weight.grad.flatten().tolist()
    model[1].weight.grad.zero_()
    assert found["gradients/1.weight"].tolist() == gradient
    assert {name.split("/")[0] for name in watched_values(model, "gradients")} == {"gradients"}
    assert {name.split("/")[0] for name in watched_values(model, "parameters")} == {"parameters"}


def test_the_tree_of_modules_has_their_weights(model):
    assert module_tree(model) == [
        ("", "Sequential", {}),
        ("0", "Linear", {"weight": [4, 3], "bias": [4]}),
        ("1", "Linear", {"weight": [1, 4], "bias": [1]}),
    ]


def test_wrong_settings_are_named(tmp_path):
    assert check_loggers(settings("online", tensorboard=True, watch=WatchModelConfig())) == []
    (tmp_path / "file").touch()
    config = settings("onlin", True, WatchModelConfig(log="some", log_freq=0), dir=tmp_path / "file/folder")
    config.tensorboard.dir = tmp_path / "file"
    wrong = check_loggers(config)
    assert wrong[0] == "wandb.init.mode: 'onlin' is not a mode; did you mean online or offline?"
    assert wrong[1].startswith("wandb.init.dir: ")
    assert wrong[2] == "wandb.watch_model.log: expected gradients, parameters or all, found 'some'"
    assert wrong[3] == "wandb.watch_model.log_freq: expected 1 or more iterations, found 0"
    assert wrong[4].startswith("tensorboard.dir: ")
    assert not (tmp_path / "file/folder").exists()


def test_packages_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    wrong = check_loggers(settings("online", tensorboard=True))
    assert 'pip install "aimnet2mult[train]"' in wrong[0]
    assert 'pip install "aimnet2mult[tensorboard]"' in wrong[1]
    assert check_loggers(settings("disabled")) == []
