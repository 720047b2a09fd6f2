"""How the training step scales over processes: strong and weak, on 1 and 2 processes of one machine.

Processes share gradients as in training (`aimnet2mult.train.processes`: DistributedDataParallel, Gloo on CPUs), one
thread each. Strong: the molecules of one batch, on one process or shared out. Weak: a batch of that size on each
process. Steps take turns with the same steps without the exchange of gradients, which tells what the exchange costs
beyond what two processes cost each other; an all-reduce of as many bytes as there are gradients is timed alone.
Processes start each step together, and the time on the clock until the slower one is done counts; where other programs
want the cores, the CPU time of a process says more.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py --output benchmarks/results/scaling.json
"""

import json
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from energy_only import FILES, LOSS, SMALL_MODEL, load_batches, make_step
from report import check_output, processor, write_results

from aimnet2mult.models.base import build_model, load_model_config, versions
from aimnet2mult.modules import Forces
from aimnet2mult.train.processes import distribute, process_group
from aimnet2mult.utils.cli import user_errors

STRONG, WEAK = "strong", "weak"
WORLD_SIZES = (1, 2)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def together() -> None:
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def seconds_of(call: Any) -> tuple[float, float]:
    """Time on the clock, from when all processes are ready until this one is done, and its CPU time."""
    together()
    start, start_cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - start_cpu


def network(small: bool, seed: int) -> Forces:
    """The untrained network of three fidelities, with forces."""
    torch.manual_seed(seed)
    return Forces(build_model(load_model_config(SMALL_MODEL if small else None), num_fidelities=len(FILES)))


