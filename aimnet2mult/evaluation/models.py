"""Models that are evaluated: each fidelity of a checkpoint, a compiled model, or a model at the end of its training.

All become a `Predictor`, which takes molecules as a dataset has them and gives energies relative to the self-atomic
energies. What the labels of a dataset contain, predictions contain: dispersion that training subtracted is added again,
with the module that compiling embeds. The model at the end of a training is compared with labels from which dispersion
is subtracted, and nothing is added.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aimnet2mult.config.builder import nearest
from aimnet2mult.constants import FIDELITY_OFFSET
from aimnet2mult.data.ledger import DispersionLabel
from aimnet2mult.data.sae import reference_energy
from aimnet2mult.models.all_fidelities import load_all_fidelities
from aimnet2mult.models.base import layout_of_weights, load_checkpoint
from aimnet2mult.models.jit_wrapper import load_jit_model
from aimnet2mult.models.loading import deployable_model
from aimnet2mult.models.potential import Potential
from aimnet2mult.modules import Forces
from aimnet2mult.nbops import encode_fidelity
from aimnet2mult.reference_energies import ReferenceEnergies
from aimnet2mult.tools.compile_options import COMMAND_LINE, SUBTRACTED

COMPILED_SUFFIX = ".jpt"
"""How names of compiled models end; everything else is a checkpoint."""

INPUTS = ("coord", "numbers", "charge", "mult", "cell")
"""Arrays of a dataset that models are given."""


Predict = Callable[[Mapping[str, np.ndarray], Collection[str]], dict[str, np.ndarray]]
"""Predicts properties of molecules of one size.

