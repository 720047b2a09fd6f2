"""Whether training on millions of molecules costs no more memory than on thousands, and waits for no data.

Datasets of 10 thousand and of many more molecules are generated: three levels of theory with different labels, the
largest of them in two files, 2 to 40 atoms of organic elements. Then, each in a process of its own, are measured

- opening, and the time until the first batch, with the files in the page cache of the system and without,
- molecules per second that the loader gives, with 0, 1 and 2 workers,
- molecules per second that training steps of the full-size model consume (energies, forces, charges; AdamW),
- resident memory (VmRSS and its peak, VmHWM: pages of files count, too) of a process that trains some steps and then
  draws batches until as many molecules have passed as a share of the larger dataset holds.

    python benchmarks/data_scale.py --molecules 2000000 --output benchmarks/results/data_scale.json
    python benchmarks/data_scale.py --small --output data_scale.json
    python benchmarks/data_scale.py --molecules 10000000 --narrow --opening-only --output data_scale_opening.json
"""

import contextlib
import itertools
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from report import check_output, processor, write_results
from tqdm import tqdm

from aimnet2mult.data.loaders import MoleculeLoader, make_loader
from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.data.sampler import MixedFidelityBatchSampler
from aimnet2mult.data.sgdataset import dataset_writer
from aimnet2mult.models.base import build_model, load_model_config, versions
from aimnet2mult.modules import Forces
from aimnet2mult.train.engine import make_step
from aimnet2mult.train.loss import MTLoss
from aimnet2mult.utils.cli import user_errors

REFERENCE = 10_000
"""Molecules of the small dataset."""

SIZES = np.arange(2, 41)
"""Atoms of a molecule."""

MEDIAN_SIZE, SIZE_SPREAD = 19.0, 0.45
"""Median of the log-normal distribution of sizes, and its standard deviation in ln(atoms)."""

ELEMENTS = {1: 0.50, 6: 0.30, 7: 0.07, 8: 0.09, 9: 0.015, 16: 0.015, 17: 0.01}
"""Share of each element among the atoms."""

SAE = {1: -13.6, 6: -1036.2, 7: -1488.2, 8: -2044.7, 9: -2715.3, 16: -10832.3, 17: -12521.7}
"""Self-atomic energies, eV."""

LATTICE = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
"""(64, 3) places for atoms, in units of `SPACING`; those nearest to the middle come first."""
LATTICE = LATTICE[np.argsort(((LATTICE - 1.4) ** 2).sum(axis=1), kind="stable")]

SPACING, JITTER = 1.5, 0.12
"""Å: distance of neighbouring places, and standard deviation of the atoms around them."""

PIECE = 8192
"""Molecules made at a time."""


class Level(NamedTuple):
    """A level of theory: its share of all molecules, its labels, its files and the type of its real numbers."""

    name: str
    share: float
    labels: tuple[str, ...]
    files: int
    dtype: type


LEVELS = (
    Level("gfn2", 0.70, ("forces", "charges"), 2, np.float64),
    Level("wb97m", 0.25, ("forces", "charges", "spin_charges"), 1, np.float32),
    Level("ccsd", 0.05, (), 1, np.float32),
)

PER_ATOM_LOSS = "aimnet2mult.train.loss.peratom_loss_fn"
LOSS = {
    "energy": {"fn": "aimnet2mult.train.loss.energy_loss_fn", "weight": 1.0},
    **{
        key: {"fn": PER_ATOM_LOSS, "weight": 1.0, "kwargs": {"key_true": key, "key_pred": key}}
        for key in ("forces", "charges", "spin_charges")
    },
}


# --------------------------------------------------------------------------------------------------
# data
# --------------------------------------------------------------------------------------------------


