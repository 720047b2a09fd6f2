"""Precision of the model, deterministic mode and torch.compile: what makes a training step faster or more exact.

Precision
---------
``float32``
    Everything in float32, sums over atoms in float64.
``float64``
    Model and batches in float64.
``bf16``
    While training, the matrix products of the passes (``mlps.*``, 98 % of the multiplications of the MLPs of the
    full-size model) take their factors in bfloat16, and so do their derivatives, the first and the second. Weights and
    their gradients, biases, activations, geometry, convolutions, charges, readouts and sums stay as they are. bfloat16
    has the range of float32, and the weights that the optimiser changes are float32, so there is no gradient scaler.
    In evaluation mode and in TorchScript the products are those of float32: what is validated, saved and exported is
    the float32 model.

What bf16 changes against float32 (root mean square; ``python benchmarks/acceleration.py --only accuracy --output
accuracy.json``, a minute or two; ``ref_mixed`` is the random model of the tests, the small model that of ``examples``):

======================  ===============  ============  ========  =======  ========================
model                   energy           forces        relative  charges  gradient of the weights
======================  ===============  ============  ========  =======  ========================
ref_mixed               0.25 meV/atom    7.7 meV/Å     3.6 %     2.3 me   1.5 % (cosine 0.9999)
small, untrained        0.014 meV/atom   0.13 meV/Å    0.6 %     0.3 me   0.1 % (cosine 1.0000)
small, after 800 steps  1.6 meV/atom     5.7 meV/Å     0.35 %    0.9 me   6.6 % (cosine 0.9981)
======================  ===============  ============  ========  =======  ========================

Trained for 800 steps in either precision, with the same batches, the small model ends with the same errors on test
data: 316 and 314 meV/atom, 887 and 884 meV/Å. No single layer makes the error, so none is left out. It is noise of
about 2 meV/atom in what the loss sees: use bf16 while errors are well above that, and float32 for the last epochs of a
model that is to be better. It pays where products take the time and the processor has bfloat16 units: a step of the
full-size model (1000 atoms, one thread of a CPU with such units) was about 1.6 times as fast in a short measurement of
three repeats, one of the small model not at all.

Compilation
-----------
A compiled graph has no second backward, so energy and forces are one graph, the gradient inside taken by
`torch.func.grad`, and the backward through it is the first one that the compiler sees. The first step with forces and
the first without wait for the C++ compiler, half a minute to minutes each. On one thread of a CPU the steps after it
are 1.65 times as fast for the small model (``benchmarks/acceleration.py --only time --small``) and were about 1.3 times
as fast for the full-size one in three repeats. Which graph a batch gets may depend on the batches before it, so a run
that was resumed equals one that was not up to round-off, not bit by bit.
"""

import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import pad

from aimnet2mult import nbops
from aimnet2mult.config.builder import ConfigError, nearest
from aimnet2mult.models.aimnet2 import AIMNet2
from aimnet2mult.models.mixed_fidelity_aimnet2 import MixedFidelityAIMNet2
from aimnet2mult.modules import MLP, Forces
from aimnet2mult.neighborlist import neighbor_matrix
from aimnet2mult.train.engine import BATCH_TYPES
from aimnet2mult.train.schema import TrainConfig, TrainerConfig
from aimnet2mult.utils.text import first_line

Batch = dict[str, Tensor]

PRECISIONS = tuple(BATCH_TYPES)

CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_WORKSPACES = (":4096:8", ":16:8")
"""Settings under which cuBLAS gives the same result each time; the first costs 24 MiB, the other is slower."""


# --------------------------------------------------------------------------------------------------
# precision
# --------------------------------------------------------------------------------------------------


