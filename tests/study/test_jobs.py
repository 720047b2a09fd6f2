"""Jobs: each once, in the order that they need, again when something changed, and further after a kill."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from aimnet2mult.study.jobs import Command, Job, StudyError, Workshop

WORK = """
import pathlib, sys, time
output, count, *inputs = sys.argv[1:]
path = pathlib.Path(output)
progress = path.with_suffix(".progress")
done = int(progress.read_text()) if progress.exists() else 0
for i in range(done, int(count)):
    time.sleep(0.02)
    note = path.with_suffix(".new")
    note.write_text(str(i + 1))
    note.replace(progress)  # whole or not at all, whenever the program is killed
if any(pathlib.Path(name).read_text() == "poison" for name in inputs):
    sys.exit("it was poisoned")
path.write_text(f"from {done}: " + " ".join(pathlib.Path(name).read_text() for name in inputs))
with open("order.txt", "a") as file:
    file.write(path.parent.name + "\\n")
"""
"""A program that counts, notes how far it is, and goes on from there: it reads and writes small files."""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "work.py").write_text(WORK)
    (tmp_path / "input.txt").write_text("seed")
    return tmp_path


def work(name, inputs=("input.txt",), reads=(), count=0):
    """A job that reads files, those of ``reads`` written by other jobs."""
    names = (*inputs, *(f"{folder}/out.txt" for folder in reads))
    command = Command(name, "work", (f"{name}/out.txt", str(count), *names), "out.txt", tuple(inputs), tuple(reads))
    return Job(name, lambda: command, tuple(reads), steps=1)


def chain():
    return [work("c", (), ("b",)), work("b", (), ("a",)), work("a"), work("other")]


def order(folder):
    path = folder / "order.txt"
    found = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def test_jobs_wait_for_what_they_need(folder):
    workshop = Workshop(folder, workers=2)
    workshop.run(chain())
    found = order(folder)
    assert sorted(found) == ["a", "b", "c", "other"]
    assert found.index("a") < found.index("b") < found.index("c")
    assert workshop.failures == {}
    state = workshop.state("c")
    assert state["status"] == "done"
    assert 0 < state["cpu_seconds"] <= state["seconds"] * os.cpu_count()


def test_what_is_done_is_not_done_again(folder):
    Workshop(folder).run(chain())
    order(folder)
    Workshop(folder).run(chain())
    assert order(folder) == []


def test_a_changed_argument_runs_again_what_depends_on_it(folder):
    Workshop(folder).run(chain())
    order(folder)
    Workshop(folder).run([work("c", (), ("b",)), work("b", (), ("a",), count=1), work("a"), work("other")])
    assert order(folder) == ["b", "c"]


def test_a_changed_input_runs_again_what_reads_it(folder):
    Workshop(folder).run([*chain(), work("constant", ())])
    order(folder)
    (folder / "input.txt").write_text("other")
    Workshop(folder).run([*chain(), work("constant", ())])
    assert sorted(order(folder)) == ["a", "b", "c", "other"]
    assert (folder / "c" / "out.txt").read_text().endswith("other")


def test_a_lost_result_is_made_again(folder):
    Workshop(folder).run(chain())
    order(folder)
    (folder / "b" / "out.txt").unlink()
    Workshop(folder).run(chain())
    assert order(folder) == ["b"]


def test_after_a_failure_the_others_go_on(folder, caplog):
    (folder / "input.txt").write_text("poison")
    workshop = Workshop(folder)
    independent = work("independent", ())
    patient = Job("patient", work("patient", ()).make, after=("a",))
    workshop.run([work("b", (), ("a",)), work("a"), independent, patient])
    assert sorted(order(folder)) == ["independent", "patient"]
    assert set(workshop.failures) == {"a", "b"}
    assert "it was poisoned" in workshop.failures["a"]
    assert str(folder / "a" / "log.txt") in workshop.failures["a"]
    assert "it was poisoned" in caplog.text
    (folder / "input.txt").write_text("cured")
    again = Workshop(folder)
    again.run([work("b", (), ("a",)), work("a"), independent, patient])
    assert order(folder) == ["a", "b"]
    assert again.failures == {}


def test_a_command_without_its_result_has_failed(folder):
    command = Command("empty", "work", ("elsewhere.txt", "0"), "out.txt")
    workshop = Workshop(folder)
    workshop.run([Job("empty", lambda: command)])
    assert "status 0" in workshop.failures["empty"]


def test_a_job_that_cannot_be_made_has_failed(folder):
    def make():
        raise StudyError("no trial has a result")

    workshop = Workshop(folder)
    workshop.run([Job("x", make), work("a")])
    assert workshop.failures == {"x": "no trial has a result"}
    assert order(folder) == ["a"]


def test_the_same_command_for_two_jobs_runs_once(folder):
    once = work("a", count=5)
    Workshop(folder, workers=2).run([once, Job("again", once.make)])
    assert order(folder) == ["a"]


RUN = """
import pathlib, sys
sys.path.insert(0, {tests!r})
from test_jobs import work
from aimnet2mult.study.jobs import Workshop
Workshop(pathlib.Path({folder!r}), workers=2).run([work("long", count=150), work("short"), work("last", (), ("long",))])
"""


def start(folder):
    """A study in a process of its own, once its long job is on its way."""
    code = RUN.format(tests=os.path.dirname(__file__), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.PIPE)
    progress, workshop = folder / "long" / "out.progress", Workshop(folder)
    deadline = time.monotonic() + 60
    while not (progress.exists() and progress.read_text() and workshop.state("short").get("status") == "done"):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_a_study_that_was_interrupted_goes_on(folder):
    process = start(folder)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert b"KeyboardInterrupt" in error
    assert json.loads((folder / "long" / "job.json").read_text())["status"] == "stopped"
    reached = int((folder / "long" / "out.progress").read_text())
    time.sleep(0.1)
    assert int((folder / "long" / "out.progress").read_text()) == reached  # its command ended with it
    order(folder)
    Workshop(folder).run([work("long", count=150), work("short"), work("last", (), ("long",))])
    assert order(folder) == ["long", "last"]
    assert (folder / "long" / "out.txt").read_text().startswith(f"from {reached}: ")


def test_a_study_that_was_killed_goes_on(folder):
    process = start(folder)
    process.kill()
    process.wait()
    process.stderr.close()
    with pytest.raises(StudyError, match="in use by another study, or by commands that a killed one has left behind"):
        Workshop(folder).run([work("a")])
    while not (folder / "long" / "out.txt").exists():  # what was left behind
        time.sleep(0.05)
    time.sleep(0.2)
    order(folder)
    Workshop(folder).run([work("long", count=150), work("short"), work("last", (), ("long",))])
    assert order(folder) == ["long", "last"]
    assert (folder / "long" / "out.txt").read_text().startswith("from 150: ")
