"""Joining, agreeing and failing of real processes (Gloo), under the package's own launcher and under torchrun."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import click
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import aimnet2mult
from aimnet2mult.config.builder import ConfigError
from aimnet2mult.train import launch, processes
from aimnet2mult.train.failures import EXIT_LOST_CONTACT, Failure, describe, process_name, rank_errors
from aimnet2mult.train.launch import check_gpus, relaunch, wanted_processes
from aimnet2mult.train.processes import any_rank, gather_objects, process_group
from aimnet2mult.train.stop import ONE_REQUEST, StopRequest, ignore_requests

ROOT = Path(aimnet2mult.__file__).parents[1]

LIMIT = 60.0
"""How long a run of processes may take on a busy machine, seconds; an operation that waits for the lost takes more."""


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)


# --------------------------------------------------------------------------------------------------
# real processes
# --------------------------------------------------------------------------------------------------

PROGRAM = """
import os, signal, sys, time, warnings
import torch, torch.distributed as dist
import ignite.distributed as idist
from aimnet2mult.train import failures
from aimnet2mult.train.failures import rank, rank_errors
from aimnet2mult.train.processes import *
from aimnet2mult.train.stop import StopRequest

torch.set_num_threads(1)

def say(*words):
    sys.stdout.write(" ".join(map(str, (rank(), *words))) + "\\n")
    sys.stdout.flush()

with rank_errors():
    BEFORE
    with process_group("cpu"):
        total = torch.ones(1)
        dist.all_reduce(total)
        INSIDE
        for step in range(3):
            dist.all_reduce(total)
    say("end")
"""


def program(inside="", before=""):
    """Return the program above with these lines in their places."""
    text = PROGRAM
    for place, lines in (("BEFORE", before), ("INSIDE", inside)):
        text = re.sub(
            rf"^( *){place}$", lambda m, lines=lines: "\n".join(m[1] + x for x in lines.split("\n")), text, flags=re.M
        )
    return text


def run(text, r, folder, variables):
    """Be one of several processes."""
    os.environ.update(variables, RANK=str(r), LOCAL_RANK=str(r))
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    exec(text, {})


class Pair:
    """Two processes that run a program, with everything imported already, and the store of their launcher."""

    def __init__(self, folder, text, launcher=True, **variables):
        self.folder = folder
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        known = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        known |= {"MASTER_PORT": str(self.store.port), **variables}
        if launcher:
            known["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        else:
            del self.store  # the first process keeps one
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.processes = [context.Process(target=run, args=(text, r, folder, known)) for r in (0, 1)]
        for process in self.processes:
            process.start()

    def wait_for(self, word):
        """Wait until both processes have said a word."""
        while not (self.folder / "out").exists() or (self.folder / "out").read_text().count(word) < 2:
            assert any(process.is_alive() for process in self.processes), self.result()
            time.sleep(0.02)

    def result(self):
        """Wait for the end; return exit statuses, what they said, and errors."""
        end = time.monotonic() + LIMIT
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
            assert process.exitcode is not None, (self.folder / "err").read_text()
        return *([process.exitcode for process in self.processes],), *(
            (self.folder / name).read_text() for name in ("out", "err")
        )


AGREE = """
say(*any_rank(rank() == 1, False, True))
say(gather_objects({"rank": rank()}))
say("local", idist.get_local_rank(), "slurm", os.environ["SLURM_JOB_ID"], torch.get_num_threads())