def generate(folder: Path, n_molecules: int, narrow: bool) -> dict[int, str]:
    """Write the files of all levels; return the pattern of the names of each fidelity's files.

    ``narrow`` writes energies only, numbers as int8 and positions as float16: what a disk without much room can hold.
    """
    patterns = {}
    with tqdm(total=n_molecules, unit="molecules", unit_scale=True, desc="writing", disable=None, leave=False) as bar:
        for fidelity, level in enumerate(LEVELS):
            n_files = 1 if narrow else level.files
            for part in range(n_files):
                rng = np.random.default_rng([n_molecules, fidelity, part])
                counts = size_counts(max(len(SIZES), round(level.share * n_molecules / n_files)))
                with dataset_writer(folder / f"{level.name}_{part}.h5", counts) as writer:
                    for n_atoms, n_rows in counts.items():
                        for first in range(0, n_rows, PIECE):
                            rows = min(PIECE, n_rows - first)
                            writer.write(n_atoms, first, molecules(rng, rows, n_atoms, level, narrow))
                            bar.update(rows)
            patterns[fidelity] = str(folder / f"{level.name}_*.h5")
    return patterns


def size_counts(n_molecules: int) -> dict[int, int]:
    """Number of molecules of each size, at least one."""
    weights = np.exp(-0.5 * (np.log(SIZES / MEDIAN_SIZE) / SIZE_SPREAD) ** 2) / SIZES
    counts = np.maximum(1, np.floor(weights / weights.sum() * n_molecules)).astype(int)
    counts[np.argmax(counts)] += n_molecules - counts.sum()
    return dict(zip(SIZES.tolist(), counts.tolist(), strict=True))


def molecules(
    rng: np.random.Generator, n_molecules: int, n_atoms: int, level: Level, narrow: bool
) -> dict[str, np.ndarray]:
    """Arrays of molecules of one size: atoms scattered around places of a lattice, so that none come too close."""
    n_places = min(len(LATTICE), 2 * n_atoms)
    places = LATTICE[rng.random((n_molecules, n_places), np.float32).argsort(axis=1)[:, :n_atoms]]
    coord = SPACING * places + rng.normal(0.0, JITTER, places.shape)
    z, shares = np.array(list(ELEMENTS)), np.array(list(ELEMENTS.values()))
    drawn = np.searchsorted(np.cumsum(shares)[:-1], rng.random((n_molecules, n_atoms), np.float32))
    numbers = z[drawn]
    energy = np.array(list(SAE.values()))[drawn].sum(axis=1) + rng.normal(-4.0 * n_atoms, np.sqrt(n_atoms), n_molecules)
    if narrow:
        return {
            "coord": coord.astype(np.float16),
            "numbers": numbers.astype(np.int8),
            "charge": np.zeros(n_molecules, np.int8),
            "energy": energy,
        }
    arrays = {
        "coord": coord.astype(level.dtype),
        "numbers": numbers.astype(np.int32),
        "charge": np.zeros(n_molecules, np.float32),
        "mult": (1 + numbers.sum(axis=1) % 2).astype(np.float32),
        "energy": energy,
    }
    noise = {"forces": (n_molecules, n_atoms, 3), "charges": numbers.shape, "spin_charges": numbers.shape}
    for key in level.labels:
        values = rng.standard_normal(noise[key], np.float32)
        values -= values.mean(axis=1, keepdims=True)  # no net force, no net charge
        arrays[key] = values.astype(level.dtype)
    return arrays


def forget_pages(patterns: dict[int, str]) -> None:
    """Ask the system to drop the files from its page cache."""
    for pattern in patterns.values():
        for path in Path(pattern).parent.glob(Path(pattern).name):
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def touch_pages(patterns: dict[int, str]) -> None:
    """Read the files once, so that the system has them in its page cache if they fit."""
    for pattern in patterns.values():
        for path in Path(pattern).parent.glob(Path(pattern).name):
            with open(path, "rb", buffering=0) as file:
                while file.read(2**24):
                    pass


# --------------------------------------------------------------------------------------------------
# measurements, each in a process of its own
# --------------------------------------------------------------------------------------------------


