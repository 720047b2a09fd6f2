"""What a training step of 1000 atoms costs, eager and compiled, against its matrix products and the `aimnet` package.

Batches of made-up molecules (points of a grid, moved at random; elements H, C, N, O) go through the training step of
`aimnet2mult.train.engine` with energies, forces and charges in the loss: molecules of one size, the same with three
fidelities, of 5 to 40 atoms with three fidelities, and of very uneven sizes.

The floor is what the matrix products of the step of one size take: they are recorded in it and computed again with
random matrices of the same shapes and strides, one set for each shape. Where the `aimnet` package is installed, its
network makes the same step, eager, with the same loss and optimizer: of padded batches, and of the very uneven one in
flat layout with lists of neighbours that are made beforehand (padded, it took 50 s with the small model). It has no
fidelities, so all molecules are of one there. Everything takes turns in one process; medians of its CPU time are
reported (one thread).

    OMP_NUM_THREADS=1 python benchmarks/training.py --compile --output benchmarks/results/training.json
"""

import importlib.util
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from compiled import aimnet_network, cpu_seconds
from energy_only import LOSS, SMALL_MODEL, make_step
from report import check_output, package_versions, processor, write_results
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from aimnet2mult.constants import FIDELITY_OFFSET
from aimnet2mult.models.base import build_model, load_model_config
from aimnet2mult.modules import Forces
from aimnet2mult.nbops import decode_fidelity, encode_fidelity
from aimnet2mult.neighborlist import neighbor_matrix
from aimnet2mult.train.acceleration import CompiledForces
from aimnet2mult.train.engine import Batch
from aimnet2mult.train.loss import MTLoss
from aimnet2mult.utils.cli import user_errors
from aimnet2mult.utils.files import atomic_path

ATOMS = 1000
ELEMENTS = (1, 1, 6, 7, 8)
GRID_SPACING, MOVED = 2.1, 0.1
"""Å: distance of neighbours in the grid, standard deviation of each coordinate."""

ONE_SIZE, FIDELITIES, MIXED, UNEVEN = (
    "one size",
    "one size, three fidelities",
    "sizes 5-40 mixed, three fidelities",
    "very uneven",
)
N_FIDELITIES = {ONE_SIZE: 1, FIDELITIES: 3, MIXED: 3, UNEVEN: 1}
EAGER, COMPILED, AIMNET, FLOOR = "eager", "compiled", "aimnet", "matrix products"

COMPONENTS = {key: LOSS[key] for key in ("energy", "forces", "charges")}
MAX_GRAD_NORM = 10.0
CUTOFF = 5.0
"""Of the network, Å."""
MOST_PADDING = 3
"""Places per atom beyond which the aimnet package gets lists of neighbours: the rest is padding."""

