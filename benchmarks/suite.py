"""All that is to be fast, in one command: training, energies and forces, D3(BJ), memory, start of the command lines.

Each part runs in processes of its own and is made by the script that has more about it: ``training.py``,
``compiled.py`` and ``dispersion.py``. What is compared takes turns there. Memory is the peak of a whole process, with
the interpreter and PyTorch in it. The table has one row for each aim: what is measured, against what, the aim, the
value, and whether it was reached.

Most aims are relative to an earlier prototype of this package, which cannot be installed beside it. They are expressed
through the `aimnet` package, since both were measured together: an aim of 1.4 times the prototype, that took 218 ms
where aimnet 0.2.5 took 316 ms, is at most 218 / 1.4 / 316 = 0.49 of the time of aimnet. A peer that is not installed
leaves its rows without a value, and they say so.

    python benchmarks/suite.py --output benchmarks/results/suite.json
"""

import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from compiled import D3, clusters, in_own_process, resident_mib, write_models
from dispersion import OURS as D3_FLOAT64
from dispersion import OURS32 as D3_FLOAT32
from dispersion import our_call, water_cluster
from report import check_output, package_versions, processor, write_results
from training import AIMNET, COMPILED, EAGER, FIDELITIES, MIXED, ONE_SIZE, UNEVEN

from aimnet2mult.models.jit_wrapper import load_jit_model
from aimnet2mult.utils.cli import user_errors
from aimnet2mult.utils.files import atomic_path

FOLDER = Path(__file__).resolve().parent
PACKAGE = FOLDER.parent / "aimnet2mult"
DFTD3 = "dftd3"

PARTS = ("training", "inference", "dispersion", "memory", "start")
MEGABYTES_PER_MIB = 2**20 / 1e6


@dataclass
class Row:
    """One aim: ``value`` is to be at most ``aim``; both are in units of ``against``. No value: ``note`` says why."""

    name: str
    asked: str
    against: str
    aim: float
    value: float | None = None
    note: str = ""

    @property
    def reached(self) -> str:
        """Yes, no, or not measured."""
        return "not measured" if self.value is None else "yes" if self.value <= self.aim else "no"


def through_aimnet(prototype: float, factor: float, aimnet: float) -> float:
    """The largest share of the time of aimnet, for ``factor`` times as fast as the prototype; times then, same unit."""
    return prototype / factor / aimnet


# --------------------------------------------------------------------------------------------------
# processes
# --------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Variables for the processes: one thread, and this copy of the package first."""
    paths = [str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def run(command: list[str]) -> subprocess.CompletedProcess:
    """Run a command and keep what it says."""
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, cwd=FOLDER)


def interpreter(script: str, peer: str, pythons: list[str]) -> str:
    """The first interpreter that has the peer and can run the script; this one, if there is none."""
    check = f"import importlib.metadata; importlib.metadata.version({peer!r})"
    for python in pythons:
        if run([python, "-c", check]).returncode == 0 and run([python, script, "--help"]).returncode == 0:
            return python
    return sys.executable


def result_of(script: str, peer: str, pythons: list[str], options: list[str]) -> dict[str, Any]:
    """JSON that a script writes; if it fails, {"failed": the last line that it says}."""
    python = interpreter(script, peer, pythons)
    click.echo(f"{script} {' '.join(options)}", err=True)
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "result.json"
        done = run([python, script, *options, "--output", str(output)])
        if done.returncode != 0:
            last = (done.stderr.strip() or "nothing was said").splitlines()[-1]
            return {"failed": f"{script} failed ({done.returncode}): {last}"}
        return json.loads(output.read_text())


