"""The report on the gradients of fidelities: against gradients by hand, over batches and processes, without a trace."""

import json
from pathlib import Path

import ignite.distributed as idist
import pytest
import torch
from torch import nn

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.data.collate import collate
from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.models.base import build_model, load_checkpoint, load_model_config
from aimnet2mult.modules import Forces
from aimnet2mult.train.engine import make_step
from aimnet2mult.train.gradients import make_gradient_reporter, shared_weights
from aimnet2mult.train.loggers import Loggers
from aimnet2mult.train.loop import Training
from aimnet2mult.train.loss import MTAdaWLoss, MTLoss
from aimnet2mult.train.resume import read_job
from aimnet2mult.train.runner import run_training

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = ["dft", "gfn2", "gfn1"]
WEIGHTS = {"energy": 1.0, "forces": 2.0}
FACTORS = {2: 0.5}
COMPONENTS = {
    "energy": {"fn": "aimnet2mult.train.loss.energy_loss_fn", "weight": WEIGHTS["energy"]},
    "forces": {
        "fn": "aimnet2mult.train.loss.peratom_loss_fn",
        "weight": WEIGHTS["forces"],
        "kwargs": {"key_true": "forces", "key_pred": "forces"},
        "fidelity_weights": FACTORS,
    },
}


def make_network(num_fidelities: int = 3, noise: float = 0.05, heads: bool = True) -> nn.Module:
    """A small model in float64, whose readouts differ unless ``noise`` is zero."""
    torch.manual_seed(0)
    config = load_model_config(FIXTURES / "ref_mixed_model.yaml")
    net = build_model(config, num_fidelities=num_fidelities, use_fidelity_readouts=heads).double()
    with torch.no_grad():
        for weight in net.parameters():
            if weight.requires_grad:
                weight += noise * torch.randn_like(weight)
        net.afv.weight[0] = 0.0
    return net


def make_samples(per_fidelity: int = 3) -> list[dict]:
    """Molecules of three fidelities; of each fidelity the first one has no forces."""
    dataset = MixedFidelityDataset({f: FIXTURES / f"tiny_fid{f}.h5" for f in range(3)})
    samples = []
    for f in range(3):
        mine = dataset.__getitems__((dataset.fidelities == f).nonzero()[0][:per_fidelity].tolist())
        mine[0]["forces"] = None
        samples += mine
    return samples


def make_batch(samples: list[dict]) -> tuple[dict, dict]:
    return tuple(
        {key: value.double() if value.is_floating_point() else value for key, value in part.items()}
        for part in collate(samples)
    )


def gradients_by_hand(network: nn.Module, samples: list[dict]) -> torch.Tensor:
    """Gradients (3, P) of fidelities from molecules one by one: Σ_k w_k Σ_m w_m ∂l_mk / n_k."""
    weights = list(shared_weights(network).values())
    counts = {key: sum(sample[key] is not None for sample in samples) for key in WEIGHTS}
    total = torch.zeros(3, sum(w.numel() for w in weights), dtype=torch.float64)
    for sample in samples:
        f, n_atoms = int(sample["_fidelities"]), len(sample["numbers"])
        x = {
            "coord": torch.tensor(sample["coord"]).double().unsqueeze(0).requires_grad_(),
            "numbers": torch.tensor(sample["numbers"]).unsqueeze(0),
            "charge": torch.tensor([sample["charge"]]).double(),
            "mult": torch.tensor([sample["mult"]]).double(),
        }
        energy = network(x)["energy"]
        loss = (energy[0] - float(sample["energy"])) ** 2 / n_atoms**0.5 * WEIGHTS["energy"] / counts["energy"]
        if sample["forces"] is not None:
            (slope,) = torch.autograd.grad(energy.sum(), x["coord"], create_graph=True)
            square = (-slope[0] - torch.tensor(sample["forces"]).double()).pow(2).mean()
            loss = loss + FACTORS.get(f, 1.0) * square * WEIGHTS["forces"] / counts["forces"]
        gradient = torch.autograd.grad(loss / sum(WEIGHTS.values()), weights)
        total[f] += torch.cat([g.flatten() for g in gradient])
    return total


