"""Metrics equal a few lines of numpy on the gathered values."""

import logging
import math

import ignite.distributed as idist
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Engine

from aimnet2mult.train.engine import label_shares
from aimnet2mult.train.loss import MTLoss
from aimnet2mult.train.metrics import LossMetric, RegMultiMetric, metrics_table

CFG = {
    "energy": {"abbr": "E", "scale": 23.06},
    "forces": {"abbr": "F", "scale": 23.06, "peratom": True, "mult": 3},
    "charges": {"abbr": "q", "peratom": True},
    "dipole": {"abbr": "D", "mult": 3},
}
SHAPES = {"energy": (), "forces": (-1, 3), "charges": (-1,), "dipole": (3,)}
LOSS = {
    "energy": {"fn": "aimnet2mult.train.loss.energy_loss_fn", "weight": 1.0},
    "forces": {
        "fn": "aimnet2mult.train.loss.peratom_loss_fn",
        "weight": 2.0,
        "kwargs": {"key_true": "forces", "key_pred": "forces"},
    },
}


def molecules(n: int, seed: int) -> list[dict]:
    """Molecules as numpy arrays: errors of each property, which labels there are, fidelity."""
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(n):
        n_atoms = int(rng.integers(1, 6))
        error = {k: rng.normal(size=[n_atoms if s == -1 else s for s in shape]) for k, shape in SHAPES.items()}
        label = {k: bool(rng.random() < 0.6) for k in SHAPES}
        result.append({"n": n_atoms, "error": error, "label": label, "fidelity": int(rng.integers(0, 3))})
    return result


def batch(rows: list[dict], seed: int = 0) -> tuple[dict, dict]:
    """Pad molecules; garbage in the padding of predictions and in labels that are not there."""
    rng = np.random.default_rng(seed)
    n_max = max(row["n"] for row in rows) + 1
    numbers = np.zeros((len(rows), n_max), int)
    y_pred, y_true = {}, {}
    for i, row in enumerate(rows):
        numbers[i, : row["n"]] = 6 + 200 * row["fidelity"]
    for key, shape in SHAPES.items():
        full = (len(rows), *(n_max if s == -1 else s for s in shape))
        true, pred = rng.normal(size=full), rng.normal(size=full)
        for i, row in enumerate(rows):
            place = (i, slice(row["n"])) if -1 in shape else (i,)
            pred[place] = true[place] + row["error"][key]
            if not row["label"][key]:
                true[i] = np.nan
        y_pred[key], y_true[key] = torch.tensor(pred), torch.tensor(true)
        y_true[f"{key}_mask"] = torch.tensor([row["label"][key] for row in rows])
    y_pred["numbers"] = torch.tensor(numbers)
    y_pred["coord"] = torch.zeros(len(rows), n_max, 3)
    y_pred["_fidelities"] = torch.tensor([row["fidelity"] for row in rows])
    return y_pred, y_true


def flat(rows: list[dict], seed: int = 0) -> tuple[dict, dict]:
    """All molecules in a row; garbage in labels that are not there."""
    rng = np.random.default_rng(seed)
    sizes = [row["n"] for row in rows]
    y_pred = {
        "numbers": torch.tensor(np.repeat([6 + 200 * row["fidelity"] for row in rows], sizes)),
        "mol_idx": torch.tensor(np.repeat(np.arange(len(rows)), sizes)),
        "coord": torch.zeros(sum(sizes), 3),
        "charge": torch.zeros(len(rows)),
        "_fidelities": torch.tensor([row["fidelity"] for row in rows]),
    }
    y_true = {}
    for key, shape in SHAPES.items():
        join = np.concatenate if -1 in shape else np.stack
        true = [rng.normal(size=row["error"][key].shape) for row in rows]
        y_pred[key] = torch.tensor(join([t + row["error"][key] for t, row in zip(true, rows, strict=True)]))
        known = [t if row["label"][key] else np.full_like(t, np.nan) for t, row in zip(true, rows, strict=True)]
        y_true[key] = torch.tensor(join(known))
        y_true[f"{key}_mask"] = torch.tensor([row["label"][key] for row in rows])
    return y_pred, y_true


