"""What a compiled model costs: time and memory by size, dense layout or lists of neighbours, the `aimnet` package.

Three parts, each with an untrained model (the cost does not depend on the weights) in a file as `compile_jit` writes,
energies and forces in float32 on one thread:

``size``
    Water clusters and periodic water boxes at the density of the liquid, from 100 to 20,000 atoms: the network and the
    self-atomic energies alone, with Coulomb energy, and with D3(BJ). Each in a process of its own, which also tells
    the peak memory: beyond what the process held once the model had been loaded and called for three atoms.
``threshold``
    The same water cluster in dense layout and with a list of neighbours (attribute ``dense_limit`` of the model), by
    size: where the two take the same time is where the model should change from one to the other.
``aimnet``
    The same network with the same weights in the `aimnet` package, called through its AIMNet2Calculator; left out where
    that package is not installed. Energies and forces are compared, too.

What is compared takes turns, and the least CPU time of several is reported.

    OMP_NUM_THREADS=1 python benchmarks/compiled.py --output benchmarks/results/compiled.json
"""

import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from dispersion import MOLECULE_SPACING, WATER, water_cluster
from report import check_output, processor, write_results
from torch import Tensor, nn

from aimnet2mult.models.base import build_model, load_model_config, versions
from aimnet2mult.models.compiled_file import save_jit_model
from aimnet2mult.models.jit_wrapper import DENSE_LIMIT, DeployableModel, load_jit_model
from aimnet2mult.modules import DFTD3, SelfAtomicEnergies
from aimnet2mult.utils.cli import user_errors
from aimnet2mult.utils.files import atomic_path

SPECIES = [1, 8]
SELF_ENERGY = -100.0
"""eV, of each atom: of the size of what is added in float64."""

D3BJ = {"s8": 0.7875, "a1": 0.4289, "a2": 4.4407}
"""PBE."""

SMALL_MODEL = Path(__file__).parents[1] / "examples" / "config" / "model_small.yaml"

SHORT, COULOMB, D3 = "short", "coulomb", "coulomb_d3"
"""Model files: network and self-atomic energies; with Coulomb energy; with D3(BJ) as well."""

CURVES = {
    "cluster, short range": ("cluster", SHORT, ""),
    "cluster, + Coulomb simple": ("cluster", COULOMB, "simple"),
    "cluster, + Coulomb simple + D3(BJ)": ("cluster", D3, "simple"),
    "box, short range": ("box", SHORT, ""),
    "box, + Coulomb dsf": ("box", COULOMB, "dsf"),
    "box, + Coulomb ewald": ("box", COULOMB, "ewald"),
    "box, + Coulomb dsf + D3(BJ)": ("box", D3, "dsf"),
}
"""Name -> system, model file, Coulomb method."""

PARTS = ("size", "threshold", "aimnet")
DENSE, LIST = "dense", "list of neighbours"
OURS, AIMNET = "ours", "aimnet"
MANY_ATOMS = 10**9

Batch = dict[str, Tensor]
Call = Callable[[], Any]


# --------------------------------------------------------------------------------------------------
# systems and models
# --------------------------------------------------------------------------------------------------


def water_grid(n_molecules: int) -> tuple[int, int, int]:
    """Sides of the nearly cubic grid whose number of places is nearest to ``n_molecules``."""
    low = max(1, int(n_molecules ** (1 / 3)) - 1)
    sides = range(low, low + 4)
    grids = [(a, b, c) for a in sides for b in sides for c in sides if a <= b <= c]
    return min(grids, key=lambda g: (abs(math.prod(g) - n_molecules), g[2] - g[0]))