def report_of(network: nn.Module, batches, loss_fn=None):
    return make_gradient_reporter(network, loss_fn or MTLoss(COMPONENTS), NAMES, "cpu")(batches)


# --------------------------------------------------------------------------------------------------
# the numbers
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[9], [2, 9], [4, 5, 9]])
def test_norms_and_cosines_are_those_of_gradients_by_hand(cuts):
    network, samples = make_network(), make_samples()
    order = [0, 8, 3, 6, 1, 4, 7, 2, 5]  # fidelities in turn
    wanted = gradients_by_hand(network, samples)
    samples = [samples[m] for m in order]
    starts = [0, *cuts[:-1]]
    report = report_of(network, [make_batch(samples[a:b]) for a, b in zip(starts, cuts, strict=True)])
    assert report.molecules.tolist() == [3, 3, 3]
    torch.testing.assert_close(report.products, wanted @ wanted.T, rtol=1e-8, atol=0)
    torch.testing.assert_close(report.norms, wanted.norm(dim=1), rtol=1e-8, atol=0)
    unit = wanted / wanted.norm(dim=1, keepdim=True)
    torch.testing.assert_close(report.cosines, unit @ unit.T, rtol=0, atol=1e-8)
    torch.testing.assert_close(report.cosines.diagonal(), torch.ones(3, dtype=torch.float64))
    assert report.cosines[0, 1].abs() < 0.999
    numbers = report.numbers()
    assert list(numbers)[:2] == ["gradients/dft_molecules", "gradients/dft_norm"]
    assert numbers["gradients/dft_gfn2_cosine"] == report.cosines[0, 1]
    assert numbers["gradients/gfn2_gfn1_cosine"] == report.cosines[1, 2]


@pytest.mark.parametrize("loss_fn", [MTLoss(COMPONENTS), MTAdaWLoss(COMPONENTS, eta=0.1)])
def test_gradients_of_the_fidelities_add_up_to_that_of_the_step(loss_fn):
    network, samples = make_network(), make_samples()
    batches = [make_batch(samples[:4]), make_batch(samples[4:])]
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    step = make_step(Forces(network), optimizer, loss_fn, "cpu")
    for _ in range(2):  # in the second one, the factors of an adaptive loss have changed
        report = report_of(network, batches, loss_fn)
        step(batches)
        norm = torch.cat([p.grad.flatten() for p in shared_weights(network).values()]).norm()
        torch.testing.assert_close(report.products.sum().sqrt(), norm, rtol=1e-10, atol=0)


def test_fidelities_with_equal_weights_molecules_and_labels_pull_alike():
    network, samples = make_network(noise=0.0), make_samples()
    own = samples[3:6]
    copies = [{**s, "numbers": s["numbers"] - 200, "_fidelities": 0} for s in own]
    report = make_gradient_reporter(network, MTLoss(COMPONENTS), NAMES, "cpu")([make_batch([*own, *copies])])
    assert report.molecules.tolist() == [3, 3, 0]
    assert report.cosines[0, 1].item() == pytest.approx(1.0, abs=1e-12)
    assert report.norms[0].item() == pytest.approx(report.norms[1].item(), rel=1e-12)
    # Of the absent fidelity nothing is said but that it is absent.
    numbers = report.numbers()
    assert {key for key in numbers if "gfn1" in key} == {"gradients/gfn1_molecules"}
    assert report.table()[3].split() == ["gfn1", "0", "-", "-", "-", "-"]


def test_shared_weights_are_neither_rows_nor_readouts_of_a_fidelity():
    names = list(shared_weights(make_network()))
    assert {name.split(".")[0] for name in names} == {"conv_a", "conv_q", "mlps"}
    together = list(shared_weights(make_network(heads=False)))
    assert {name.split(".")[0] for name in together} == {"conv_a", "conv_q", "mlps", "outputs"}
    assert not any("shifts" in name for name in together)


def in_a_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    samples = make_samples()
    # The second process has no molecule of the first fidelity.
    mine = [make_batch(samples[:5])] if rank == 0 else [make_batch(samples[5:])]
    torch.save(report_of(make_network(), mine).products, f"{folder}/{rank}.pt")


