"""What a training step costs when 0, 50 or 100 % of its molecules have force labels.

Batches of real molecules (example data, three fidelities, mixed sizes) go through the training step of
`aimnet2mult.train.engine`, always the same molecules; only the masks of the force labels differ. A step whose loss has
no forces at all is the floor; mixed batches are also evaluated undivided, with forces for all molecules, as a
comparison. Steps of all kinds take turns, so that what else happens on the machine hits all alike,
and medians are reported: CPU time of this process (one thread), or on a GPU the time until the device is done.

    OMP_NUM_THREADS=1 python benchmarks/energy_only.py --output benchmarks/results/energy_only.json
"""

import os
import statistics
import time
from pathlib import Path

import click
import numpy as np
import torch
from report import check_output, processor, write_results

from aimnet2mult.data.collate import collate
from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.models.base import build_model, load_model_config, versions
from aimnet2mult.modules import Forces
from aimnet2mult.train import engine
from aimnet2mult.train.engine import Batch, Step
from aimnet2mult.train.loss import MTLoss
from aimnet2mult.utils.cli import user_errors

EXAMPLES = Path(__file__).parents[1] / "examples"
FILES = {f: EXAMPLES / "data" / f"fid{f}_{level}_train.h5" for f, level in enumerate(("dft", "gfn2", "gfn1"))}
SMALL_MODEL = EXAMPLES / "config" / "model_small.yaml"

PER_ATOM_LOSS = "aimnet2mult.train.loss.peratom_loss_fn"
LOSS = {
    "energy": {"fn": "aimnet2mult.train.loss.energy_loss_fn", "weight": 1.0},
    **{
        key: {"fn": PER_ATOM_LOSS, "weight": 1.0, "kwargs": {"key_true": key, "key_pred": key}}
        for key in ("forces", "charges", "spin_charges")
    },
}
FLOOR = "no forces in the loss"
APART, TOGETHER = 1, 10**9
"""Values of `engine.MIN_ATOMS_APART`: mixed batches are always evaluated in two parts, never."""


def load_batches(n_batches: int, atoms: int, seed: int) -> list[tuple[Batch, Batch]]:
    """Batches of molecules of any size, a third from each fidelity.

    Energies are total ones, since how large a loss is does not change what it costs.
    """
    dataset = MixedFidelityDataset(FILES)
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(np.flatnonzero(dataset.fidelities == f)) for f in FILES]
    mixed = np.stack([part[: min(map(len, drawn))] for part in drawn], axis=1).reshape(-1)
    ends = np.searchsorted(np.cumsum(dataset.n_atoms[mixed]), atoms * np.arange(1, n_batches + 1))
    if ends[-1] >= len(mixed):
        raise ValueError(f"--batches, --atoms: the example data have fewer than {n_batches} times {atoms} atoms")
    return [collate(dataset.__getitems__(part.tolist())) for part in np.split(mixed, ends)[:-1]]


def with_force_labels(batch: tuple[Batch, Batch], share: float, seed: int) -> tuple[Batch, Batch]:
    """Give a share of the molecules, chosen at random, a force label (zero where the data have none), no others."""
    x, y = batch
    n_molecules = len(x["numbers"])
    chosen = torch.randperm(n_molecules, generator=torch.Generator().manual_seed(seed))[: round(share * n_molecules)]
    mask = torch.zeros(n_molecules, dtype=torch.bool).index_fill(0, chosen, True)
    return x, {**y, "forces_mask": mask}


def share_of_atoms(batches: list[tuple[Batch, Batch]]) -> float:
    """Real atoms of molecules with a force label among all real atoms."""
    labelled = sum(int((x["numbers"][y["forces_mask"]] > 0).sum()) for x, y in batches)
    return labelled / sum(int((x["numbers"] > 0).sum()) for x, _ in batches)


