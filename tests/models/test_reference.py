"""Checkpoints of the published layout give the numbers of an independent implementation."""

import numpy as np
import pytest
import torch

from aimnet2mult.modules import Forces

QUANTITIES = ("energy", "forces", "charges", "spin_charges")


def assert_results(out, expected, tag, tolerance):
    for key in QUANTITIES:
        found = out[key].detach().numpy()
        np.testing.assert_allclose(found, expected[f"{key}_{tag}_f64"], rtol=0, atol=tolerance, err_msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
class TestReference:
    def test_single_padded(self, reference, reference_model, molecules, tolerance, dtype):
        out = Forces(reference_model("ref_single", dtype)).eval()(molecules(dtype))
        expected = {k.replace("_f64", "_padded_f64"): v for k, v in reference("ref_single").items()}
        assert out["energy"].dtype == torch.float64
        assert_results(out, expected, "padded", tolerance[dtype])

    @pytest.mark.parametrize("lists", [True, False], ids=["caller's lists", "own lists"])
    def test_single_flat(self, reference, reference_model, tolerance, dtype, lists):
        expected = reference("ref_single")
        data = {
            "coord": torch.tensor(expected["flat_coord"], dtype=dtype),
            "numbers": torch.tensor(expected["flat_numbers"]),
            "mol_idx": torch.tensor(expected["flat_mol_idx"]),
            "charge": torch.tensor(expected["charge"]),
            "mult": torch.tensor(expected["mult"]),
        }
        if lists:
            data["nbmat"] = torch.tensor(expected["flat_nbmat"])
            data["nbmat_lr"] = torch.tensor(expected["flat_nbmat_lr"])
        out = Forces(reference_model("ref_single", dtype)).eval()(data)
        real = expected["numbers"] > 0
        np.testing.assert_allclose(out["energy"].detach(), expected["energy_f64"], rtol=0, atol=tolerance[dtype])
        for key in QUANTITIES[1:]:
            found = out[key].detach()[:-1]
            np.testing.assert_allclose(found, expected[f"{key}_f64"][real], rtol=0, atol=tolerance[dtype])

    @pytest.mark.parametrize("tag", ["fid0", "fid1", "fid2", "mixed"])
    def test_mixed(self, reference, reference_model, molecules, tolerance, dtype, tag):
        expected = reference("ref_mixed")
        data = molecules(dtype)
        data["numbers"] = torch.tensor(expected[f"numbers_{tag}"])
        data["_fidelities"] = torch.tensor(expected[f"fidelities_{tag}"])
        out = Forces(reference_model("ref_mixed", dtype)).eval()(data)
        assert_results(out, expected, tag, tolerance[dtype])
