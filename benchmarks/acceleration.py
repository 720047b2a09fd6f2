"""What bf16 costs in accuracy, and what bf16 and torch.compile gain in time.

Accuracy: energies, forces, charges and the gradient of the weights, with `trainer.precision` bf16 against float32, for
the random model of the tests (`ref_mixed`) on its molecules and for the small example model on molecules of the example
data, untrained and trained for a number of steps. Two trainings on the same batches, one in each precision, end with
errors on the example test data, both in evaluation mode, which is float32.

Time: a training step (energies, forces, backward) of float32, bf16, float64, compiled float32 and compiled bf16. Kinds
take turns and medians are reported: CPU time of this process (one thread), or on a GPU the time until it is done. The
first call of a compiled step is measured by the clock on the wall.

    OMP_NUM_THREADS=1 python benchmarks/acceleration.py --output benchmarks/results/acceleration.json
"""

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import torch
from energy_only import EXAMPLES, FILES, LOSS, SMALL_MODEL, device_name, load_batches, seconds
from report import check_output, write_results
from torch import Tensor, nn

from aimnet2mult.data.collate import collate
from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.data.sae import composition, fit_sae
from aimnet2mult.data.sgdataset import open_dataset
from aimnet2mult.models.base import build_model, load_checkpoint, load_model_config, load_weights, versions
from aimnet2mult.modules import Forces
from aimnet2mult.nbops import real_atoms
from aimnet2mult.train.acceleration import accelerated, prepare_model
from aimnet2mult.train.engine import Batch, make_step, predict
from aimnet2mult.train.loss import MTLoss
from aimnet2mult.train.schema import EMAConfig, TrainerConfig
from aimnet2mult.utils.cli import user_errors

TEST_FILES = {f: EXAMPLES / "data" / path.name.replace("_train", "_test") for f, path in FILES.items()}
FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"
LEARNING_RATE = 2e-3
KINDS = {
    "float32": ("float32", False),
    "bf16": ("bf16", False),
    "float64": ("float64", False),
    "float32, compiled": ("float32", True),
    "bf16, compiled": ("bf16", True),
}
"""Name -> precision, compile."""


def trainer_config(precision: str, compiled: bool = False) -> TrainerConfig:
    """Settings that matter here."""
    return TrainerConfig(
        epochs=1,
        accumulate=1,
        precision=precision,
        ema=EMAConfig(),
        compile=compiled,
        deterministic=False,
        max_skipped=1,
        early_stopping=None,
    )


def make_model(config: str | Path | None, precision: str, weights: dict[str, Tensor] | None = None) -> Forces:
    """Make a model of three fidelities, with the weights given or random ones, in a precision."""
    torch.manual_seed(0)
    model = build_model(load_model_config(config), num_fidelities=len(FILES))
    if weights is not None:
        load_weights(model, weights)
    return Forces(prepare_model(model, trainer_config(precision)))


# --------------------------------------------------------------------------------------------------
# accuracy
# --------------------------------------------------------------------------------------------------


def example_data() -> tuple[MixedFidelityDataset, MixedFidelityDataset]:
    """Molecules to train and to test with, less their self-atomic energies."""
    sae = {}
    for f, path in FILES.items():
        source = open_dataset([path])
        elements = [int(z) for z in source.elements]
        x, y = collate(MixedFidelityDataset({0: path}).__getitems__(list(range(len(source)))))
        sae[f] = fit_sae(composition(x["numbers"].numpy(), elements), y["energy"].numpy(), elements).sae
    return MixedFidelityDataset(FILES, sae), MixedFidelityDataset(TEST_FILES, sae)


