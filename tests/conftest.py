"""What several tests need: the reference molecules, small models, tolerances."""

import copy
import os
from pathlib import Path

# Several test processes share the cores: more than one thread each makes all of them wait. Subprocesses inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch

from aimnet2mult.models.base import build_model, layout_of_weights, load_checkpoint, load_model_config, load_weights
from aimnet2mult.train.calc_sae import calc_sae

torch.set_num_threads(1)

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def fixtures_dir():
    return FIXTURES


@pytest.fixture(scope="session")
def tiny_fidelities(tmp_path_factory):
    """Settings of the data of a run: name -> number of a tiny file, such as ``tiny_fidelities(dft=0, gfn2=1)``."""
    folder = tmp_path_factory.mktemp("sae")

    def settings(**numbers):
        found = []
        for name, f in numbers.items():
            data, sae = FIXTURES / f"tiny_fid{f}.h5", folder / f"sae{f}.yaml"
            if not sae.is_file():
                calc_sae(data, sae)
            found += [f"data.fidelities.{name}.files={data}", f"data.fidelities.{name}.sae={sae}"]
        return found

    return settings


@pytest.fixture(scope="session")
def tolerance():
    """Absolute tolerances by dtype, eV, eV/Å and e: what rounding of energies below 100 eV explains."""
    return {torch.float32: 1e-5, torch.float64: 1e-10}


def _tensor(array, dtype=None):
    tensor = torch.from_numpy(np.array(array))
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


@pytest.fixture(scope="session")
def reference():
    """Expected values of a fixture by name; made with an independent implementation, see the file's README."""

    def load(name):
        with np.load(FIXTURES / f"{name}_expected.npz") as content:
            return {key: content[key] for key in content}

    return load


@pytest.fixture
def molecules(reference):
    """The 13 reference molecules as a padded batch of plain atomic numbers."""

    def batch(dtype=torch.float64):
        values = reference("ref_single")
        return {key: _tensor(values[key], dtype) for key in ("coord", "numbers", "charge", "mult")}

    return batch


@pytest.fixture(scope="session")
def reference_model():
    """A fixture's model with its random weights: ``ref_single`` or ``ref_mixed``."""

    def build(name, dtype=torch.float64):
        state = load_checkpoint(FIXTURES / f"{name}.pt")["model"]
        model = build_model(
            load_model_config(FIXTURES / f"{name}_model.yaml"), layout_of_weights(state, {}, 200).num_fidelities
        )
        load_weights(model, state)
        return model.to(dtype).eval()

    return build


def with_charge_correction(config, zero_start=True):
    """Configuration of a reference model with a scale of the energies and corrections of both kinds of charges."""
    config = copy.deepcopy(config)
    modules, outputs = "aimnet2mult.modules", config["kwargs"]["outputs"]
    correction = {
        **{"n_in": 32, "n_out": 2, "key_in": "aim", "key_out": "_charge_correction"},
        **{"mlp": {"hidden": [16]}, "zero_start": zero_start},
    }
    nodes = {
        "energy_mlp": outputs["energy_mlp"],
        "atomic_scale": {"class": f"{modules}.AtomicScale", "kwargs": {"key_in": "energy", "key_out": "energy"}},
        "charge_mlp": {"class": f"{modules}.Output", "kwargs": correction},
        "charge_correction": {"class": f"{modules}.ChargeCorrection"},
    }
    config["kwargs"]["outputs"] = {**nodes, **outputs}  # Coulomb energies, which come last, see corrected charges
    return config


@pytest.fixture(scope="session")
def corrected_config():
    """Function: configuration of the reference models with `with_charge_correction`."""

    def build(zero_start=True):
        return with_charge_correction(load_model_config(FIXTURES / "ref_mixed_model.yaml"), zero_start)

    return build


@pytest.fixture(scope="session")
def corrected_model(corrected_config):
    """A fixture's model with scales and charge corrections, all of them random: ``ref_single`` or ``ref_mixed``."""
    from aimnet2mult.train.fidelity_specific_utils import transfer_weights

    def build(name, dtype=torch.float64):
        checkpoint = load_checkpoint(FIXTURES / f"{name}.pt")
        torch.manual_seed(2)
        count = layout_of_weights(checkpoint["model"], {}, 200).num_fidelities
        model = build_model(corrected_config(zero_start=False), count)
        transfer_weights(model, checkpoint)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if key.endswith("scales.weight"):
                    weight += 0.2 * torch.randn_like(weight)
                elif ".charge_mlp." in key:
                    weight += 0.1 * torch.randn_like(weight)
        return model.to(dtype).eval()

    return build


@pytest.fixture(scope="session")
def sae_file(tmp_path_factory):
    """Self-atomic energies of the elements of the reference molecules."""
    path = tmp_path_factory.mktemp("sae") / "sae.yaml"
    path.write_text("1: -13.587\n6: -1029.476\n7: -1485.234\n8: -2041.789\n9: -2715.3\n17: -12518.7\n")
    return path


@pytest.fixture(scope="session")
def compiled(tmp_path_factory, sae_file):
    """A compiled model of a fixture: fidelity 1 of ``ref_mixed``, with D3(BJ)."""
    from aimnet2mult.tools.compile_jit import compile_model
    from aimnet2mult.tools.compile_options import choose_dispersion

    jpt, _ = compile_model(
        FIXTURES / "ref_mixed.pt",
        tmp_path_factory.mktemp("compiled") / "model",
        model=FIXTURES / "ref_mixed_model.yaml",
        fidelity_level=1,
        sae=sae_file,
        dispersion=choose_dispersion("d3bj", "b3lyp"),
    )
    return jpt


def flatten(data):
    """A padded batch as a flat one, without neighbour lists."""
    real = data["numbers"] > 0
    mol_idx = torch.arange(len(real)).unsqueeze(1).expand(real.shape)[real]
    return {
        "coord": data["coord"][real],
        "numbers": data["numbers"][real],
        "mol_idx": mol_idx,
        "charge": data["charge"],
        "mult": data["mult"],
    }


@pytest.fixture(scope="session")
def to_flat():
    return flatten
