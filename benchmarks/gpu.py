"""What training, inference and molecular dynamics cost on a GPU (or any device): absolute times, with its name.

``training``
    Steps of 4,000 to 16,000 atoms (real molecules of the example data, three fidelities): float32, with TF32 in matrix
    products, bf16, and each compiled.
``inference``
    Energies and forces of a file as `compile_jit` writes it: batches of 20-atom clusters, large clusters.
``dynamics``
    Velocity Verlet on the device, positions never leaving it: clusters of 20 to 10,000 atoms, steps/s.
``accuracy``
    Forces of float32, with and without TF32, and of bf16, against float64 on the same device: what the fast modes cost.

The device is waited for before every look at the clock; kinds take turns, medians are reported. Peak memory is that of
torch's allocator. With ``--device cpu --small`` everything runs on a CPU, which proves that it works, not how fast.

    python benchmarks/gpu.py --output benchmarks/results/gpu.json
"""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from acceleration import make_model, trainer_config
from compiled import SHORT, clusters, large_system, write_models
from energy_only import LOSS, SMALL_MODEL, device_name, load_batches, with_force_labels
from report import check_output, write_results

from aimnet2mult.models.base import versions
from aimnet2mult.models.jit_wrapper import load_jit_model
from aimnet2mult.models.potential import Potential
from aimnet2mult.train.acceleration import accelerated
from aimnet2mult.train.engine import make_step, predict
from aimnet2mult.train.loss import MTLoss
from aimnet2mult.utils.cli import user_errors
from aimnet2mult.utils.devices import chosen_device

TIME_STEP = 0.05
"""In units in which masses are 1: small enough that an untrained model moves nothing far."""

MODES = {"float32": ("float32", False), "float32, TF32": ("float32", True), "bf16": ("bf16", False)}
"""Name -> precision of the training, TF32 in matrix products."""

Call = Callable[[], Any]


def wait(device: torch.device) -> float:
    """The time, once the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median_seconds(calls: dict[str, Call], repeats: int, device: torch.device) -> dict[str, float]:
    """Median time of calls that take turns; the first turns, which compile and allocate, do not count."""
    for call in calls.values():
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = wait(device)
            call()
            times[name].append(wait(device) - start)
    return {name: statistics.median(values) for name, values in times.items()}


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let matrix products of float32 round their inputs to 10 bits, or not."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def peak_mib(call: Call, device: torch.device) -> float | None:
    """Peak memory of torch's allocator during a call, MiB; None where there is none to ask."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) / 2**20


# --------------------------------------------------------------------------------------------------
# parts
# --------------------------------------------------------------------------------------------------


def training_steps(atoms: int, small: bool, compiled: bool, device: torch.device, seed: int) -> dict[str, Call]:
    """A step of each mode on the same batch; weights stay as they are."""
    batch = with_force_labels(load_batches(1, atoms, seed)[0], 1.0, seed)
    calls: dict[str, Call] = {}
    for name, (precision, fast) in MODES.items():
        for compile_it in (False, True) if compiled else (False,):
            model = make_model(SMALL_MODEL if small else None, precision).to(device).train()
            model = accelerated(model, trainer_config(precision, compile_it))
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
            step = make_step(model, optimizer, MTLoss(LOSS), device)

            def call(step: Any = step, fast: bool = fast) -> None:
                with tf32(fast):
                    step([batch])

            calls[name + (", compiled" if compile_it else "")] = call
    return calls


def measure_training(
    sizes: list[int], small: bool, compiled: bool, repeats: int, device: torch.device, seed: int
) -> list[dict]:
    """A row for each number of atoms and mode."""
    rows = []
    for atoms in sizes:
        calls = training_steps(atoms, small, compiled, device, seed)
        for name, seconds in median_seconds(calls, repeats, device).items():
            memory = peak_mib(calls[name], device)
            rows.append({"atoms": atoms, "mode": name, "seconds": seconds, "peak MiB": memory})
    return rows


def on_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """A batch on the device."""
    return {key: value.to(device) for key, value in batch.items()}


def measure_inference(
    model: Potential, shapes: list[tuple[int, int]], repeats: int, device: torch.device, seed: int
) -> list[dict]:
    """A row for each batch (molecules, atoms), without and with TF32."""
    rows = []
    for n_molecules, n_atoms in shapes:
        system = clusters(n_molecules, n_atoms, seed) if n_molecules > 1 else large_system("cluster", n_atoms, seed)
        batch = on_device(system, device)

        def call(fast: bool, batch: dict = batch) -> None:
            with tf32(fast):
                model(batch)

        calls: dict[str, Call] = {"float32": lambda: call(False), "float32, TF32": lambda: call(True)}
        for mode, seconds in median_seconds(calls, repeats, device).items():
            memory = peak_mib(calls[mode], device)
            rows.append(
                {"molecules": n_molecules, "atoms": n_atoms, "mode": mode, "seconds": seconds, "peak MiB": memory}
            )
    return rows