def work(rank: int, world: int, port: int, folder: str, atoms: int, repeats: int, small: bool, seed: int) -> None:
    """Measure on one process of ``world``; writes ``<folder>/<rank>.json``."""
    launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in launch.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    with process_group("cpu"):
        device = torch.device("cpu")
        alone, copy = network(small, seed), network(small, seed)
        n_weights = sum(p.numel() for p in alone.parameters() if p.requires_grad)
        # The same molecules in both: batches are consecutive parts of one random order.
        batches = {STRONG: load_batches(world, atoms // world, seed)[rank], WEAK: load_batches(2, atoms, seed)[rank]}
        plain = make_step(alone, LOSS, device)
        shared = make_step(distribute(copy, device), LOSS, device) if world > 1 else plain
        calls = {}
        for mode, batch in batches.items():
            calls[mode] = lambda batch=batch: shared([batch])
            calls[f"{mode}, no exchange"] = lambda batch=batch: plain([batch])
        if world > 1:
            gradients = torch.zeros(n_weights)
            calls["all-reduce"] = lambda: dist.all_reduce(gradients)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for turn in range(-1, repeats):  # the first turn warms up
            for name, call in calls.items():
                elapsed = seconds_of(call)
                if turn >= 0:
                    times[name].append(elapsed)
        found = {"seconds": times, "weights": n_weights}
        found["molecules"] = {mode: len(x["numbers"]) for mode, (x, _) in batches.items()}
        found["atoms"] = {mode: int((x["numbers"] > 0).sum()) for mode, (x, _) in batches.items()}
        Path(folder, f"{rank}.json").write_text(json.dumps(found))


def run(world: int, **settings: Any) -> list[dict]:
    """What each of ``world`` fresh processes found."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, free_port(), folder, *(settings[key] for key in ("atoms", "repeats", "small", "seed")))
        torch.multiprocessing.spawn(work, arguments, nprocs=world)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]


def measure(rounds: int, **settings: Any) -> dict:
    """Medians over rounds, in which one process and two take turns, of the time until the slowest process is done."""
    times: dict[int, dict[str, list[float]]] = {world: {} for world in WORLD_SIZES}
    cpu: dict[int, dict[str, list[float]]] = {world: {} for world in WORLD_SIZES}
    about: dict[int, list[dict]] = {}
    for _ in range(rounds):
        for world in WORLD_SIZES:
            about[world] = run(world, **settings)
            for name in about[world][0]["seconds"]:
                for of_all in zip(*(each["seconds"][name] for each in about[world]), strict=True):
                    times[world].setdefault(name, []).append(max(clock for clock, _ in of_all))
                    cpu[world].setdefault(name, []).append(max(used for _, used in of_all))
    rows = []
    for mode in (STRONG, WEAK):
        for world in WORLD_SIZES:
            seconds = statistics.median(times[world][mode])
            molecules = sum(each["molecules"][mode] for each in about[world])
            rows.append(
                {
                    "scaling": mode,
                    "processes": world,
                    "molecules": molecules,
                    "atoms": sum(each["atoms"][mode] for each in about[world]),
                    "seconds": seconds,
                    "seconds without exchange": statistics.median(times[world][f"{mode}, no exchange"]),
                    "CPU seconds": statistics.median(cpu[world][mode]),
                    "molecules per second": molecules / seconds,
                }
            )
    n_bytes = 4 * about[2][0]["weights"]
    all_reduce = statistics.median(times[2]["all-reduce"])
    exchange = {"bytes": n_bytes, "seconds": all_reduce, "bytes per second": n_bytes / all_reduce}
    return {"rows": rows, "all-reduce": exchange}


def markdown(result: dict) -> str:
    """The result as a page."""
    arguments, machine, exchange = result["arguments"], result["machine"], result["all-reduce"]
    lines = [
        "# Training step on one process and on two",
        "",
        "Made by `benchmarks/scaling.py`, which says how.",
        "",
        f"- {'small' if arguments['small'] else 'full-size'} model, three fidelities, molecules of the example data",
        f"- median time on the clock of {arguments['rounds']} x {arguments['repeats']} steps",
        f"- {machine['device']}, {machine['cores']} cores, one thread per process",
        f"- {', '.join(f'{name} {version}' for name, version in result['versions'].items())}",
        "",
        "| scaling | processes | molecules | atoms | step, ms | no exchange, ms | CPU, ms | molecules/s | efficiency |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        alone = next(r for r in result["rows"] if r["scaling"] == row["scaling"] and r["processes"] == 1)
        efficiency = row["molecules per second"] / (row["processes"] * alone["molecules per second"])
        lines.append(
            f"| {row['scaling']} | {row['processes']} | {row['molecules']} | {row['atoms']} "
            f"| {1e3 * row['seconds']:.0f} | {1e3 * row['seconds without exchange']:.0f} "
            f"| {1e3 * row['CPU seconds']:.0f} | {row['molecules per second']:.0f} | {efficiency:.0%} |"
        )
    lines += [
        "",
        f"Gradients: {exchange['bytes'] / 1e6:.2f} MB. An all-reduce of so many bytes over two processes takes "
        f"{1e3 * exchange['seconds']:.1f} ms ({exchange['bytes per second'] / 1e9:.2f} GB/s).",
    ]
    return "\n".join(lines) + "\n"


@click.command(context_settings={"show_default": True})
@click.option("--output", required=True, type=click.Path(path_type=Path), help="JSON file; a .md is written beside it.")
@click.option("--atoms", type=click.IntRange(100), default=1000, help="Atoms of the batch that is shared out.")
@click.option("--repeats", type=click.IntRange(2), default=7, help="Steps of each kind in a process.")
@click.option("--rounds", type=click.IntRange(1), default=3, help="Turns of one process and two.")
@click.option("--small", is_flag=True, help="The small example model, one round of five steps: a minute.")
@click.option("--seed", type=int, default=0, help="Of weights and batches.")
@user_errors
def main(output: Path, atoms: int, repeats: int, rounds: int, small: bool, seed: int) -> None:
    """Time the training step on one process and on two."""
    check_output(output)
    if small:
        repeats, rounds = 5, 1
    result = measure(rounds, atoms=atoms, repeats=repeats, small=small, seed=seed)
    result |= {
        "machine": {"device": processor(), "cores": os.cpu_count(), "threads": 1},
        "versions": versions(),
        "arguments": {"atoms": atoms, "repeats": repeats, "rounds": rounds, "small": small, "seed": seed},
    }
    write_results(output, result, markdown(result))


if __name__ == "__main__":
    main()
