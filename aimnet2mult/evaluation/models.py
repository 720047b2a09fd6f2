"""Models that are evaluated: each fidelity of a checkpoint, a compiled model, or a model at the end of its training.

All become a `Predictor`, which takes molecules as a dataset has them and gives energies relative to the self-atomic
energies. What the labels of a dataset contain, predictions contain: dispersion that training subtracted is added again,
with the module that compiling embeds. The model at the end of a training is compared with labels from which dispersion
is subtracted, and nothing is added.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aimnet2mult.config.builder import nearest
from aimnet2mult.constants import FIDELITY_OFFSET
from aimnet2mult.data.ledger import DispersionLabel
from aimnet2mult.data.sae import sae_energy
from aimnet2mult.models.base import layout_of_weights, load_checkpoint
from aimnet2mult.models.jit_wrapper import DeployableModel, load_jit_model
from aimnet2mult.modules import DFTD3, Forces, SelfAtomicEnergies
from aimnet2mult.nbops import encode_fidelity
from aimnet2mult.tools.compile_jit import COMMAND_LINE, SUBTRACTED, load_single_fidelity

logger = logging.getLogger(__name__)

COMPILED_SUFFIX = ".jpt"
"""How names of compiled models end; everything else is a checkpoint."""

INPUTS = ("coord", "numbers", "charge", "mult", "cell")
"""Arrays of a dataset that models are given."""


class Predictor(ABC):
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
    sae : dict of int to float
        Self-atomic energies, eV; energies are predicted relative to them. Empty: nothing is subtracted.
    notes : list of str
        What a reader of its errors should know.
    """

    def __init__(
        self, model: str, fidelity: int, name: str | None, species: Collection[int], sae: Mapping[int, float]
    ) -> None:
        self.model, self.fidelity, self.name = model, fidelity, name
        self.species = sorted(species)
        self.sae = dict(sae)
        self.notes: list[str] = []

    @property
    def title(self) -> str:
        """What to call the fidelity: its name, or its number."""
        return self.name or f"fidelity {self.fidelity}"

    @abstractmethod
    def predict(self, arrays: Mapping[str, np.ndarray], keys: Collection[str]) -> dict[str, np.ndarray]:
        """Predict properties of molecules of one size.

        Parameters
        ----------
        arrays : mapping
            Those of `INPUTS` that the dataset has, (k, ...), plain atomic numbers.
        keys : collection of str
            Properties that are wanted; forces cost time.

        Returns
        -------
        dict
            Property -> (k, ...) float64, also of others than ``keys``. Energies relative to ``sae``, eV.
        """

    def reference(self, numbers: np.ndarray) -> np.ndarray:
        """Sum of the self-atomic energies of molecules (k, N) -> (k,), eV."""
        return sae_energy(numbers, self.sae) if self.sae else np.zeros(len(numbers))


