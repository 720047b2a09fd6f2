"""The reference data of D4 in the package: what the file holds, and that the script makes this very file."""

import runpy
from pathlib import Path

import pytest
import torch

from aimnet2mult.dftd4 import D4_DATA, DFTD4, FREQUENCIES
from aimnet2mult.dispersion import D3_DATA

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_dftd4_data.py"


def test_file_holds_every_element_up_to_lawrencium():
    data = torch.load(D4_DATA, weights_only=True)
    assert data["element"].unique().tolist() == list(range(1, 104)) == DFTD4(1.0, 0.4, 4.0).elements
    assert torch.all(data["element"].diff() >= 0)
    assert data["alpha"].shape == (len(data["element"]), len(FREQUENCIES))
    for key in ("effective_charge", "hardness", "electronegativity"):
        assert data[key].shape == (104,)
        assert (data[key][1:] > 0).all()
    assert data["eeq"].shape == (104, 4)
    assert (data["eeq"][1:, 3] > 0).all()
    assert torch.load(D3_DATA, weights_only=True)["radius"].shape == (104,)
    assert D4_DATA.stat().st_size < 150_000


def test_single_precision_has_not_cut_the_parameters():
    # Eight decimals, as published; H of the EEQ model.
    eeq = torch.load(D4_DATA, weights_only=True)["eeq"]
    assert eeq[1].tolist() == [1.23695041, 0.04916110, -0.35015861, 0.55159092]
    assert torch.equal((eeq * 1e8).round() / 1e8, eeq)


def test_polarizability_of_free_atoms():
    # The free atom is the reference without neighbours. Static polarizabilities in a0³, to be near the experiment:
    # P. Schwerdtfeger, J. K. Nagle, Mol. Phys. 117, 1200 (2019), doi:10.1080/00268976.2018.1535143.
    model = DFTD4(1.0, 0.4, 4.0)
    references = model.reference_table.double() / model.fixed_point
    alpha = model.alpha_table.double() / model.fixed_point
    for z, experiment in [(2, 1.383), (10, 2.661), (18, 11.08), (6, 11.3), (8, 5.3)]:
        free = int(references[z, :, 0].argmin())
        assert references[z, free, 0] == 0.0
        assert alpha[z, free, 0].item() == pytest.approx(experiment, rel=0.1)
    assert (alpha >= 0).all()
    assert not alpha[0].any(), "padding has no dispersion"


def test_script_makes_the_file_in_the_package():
    pytest.importorskip("tad_dftd4")
    made = runpy.run_path(str(SCRIPT))["dftd4_data"]()
    stored = torch.load(D4_DATA, weights_only=True)
    assert set(made) == set(stored)
    for key, value in stored.items():
        assert made[key].dtype == value.dtype
        assert torch.equal(made[key], value)