def test_two_processes_report_what_one_does(tmp_path):
    idist.spawn("gloo", in_a_process, (str(tmp_path),), nproc_per_node=2, init_method=f"file://{tmp_path}/store")
    samples = make_samples()
    alone = report_of(make_network(), [make_batch(samples[:5]), make_batch(samples[5:])])
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), alone.products, rtol=1e-10, atol=0)


# --------------------------------------------------------------------------------------------------
# in a run
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def common(tiny_fidelities):
    """Settings of a small run with all that a step may change."""
    settings = [
        "device=cpu",
        "run_name=r",
        "report=false",
        "scheduler=null",
        "trainer.epochs=1",
        "trainer.accumulate=2",
    ]
    settings += ["log_frequency.train=2", "data.samplers.train.kwargs.batch_size=256", "checkpoint.every_iterations=3"]
    settings += ["loss.class=aimnet2mult.train.loss.MTAdaWLoss"]
    return [*settings, *tiny_fidelities(dft=0, gfn2=1)]


def train(common, folder, *overrides):
    return run_training(
        read_job(None, FIXTURES / "ref_single_model.yaml", [*common, f"checkpoint.dirname={folder}", *overrides])
    )


def assert_same(found, wanted) -> None:
    """Equal, bit by bit, through mappings and lists."""
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted)
    elif isinstance(wanted, dict | list):
        assert len(found) == len(wanted)
        for key in wanted if isinstance(wanted, dict) else range(len(wanted)):
            assert_same(found[key], wanted[key])
    else:
        assert found == wanted


def is_report(record: dict) -> bool:
    return any(key.startswith("gradients/") for key in record)


def test_a_run_with_reports_is_the_same_bit_by_bit(common, tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(Loggers, "log", lambda self, numbers, iteration: logged.append((iteration, numbers)))
    plain = train(common, tmp_path / "plain")
    assert not any(is_report(numbers) for _, numbers in logged)
    result = train(common, tmp_path / "run", "trainer.gradient_report.every=2")
    assert [record for record in result.records if not is_report(record)] == plain.records
    one, other = (load_checkpoint(sorted(r.folder.glob("r_last_iter_*.pt"))[-1]) for r in (plain, result))
    assert all(torch.equal(one["model"][key], value) for key, value in other["model"].items())
    for part in ("optimizer", "random", "loss", "ema"):
        assert_same(other["training"][part], one["training"][part])

    reports = [record for record in result.records if is_report(record)]
    assert [record["iteration"] for record in reports] == list(range(2, result.iteration + 1, 2))
    assert len(reports) >= 2
    for record in reports:
        assert record["gradients/dft_norm"] > 0
        assert -1 < record["gradients/dft_gfn2_cosine"] < 1
    assert [numbers for _, numbers in logged if is_report(numbers)] == reports
    assert "gradients/dft_gfn2_cosine" in (result.folder / "metrics.csv").read_text().splitlines()[0]
    log = (result.folder / "train.log").read_text()
    assert log.count("gradients on the shared weights, iteration") == len(reports)


def test_a_run_that_goes_on_writes_each_report_once(common, tmp_path, monkeypatch):
    whole = train(common, tmp_path / "whole", "trainer.gradient_report={every: 1}")
    original = Training.train_on

    def interrupted(self, batches):
        original(self, batches)
        if self.position.iteration == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "train_on", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(common, tmp_path / "run", "trainer.gradient_report={every: 1}")
    monkeypatch.undo()
    torn = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in torn if is_report(record)] == [1, 2, 3, 4]
    result = run_training(read_job(resume=tmp_path / "run"))  # from iteration 3
    assert (result.folder / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.gradient_report.every=0"], "trainer.gradient_report.every: expected 1 or more iterations, found 0"),
        (
            ["trainer.gradient_report={}", "optimizer.freeze_backbone=true"],
            "trainer.gradient_report: no weight that all fidelities share is trained; set trainer.gradient_report=null",
        ),
    ],
)
def test_what_cannot_be_reported_is_refused(common, tmp_path, overrides, message):
    with pytest.raises(ConfigError) as error:
        train(common, tmp_path / "run", *overrides)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()
