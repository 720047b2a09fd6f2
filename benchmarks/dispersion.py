"""What D3(BJ) costs beside the packages that do nothing else: energy and gradient of water clusters, one thread.

Our module is measured as it is in a compiled file (scripted, elements fixed), in float64 and float32: small molecules
in dense layout, larger clusters flat, with the search for pairs. The other packages (dftd3, tad-dftd3, torch-dftd) are
measured where they are installed, by their own call from Python, in float64. All take turns in one process, and the
least time of several is reported. Peak memory is that of a process of its own, less what it had before.

    OMP_NUM_THREADS=1 python benchmarks/dispersion.py --output benchmarks/results/dispersion.json
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from report import check_output, installed, package_versions, processor, write_results
from torch import Tensor

from aimnet2mult import nbops
from aimnet2mult.dispersion import DFTD3
from aimnet2mult.models.jit_wrapper import DENSE_LIMIT
from aimnet2mult.utils.cli import user_errors
from aimnet2mult.utils.units import BOHR_ANGSTROM, HARTREE_EV

PARAMETERS = {"s6": 1.0, "s8": 0.7875, "a1": 0.4289, "a2": 4.4407}
"""PBE-D3(BJ)."""

WATER = np.array([[0.0, 0.0, 0.0], [0.9572, 0.0, 0.0], [-0.24, 0.927, 0.0]])
MOLECULE_SPACING = 3.104
"""Edge of the cube that a molecule of liquid water has for itself, Å."""

OURS, OURS32, DFTD3_NAME, TAD, TORCH_DFTD = "ours, float64", "ours, float32", "dftd3", "tad-dftd3", "torch-dftd"
REFERENCE = DFTD3_NAME
LARGEST_OF_PEER = {TAD: 1000, TORCH_DFTD: 1000}
"""Packages whose memory grows with 25 or 49 numbers a pair are left out of larger systems."""

Call = Callable[[], tuple[float, float]]
"""Energy and gradient; returns the sum of the energies, Hartree, and the largest gradient, Hartree/Bohr."""


def water_cluster(n_atoms: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Atomic numbers and coordinates (Å) of water molecules in a sphere, turned at random; the last may be cut."""
    n_molecules = -(-n_atoms // 3)
    reach = int(np.ceil(n_molecules ** (1 / 3))) + 1
    grid = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 3, indexing="ij"), -1).reshape(-1, 3)
    centers = MOLECULE_SPACING * grid[np.argsort((grid**2).sum(1), kind="stable")[:n_molecules]]
    rng = np.random.default_rng(seed)
    turns = np.linalg.qr(rng.normal(size=(n_molecules, 3, 3)))[0]
    atoms = WATER @ turns + (centers + 0.1 * rng.normal(size=centers.shape))[:, None]
    return np.tile([8, 1, 1], n_molecules)[:n_atoms], atoms.reshape(-1, 3)[:n_atoms]


def our_call(numbers: np.ndarray, coord: np.ndarray, dtype: torch.dtype) -> Call:
    """Our module for molecules (B, N)."""
    model = DFTD3(**PARAMETERS)
    model.set_species([1, 6, 7, 8])
    model = torch.jit.script(model)
    batch = nbops.internal_batch(
        {"coord": torch.tensor(coord, dtype=dtype), "numbers": torch.tensor(numbers)}, 5.0, DENSE_LIMIT
    )
    if nbops.is_flat(batch):
        batch["_first_order"] = torch.zeros(0)

    def call() -> tuple[float, float]:
        leaf = batch["coord"].detach().requires_grad_()
        with torch.jit.optimized_execution(False):
            energy = model({**batch, "coord": leaf})["energy"].sum()
            gradient = torch.autograd.grad(energy, leaf)[0]
        return energy.item() / HARTREE_EV, gradient.abs().max().item() * BOHR_ANGSTROM / HARTREE_EV

    return call


def dftd3_call(numbers: np.ndarray, coord: np.ndarray) -> Call:
    """Package dftd3, a molecule after the other."""
    from dftd3.interface import DispersionModel, RationalDampingParam

    damping = RationalDampingParam(**PARAMETERS, s9=0.0)

    def call() -> tuple[float, float]:
        results = [
            DispersionModel(z, x / BOHR_ANGSTROM).get_dispersion(damping, grad=True)
            for z, x in zip(numbers, coord, strict=True)
        ]
        return sum(float(r["energy"]) for r in results), max(np.abs(r["gradient"]).max() for r in results)

    return call


def tad_call(numbers: np.ndarray, coord: np.ndarray) -> Call:
    """Package tad-dftd3, all molecules together."""
    import tad_dftd3

    damping = {key: torch.tensor(value, dtype=torch.float64) for key, value in (PARAMETERS | {"s9": 0.0}).items()}
    z, x = torch.tensor(numbers), torch.tensor(coord / BOHR_ANGSTROM)

    def call() -> tuple[float, float]:
        leaf: Tensor = x.detach().requires_grad_()
        energy = tad_dftd3.dftd3(z, leaf, damping).sum()
        return energy.item(), torch.autograd.grad(energy, leaf)[0].abs().max().item()

    return call


def torch_dftd_call(numbers: np.ndarray, coord: np.ndarray) -> Call:
    """Package torch-dftd, all molecules together, with the range of the pairs that dftd3 has."""
    from ase import Atoms
    from torch_dftd.torch_dftd3_calculator import TorchDFTD3Calculator

    calculator = TorchDFTD3Calculator(
        device="cpu", damping="bj", xc="pbe", dtype=torch.float64, cutoff=60.0 * BOHR_ANGSTROM
    )
    molecules = [Atoms(z, x) for z, x in zip(numbers, coord, strict=True)]

    def call() -> tuple[float, float]:
        results = calculator.batch_calculate(molecules, properties=["energy", "forces"])
        largest = max(np.abs(r["forces"]).max() for r in results) * BOHR_ANGSTROM / HARTREE_EV
        return sum(r["energy"] for r in results) / HARTREE_EV, largest

    return call