def in_own_process(function: Callable[..., Any], *arguments: object) -> Any:
    """Result of a function that is called in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def memory(pid: int | str = "self") -> dict[str, float]:
    """Memory of a process in MB: resident, its peak, and the part that it shares with no other process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    rollup = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    private = sum(int(words[1]) for words in rollup if words[0] in ("Private_Clean:", "Private_Dirty:"))
    kilobytes = {"resident": int(status["VmRSS"].split()[0]), "peak": int(status["VmHWM"].split()[0])}
    return {name: value / 1e3 * 1.024 for name, value in (kilobytes | {"private": private}).items()}


def open_loader(
    patterns: dict[int, str], atoms: int, num_workers: int = 0
) -> tuple[MoleculeLoader, Iterator[Any], dict[str, float]]:
    """Loader, batches after the first one, and the seconds that each step to the first batch took."""
    start = time.perf_counter()
    dataset = MixedFidelityDataset(patterns, dict.fromkeys(patterns, SAE))
    opened = time.perf_counter()
    sampler = MixedFidelityBatchSampler(dataset.n_atoms, dataset.fidelities, batch_size=atoms, batch_mode="atoms")
    loader = make_loader(dataset, sampler, num_workers=num_workers)
    batches = endless(loader)
    made = time.perf_counter()
    next(batches)
    done = time.perf_counter()
    seconds = {"dataset": opened - start, "sampler": made - opened, "batch": done - made, "total": done - start}
    return loader, batches, seconds


def endless(loader: MoleculeLoader) -> Iterator[Any]:
    """Batches of epoch after epoch."""
    for epoch in itertools.count():
        loader.batch_sampler.set_epoch(epoch)
        yield from loader


def opening(patterns: dict[int, str], atoms: int) -> dict[str, Any]:
    """Seconds until the first batch, and memory then."""
    before = memory()
    _, _, seconds = open_loader(patterns, atoms)
    return {"seconds": seconds, "memory before": before, "memory after": memory()}


def throughput(patterns: dict[int, str], atoms: int, num_workers: int, duration: float) -> float:
    """Molecules per second that the loader gives."""
    _, batches, _ = open_loader(patterns, atoms, num_workers)
    for _ in range(20):  # workers have started, and have read ahead what they may
        next(batches)
    drawn, start = 0, time.perf_counter()
    while time.perf_counter() < start + duration:
        x, _ = next(batches)
        drawn += len(x["numbers"])
    return drawn / (time.perf_counter() - start)


