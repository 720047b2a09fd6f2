"""The reference data of D3 in the package: what the file holds, and that the script makes this very file."""

import runpy
from pathlib import Path

import pytest
import torch

from aimnet2mult.dispersion import D3_DATA, DFTD3

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_d3bj_data.py"


def test_file_holds_every_element_up_to_lawrencium():
    data = torch.load(D3_DATA, weights_only=True)
    assert set(data) == {"c6", "cn", "element", "radius", "r4r2", "vdw"}
    assert data["element"].unique().tolist() == list(range(104))
    assert torch.all(data["element"].diff() >= 0)
    assert (data["radius"][1:] > 0).all()
    assert (data["r4r2"][1:] > 0).all()
    assert D3_DATA.stat().st_size < 300_000


def test_c6_of_free_atoms():
    # He-He and Ne-Ne of the D3 paper's table; H has two references, the free atom is the second.
    model = DFTD3(1.0, 0.4, 4.0)
    free = {z: model.first_reference[z] for z in (2, 10)} | {1: model.first_reference[1] + 1}
    assert model.cn[free[1]] == 0
    c6 = {z: model.c6[k, k].item() / 1e4 for z, k in free.items()}
    assert c6 == {1: 7.5916, 2: 1.5583, 10: 6.2896}
    assert torch.equal(model.c6, model.c6.T)
    assert not model.c6[0].any(), "padding has no dispersion"


def test_script_makes_the_file_in_the_package():
    pytest.importorskip("tad_dftd3")
    made = runpy.run_path(str(SCRIPT))["d3bj_data"]()
    stored = torch.load(D3_DATA, weights_only=True)
    assert set(made) == set(stored)
    for key, value in stored.items():
        assert made[key].dtype == value.dtype
        assert torch.equal(made[key], value)
