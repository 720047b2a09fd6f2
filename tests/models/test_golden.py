import json
import math

import pytest
import torch

from aimnet2mult.models.golden import (
    CONTACT,
    batch,
    case_in_all_fidelities,
    compare,
    golden,
    make_cases,
    radius,
    single_round_off,
    table,
)

SPECIES = [[1], [8], [1, 6, 7, 8, 9, 17], [79, 92], list(range(1, 104))]


class Springs(torch.nn.Module):
    """Energy of springs between all atoms; charges share the total charge."""

    def __init__(self, constant=1.0):
        super().__init__()
        self.constant = torch.nn.Parameter(torch.tensor(constant, dtype=torch.float64))
        self.compute_stress = self.compute_hessian = True

    def forward(self, data):
        coord, real, constant = data["coord"], data["numbers"] > 0, self.constant.to(data["coord"].dtype)
        flat = coord.dim() == 2
        if flat:
            coord, real = coord.unsqueeze(0), real.unsqueeze(0)
        d = (coord.unsqueeze(2) - coord.unsqueeze(1)).pow(2).sum(-1) * (real.unsqueeze(2) & real.unsqueeze(1))
        out = {"energy": (constant * d).sum((1, 2), dtype=torch.float64) - 1e6, "forces": coord * constant}
        return out | ({"hessian": d} if self.compute_hessian else {})


@pytest.fixture
def cases():
    return make_cases([1, 8], True, True)


@pytest.fixture
def content(cases):
    return golden(cases, Springs(), Springs().double())


@pytest.mark.parametrize("species", SPECIES)
def test_every_element_occurs_at_sensible_distances(species):
    cases = make_cases(species, True, True)
    assert [case["name"] for case in cases] == ["molecules", "ions", "clusters", "Hessian", "crystal"]
    molecules = cases[0]["inputs"]
    assert {z for row in molecules["numbers"] for z in row} - {0} == set(species)
    for coord, numbers in zip(molecules["coord"], molecules["numbers"], strict=True):
        atoms = [(z, place) for z, place in zip(numbers, coord, strict=True) if z]
        for i, (z, place) in enumerate(atoms):
            near = [math.dist(place, p) / (radius(z) + radius(other)) for other, p in atoms[:i]]
            # One bond to an earlier atom; all others are contacts.
            assert not near or (min(near) > 1.0 and sorted([*near, 9.9])[1] > CONTACT - 0.1)


@pytest.mark.parametrize("species", SPECIES)
def test_multiplicities_are_possible(species):
    for case in make_cases(species, True, True):
        inputs = case["inputs"]
        if "mol_idx" in inputs:
            pairs = zip(inputs["mol_idx"], inputs["numbers"], strict=True)
            sums = [0] * len(inputs["charge"])
            for molecule, z in pairs:
                sums[molecule] += z
        else:
            rows = inputs["numbers"] if isinstance(inputs["numbers"][0], list) else [inputs["numbers"]]
            sums = [sum(row) for row in rows]
        for electrons, charge, mult in zip(sums, inputs["charge"], inputs["mult"], strict=True):
            assert electrons - charge >= mult - 1
            assert (electrons - charge - (mult - 1)) % 2 == 0


def test_open_shells_and_crystals_only_where_the_model_has_them():
    names = [case["name"] for case in make_cases([1, 8], False, False)]
    assert "crystal" not in names
    closed, opened = (make_cases([1, 8], spin, False)[1]["inputs"]["mult"] for spin in (False, True))
    assert [b - a for a, b in zip(closed, opened, strict=True)] == [2, 2]


def test_inputs_are_the_same_in_both_precisions(cases):
    for case in cases:
        for key, value in batch(case["inputs"], torch.float32).items():
            assert torch.equal(value.double(), batch(case["inputs"], torch.float64)[key].double())
    assert cases == make_cases([8, 1], True, True)


def test_numbers_keep_all_their_digits(content):
    again = json.loads(json.dumps(content))
    for precision, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        found = compare(again, precision, Springs().to(dtype))
        assert {d.found for d in found} == {0.0}
        assert {d.quantity for d in found} == {"energy", "forces", "hessian"}


def test_options_hold_for_their_case_alone(content):
    assert [case["name"] for case in content["cases"] if "hessian" in case["outputs"]["float32"]] == ["Hessian"]
    model = Springs()
    compare(content, "float32", model)
    assert model.compute_hessian
    assert model.compute_stress


def test_small_and_large_differences(content):
    within = compare(content, "float64", Springs(1.0 + 1e-12).double())
    assert all(difference.within for difference in within)
    assert any(difference.found > 0 for difference in within)
    beyond = [d for d in compare(content, "float64", Springs(1.0 + 1e-6).double()) if not d.within]
    assert {d.quantity for d in beyond} >= {"energy", "forces"}
    assert "energy of clusters in float64 by" in next(d.text for d in beyond if d.case == "clusters")
    lines = table(beyond)
    assert lines[0].split()[:4] == ["case", "precision", "energy,", "eV"]
    assert "!" in lines[1]
    assert lines[-1].startswith("allowed")
    assert all(d.within for d in compare(content, "float64", Springs(1.0 + 1e-6).double(), tolerance=1.0))


def test_single_precision_is_allowed_its_round_off(cases):
    class Noisy(Springs):
        def forward(self, data):
            out = super().forward(data)
            out["energy"] = out["energy"] + (1e-3 if data["coord"].dtype == torch.float32 else 0.0)
            return out

    content = golden(cases, Noisy(), Noisy().double())
    assert single_round_off(content)["energy"] == pytest.approx(1e-3, rel=0.1)
    allowed = {d.allowed for d in compare(content, "float32", Noisy()) if d.quantity == "energy"}
    assert min(allowed) == pytest.approx(1e-2, rel=0.1)


def test_what_is_missing_or_not_finite_differs(content, cases):
    class Broken(Springs):
        def forward(self, data):
            out = super().forward(data)
            return {"energy": out["energy"], "forces": out["forces"] * math.nan}

    found = compare(content, "float32", Broken())
    assert {d.quantity for d in found if math.isinf(d.found)} == {"forces", "hessian"}
    with pytest.raises(ValueError, match="golden case molecules: forces in float32 holds NaN"):
        golden(cases, Broken(), Broken().double())


def test_cases_of_a_later_version(content):
    with pytest.raises(ValueError, match="newer than this package"):
        compare({**content, "version": 2}, "float32", Springs())


def test_one_molecule_in_all_fidelities():
    (case,) = case_in_all_fidelities([[1, 6, 8], [1, 8], [8, 1, 17]])
    inputs = case["inputs"]
    assert inputs["fidelity"] == [0, 1, 2]
    assert inputs["coord"][0] == inputs["coord"][2]
    assert set(inputs["numbers"][0]) == {1, 8}
    assert case_in_all_fidelities([[1], [8]]) == []
