"""Datasets of the elements that the reference model knows, and a checkpoint of it that describes itself."""

import numpy as np
import pytest
import torch

from aimnet2mult.data.ledger import parse_dispersion
from aimnet2mult.data.sgdataset import SizeGroupedDataset, write_dataset
from aimnet2mult.models.base import load_model_config, save_checkpoint

ELEMENTS = (1, 6, 7, 8, 9, 17)
NAMES = {0: "dft", 1: "gfn2", 2: "gfn1"}
SAE = {f: {z: -10.0 * z - f for z in ELEMENTS} for f in NAMES}
DISPERSION = {
    0: {"labels": parse_dispersion({"d3bj": "b3lyp"}, "").to_dict(), "subtracted": True},
    1: {"labels": parse_dispersion({"d4": "gfn2"}, "").to_dict(), "subtracted": False},
    2: {"labels": parse_dispersion("unknown", "").to_dict(), "subtracted": False},
}


@pytest.fixture(scope="session")
def groups(fixtures_dir):
    """Arrays of the molecules of each fidelity, by number of atoms; energies near the self-atomic ones."""
    found = []
    for f, sae in SAE.items():
        source = SizeGroupedDataset(fixtures_dir / f"tiny_fid{f}.h5")
        arrays_of_size = {}
        for _, arrays in source.read(np.arange(len(source)), sorted(source.keys)):
            known = np.isin(arrays["numbers"], ELEMENTS).all(1)
            if known.any():
                kept = {key: value[known] for key, value in arrays.items()}
                atoms = np.vectorize(sae.get)(kept["numbers"]).sum(1)
                kept["energy"] = atoms + np.random.default_rng(f).normal(size=len(atoms))
                arrays_of_size[kept["numbers"].shape[1]] = kept
        found.append(arrays_of_size)
    return found


@pytest.fixture(scope="session")
def datasets(groups, tmp_path_factory):
    """Their files, ``fid0.h5`` ..."""
    folder = tmp_path_factory.mktemp("datasets")
    for f, arrays in enumerate(groups):
        write_dataset(folder / f"fid{f}.h5", arrays)
    return [folder / f"fid{f}.h5" for f in range(len(groups))]


@pytest.fixture(scope="session")
def network(reference_model):
    """The reference model of several fidelities in single precision."""
    return reference_model("ref_mixed", torch.float32)


@pytest.fixture(scope="session")
def save_model(network, fixtures_dir):
    """Write the checkpoint of a run, other entries as wished."""

    def save(path, **other):
        entries = {
            "model_config": load_model_config(fixtures_dir / "ref_mixed_model.yaml"),
            "num_fidelities": network.num_fidelities,
            "fidelity_offset": network.fidelity_offset,
            "use_fidelity_readouts": network.use_fidelity_readouts,
            "fidelity_names": NAMES,
            "sae": SAE,
            "species": dict.fromkeys(NAMES, ELEMENTS),
            "dispersion": DISPERSION,
            **other,
        }
        save_checkpoint(path, network, **entries)
        return path

    return save


@pytest.fixture(scope="session")
def checkpoint(save_model, tmp_path_factory):
    """A checkpoint of three fidelities; D3(BJ) was taken off the labels of the first."""
    return save_model(tmp_path_factory.mktemp("checkpoint") / "model.pt")
