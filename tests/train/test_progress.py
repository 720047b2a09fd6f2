"""What a user sees of a run that goes on, and where its time went."""

import fcntl
import logging
import os
import pty
import re
import struct
import sys
import termios
import time

import pytest
import torch

from aimnet2mult.train import progress
from aimnet2mult.train.progress import Means, Progress, StepTimer, describe, duration, on_terminal, peak_memory
from aimnet2mult.train.utils import setup_logging

CPU = torch.device("cpu")

NUMBERS = {
    "train/loss": 0.01234,
    "train/energy_loss": 0.01,
    "train/forces_loss": 0.0234567,
    "train/grad_norm": 1.2,
    "lr/all": 1.9e-3,
    "time/step": 1 / 12.3,
    "time/steps_per_s": 12.3,
    "time/molecules_per_s": 812.4,
    "time/atoms_per_s": 9000.0,
    "time/data_share": 0.021,
    "memory/peak_GiB": 1.0,
}

LINE = (
    "epoch 3/16, iteration 1200/9600, loss 0.01234 (energy 0.01, forces 0.02346), gradient norm 1.2, "
    "learning rate 0.0019, 12.3 steps/s, 812 molecules/s, waiting for data 2 %, ETA 1 h 12 min"
)


class Clock:
    """A time that passes when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "perf_counter", clock)
    return clock


@pytest.fixture
def package_log():
    """The package's log as the command line sets it up, and as it was before."""
    package = logging.getLogger("aimnet2mult")
    before, level = list(package.handlers), package.level
    setup_logging()
    yield package
    package.handlers[:] = before
    package.setLevel(level)


def batch(*sizes):
    """Return a batch of molecules of so many atoms, padded, as a loader gives it."""
    numbers = torch.zeros(len(sizes), max(sizes), dtype=torch.int64)
    for i, size in enumerate(sizes):
        numbers[i, :size] = 6
    return {"numbers": numbers}, {}


# --------------------------------------------------------------------------------------------------
# time
# --------------------------------------------------------------------------------------------------


def test_times_add_up(clock):
    timer = StepTimer(CPU, processes=2)
    for _ in range(4):
        with timer.waiting():
            clock.sleep(0.5)
        clock.sleep(1.5)
        timer.step([batch(3, 5), batch(2)])
    with timer.pause():
        clock.sleep(100)
    numbers = timer.numbers()
    memory = numbers.pop("memory/peak_GiB")
    assert 0.05 < memory < 50
    assert numbers == {
        "time/step": 2.0,
        "time/data_share": 0.25,
        "time/steps_per_s": 0.5,
        "time/molecules_per_s": 3.0,
        "time/atoms_per_s": 10.0,
    }


def test_a_report_begins_where_the_last_one_ended(clock):
    timer = StepTimer(CPU)
    clock.sleep(1)
    timer.step([batch(1)])
    assert timer.numbers()["time/step"] == 1
    assert set(timer.numbers()) == {"memory/peak_GiB"}  # no step since then
    with timer.pause():
        clock.sleep(7)
    clock.sleep(3)
    timer.step([batch(1)])
    assert timer.numbers()["time/step"] == 3


def test_time_counts_when_the_data_end_or_fail(clock):
    def fails(error):
        clock.sleep(1)
        raise error

    timer = StepTimer(CPU)
    with pytest.raises(StopIteration), timer.waiting():
        fails(StopIteration)
    with pytest.raises(ValueError, match="broken"), timer.pause():
        fails(ValueError("broken"))
    clock.sleep(1)
    timer.step([batch(1)])
    assert timer.numbers()["time/data_share"] == 0.5


def test_peak_memory_grows_and_stays():
    before = peak_memory(CPU)["memory/peak_GiB"]
    block = torch.ones(2**25)  # 0.125 GiB
    after = peak_memory(CPU)["memory/peak_GiB"]
    del block
    assert after >= max(0.125, before)
    assert peak_memory(CPU)["memory/peak_GiB"] >= after


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_of_a_gpu():
    device = torch.device("cuda")
    block = torch.ones(2**28, device=device)
    assert peak_memory(device)["memory/gpu_peak_GiB"] >= block.nbytes / 2**30


# --------------------------------------------------------------------------------------------------
# means
# --------------------------------------------------------------------------------------------------


def test_means_since_the_last_reading():
    means = Means()
    assert means.read() == {}
    for loss in (1.0, 2.0, 6.0):
        means.add({"loss": torch.tensor(loss, requires_grad=True)})
    means.add({"forces": torch.tensor(1.0)})  # a component may come later
    assert means.read() == {"loss": 3.0, "forces": 1.0}
    means.add({"loss": torch.tensor(0.1, dtype=torch.float64)})
    assert means.read() == {"loss": 0.1}


def test_means_go_on_from_their_state_to_the_last_bit(tmp_path):
    losses = torch.rand(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, first, second = Means(), Means(), Means()
    for i, loss in enumerate(losses):
        whole.add({"loss": loss})
        (first if i < 3 else second).add({"loss": loss})
        if i == 2:
            torch.save(first.state_dict(), tmp_path / "state.pt")
            first.add({"loss": loss})  # the state is what it was
            second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), CPU)
    assert second.read() == whole.read()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_means_do_not_wait_for_the_gpu():
    means = Means()
    value = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            means.add({"loss": value, "forces": value})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert means.read() == {"loss": 1.0, "forces": 1.0}