def cpu_of(command: list[str]) -> float:
    """CPU time of a process that must succeed, s."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# --------------------------------------------------------------------------------------------------
# parts
# --------------------------------------------------------------------------------------------------


def measure_training(small: bool, compiled: bool, pythons: list[str]) -> dict[str, Any]:
    """Result of ``training.py``."""
    options = ["--small", "--repeats", "3"] if small else []
    return result_of("training.py", AIMNET, pythons, options + (["--compile"] if compiled else []))


def measure_inference(small: bool, compiled: bool, pythons: list[str]) -> dict[str, Any]:
    """Result of ``compiled.py``, part ``aimnet``."""
    return result_of("compiled.py", AIMNET, pythons, ["--only", "aimnet", *(["--small"] if small else [])])


def measure_dispersion(small: bool, compiled: bool, pythons: list[str]) -> dict[str, Any]:
    """Result of ``dispersion.py`` for two clusters."""
    sizes = (100, 300) if small else (1000, 3000)
    options = [word for n_atoms in sizes for word in ("--atoms", str(n_atoms))]
    return result_of("dispersion.py", DFTD3, pythons, [*options, "--batch", "1"])


def peak_of_model(model_file: Path, n_atoms: int) -> float:
    """Peak memory of a process that computes energy and forces of a cluster with D3, MB."""
    model = load_jit_model(model_file)
    model.set_coulomb_method("simple")
    model(clusters(1, n_atoms, 0))
    return resident_mib(peak=True) * MEGABYTES_PER_MIB


def peak_of_d3(n_atoms: int) -> float:
    """Peak memory of a process that computes the D3 energy and gradient of a cluster, float64, MB."""
    numbers, coord = water_cluster(n_atoms, 0)
    our_call(numbers[None], coord[None], torch.float64)()
    return resident_mib(peak=True) * MEGABYTES_PER_MIB


def peak_of_nothing() -> float:
    """Peak memory of a process that has loaded the package and PyTorch, MB."""
    return resident_mib(peak=True) * MEGABYTES_PER_MIB


def measure_memory(small: bool, compiled: bool, pythons: list[str]) -> dict[str, Any]:
    """Peak memory in MB; a process each."""
    model_atoms, d3_atoms = (99, 300) if small else (999, 3000)
    with tempfile.TemporaryDirectory() as name:
        in_own_process(write_models, Path(name), small, 0)
        return {
            "model": in_own_process(peak_of_model, Path(name) / f"{D3}.jpt", model_atoms),
            "d3": in_own_process(peak_of_d3, d3_atoms),
            "nothing": in_own_process(peak_of_nothing),
        }


def command_lines() -> list[str]:
    """Modules of the package that are command lines."""
    files = [p for p in sorted(PACKAGE.rglob("*.py")) if 'if __name__ == "__main__"' in p.read_text(encoding="utf-8")]
    return [".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts) for p in files]


def measure_start(small: bool, compiled: bool, pythons: list[str]) -> dict[str, Any]:
    """CPU seconds of ``--help`` of each command line, of the import of the package, and of Python; least of several."""
    tools = [[sys.executable, "-m", module, "--help"] for module in command_lines()]
    imports = {name: [sys.executable, "-c", line] for name, line in (("import", "import aimnet2mult"), ("python", ""))}
    repeats = 2 if small else 5
    commands = {command[2]: command for command in tools} | imports
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            times[name].append(cpu_of(command))
    least = {name: min(values) for name, values in times.items()}
    return {"help": {k: t for k, t in least.items() if k not in imports}, **{k: least[k] for k in imports}}


MEASURE: dict[str, Callable[[bool, bool, list[str]], dict[str, Any]]] = {
    "training": measure_training,
    "inference": measure_inference,
    "dispersion": measure_dispersion,
    "memory": measure_memory,
    "start": measure_start,
}


# --------------------------------------------------------------------------------------------------
# rows
# --------------------------------------------------------------------------------------------------


def ratio(ours: float, theirs: float | None, peer: str) -> tuple[float | None, str]:
    """Value of a row, or a note that the peer is missing."""
    return (None, f"{peer} is not installed") if theirs is None else (ours / theirs, "")


def training_rows(result: dict[str, Any]) -> Iterator[Row]:
    """Rows of the training step; the faster of eager and compiled, the note has both."""
    seconds, floor = result["seconds"], result["floor seconds"]

    def row(kind: str, asked: str, against: str, aim: float) -> Row:
        times = seconds[kind]
        ways = {how: times[how] for how in (EAGER, COMPILED) if how in times}
        value, note = ratio(min(ways.values()), floor if against == "floor" else times.get(AIMNET), AIMNET)
        note = note or ", ".join(f"{how} {1e3 * t:.0f} ms" for how, t in ways.items())
        return Row(f"training step, {kind}", asked, against, aim, value, note)

    asked = "1.3 x faster than the prototype, <= 1.35 x floor"
    yield row(ONE_SIZE, asked, "floor", 1.35)
    yield row(ONE_SIZE, asked, AIMNET, through_aimnet(457, 1.3, 515))
    asked = "2.2 x faster than the prototype, <= 1.8 x floor"
    yield row(MIXED, asked, "floor", 1.8)
    yield row(MIXED, asked, AIMNET, through_aimnet(1.03, 2.2, 1.38))
    asked = "5 x faster than the prototype"
    yield row(UNEVEN, asked, "floor", 2630 / 5 / 278)
    yield row(UNEVEN, asked, AIMNET, through_aimnet(2.63, 5, 2.84))
    for how in (EAGER, COMPILED):
        if how in seconds[ONE_SIZE]:
            value = seconds[FIDELITIES][how] / seconds[ONE_SIZE][how]
            yield Row("three fidelities, same batch", "<= +5 %", "one fidelity", 1.05, value, how)


def inference_rows(result: dict[str, Any]) -> Iterator[Row]:
    """Rows of energies, forces and Hessians; the part has the shapes in the order of the table."""
    single, batch, *large, hessian = result["aimnet"].get("rows", [None] * (4 if result["small"] else 6))
    faster = "2 x faster than the better of both"
    aims: list[tuple[dict | None, str, str, float]] = [
        (single, "energy and forces, 20 atoms", "1.6 x faster than both", 1 / 1.6),
        (batch, "energy and forces, 64 x 20 atoms", "1.4 x faster than the prototype", through_aimnet(218, 1.4, 316)),
        (hessian, "Hessian, 20 atoms", "1.3 x faster than aimnet", 1 / 1.3),
    ]
    sizes = [(201, through_aimnet(0.11, 2, 0.13)), (501, 1 / 2), (999, 1 / 2)]
    for measured, (n_atoms, aim) in zip(large, sizes[-len(large) :], strict=True):
        aims.append((measured, f"water cluster, {n_atoms} atoms", faster, aim))
    for measured, name, asked, aim in aims:
        if measured is None:
            yield Row(name, asked, AIMNET, aim, None, result["aimnet"]["skipped"])
            continue
        times = measured["median seconds"]
        note = f"{measured['molecules']} x {measured['atoms']}: {1e3 * times['ours']:.1f} ms"
        yield Row(name, asked, AIMNET, aim, times["ours"] / times["aimnet"], note)


def dispersion_rows(result: dict[str, Any]) -> Iterator[Row]:
    """Rows of D3(BJ); float64, as dftd3 computes."""
    # The two clusters come first; the script adds a row of a batch of small molecules.
    for measured, n_atoms in zip(result["rows"][:2], (1000, 3000), strict=True):
        seconds = measured["seconds"]
        value, note = ratio(seconds[D3_FLOAT64], seconds.get(DFTD3), DFTD3)
        note = note or f"{measured['atoms']} atoms, float64; float32 {seconds[D3_FLOAT32] / seconds[DFTD3]:.2f}"
        yield Row(f"D3(BJ) energy and gradient, {n_atoms} atoms", "as fast as s-dftd3", DFTD3, 1.0, value, note)


def memory_rows(result: dict[str, Any]) -> Iterator[Row]:
    """Rows of memory."""
    note = f"of it {result['nothing']:.0f} MB interpreter, PyTorch and package"
    yield Row("memory, 999 atoms with D3", "< 0.8 GB", "MB", 800, result["model"], note)
    yield Row("memory, D3 of 3000 atoms", "< 1 GB", "MB", 1000, result["d3"], note)


def start_rows(result: dict[str, Any]) -> Iterator[Row]:
    """Rows of command lines and import."""
    slowest = max(result["help"], key=result["help"].get)
    note = f"the slowest of {len(result['help'])}: {slowest}"
    yield Row("--help of a command line", "< 0.5 s", "s", 0.5, result["help"][slowest], note)
    beyond = result["import"] - result["python"]
    yield Row("import aimnet2mult", "< 0.1 s", "s", 0.1, beyond, f"beyond {result['python']:.3f} s of Python itself")


ROWS: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
    "training": training_rows,
    "inference": inference_rows,
    "dispersion": dispersion_rows,
    "memory": memory_rows,
    "start": start_rows,
}


def rows_of(part: str, result: dict[str, Any], small: bool) -> list[Row]:
    """Rows of a part; one that says so, where it failed."""
    if "failed" in result:
        return [Row(part, "", "", 0.0, None, result["failed"])]
    return list(ROWS[part](result | {"small": small}))


# --------------------------------------------------------------------------------------------------
# page and command line
# --------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three digits, without powers of ten for what is large."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def verdict(row: Row, small: bool) -> str:
    """Whether the row was reached; the small setting is not judged, since the aims are those of the full one."""
    return "not judged" if small and row.value is not None else row.reached


def draw(rows: list[Row], path: Path) -> None:
    """Draw what was measured in units of the aim, a bar each: left of the line the aim is reached."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.5 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [f"{row.name} ({row.against})" + (f", {row.note}" if row.against == "one fidelity" else "") for row in rows]
    values = [(row.value or 0.0) / row.aim for row in rows]
    bars = axes.barh(names, values, color=["tab:green" if value <= 1 else "tab:red" for value in values])
    axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axes.axvline(1.0, color="black", linestyle="--")
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(xlabel="measured / aim")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def markdown(result: dict[str, Any], rows: list[Row], picture: str | None) -> str:
    """The result as a page."""
    small = result["arguments"]["small"]
    lines = [
        "# All aims",
        "",
        "Made by `benchmarks/suite.py`, which says how.",
        "",
        f"- {result['machine']['device']}, {result['machine']['system']}, one thread",
        f"- {', '.join(f'{name} {version}' for name, version in result['versions'].items())}",
        "- at most: the aim in units of 'against'; the prototype is expressed through aimnet 0.2.5, which was measured",
        "  together with it; a ratio below 1 is faster than the peer",
    ]
    if small:
        lines.append("- small setting: the small model and smaller systems; not judged, since aims are of the full one")
    lines += [
        "",
        "| what | asked | against | at most | measured | reached | note |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        value = "" if row.value is None else number(row.value)
        aim = number(row.aim) if row.against else ""
        lines.append(
            f"| {row.name} | {row.asked} | {row.against} | {aim} | {value} | {verdict(row, small)} | {row.note} |"
        )
    if picture is not None:
        lines += ["", f"![what was measured, in units of the aim]({picture})"]
    return "\n".join(lines) + "\n"


def all_versions(parts: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Versions here and of the peers where they were measured."""
    found = package_versions()
    for result in parts.values():
        found |= {name: version for name, version in result.get("versions", {}).items() if name not in found}
        if "version" in result.get("aimnet", {}):
            found[AIMNET] = result["aimnet"]["version"]
    return found


@click.command(context_settings={"show_default": True})
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="JSON file; .md and .png are put beside."
)
@click.option("--small/--full", default=False, help="The small model and small systems: minutes.")
@click.option(
    "--compile/--no-compile", "compiled", default=True, help="Measure compiled training steps as well; takes minutes."
)
@click.option(
    "--python",
    "pythons",
    multiple=True,
    help="Interpreter that has peers and what this package needs; repeatable, the first that has a peer is used for "
    "it. [this one]",
)
@click.option("--only", "parts", multiple=True, type=click.Choice(PARTS), help="Part to measure; repeatable. [all]")
@user_errors
def main(output: Path, small: bool, compiled: bool, pythons: tuple[str, ...], parts: tuple[str, ...]) -> None:
    """Measure everything that has an aim, and say what was reached."""
    check_output(output)
    torch.set_num_threads(1)
    chosen = [part for part in PARTS if part in parts or not parts]
    results = {part: MEASURE[part](small, compiled, [*pythons, sys.executable]) for part in chosen}
    rows = [row for part, result in results.items() for row in rows_of(part, result, small)]
    result = {
        "rows": [asdict(row) | {"reached": verdict(row, small)} for row in rows],
        "parts": results,
        "machine": {"device": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": all_versions(results),
        "arguments": {"small": small, "compile": compiled, "parts": chosen},
    }
    measured = [row for row in rows if row.value is not None]
    drawn = bool(measured) and importlib.util.find_spec("matplotlib") is not None
    picture = output.with_suffix(".png") if drawn else None
    if picture is not None:
        draw(measured, picture)
    write_results(output, result, markdown(result, rows, picture.name if picture else None), *filter(None, [picture]))


if __name__ == "__main__":
    main()