def training(
    patterns: dict[int, str], atoms: int, num_workers: int, steps: int, draws: int, full_size: bool
) -> dict[str, Any]:
    """Memory of a process that trains ``steps`` steps and then draws ``draws`` molecules; seconds per step."""
    _, batches, _ = open_loader(patterns, atoms, num_workers)
    small = Path(__file__).parents[1] / "examples" / "config" / "model_small.yaml"
    model = Forces(build_model(load_model_config(None if full_size else small), num_fidelities=len(LEVELS)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    take_step = make_step(model, optimizer, MTLoss(LOSS), "cpu", max_grad_norm=1.0)
    seconds, sizes = [], []
    for _ in range(steps):
        batch = next(batches)
        start = time.perf_counter()
        take_step([batch])
        seconds.append(time.perf_counter() - start)
        sizes.append(len(batch[0]["numbers"]))
    after_steps = memory()
    drawn, highest = 0, 0.0
    for count in itertools.count(1):
        x, _ = next(batches)
        drawn += len(x["numbers"])
        if count % 50 == 0:
            highest = max(highest, memory()["resident"])
        if drawn >= draws:
            break
    warm = slice(min(3, steps - 1), None)
    return {
        "seconds per step": statistics.median(seconds[warm]),
        "molecules per step": statistics.mean(sizes),
        "molecules per second": sum(sizes[warm]) / sum(seconds[warm]),
        "threads": torch.get_num_threads(),
        "molecules drawn": drawn,
        "memory after the steps": after_steps,
        "memory at the end": memory(),
        "highest resident memory while drawing": highest,
        "workers": [memory(process.pid) for process in multiprocessing.active_children()],
    }


def measure(folder: Path, n_molecules: int, options: dict[str, Any]) -> dict[str, Any]:
    """Generate a dataset and measure everything about it."""
    atoms, duration = options["atoms"], options["seconds"]
    folder.mkdir()
    start = time.perf_counter()
    patterns = generate(folder, n_molecules, options["narrow"])
    result: dict[str, Any] = {
        "molecules": n_molecules,
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "seconds to generate": time.perf_counter() - start,
    }
    os.sync()  # pages that are not yet on the disk cannot be dropped
    forget_pages(patterns)
    result["first batch, from disk"] = in_own_process(opening, patterns, atoms)
    if not options["opening_only"]:
        forget_pages(patterns)
        result["molecules per second, from disk"] = in_own_process(throughput, patterns, atoms, 0, duration)
    touch_pages(patterns)
    result["first batch"] = in_own_process(opening, patterns, atoms)
    if options["opening_only"]:
        return result
    result["molecules per second"] = {
        str(workers): in_own_process(throughput, patterns, atoms, workers, duration) for workers in (0, 1, 2)
    }
    draws = round(options["share"] * options["molecules"])
    for workers in (0, 2):
        arguments = (patterns, atoms, workers, options["steps"], draws, not options["small"])
        result[f"training, {workers} workers"] = in_own_process(training, *arguments)
    return result


# --------------------------------------------------------------------------------------------------
# report
# --------------------------------------------------------------------------------------------------


def summary(small: dict[str, Any], large: dict[str, Any]) -> dict[str, float]:
    """The numbers that matter: what the larger dataset costs more, and how far ahead of the steps the loader is."""
    step = large["training, 0 workers"]["molecules per second"]
    return {
        "difference of the peak memory, MB": (
            large["training, 0 workers"]["memory at the end"]["peak"]
            - small["training, 0 workers"]["memory at the end"]["peak"]
        ),
        "difference of the resident memory, MB": (
            large["training, 0 workers"]["highest resident memory while drawing"]
            - small["training, 0 workers"]["highest resident memory while drawing"]
        ),
        "seconds to the first batch": large["first batch"]["seconds"]["total"],
        "seconds to the first batch, from disk": large["first batch, from disk"]["seconds"]["total"],
        **{f"loader / step, {workers} workers": rate / step for workers, rate in large["molecules per second"].items()},
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    arguments, machine, datasets = result["arguments"], result["machine"], result["datasets"]

    def row(name: str, value: Callable[[dict[str, Any]], str]) -> str:
        return f"| {name} | " + " | ".join(value(dataset) for dataset in datasets) + " |"

    def seconds(key: str) -> Callable[[dict[str, Any]], str]:
        return lambda d: "{total:.2f} ({dataset:.2f}, {sampler:.2f}, {batch:.2f})".format(**d[key]["seconds"])

    def trained(workers: int, *keys: str) -> Callable[[dict[str, Any]], str]:
        def value(dataset: dict[str, Any]) -> str:
            number = dataset[f"training, {workers} workers"]
            for key in keys:
                number = number[key]
            return f"{number:.0f}"

        return value

    lines = [
        "# Data at scale",
        "",
        "Made by `benchmarks/data_scale.py`, which says how.",
        "",
        f"- {machine['device']}, {machine['cores']} cores, {machine['memory']:.0f} GB of memory; "
        f"{result['load']:.1f} other processes were running when it began",
        f"- {', '.join(f'{name} {version}' for name, version in result['versions'].items())}",
        f"- batches of {arguments['atoms']} atoms" + (", energies only" if arguments["narrow"] else ""),
        "",
        "| | " + " | ".join(f"{dataset['molecules']:,} molecules" for dataset in datasets) + " |",
        "| --- |" + " ---: |" * len(datasets),
        row("files, MB", lambda d: f"{d['bytes'] / 1e6:,.0f}"),
        row("s to the first batch (dataset, sampler, batch)", seconds("first batch")),
        row("the same, from disk", seconds("first batch, from disk")),
        row("peak memory by then, MB", lambda d: f"{d['first batch']['memory after']['peak']:.0f}"),
    ]
    if "summary" in result:
        lines += [
            *(
                row(
                    f"loader, {workers} workers, molecules/s",
                    lambda d, w=workers: f"{d['molecules per second'][w]:,.0f}",
                )
                for workers in ("0", "1", "2")
            ),
            row("loader, 0 workers, from disk, molecules/s", lambda d: f"{d['molecules per second, from disk']:,.0f}"),
            row("training step, molecules/s", trained(0, "molecules per second")),
            row("molecules drawn in one process", trained(0, "molecules drawn")),
            row("its memory after the steps, MB", trained(0, "memory after the steps", "resident")),
            row("its highest memory while drawing, MB", trained(0, "highest resident memory while drawing")),
            row("its peak memory, MB", trained(0, "memory at the end", "peak")),
            row("with 2 workers: peak of the training process, MB", trained(2, "memory at the end", "peak")),
            row(
                "with 2 workers: peak of a worker (private memory at the end), MB",
                lambda d: ", ".join(
                    f"{w['peak']:.0f} ({w['private']:.0f})" for w in d["training, 2 workers"]["workers"]
                ),
            ),
            "",
            *(f"- {name}: {value:,.1f}" for name, value in result["summary"].items()),
        ]
    return "\n".join(lines) + "\n"


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "device": processor(),
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
    }


@click.command(context_settings={"show_default": True})
@click.option("--output", required=True, type=click.Path(path_type=Path), help="JSON file; a .md is written beside it.")
@click.option("--molecules", type=click.IntRange(min=REFERENCE), default=2_000_000, help="Size of the larger dataset.")
@click.option("--atoms", type=click.IntRange(min=1), default=1500, help="Atoms in a batch, with padding.")
@click.option("--steps", type=click.IntRange(min=1), default=20, help="Training steps.")
@click.option(
    "--share", type=click.FloatRange(0, 10), default=0.5, help="Molecules drawn, as a share of the larger data."
)
@click.option(
    "--seconds", type=click.FloatRange(min=0.1), default=20.0, help="Duration of a measurement of the loader."
)
@click.option("--small", is_flag=True, help="Quick: 50 000 molecules, the small example model, short measurements.")
@click.option("--narrow", is_flag=True, help="Energies only and narrow types, for very many molecules.")
@click.option("--opening-only", is_flag=True, help="Measure opening and the first batch only.")
@click.option(
    "--folder", type=click.Path(path_type=Path, exists=True, file_okay=False), help="For the data [default: temporary]."
)
@click.option("--keep", is_flag=True, help="Do not delete the data.")
@user_errors
def main(output: Path, folder: Path | None, keep: bool, **options: Any) -> None:
    """Measure time, memory and throughput of the data pipeline with few and with many molecules. Linux only."""
    check_output(output)
    if options["small"]:
        options |= {"molecules": 50_000, "steps": 5, "seconds": 1.0}
    # As the command line of the training does; OpenMP reads it in the processes that measure.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    data = Path(tempfile.mkdtemp(prefix="data_scale_", dir=folder))
    load = os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        if not keep:
            stack.callback(shutil.rmtree, data)
        datasets = [measure(data / str(n), n, options) for n in (REFERENCE, options["molecules"])]
    result = {
        "arguments": options,
        "machine": machine(),
        "load": load,
        "versions": versions() | {"numpy": np.__version__},
        "datasets": datasets,
    }
    if not options["opening_only"]:
        result["summary"] = summary(*datasets)
    write_results(output, result, markdown(result), *([data] if keep else []))


if __name__ == "__main__":
    main()