# --------------------------------------------------------------------------------------------------
# words
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (90, "2 min"),
        (3569, "59 min"),
        (3575, "1 h 0 min"),
        (4320, "1 h 12 min"),
        (86370, "1 d 0 h"),
        (86400 * 3.2, "3 d 5 h"),
        (86400 * 2 - 60, "2 d 0 h"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_only_what_is_known_is_said():
    assert describe({}) == []
    assert describe({"train/loss": 1.0}) == ["loss 1"]
    assert describe({"train/loss": float("nan")}, skipped=1) == ["loss nan", "1 step skipped"]
    assert describe({}, skipped=3) == ["3 steps skipped"]
    assert describe({"val/loss": 1.0, "epoch": 3}) == []


def test_learning_rates_that_differ_are_named():
    assert describe({"lr/all": 1e-3, "lr/heads": 1e-3}) == ["learning rate 0.001"]
    assert describe({"lr/all": 1e-3, "lr/heads": 1e-4}) == ["learning rates all 0.001 heads 0.0001"]


# --------------------------------------------------------------------------------------------------
# lines and bar
# --------------------------------------------------------------------------------------------------


def test_lines_where_there_is_no_terminal(clock, caplog, capsys):
    caplog.set_level(logging.INFO, logger="aimnet2mult")
    with Progress(9600, 16, terminal=False) as shown:
        shown.start()
        for i in range(1, 1201):
            clock.sleep(4320 / 8400)  # what is left takes 1 h 12 min
            shown.step(3, i)
        with shown.doing("validation"):
            pass
        shown.report(3, 1200, NUMBERS)
    assert caplog.messages == [LINE]
    assert capsys.readouterr().err == ""


def test_the_time_left_counts_from_the_start_of_a_continued_run(clock):
    shown = Progress(100, 1, terminal=False)
    shown.start(50)
    assert shown.seconds_left(50) is None
    clock.sleep(10)
    assert shown.seconds_left(60) == 40
    assert shown.seconds_left(120) == 0  # epochs may be longer than expected


def test_nothing_on_other_ranks(caplog, capsys):
    caplog.set_level(logging.DEBUG, logger="aimnet2mult")
    with Progress(10, 1, enabled=False, terminal=True) as shown:
        shown.start()
        shown.step(1, 1)
        with shown.doing("validation"):
            shown.report(1, 1, NUMBERS)
    assert caplog.messages == []
    assert capsys.readouterr().err == ""


def test_bar_on_a_terminal_and_lines_in_the_file(package_log, capsys, tmp_path):
    file = logging.FileHandler(tmp_path / "train.log")
    package_log.addHandler(file)
    with Progress(9600, 16, terminal=True) as console:
        console.start(1100)
        console.step(3, 1200)
        console.report(3, 1200, NUMBERS)
        package_log.warning("something else")
        with console.doing("validation"):
            pass
        during = capsys.readouterr().err
    package_log.info("after it")
    console.close()  # a second time
    file.close()
    shown = r"epoch 3/16:  12%\|.*\| 1200/9600, ETA [\d:]+, loss 0.01234, learning rate 0.0019, 12.3 steps/s"
    assert re.search(shown, during), during
    assert "validation:  12%" in during
    assert "something else" in during
    assert "iteration 1200" not in during
    assert "after it" in capsys.readouterr().err
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert lines[0].startswith(LINE.partition("ETA")[0])
    assert lines[1:] == ["something else", "after it"]
    assert all(not handler.filters or len(handler.filters) == 1 for handler in package_log.handlers)


@pytest.mark.parametrize(("rows", "columns", "expected"), [(40, 120, True), (0, 0, False), (0, 120, False)])
def test_a_terminal_has_room_for_a_bar(rows, columns, expected, monkeypatch):
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    with open(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert on_terminal() == expected
    os.close(controller)


def test_a_file_is_no_terminal(monkeypatch, tmp_path):
    with open(tmp_path / "errors", "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert not on_terminal()


def test_a_bar_may_run_over(capsys):
    with Progress(10, 2, terminal=True) as shown:
        shown.start()
        for i in range(1, 14):
            shown.step(2, i)
        shown.report(2, 13, {})
    assert "epoch 2/2: 100%|██████████| 13/13, ETA 00:00" in capsys.readouterr().err


def test_a_step_is_cheap(capsys):
    shown = Progress(10**6, 1, terminal=True)
    shown.start()
    timer, means, loss = StepTimer(CPU), Means(), {"loss": torch.tensor(1.0), "forces": torch.tensor(1.0)}
    start = time.perf_counter()
    for i in range(1, 1001):
        with timer.waiting():
            pass
        timer.step([batch(5, 5)])
        means.add(loss)
        shown.step(1, i)
    spent = (time.perf_counter() - start) / 1000
    shown.close()
    assert spent < 1e-3