def random_batches(
    dataset: MixedFidelityDataset, n: int, per_fidelity: int, seed: int
) -> Iterator[tuple[Batch, Batch]]:
    """Batches with so many random molecules of each fidelity."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(dataset.fidelities == f) for f in FILES]
    for _ in range(n):
        chosen = np.concatenate([rng.choice(part, min(per_fidelity, len(part)), replace=False) for part in members])
        yield collate(dataset.__getitems__(chosen.tolist()))


def trained(dataset: MixedFidelityDataset, precision: str, steps: int) -> Forces:
    """Train the small model with a learning rate that falls along half a cosine."""
    model = make_model(SMALL_MODEL, precision).train()
    optimizer = torch.optim.RAdam([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    step = make_step(model, optimizer, MTLoss(LOSS), "cpu", max_grad_norm=10.0, precision=precision)
    for batch in random_batches(dataset, steps, 16, 0):
        assert step([batch]).applied
        schedule.step()
    return model


def test_errors(model: Forces, dataset: MixedFidelityDataset) -> dict[str, float]:
    """Root mean square errors on test data, in evaluation mode."""
    model.eval()
    per_atom, forces = [], []
    with torch.no_grad():
        for batch in random_batches(dataset, 1, 10**6, 0):
            y_pred, y_true = predict(model, batch, True, "cpu")
            real = real_atoms(y_pred["numbers"])
            per_atom.append((y_pred["energy"] - y_true["energy"]) / real.sum(dim=1))
            labelled = real & y_true["forces_mask"].unsqueeze(1)
            forces.append((y_pred["forces"] - y_true["forces"])[labelled].flatten())
    return {
        "energy, meV/atom": 1e3 * torch.cat(per_atom).pow(2).mean().sqrt().item(),
        "forces, meV/Å": 1e3 * torch.cat(forces).pow(2).mean().sqrt().item(),
    }


def evaluated(model: Forces, batch: tuple[Batch, Batch]) -> dict[str, Tensor]:
    """Results of a batch in training mode, and the gradient of the loss with respect to all weights."""
    model.train()
    model.zero_grad()
    y_pred, y_true = predict(model, batch, True, "cpu")
    MTLoss(LOSS)(y_pred, y_true)["loss"].backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return {**{key: y_pred[key].detach() for key in ("energy", "forces", "charges")}, "gradient": gradient}


def rms(x: Tensor) -> float:
    """Root mean square."""
    return x.double().pow(2).mean().sqrt().item()


def bf16_errors(model_config: Path, weights: dict[str, Tensor], batch: tuple[Batch, Batch]) -> dict[str, float]:
    """Deviations of bf16 from float32."""
    exact, rounded = (
        evaluated(make_model(model_config, precision, weights), batch) for precision in ("float32", "bf16")
    )
    real = real_atoms(batch[0]["numbers"])
    d_forces = (rounded["forces"] - exact["forces"])[real]
    d_gradient = rounded["gradient"] - exact["gradient"]
    cosine = nn.functional.cosine_similarity(rounded["gradient"].double(), exact["gradient"].double(), dim=0)
    return {
        "energy, meV/atom": 1e3 * rms((rounded["energy"] - exact["energy"]) / real.sum(dim=1)),
        "forces, meV/Å": 1e3 * rms(d_forces),
        "forces, relative": rms(d_forces) / rms(exact["forces"][real]),
        "charges, me": 1e3 * rms((rounded["charges"] - exact["charges"])[real]),
        "gradient, relative": rms(d_gradient) / rms(exact["gradient"]),
        "gradient, cosine": cosine.item(),
    }


def reference_batch() -> tuple[Batch, Batch]:
    """Molecules of the reference model, with labels of zero."""
    with np.load(FIXTURES / "ref_mixed_expected.npz") as content:
        x = {key: torch.tensor(content[key]) for key in ("coord", "charge", "mult")}
        x = {**{key: value.float() for key, value in x.items()}, "numbers": torch.tensor(content["numbers_mixed"])}
    shapes = {"energy": x["charge"].double(), "forces": x["coord"]}
    labels = {key: torch.zeros_like(value) for key, value in shapes.items()}
    return x, {**labels, **{key: torch.zeros(x["numbers"].shape) for key in ("charges", "spin_charges")}}


def accuracy(steps: int) -> dict:
    """Errors of bf16, and of the models trained with it and without."""
    train, test = example_data()
    batch = next(random_batches(train, 1, 64, 1))
    models = {precision: trained(train, precision, steps) for precision in ("float32", "bf16")}
    untrained = make_model(SMALL_MODEL, "float32").state_dict()
    small = {"small model, untrained": untrained, f"small model, {steps} steps": models["float32"].state_dict()}
    reference = load_checkpoint(FIXTURES / "ref_mixed.pt")["model"]
    strip = {name: {k.removeprefix("model."): v for k, v in weights.items()} for name, weights in small.items()}
    return {
        "bf16 against float32": {
            "ref_mixed": bf16_errors(FIXTURES / "ref_mixed_model.yaml", reference, reference_batch()),
            **{name: bf16_errors(SMALL_MODEL, weights, batch) for name, weights in strip.items()},
        },
        "errors on test data": {precision: test_errors(model, test) for precision, model in models.items()},
    }


# --------------------------------------------------------------------------------------------------
# time
# --------------------------------------------------------------------------------------------------


def step_times(config: Path | None, kinds: list[str], atoms: int, repeats: int, device: torch.device) -> dict:
    """Median time of a step of each kind, and that of its first call."""
    batches = load_batches(3, atoms, 0)
    steps, first = {}, {}
    for kind in kinds:
        precision, compiled = KINDS[kind]
        model = accelerated(make_model(config, precision).to(device).train(), trainer_config(precision, compiled))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        steps[kind] = make_step(model, optimizer, MTLoss(LOSS), device, precision=precision)
        start = time.perf_counter()
        steps[kind]([batches[0]])
        first[kind] = time.perf_counter() - start
    times: dict[str, list[list[float]]] = {kind: [[] for _ in batches] for kind in kinds}
    for turn in range(-1, repeats):  # the first turn warms up
        for i, batch in enumerate(batches):
            for kind, step in steps.items():
                start = seconds(device)
                step([batch])
                if turn >= 0:
                    times[kind][i].append(seconds(device) - start)
    median = {kind: statistics.mean(map(statistics.median, values)) for kind, values in times.items()}
    return {
        kind: {"seconds": median[kind], "speed": median[kinds[0]] / median[kind], "first call, s": first[kind]}
        for kind in kinds
    }


def markdown(result: dict) -> str:
    """The result as a page."""
    lines = ["# Accuracy of bf16, time of bf16 and torch.compile", "", "Made by `benchmarks/acceleration.py`.", ""]
    machine = f"{result['device']}, one thread" if result["device_type"] == "cpu" else result["device"]
    lines += [f"- {machine}; {', '.join(f'{name} {version}' for name, version in result['versions'].items())}"]
    lines += [f"- {result['arguments']}"]
    for title, rows in result["tables"].items():
        columns = list(next(iter(rows.values())))
        lines += ["", f"## {title}", "", f"| | {' | '.join(columns)} |", f"|---{'|---' * len(columns)}|"]
        lines += [f"| {name} | {' | '.join(f'{row[c]:.4g}' for c in columns)} |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


@click.command(context_settings={"show_default": True})
@click.option("--output", required=True, type=click.Path(path_type=Path), help="JSON file; a .md is written beside it.")
@click.option("--steps", type=click.IntRange(1), default=800, help="Steps of each training of the small model.")
@click.option("--atoms", type=click.IntRange(10), default=1000, help="Atoms per batch of a timed step.")
@click.option("--repeats", type=click.IntRange(2), default=7, help="Timed steps of each kind and batch.")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(list(KINDS)), default=list(KINDS), help="Repeatable.")
@click.option("--small", is_flag=True, help="Time the small example model only, not the full-size one.")
@click.option("--only", type=click.Choice(["accuracy", "time"]), help="Measure one of the two; default: both.")
@click.option("--device", default="cpu", help="Where steps are timed: cpu, or a GPU such as cuda:0.")
@user_errors
def main(
    output: Path,
    steps: int,
    atoms: int,
    repeats: int,
    kinds: tuple[str, ...],
    small: bool,
    only: str | None,
    device: str,
) -> None:
    """Measure accuracy and time of bf16 and torch.compile."""
    check_output(output)
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: there is no GPU for {device}. Use cpu.")
    torch.set_num_threads(1)
    tables = {} if only == "time" else accuracy(steps)
    sizes = {"small": SMALL_MODEL} if small else {"small": SMALL_MODEL, "full-size": None}
    for name, config in {} if only == "accuracy" else sizes.items():
        tables[f"step of the {name} model"] = step_times(config, list(kinds), atoms, repeats, where)
    result = {
        "device": device_name(where),
        "device_type": where.type,
        "versions": versions(),
        "arguments": {"steps": steps, "atoms": atoms, "repeats": repeats},
        "tables": tables,
    }
    write_results(output, result, markdown(result))


if __name__ == "__main__":
    main()