def velocity_verlet(model: Potential, batch: dict[str, torch.Tensor], n_steps: int) -> dict[str, torch.Tensor]:
    """Return a batch whose atoms, of mass 1, have moved for some steps from rest."""
    coord = batch["coord"].clone()
    velocity = torch.zeros_like(coord)
    forces = model({**batch, "coord": coord})["forces"]
    for _ in range(n_steps):
        velocity = velocity + 0.5 * TIME_STEP * forces
        coord = coord + TIME_STEP * velocity
        forces = model({**batch, "coord": coord})["forces"]
        velocity = velocity + 0.5 * TIME_STEP * forces
    return {**batch, "coord": coord}


def measure_dynamics(model: Potential, sizes: list[int], n_steps: int, device: torch.device, seed: int) -> list[dict]:
    """A row for each cluster."""
    rows = []
    for n_atoms in sizes:
        batch = on_device(large_system("cluster", n_atoms, seed), device)
        velocity_verlet(model, batch, 3)
        start = wait(device)
        velocity_verlet(model, batch, n_steps)
        seconds = (wait(device) - start) / (n_steps + 1)
        rows.append({"atoms": len(batch["numbers"]), "steps per second": 1.0 / seconds})
    return rows


def measure_accuracy(small: bool, atoms: int, device: torch.device, seed: int) -> list[dict]:
    """Largest and mean error of forces, and of energies per atom, against float64."""
    x, y = with_force_labels(load_batches(1, atoms, seed)[0], 1.0, seed)
    rows, exact = [], None
    for name, (precision, fast) in {"float64": ("float64", False), **MODES}.items():
        model = accelerated(make_model(SMALL_MODEL if small else None, precision), trainer_config(precision))
        # bf16 is a mode of training; in evaluation mode everything is float32.
        model = model.to(device).train(precision == "bf16")
        double = torch.float64 if precision == "float64" else None
        with tf32(fast):
            out, _ = predict(model, (x, y), True, device, dtype=double)
        found = {key: out[key].detach().double().cpu() for key in ("energy", "forces")}
        if exact is None:
            exact = found
            continue
        n_atoms = (x["numbers"] > 0).sum(1)
        forces = (found["forces"] - exact["forces"]).norm(dim=2)
        rows.append(
            {
                "mode": name,
                "largest force error, eV/Å": forces.max().item(),
                "mean force error, eV/Å": (forces.sum() / n_atoms.sum()).item(),
                "mean force, eV/Å": (exact["forces"].norm(dim=2).sum() / n_atoms.sum()).item(),
                "mean energy error, eV/atom": ((found["energy"] - exact["energy"]).abs() / n_atoms).mean().item(),
            }
        )
    return rows


# --------------------------------------------------------------------------------------------------
# the page
# --------------------------------------------------------------------------------------------------


def table(title: str, rows: list[dict]) -> list[str]:
    """Rows as a Markdown table under a heading."""
    columns = list(rows[0])
    lines = ["", f"## {title}", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [f"{x:.4g}" if isinstance(x, float) else "" if x is None else str(x) for x in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


@click.command(context_settings={"show_default": True})
@click.option("--device", default="cuda", help="Where to measure.")
@click.option("--small", is_flag=True, help="The small example model and little work: to see that it runs.")
@click.option("--compile/--no-compile", "compiled", default=True, help="Measure compiled training steps, too.")
@click.option("--repeats", default=10, type=click.IntRange(min=1), help="Calls of each kind.")
@click.option("--seed", default=0)
@click.option("--output", default="benchmarks/results/gpu.json", type=click.Path(path_type=Path), help="JSON file.")
@user_errors
def main(device: str, small: bool, compiled: bool, repeats: int, seed: int, output: Path) -> None:
    """Measure training, inference and dynamics on a device."""
    check_output(output)
    place = chosen_device(device)
    sizes = {"training": [300], "dynamics": [20, 99], "inference": [(4, 20), (1, 99)]}
    if not small:
        sizes = {
            "training": [4000, 8000, 16000],
            "dynamics": [20, 99, 999, 9999],
            "inference": [(1, 20), (64, 20), (1024, 20), (1, 201), (1, 999), (1, 9999)],
        }
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), small, seed)
        model = load_jit_model(Path(folder) / f"{SHORT}.jpt", place)
        result = {
            "training": measure_training(sizes["training"], small, compiled, repeats, place, seed),
            "inference": measure_inference(model, sizes["inference"], repeats, place, seed),
            "dynamics": measure_dynamics(model, sizes["dynamics"], 10 if small else 200, place, seed),
            "accuracy": measure_accuracy(small, 300 if small else 4000, place, seed),
        }
    model_name = "small example model" if small else "full-size model"
    page = [
        "# Training, inference and dynamics on a device",
        "",
        "Made by `benchmarks/gpu.py`, which says how.",
        "",
        f"- {device_name(place)}; {model_name}; " + ", ".join(f"{k} {v}" for k, v in versions().items()),
        *(line for name, rows in result.items() for line in table(name.capitalize(), rows)),
    ]
    about = {"device": device_name(place), "model": model_name, "versions": versions(), "repeats": repeats}
    write_results(output, {**about, **result}, "\n".join(page) + "\n")


if __name__ == "__main__":
    main()