class Bf16Linear(nn.Linear):
    """A linear layer whose matrix product is done in bfloat16 while training, with the parameters of another one.

    The factors are rounded to bfloat16, the processor sums in float32, the product is rounded to bfloat16 and then
    added to the bias in float32.

    Parameters
    ----------
    linear : nn.Linear
        The layer in float32; its parameters become those of this layer too.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """(R, F_in) -> (R, F_out), dtype of ``x``."""
        if torch.jit.is_scripting() or not self.training:
            return nn.functional.linear(x, self.weight, self.bias)
        product = nn.functional.linear(x.bfloat16(), self.weight.bfloat16()).to(x.dtype)
        return product if self.bias is None else product + self.bias


def prepare_model(model: AIMNet2, config: TrainerConfig) -> AIMNet2:
    """Give a model the precision of ``trainer.precision``; its state dict keeps its keys.

    Call it before the optimiser is made. Weights that are loaded later take the precision of the model.

    Parameters
    ----------
    model : AIMNet2
        In float32; it is changed in place.
    config : TrainerConfig
        The settings.

    Returns
    -------
    AIMNet2
        The model.

    Raises
    ------
    ConfigError
        An unknown precision.
    """
    if config.precision not in PRECISIONS:
        raise ConfigError(f"trainer.precision: {_unknown_precision(config.precision)}")
    if config.precision == "float64":
        return model.double()
    if config.precision == "bf16":
        for mlp in model.mlps:
            assert isinstance(mlp, MLP)
            for i, layer in enumerate(mlp):
                if isinstance(layer, nn.Linear):
                    mlp[i] = Bf16Linear(layer)
    return model


def _unknown_precision(precision: str) -> str:
    return f"{precision!r} is not a precision; {nearest(precision, PRECISIONS)}"


# --------------------------------------------------------------------------------------------------
# deterministic mode
# --------------------------------------------------------------------------------------------------


@contextmanager
def deterministic(config: TrainerConfig) -> Iterator[None]:
    """Use only operations that give the same result each time, if ``trainer.deterministic``; at the end, as before.

    Enter it before anything is computed on a GPU: cuBLAS reads its environment variable once.

    Raises
    ------
    ConfigError
        An operation inside has no deterministic form, or cuBLAS has been set otherwise.
    """
    if not config.deterministic:
        yield
        return
    workspace = os.environ.get(CUBLAS_VARIABLE)
    if problems := _deterministic_problems():
        raise ConfigError(problems[0])
    mode, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    benchmark = torch.backends.cudnn.benchmark
    os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_WORKSPACES[0])
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if "use_deterministic_algorithms" not in str(error):
            raise
        raise ConfigError(
            f"trainer.deterministic: {_first_sentence(error)}. Set trainer.deterministic=false"
        ) from error
    finally:
        torch.backends.cudnn.benchmark = benchmark
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)
        if workspace is None:
            os.environ.pop(CUBLAS_VARIABLE, None)


def _first_sentence(error: Exception) -> str:
    return str(error).split(". ")[0].split(", but you set")[0]


def _deterministic_problems() -> list[str]:
    workspace = os.environ.get(CUBLAS_VARIABLE)
    if workspace is None or workspace in CUBLAS_WORKSPACES:
        return []
    return [
        f"trainer.deterministic: needs {CUBLAS_VARIABLE} to be {' or '.join(CUBLAS_WORKSPACES)}, found {workspace!r} "
        "in the environment; unset it"
    ]


# --------------------------------------------------------------------------------------------------
# compilation
# --------------------------------------------------------------------------------------------------


class _Network(nn.Module):
    """Encoding and readouts of an internal batch as one call: positions, the rest of the batch, places -> results."""

    def __init__(self, model: AIMNet2) -> None:
        super().__init__()
        self.model = model

    def forward(self, coord: Tensor, batch: Batch, places: Sequence[Tensor]) -> Batch:
        data = self.model.encode({**batch, "coord": coord})
        if isinstance(self.model, MixedFidelityAIMNet2):
            data = self.model.readout(data, places)
        else:
            data = self.model.readout(data)
        return {k: value for k, value in data.items() if k not in batch and k != "coord" and not k.startswith("_")}


def _results(coord: Tensor, network: _Network, weights: Batch, batch: Batch, places: Sequence[Tensor]) -> Batch:
    """Results of a batch; ``weights`` stand in for those of the network that have the same names."""
    return functional_call(network, weights, (coord, batch, places))


def _total_and_results(
    coord: Tensor, network: _Network, weights: Batch, batch: Batch, places: Sequence[Tensor], key: str
) -> tuple[Tensor, Batch]:
    """Sum of the energies ``key``, and all results."""
    results = _results(coord, network, weights, batch, places)
    return results[key].sum(), results


_gradient_and_results = torch.func.grad(_total_and_results, has_aux=True)
"""Gradient of the sum of the energies with respect to ``coord``, and all results."""


class CompiledForces(Forces):
    """`Forces` compiled with torch.compile: the same call; values and gradients agree up to round-off.

    What depends on the data (neighbour lists, which atoms are real and of which fidelity) is found before the graph is
    entered, and a batch enters it with a place of padding, two molecules and some places for each fidelity at least. So
    a graph serves batches of all sizes, whichever fidelities they hold; the readouts of a fidelity that is absent get
    no gradient, as without compilation.

    Parameters
    ----------
    forces : Forces
        An AIMNet2 with forces; its parameters become those of this module, under the same names.
    backend : str
        Of torch.compile.

    Raises
    ------
    ConfigError
        At the first call of a kind: the model cannot be compiled here.
    """

    def __init__(self, forces: Forces, backend: str = "inductor") -> None:
        super().__init__(forces.model, forces.key_in, forces.key_out)
        assert isinstance(self.model, AIMNet2)
        self.train(forces.training)
        # In a tuple, so that the model's parameters are not listed twice.
        self._network = (_Network(self.model),)
        compiled = partial(
            torch.compile,
            fullgraph=True,
            dynamic=True,
            backend=backend,
            options=_INDUCTOR if backend == "inductor" else None,
        )
        self._compiled_results = compiled(_results)
        self._compiled_gradient = compiled(_gradient_and_results)

    def _with_forces(self, data: Batch) -> Batch:
        return self._run(data, with_forces=True)

    def _without_forces(self, data: Batch) -> Batch:
        return self._run(data, with_forces=False)

    def _run(self, data: Batch, with_forces: bool) -> Batch:
        model = self._network[0].model
        batch = nbops.internal_batch(data, model.cutoff)
        inputs = _with_long_range_matrix(batch, model) if nbops.is_flat(batch) else _padded(batch)
        places = _places(model, inputs)
        # Copies, since views and other strides would make graphs of their own.
        inputs = {
            key: value.clone(memory_format=torch.contiguous_format)
            for key, value in inputs.items()
            if key != "_fidelities"
        }
        coord = inputs.pop("coord").detach()
        arguments = (coord, self._network[0], _gated_weights(model, places), inputs, places)
        with _compiler():
            if with_forces:
                gradient, results = self._compiled_gradient(*arguments, self.key_in)
                results[self.key_out] = -gradient
            else:
                results = self._compiled_results(*arguments)
        kept = {key: _without_padding(value, key in model._atom_keys, batch) for key, value in results.items()}
        return nbops.emitted_batch({**batch, **kept}, data, model._atom_keys)


def _with_long_range_matrix(batch: Batch, model: AIMNet2) -> Batch:
    """Flat internal batch with the neighbours of the long-range terms, which no compiled graph can search for."""
    cutoff = model.cutoff_lr_periodic if "cell" in batch else model.cutoff_lr
    if cutoff == 0.0 or "nbmat_lr" in batch:
        return batch
    real, n_rows = batch["_real_idx"], batch["numbers"].shape[0]
    nbmat, shifts = neighbor_matrix(batch["coord"][real], batch["mol_idx"][real], cutoff, batch.get("cell"))
    # Rows and entries from packed atoms to the batch; padding rows share the padding row of the list.
    packed = torch.full((n_rows,), len(real), device=real.device)
    packed[real] = torch.arange(len(real), device=real.device)
    places = torch.cat([real, torch.tensor([n_rows - 1], device=real.device)])
    batch = {**batch, "nbmat_lr": places[nbmat][packed]}
    if shifts is not None:
        batch["shifts_lr"] = shifts[packed]
    return batch


def _padded(batch: Batch) -> Batch:
    """Dense internal batch with two molecules and a place of padding at least.

    An axis of length one would make a graph of its own, and so would a batch without padding.
    """
    numbers = batch["numbers"]
    molecules = int(numbers.shape[0] == 1)
    places = int(batch["_real_idx"].shape[0] == numbers.numel())
    if not molecules and not places:
        return batch
    numbers = pad(numbers, (0, places, 0, molecules))
    return {
        "coord": pad(batch["coord"], (0, 0, 0, places, 0, molecules)),
        "numbers": numbers,
        "charge": pad(batch["charge"], (0, molecules)),
        "mult": pad(batch["mult"], (0, molecules), value=1.0),
        "_real_idx": nbops.real_atoms(numbers).flatten().nonzero().squeeze(1),
    }


def _without_padding(value: Tensor, atomic: bool, batch: Batch) -> Tensor:
    """Result for the molecules and places of a batch, without what `_padded` added."""
    if nbops.is_flat(batch):
        return value
    n_molecules, n_places = batch["numbers"].shape
    return value[:n_molecules, :n_places] if atomic else value[:n_molecules]


def _places(model: AIMNet2, batch: Batch) -> list[Tensor]:
    """Places of the atoms of each fidelity that has readouts of its own, and `_SPARE` times a place of padding."""
    if not (isinstance(model, MixedFidelityAIMNet2) and model.use_fidelity_readouts):
        return []
    padding = batch["numbers"].flatten().argmin().expand(_SPARE)
    return [torch.cat([places, padding]) for places in model.atom_places(batch)]


def _gated_weights(model: AIMNet2, places: Sequence[Tensor]) -> dict[str, Tensor]:
    """Weights of each fidelity's readouts, cut off from those of the model where the batch has no atom of it."""
    if not torch.is_grad_enabled():
        return {}
    weights: dict[str, Tensor] = {}
    for f, index in enumerate(places):
        present = index.shape[0] > _SPARE
        for name, weight in cast(nn.ModuleList, model.fidelity_readouts)[f].named_parameters():
            source = weight if present else weight.detach().requires_grad_(weight.requires_grad)
            # A copy of either, since parameters, leaves and views would make graphs of their own.
            weights[f"model.fidelity_readouts.{f}.{name}"] = source.clone()
    return weights


