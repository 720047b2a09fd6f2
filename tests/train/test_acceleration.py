"""Precision, deterministic mode and compiled forces."""

import copy
import os
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.models.base import build_model, load_model_config
from aimnet2mult.modules import BatchPart, Forces
from aimnet2mult.train.acceleration import (
    CompiledForces,
    accelerated,
    check_acceleration,
    deterministic,
    prepare_model,
)
from aimnet2mult.train.engine import make_step
from aimnet2mult.train.loss import MTLoss
from aimnet2mult.train.schema import TrainConfig, TrainerConfig, WandbConfig, WatchModelConfig

FIXTURES = Path(__file__).parents[1] / "fixtures"
LOSS = {
    "energy": {"fn": "aimnet2mult.train.loss.energy_loss_fn", "weight": 1.0},
    "forces": {
        "fn": "aimnet2mult.train.loss.peratom_loss_fn",
        "weight": 1.0,
        "kwargs": {"key_true": "forces", "key_pred": "forces"},
    },
}
TINY = {
    "class": "aimnet2mult.models.aimnet2.AIMNet2",
    "kwargs": {
        "nfeature": 3,
        "d2features": True,
        "ncomb_v": 2,
        "hidden": [[8], [8]],
        "aim_size": 5,
        "aev": {"rc_s": 5.0, "nshifts_s": 4},
        "num_charge_channels": 2,
        "outputs": {
            "energy_mlp": {
                "class": "aimnet2mult.modules.Output",
                "kwargs": {"n_in": 5, "n_out": 1, "key_in": "aim", "key_out": "energy", "mlp": {"hidden": [6]}},
            },
            "atomic_shift": {
                "class": "aimnet2mult.modules.AtomicShift",
                "kwargs": {"key_in": "energy", "key_out": "energy"},
            },
            "atomic_sum": {
                "class": "aimnet2mult.modules.AtomicSum",
                "kwargs": {"key_in": "energy", "key_out": "energy"},
            },
            "lrcoulomb": {
                "class": "aimnet2mult.modules.LRCoulomb",
                "kwargs": {"key_in": "charges", "key_out": "energy", "method": "simple", "rc": 4.6},
            },
        },
    },
}


def settings(precision="float32", compile=False, deterministic=False):
    return TrainerConfig(precision=precision, compile=compile, deterministic=deterministic)


@pytest.fixture
def mixed_batch(reference):
    """The reference molecules of three fidelities in one batch."""

    def batch(dtype=torch.float32):
        values = reference("ref_mixed")
        x = {key: torch.tensor(values[key]).to(dtype) for key in ("coord", "charge", "mult")}
        return {**x, "numbers": torch.tensor(values["numbers_mixed"])}

    return batch


def gradients(model, out, keys=("energy", "forces")):
    """Gradient of a loss over results with respect to each weight, None where there is none."""
    model.zero_grad(set_to_none=True)
    sum(out[key].double().pow(2).mean() for key in keys).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def joined(gradients):
    return torch.cat([g.flatten() for g in gradients.values() if g is not None])


# --------------------------------------------------------------------------------------------------
# precision
# --------------------------------------------------------------------------------------------------


