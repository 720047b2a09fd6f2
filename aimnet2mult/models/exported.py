"""The successor of TorchScript: a model as a program of torch.export, or as machine code of AOTInductor (``.pt2``).

The program is the same network that is compiled to a ``.jpt``, traced with its forces for dense batches of molecules:

    (coord, numbers, charge, mult, real_idx) -> (energy, forces, charges, ...)

with any number of molecules and atoms; ``real_idx`` are the places of the atoms that are not padding. What a program
without branches cannot do (checks of the input, other layouts, crystals, graphs) `ExportedModel` does in Python, or
refuses. `aimnet2mult.tools.compile_pt2` writes the files and `load_pt2` reads them.
"""

import copy
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from aimnet2mult import nbops
from aimnet2mult.constants import element_names
from aimnet2mult.dftd4 import DFTD4
from aimnet2mult.dispersion import DFTD3
from aimnet2mult.models.aimnet2 import AIMNet2
from aimnet2mult.models.compiled_file import METADATA_FILE, metadata_text, parse_metadata
from aimnet2mult.models.golden import PRECISIONS
from aimnet2mult.models.jit_wrapper import DeployableModel
from aimnet2mult.utils.text import first_line

INPUTS = ("coord", "numbers", "charge", "mult", "real_idx")
"""Tensors that a program takes, in this order."""

MAX_PLACES = 512
"""Atoms of the largest molecule that is accepted: memory grows with the square."""

METADATA_KEY = "aimnet2mult"
"""Name of the metadata in an AOTInductor package."""

_ELSEWHERE = "a .pt2 evaluates molecules in dense or flat layout only; use the .jpt"


# --------------------------------------------------------------------------------------------------
# from the model to a program
# --------------------------------------------------------------------------------------------------