def make_step(model: Forces, components: dict, device: torch.device) -> Step:
    """Make a training step that leaves the weights as they are, so that all steps do the same work."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    return engine.make_step(model, optimizer, MTLoss(components), device, max_grad_norm=10.0)


def seconds(device: torch.device) -> float:
    """CPU time of this process, or on a GPU the time on the clock once the device is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(
    shares: list[float], n_batches: int, atoms: int, repeats: int, small: bool, device: torch.device, seed: int
) -> dict:
    """Time the steps; the result holds one row per share and one for the floor."""
    torch.manual_seed(seed)
    config = load_model_config(SMALL_MODEL if small else None)
    model = Forces(build_model(config, num_fidelities=len(FILES))).to(device)
    batches = load_batches(n_batches, atoms, seed)
    learns_forces = make_step(model, LOSS, device)
    floor = make_step(model, {key: value for key, value in LOSS.items() if key != "forces"}, device)
    kinds = {FLOOR: (floor, [with_force_labels(batch, 0.0, seed) for batch in batches], APART)}
    for share in shares:
        labelled = [with_force_labels(batch, share, seed) for batch in batches]
        kinds[f"{share:.0%}"] = (learns_forces, labelled, APART)
        if 0 < share < 1:
            kinds[f"{share:.0%}, undivided"] = (learns_forces, labelled, TOGETHER)

    times: dict[str, list[list[float]]] = {name: [[] for _ in batches] for name in kinds}
    for turn in range(-1, repeats):  # the first turn warms up
        for i in range(n_batches):
            for name, (step, labelled, min_atoms) in kinds.items():
                engine.MIN_ATOMS_APART = dict.fromkeys(engine.MIN_ATOMS_APART, min_atoms)
                start = seconds(device)
                step([labelled[i]])
                if turn >= 0:
                    times[name][i].append(seconds(device) - start)

    # A median per batch, then the mean over batches: batches differ, repeats of a batch should not.
    median = {name: statistics.mean(map(statistics.median, values)) for name, values in times.items()}
    spread = {name: max(statistics.stdev(v) / statistics.median(v) for v in values) for name, values in times.items()}
    none, full = median.get("0%"), median.get("100%")
    rows = []
    for name, (_, labelled, _) in kinds.items():
        atom_share = share_of_atoms(labelled)
        ideal = None if none is None or full is None or name == FLOOR else none + (full - none) * atom_share
        rows.append(
            {
                "molecules with forces": name,
                "atoms with forces": atom_share,
                "seconds per step": median[name],
                "relative to the floor": median[name] / median[FLOOR],
                "relative to the linear ideal": None if ideal is None else median[name] / ideal,
                "largest relative standard deviation of a batch": spread[name],
            }
        )
    sizes = [(x["numbers"] > 0).sum(dim=1) for x, _ in batches]
    return {
        "rows": rows,
        "batches": [
            {"molecules": len(size), "atoms": int(size.sum()), "smallest": int(size.min()), "largest": int(size.max())}
            for size in sizes
        ],
    }


def markdown(result: dict) -> str:
    """The result as a page."""
    arguments, machine = result["arguments"], result["machine"]
    model = "small" if arguments["small"] else "full-size"
    sizes = "; ".join(
        "{molecules} molecules of {smallest}-{largest} atoms, {atoms} atoms".format(**b) for b in result["batches"]
    )
    lines = [
        "# Time of a training step by the share of molecules with force labels",
        "",
        "Made by `benchmarks/energy_only.py`, which says how.",
        "",
        f"- {model} model, three fidelities, {arguments['repeats']} repeats of each step; batches: {sizes}",
        f"- {result['clock']}; {machine['device']}, {machine['threads']} thread(s)",
        f"- {', '.join(f'{name} {version}' for name, version in result['versions'].items())}",
        "- ideal: linear between 0 and 100 %, at the share of atoms",
        "",
        "| molecules with forces | atoms with forces | s per step | to no forces in the loss | to the ideal | spread |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        ideal = row["relative to the linear ideal"]
        lines.append(
            f"| {row['molecules with forces']} | {row['atoms with forces']:.1%} | {row['seconds per step']:.3f} "
            f"| {row['relative to the floor']:.2f} | {'' if ideal is None else f'{ideal:.2f}'} "
            f"| {row['largest relative standard deviation of a batch']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def device_name(device: torch.device) -> str:
    """Name of what computes."""
    return processor() if device.type == "cpu" else torch.cuda.get_device_name(device)


@click.command(context_settings={"show_default": True})
@click.option("--output", required=True, type=click.Path(path_type=Path), help="JSON file; a .md is written beside it.")
@click.option(
    "--share",
    "shares",
    multiple=True,
    type=click.FloatRange(0, 1),
    default=(0.0, 0.5, 1.0),
    help="Share of molecules with force labels; repeatable. 0 and 1 give the ideal.",
)
@click.option("--atoms", type=click.IntRange(1), default=1500, help="Atoms per batch.")
@click.option("--batches", "n_batches", type=click.IntRange(1), default=2, help="Different batches.")
@click.option("--repeats", type=click.IntRange(2), default=7, help="Steps of each kind and batch.")
@click.option("--small", is_flag=True, help="The small example model instead of the full-size one.")
@click.option("--device", default="cpu", help="cpu, or a GPU such as cuda:0.")
@click.option("--seed", type=int, default=0, help="Of weights, batches and labels.")
@user_errors
def main(
    output: Path,
    shares: tuple[float, ...],
    atoms: int,
    n_batches: int,
    repeats: int,
    small: bool,
    device: str,
    seed: int,
) -> None:
    """Time training steps by the share of molecules that have force labels."""
    check_output(output)
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device: there is no GPU for {device}. Use cpu.")
    where = torch.device(device)
    if where.type == "cpu":
        torch.set_num_threads(1)
    result = measure(sorted(set(shares)), n_batches, atoms, repeats, small, where, seed)
    result |= {
        "clock": "CPU time of the process" if where.type == "cpu" else "time until the device is done",
        "machine": {"device": device_name(where), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": versions(),
        "arguments": {
            "shares": sorted(set(shares)),
            "atoms": atoms,
            "batches": n_batches,
            "repeats": repeats,
            "small": small,
            "device": device,
            "seed": seed,
        },
    }
    write_results(output, result, markdown(result))


if __name__ == "__main__":
    main()
