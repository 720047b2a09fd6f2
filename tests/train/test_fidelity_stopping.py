"""A fidelity that gets no better is left out of the training: which molecules, from when on, and until which end."""

import json
import math
from pathlib import Path

import pytest
import torch

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.data.collate import collate
from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.models.base import build_model, load_model_config
from aimnet2mult.modules import Forces
from aimnet2mult.train.engine import make_step, without_fidelities
from aimnet2mult.train.loop import Training
from aimnet2mult.train.loss import MTLoss
from aimnet2mult.train.monitor import EarlyStopping, FidelityStopping, Monitor
from aimnet2mult.train.resume import read_job
from aimnet2mult.train.runner import run_training

FIXTURES = Path(__file__).parents[1] / "fixtures"
COMPONENTS = {
    "energy": {"fn": "aimnet2mult.train.loss.energy_loss_fn", "weight": 1.0},
    "forces": {
        "fn": "aimnet2mult.train.loss.peratom_loss_fn",
        "weight": 1.0,
        "kwargs": {"key_true": "forces", "key_pred": "forces"},
    },
}


def rules(**patience: int) -> FidelityStopping:
    return FidelityStopping({f: EarlyStopping(Monitor(f"{f}/F_mae", ""), n) for f, n in patience.items()})


def test_each_fidelity_has_a_patience_of_its_own():
    stopping = rules(dft=1, gfn2=2)
    said = []
    for dft, gfn2 in [(1.0, 1.0), (0.9, 1.1), (0.9, 0.8), (0.1, 0.8), (0.1, math.nan), (0.0, 0.0)]:
        said.append(stopping.update({"dft/F_mae": dft, "gfn2/F_mae": gfn2}))
        # What comes after the end of its patience does not bring a fidelity back.
        again = rules(dft=1, gfn2=2)
        again.load_state_dict(stopping.state_dict())
        assert (again.stopped, again.exhausted) == (stopping.stopped, stopping.exhausted)
    assert said == [[], [], ["dft"], [], ["gfn2"], []]
    assert stopping.exhausted
    patient = rules(dft=5, gfn2=2)
    patient.load_state_dict(stopping.state_dict())
    assert patient.stopped == ["gfn2"]


def make_batch() -> tuple[dict, dict]:
    """Two molecules of fidelity 0 and three of fidelity 1."""
    dataset = MixedFidelityDataset({f: FIXTURES / f"tiny_fid{f}.h5" for f in range(2)})
    chosen = [(dataset.fidelities == f).nonzero()[0][:n].tolist() for f, n in ((0, 2), (1, 3))]
    return collate(dataset.__getitems__([*chosen[0], *chosen[1]]))


def test_batches_without_a_fidelity():
    x, y = make_batch()
    kept_x, kept_y = without_fidelities((x, y), [0])
    assert kept_x["_fidelities"].tolist() == [1, 1, 1]
    for part, kept in ((x, kept_x), (y, kept_y)):
        assert kept.keys() == part.keys()
        assert all(torch.equal(kept[key], value[2:]) for key, value in part.items())
    empty_x, empty_y = without_fidelities((x, y), [0, 1])
    assert empty_x["_fidelities"].tolist() == [0]
    assert not any(value.any() for key, value in empty_y.items() if key.endswith("_mask"))
    assert y["energy_mask"].all()  # of the caller


def gradient_of(batches) -> torch.Tensor:
    torch.manual_seed(0)
    model = Forces(build_model(load_model_config(FIXTURES / "ref_mixed_model.yaml"), num_fidelities=2))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    result = make_step(model, optimizer, MTLoss(COMPONENTS), "cpu")(batches)
    assert result.applied
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in gradients])


def test_a_batch_of_nothing_else_teaches_nothing():
    batch = make_batch()
    others = without_fidelities(batch, [0])
    alone = gradient_of([others])
    assert alone.norm() > 0
    assert torch.equal(gradient_of([others, without_fidelities(batch, [0, 1])]), alone)
    assert gradient_of([without_fidelities(batch, [0, 1])]).norm() == 0


# --------------------------------------------------------------------------------------------------
# in a run
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def common(tiny_fidelities):
    settings = ["device=cpu", "run_name=r", "report=false", "scheduler=null", "trainer.epochs=4"]
    settings += ["data.samplers.train.kwargs.batch_size=512", "checkpoint.every_iterations=3"]
    settings += ["trainer.early_stopping.patience=null"]
    return [*settings, *tiny_fidelities(dft=0, gfn2=1)]


DFT_STOPS = ["trainer.early_stopping.fidelities={dft: {patience: 1, min_delta: 1000}}"]
"""The first validation is an improvement; the second one is not."""
GFN2_GOES_ON = "trainer.early_stopping.fidelities.gfn2.patience=9"