def test_float64_is_float64_from_batch_to_gradient(reference_model, mixed_batch, reference):
    model = Forces(prepare_model(reference_model("ref_mixed", torch.float32), settings("float64"))).train()
    assert {p.dtype for p in model.parameters()} | {b.dtype for b in model.buffers()} == {torch.float64}
    x = mixed_batch(torch.float64)
    out = model(x)
    assert all(out[key].dtype == torch.float64 for key in ("energy", "forces", "charges", "spin_charges"))
    torch.testing.assert_close(out["energy"], torch.tensor(reference("ref_mixed")["energy_mixed_f64"]))
    assert all(g.dtype == torch.float64 for g in gradients(model, out).values() if g is not None)

    direction = torch.randn(x["coord"].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction = direction * (x["numbers"] > 0).unsqueeze(-1)
    step = 1e-5
    energies = [model({**x, "coord": x["coord"] + s * step * direction})["energy"] for s in (1, -1)]
    slope = (energies[0] - energies[1]) / (2 * step)
    torch.testing.assert_close(-(out["forces"] * direction).sum(dim=(1, 2)), slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("precision", ["float32", "float64", "bf16"])
def test_weights_and_their_names_do_not_change_with_the_precision(reference_model, precision):
    before = reference_model("ref_mixed", torch.float32).state_dict()
    prepared = prepare_model(reference_model("ref_mixed", torch.float32), settings(precision)).state_dict()
    assert list(prepared) == list(before)
    for key, value in before.items():
        assert torch.equal(prepared[key], value.to(prepared[key].dtype)), key


def test_bf16_is_close_to_float32_in_energies_forces_and_the_gradient_of_the_weights(reference_model, mixed_batch):
    x = mixed_batch()
    exact, rounded = (
        Forces(prepare_model(reference_model("ref_mixed", torch.float32), settings(precision))).train()
        for precision in ("float32", "bf16")
    )
    a, b = exact(x), rounded(x)
    n_atoms = (x["numbers"] > 0).sum(dim=1)
    energy_error = ((a["energy"] - b["energy"]) / n_atoms).abs().max()
    assert 1e-6 < energy_error < 2e-3  # eV/atom
    force_error = (a["forces"] - b["forces"]).norm() / a["forces"].norm()
    assert 1e-4 < force_error < 0.08
    ga, gb = (gradients(model, out) for model, out in ((exact, a), (rounded, b)))
    assert [name for name, g in ga.items() if g is None] == [name for name, g in gb.items() if g is None]
    assert all(g.dtype == torch.float32 for g in gb.values() if g is not None)
    assert nn.functional.cosine_similarity(joined(ga), joined(gb), dim=0) > 0.99


class Products(TorchDispatchMode):
    """Counts matrix products by type of their factors."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.counts[args[-1].dtype] = self.counts.get(args[-1].dtype, 0) + 1
        return func(*args, **(kwargs or {}))


def test_bf16_products_are_those_of_the_passes_in_both_backwards(reference_model, mixed_batch):
    model = Forces(prepare_model(reference_model("ref_mixed", torch.float32), settings("bf16"))).train()
    layers = sum(isinstance(layer, nn.Linear) for mlp in model.model.mlps for layer in mlp)
    with Products() as forward:
        out = model(mixed_batch())
    assert forward.counts[torch.bfloat16] == 2 * layers  # features, and dE/d(features)
    with Products() as backward:
        gradients(model, out)
    assert backward.counts[torch.bfloat16] >= 3 * layers
    assert forward.counts[torch.float32] > 0, "the readouts stay in float32"


def test_in_evaluation_and_in_torchscript_bf16_is_float32_bit_by_bit(reference_model, molecules):
    exact = reference_model("ref_single", torch.float32)
    model = prepare_model(reference_model("ref_single", torch.float32), settings("bf16"))
    x = molecules(torch.float32)
    expected = exact(x)
    assert torch.equal(model.eval()(x)["energy"], expected["energy"])
    model.train()
    assert not torch.equal(model(x)["energy"], expected["energy"])
    assert not torch.equal(copy.deepcopy(model)(x)["energy"], expected["energy"])
    scripted = torch.jit.script(model)
    for _ in range(4):
        assert torch.equal(scripted(x)["energy"], expected["energy"])


def test_training_in_bf16_follows_that_in_float32(mixed_batch):
    x = mixed_batch()
    labels = {"energy": torch.linspace(-3, 3, len(x["charge"])).double(), "forces": 0.1 * x["coord"].sin()}
    losses = {}
    for precision in ("float32", "bf16"):
        torch.manual_seed(0)
        model = Forces(
            prepare_model(build_model(load_model_config(FIXTURES / "ref_mixed_model.yaml"), 3), settings(precision))
        )
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        step = make_step(model, optimizer, MTLoss(LOSS), "cpu", precision=precision)
        results = [step([(x, labels)]) for _ in range(15)]
        assert all(result.applied for result in results)
        assert all(p.dtype == torch.float32 for p in model.parameters())
        losses[precision] = [result.losses["loss"].item() for result in results]
    assert losses["float32"][-1] < 0.7 * losses["float32"][0]
    assert losses["bf16"] == pytest.approx(losses["float32"], rel=0.03)


def test_an_unknown_precision_is_refused():
    with pytest.raises(ConfigError, match=r"trainer\.precision: 'bfloat16' is not a precision; .*bf16"):
        prepare_model(build_model(TINY), settings("bfloat16"))


# --------------------------------------------------------------------------------------------------
# deterministic mode
# --------------------------------------------------------------------------------------------------


def state():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


@pytest.fixture
def workspace(monkeypatch):
    """Set the variable of cuBLAS, or remove it."""

    def change(value):
        if value is None:
            monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        else:
            monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", value)

    return change


@pytest.mark.parametrize(("given", "inside"), [(None, ":4096:8"), (":16:8", ":16:8")])
def test_deterministic_mode_restores_what_it_changed(workspace, monkeypatch, given, inside):
    workspace(given)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = state()
    with deterministic(settings()):
        assert state() == before
    with deterministic(settings(deterministic=True)):
        assert state() == (True, False, False, inside)
    assert state() == before
    with pytest.raises(KeyError), deterministic(settings(deterministic=True)):
        raise KeyError
    assert state() == before


def test_a_training_step_has_a_deterministic_form(workspace, mixed_batch):
    workspace(None)
    torch.manual_seed(0)
    model = Forces(build_model(TINY, 3)).train()
    with deterministic(settings(deterministic=True)):
        assert joined(gradients(model, model(mixed_batch()))).isfinite().all()


def test_an_operation_without_deterministic_form_is_named(workspace):
    workspace(None)
    message = (
        r"trainer\.deterministic: put_ does not have a deterministic implementation\. Set trainer\.deterministic=false$"
    )
    with pytest.raises(ConfigError, match=message), deterministic(settings(deterministic=True)):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1), accumulate=False)
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match=r"^another$"), deterministic(settings(deterministic=True)):
        raise RuntimeError("another")


def test_a_setting_of_cublas_that_is_not_deterministic_is_refused(workspace):
    workspace(":8:1")
    with (
        pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG to be :4096:8 or :16:8, found ':8:1'"),
        deterministic(settings(deterministic=True)),
    ):
        pass


# --------------------------------------------------------------------------------------------------
# compilation
# --------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch.compiler.reset()


class CountGraphs:
    """Backend of torch.compile that runs a graph as it was captured, and counts graphs."""

    def __init__(self):
        self.n = 0

    def __call__(self, graph, inputs):
        self.n += 1
        return graph.forward


def assert_same(eager, compiled, x, **kwargs):
    """Results, their keys and shapes, and which weights get which gradient, agree up to round-off."""
    a, b = eager(x, **kwargs), compiled(x, **kwargs)
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(b[key], a[key], rtol=1e-4, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}")
    if not torch.is_grad_enabled():
        return
    keys = [key for key in ("energy", "forces", "charges") if key in a]
    ga, gb = gradients(eager, a, keys), gradients(compiled, b, keys)
    assert list(ga) == list(gb)
    for name in ga:
        assert (ga[name] is None) == (gb[name] is None), name
        if ga[name] is not None:
            scale = max(ga[name].abs().max().item(), 1e-3)
            assert (ga[name] - gb[name]).abs().max().item() < 1e-4 * scale, name


def chosen(x, rows):
    """Some molecules of a batch, as views with as many places as the longest needs."""
    part = {key: value[rows] for key, value in x.items()}
    n_places = int((part["numbers"] > 0).sum(dim=1).max())
    return {key: value[:, :n_places] if value.dim() > 1 else value for key, value in part.items()}


def fidelity(x):
    return x["numbers"].max(dim=1).values // 200


def test_one_compiled_graph_serves_all_batches(mixed_batch):
    torch.manual_seed(0)
    eager, backend = Forces(build_model(TINY, 3)).train(), CountGraphs()
    compiled = CompiledForces(eager, backend)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    x = mixed_batch()
    f = fidelity(x)
    assert set(f.tolist()) == {0, 1, 2}
    assert_same(eager, compiled, x)
    assert backend.n == 1
    for present in ([0], [1], [2], [0, 2], [1, 2]):
        assert_same(eager, compiled, chosen(x, torch.isin(f, torch.tensor(present))))
    for alone in (0, 5):
        assert_same(eager, compiled, chosen(x, torch.tensor([alone])))
    same = chosen(x, torch.tensor([3, 3]))
    assert (same["numbers"] > 0).all(), "a batch without padding"
    assert_same(eager, compiled, same)
    with torch.no_grad():
        eager.model.afv.weight.mul_(1.1)
    assert_same(eager, compiled, x)
    assert backend.n == 1

    assert_same(eager, compiled, x, compute_forces=False)
    assert_same(eager, compiled, chosen(x, f == 1), compute_forces=False)
    parts = BatchPart(torch.tensor([0, 2, 4]), 13), BatchPart(torch.tensor([1, 3, *range(5, 13)]), 13, False)
    assert_same(eager, compiled, x, parts=parts)
    assert backend.n == 2

    other = copy.deepcopy(compiled)
    with torch.no_grad():
        other.model.afv.weight.mul_(1.1)
    assert_same(Forces(other.model), other, x)
    assert_same(eager, compiled, x)
    assert backend.n == 2


@pytest.mark.slow
def test_compiled_evaluation_in_evaluation_mode_and_of_flat_batches(mixed_batch, to_flat):
    torch.manual_seed(0)
    eager, backend = Forces(build_model(TINY, 3)), CountGraphs()
    compiled = CompiledForces(eager, backend)
    x = mixed_batch()
    eager.eval()
    with torch.no_grad():
        assert_same(eager, compiled, x)
        assert_same(eager, compiled, chosen(x, fidelity(x) == 2))
    assert backend.n == 1
    eager.train()
    compiled.train()
    assert_same(eager, compiled, to_flat(x))
    assert_same(eager, compiled, to_flat(chosen(x, torch.tensor([2, 7, 8]))))
    assert backend.n == 2


@pytest.mark.slow
@pytest.mark.parametrize("num_fidelities", [1, 3])
def test_compiled_model_without_readouts_of_fidelities(mixed_batch, num_fidelities):
    torch.manual_seed(0)
    eager, backend = Forces(build_model(TINY, num_fidelities, use_fidelity_readouts=False)).train(), CountGraphs()
    x = mixed_batch()
    if num_fidelities == 1:
        x["numbers"] = x["numbers"] % 200
    compiled = CompiledForces(eager, backend)
    assert_same(eager, compiled, x)
    assert_same(eager, compiled, chosen(x, torch.tensor([1, 6])))
    assert backend.n == 1


@pytest.mark.slow
def test_compiled_in_float64_and_bf16(mixed_batch):
    for precision, dtype in (("float64", torch.float64), ("bf16", torch.float32)):
        torch.manual_seed(0)
        eager = Forces(prepare_model(build_model(TINY, 3), settings(precision))).train()
        assert_same(eager, CompiledForces(eager, CountGraphs()), mixed_batch(dtype))


@pytest.mark.slow
def test_ddp_shares_gradients_of_compiled_forces(mixed_batch, tmp_path):
    torch.manual_seed(0)
    eager = Forces(build_model(TINY, 3)).train()
    x = chosen(mixed_batch(), fidelity(mixed_batch()) != 1)
    expected = gradients(eager, eager(x))
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DDP's own
            shared = DistributedDataParallel(CompiledForces(eager, CountGraphs()), find_unused_parameters=True)
            found = gradients(shared, shared(x))
    finally:
        torch.distributed.destroy_process_group()
    for name, value in expected.items():
        other = found[f"module.{name}"]
        # DDP gives zeros to weights that no process used.
        torch.testing.assert_close(other, torch.zeros_like(other) if value is None and other is not None else value)


class Careless(nn.Module):
    """A readout that looks at numbers while it runs, which no graph can hold."""

    key_in = key_out = "energy"

    def forward(self, data):
        if data["energy"].sum().item() > 0:
            data["energy"] = data["energy"] + 1.0
        return data


def test_a_model_that_cannot_be_compiled_is_refused(mixed_batch):
    model = build_model(TINY)
    model.add_output("careless", Careless())
    x = mixed_batch()
    x["numbers"] = x["numbers"] % 200
    with pytest.raises(ConfigError, match=r"^trainer\.compile: this model cannot be compiled here .*compile=false$"):
        CompiledForces(Forces(model), CountGraphs())(x)


def test_without_compile_forces_stay_as_they_are(monkeypatch):
    forces = Forces(build_model(TINY))
    assert accelerated(forces, settings()) is forces
    assert isinstance(accelerated(forces, settings(compile=True)), CompiledForces)
    monkeypatch.setenv("CXX", "no_such_compiler")
    message = r"trainer\.compile: needs a C\+\+ compiler, and there is no no_such_compiler .*compile=false"
    with pytest.raises(ConfigError, match=message):
        accelerated(forces, settings(compile=True))
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(torch, "__version__", "2.6.0+cu124")
    with pytest.raises(ConfigError, match=r"trainer\.compile: is tested with torch 2\.13 and later, found 2\.6\.0"):
        accelerated(forces, settings(compile=True))


def test_contradictions_are_found_before_a_run(monkeypatch, workspace):
    workspace(None)
    cpu = torch.device("cpu")
    config = TrainConfig(trainer=settings("bf16", compile=True, deterministic=True), wandb=None)
    assert check_acceleration(config, cpu) == []
    config.wandb = WandbConfig(watch_model=WatchModelConfig(log="gradients"))
    assert check_acceleration(config, cpu) == []

    config.wandb = WandbConfig(watch_model=WatchModelConfig(log="all"))
    workspace(":0:0")
    monkeypatch.setenv("CXX", "no_such_compiler")
    config.trainer.precision = "fp16"
    keys = [message.split(":")[0] for message in check_acceleration(config, cpu)]
    assert keys == ["trainer.precision", "trainer.deterministic", "trainer.compile", "wandb.watch_model"]

    config = TrainConfig(trainer=settings("bf16"), wandb=None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "GTX")
    assert check_acceleration(config, cpu) == []
    (message,) = check_acceleration(config, torch.device("cuda", 0))
    assert message == "trainer.precision: GTX has no bfloat16 arithmetic. Set it to float32"


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a C++ compiler on cores that others use
def test_compiled_code_gives_the_same_for_batches_of_all_sizes(mixed_batch, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    eager = Forces(build_model(TINY, 3)).train()
    compiled = accelerated(eager, settings(compile=True))
    x = mixed_batch()
    f = fidelity(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        assert_same(eager, compiled, x)
        for rows in (f == 0, f != 2, torch.tensor([3, 3])):
            assert_same(eager, compiled, chosen(x, rows))