class _EnergyAndForces(nn.Module):
    """The network as a function of tensors, with forces."""

    def __init__(self, model: AIMNet2, keys: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.keys = keys

    def forward(self, coord: Tensor, numbers: Tensor, charge: Tensor, mult: Tensor, real_idx: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            leaf = coord.detach().requires_grad_(True)
            batch = {"coord": leaf, "numbers": numbers, "charge": charge, "mult": mult, "_real_idx": real_idx}
            out = self.model.readout(self.model.encode(batch))
            (gradient,) = torch.autograd.grad(out["energy"].sum(), leaf)
        results = {**out, "forces": -gradient}
        return [results[key].detach() for key in self.keys]


def exported_keys(model: DeployableModel) -> list[str]:
    """Names of the results of a program, in their order."""
    charges = ["charges"] + (["spin_charges"] if model.model.num_charge_channels == 2 else [])
    return ["energy", "forces", *charges]


def export_model(model: DeployableModel, precision: str = "float32") -> "torch.export.ExportedProgram":
    """Trace a model with its forces.

    Parameters
    ----------
    model : DeployableModel
        The model, left as it is.
    precision : str
        ``float32`` or ``float64``: of weights, positions, forces and charges. Energies are float64 in both.

    Returns
    -------
    torch.export.ExportedProgram
        Takes `INPUTS` with any B >= 2 and N >= 2, R >= 2 real atoms and at least one place of padding; returns
        `exported_keys`. For the CPU.

    Raises
    ------
    ValueError
        An unknown precision, a version of PyTorch that cannot do it, a model that cannot be traced.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    if not hasattr(torch.export.Dim, "AUTO"):
        raise ValueError(f"exported programs need PyTorch 2.6 or newer, found {torch.__version__}")
    dtype = PRECISIONS[precision]
    network = copy.deepcopy(model.model).to("cpu", dtype).eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    _fix_elements(network, model.species)
    function = _EnergyAndForces(network, exported_keys(model))
    example = _example(model.species, dtype)
    any_size = torch.export.Dim.DYNAMIC
    shapes = ({0: any_size, 1: any_size}, {0: any_size, 1: any_size}, {0: any_size}, {0: any_size}, {0: any_size})
    # An optimised order of contraction would be that of the example's shapes.
    with torch.backends.opt_einsum.flags(enabled=False), _quiet():
        try:
            # Derivatives first: a program that calls autograd itself cannot be exported.
            graph = make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*example)
            return torch.export.export(graph, example, dynamic_shapes=shapes)
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
            version = torch.__version__
            raise ValueError(f"this model cannot be exported with PyTorch {version}: {first_line(error)}") from error


def _fix_elements(network: AIMNet2, species: Sequence[int]) -> None:
    """Tell dispersion terms which elements will come: a program cannot look at the numbers and decide."""
    for module in network.readouts():
        if getattr(module, "s9", 0.0) != 0.0:
            raise ValueError(
                f"{type(module).__name__} with its three-body energy cannot be exported: which triples count depends "
                "on the positions. Set --dispersion-s9 0, or use compile_jit"
            )
        if isinstance(module, DFTD3):
            module.set_species(list(species))
        elif isinstance(module, DFTD4):
            # Whoever calls the program has refused other elements before.
            module.check_elements = lambda numbers: None  # type: ignore[method-assign]


def _example(species: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Molecules to trace with; no two axes, here or inside the network, should have equal lengths by accident."""
    n_molecules, n_places = 5, 7
    numbers = torch.full((n_molecules, n_places), int(species[-1]))
    numbers[:, -2:] = 0
    coord = 1.5 * torch.randn(n_molecules, n_places, 3, generator=torch.Generator().manual_seed(0))
    charge, mult = torch.zeros(n_molecules, dtype=dtype), torch.ones(n_molecules, dtype=dtype)
    return coord.to(dtype), numbers, charge, mult, numbers.flatten().nonzero().squeeze(1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the tracer and the compiler say about their own code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*[.]grad attribute of a Tensor that is not a leaf.*")
        yield


# --------------------------------------------------------------------------------------------------
# files
# --------------------------------------------------------------------------------------------------


def save_pt2(
    program: "torch.export.ExportedProgram", path: str | Path, metadata: Mapping[str, Any], aoti: bool = False
) -> None:
    """Write a program with its metadata.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        Of `export_model`.
    path : str or Path
        The file, ``.pt2``.
    metadata : mapping
        Plain types, with ``species``, ``precision`` and ``outputs`` (`exported_keys`).
    aoti : bool
        Compile to machine code of this kind of processor with AOTInductor: takes minutes, needs a C++ compiler.

    Raises
    ------
    ValueError
        AOTInductor cannot compile it here.
    """
    text = metadata_text(metadata)
    with _quiet():
        if not aoti:
            torch.export.save(program, str(path), extra_files={METADATA_FILE: text})
            return
        from torch._inductor import aoti_compile_and_package

        options = {"aot_inductor.metadata": {METADATA_KEY: text}}
        try:
            aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
        # Inductor's passes, the C++ compiler and its linker raise what they like: assertions, lookups, lost programs.
        except Exception as error:
            raise ValueError(f"--aoti: AOTInductor cannot compile this model here ({first_line(error)})") from error


def load_pt2(path: str | Path) -> "ExportedModel":
    """Load a program of torch.export or a package of AOTInductor, written by `aimnet2mult.tools.compile_pt2`.

    A package holds machine code, and a program can run any operator of PyTorch: load only what you trust.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; another file; one of a later version of this package.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: not an exported model (.pt2 of tools.compile_pt2): {error}") from error
    try:
        with _quiet():
            if any("/aotinductor/" in name for name in names):
                from torch._inductor import aoti_load_package

                program: Any = aoti_load_package(str(path))
                text = program.get_metadata().get(METADATA_KEY, "")
            else:
                extra = {METADATA_FILE: ""}
                program = torch.export.load(str(path), extra_files=extra).module()
                text = extra[METADATA_FILE]
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not an exported model (.pt2 of tools.compile_pt2): {first_line(error)}") from error
    metadata = parse_metadata(text, path)
    if "outputs" not in metadata:
        raise ValueError(f"{path}: not an exported model: it does not say what it returns; was it made by compile_pt2?")
    return ExportedModel(program, metadata)


class ExportedModel:
    """An exported model in Python: the same dictionary in and out as `DeployableModel`, for molecules on the CPU.

    Parameters
    ----------
    program : callable
        Takes `INPUTS`.
    metadata : dict
        What the file says about itself.

    Attributes
    ----------
    species : list of int
        Elements that it may be used for.
    check_spin : bool
        Refuse multiplicities that are impossible for the number of electrons, if the model resolves spin.
    """

    def __init__(self, program: Any, metadata: dict[str, Any]) -> None:
        self.program = program
        self.metadata = metadata
        self.species: list[int] = list(metadata["species"])
        self.dtype = PRECISIONS[metadata["precision"]]
        self.check_spin = True

    def __call__(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Evaluate a batch of molecules.

        Parameters
        ----------
        data : dict
            ``coord, numbers``, optional ``charge, mult, mol_idx``, dense or flat (`aimnet2mult.nbops.BATCH_KEYS`).
            Left as it is.

        Returns
        -------
        dict
            ``energy`` (B,) float64, ``forces``, ``charges`` (``spin_charges``), in the layout of the input; without
            a graph.

        Raises
        ------
        ValueError
            Shapes that do not fit, elements that the model was not trained on, values that are not finite; what only
            the ``.jpt`` can do: cells, neighbour matrices, molecules of more than `MAX_PLACES` atoms, graphs, GPUs;
            impossible multiplicities; atoms on top of each other.
        """
        self.check_input(data)
        coord, numbers, charge, mult, place = _dense(data)
        inputs = _padded(coord.to(self.dtype), numbers, charge.to(self.dtype), mult.to(self.dtype))
        with torch.no_grad():
            values = self.program(*inputs)
        results: dict[str, Tensor] = {}
        for key, value in zip(self.metadata["outputs"], values, strict=True):
            if nbops.BATCH_KEYS[key].kind == "atom":
                value = value[: coord.shape[0], : coord.shape[1]].to(coord.dtype)
                results[key] = value if place is None else value.flatten(0, 1)[place]
            else:
                results[key] = value[: coord.shape[0]]
        if not (torch.isfinite(results["energy"]).all() and torch.isfinite(results["forces"]).all()):
            raise ValueError("energy or forces are not finite, although the input is: atoms are on top of each other")
        return results

    def check_input(self, data: dict[str, Tensor]) -> None:
        """Raise a ValueError if the program cannot or must not be evaluated for this batch."""
        nbops.check_batch(data)
        for key in ("cell", "nbmat", "nbmat_lr", "shifts", "shifts_lr"):
            if key in data:
                raise ValueError(f"{key}: {_ELSEWHERE}")
        nbops.check_values(data)
        coord, numbers = data["coord"], data["numbers"]
        if coord.device.type != "cpu":
            raise ValueError(f"coord is on {coord.device}: a .pt2 runs on the CPU; use the .jpt")
        if torch.is_grad_enabled() and coord.requires_grad:
            raise ValueError(
                "coord requires grad: results of a .pt2 have no graph. Take forces from the output, or use the .jpt"
            )
        if not bool(torch.isfinite(coord).all()):
            raise ValueError("coord holds NaN or infinite values")
        for key in ("charge", "mult"):
            if key in data and not bool(torch.isfinite(data[key]).all()):
                raise ValueError(f"{key} holds NaN or infinite values")
        unknown = sorted(set(numbers.unique().tolist()) - {0, *self.species})
        if unknown:
            verb = "is" if len(unknown) == 1 else "are"
            raise ValueError(
                f"{element_names(unknown)} {verb} not among the elements of {self.metadata['title']}: "
                f"{element_names(self.species)}"
            )
        if self.check_spin and self.metadata["spin_resolved"]:
            wrong = (~nbops.possible_multiplicities(data)).nonzero()
            if len(wrong):
                raise ValueError(
                    f"molecule {wrong[0].item()}: its multiplicity (mult, 1 if left out) is impossible for its number "
                    "of electrons; give mult = 2S+1 and charge, or set check_spin to False"
                )


def _dense(data: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Dense coord, numbers, charge and mult of a caller's batch; of a flat one, the place of each atom, too."""
    coord, numbers = data["coord"].detach(), data["numbers"].long()
    n_molecules = nbops.count_molecules(data)
    charge = data["charge"].reshape(-1) if "charge" in data else coord.new_zeros(n_molecules)
    mult = data["mult"].reshape(-1) if "mult" in data else coord.new_ones(n_molecules)
    place = None
    if nbops.is_flat(data):
        mol_idx = data["mol_idx"].long() if "mol_idx" in data else torch.zeros_like(numbers)
        counts = torch.bincount(mol_idx, minlength=n_molecules)
        n_places = int(counts.max()) if n_molecules else 0
        first = counts.cumsum(0) - counts
        place = mol_idx * n_places + torch.arange(len(numbers)) - first[mol_idx]
        shape = (n_molecules, n_places)
        coord = coord.new_zeros(n_molecules * n_places, 3).index_copy(0, place, coord).view(*shape, 3)
        numbers = numbers.new_zeros(n_molecules * n_places).index_copy(0, place, numbers).view(shape)
    if coord.shape[1] > MAX_PLACES:
        raise ValueError(f"molecules of {coord.shape[1]} atoms: a .pt2 takes {MAX_PLACES} at most; use the .jpt")
    return coord, numbers, charge, mult, place


def _padded(coord: Tensor, numbers: Tensor, charge: Tensor, mult: Tensor) -> tuple[Tensor, ...]:
    """`INPUTS` of a program: at least two molecules, two places each, two atoms, and one place of padding.

    Axes of length one, and batches without padding, would need programs of their own.
    """
    n_molecules, n_places = numbers.shape
    few_atoms = int((numbers > 0).sum()) < 2
    molecules = max(2 - n_molecules, int(few_atoms))
    places = max(2 - n_places, 0)
    if molecules == 0 and places == 0 and bool((numbers > 0).all()):
        places = 1
    coord = pad(coord, (0, 0, 0, places, 0, molecules))
    numbers = pad(numbers, (0, places, 0, molecules))
    charge, mult = pad(charge, (0, molecules)), pad(mult, (0, molecules), value=1.0)
    real_idx = numbers.flatten().nonzero().squeeze(1)
    if few_atoms:
        # Places of the last molecule, which is all padding, stand in for atoms; what they give is cut off.
        spare = numbers.numel() - torch.arange(2 - len(real_idx), 0, -1)
        real_idx = torch.cat([real_idx, spare])
    return coord.contiguous(), numbers.contiguous(), charge, mult, real_idx