_INDUCTOR = {"force_pointwise_cat": True, "comprehensive_padding": False}
"""Tensors kept for the backward are stored as they are in the graph, not inside a concatenation and not padded: the
compiler takes the strides of such places from the first batch, and a batch of another size ends in an error."""

_GRAPHS = 256
"""Graphs at most, for kinds of batches (dense, flat, of one atom, of sums with more than 4096 terms, ...)."""

_SPARE = 32
"""Places of padding among those of a fidelity: with so few, or none, the compiler would make a graph of its own."""


@contextmanager
def _compiler() -> Iterator[None]:
    """Settings of the compiler, and its errors in the words of the settings.

    Axes of the same length in the first batch may differ in the next, and DDP must not divide the graph.
    """
    from torch._dynamo import config as dynamo  # these take two seconds to import
    from torch._dynamo.exc import TorchDynamoException
    from torch.fx.experimental import _config as symbolic_shapes

    with (
        dynamo.patch(optimize_ddp=False, cache_size_limit=_GRAPHS),
        symbolic_shapes.patch(use_duck_shape=False),  # type: ignore[attr-defined]
        warnings.catch_warnings(),
    ):
        # The compiler looks at the gradients of whatever enters.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf Tensor", UserWarning)
        try:
            yield
        except TorchDynamoException as error:
            raise ConfigError(
                f"trainer.compile: this model cannot be compiled here ({type(error).__name__}: {first_line(error)}). "
                "Set trainer.compile=false"
            ) from error