def _tensors(arrays: Mapping[str, np.ndarray], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Inputs of a model, floats in its precision."""
    inputs = {}
    for key in INPUTS:
        if key in arrays:
            kind = torch.int64 if key == "numbers" else dtype
            inputs[key] = torch.as_tensor(arrays[key]).to(device, kind)
    return inputs


def _results(out: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {key: value.detach().to("cpu", torch.float64).numpy() for key, value in out.items()}


class TotalPredictor(Predictor):
    """One fidelity as a function from plain atomic numbers to total energies: compiled, or as it would be compiled.

    Parameters
    ----------
    function : callable
        `DeployableModel` or `aimnet2mult.models.jit_wrapper.JitModel`.
    dtype, device
        Of its weights.
    model, fidelity, name, species, sae
        As in `Predictor`.
    """

    def __init__(
        self,
        function: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        dtype: torch.dtype,
        device: torch.device,
        model: str,
        fidelity: int,
        name: str | None,
        species: Collection[int],
        sae: Mapping[int, float],
    ) -> None:
        super().__init__(model, fidelity, name, species, sae)
        self.function, self.dtype, self.device = function, dtype, device

    def predict(self, arrays: Mapping[str, np.ndarray], keys: Collection[str]) -> dict[str, np.ndarray]:
        """As `Predictor.predict`."""
        out = _results(self.function(_tensors(arrays, self.dtype, self.device)))
        out["energy"] -= self.reference(arrays["numbers"])
        return out


class TrainedPredictor(Predictor):
    """One fidelity of a model in memory, which predicts energies relative to the self-atomic energies.

    Parameters
    ----------
    forces : Forces
        The model with forces.
    fidelity_offset : int
        Distance of the element types of two fidelities.
    inputs : collection of str
        Arrays that it was trained with.
    model, fidelity, name, species, sae
        As in `Predictor`.
    """

    def __init__(
        self,
        forces: Forces,
        fidelity_offset: int,
        inputs: Collection[str],
        model: str,
        fidelity: int,
        name: str | None,
        species: Collection[int],
        sae: Mapping[int, float],
    ) -> None:
        super().__init__(model, fidelity, name, species, sae)
        self.forces, self.fidelity_offset, self.inputs = forces, fidelity_offset, set(inputs)

    def predict(self, arrays: Mapping[str, np.ndarray], keys: Collection[str]) -> dict[str, np.ndarray]:
        """As `Predictor.predict`."""
        weight = next(self.forces.parameters())
        data = _tensors({k: v for k, v in arrays.items() if k in self.inputs}, weight.dtype, weight.device)
        n_molecules = len(data["numbers"])
        data.setdefault("charge", torch.zeros(n_molecules, dtype=weight.dtype, device=weight.device))
        data.setdefault("mult", torch.ones(n_molecules, dtype=weight.dtype, device=weight.device))
        data["numbers"] = encode_fidelity(data["numbers"], self.fidelity, self.fidelity_offset)
        data["_fidelities"] = torch.full((n_molecules,), self.fidelity, device=weight.device)
        with torch.no_grad():
            out = self.forces(data, compute_forces="forces" in keys)
        return _results({key: value for key, value in out.items() if key not in data and key != "aim"})


# --------------------------------------------------------------------------------------------------
# files
# --------------------------------------------------------------------------------------------------


class ModelFile(ABC):
    """A file that holds one fidelity or several.

    Attributes
    ----------
    path : Path
        The file.
    title : str
        What to call it in a report.
    names : dict of int to str or None
        Number -> name of each fidelity.
    """

    path: Path
    title: str
    names: dict[int, str | None]

    @abstractmethod
    def predictor(self, fidelity: int) -> Predictor:
        """Return one fidelity, ready to be evaluated.

        Raises
        ------
        ValueError
            The file does not hold what is needed.
        """

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
    kind = CompiledFile if path.suffix == COMPILED_SUFFIX else CheckpointFile
    return kind(path, device, title or path.name)


class CompiledFile(ModelFile):
    """A compiled model; it has one fidelity.

    Parameters
    ----------
    path : Path
        The ``.jpt``.
    device : torch.device
        Where to evaluate.
    title : str
        What to call it in a report.
    """

    def __init__(self, path: Path, device: torch.device, title: str) -> None:
        self.path, self.device, self.title = path, device, title
        try:
            self._model = load_jit_model(path, device)
        except AttributeError as error:
            raise ValueError(f"{path}: TorchScript, but not a model of tools.compile_jit ({error})") from error
        self._metadata = self._model.metadata
        if "sae" not in self._metadata or not self._model.species:
            raise ValueError(f"{path}: TorchScript, but not a model of tools.compile_jit: it has no metadata")
        self._fidelity = int(self._metadata.get("fidelity_level", 0))
        self.names = {self._fidelity: self._metadata.get("fidelity_name")}

    def predictor(self, fidelity: int) -> Predictor:
        """As `ModelFile.predictor`."""
        assert fidelity == self._fidelity
        weight = next(self._model.module.parameters())
        predictor = TotalPredictor(
            self._model,
            weight.dtype,
            self.device,
            self.title,
            fidelity,
            self.names[fidelity],
            self._model.species,
            self._metadata["sae"],
        )
        embedded = self._metadata.get("dispersion") or {}
        if embedded.get("source") == COMMAND_LINE:
            text = DispersionLabel.from_dict(embedded).text
            predictor.notes.append(
                f"{self.title} adds {text} to what was learned (--dispersion of compile_jit). Its errors mean "
                f"something only if the labels contain {text}, too."
            )
        elif embedded.get("source") == SUBTRACTED:
            predictor.notes.append(_note_on_dispersion(DispersionLabel.from_dict(embedded), predictor))
        return predictor


class CheckpointFile(ModelFile):
    """A checkpoint that describes itself.

    Parameters
    ----------
    path : Path
        The file.
    device : torch.device
        Where to evaluate.
    title : str
        What to call it in a report.

    Raises
    ------
    ValueError
        It holds weights but not the model's configuration or its self-atomic energies.
    """

    def __init__(self, path: Path, device: torch.device, title: str) -> None:
        self.path, self.device, self.title = path, device, title
        self._checkpoint: dict[str, Any] = load_checkpoint(path)
        absent = [
            meaning
            for key, meaning in (("model_config", "the model's configuration"), ("sae", "self-atomic energies"))
            if not self._checkpoint.get(key)
        ]
        if absent:
            raise ValueError(
                f"{path}: holds weights but not {' and '.join(absent)}. Compile it (tools.compile_jit, with --model "
                "and --sae) and evaluate the .jpt."
            )
        offset = int(self._checkpoint.get("fidelity_offset", FIDELITY_OFFSET))
        self._layout = layout_of_weights(self._checkpoint["model"], self._checkpoint, offset)
        names = self._checkpoint.get("fidelity_names") or {}
        self.names = {f: names.get(f) for f in range(self._layout.num_fidelities)}

    def predictor(self, fidelity: int) -> Predictor:
        """As `ModelFile.predictor`, assembled as `aimnet2mult.tools.compile_jit` does."""
        checkpoint = self._checkpoint
        sae = checkpoint["sae"].get(fidelity)
        if not sae:
            raise ValueError(f"{self.path}: holds no self-atomic energies of fidelity {fidelity}")
        species = sorted(checkpoint.get("species", {}).get(fidelity) or sae)
        network = load_single_fidelity(
            checkpoint, checkpoint["model_config"], fidelity, self._layout.num_fidelities, self._layout.offset
        )
        network.add_output("self_atomic_energies", SelfAtomicEnergies({z: sae[z] for z in species}))
        ledger = (checkpoint.get("dispersion") or {}).get(fidelity)
        subtracted = None
        if ledger is not None and ledger["subtracted"]:
            subtracted = DispersionLabel.from_dict(ledger["labels"])
            assert subtracted.parameters is not None
            network.add_output("dftd3", DFTD3(**{key: subtracted.parameters[key] for key in ("s6", "s8", "a1", "a2")}))
        name = self.names[fidelity]
        label = f"fidelity {fidelity}" + (f" ({name})" if name else "")
        model = DeployableModel(network, species, label).to(self.device).eval()
        dtype = network.afv.weight.dtype
        predictor = TotalPredictor(model, dtype, self.device, self.title, fidelity, name, species, sae)
        if subtracted is not None:
            predictor.notes.append(_note_on_dispersion(subtracted, predictor))
        return predictor


def _note_on_dispersion(subtracted: DispersionLabel, predictor: Predictor) -> str:
    return (
        f"{subtracted.text}, which training took off the labels of {predictor.title}, is added to its predictions; "
        "both sides contain it."
    )
