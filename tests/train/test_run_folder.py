"""A run's folder: what is written survives a kill, a run goes on from it, and another run is refused."""

import json
import logging
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from logging.handlers import MemoryHandler

import pytest
import torch

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.train.run_folder import (
    Checkpoints,
    History,
    RunFolder,
    changed_data,
    find_resume,
)
from aimnet2mult.utils.files import atomic_path, write_text_atomic


@pytest.fixture(scope="module")
def processes():
    """Processes that begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def lines(path):
    return path.read_text().splitlines()


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def save(path, iteration):
    content = {"model": {"afv.weight": torch.ones(10, 3)}, "training": {"iteration": iteration}}
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


# --------------------------------------------------------------------------------------------------
# the folder
# --------------------------------------------------------------------------------------------------

OTHER_FILES = ["my_model.pt", "notes.txt", "report/notes.md", "sub/metrics.jsonl", "wandb/run.wandb"]


def begin(folder, **options):
    files = {name: lambda path: write_text_atomic(path, path.name) for name in ("train.yaml", "data.json", "split.npz")}
    return RunFolder(folder).begin(files, **options)


@pytest.fixture
def finished(tmp_path):
    """The folder of a run, with files that somebody else put there."""
    folder = tmp_path / "runs" / "first"
    with begin(folder, processes=3):
        History(folder).add({"iteration": 0})
        History(folder).add_timing({"iteration": 0})
        save(folder / "r_last_iter_000000020.pt", 20)
        save(folder / "other_epoch_0001_iter_0000010_loss_1.000000.pt", 10)
    for name in [*OTHER_FILES, "tensorboard/events.out.tfevents.1.host", "report/index.html", "report/parity.png"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    return folder


def sessions(folder):
    return json.loads((folder / "run.json").read_text())["sessions"]


def test_begin_writes_what_describes_the_run(finished):
    assert (finished / "train.yaml").read_text() == "train.yaml"
    (session,) = sessions(finished)
    assert session["processes"] == 3
    assert session["resumed_from"] is None
    assert session["process"] == os.getpid()


def test_folder_of_another_run_is_refused_with_what_to_do(finished):
    with pytest.raises(
        ConfigError, match=r"first holds another run \(run.json, metrics.jsonl\). Continue it with --resume"
    ):
        RunFolder(finished).check()
    with pytest.raises(ConfigError, match="holds another run"), begin(finished):
        pytest.fail("begun")
    with pytest.raises(ConfigError, match="exclude one another"):
        RunFolder(finished).check(overwrite=True, resume=finished)
    with pytest.raises(ConfigError, match="holds another run"):
        RunFolder(finished).check(resume=finished.parent)
    RunFolder(finished).check(overwrite=True)
    RunFolder(finished).check(resume=finished)
    RunFolder(finished.parent / "second").check(resume=finished)
    assert len(sessions(finished)) == 1


def test_overwrite_removes_what_a_run_left_and_nothing_else(finished):
    save(finished / "model.pt", 20)
    with begin(finished, overwrite=True):
        History(finished).add({"iteration": 0})
    own = ["data.json", "metrics.csv", "metrics.jsonl", "run.json", "split.npz", "train.log", "train.yaml"]
    everything = sorted(str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file())
    assert everything == sorted(own + OTHER_FILES)
    assert all((finished / name).read_text() == "mine" for name in OTHER_FILES)
    assert len(sessions(finished)) == 1


@pytest.mark.parametrize("name", ["train.yaml", "model.yaml", "model.pt", "r_last_iter_000000001.pt"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_somebody_else_are_not_replaced(tmp_path, name, overwrite):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"holds {name}, but no run that it belongs to"):
        RunFolder(tmp_path).check(overwrite=overwrite)
    with pytest.raises(ConfigError, match="but no run"), begin(tmp_path, overwrite=overwrite):
        pytest.fail("begun")
    assert (tmp_path / name).read_text() == "mine"


def test_resumed_run_continues_log_and_sessions(finished, monkeypatch):
    (finished / "train.log").write_text("first session\n")
    stale = finished / f".r_last_iter_000000030.{'0' * 8}-1-abcdef.pt"
    stale.touch()
    os.utime(stale, (0, 0))
    package = logging.getLogger("aimnet2mult.test")
    monkeypatch.setattr(package, "propagate", False)  # reports of tests cannot hold what is no text
    log = MemoryHandler(1000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
    package.addHandler(log)
    try:
        package.warning("before the folder")
        resume = find_resume(finished)
        RunFolder(finished).check(resume=resume.folder)
        with begin(finished, resume=resume, log=log):
            package.warning("a name \udcff that is no text")
            assert "before the folder" in (finished / "train.log").read_text()
        package.warning("after the end")
    finally:
        package.removeHandler(log)
    text = (finished / "train.log").read_text()
    assert text.startswith("first session\n")
    assert "a name \\udcff that is no text" in text
    assert "after the end" not in text
    assert [session["resumed_from"] for session in sessions(finished)] == [None, "r_last_iter_000000020.pt"]
    assert not stale.exists()


def test_run_resumed_in_another_folder_starts_its_own_records(finished, tmp_path):
    with begin(tmp_path / "second", resume=find_resume(finished)):
        pass
    assert [session["resumed_from"] for session in sessions(tmp_path / "second")] == [
        str(finished / "r_last_iter_000000020.pt")
    ]
    assert len(sessions(finished)) == 1


@pytest.mark.parametrize("content", [b"", b"{}", b'{"sessions": 1}', b"\xff", b"[" * 10000])
def test_record_of_the_run_that_was_damaged_is_begun_anew(finished, caplog, content):
    (finished / "run.json").write_bytes(content)
    with begin(finished, resume=find_resume(finished)):
        pass
    assert "run.json" in caplog.text
    assert "the record of earlier sessions is lost" in caplog.text
    assert len(sessions(finished)) == 1


def test_failure_inside_the_run_closes_the_log(finished):
    with pytest.raises(RuntimeError, match="stop"), begin(finished, overwrite=True):
        raise RuntimeError("stop")
    RunFolder(finished).check(overwrite=True)


def hold(folder, connection):
    """Be a run that goes on in a folder."""
    with RunFolder(folder).begin({}, resume=find_resume(folder)):
        connection.send("begun")
        time.sleep(300)


def test_two_runs_in_one_folder_are_refused_until_the_first_is_gone(processes, finished):
    ours, theirs = processes.Pipe()
    holder = processes.Process(target=hold, args=(finished, theirs))
    holder.start()
    try:
        assert ours.recv() == "begun"
        message = rf"first is in use: a run is going on in it \(process {holder.pid} on .* since 20"
        for options in ({"overwrite": True}, {"resume": finished}):
            with pytest.raises(ConfigError, match=message):
                RunFolder(finished).check(**options)
        with pytest.raises(ConfigError, match=message), begin(finished, overwrite=True):
            pytest.fail("begun")
        assert (finished / "r_last_iter_000000020.pt").exists()
    finally:
        holder.kill()
        holder.join()
    RunFolder(finished).check(overwrite=True)


def test_other_processes_write_nothing(tmp_path):
    with RunFolder(tmp_path / "run", writes=False).begin({"train.yaml": pytest.fail}):
        pass
    assert files(tmp_path) == []


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is not a folder"):
        RunFolder(tmp_path / "file" / "run").check()
    with pytest.raises(NotADirectoryError, match="file is not a folder"):
        RunFolder(tmp_path / "file").check()
    RunFolder(tmp_path / "a" / "b").check()
    assert files(tmp_path) == ["file"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder in which nobody may write")
def test_folder_in_which_nobody_may_write():
    with pytest.raises(PermissionError, match="cannot be written"):
        RunFolder("/proc/self/run").check()


# --------------------------------------------------------------------------------------------------
# the same data
# --------------------------------------------------------------------------------------------------


def print_of(name, sha, molecules=10):
    return {"path": name, "bytes": 1, "molecules": molecules, "sha256": sha}


def data(**fidelities):
    return {"fidelities": {name: {"fidelity": f, **files} for f, (name, files) in enumerate(fidelities.items())}}


STORED = data(
    dft={"files": [print_of("/old/a.h5", "a"), print_of("/old/b.h5", "b")], "val_files": None},
    cc={"files": [print_of("/old/c.h5", "c")], "val_files": [print_of("/old/v.h5", "v")]},
)


def dft(*files):
    return data(dft={"files": list(files), "val_files": None}, cc={**STORED["fidelities"]["cc"]})


@pytest.mark.parametrize(
    ("present", "messages"),
    [
        (STORED, []),
        (dft(print_of("/new/x.h5", "a"), {**print_of("/new/y.h5", "b"), "bytes": 7}), []),
        (
            dft(print_of("a.h5", "a"), print_of("b.h5", "X", 12)),
            [r"data.fidelities.dft.files: b.h5 is not what .* \(/old/b.h5\): 12 molecules instead of 10"],
        ),
        (dft(print_of("a.h5", "X"), print_of("b.h5", "b")), [r"dft.files: a.h5 .* other values, arrays or units"]),
        (dft(print_of("b.h5", "b"), print_of("a.h5", "a")), [r"dft.files: .* another order; in the run .* a.h5, b.h5"]),
        (dft(print_of("a.h5", "a")), [r"data.fidelities.dft.files: 1 files, in the run there were 2"]),
        (
            data(cc=STORED["fidelities"]["cc"], xtb=STORED["fidelities"]["dft"]),
            [r"dft is missing", r"xtb is new", r"cc is fidelity 0, in the run it was fidelity 1"],
        ),
        (
            data(dft=STORED["fidelities"]["dft"], cc={**STORED["fidelities"]["cc"], "val_files": None}),
            [r"cc.val_files: 0 files, in the run there were 1"],
        ),
    ],
)
def test_changed_data_are_named(present, messages):
    present = {"fidelities": {name: {**known} for name, known in present["fidelities"].items()}}
    for f, known in enumerate(present["fidelities"].values()):
        known["fidelity"] = f
    found = changed_data(STORED, present)
    assert len(found) == len(messages)
    for message, expected in zip(found, messages, strict=True):
        assert re.search(expected, message), message


# --------------------------------------------------------------------------------------------------
# runs that are killed
# --------------------------------------------------------------------------------------------------

STEPS = 13


def toy_run(folder, kill_at=None):
    """A run of `STEPS` steps that goes on from what it finds; with ``kill_at`` killed before that use of a file."""
    torch.set_num_threads(1)
    if kill_at is not None:
        kill_before(str(folder), kill_at)
    place = RunFolder(folder)
    history, checkpoints = History(folder), Checkpoints(folder, "r", n_saved=2, keep_last=2)
    resume = find_resume(folder) if any(folder.glob("r_*.pt")) else None
    weights, step = torch.arange(200_000, dtype=torch.float32).view(1000, 200), 0

    def write(path):
        state = {"step": step, "history": history.state(), "checkpoints": checkpoints.state_dict()}
        with atomic_path(path) as temporary:
            torch.save({"model": {"afv.weight": weights}, "training": state}, temporary)

    record = {"train.yaml": lambda path: write_text_atomic(path, "epochs: 1\n")}
    with place.begin(record, overwrite=resume is None and (folder / "run.json").exists(), resume=resume):
        if resume is not None:
            state = resume.content["training"]
            weights, step = resume.content["model"]["afv.weight"], state["step"]
            history.restore(state["history"])
            checkpoints.load_state_dict(state["checkpoints"])
        while step < STEPS:
            step += 1
            weights = torch.sin(weights + step)
            loss = weights.abs().mean().item()
            history.add({"iteration": step, "train/loss": loss, **({"val/loss": loss} if step % 4 == 0 else {})})
            history.add_timing({"iteration": step, "time": time.time()})
            if step % 4 == 0:
                checkpoints.keep_best(loss, 1, step, write)
            if step % 3 == 0 or step == STEPS:
                checkpoints.save_last(1, step, write)


def kill_before(folder, number):
    """End this process as SIGKILL does, before the file operation of that number in a folder."""
    left = [number]

    def count(event, arguments):
        if event in FILE_EVENTS and str(arguments[0]).startswith(folder):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "os.listdir", "os.scandir")


def in_process(processes, *arguments, kill_after=None):
    """Run `toy_run` in a process of its own; return its exit status."""
    process = processes.Process(target=toy_run, args=arguments)
    process.start()
    if kill_after is not None:
        process.join(kill_after)
        process.kill()
    process.join()
    return process.exitcode


def outcome(folder):
    """All of a finished toy run that must be the same however often it was killed."""
    contents = {}
    for path in folder.glob("*.pt"):
        content = torch.load(path, weights_only=True)
        contents[path.name] = (content["model"]["afv.weight"].numpy().tobytes(), content["training"])
    names = {path.name for path in folder.iterdir()}
    return contents, names, *((folder / name).read_bytes() for name in ("metrics.jsonl", "metrics.csv"))


@pytest.fixture(scope="module")
def uninterrupted(processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert in_process(processes, folder) == 0
    result = outcome(folder)
    assert len(result[0]) == 4
    return result


def check(folder, uninterrupted, n_sessions):
    assert outcome(folder) == uninterrupted
    timing = [json.loads(line)["iteration"] for line in lines(folder / "timing.jsonl")]
    assert timing == list(range(1, STEPS + 1))
    assert 1 <= len(sessions(folder)) <= n_sessions


def test_run_killed_before_any_file_operation_ends_the_same(processes, uninterrupted, tmp_path):
    kill_at = 2
    while True:
        folder = tmp_path / f"{kill_at}" / "run"
        folder.parent.mkdir()
        if in_process(processes, folder, kill_at) == 0:
            break
        assert in_process(processes, folder) == 0
        check(folder, uninterrupted, 2)
        kill_at += 11  # 1 holds as well, and takes a minute
    assert kill_at > 100


def test_run_killed_again_and_again_ends_the_same(processes, uninterrupted, tmp_path):
    generator, n_killed, pause = random.Random(0), 0, 0.15
    while n_killed < 4:  # a fast machine is through before it is killed often: then again, with shorter times
        folder, n_killed, status = tmp_path / f"{pause}" / "run", 0, None
        folder.parent.mkdir()
        while status != 0:
            # Less and less early, so that there is an end even where everything is slow.
            status = in_process(processes, folder, kill_after=generator.uniform(0, pause) * 1.1**n_killed)
            n_killed += status != 0
        check(folder, uninterrupted, n_killed + 1)
        pause /= 2
