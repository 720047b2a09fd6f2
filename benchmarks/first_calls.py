"""What the first calls of a compiled model cost: energy and forces of one molecule of 20 atoms, call by call.

TorchScript's executor profiles the first call of a process, optimises in the second, and does the same for the backward
graph in the second and third. Each way of calling is measured in processes of its own, the ways take turns, and the
fastest process counts, since others only make it slower.

    OMP_NUM_THREADS=1 python benchmarks/first_calls.py --output benchmarks/results/first_calls.json
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from report import check_output, processor, write_results

from aimnet2mult.utils.cli import user_errors

SPECIES = [1, 6, 7, 8]

PROGRAM = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
way, path, n_calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
if way == "load_jit_model":
    from aimnet2mult.models.jit_wrapper import load_jit_model
start = time.perf_counter()
model = load_jit_model(path) if way == "load_jit_model" else torch.jit.load(path)
times = [time.perf_counter() - start]
grid = 1.5 * torch.cartesian_prod(*[torch.arange(3.0)] * 3)[:20]
data = {"coord": (grid + 0.2 * torch.rand(20, 3)).unsqueeze(0), "numbers": torch.tensor([[1, 6, 7, 8] * 5])}
guard = torch.jit.optimized_execution(False) if way == "optimized_execution(False)" else torch.no_grad()
with guard:
    for _ in range(n_calls):
        start = time.perf_counter()
        model(data)
        times.append(time.perf_counter() - start)
print(json.dumps(times))
"""

WAYS = {
    "torch.jit.load": "nothing else: what a stranger does",
    "optimized_execution(False)": "torch.jit.load, calls inside `torch.jit.optimized_execution(False)`",
    "load_jit_model": "`aimnet2mult.models.jit_wrapper.load_jit_model`, which does that",
}


def save_model(path: Path, small: bool) -> None:
    """Compile an untrained model with SAE and D3(BJ)."""
    import torch

    from aimnet2mult.models.base import build_model, load_model_config
    from aimnet2mult.models.compiled_file import save_jit_model
    from aimnet2mult.models.jit_wrapper import DeployableModel
    from aimnet2mult.modules import DFTD3, SelfAtomicEnergies

    torch.manual_seed(0)
    config = Path(__file__).parents[1] / "examples" / "config" / "model_small.yaml"
    network = build_model(load_model_config(config if small else None))
    network.add_output("self_atomic_energies", SelfAtomicEnergies(dict.fromkeys(SPECIES, -100.0)))
    network.add_output("dftd3", DFTD3(s8=1.9889, a1=0.3981, a2=4.4211))
    save_jit_model(DeployableModel(network, SPECIES), path, {})


def measure(path: Path, n_calls: int, repeats: int) -> dict[str, dict]:
    """Seconds by way: to load, and of each call, in the process whose first calls were the quickest."""
    found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way, times in found.items():
            command = [sys.executable, "-c", PROGRAM, way, str(path), str(n_calls)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"{path}: cannot be evaluated: {done.stderr.strip().splitlines()[-1]}")
            times.append(json.loads(done.stdout))
    best = {way: min(times, key=lambda row: sum(row[1:4])) for way, times in found.items()}
    return {way: {"load": times[0], "calls": times[1:], "extra": extra(times[1:])} for way, times in best.items()}


def extra(calls: list[float]) -> float:
    """Seconds that the calls took beyond what they would if all were like the quickest."""
    return sum(calls) - len(calls) * min(calls)


def markdown(result: dict) -> str:
    """The result as a page."""
    n_calls, machine = result["arguments"]["calls"], result["machine"]
    model = result["arguments"]["model"] or ("small" if result["arguments"]["small"] else "full-size")
    heads = ["way of calling", "load", *map(str, range(1, n_calls + 1)), "extra"]
    lines = [
        "# First calls of a compiled model",
        "",
        "Made by `benchmarks/first_calls.py`, which says how. Milliseconds; extra: what all calls together took beyond",
        "as many of the quickest.",
        "",
        f"- {model} model with SAE and D3(BJ), one molecule of 20 atoms, energy and forces, float32",
        f"- best of {result['arguments']['repeats']} processes; {machine['processor']}, 1 thread",
        f"- {', '.join(f'{name} {version}' for name, version in result['versions'].items())}",
        "",
        f"| {' | '.join(heads)} |",
        f"|{' --- |' * len(heads)}",
    ]
    for way, row in result["ways"].items():
        numbers = [row["load"], *row["calls"], row["extra"]]
        lines.append(f"| `{way}` | " + " | ".join(f"{1e3 * x:.0f}" for x in numbers) + " |")
    lines += ["", *(f"- `{way}`: {meaning}" for way, meaning in WAYS.items())]
    return "\n".join(lines) + "\n"


@click.command(context_settings={"show_default": True})
@click.option("--output", required=True, type=click.Path(path_type=Path), help="JSON file; a .md is written beside it.")
@click.option("--model", type=click.Path(path_type=Path), help="A .jpt of H, C, N, O; default: an untrained one.")
@click.option("--small", is_flag=True, help="The small example model instead of the full-size one.")
@click.option("--calls", type=click.IntRange(4), default=8, help="Calls in each process.")
@click.option("--repeats", type=click.IntRange(1), default=3, help="Processes for each way of calling.")
@user_errors
def main(output: Path, model: Path | None, small: bool, calls: int, repeats: int) -> None:
    """Time the first calls of a compiled model in fresh processes."""
    check_output(output)
    if model is not None and not model.is_file():
        raise FileNotFoundError(f"{model}: no such file")
    from aimnet2mult.models.base import versions

    with tempfile.TemporaryDirectory() as folder:
        path = model or Path(folder) / "model.jpt"
        if model is None:
            save_model(path, small)
        ways = measure(path, calls, repeats)
    result = {
        "ways": ways,
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": versions(),
        "arguments": {"model": model and model.name, "small": small, "calls": calls, "repeats": repeats},
    }
    write_results(output, result, markdown(result))


if __name__ == "__main__":
    main()