The first argument holds those of `INPUTS` that the dataset has, (k, ...), plain atomic numbers; the second says which
properties are wanted (forces cost time). The result is property -> (k, ...) float64, also of others; energies relative
to the self-atomic energies, eV.
"""


@dataclass
class Predictor:
    """One fidelity of a model.

    Attributes
    ----------
    model : str
        Where the model comes from.
    fidelity : int
        Number of the fidelity.
    name : str or None
        Its name.
    species : list of int
        Elements that it knows.
    sae : mapping of int to float
        Self-atomic energies, eV, or `ReferenceEnergies`; energies are predicted relative to them. Empty: nothing is
        subtracted.
    predict : callable
        `Predict`.
    notes : list of str
        What a reader of its errors should know.
    """

    model: str
    fidelity: int
    name: str | None
    species: list[int]
    sae: Mapping[int, float]
    predict: Predict
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What to call the fidelity: its name, or its number."""
        return self.name or f"fidelity {self.fidelity}"

    def reference(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Reference energies of molecules as a dataset has them (`aimnet2mult.data.sae.reference_energy`), (k,), eV."""
        return reference_energy(arrays, self.sae)


def predict_totals(
    function: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device,
    sae: Mapping[int, float],
) -> Predict:
    """Predict with a function from plain atomic numbers to total energies: a compiled model, or as it would be.

    Parameters
    ----------
    function : callable
        `DeployableModel` or `aimnet2mult.models.jit_wrapper.Potential`.
    dtype, device
        Of its weights.
    sae : mapping
        Self-atomic energies, eV.
    """

    def predict(arrays: Mapping[str, np.ndarray], keys: Collection[str]) -> dict[str, np.ndarray]:
        out = _results(function(_tensors(arrays, dtype, device)))
        out["energy"] -= reference_energy(arrays, sae)
        return out

    return predict


def predict_residuals(forces: Forces, fidelity: int, fidelity_offset: int, inputs: Collection[str]) -> Predict:
    """Predict with a fidelity of a model in memory, whose energies are relative to the self-atomic energies.

    Parameters
    ----------
    forces : Forces
        The model with forces.
    fidelity, fidelity_offset : int
        Which fidelity; distance of the element types of two.
    inputs : collection of str
        Arrays that it was trained with.
    """

    def predict(arrays: Mapping[str, np.ndarray], keys: Collection[str]) -> dict[str, np.ndarray]:
        weight = next(forces.parameters())
        data = _tensors({k: v for k, v in arrays.items() if k in inputs}, weight.dtype, weight.device)
        n_molecules = len(data["numbers"])
        data.setdefault("charge", torch.zeros(n_molecules, dtype=weight.dtype, device=weight.device))
        data.setdefault("mult", torch.ones(n_molecules, dtype=weight.dtype, device=weight.device))
        data["numbers"] = encode_fidelity(data["numbers"], fidelity, fidelity_offset)
        data["_fidelities"] = torch.full((n_molecules,), fidelity, device=weight.device)
        with torch.no_grad():
            out = forces(data, compute_forces="forces" in keys)
        return _results({key: value for key, value in out.items() if key not in data and key != "aim"})

    return predict


def _tensors(arrays: Mapping[str, np.ndarray], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Inputs of a model, floats in its precision."""
    return {
        key: torch.as_tensor(arrays[key]).to(device, torch.int64 if key == "numbers" else dtype)
        for key in INPUTS
        if key in arrays
    }


def _results(out: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {key: value.detach().to("cpu", torch.float64).numpy() for key, value in out.items()}


# --------------------------------------------------------------------------------------------------
# files
# --------------------------------------------------------------------------------------------------


@dataclass
class Together:
    """All F fidelities of a model.

    Attributes
    ----------
    model : str
        Where it comes from.
    names : list of str
        What to call the fidelities.
    sae : sequence of mapping
        Reference energies of each, eV, as in `Predictor`.
    function : Potential
        Of `aimnet2mult.models.all_fidelities.load_all_fidelities`.
    """

    model: str
    names: list[str]
    sae: Sequence[Mapping[int, float]]
    function: Potential

    def predict(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return total ``energy`` (F, k), eV, and ``forces`` (F, k, N, 3), eV/Å; NaN where a fidelity lacks an element.

        ``arrays`` holds those of `INPUTS` that a dataset has, (k, ...).
        """
        weight = next(self.function.module.parameters())
        return _results(self.function.all_fidelities(_tensors(arrays, weight.dtype, weight.device), forces=True))

    def references(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return reference energies of molecules in each fidelity, (F, k), eV; NaN without one of an element."""
        numbers = arrays["numbers"]
        energies = np.full((len(self.sae), len(numbers)), np.nan)
        for energy, sae in zip(energies, self.sae, strict=True):
            known = np.isin(numbers, [0, *sae]).all(axis=1)
            energy[known] = reference_energy({key: values[known] for key, values in arrays.items()}, sae)
        return energies


@dataclass
class ModelFile:
    """A file that holds one fidelity or several.

    Attributes
    ----------
    path : Path
        The file.
    names : dict of int to str or None
        Number -> name of each fidelity.
    predictor : callable
        Number of a fidelity -> it, ready to be evaluated; a ValueError if the file does not hold what is needed.
    together : callable
        All of them as one; a ValueError likewise, or if there is only one.
    """

    path: Path
    names: dict[int, str | None]
    predictor: Callable[[int], Predictor]
    together: Callable[[], Together]

    def choose(self, asked: str | None) -> int:
        """Return the number of the fidelity that a name or number stands for; None if there is only one.

        Raises
        ------
        ValueError
            There is no such fidelity (the message offers the nearest names), or several to choose from.
        """
        listed = ", ".join(f"{f} ({name})" if name else str(f) for f, name in self.names.items())
        if asked is None:
            if len(self.names) > 1:
                raise ValueError(
                    f"{self.path}: has the fidelities {listed}; say which one a dataset belongs to, as "
                    "--data NAME=FILE or with --fidelity"
                )
            return next(iter(self.names))
        for f, name in self.names.items():
            if asked in (name, str(f)):
                return f
        known = [name for name in self.names.values() if name] or [str(f) for f in self.names]
        raise ValueError(f"{self.path}: no fidelity {asked!r} (it has {listed}); {nearest(asked, known)}")


def open_model(path: str | Path, device: torch.device, title: str | None = None) -> ModelFile:
    """Open a compiled model (``.jpt``) or a checkpoint.

    Parameters
    ----------
    path : str or Path
        The file.
    device : torch.device
        Where to evaluate.
    title : str, optional
        What to call it in a report; default the name of the file.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; not a model, or one that does not say enough about itself.
    """
    path = Path(path)
    opened = _compiled if path.suffix == COMPILED_SUFFIX else _checkpoint
    return opened(path, device, title or path.name)


def _compiled(path: Path, device: torch.device, title: str) -> ModelFile:
    """A compiled model of one fidelity, or of all of them in one file."""
    try:
        model = load_jit_model(path, device)
    except AttributeError as error:
        raise ValueError(f"{path}: TorchScript, but not a model of tools.compile_jit ({error})") from error
    model.module.check_spin = False  # as of checkpoints
    parts = model.metadata.get("fidelities")
    found = parts or [model.metadata]
    if not model.species or any("sae" not in metadata for metadata in found):
        raise ValueError(f"{path}: TorchScript, but not a model of tools.compile_jit: it has no metadata")
    predictors: dict[int, Predictor] = {}
    for metadata in found:
        f = int(metadata.get("fidelity_level", 0))
        chosen = model if parts is None else functools.partial(_in_fidelity, model, f)
        predictors[f] = _compiled_fidelity(chosen, next(model.module.parameters()).dtype, device, title, metadata)

    def together() -> Together:
        if parts is None:
            raise ValueError(f"--all-fidelities: {path} holds one fidelity; compile all with compile_jit --combined")
        return Together(title, model.fidelity_names, [predictors[f].sae for f in sorted(predictors)], model)

    return ModelFile(path, {f: predictor.name for f, predictor in predictors.items()}, predictors.__getitem__, together)


def _in_fidelity(model: Potential, fidelity: int, data: dict[str, Tensor]) -> dict[str, Tensor]:
    return model({**data, "fidelity": torch.tensor(fidelity)})


def _compiled_fidelity(
    function: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device,
    title: str,
    metadata: Mapping[str, Any],
) -> Predictor:
    """One fidelity of a compiled model, with what its metadata say."""
    fidelity, name = int(metadata.get("fidelity_level", 0)), metadata.get("fidelity_name")
    sae = ReferenceEnergies(metadata["sae"], **metadata.get("sae_terms", {}))
    predict = predict_totals(function, dtype, device, sae)
    predictor = Predictor(title, fidelity, name, sorted(metadata["species"]), sae, predict)
    embedded = metadata.get("dispersion") or {}
    if embedded.get("source") == COMMAND_LINE:
        text = DispersionLabel.from_dict(embedded).text
        predictor.notes.append(
            f"{title} adds {text} to what was learned (--dispersion of compile_jit). Its errors mean something only if "
            f"the labels contain {text}, too."
        )
    elif embedded.get("source") == SUBTRACTED:
        predictor.notes.append(_note_on_dispersion(DispersionLabel.from_dict(embedded), predictor))
    return predictor


def _checkpoint(path: Path, device: torch.device, title: str) -> ModelFile:
    """A checkpoint; its fidelities are put together as `aimnet2mult.tools.compile_jit` does."""
    checkpoint = load_checkpoint(path)
    needed = {"model_config": "the model's configuration", "sae": "self-atomic energies"}
    absent = [meaning for key, meaning in needed.items() if not checkpoint.get(key)]
    if absent:
        raise ValueError(
            f"{path}: holds weights but not {' and '.join(absent)}. Compile it (tools.compile_jit, with --model "
            "and --sae) and evaluate the .jpt."
        )
    offset = int(checkpoint.get("fidelity_offset", FIDELITY_OFFSET))
    layout = layout_of_weights(checkpoint["model"], checkpoint, offset)
    known = checkpoint.get("fidelity_names") or {}
    names = {f: known.get(f) for f in range(layout.num_fidelities)}

    def predictor(fidelity: int) -> Predictor:
        sae = ReferenceEnergies.from_table(checkpoint["sae"].get(fidelity) or {})
        if not sae:
            raise ValueError(f"{path}: holds no self-atomic energies of fidelity {fidelity}")
        model = deployable_model(checkpoint, fidelity, path).to(device).eval()
        model.check_spin = False  # labels without a multiplicity were trained on as they are
        predict = predict_totals(model, model.model.afv.weight.dtype, device, sae)
        made = Predictor(title, fidelity, names[fidelity], model.species, sae, predict)
        ledger = (checkpoint.get("dispersion") or {}).get(fidelity)
        if ledger is not None and ledger["subtracted"]:
            made.notes.append(_note_on_dispersion(DispersionLabel.from_dict(ledger["labels"]), made))
        return made

    def together() -> Together:
        if len(names) == 1:
            raise ValueError(f"--all-fidelities: {path} has one fidelity")
        function = load_all_fidelities(path, device)
        function.module.check_spin = False
        sae = [ReferenceEnergies.from_table(checkpoint["sae"][f]) for f in names]
        return Together(title, function.fidelity_names, sae, function)

    return ModelFile(path, names, predictor, together)


def _note_on_dispersion(subtracted: DispersionLabel, predictor: Predictor) -> str:
    return (
        f"{subtracted.text}, which training took off the labels of {predictor.title}, is added to its predictions; "
        "both sides contain it."
    )
