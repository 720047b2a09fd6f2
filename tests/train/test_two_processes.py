"""Two processes train as one does, and go on after they were killed as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parents[1] / "fixtures"
STEPS = 50
SAME = 1e-10  # relative, in float64: round-off of sums in another order


@pytest.fixture(scope="module")
def arguments(tiny_fidelities):
    """Arguments of a run whose fidelities are unlike: few molecules with all labels, more with energies alone."""
    settings = ["--model", str(FIXTURES / "ref_single_model.yaml"), "run_name=r", "device=cpu", "report=false"]
    settings += ["trainer.precision=float64", "optimizer.kwargs.lr=5e-3", "log_frequency.train=1", "trainer.epochs=5"]
    settings += ["data.samplers.train.kwargs.batch_size=96", "checkpoint.every_iterations=7"]
    return [*settings, *tiny_fidelities(dft=0, gfn1=2)]


def start(*arguments):
    """Start the command line in a session of its own."""
    command = [sys.executable, "-m", "aimnet2mult.train.cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process):
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output


def history(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def two(arguments, tmp_path_factory):
    """A run of two processes."""
    folder = tmp_path_factory.mktemp("two") / "run"
    finish(start(*arguments, f"checkpoint.dirname={folder}", *BATCHES[2], "--processes", 2))
    return folder


BATCHES = {
    1: ["data.samplers.train.kwargs.batches_per_epoch=20", "trainer.accumulate=2"],
    2: ["data.samplers.train.kwargs.batches_per_epoch=10"],
}
"""Settings that make the same steps of one process and of two."""


def test_two_processes_take_the_steps_of_one(arguments, two, tmp_path):
    finish(start(*arguments, f"checkpoint.dirname={tmp_path / 'run'}", *BATCHES[1]))
    alone, together = history(tmp_path / "run"), history(two)
    assert [list(record) for record in together] == [list(record) for record in alone]
    assert together[-1]["iteration"] == STEPS
    for one, other in zip(alone, together, strict=True):
        assert other == pytest.approx(one, rel=SAME)


def descendants(pid):
    """Processes that a process started, and those that these started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children] + [d for child in children for d in descendants(int(child))]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_two_processes_that_were_killed_go_on(arguments, two, tmp_path):
    folder = tmp_path / "run"
    process = start(*arguments, f"checkpoint.dirname={folder}", *BATCHES[2], "--processes", 2)
    late = time.monotonic() + 120
    while not (folder / "r_last_iter_000000021.pt").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < late
        time.sleep(0.01)
    for pid in (*descendants(process.pid), process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    finish(start("--resume", folder, "--processes", 2))
    assert (folder / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()