warnings.simplefilter("error")
class Heads(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = torch.nn.ModuleList(torch.nn.Linear(4, 1) for _ in range(4))
    def forward(self, x, which):
        return sum(self.heads[f](x).tanh().sum() for f in which)
torch.manual_seed(0)
model = Heads()
shared = distribute(model, torch.device("cpu"))
x = torch.arange(8.0).reshape(2, 4) / 8
shared(x, [0, 1, 2, 3]).backward()
shared.zero_grad()
shared(x + rank(), [0, 1 + rank()]).backward()
twice = [None if h.weight.grad is None else h.weight.grad.clone() for h in model.heads]
model.zero_grad()
(0.5 * (model(x, [0, 1]) + model(x + 1, [0, 2]))).backward()
for head, grad in zip(model.heads, twice):
    assert (grad is None) == (head.weight.grad is None)
    if grad is not None:
        torch.testing.assert_close(grad, head.weight.grad)
say("heads", [grad is None for grad in twice])

# The gradient of a (1, 6) weight may have the strides of a transposed one.
class Strides(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight.sum()
    @staticmethod
    def backward(ctx, grad):
        return grad * torch.ones(6, 1).t()
class OneRow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, 6))
    def forward(self):
        return Strides.apply(self.weight)
shared = distribute(OneRow(), torch.device("cpu"))
shared().backward()
""".strip()


def test_processes_agree_and_share_gradients(tmp_path):
    # As in a SLURM job on two machines: one task with number 0 on this one.
    slurm = dict(SLURM_JOB_ID="77", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NTASKS="2", SLURM_JOB_NUM_NODES="2")
    status, out, err = Pair(tmp_path, program(AGREE), SLURM_JOB_NODELIST="n[1-2]", **slurm).result()
    assert (status, err) == ([0, 0], "")
    for r in (0, 1):
        assert [line[2:] for line in out.splitlines() if line.startswith(f"{r} ")] == [
            "True False True",
            "[{'rank': 0}, {'rank': 1}]",
            f"local {r} slurm 77 1",
            "heads [False, False, False, True]",
            "end",
        ]


@pytest.mark.parametrize("launcher", [True, False])
def test_mistake_of_one_process_ends_all_with_its_message(tmp_path, launcher):
    # The other one hangs, in something that no exception reaches. Without a launcher the first one keeps the store.
    inside = 'if rank() == 0:\n    raise ValueError("b.h5: no energies")\ntime.sleep(1000)'
    status, out, err = Pair(tmp_path, program(inside, "failures.LAST_WORD = 1.0"), launcher).result()
    assert status[0] == 2
    assert status[1] in ((EXIT_LOST_CONTACT,) if launcher else (EXIT_LOST_CONTACT, -signal.SIGTERM))
    assert out == ""
    assert "Error: process 0 of 2: b.h5: no energies\n" in err
    if launcher:
        assert len(err.splitlines()) == 1


def test_mistake_that_all_find_is_told_once_without_a_process(tmp_path):
    # Messages may be long; machines may be busy.
    before = "failures.GRACE = 20.0\n" + 'raise FileNotFoundError(2, "No such file", "a.h5" * 10000)'
    status, _, err = Pair(tmp_path, program(before=before)).result()
    assert (status, err) == ([2, 2], f"Error: {'a.h5' * 10000}: No such file\n")


def test_process_that_lost_contact_leaves_the_word_to_the_one_that_failed(tmp_path):
    inside = 'if rank() == 0:\n    raise RuntimeError("Connection closed by peer")\ntime.sleep(0.5)\n{}["missing"]'
    status, _, err = Pair(tmp_path, program(inside, "failures.GRACE = 10.0")).result()
    assert status == [EXIT_LOST_CONTACT, 1]
    assert err.startswith("Traceback")
    assert err.endswith("\nKeyError: 'missing'\nError: process 1 of 2: KeyError: 'missing'\n")
    assert "Connection" not in err


def test_process_that_is_killed(tmp_path):
    status, _, err = Pair(tmp_path, program("if rank() == 1:\n    os.kill(os.getpid(), signal.SIGKILL)")).result()
    assert status == [EXIT_LOST_CONTACT, -signal.SIGKILL]
    lost = r"Error: process 0 of 2: lost contact with another process: .*(closed|reset) by peer.*\n"
    assert re.fullmatch(lost, err)


LOOP = """
with StopRequest() as stop:
    say("ready", os.getpid())
    end = time.time() + 40
    while time.time() < end and not any_rank(stop.requested is not None)[0]:
        time.sleep(0.02)
    stop.accept()