def by_numpy(rows: list[dict]) -> dict[str, float]:
    result = {}
    for prefix, fidelities in [("", {0, 1, 2}), ("fid0/", {0}), ("fid1/", {1}), ("fid2/", {2})]:
        for key, options in CFG.items():
            mine = [row for row in rows if row["label"][key] and row["fidelity"] in fidelities]
            named = {options["abbr"]: [row["error"][key].ravel() for row in mine]}
            if key == "energy":
                named["E_per_atom"] = [row["error"][key].ravel() / row["n"] for row in mine]
            for name, errors in named.items():
                if mine:
                    e = np.concatenate(errors) * options.get("scale", 1.0)
                    result[f"{prefix}{name}_mae"] = np.abs(e).mean()
                    result[f"{prefix}{name}_rmse"] = np.sqrt((e**2).mean())
    return result


def evaluated(metric, batches: list) -> dict[str, float]:
    engine = Engine(lambda engine, batch: batch)
    metric.attach(engine, "all")
    return engine.run(batches).metrics


@pytest.mark.parametrize("layout", [batch, flat])
@pytest.mark.parametrize("num_fidelities", [None, 3, 5])
@given(seed=st.integers(0, 10**6), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_metrics_equal_numpy_whatever_the_batches(layout, num_fidelities, seed, sizes):
    rows = molecules(sum(sizes), seed)
    ends = np.cumsum(sizes)
    batches = [layout(rows[end - size : end], i) for i, (end, size) in enumerate(zip(ends, sizes, strict=True))]
    metric = RegMultiMetric(CFG, num_fidelities=num_fidelities)
    assert evaluated(metric, batches) == pytest.approx(by_numpy(rows), rel=1e-10)


def test_nothing_waits_for_the_device_while_batches_are_added(monkeypatch):
    """Whatever reads a tensor's value in Python would wait for a GPU."""
    rows = molecules(12, 5)
    batches = [batch(rows[:4]), batch(rows[4:])]
    metrics = [RegMultiMetric(CFG, num_fidelities=3), LossMetric(MTLoss(LOSS))]
    lacking = {key: value for key, value in batches[1][0].items() if key != "charges"}

    def refuse(*args: object) -> None:
        raise AssertionError("a value is read")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, refuse)
        for metric in metrics:
            for output in [*batches, (lacking, batches[1][1])]:
                metric.update(output)
    assert metrics[0].compute()["E_mae"] == pytest.approx(by_numpy(rows + rows[4:])["E_mae"])
    assert "loss" in metrics[1].compute()


def test_one_molecule_that_is_not_finite_spoils_its_own_fidelity_only():
    rows = molecules(20, 3)
    for row in rows:
        row["label"]["energy"] = True
    next(row for row in rows if row["fidelity"] == 1)["error"]["energy"][()] = np.inf
    result = evaluated(RegMultiMetric(CFG), [batch(rows)])
    assert math.isinf(result["fid1/E_mae"])
    assert math.isinf(result["E_mae"])
    expected = by_numpy(rows)
    assert result["fid0/E_mae"] == pytest.approx(expected["fid0/E_mae"])
    assert result["fid2/E_rmse"] == pytest.approx(expected["fid2/E_rmse"])


def test_second_run_forgets_the_first():
    rows = molecules(2, 1)
    engine = Engine(lambda engine, batch: batch)
    RegMultiMetric(CFG).attach(engine, "all")
    first = dict(engine.run([batch(molecules(30, 2))]).metrics)
    assert set(first) > set(by_numpy(rows))
    assert engine.run([batch(rows)]).metrics == pytest.approx(by_numpy(rows), rel=1e-10)
    metric = RegMultiMetric(CFG)
    metric.update(batch(rows))
    assert metric.compute() == metric.compute()


def test_no_labels_no_numbers():
    rows = molecules(3, 0)
    for row in rows:
        row["label"] = dict.fromkeys(SHAPES, False)
    assert evaluated(RegMultiMetric(CFG), [batch(rows)]) == {}
    assert RegMultiMetric(CFG).compute() == {}


def test_forces_that_were_not_computed_are_absent():
    y_pred, y_true = batch(molecules(3, 0))
    del y_pred["forces"]
    y_true["forces_mask"][:] = False
    assert not [name for name in evaluated(RegMultiMetric(CFG), [(y_pred, y_true)]) if "F_" in name]