def accelerated(forces: Forces, config: TrainerConfig) -> Forces:
    """Compile the evaluation of energies and forces, if ``trainer.compile``; otherwise return it as it is.

    Parameters
    ----------
    forces : Forces
        A prepared model (`prepare_model`) with forces, on its device; wrap the result in DDP, not the other way round.
    config : TrainerConfig
        The settings.

    Returns
    -------
    Forces
        With the same call, parameters and names of parameters.

    Raises
    ------
    ConfigError
        There is no compiler.
    """
    if not config.compile:
        return forces
    device = next(forces.parameters()).device
    if problems := _compiler_problems(device.type):
        raise ConfigError(problems[0])
    return CompiledForces(forces)


def _compiler_problems(device_type: str) -> list[str]:
    compiler = os.environ.get("CXX") or _CXX.get(sys.platform, "g++")
    problems = []
    if torch.torch_version.TorchVersion(torch.__version__) < _TORCH:
        problems.append(
            f"trainer.compile: is tested with torch {_TORCH} and later, found {torch.__version__}. "
            "Update torch, or set trainer.compile=false"
        )
    if shutil.which(compiler) is None:
        problems.append(
            f"trainer.compile: needs a C++ compiler, and there is no {compiler} (environment variable CXX names "
            "another). Install one, or set trainer.compile=false"
        )
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        problems.append("trainer.compile: needs the package triton on a GPU. Install it, or set trainer.compile=false")
    return problems


_TORCH = "2.13"
"""What the compiler can do with second derivatives and varying sizes differs from version to version."""

_CXX = {"darwin": "clang++", "win32": "cl"}
"""What torch.compile calls where CXX does not say; elsewhere g++."""


# --------------------------------------------------------------------------------------------------
# checks
# --------------------------------------------------------------------------------------------------


def check_acceleration(config: TrainConfig, device: torch.device) -> list[str]:
    """Return what is wrong with precision, compile and deterministic on a device, one message a problem."""
    trainer = config.trainer
    problems: list[str] = []
    if trainer.precision not in PRECISIONS:
        problems.append(f"trainer.precision: {_unknown_precision(trainer.precision)}")
    if trainer.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        problems.append(
            f"trainer.precision: {torch.cuda.get_device_name(device)} has no bfloat16 arithmetic. Set it to float32"
        )
    if trainer.deterministic:
        problems += _deterministic_problems()
    if trainer.compile:
        problems += [*_compiler_problems(device.type), *_watch_problems(config)]
    return problems


def _watch_problems(config: TrainConfig) -> list[str]:
    """Weights & Biases hooks on the calls of modules, of which a compiled graph has none."""
    watch = config.wandb.watch_model if config.wandb is not None else None
    if watch is None or (watch.log == "gradients" and not watch.log_graph):
        return []
    return [
        "wandb.watch_model: with trainer.compile only log=gradients without log_graph works, found "
        f"log={watch.log}, log_graph={str(watch.log_graph).lower()}"
    ]
