"""Losses: what a batch of predictions costs against its labels.

Every loss is a mean over molecules that have the label, of a value per molecule:

    L_k = Σ_m mask_m w_m l_m / Σ_m mask_m      l_m = energy_loss_fn: (ΔE_m)² / √n_m
                                                     the others:     mean of (Δy)² over m's real atoms and components

so that padding, and molecules without the label, change nothing. The factor w_m is one, unless a component says
otherwise for the molecule's fidelity. A batch without any label costs exactly zero and still has a graph. `MTLoss`
adds several of them up, L = Σ_k w_k L_k with Σ_k w_k = 1; `MTAdaWLoss` adapts these factors.

The mean over molecules of several batches (on several processes) is put together from the means over each, with the
shares that `MTLoss.counts` gives; `aimnet2mult.train.engine` does that.

Labels are in ``y_true`` under their key, with ``{key}_mask`` (B,) bool telling which molecules have one (absent:
all). ``y_pred`` holds the predictions together with the inputs ``coord`` and ``numbers``.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aimnet2mult.config.builder import check_kwargs, nearest, resolve
from aimnet2mult.nbops import BATCH_KEYS, mask_padding, mol_sum, real_atoms
from aimnet2mult.ops import point_charge_dipole, point_charge_quadrupole

Batch = Mapping[str, Tensor]

# --------------------------------------------------------------------------------------------------
# the value per molecule, and the one masked mean
# --------------------------------------------------------------------------------------------------


def label_mask(y_true: Batch, key: str) -> Tensor:
    """Tell which molecules have a label: ``{key}_mask``, or all of them where there is no such mask; (B,) bool.

    Raises
    ------
    ValueError
        The batch has no label of that name.
    """
    if key not in y_true:
        known = [name for name in y_true if not name.endswith("_mask")]
        raise ValueError(f"the batch has no label {key}; labels: {', '.join(known)}. Add {key} to data.y")
    mask = y_true.get(f"{key}_mask")
    if mask is None:
        return torch.ones(y_true[key].shape[0], dtype=torch.bool, device=y_true[key].device)
    return mask.bool()


def masked_mean(values: Tensor, mask: Tensor, molecule_weights: Tensor | None = None) -> Tensor:
    """Mean of the values per molecule, each times its weight, over the molecules with a label.

    Parameters
    ----------
    values : Tensor
        (B,).
    mask : Tensor
        Molecules with a label, (B,) bool.
    molecule_weights : Tensor, optional
        Factors w_m, (B,); default one.

    Returns
    -------
    Tensor
        Scalar Σ mask w value / Σ mask; zero, with a graph, if ``mask`` has no molecule.
    """
    if molecule_weights is not None:
        values = values * molecule_weights.to(values.dtype)
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def counted(mask: Tensor, molecule_weights: Tensor | None) -> Tensor:
    """Molecules whose error matters, (B,) bool: they have a label, and a weight that is not zero."""
    return mask if molecule_weights is None else mask & (molecule_weights > 0)


def n_atoms(y_pred: Batch) -> Tensor:
    """Count the real atoms of each molecule, (B,) int, in dense and flat layout."""
    return mol_sum(real_atoms(y_pred["numbers"]).long(), dict(y_pred))


def robust(square: Tensor, delta: float | None) -> Tensor:
    """Let a squared error x² grow like |x| where it is large: 2δ (√(x² + δ²) - δ).

    That is x² for |x| ≪ δ and 2δ|x| for |x| ≫ δ (the pseudo-Huber or Charbonnier loss; Charbonnier et al.,
    10.1109/83.551699), so that a few molecules that fit badly do not rule the gradient. With x a norm it is
    invariant to rotation.

    Parameters
    ----------
    square : Tensor
        x², any shape.
    delta : float or None
        δ > 0, in the unit of x; None: the square as it is.

    Returns
    -------
    Tensor
        Shape of ``square``.

    Raises
    ------
    ValueError
        A ``delta`` that is not a positive number.
    """
    if delta is None:
        return square
    _check_delta(delta, "delta")
    # The difference of the formula above, without the cancellation near zero.
    return 2.0 * delta * square / ((square + delta * delta).sqrt() + delta)


def mean_square(error: Tensor, y_pred: Batch, atomic: bool, delta: float | None = None) -> Tensor:
    """Mean square of an error over what belongs to one molecule.

    Parameters
    ----------
    error : Tensor
        (B, ...) for a molecular property, (B, N, ...) or (A, ...) for an atomic one.
    y_pred : mapping
        The batch; ``numbers`` tells padding from atoms.
    atomic : bool
        Whether the error is that of an atomic property.
    delta : float, optional
        As in `robust`, applied to the mean square over the components, of each atom if ``atomic``.

    Returns
    -------
    Tensor
        (B,): mean over components, and over real atoms if ``atomic``.
    """
    if not atomic:
        return robust(error.pow(2).flatten(1).mean(dim=1) if error.dim() > 1 else error.pow(2), delta)
    atom_dims = y_pred["numbers"].dim()
    square = mask_padding(error, dict(y_pred)).pow(2)
    if square.dim() > atom_dims:
        square = square.flatten(atom_dims).mean(dim=-1)
    return mol_sum(robust(square, delta), dict(y_pred)) / n_atoms(y_pred).clamp(min=1)


def label_error(prediction: Tensor, label: Tensor, mask: Tensor, y_pred: Batch, atomic: bool, key: str) -> Tensor:
    """Prediction minus label, with zero where there is none (also when the place holds NaN).

    Parameters
    ----------
    prediction, label : Tensor
        (B, ...), or (B, N, ...) or (A, ...) if ``atomic``.
    mask : Tensor
        Molecules with a label, (B,) bool.
    y_pred : mapping
        The batch.
    atomic : bool
        Whether the property is atomic.
    key : str
        Its name, for messages.

    Returns
    -------
    Tensor
        Shape of ``label``; places of padding atoms are left as they are.

    Raises
    ------
    ValueError
        The shapes differ.
    """
    if prediction.shape != label.shape:
        raise ValueError(f"{key}: prediction of shape {tuple(prediction.shape)}, label of {tuple(label.shape)}")
    if atomic and y_pred["numbers"].dim() == 1:
        mask = mask[y_pred["mol_idx"]]
    mask = mask.view(mask.shape + (1,) * (label.dim() - mask.dim()))
    return (prediction - label).masked_fill(~mask, 0.0)


def _zero(y_pred: Batch) -> Tensor:
    """Zero that hangs on the graph of the predictions, so that ``backward`` works."""
    for value in y_pred.values():
        if value.requires_grad:
            return value.flatten()[:0].sum()
    return torch.zeros((), device=next(iter(y_pred.values())).device)


def _predicted(y_pred: Batch, key: str, mask: Tensor) -> Tensor | None:
    """Return the prediction, or None where it was left out and no molecule of the batch needs it."""
    if key in y_pred:
        return y_pred[key]
    # The one wait for the device here happens only for a prediction that is not there.
    if bool(mask.any()):
        remedy = "; num_charge_channels: 2 in the model file gives them" if key == "spin_charges" else ""
        raise ValueError(f"the model predicts no {key}; it gives {', '.join(sorted(y_pred))}{remedy}")
    return None


def _is_atomic(key: str) -> bool:
    return key in BATCH_KEYS and BATCH_KEYS[key].kind == "atom"


# --------------------------------------------------------------------------------------------------
# losses
# --------------------------------------------------------------------------------------------------


def _squared_loss(
    y_pred: Batch,
    y_true: Batch,
    key_pred: str,
    key_true: str,
    atomic: bool,
    molecule_weights: Tensor | None,
    delta: float | None,
) -> Tensor:
    mask = label_mask(y_true, key_true)
    prediction = _predicted(y_pred, key_pred, mask)
    if prediction is None:
        return _zero(y_pred)
    error = label_error(prediction, y_true[key_true], counted(mask, molecule_weights), y_pred, atomic, key_true)
    return masked_mean(mean_square(error, y_pred, atomic, delta), mask, molecule_weights)


def mse_loss_fn(
    y_pred: Batch,
    y_true: Batch,
    key_pred: str,
    key_true: str,
    molecule_weights: Tensor | None = None,
    delta: float | None = None,
) -> Tensor:
    """Mean square error of any property: over its components (and real atoms, if atomic), then over molecules.

    Parameters
    ----------
    y_pred, y_true : mapping
        Predictions (with inputs) and labels.
    key_pred, key_true : str
        Name of the prediction and of the label. Whether it is atomic is looked up in `nbops.BATCH_KEYS`; a name that
        is not there counts as molecular.
    molecule_weights : Tensor, optional
        Factor of each molecule's value, (B,); an error with factor zero does not matter even if it is NaN.
    delta : float, optional
        Error, in the property's unit, from which on the loss grows linearly (`robust`); default: it is the square
        everywhere. Of an atomic property the error of an atom is the root mean square over its components.

    Returns
    -------
    Tensor
        Scalar, in the square of the property's unit.

    Raises
    ------
    ValueError
        Label or prediction is missing, or their shapes differ.
    """
    return _squared_loss(y_pred, y_true, key_pred, key_true, _is_atomic(key_true), molecule_weights, delta)


def peratom_loss_fn(
    y_pred: Batch,
    y_true: Batch,
    key_pred: str,
    key_true: str,
    molecule_weights: Tensor | None = None,
    delta: float | None = None,
) -> Tensor:
    """Mean square error of an atomic property (forces, charges): over a molecule's atoms, then over molecules.

    Parameters, result and errors are those of `mse_loss_fn`; the property is taken as atomic whatever its name.
    """
    return _squared_loss(y_pred, y_true, key_pred, key_true, True, molecule_weights, delta)


def energy_loss_fn(
    y_pred: Batch,
    y_true: Batch,
    key_pred: str = "energy",
    key_true: str = "energy",
    molecule_weights: Tensor | None = None,
    delta: float | None = None,
) -> Tensor:
    """Mean over molecules of (ΔE)²/√n_atoms, eV².

    The square root lies between an error per molecule, which large molecules would rule, and an error per atom, which
    would neglect them. Parameters and errors are those of `mse_loss_fn`; what ``delta`` is compared with is
    ΔE/n_atoms^¼.
    """
    mask = label_mask(y_true, key_true)
    prediction = _predicted(y_pred, key_pred, mask)
    if prediction is None:
        return _zero(y_pred)
    error = label_error(prediction, y_true[key_true], counted(mask, molecule_weights), y_pred, False, key_true)
    square = error.pow(2) / n_atoms(y_pred).clamp(min=1).to(error.dtype).sqrt()
    return masked_mean(robust(square, delta), mask, molecule_weights)


Moment = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]
"""Charges, positions and batch -> moment of each molecule."""


def dipole_loss_fn(
    y_pred: Batch,
    y_true: Batch,
    key_pred: str = "charges",
    key_true: str = "dipole",
    molecule_weights: Tensor | None = None,
) -> Tensor:
    """Mean square error of the dipole moment, (e·Å)².

    Parameters
    ----------
    y_pred, y_true : mapping
        Predictions (with inputs) and labels.
    key_pred : str
        An atomic property (charges), of which the dipole moment is taken, or a dipole that the model computes.
    key_true : str
        Label of shape (B, 3), e·Å, about the origin of ``coord``.
    molecule_weights : Tensor, optional
        As in `mse_loss_fn`.

    Returns
    -------
    Tensor
        Scalar, (e·Å)².

    Raises
    ------
    ValueError
        As `mse_loss_fn`.
    """
    return _moment_loss(y_pred, y_true, key_pred, key_true, point_charge_dipole, molecule_weights)


def quadrupole_loss_fn(
    y_pred: Batch,
    y_true: Batch,
    key_pred: str = "charges",
    key_true: str = "quadrupole",
    molecule_weights: Tensor | None = None,
) -> Tensor:
    """Mean square error of the traceless quadrupole moment, (e·Å²)².

    As `dipole_loss_fn`, with labels of shape (B, 6): xx, yy, zz, xy, yz, xz.
    """
    return _moment_loss(y_pred, y_true, key_pred, key_true, point_charge_quadrupole, molecule_weights)


def _moment_loss(
    y_pred: Batch,
    y_true: Batch,
    key_pred: str,
    key_true: str,
    moment: Moment,
    molecule_weights: Tensor | None,
) -> Tensor:
    mask = label_mask(y_true, key_true)
    prediction = _predicted(y_pred, key_pred, mask)
    if prediction is None:
        return _zero(y_pred)
    if _is_atomic(key_pred):
        batch = dict(y_pred)
        prediction = moment(prediction, batch["coord"].detach(), batch)
    error = label_error(prediction, y_true[key_true], counted(mask, molecule_weights), y_pred, False, key_true)
    return masked_mean(mean_square(error, y_pred, atomic=False), mask, molecule_weights)


# --------------------------------------------------------------------------------------------------
# sums of losses
# --------------------------------------------------------------------------------------------------


class MTLoss(nn.Module):
    """Sum of several losses with fixed weights, L = Σ_k w_k L_k.

    Parameters
    ----------
    components : mapping
        Name -> mapping with

        - ``fn``: function (or its dotted name) of ``y_pred`` and ``y_true``,
        - ``weight``: 0 or more; normalised to sum to one,
        - ``kwargs`` (optional): further arguments of the function,
        - ``fidelity_weights`` (optional): fidelity -> factor, 0 or more, of its molecules in this component. The sum
          is divided by the number of molecules with a label, whatever their factors, so a factor of 2 counts twice
          what 1 counts. Fidelities that are left out have 1. The function must take ``molecule_weights``.

    Raises
    ------
    ValueError
        No components, unknown or missing keys, a function that does not resolve or does not take the keywords, a
        weight that is negative or not a number, or weights that are all zero.
    """

    component_options: tuple[str, ...] = ("fn", "weight", "kwargs", "fidelity_weights")
    weights: Tensor

    def __init__(self, components: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        if not isinstance(components, Mapping) or not components:
            raise ValueError("loss.components: expected a mapping with at least one component {fn, weight}")
        self.functions = {name: self._function(name, options) for name, options in components.items()}
        weights = torch.tensor([options["weight"] for options in components.values()], dtype=torch.float64)
        if weights.sum() <= 0:
            raise ValueError("loss.components: all weights are zero; at least one must be positive")
        self.register_buffer("weights", weights / weights.sum(), persistent=False)
        self.key_true = {name: _keyword(function, "key_true") for name, function in self.functions.items()}
        self.key_pred = {name: _keyword(function, "key_pred") for name, function in self.functions.items()}
        self.fidelity_weights: dict[str, dict[int, float]] = {}
        for name, options in components.items():
            given = _fidelity_weights(options.get("fidelity_weights"), self.functions[name], f"loss.components.{name}")
            if given:
                self.fidelity_weights[name] = given

    def check_fidelities(self, num_fidelities: int) -> None:
        """Refuse factors of fidelities that a run does not have, and those that are zero for all that it has.

        Raises
        ------
        ValueError
            Naming ``loss.components.{name}.fidelity_weights``.
        """
        for name, weights in self.fidelity_weights.items():
            where = f"loss.components.{name}.fidelity_weights"
            for f in weights:
                if f >= num_fidelities:
                    raise ValueError(f"{where}: there is no fidelity {f}; there are 0 to {num_fidelities - 1}")
            if not any(weights.get(f, 1.0) for f in range(num_fidelities)):
                raise ValueError(f"{where}: all are zero; make one positive, or leave the component {name} out")

    @classmethod
    def _function(cls, name: str, options: Mapping[str, Any]) -> partial[Tensor]:
        where = f"loss.components.{name}"
        if name == "loss":
            raise ValueError(f"{where}: this name stands for the sum; choose another one")
        if not isinstance(options, Mapping):
            raise ValueError(f"{where}: expected a mapping {{fn, weight, kwargs}}, found {type(options).__name__}")
        for key in options:
            if key not in cls.component_options:
                raise ValueError(f"{where}: unknown option {key}; {nearest(str(key), cls.component_options)}")
        for key in ("fn", "weight"):
            if key not in options:
                raise ValueError(f"{where}: {key} is missing")
        _check_non_negative(options["weight"], f"{where}.weight")
        try:
            function = resolve(options["fn"]) if isinstance(options["fn"], str) else options["fn"]
        except ValueError as error:
            raise ValueError(f"{where}.fn: {error}") from error
        if not callable(function):
            raise ValueError(f"{where}.fn: {options['fn']!r} is not a function or its dotted name")
        kwargs = options.get("kwargs") or {}
        if not isinstance(kwargs, Mapping):
            raise ValueError(f"{where}.kwargs: expected a mapping, found {type(kwargs).__name__}")
        check_kwargs(function, kwargs, f"{where}.kwargs")
        if kwargs.get("delta") is not None:
            _check_delta(kwargs["delta"], f"{where}.kwargs.delta")
        if "molecule_weights" in kwargs:
            raise ValueError(f"{where}.kwargs.molecule_weights: they come from {where}.fidelity_weights; give that")
        bound = partial(function, **kwargs)
        provided = ["y_pred", "y_true"] + (["molecule_weights"] if options.get("fidelity_weights") else [])
        for parameter in inspect.signature(bound).parameters.values():
            keyword = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if keyword and parameter.default is parameter.empty and parameter.name not in provided:
                raise ValueError(f"{where}.kwargs: {parameter.name} is missing")
        return bound

    def needs(self, key: str) -> bool:
        """Tell whether a component uses a prediction; one that does not say which (no ``key_pred``) may use any."""
        return any(used is None or used == key for used in self.key_pred.values())

    def components(self, y_pred: Batch, y_true: Batch) -> dict[str, Tensor]:
        """Return L_k of each component, unweighted scalars with graph."""
        values = {}
        for name, function in self.functions.items():
            with _named(name):
                values[name] = function(y_pred=y_pred, y_true=y_true, **self._molecule_weights(name, y_pred))
        return values

    def _molecule_weights(self, name: str, y_pred: Batch) -> dict[str, Tensor]:
        """Return the factors (B,) of a component that has any, as an argument of its function."""
        if name not in self.fidelity_weights:
            return {}
        if "_fidelities" not in y_pred:
            raise ValueError("fidelity_weights need a batch that says of which fidelity (_fidelities) a molecule is")
        fidelities = y_pred["_fidelities"]
        weights = torch.ones_like(fidelities, dtype=torch.float64)
        for fidelity, weight in self.fidelity_weights[name].items():
            weights = weights.masked_fill(fidelities == fidelity, weight)
        return {"molecule_weights": weights}

    def counts(self, y_true: Batch) -> Tensor:
        """Count the molecules with a label for each component, (K,) float64 on the device of the labels."""
        counts = []
        for name, key in self.key_true.items():
            if key is None:  # a function that does not say which label it uses averages over all molecules
                key = next(label for label in y_true if not label.endswith("_mask"))
                counts.append(torch.tensor(y_true[key].shape[0], device=y_true[key].device))
            else:
                with _named(name):
                    counts.append(label_mask(y_true, key).sum())
        return torch.stack(counts).to(torch.float64)

    def total(self, values: Tensor) -> Tensor:
        """Sum of component values (K,) with the weights that stay the same throughout training; a scalar."""
        return (self.weights.to(values.device) * values).sum()

    def combine(self, values: Tensor) -> Tensor:
        """Sum of component values (K,) with the weights of the moment; a scalar."""
        return self.total(values)

    def adapt(self, values: Tensor) -> None:
        """Learn from the component values (K,) of a step of the optimiser: nothing, the weights are fixed."""

    def forward(self, y_pred: Batch, y_true: Batch, shares: Tensor | None = None) -> dict[str, Tensor]:
        """Loss of a batch.

        Parameters
        ----------
        y_pred, y_true : mapping
            Predictions (with inputs) and labels, see the module's description.
        shares : Tensor, optional
            What each component's value is multiplied with, (K,): the share of this batch's labelled molecules in
            those of all the batches that make up a mean. Default one.

        Returns
        -------
        dict
            ``loss``: the weighted sum, scalar with graph; and under each component's name its unweighted value times
            its share, detached.

        Raises
        ------
        ValueError
            A component finds no label or no prediction; the message begins with the component's dotted name.
        """
        components = self.components(y_pred, y_true)
        values = torch.stack([value.to(torch.float64) for value in components.values()])
        if shares is not None:
            values = values * shares.to(values.device)
        result = dict(zip(components, values.detach().unbind(), strict=True))
        result["loss"] = self.combine(values)
        return result


class MTAdaWLoss(MTLoss):
    """Sum of several losses whose factors adapt until each has its share of the total, L = Σ_k s_k L_k.

    Here ``weight`` is the share of the total loss that a component shall have. After each step of the optimiser
    (`adapt`) the factor s_k is multiplied by 1 + eta where s_k L_k fell short of its share, and by 1 - eta where it
    exceeded it. The factor of the first component stays fixed and sets the scale. This is the rule of the published
    AIMNet2 training code, with three differences: shares are those among the components that have a label in the
    step (a missing label moves nothing), factors stay within ``max_change`` of where they began, and L_k is the mean
    over all batches and processes of the step, so that all processes adapt alike.

    In evaluation mode the sum uses the factors from the beginning, so that validation losses of different epochs
    can be compared. The factors are in the state dict.

    Parameters
    ----------
    components : mapping
        As in `MTLoss`; in addition ``scale``: factor s_k to begin with (default: the normalised weight, so that
        training begins as with `MTLoss`).
    eta : float
        Relative change of a factor per step, between 0 and 1.
    max_change : float
        Largest ratio of a factor to its first value, or the inverse.

    Raises
    ------
    ValueError
        As `MTLoss`; ``scale``, ``eta`` or ``max_change`` out of range.
    """

    component_options = (*MTLoss.component_options, "scale")
    scales: Tensor
    initial_scales: Tensor

    def __init__(
        self, components: Mapping[str, Mapping[str, Any]], eta: float = 0.001, max_change: float = 1000.0
    ) -> None:
        super().__init__(components)
        if not 0 < eta < 1:
            raise ValueError(f"loss.kwargs.eta: {eta} is not between 0 and 1")
        if not max_change >= 1:
            raise ValueError(f"loss.kwargs.max_change: {max_change} is less than 1")
        scales = self.weights.clone()
        for k, (name, options) in enumerate(components.items()):
            if options.get("scale") is not None:
                _check_non_negative(options["scale"], f"loss.components.{name}.scale")
                scales[k] = options["scale"]
        if scales[0] == 0:
            raise ValueError("loss.components: the first one sets the scale; its weight must be positive")
        self.eta = eta
        self.max_change = max_change
        self.register_buffer("initial_scales", scales, persistent=False)
        self.register_buffer("scales", scales.clone())

    def total(self, values: Tensor) -> Tensor:
        """Sum of component values (K,) with the factors from the beginning; a scalar."""
        return (self.initial_scales.to(values.device) * values).sum()

    def combine(self, values: Tensor) -> Tensor:
        """Sum of component values (K,) with the factors of the moment, in evaluation with the first ones; a scalar."""
        if not self.training:
            return self.total(values)
        return (self.scales.to(values.device) * values).sum()

    @torch.no_grad()
    def adapt(self, values: Tensor) -> None:
        """Move each factor a step towards the one that gives its component its share.

        Parameters
        ----------
        values : Tensor
            L_k over all batches and processes of a step of the optimiser, (K,); zero where no molecule has the label.
        """
        self.scales = self.scales.to(values.device)
        weights = self.weights.to(values.device)
        present = (values > 0) & (self.scales > 0)
        parts = torch.where(present, self.scales * values, 0.0)
        share = parts / parts.sum()
        target = torch.where(present, weights, 0.0)
        step = 1.0 + self.eta * torch.sign(target / target.sum() - share)
        step[0] = 1.0
        first = self.initial_scales.to(values.device)
        scales = torch.where(present, self.scales * step, self.scales)
        self.scales = scales.clamp(first / self.max_change, first * self.max_change)


@contextmanager
def _named(component: str) -> Iterator[None]:
    """Begin the message of an error in a component with its dotted name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"loss.components.{component}: {error}") from error


def _keyword(function: partial[Tensor], name: str) -> str | None:
    """Value that a keyword of a bound function has, or None where it has no such keyword."""
    parameter = inspect.signature(function).parameters.get(name)
    return None if parameter is None else parameter.default


def _check_non_negative(value: Any, where: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise ValueError(f"{where}: {value!r} is not a number of 0 or more")


def _check_delta(value: Any, where: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{where}: {value!r} is not a positive number; null for squared errors")


def _fidelity_weights(given: Any, function: partial[Tensor], component: str) -> dict[int, float]:
    """Return the factors that a component gives to fidelities, checked; empty without any."""
    where = f"{component}.fidelity_weights"
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: expected a mapping {{fidelity: factor}}, found {given!r}")
    for fidelity, weight in given.items():
        if isinstance(fidelity, bool) or not isinstance(fidelity, int) or fidelity < 0:
            raise ValueError(f"{where}: {fidelity!r} is not the number of a fidelity, 0 or more")
        _check_non_negative(weight, f"{where}.{fidelity}")
    if given and "molecule_weights" not in inspect.signature(function).parameters:
        raise ValueError(f"{where}: {component}.fn takes no argument molecule_weights (B,); give it one")
    return dict(given)
