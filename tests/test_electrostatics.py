import copy
import math

import numpy as np
import pytest
import torch
import yaml

from aimnet2mult import nbops
from aimnet2mult.electrostatics import LRCoulomb, SRCoulomb
from aimnet2mult.models.base import build_model, load_weights
from aimnet2mult.modules import DFTD3, Forces
from aimnet2mult.utils.units import COULOMB_EV_ANGSTROM


def charged_batch(coord, charges, cell=None, cutoff_lr=math.inf):
    data = {"coord": coord, "numbers": torch.ones(coord.shape[:-1], dtype=torch.long)}
    if cell is not None:
        data["cell"] = cell
    batch = nbops.internal_batch(data, 5.0, cutoff_lr)
    if batch["coord"].shape[0] == len(charges) + 1:
        charges = torch.cat([charges, charges.new_zeros(1)])
    batch["charges"] = charges
    return batch


def test_simple_is_the_sum_over_pairs_without_the_short_range():
    generator = torch.Generator().manual_seed(3)
    coord = torch.rand(1, 12, 3, generator=generator, dtype=torch.float64) * 8
    q = torch.randn(1, 12, generator=generator, dtype=torch.float64)
    module = LRCoulomb().double()
    module.rc.fill_(4.6)
    energy = module(charged_batch(coord, q))["energy"]
    expected = 0.0
    for i in range(12):
        for j in range(i):
            d = float((coord[0, i] - coord[0, j]).norm())
            envelope = math.exp(1 - 1 / (1 - (d / 4.6) ** 2)) if d < 4.6 else 0.0
            expected += COULOMB_EV_ANGSTROM * float(q[0, i] * q[0, j]) * (1 - envelope) / d
    assert energy.item() == pytest.approx(expected, rel=1e-12)


def test_short_and_long_range_make_the_whole():
    coord = torch.tensor([[[0.0, 0, 0], [1.1, 0, 0], [0, 3.0, 0]]], dtype=torch.float64)
    q = torch.tensor([[0.3, -0.5, 0.2]], dtype=torch.float64)
    for envelope in ("exp", "cosine"):
        batch = charged_batch(coord, q)
        long = LRCoulomb(envelope=envelope)(dict(batch))["energy"]
        minus_short = SRCoulomb(envelope=envelope)(dict(batch))["energy"]
        d = torch.cdist(coord[0], coord[0])
        whole = COULOMB_EV_ANGSTROM * sum(q[0, i] * q[0, j] / d[i, j] for i in range(3) for j in range(i))
        torch.testing.assert_close(long - minus_short, whole.view(1))


def test_ewald_gives_the_madelung_constant_of_rock_salt():
    a = 5.64
    fcc = torch.tensor([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]], dtype=torch.float64)
    coord = torch.cat([fcc, fcc + torch.tensor([0.5, 0, 0])]) * a
    q = torch.tensor([1.0] * 4 + [-1.0] * 4, dtype=torch.float64)
    cell = torch.eye(3, dtype=torch.float64) * a
    module = LRCoulomb(method="ewald")
    batch = charged_batch(coord, q, cell, module.cutoff_lr_periodic)
    minus_short = SRCoulomb()(dict(batch))["energy"]
    whole = module(batch)["energy"] - minus_short
    madelung = -whole.item() / 4 * (a / 2) / COULOMB_EV_ANGSTROM
    assert madelung == pytest.approx(1.7475645946, abs=1e-7)


def test_ewald_does_not_depend_on_how_it_is_split():
    generator = torch.Generator().manual_seed(0)
    cell = torch.tensor([[7.0, 0, 0], [2.0, 6.0, 0], [-1.0, 1.5, 8.0]], dtype=torch.float64)
    coord = torch.rand(10, 3, generator=generator, dtype=torch.float64) @ cell
    q = torch.randn(10, generator=generator, dtype=torch.float64)  # charged: the background counts
    energies = []
    for rc in (7.0, 10.0, 14.0):
        module = LRCoulomb(method="ewald", ewald_rc=rc, ewald_accuracy=1e-12)
        energies.append(module(charged_batch(coord, q, cell, rc))["energy"])
    torch.testing.assert_close(energies[0], energies[2], atol=1e-8, rtol=0)
    torch.testing.assert_close(energies[1], energies[2], atol=1e-8, rtol=0)