time.sleep(0.5)
say("stopped", stop.requested)
""".strip()


def stopped(out, name):
    """Whether both processes stopped in order, for this reason."""
    # One may hear of it from the other one before it gets the signal.
    told = [line for line in out.replace("another process", name).splitlines() if "ready" not in line]
    return sorted(told) == ["0 end", f"0 stopped {name}", "1 end", f"1 stopped {name}"]


def test_signal_to_one_process_stops_all(tmp_path):
    pair = Pair(tmp_path, program(LOOP))
    pair.wait_for("ready")
    os.kill(pair.processes[1].pid, signal.SIGUSR1)
    status, out, err = pair.result()
    assert (status, err) == ([0, 0], "")
    assert "0 stopped another process" in out
    assert "1 stopped SIGUSR1" in out


def test_processes_stop_in_order_when_their_launcher_is_gone(tmp_path):
    pair = Pair(tmp_path, program(LOOP, "failures.LAST_WORD = 1.0"))
    pair.wait_for("ready")
    del pair.store
    status, out, err = pair.result()
    assert status == [0, 0]
    assert stopped(out, "SIGTERM")
    assert "process 0 of 2: the program that started it is gone; it stops, too\n" in err


def start(tmp_path, text, *command):
    """Start a launcher of two processes."""
    (tmp_path / "program.py").write_text(text)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], env=environment, cwd=tmp_path, **pipes)


OWN = ["-c", "import sys; from aimnet2mult.train.launch import relaunch; sys.exit(relaunch(2, [], module='program'))"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "program"]


def ready(process):
    """Wait until both processes are in their loops; return their process ids."""
    return dict(map(int, process.stdout.readline().replace("ready", "").split()) for _ in range(2))


def test_signal_to_the_launcher_reaches_all(tmp_path):
    process = start(tmp_path, program(LOOP), *OWN)
    pids = ready(process)
    process.send_signal(signal.SIGUSR1)
    os.kill(pids[1], signal.SIGUSR1)  # SLURM signals all processes itself, too
    out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, err) == (0, "")
    assert stopped(out, "SIGUSR1")


def test_defect_in_a_step_under_torchrun(tmp_path):
    process = start(tmp_path, program('if rank() == 1:\n    {}["missing"]'), *TORCHRUN)
    _, err = process.communicate(timeout=LIMIT)
    ours, _, report = err.partition("torch.distributed.elastic.multiprocessing.errors.ChildFailedError")
    assert process.returncode != 0
    assert ours.count("\nKeyError: 'missing'\nError: process 1 of 2: KeyError: 'missing'\n") == 1
    assert "Error: process 0" not in ours
    assert report.rstrip(" \n=").endswith("traceback : process 1 of 2: KeyError: 'missing'")


@pytest.mark.slow
def test_torchrun_passes_sigterm_on(tmp_path):
    process = start(tmp_path, program(LOOP), *TORCHRUN)
    ready(process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert stopped(out, "SIGTERM")


# --------------------------------------------------------------------------------------------------
# the launcher
# --------------------------------------------------------------------------------------------------


def run_small(tmp_path, monkeypatch, text, count=3):
    """Run a program without torch in several processes; return the exit status."""
    (tmp_path / "small.py").write_text(f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{text}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return relaunch(count, ["--key", "a b"], module="small")


def test_launcher_sets_the_environment_of_torchrun(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS"]
    text = f"open(f'{tmp_path}/{{rank}}', 'w').write(' '.join([*(os.environ[n] for n in {names}), *sys.argv[1:]]))"
    assert run_small(tmp_path, monkeypatch, text) == 0
    for r in range(3):
        assert (tmp_path / f"{r}").read_text() == f"{r} {r} 3 3 127.0.0.1 2 --key a b"


def test_launcher_keeps_the_users_number_of_threads(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert run_small(tmp_path, monkeypatch, "sys.exit(int(os.environ['OMP_NUM_THREADS']))", count=1) == 5


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("sys.exit(2 if rank == 1 else 0)", 2),
        # a process that only lost contact is not the reason, even if it ends first
        (f"time.sleep(0.3 * (rank == 1)); sys.exit(2 if rank == 1 else {EXIT_LOST_CONTACT})", 2),
        (f"sys.exit({EXIT_LOST_CONTACT})", EXIT_LOST_CONTACT),
        ("os.kill(os.getpid(), signal.SIGTERM) if rank == 2 else None", 128 + signal.SIGTERM),
    ],
)
def test_exit_status_of_the_launcher(tmp_path, monkeypatch, text, status):
    assert run_small(tmp_path, monkeypatch, text) == status


def test_launcher_ends_processes_that_do_not_end_by_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "PATIENCE", 0.5)
    started = time.monotonic()
    assert run_small(tmp_path, monkeypatch, "sys.exit(2) if rank == 1 else time.sleep(1000)") == 2
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_launcher_passes_signals_on_as_they_are(tmp_path, monkeypatch, number):
    text = (
        f"def end(number, frame):\n    open(f'{tmp_path}/got{{rank}}', 'w').write(str(number))\n    sys.exit(0)\n"
        f"signal.signal({int(number)}, end)\nopen(f'{tmp_path}/ready{{rank}}', 'w')\ntime.sleep(30)\nsys.exit(9)"
    )

    def send():
        while len(list(tmp_path.glob("ready*"))) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    # Whoever runs the tests may ignore SIGHUP (nohup), and the launcher leaves ignored signals alone.
    before = signal.signal(number, signal.SIG_DFL)
    try:
        thread = threading.Thread(target=send)
        thread.start()
        assert run_small(tmp_path, monkeypatch, text) == 0
        thread.join()
        assert [int((tmp_path / f"got{r}").read_text()) for r in range(3)] == [number] * 3
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_launcher_ignores_what_nohup_ignores(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        thread = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGHUP))
        thread.start()
        assert run_small(tmp_path, monkeypatch, "time.sleep(0.8)") == 0
        thread.join()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("device", "count", "option", "wanted"),
    [
        ("auto", 0, None, 1),
        ("auto", 1, None, 1),
        ("auto", 4, None, 4),
        ("cuda", 4, None, 4),
        ("cuda", 4, 2, 2),
        ("cuda:1", 4, None, 1),
        ("cuda:1", 4, 1, 1),
        ("cpu", 4, None, 1),
        ("cpu", 4, 8, 8),
        ("auto", 0, 3, 3),
    ],
)
def test_wanted_processes(monkeypatch, device, count, option, wanted):
    gpus(monkeypatch, count)
    assert wanted_processes(device, option) == wanted


@pytest.mark.parametrize(
    ("device", "count", "message"),
    [
        ("cuda", 2, "device: 3 processes need a GPU each, and this machine has 2; give cpu"),
        ("auto", 1, "device: 3 processes need a GPU each, and this machine has 1"),
        ("cuda", 0, "device: 3 processes need a GPU each, and this machine has 0"),
        ("cuda:1", 4, "device: cuda:1 is one GPU for 3 processes; give cuda"),
    ],
)
def test_each_process_needs_a_gpu(monkeypatch, device, count, message):
    gpus(monkeypatch, count)
    for check in (check_gpus, wanted_processes):
        with pytest.raises(ConfigError, match=message):
            check(device, 3)


def test_processes_of_torchrun_do_not_start_others(monkeypatch):
    gpus(monkeypatch, 4)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert wanted_processes("auto", None) == 1
    with pytest.raises(ConfigError, match="use its --nproc-per-node"):
        wanted_processes("auto", 2)


# --------------------------------------------------------------------------------------------------
# alone
# --------------------------------------------------------------------------------------------------


def test_alone_everything_is_trivial():
    with rank_errors(), process_group("cpu") as local_rank:
        assert local_rank == 0
        assert any_rank(True, False) == (True, False)
        assert gather_objects("a") == ["a"]
        assert not dist.is_initialized()
        model = torch.nn.Linear(1, 1)
        assert processes.distribute(model, torch.device("cpu")) is model
    with pytest.raises(ValueError, match="as it was"), rank_errors():
        raise ValueError("as it was")


def test_half_an_environment(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    message = "WORLD_SIZE is 2 in the environment, but LOCAL_RANK is not set"
    with pytest.raises(ConfigError, match=message), process_group("cpu"):
        pass
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match=message), rank_errors():
        pass


# --------------------------------------------------------------------------------------------------
# what failures mean
# --------------------------------------------------------------------------------------------------

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:5559"


@pytest.mark.parametrize(
    ("error", "kind", "message", "status"),
    [
        (ValueError("wrong"), "user", "wrong", 2),
        (FileNotFoundError(2, "No such file", "a.h5"), "user", "a.h5: No such file", 2),
        (click.UsageError("no option"), "user", "no option", 2),
        (KeyError("x"), "defect", "KeyError: 'x'", 1),
        (RuntimeError("shapes"), "defect", "RuntimeError: shapes", 1),
        (RuntimeError(f"{GLOO}. This is typically caused"), "lost", f"lost contact with another process: {GLOO}.", 3),
        (dist.DistBackendError("NCCL\n error"), "lost", "lost contact with another process: NCCL error", 3),
        (KeyboardInterrupt(), "interrupt", "interrupted", 130),
        (SystemExit(5), "user", "ended with exit status 5", 5),
        (SystemExit("why"), "user", "ended with exit status why", 1),
    ],
)
def test_what_an_error_means(error, kind, message, status):
    assert describe(error) == Failure(kind, message, status)


def test_processes_have_the_name_of_their_machine_if_there_are_several(monkeypatch):
    for name, value in {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    assert process_name() == "process 3 of 8"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr("socket.gethostname", lambda: "node7")
    assert process_name() == "process 3 of 8 on node7"


# --------------------------------------------------------------------------------------------------
# requests to stop
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_stop_request(number):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with StopRequest() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == number.name
        stop._when -= 2 * ONE_REQUEST
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def test_second_interrupt_is_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same key press, from the terminal and from the launcher
        stop._when -= 2 * ONE_REQUEST
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_request_of_another_process():
    with StopRequest() as stop:
        stop.accept()
        assert stop.requested == "another process"
    os.kill(os.getpid(), signal.SIGTERM)  # comes late, and is the same
    stop._when -= 2 * ONE_REQUEST
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        stop.accept()
        assert stop.requested == "SIGTERM"
        stop._when -= 2 * ONE_REQUEST


def test_interrupt_after_another_signal_is_the_first():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        stop._when -= 2 * ONE_REQUEST
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGTERM"


def test_request_that_comes_again_after_the_end_is_one():
    got = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
    terminate = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert got == []
        stop._when -= 2 * ONE_REQUEST
        os.kill(os.getpid(), signal.SIGUSR1)
        assert got == [signal.SIGUSR1]
        os.kill(os.getpid(), signal.SIGUSR1)
        assert len(got) == 2
    finally:
        signal.signal(signal.SIGUSR1, before)
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), terminate, strict=True):
            signal.signal(number, handler)


def test_stop_request_in_another_thread_does_nothing():
    outcome = []

    def work():
        with StopRequest() as stop:
            outcome.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert outcome == [None]


def test_readers_outlive_requests():
    loader = DataLoader(range(8), batch_size=1, num_workers=1, prefetch_factor=1, worker_init_fn=ignore_requests)
    batches = iter(loader)
    got = [next(batches).item()]
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(batches._workers[0].pid, number)
    got += [batch.item() for batch in batches]
    assert got == list(range(8))