def train(common, folder, *overrides):
    job = read_job(None, FIXTURES / "ref_single_model.yaml", [*common, f"checkpoint.dirname={folder}", *overrides])
    return run_training(job)


def head(model, f: int) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.fidelity_readouts[f].parameters()])


def test_a_fidelity_that_has_stopped_teaches_nothing(common, tmp_path, monkeypatch):
    seen = []
    learned_from = Training.learned_from

    def spy(self, batches):
        taken = learned_from(self, batches)
        fidelities = {f for x, _ in taken for f in x["_fidelities"].tolist()}
        seen.append((self.position.epoch, fidelities, head(self.model, 0), head(self.model, 1)))
        return taken

    monkeypatch.setattr(Training, "learned_from", spy)
    result = train(common, tmp_path / "run", *DFT_STOPS, GFN2_GOES_ON)
    assert result.end == (True, "4 epochs are complete")
    assert [fidelities for epoch, fidelities, *_ in seen if epoch >= 2] == [{1}] * sum(epoch >= 2 for epoch, *_ in seen)
    assert any(0 in fidelities for epoch, fidelities, *_ in seen if epoch == 1)
    stopped = [heads for epoch, _, *heads in seen if epoch >= 2]
    assert len(stopped) >= 4
    assert all(torch.equal(dft, stopped[0][0]) for dft, _ in stopped)
    assert not torch.equal(stopped[0][1], stopped[-1][1])
    assert "dft stops: no improvement of dft/F_mae in 1 validations" in (result.folder / "train.log").read_text()
    assert "val/dft/F_mae" in result.records[-1]


def test_a_run_that_goes_on_knows_who_has_stopped(common, tmp_path, monkeypatch):
    whole = train(common, tmp_path / "whole", *DFT_STOPS, GFN2_GOES_ON)
    original = Training.train_on
    last = whole.records[-1]["iteration"]

    def interrupted(self, batches):
        original(self, batches)
        if self.position.iteration == last - 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "train_on", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(common, tmp_path / "run", *DFT_STOPS, GFN2_GOES_ON)
    monkeypatch.undo()
    result = run_training(read_job(resume=tmp_path / "run"))
    assert (result.folder / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()
    epochs = [json.loads(line)["epoch"] for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert max(epochs) == 4


def test_the_run_ends_when_all_that_are_named_have_stopped(common, tmp_path):
    both = ["trainer.early_stopping.fidelities.gfn2={patience: 2, min_delta: 1000, monitor: gfn2/E_rmse}"]
    result = train(common, tmp_path / "run", *DFT_STOPS, *both)
    assert result.end == (True, "no improvement of any of dft, gfn2")
    assert result.records[-1]["epoch"] == 3
    more = ["trainer.early_stopping.fidelities.gfn2.patience=3"]
    longer = run_training(read_job(resume=tmp_path / "run", overrides=more))
    assert longer.records[-1]["epoch"] == 4


def test_fidelity_without_forces_follows_its_energies(common, tmp_path):
    options = ["data.y=[energy]", "trainer.epochs=2"]
    options += [f"loss.kwargs.components.{name}=null" for name in ("forces", "charges", "spin_charges")]
    result = train(common, tmp_path / "run", *DFT_STOPS, *options)
    assert result.end == (True, "no improvement of any of dft")
    assert "no improvement of dft/E_mae" in (result.folder / "train.log").read_text()


WHERE = "trainer.early_stopping.fidelities"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "trainer.early_stopping.patience: null, and no trainer.early_stopping.fidelities"),
        ([f"{WHERE}.dtf={{}}"], f"{WHERE}.dtf: there is no fidelity dtf; did you mean dft"),
        ([f"{WHERE}.dft.patience=0"], f"{WHERE}.dft.patience: expected 1 or more validations, found 0"),
        ([f"{WHERE}.dft.min_delta=-1"], f"{WHERE}.dft.min_delta: expected a number of 0 or more, found -1"),
        (
            [f"{WHERE}.dft.monitor=dft/F_mea"],
            f"{WHERE}.dft.monitor: dft/F_mea is not a validation metric; did you mean",
        ),
        (
            [f"{WHERE}.dft={{}}", *(f"metrics.kwargs.cfg.{key}=null" for key in ("energy", "forces"))],
            f"{WHERE}.dft.monitor: null, but",
        ),
        ([f"{WHERE}.dft={{}}", "data.val_fraction=0", "checkpoint.save_best=false"], "needs validation errors"),
    ],
)
def test_nonsense_is_refused(common, tmp_path, overrides, message):
    with pytest.raises(ConfigError) as error:
        train(common, tmp_path / "run", *overrides)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()