def test_ewald_of_a_supercell_is_a_multiple():
    generator = torch.Generator().manual_seed(1)
    cell = torch.diag(torch.tensor([6.0, 7.0, 8.0], dtype=torch.float64))
    coord = torch.rand(6, 3, generator=generator, dtype=torch.float64) @ cell
    q = torch.randn(6, generator=generator, dtype=torch.float64)
    module = LRCoulomb(method="ewald")
    one = module(charged_batch(coord, q, cell, 10.0))["energy"]
    images = torch.cartesian_prod(*[torch.arange(2.0, dtype=torch.float64)] * 3) @ cell
    super_coord = (coord[None] + images[:, None]).reshape(-1, 3)
    eight = module(charged_batch(super_coord, q.repeat(8), cell * 2, 10.0))["energy"]
    torch.testing.assert_close(eight, 8 * one, rtol=1e-7, atol=1e-7)


def test_mistakes():
    with pytest.raises(ValueError, match="method 'ewalt' is not one of simple, dsf, ewald"):
        LRCoulomb(method="ewalt")
    with pytest.raises(ValueError, match="envelope 'sine' is not one of"):
        SRCoulomb(envelope="sine")


@pytest.fixture(scope="module")
def artifact(fixtures_dir):
    return torch.load(fixtures_dir / "peer_v2_lr.pt", weights_only=True)


class TestAgainstThePublishedPackage:
    """Numbers of the calculator of `aimnet` 0.2.5 for a model of random weights."""

    def model(self, artifact, method, dispersion):
        text = artifact["model_yaml"].replace("aimnet.models.AIMNet2", "aimnet2mult.models.aimnet2.AIMNet2")
        config = copy.deepcopy(yaml.safe_load(text.replace("aimnet.modules", "aimnet2mult.modules")))
        weights = dict(artifact["state_dict"])
        config["kwargs"]["num_types"] = weights["afv.weight"].shape[0]
        if method is not None:
            del config["kwargs"]["outputs"]["srcoulomb"], weights["outputs.srcoulomb.rc"]
        model = build_model(config)
        load_weights(model, weights)
        model.outputs["atomic_shift"].shifts.weight.data = weights["outputs.atomic_shift.shifts.weight"]
        if method is not None:
            model.add_output("lrcoulomb", LRCoulomb(method=method))
        if dispersion:
            model.add_output("dftd3", DFTD3(**artifact["d3_params"], cutoff=15.0, smoothing_fraction=0.2))
        return Forces(model).eval()

    @pytest.mark.parametrize(
        ("tag", "method", "dispersion"),
        [
            ("default", "simple", True),
            ("dsf", "dsf", True),
            ("no_external_dispersion", "simple", False),
            ("no_external_coulomb", None, True),
        ],
    )
    def test_molecules(self, artifact, reference, molecules, tag, method, dispersion):
        expected = reference("peer_v2_lr")
        out = self.model(artifact, method, dispersion)(molecules(torch.float32))
        np.testing.assert_allclose(out["energy"].detach(), expected[f"energy_{tag}"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(out["forces"], expected[f"forces_{tag}"], rtol=0, atol=1e-4)
        np.testing.assert_allclose(out["charges"].detach(), expected[f"charges_{tag}"], rtol=0, atol=1e-5)

    @pytest.mark.parametrize(("tag", "method"), [("dsf", "dsf"), ("ewald", "ewald")])
    @pytest.mark.parametrize("dispersion", [True, False])
    def test_crystal(self, artifact, reference, tag, method, dispersion):
        expected = reference("peer_v2_lr")
        name = f"water2_triclinic_{tag}" + ("" if dispersion else "_nodisp")
        data = {k: torch.tensor(expected[f"water2_triclinic_{k}"]) for k in ("coord", "numbers", "cell")}
        out = self.model(artifact, method, dispersion)(data)
        np.testing.assert_allclose(out["energy"].detach(), expected[f"{name}_energy"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(out["forces"], expected[f"{name}_forces"], rtol=0, atol=1e-4)
        np.testing.assert_allclose(out["charges"].detach(), expected[f"{name}_charges"], rtol=0, atol=1e-5)