PRODUCTS = {
    "aten::mm": torch.mm,
    "aten::addmm": torch.mm,
    "aten::bmm": torch.bmm,
    "aten::baddbmm": torch.bmm,
}
"""Operation -> the product in it."""

Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides."""
Product = tuple[str, Layout, Layout]
"""Operation and its two factors."""
Call = Callable[[], Any]


# --------------------------------------------------------------------------------------------------
# batches
# --------------------------------------------------------------------------------------------------


def molecule_sizes(kind: str, seed: int) -> list[int]:
    """Atoms of each molecule of a batch of `ATOMS` atoms."""
    if kind == UNEVEN:
        return [5] * 60 + [10] * 20 + [100] * 3 + [200]
    if kind != MIXED:
        return [20] * 50
    rng = np.random.default_rng(seed)
    sizes: list[int] = []
    while (left := ATOMS - sum(sizes)) > 40:
        sizes.append(int(rng.integers(5, min(40, left - 5) + 1)))
    return [*sizes, left]


def make_batch(sizes: list[int], n_fidelities: int, seed: int) -> tuple[Batch, Batch]:
    """Padded inputs and labels, as `data.collate` makes them, of molecules of the sizes given; fidelities in turn."""
    rng = np.random.default_rng(seed)
    shape = (len(sizes), max(sizes))
    coord, numbers = np.zeros((*shape, 3), np.float32), np.zeros(shape, np.int64)
    for m, n_atoms in enumerate(sizes):
        edge = np.arange(math.ceil(n_atoms ** (1 / 3)))
        grid = GRID_SPACING * np.stack(np.meshgrid(edge, edge, edge, indexing="ij"), -1).reshape(-1, 3)[:n_atoms]
        coord[m, :n_atoms] = grid + MOVED * rng.normal(size=grid.shape)
        numbers[m, :n_atoms] = rng.choice(ELEMENTS, n_atoms)
    fidelities = np.arange(len(sizes)) % n_fidelities
    encoded = encode_fidelity(numbers, fidelities[:, None], FIDELITY_OFFSET)
    x = {
        "coord": torch.tensor(coord),
        "numbers": torch.tensor(encoded),
        "charge": torch.zeros(len(sizes)),
        "mult": torch.ones(len(sizes)),
        "_fidelities": torch.tensor(fidelities),
    }
    generator = torch.Generator().manual_seed(seed)
    y = {
        "energy": torch.randn(len(sizes), generator=generator, dtype=torch.float64),
        "forces": torch.randn(*shape, 3, generator=generator),
        "charges": torch.randn(*shape, generator=generator),
    }
    return x, y | {f"{key}_mask": torch.ones(len(sizes), dtype=torch.bool) for key in y}


# --------------------------------------------------------------------------------------------------
# the floor
# --------------------------------------------------------------------------------------------------


class RecordProducts(TorchDispatchMode):
    """Keeps operation and layouts of the factors of the matrix products (`PRODUCTS`) that run inside, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; a product is kept."""
        name = func.name()
        if name in PRODUCTS:
            one, other = ((tuple(t.shape), tuple(t.stride())) for t in args[-2:])
            self.products.append((name, one, other))
        return func(*args, **(kwargs or {}))


def random_tensor(layout: Layout) -> Tensor:
    """Normal random numbers of some shape and strides."""
    shape, strides = layout
    if 0 in shape:
        return torch.empty(shape)
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    return torch.randn(size).as_strided(shape, strides)


class Replay:
    """Computes the products of a step, in their order, with random matrices of the same shapes and strides.

    Matrices of one layout are one, to spare memory, so that the processor finds more of them in its cache than in the
    step: the floor is low rather than high.
    """

    def __init__(self, products: list[Product]) -> None:
        kept: dict[Layout, list[Tensor]] = {}

        def factor(layout: Layout, place: int) -> Tensor:
            """Matrices are shared between products; the two factors of one are different matrices."""
            known = kept.setdefault(layout, [])
            while len(known) <= place:
                known.append(random_tensor(layout))
            return known[place]

        self.calls = [
            (PRODUCTS[name], factor(one, 0), factor(other, 1 if one == other else 0)) for name, one, other in products
        ]

    def __call__(self) -> None:
        """Compute all products once."""
        with torch.no_grad():
            for product, one, other in self.calls:
                product(one, other)


def operations(products: list[Product]) -> float:
    """Multiplications and additions in the products."""
    return sum(2.0 * math.prod(one[0]) * other[0][-1] for _, one, other in products)


# --------------------------------------------------------------------------------------------------
# steps
# --------------------------------------------------------------------------------------------------


def our_step(config: dict, kind: str, batch: tuple[Batch, Batch], compiled: bool, seed: int) -> Call:
    """A training step of this package that leaves the weights as they are."""
    torch.manual_seed(seed)
    model = Forces(build_model(config, num_fidelities=N_FIDELITIES[kind]))
    step = make_step(CompiledForces(model) if compiled else model, COMPONENTS, torch.device("cpu"))
    return lambda: step([batch])


def aimnet_step(config: dict, batch: tuple[Batch, Batch], seed: int) -> Call:
    """The same step with the network of the aimnet package."""
    from aimnet.modules import Forces as AimnetForces

    torch.manual_seed(seed)
    model = AimnetForces(aimnet_network(config, build_model(config, num_fidelities=1).state_dict())).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    loss_fn = MTLoss(COMPONENTS)
    x, y = batch
    padded = {**x, "numbers": decode_fidelity(x["numbers"], FIDELITY_OFFSET)[0]}
    del padded["_fidelities"]
    real = padded["numbers"] > 0
    as_padded = real.numel() <= MOST_PADDING * int(real.sum())
    inputs = padded if as_padded else flat_batch(padded)
    rows = torch.full(real.shape, int(real.sum())).masked_scatter(real, torch.arange(int(real.sum())))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        result = model({**inputs, "coord": inputs["coord"].detach().clone()})
        if not as_padded:
            result = {"energy": result["energy"]} | {key: result[key][rows] for key in ("forces", "charges")}
        loss_fn({**result, "coord": padded["coord"], "numbers": padded["numbers"]}, y)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()

    return step


def flat_batch(padded: Batch) -> Batch:
    """The batch in flat layout with lists of neighbours, and with an atom of padding at the end."""
    real = padded["numbers"] > 0
    mol_idx, coord = real.nonzero()[:, 0], padded["coord"][real]
    return {
        "coord": torch.cat([coord, torch.zeros(1, 3)]),
        "numbers": torch.cat([padded["numbers"][real], torch.zeros(1, dtype=torch.int64)]),
        "mol_idx": torch.cat([mol_idx, mol_idx[-1:]]),
        "nbmat": neighbor_matrix(coord, mol_idx, CUTOFF)[0],
        "nbmat_lr": neighbor_matrix(coord, mol_idx, math.inf)[0],
        "charge": padded["charge"],
        "mult": padded["mult"],
    }


def measure(compiled: bool, repeats: int, small: bool, seed: int) -> dict[str, Any]:
    """Median times, in turns, of the steps {kind: {how: seconds}} and of the floor; the first turns warm up."""
    config = load_model_config(SMALL_MODEL if small else None)
    calls: dict[tuple[str, str], Call] = {}
    first: dict[str, float] = {}
    batches = {}
    for kind, n_fidelities in N_FIDELITIES.items():
        sizes = molecule_sizes(kind, seed)
        batch = make_batch(sizes, n_fidelities, seed)
        batches[kind] = {"molecules": len(sizes), "atoms": sum(sizes), "places": batch[0]["numbers"].numel()}
        calls[kind, EAGER] = our_step(config, kind, batch, False, seed)
        if compiled:
            calls[kind, COMPILED] = our_step(config, kind, batch, True, seed)
        if importlib.util.find_spec("aimnet") is not None:
            calls[kind, AIMNET] = aimnet_step(config, batch, seed)
    for (kind, how), call in calls.items():
        start = time.perf_counter()
        call()
        if how == COMPILED:
            first[kind] = time.perf_counter() - start
            click.echo(f"{kind}: compiled in {first[kind]:.0f} s", err=True)
    with RecordProducts() as recorded:
        calls[ONE_SIZE, EAGER]()
    calls[ONE_SIZE, FLOOR] = Replay(recorded.products)

    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for turn in range(-2, repeats):
        for key, call in calls.items():
            spent = cpu_seconds(call)
            if turn >= 0:
                times[key].append(spent)
    rows: dict[str, dict[str, float]] = {kind: {} for kind in N_FIDELITIES}
    for (kind, how), values in times.items():
        rows[kind][how] = statistics.median(values)
    return {
        "seconds": {kind: {how: t for how, t in row.items() if how != FLOOR} for kind, row in rows.items()},
        "floor seconds": rows[ONE_SIZE][FLOOR],
        "products": {"number": len(recorded.products), "GFLOP": operations(recorded.products) / 1e9},
        "batches": batches,
        "seconds of the first compiled step": first,
        "quartiles": {f"{kind}, {how}": np.quantile(v, [0.25, 0.75]).tolist() for (kind, how), v in times.items()},
    }


# --------------------------------------------------------------------------------------------------
# the page and the picture
# --------------------------------------------------------------------------------------------------


def markdown(result: dict, picture: str | None) -> str:
    """The result as a page."""
    arguments, machine, floor = result["arguments"], result["machine"], result["floor seconds"]
    products = result["products"]
    lines = [
        f"# Training step of {ATOMS} atoms",
        "",
        "Made by `benchmarks/training.py`, which says how.",
        "",
        f"- {'small' if arguments['small'] else 'full-size'} model, float32; energies, forces and charges in the loss",
        f"- medians of {arguments['repeats']} steps of each, in turns; CPU time",
        f"- {machine['device']}, {machine['threads']} thread",
        f"- {', '.join(f'{name} {version}' for name, version in result['versions'].items())}",
        f"- floor: the {products['number']} matrix products of the step of one size "
        f"({products['GFLOP']:.1f} GFLOP), replayed: {1e3 * floor:.0f} ms",
    ]
    if not any(AIMNET in row for row in result["seconds"].values()):
        lines.append("- the package aimnet is not installed: not compared")
    if not arguments["compile"]:
        lines.append("- compiled steps were not measured (`--compile`)")
    lines += [
        "",
        "| batch | molecules | step | ms | to the floor | to eager | to aimnet |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind, row in result["seconds"].items():
        for how, spent in row.items():
            against = f"{spent / row[AIMNET]:.2f}" if AIMNET in row else ""
            lines.append(
                f"| {kind} | {result['batches'][kind]['molecules']} | {how} | {1e3 * spent:.0f} | {spent / floor:.2f} "
                f"| {spent / row[EAGER]:.2f} | {against} |"
            )
    first = result["seconds of the first compiled step"]
    if first:
        lines += ["", "First compiled step, s: " + "; ".join(f"{kind} {s:.0f}" for kind, s in first.items()) + "."]
    if picture is not None:
        lines += ["", f"![time of a training step by batch, with the floor]({picture})"]
    return "\n".join(lines) + "\n"


def draw(result: dict, path: Path) -> None:
    """Draw bars of the time of a step for each kind of batch, with the floor as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    ways = list(next(iter(result["seconds"].values())))
    width = 0.8 / len(ways)
    for k, how in enumerate(ways):
        places = [i + (k - (len(ways) - 1) / 2) * width for i in range(len(result["seconds"]))]
        bars = axes.bar(places, [1e3 * row[how] for row in result["seconds"].values()], 0.92 * width, label=how)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    floor = 1e3 * result["floor seconds"]
    axes.axhline(floor, color="black", linestyle="--", label=f"matrix products of one size, {floor:.0f} ms")
    axes.set(ylabel="CPU time, ms", title=f"Training step of {ATOMS} atoms, one thread")
    axes.set_xticks(range(len(result["seconds"])), [kind.replace(", ", ",\n") for kind in result["seconds"]])
    axes.legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


@click.command(context_settings={"show_default": True})
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="JSON file; .md and .png are put beside."
)
@click.option("--compile", "compiled", is_flag=True, help="Measure compiled steps as well; compiling takes minutes.")
@click.option("--repeats", type=click.IntRange(1), default=9, help="Steps of each kind.")
@click.option("--small", is_flag=True, help="The small example model instead of the full-size one.")
@click.option("--seed", type=int, default=0, help="Of weights and batches.")
@user_errors
def main(output: Path, compiled: bool, repeats: int, small: bool, seed: int) -> None:
    """Time training steps by the sizes and fidelities of their molecules."""
    check_output(output)
    torch.set_num_threads(1)
    result = measure(compiled, repeats, small, seed)
    result |= {
        "machine": {"device": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": package_versions(AIMNET),
        "arguments": {"compile": compiled, "repeats": repeats, "small": small, "seed": seed},
    }
    picture = output.with_suffix(".png") if importlib.util.find_spec("matplotlib") is not None else None
    if picture is not None:
        draw(result, picture)
    write_results(output, result, markdown(result, picture.name if picture else None), *([picture] if picture else []))


if __name__ == "__main__":
    main()