def test_label_that_the_model_does_not_predict_is_said_once(caplog):
    rows = molecules(3, 0)
    rows[0]["label"]["charges"] = True
    y_pred, y_true = batch(rows)
    del y_pred["charges"]
    with caplog.at_level(logging.WARNING):
        result = evaluated(RegMultiMetric(CFG), [(y_pred, y_true)] * 3)
    assert "q_mae" not in result
    assert [record.message for record in caplog.records] == [
        "metrics: the data have labels for charges but the model does not predict it"
    ]


def test_sums_are_exact_for_float32_predictions():
    """A hundred thousand equal errors: a sum in float32 would be off in the fourth digit."""
    n = 100_000
    y_pred = {"charges": torch.full((n, 1), 0.1), "numbers": torch.ones(n, 1, dtype=int), "coord": torch.zeros(n, 1, 3)}
    y_true = {"charges": torch.zeros(n, 1)}
    result = evaluated(RegMultiMetric({"charges": {}}), [(y_pred, y_true)])
    assert result["charges_mae"] == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_fidelities_may_have_names():
    rows = molecules(20, 3)
    result = evaluated(RegMultiMetric(CFG, fidelity_names={1: "ccsd"}), [batch(rows)])
    assert result["ccsd/F_mae"] == pytest.approx(by_numpy(rows)["fid1/F_mae"])
    assert "fid0/F_mae" in result
    assert "fid1/F_mae" not in result


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"energy": {"abr": "E"}}, r"metrics.cfg.energy: unknown option abr; did you mean abbr\?"),
        ({"energy": {"scale": "kcal"}}, "metrics.cfg.energy.scale: 'kcal' is not a positive number"),
        ({"energy": {"scale": math.nan}}, "metrics.cfg.energy.scale: nan"),
        ({"forces": {"mult": 0}}, "metrics.cfg.forces.mult: 0 is not a positive number"),
        ({"forces": {"peratom": False}}, "forces is an atomic property; set it to true"),
        ({"energy": {"peratom": True}}, "energy is a molecular property; set it to false"),
        ({"volumes": {"peratom": 1}}, "metrics.cfg.volumes.peratom: 1 is not true or false"),
        ({"energy": {"abbr": ""}}, "metrics.cfg.energy.abbr: '' is not a name"),
        ({"energy": {"abbr": "E"}, "dipole": {"abbr": "E"}}, "two properties have the abbr E"),
        ({"energy": 3}, "metrics.cfg.energy: expected a mapping"),
    ],
)
def test_nonsense_is_refused_with_its_dotted_key(cfg, message):
    with pytest.raises(ValueError, match=message):
        RegMultiMetric(cfg)


def test_wrong_number_of_components_is_refused():
    metric = RegMultiMetric({"forces": {"mult": 1}})
    with pytest.raises(ValueError, match=r"metrics.cfg.forces.mult: 1 components expected, the label has 3"):
        metric.update(batch(molecules(2, 0)))


# --- units and table ----------------------------------------------------------------------------


def test_units_are_stated_for_every_number():
    cfg = {
        "energy": {"abbr": "E", "scale": 23.060548},
        "forces": {"abbr": "F", "scale": 1000},
        "charges": {"abbr": "q"},
        "dipole": {"abbr": "D", "scale": 4.8},
        "stress": {"scale": 96.485},
        "volumes": {},
    }
    metric = RegMultiMetric(cfg)
    stated = {
        "E": "kcal/mol",
        "E_per_atom": "kcal/mol/atom",
        "F": "meV/Å",
        "q": "e",
        "D": "Debye",
        "stress": "kJ/mol/Å³",
        "volumes": "units of the data",
    }
    assert metric.units == {f"{name}_{kind}": unit for name, unit in stated.items() for kind in ("mae", "rmse")}
    reported = evaluated(RegMultiMetric(CFG), [batch(molecules(30, 2))])
    assert {name.rpartition("/")[2] for name in reported} == set(RegMultiMetric(CFG).units)