PEERS = {DFTD3_NAME: dftd3_call, TAD: tad_call, TORCH_DFTD: torch_dftd_call}


def highest_memory() -> float:
    """Peak of the memory of this process so far, MiB; what the system does not tell (only Linux does) is 0."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def _measure_peak(numbers: np.ndarray, coord: np.ndarray, dtype: torch.dtype, queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    our_call(*(x[None] for x in water_cluster(450, 0)), dtype)()  # the code itself is not the subject
    before = highest_memory()
    our_call(numbers, coord, dtype)()
    queue.put(highest_memory() - before)


def peak_memory(numbers: np.ndarray, coord: np.ndarray, dtype: torch.dtype) -> float:
    """Peak memory of a call of our module in a process of its own, MiB."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure_peak, args=(numbers, coord, dtype, queue))
    process.start()
    peak = queue.get()
    process.join()
    return peak


def measure(n_molecules: int, n_atoms: int, repeats: int, peers: list[str], seed: int) -> dict:
    """One row: least time of each package, largest difference to `REFERENCE`, memory."""
    clusters = [water_cluster(n_atoms, seed + k) for k in range(n_molecules)]
    numbers, coord = np.stack([z for z, _ in clusters]), np.stack([x for _, x in clusters])
    calls = {OURS: our_call(numbers, coord, torch.float64), OURS32: our_call(numbers, coord, torch.float32)}
    for name in peers:
        if n_atoms <= LARGEST_OF_PEER.get(name, n_atoms):
            calls[name] = PEERS[name](numbers, coord)
    results = {name: call() for name, call in calls.items()}  # warms up, too
    times = {name: float("inf") for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name] = min(times[name], time.perf_counter() - start)
    expected = results.get(REFERENCE)
    return {
        "molecules": n_molecules,
        "atoms": n_atoms,
        "seconds": times,
        "energy difference": {} if expected is None else {k: r[0] - expected[0] for k, r in results.items()},
        "peak MiB": {
            OURS: peak_memory(numbers, coord, torch.float64),
            OURS32: peak_memory(numbers, coord, torch.float32),
        },
    }


def markdown(result: dict) -> str:
    """The result as a page."""
    peers = result["peers"]
    names = [OURS, OURS32, *peers]
    lines = [
        "# D3(BJ) energy and gradient of water clusters, one thread",
        "",
        "Made by `benchmarks/dispersion.py`, which says how.",
        "",
        f"- least of {result['arguments']['repeats']} times; {result['machine']['processor']}",
        f"- {', '.join(f'{name} {version}' for name, version in result['versions'].items())}",
        "- an empty field: too much memory needed, or not installed",
        "",
        f"| molecules x atoms | {' | '.join(f'{name}, ms' for name in names)} | "
        f"{' | '.join(f'{name} / {OURS}' for name in peers)} | {' | '.join(f'{name} / {OURS32}' for name in peers)} | "
        "memory float64, float32, MiB |",
        "|" + " --- |" * (2 + len(names) + 2 * len(peers)),
    ]
    for row in result["rows"]:
        seconds = row["seconds"]
        fields = [f"{1e3 * seconds[name]:.2f}" if name in seconds else "" for name in names]
        for own in (OURS, OURS32):
            fields += [f"{seconds[name] / seconds[own]:.1f}" if name in seconds else "" for name in peers]
        memory = ", ".join(f"{value:.0f}" for value in row["peak MiB"].values())
        lines.append(f"| {row['molecules']} x {row['atoms']} | {' | '.join(fields)} | {memory} |")
    differences = [
        f"{name}: {max(abs(row['energy difference'][name]) for row in result['rows'] if name in row['seconds']):.0e}"
        for name in names
        if name != REFERENCE and REFERENCE in peers
    ]
    if differences:
        lines += ["", f"Largest difference of an energy to {REFERENCE}, Hartree: {', '.join(differences)}."]
    return "\n".join(lines) + "\n"


@click.command(context_settings={"show_default": True})
@click.option("--output", required=True, type=click.Path(path_type=Path), help="JSON file; a .md is written beside it.")
@click.option(
    "--atoms",
    multiple=True,
    type=click.IntRange(3),
    default=(20, 100, 300, 1000, 3000),
    help="Atoms of a cluster; repeatable.",
)
@click.option("--batch", type=click.IntRange(1), default=64, help="Molecules of 20 atoms in the row that is a batch.")
@click.option("--repeats", type=click.IntRange(1), default=5, help="Times that each call is measured.")
@click.option("--seed", type=int, default=0, help="Of the clusters.")
@user_errors
def main(output: Path, atoms: tuple[int, ...], batch: int, repeats: int, seed: int) -> None:
    """Time the D3(BJ) energy and gradient of water clusters, here and in other packages."""
    check_output(output)
    torch.set_num_threads(1)
    peers = [name for name in PEERS if installed(name)]
    rows = [measure(1, n, repeats, peers, seed) for n in atoms]
    rows.append(measure(batch, 20, repeats, peers, seed))
    result = {
        "rows": rows,
        "peers": peers,
        "machine": {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": package_versions(*peers),
        "arguments": {"atoms": list(atoms), "batch": batch, "repeats": repeats, "seed": seed},
    }
    write_results(output, result, markdown(result))


if __name__ == "__main__":
    main()