def water_box(n_atoms: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Atomic numbers, coordinates and cell (Å) of a box of liquid water of about ``n_atoms`` atoms.

    Molecules have their geometry in the gas, stand on a grid that fills the cell, and are moved and turned at random.
    """
    grid = water_grid(round(n_atoms / 3))
    places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 3)
    rng = np.random.default_rng(seed)
    turns = np.linalg.qr(rng.normal(size=(len(places), 3, 3)))[0]
    atoms = WATER @ turns + (MOLECULE_SPACING * places + 0.1 * rng.normal(size=places.shape))[:, None]
    return np.tile([8, 1, 1], len(places)), atoms.reshape(-1, 3), np.diag(MOLECULE_SPACING * np.array(grid))


def clusters(n_molecules: int, n_atoms: int, seed: int) -> Batch:
    """Dense batch of water clusters; where the last molecule is cut, what is left of it is a hydroxide ion.

    Parameters
    ----------
    n_molecules, n_atoms : int
        Shape of the batch; ``n_atoms`` is 3 n or 3 n + 2.
    seed : int
        Of the first cluster.
    """
    assert n_atoms % 3 != 1
    drawn = [water_cluster(n_atoms, seed + k) for k in range(n_molecules)]
    return {
        "coord": torch.tensor(np.stack([x for _, x in drawn]), dtype=torch.float32),
        "numbers": torch.tensor(np.stack([z for z, _ in drawn])),
        "charge": torch.full([n_molecules], -1.0 if n_atoms % 3 else 0.0),
        "mult": torch.ones(n_molecules),
    }


def large_system(system: str, n_atoms: int, seed: int) -> Batch:
    """One cluster or box of about ``n_atoms`` atoms, flat layout."""
    if system == "cluster":
        numbers, coord = water_cluster(3 * round(n_atoms / 3), seed)
        return {"coord": torch.tensor(coord, dtype=torch.float32), "numbers": torch.tensor(numbers)}
    numbers, coord, cell = water_box(n_atoms, seed)
    return {
        "coord": torch.tensor(coord, dtype=torch.float32),
        "numbers": torch.tensor(numbers),
        "cell": torch.tensor(cell, dtype=torch.float32),
    }


def model_config(small: bool, coulomb: bool) -> dict[str, Any]:
    """Configuration of the network, without or with its Coulomb energy."""
    config = load_model_config(SMALL_MODEL if small else None)
    if not coulomb:
        del config["kwargs"]["outputs"]["lrcoulomb"]
    return config


def write_models(folder: Path, small: bool, seed: int) -> None:
    """Write the model files ``short.jpt``, ``coulomb.jpt``, ``coulomb_d3.jpt``."""
    for name in (SHORT, COULOMB, D3):
        torch.manual_seed(seed)
        network = build_model(model_config(small, name != SHORT))
        network.add_output("self_atomic_energies", SelfAtomicEnergies(dict.fromkeys(SPECIES, SELF_ENERGY)))
        if name == D3:
            network.add_output("dftd3", DFTD3(s8=D3BJ["s8"], a1=D3BJ["a1"], a2=D3BJ["a2"]))
        save_jit_model(DeployableModel(network, SPECIES), folder / f"{name}.jpt", {})


# --------------------------------------------------------------------------------------------------
# measuring
# --------------------------------------------------------------------------------------------------


def in_own_process(function: Callable, *arguments: Any) -> Any:
    """Result of a function in a fresh process of one thread."""
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (1,)) as pool:
        return pool.apply(function, arguments)


def cpu_seconds(call: Call) -> float:
    """CPU time of this process for one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def take_turns(calls: dict[str, Call], repeats: int, at_least: float) -> dict[str, list[float]]:
    """CPU times of calls that take turns: ``repeats`` times, and on for ``at_least`` seconds of each."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    while min(map(len, times.values())) < repeats or min(map(sum, times.values())) < at_least:
        for name, call in calls.items():
            times[name].append(cpu_seconds(call))
    return times


def resident_mib(peak: bool) -> float:
    """Resident memory of this process, now or at most so far, MiB.

    Linux tells the peak of the program alone; elsewhere only the system's own count is there, and the present one is
    taken for it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(lines["VmHWM" if peak else "VmRSS"].split()[0]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure_system(model_file: Path, system: str, method: str, n_atoms: int, repeats: int, seed: int) -> dict:
    """Time and peak memory of the energy and forces of one system; to be called in a process of its own."""
    model = load_jit_model(model_file)
    if method:
        model.set_coulomb_method(method)
    model(large_system(system, 3, seed))  # the code itself is not the subject
    batch = large_system(system, n_atoms, seed)
    before = resident_mib(peak=False)
    times = [cpu_seconds(lambda: model(batch)) for _ in range(repeats)]
    return {
        "atoms": len(batch["numbers"]),
        "seconds": min(times),
        "peak MiB": resident_mib(peak=True) - before,
        "MiB before": before,
    }


def better(one: dict | None, other: dict) -> dict:
    """The lesser time and the higher peak of two measurements of the same."""
    if one is None:
        return other
    return {key: (min if key == "seconds" else max)(one[key], other[key]) for key in one}


def measure_sizes(folder: Path, sizes: list[int], repeats: int, seed: int) -> dict:
    """Part ``size``: {curve: a row per size}. Curves take turns, in as many rounds as there are repeats."""
    rows: dict[str, list[dict]] = {curve: [] for curve in CURVES}
    for n_atoms in sizes:
        best: dict[str, dict | None] = dict.fromkeys(CURVES)
        for _ in range(repeats if n_atoms <= 3000 else 1):
            for curve, (system, name, method) in CURVES.items():
                n_calls = 3 if n_atoms <= 3000 else 2
                found = in_own_process(measure_system, folder / f"{name}.jpt", system, method, n_atoms, n_calls, seed)
                best[curve] = better(best[curve], found)
        for curve, row in best.items():
            assert row is not None
            rows[curve].append(row)
            click.echo(f"{curve}: {row['atoms']} atoms, {row['seconds']:.2f} s, {row['peak MiB']:.0f} MiB", err=True)
    return {"rows": rows}


def measure_threshold(model_file: Path, shapes: list[tuple[int, int]], repeats: int, seed: int) -> dict:
    """Part ``threshold``: a row for each shape (molecules, atoms) of a batch; in a process of its own."""
    rows = []
    for n_molecules, n_atoms in shapes:
        batch = clusters(n_molecules, n_atoms, seed)
        calls: dict[str, Call] = {}
        for name, limit in ((DENSE, MANY_ATOMS), (LIST, 0)):
            model = load_jit_model(model_file)
            model.module.dense_limit = limit
            calls[name] = lambda model=model, batch=batch: model(batch)
        times = take_turns(calls, repeats, 1.0)
        rows.append({"molecules": n_molecules, "atoms": n_atoms, "seconds": {k: min(v) for k, v in times.items()}})
    return {"rows": rows, "crossing": crossing([row for row in rows if row["molecules"] == 1])}


def crossing(rows: list[dict]) -> float | None:
    """Number of atoms where both layouts take the same time, between the rows next to it; None if they never do."""
    ratios = [math.log(row["seconds"][DENSE] / row["seconds"][LIST]) for row in rows]
    for k in range(len(rows) - 1, 0, -1):
        if ratios[k - 1] < 0 <= ratios[k]:
            low, high = rows[k - 1]["atoms"], rows[k]["atoms"]
            return low + (high - low) * ratios[k - 1] / (ratios[k - 1] - ratios[k])
    return None


# --------------------------------------------------------------------------------------------------
# the aimnet package
# --------------------------------------------------------------------------------------------------


def aimnet_network(config: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    """The same network in the aimnet package, with our weights for the elements that it knows."""
    from aimnet.config import build_module

    text = json.dumps(config).replace("aimnet2mult.models.aimnet2.AIMNet2", "aimnet.models.AIMNet2")
    network = build_module(json.loads(text.replace("aimnet2mult.", "aimnet.")))
    # Tables by element have fewer rows there.
    rows = {key: value.shape[:1] for key, value in network.state_dict().items()}
    network.load_state_dict({key: value[: rows[key][0]] if rows[key] else value for key, value in weights.items()})
    return network


def aimnet_calculator(config: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """Calculator of the aimnet package for the same network."""
    from aimnet.calculators import AIMNet2Calculator

    return AIMNet2Calculator(aimnet_network(config, weights), device="cpu")


def measure_aimnet(model_file: Path, small: bool, shapes: list[tuple[int, int, bool]], repeats: int, seed: int) -> dict:
    """Part ``aimnet``: a row for each (molecules, atoms, Hessian or energy and forces); in a process of its own."""
    torch.manual_seed(seed)
    config = model_config(small, coulomb=False)
    calculator = aimnet_calculator(config, build_model(config).state_dict())
    model = load_jit_model(model_file)
    rows = []
    for n_molecules, n_atoms, hessian in shapes:
        batch = clusters(n_molecules, n_atoms, seed)
        if hessian:
            one = {**batch, "coord": batch["coord"][0], "numbers": batch["numbers"][0]}
            calls = {
                OURS: lambda one=one: {"hessian": model.hessian(one)},
                AIMNET: lambda one=one: calculator(one, hessian=True),
            }
        else:
            calls = {OURS: lambda batch=batch: model(batch), AIMNET: lambda batch=batch: calculator(batch, forces=True)}
        results = {name: call() for name, call in calls.items()}
        times = take_turns(calls, repeats, 2.0)
        rows.append(
            {
                "molecules": n_molecules,
                "atoms": n_atoms,
                "quantity": "Hessian" if hessian else "energy and forces",
                "seconds": {name: min(values) for name, values in times.items()},
                "median seconds": {name: statistics.median(values) for name, values in times.items()},
                "largest difference": difference(results[OURS], results[AIMNET], n_atoms),
            }
        )
    return {"rows": rows}


def difference(ours: Batch, theirs: Batch, n_atoms: int) -> dict[str, float]:
    """Largest differences of the results; energies without our self-atomic energies.

    Residual errors of float32: the packages sum in another order.
    """
    if "hessian" in ours:
        size = 3 * n_atoms
        return {
            "hessian": (ours["hessian"].reshape(size, size) - theirs["hessian"].reshape(size, size)).abs().max().item()
        }
    energy = ours["energy"] - n_atoms * SELF_ENERGY - theirs["energy"].detach().reshape(-1)
    forces = ours["forces"].reshape(-1) - theirs["forces"].detach().reshape(-1)
    return {
        "energy per atom": energy.abs().max().item() / n_atoms,
        "forces": forces.abs().max().item(),
        "largest force": ours["forces"].abs().max().item(),
    }


# --------------------------------------------------------------------------------------------------
# the page and the picture
# --------------------------------------------------------------------------------------------------


def page_of_sizes(rows: dict[str, list[dict]]) -> list[str]:
    """Table of time and memory by size, and the slopes at the end of each curve."""
    lines = [
        "## Size",
        "",
        "Seconds for energy and forces; µs per atom; peak memory in MiB beyond what the process held before.",
        "",
        "| system | atoms | s | µs per atom | peak MiB | KiB per atom |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for curve, measured in rows.items():
        for row in measured:
            n = row["atoms"]
            lines.append(
                f"| {curve} | {n:,} | {row['seconds']:.3f} | {1e6 * row['seconds'] / n:.0f} | {row['peak MiB']:.0f} "
                f"| {2**10 * row['peak MiB'] / n:.0f} |"
            )
    before = max(row["MiB before"] for measured in rows.values() for row in measured)
    lines += ["", f"A process with the model loaded holds {before:.0f} MiB before."]
    longest = {curve: measured for curve, measured in rows.items() if len(measured) > 1}
    if longest:
        lines += ["", "Growth between the two largest systems of each kind, as a power of the number of atoms:", ""]
        lines += ["| system | time | memory |", "| --- | --- | --- |"]
        for curve, measured in longest.items():
            lines.append(f"| {curve} | {power(measured, 'seconds'):.2f} | {power(measured, 'peak MiB'):.2f} |")
    return lines


def power(rows: list[dict], quantity: str) -> float:
    """Slope of the last two rows in a plot with two logarithmic axes."""
    low, high = rows[-2:]
    return math.log(high[quantity] / low[quantity]) / math.log(high["atoms"] / low["atoms"])


def page_of_threshold(result: dict) -> list[str]:
    """Table of the two layouts, and where they meet."""
    lines = [
        "## Dense layout or lists of neighbours",
        "",
        f"Energy and forces of water clusters, network and self-atomic energies. `DENSE_LIMIT` is {DENSE_LIMIT}.",
        "",
        f"| molecules x atoms | {DENSE}, ms | {LIST}, ms | {DENSE} / {LIST} |",
        "| --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        dense, flat = row["seconds"][DENSE], row["seconds"][LIST]
        lines.append(
            f"| {row['molecules']} x {row['atoms']} | {1e3 * dense:.2f} | {1e3 * flat:.2f} | {dense / flat:.2f} |"
        )
    meet = result["crossing"]
    lines += ["", "They do not meet." if meet is None else f"For single molecules they meet at {meet:.0f} atoms."]
    return lines


def page_of_aimnet(result: dict) -> list[str]:
    """Table of the comparison with the aimnet package."""
    if "skipped" in result:
        return ["## The aimnet package", "", result["skipped"]]
    lines = [
        "## The aimnet package",
        "",
        f"aimnet {result['version']}, AIMNet2Calculator on the CPU, called with tensors; ours: `load_jit_model`. The",
        "same network with the same weights, without long-range terms. Ratio below 1: ours is faster.",
        "",
        "| molecules x atoms | quantity | ours, ms | aimnet, ms | ours / aimnet | of the medians |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        least, median = row["seconds"], row["median seconds"]
        lines.append(
            f"| {row['molecules']} x {row['atoms']} | {row['quantity']} | {1e3 * least[OURS]:.1f} "
            f"| {1e3 * least[AIMNET]:.1f} | {least[OURS] / least[AIMNET]:.2f} | {median[OURS] / median[AIMNET]:.2f} |"
        )
    forces = [row["largest difference"] for row in result["rows"] if "forces" in row["largest difference"]]
    lines += [
        "",
        f"Largest difference of energies {max(d['energy per atom'] for d in forces):.0e} eV per atom, of forces "
        f"{max(d['forces'] for d in forces):.0e} eV/Å (of {max(d['largest force'] for d in forces):.0e} eV/Å).",
    ]
    return lines


def markdown(result: dict, picture: str | None) -> str:
    """The result as a page."""
    arguments, machine = result["arguments"], result["machine"]
    lines = [
        "# Compiled models: time and memory",
        "",
        "Made by `benchmarks/compiled.py`, which says how.",
        "",
        f"- {'small' if arguments['small'] else 'full-size'} model, untrained, float32",
        "- least CPU time of several calls",
        f"- {machine['device']}, {machine['threads']} thread",
        f"- {', '.join(f'{name} {version}' for name, version in result['versions'].items())}",
    ]
    if "size" in result:
        lines += ["", *page_of_sizes(result["size"]["rows"])]
        lines += [] if picture is None else ["", f"![time and memory against the number of atoms]({picture})"]
    if "threshold" in result:
        lines += ["", *page_of_threshold(result["threshold"])]
    if "aimnet" in result:
        lines += ["", *page_of_aimnet(result["aimnet"])]
    return "\n".join(lines) + "\n"


def draw(rows: dict[str, list[dict]], path: Path) -> None:
    """Draw time and memory against the number of atoms, with lines of slope 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, quantity, label in zip(panels, ("seconds", "peak MiB"), ("CPU time, s", "peak memory, MiB"), strict=True):
        for curve, measured in rows.items():
            style = "o-" if curve.startswith("cluster") else "s--"
            axes.plot([r["atoms"] for r in measured], [r[quantity] for r in measured], style, label=curve, markersize=4)
        base = next(iter(rows.values()))
        atoms = np.array([base[0]["atoms"], base[-1]["atoms"]])
        axes.plot(atoms, base[-1][quantity] * atoms / atoms[-1], "k:", label="slope 1")
        axes.set(xscale="log", yscale="log", xlabel="atoms", ylabel=label)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.suptitle("Energy and forces of a compiled model, one thread")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


# --------------------------------------------------------------------------------------------------
# command line
# --------------------------------------------------------------------------------------------------


def measure(parts: list[str], sizes: list[int], small: bool, repeats: int, seed: int) -> dict:
    """Results of the parts that were asked for."""
    result: dict[str, Any] = {}
    singles = [21, 60, 120] if small else [21, 30, 60, 90, 105, 120, 135, 150, 180, 240, 300, 399]
    batches = [(8, 20)] if small else [(64, 20), (16, 90), (16, 120), (16, 150)]
    against = [(1, 20), (8, 20), (1, 99)] if small else [(1, 20), (64, 20), (1, 201), (1, 501), (1, 999)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder, small, seed)
        short = folder / f"{SHORT}.jpt"
        if "aimnet" in parts and importlib.util.find_spec("aimnet") is None:
            result["aimnet"] = {"skipped": "The package aimnet is not installed: not compared."}
        elif "aimnet" in parts:
            shapes = [(*shape, False) for shape in against] + [(1, 8 if small else 20, True)]
            result["aimnet"] = in_own_process(measure_aimnet, short, small, shapes, repeats, seed)
            result["aimnet"]["version"] = importlib.metadata.version("aimnet")
        if "threshold" in parts:
            shapes = [(1, n) for n in singles] + batches
            result["threshold"] = in_own_process(measure_threshold, short, shapes, repeats, seed)
        if "size" in parts:
            result["size"] = measure_sizes(folder, sizes, repeats, seed)
    return result


@click.command(context_settings={"show_default": True})
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="JSON file; .md and .png are put beside."
)
@click.option("--only", "parts", multiple=True, type=click.Choice(PARTS), help="Part to measure; repeatable. [all]")
@click.option(
    "--atoms",
    "sizes",
    multiple=True,
    type=click.IntRange(12),
    default=(100, 300, 1000, 3000, 10000, 20000),
    help="Sizes of the part size, about; repeatable.",
)
@click.option("--repeats", type=click.IntRange(1), default=3, help="Turns of each call; processes, in the part size.")
@click.option("--small", is_flag=True, help="The small example model and a few small systems: a minute.")
@click.option("--seed", type=int, default=0, help="Of weights and systems.")
@user_errors
def main(output: Path, parts: tuple[str, ...], sizes: tuple[int, ...], repeats: int, small: bool, seed: int) -> None:
    """Time compiled models by size, by layout, and against the aimnet package."""
    check_output(output)
    chosen = list(parts) or list(PARTS)
    if small:
        sizes, repeats = (100, 300), 1
    torch.set_num_threads(1)
    result = measure(chosen, sorted(set(sizes)), small, repeats, seed)
    result |= {
        "machine": {"device": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": versions(),
        "arguments": {"parts": chosen, "atoms": sorted(set(sizes)), "repeats": repeats, "small": small, "seed": seed},
    }
    drawn = "size" in result and importlib.util.find_spec("matplotlib") is not None
    picture = output.with_suffix(".png") if drawn else None
    if picture is not None:
        draw(result["size"]["rows"], picture)
    write_results(output, result, markdown(result, picture and picture.name), *([picture] if picture else []))


if __name__ == "__main__":
    main()