def test_table_has_a_row_for_each_fidelity_and_says_units():
    metrics = {"loss": 9.0, "energy_loss": 9.0, "E_mae": 1.23456, "F_rmse": 2.0, "ccsd_tq_5/E_mae": 3.0}
    table = metrics_table(metrics, {"E_mae": "kcal/mol", "F_rmse": "kcal/mol/Å", "q_mae": "e"})
    assert [line.split() for line in table.splitlines()] == [
        ["E_mae", "F_rmse"],
        ["kcal/mol", "kcal/mol/Å"],
        ["all", "1.235", "2"],
        ["ccsd_tq_5", "3", "-"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1
    assert "kcal" not in metrics_table(metrics)
    assert metrics_table({"loss": 1.0}).split() == []


# --- loss ---------------------------------------------------------------------------------------


def test_loss_over_batches_is_the_loss_of_one_big_batch():
    rows = molecules(12, 4)
    loss_fn = MTLoss(LOSS)
    whole = loss_fn(*batch(rows))
    for split in ([12], [1, 11], [3, 4, 5]):
        ends = np.cumsum(split)
        batches = [batch(rows[end - size : end]) for end, size in zip(ends, split, strict=True)]
        result = evaluated(LossMetric(loss_fn), batches)
        assert result == pytest.approx(
            {"loss": whole["loss"].item(), "energy_loss": whole["energy"].item(), "forces_loss": whole["forces"].item()}
        )


def test_loss_without_any_label_is_absent():
    rows = molecules(3, 0)
    for row in rows:
        row["label"] = dict.fromkeys(SHAPES, False)
    assert evaluated(LossMetric(MTLoss(LOSS)), [batch(rows)]) == {}
    rows[0]["label"]["energy"] = True
    assert set(evaluated(LossMetric(MTLoss(LOSS)), [batch(rows)])) == {"loss", "energy_loss"}


# --- several processes --------------------------------------------------------------------------


def share(rank: int) -> list[dict]:
    """Rank 0 has eight of thirty molecules, none of fidelity 2; rank 1 has the others."""
    every = molecules(30, 9)
    first = [i for i, row in enumerate(every) if row["fidelity"] < 2][:8]
    return [row for i, row in enumerate(every) if (i in first) == (rank == 0)]


def two_processes(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    mine = share(rank)
    halves = [mine[:3], mine[3:]] if rank == 0 else [mine]
    loss_fn = MTLoss(LOSS)
    engine = Engine(lambda engine, batch: batch)
    RegMultiMetric(CFG).attach(engine, "all")
    LossMetric(loss_fn).attach(engine, "loss")
    metrics = engine.run([batch(half) for half in halves]).metrics
    for num_fidelities in (None, 3):
        metric = RegMultiMetric(CFG, {2: "ccsd"}, num_fidelities)
        if rank == 1:  # the other process has no batch at all
            metric.update(flat(mine))
        metrics[f"alone {num_fidelities}"] = metric.compute()
    # In training, the average over processes is the loss of the global batch, for the value and its gradient.
    y_pred, y_true = batch(mine)
    y_pred["energy"].requires_grad_()
    loss = loss_fn.train()(y_pred, y_true, label_shares(loss_fn, [y_true], "cpu")[0])["loss"]
    loss.backward()
    torch.save([metrics, loss.detach() / 2, y_pred["energy"].grad / 2], f"{directory}/{rank}.pt")


def test_two_processes_report_what_one_would(tmp_path):
    idist.spawn("gloo", two_processes, args=(str(tmp_path),), nproc_per_node=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    ordered = share(0) + share(1)
    y_pred, y_true = batch(ordered)
    y_pred["energy"].requires_grad_()
    whole = MTLoss(LOSS)(y_pred, y_true)
    whole["loss"].backward()
    expected = by_numpy(ordered) | {"loss": whole["loss"].item()}
    of_one = {name.replace("fid2", "ccsd"): value for name, value in by_numpy(share(1)).items()}
    for metrics, _, _ in results:
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-10)
        assert metrics["alone None"] == pytest.approx(of_one, rel=1e-10)
        assert metrics["alone 3"] == pytest.approx(of_one, rel=1e-10)
        assert {name for name in metrics if name.startswith("fid2/")}, "a fidelity that only one process has met"
    assert results[0][0] == results[1][0], "every process decides by the same numbers"
    assert (results[0][1] + results[1][1]).item() == pytest.approx(whole["loss"].item(), rel=1e-10)
    gradient = torch.cat([results[0][2], results[1][2]])
    torch.testing.assert_close(gradient, y_pred["energy"].grad, rtol=1e-10, atol=1e-12)
