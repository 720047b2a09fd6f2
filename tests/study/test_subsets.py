"""Subsets of the target: nested, whole molecules, all elements, no composition that validates, the same each time."""

import itertools

import numpy as np
import pytest

from aimnet2mult.data.sgdataset import open_dataset, write_dataset
from aimnet2mult.study.subsets import (
    arrays_of,
    composition_table,
    molecule_order,
    molecules,
    nested_subsets,
    reference_factors,
    validation_structures,
    write_structures,
)

FRACTIONS = [0.01, 0.05, 0.1, 0.25, 0.5, 1.0]


@pytest.fixture(scope="module")
def source(fixtures_dir):
    return open_dataset(fixtures_dir / "tiny_fid0.h5")


@pytest.fixture(scope="module")
def molecule(source):
    return molecules(source)


@pytest.fixture(scope="module")
def factors(source):
    return reference_factors(source)


@pytest.fixture(scope="module")
def elements(source):
    return composition_table(source) > 0


def identities(source):
    """Composition, charge and multiplicity of each structure in plain Python."""
    found = [None] * len(source)
    for first, arrays in source.chunks(("numbers", "charge", "mult")):
        rows = zip(arrays["numbers"].tolist(), arrays["charge"].tolist(), arrays["mult"].tolist(), strict=True)
        for i, (numbers, charge, mult) in enumerate(rows):
            found[first + i] = (tuple(sorted(numbers)), charge, mult)
    return found


def test_molecules_are_composition_charge_and_multiplicity(source, molecule):
    expected = identities(source)
    pairs = set(zip(expected, molecule.tolist(), strict=True))
    assert len(pairs) == len(set(expected)) == molecule.max() + 1


def test_molecules_by_their_own_key(tmp_path):
    coord, numbers = np.zeros((4, 2, 3)), np.full((4, 2), 1)
    arrays = {"coord": coord, "numbers": numbers, "charge": np.zeros(4), "energy": np.zeros(4)}
    write_dataset(tmp_path / "data.h5", {2: {**arrays, "mol_id": np.array([7, 3, 7, 4])}})
    assert molecules(open_dataset(tmp_path / "data.h5")).tolist() == [0, 1, 0, 2]


def test_subsets_are_nested(molecule, factors):
    subsets = nested_subsets(molecule, factors, FRACTIONS, seed=3)
    for small, large in itertools.pairwise(FRACTIONS):
        assert (subsets[large] | ~subsets[small]).all()
        assert small < 0.1 or subsets[large].sum() > subsets[small].sum()
    assert subsets[1.0].all()


def test_subsets_have_whole_molecules_and_as_many_as_asked_for(molecule, factors):
    for fraction, chosen in nested_subsets(molecule, factors, FRACTIONS, seed=0).items():
        inside = np.unique(molecule[chosen])
        assert not np.isin(inside, molecule[~chosen]).any()
        if fraction > 0.1:
            assert len(inside) == round(fraction * (molecule.max() + 1))


@pytest.mark.parametrize("seed", range(5))
def test_the_smallest_subset_has_all_elements(molecule, factors, elements, seed):
    chosen = nested_subsets(molecule, factors, FRACTIONS, seed)[0.01]
    assert (elements[chosen].any(axis=0) == elements.any(axis=0)).all()


@pytest.mark.parametrize("seed", range(5))
def test_the_smallest_subset_determines_the_reference_energies(molecule, factors, seed):
    """Energies that are linear in atoms, charge and unpaired electrons are reproduced for all from the fewest."""
    chosen = nested_subsets(molecule, factors, FRACTIONS, seed)[0.01]
    energies = factors @ np.random.default_rng(seed).normal(scale=1e4, size=factors.shape[1])
    fitted, *_ = np.linalg.lstsq(factors[chosen].astype(float), energies[chosen], rcond=None)
    np.testing.assert_allclose(factors @ fitted, energies, atol=1e-3)
    rank = np.linalg.matrix_rank(factors.astype(float))
    assert len(np.unique(molecule[chosen])) == rank


def test_nearly_dependent_molecules_come_later():
    """The first molecules of an order tell hydrogen from carbon: C30H62 does not after C29H60, methane does."""
    composition = np.zeros((3, 119), int)
    composition[:, 6], composition[:, 1] = [29, 30, 1], [60, 62, 4]
    for seed in range(6):
        order, least = molecule_order(np.arange(3), composition, seed)
        assert least == 2
        assert 2 in order[:2]
        assert sorted(order.tolist()) == [0, 1, 2]


def test_orders_follow_from_their_seed(molecule, factors):
    first, again, other = (nested_subsets(molecule, factors, [0.2], seed)[0.2] for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_validation_shares_no_composition_with_the_pool(source):
    compositions = np.array([hash(identity[0]) for identity in identities(source)])
    validates = validation_structures(source, 0.2, seed=0)
    assert 0.05 < validates.mean() < 0.5
    assert not np.intersect1d(compositions[validates], compositions[~validates]).size


@pytest.mark.parametrize("seed", range(4))
def test_no_element_is_in_validation_alone(source, elements, seed):
    validates = validation_structures(source, 0.6, seed)
    assert (elements[~validates].any(axis=0) == elements.any(axis=0)).all()


def test_validation_needs_two_compositions(tmp_path):
    arrays = {"coord": np.zeros((4, 2, 3)), "numbers": np.ones((4, 2), int), "charge": np.zeros(4)}
    write_dataset(tmp_path / "data.h5", {2: {**arrays, "energy": np.zeros(4)}})
    with pytest.raises(ValueError, match=r"none of the 1 compositions .* is left for validation"):
        validation_structures(open_dataset(tmp_path / "data.h5"), 0.9, 0)


def test_structures_are_written_as_they_were(source, tmp_path):
    chosen = np.arange(0, len(source), 3)
    write_structures(tmp_path / "new" / "part.h5", source, chosen)
    copy = open_dataset(tmp_path / "new" / "part.h5")
    assert copy.keys == source.keys
    expected, found = arrays_of(source, chosen), arrays_of(copy, np.arange(len(copy)))
    for n_atoms, arrays in expected.items():
        for key, values in arrays.items():
            assert values.dtype == found[n_atoms][key].dtype
            np.testing.assert_array_equal(found[n_atoms][key], values)


def test_labels_that_some_files_lack_are_missing(tmp_path):
    arrays = {"coord": np.zeros((1, 2, 3)), "numbers": np.ones((1, 2), int), "charge": np.zeros(1)}
    arrays["energy"] = np.zeros(1)
    write_dataset(tmp_path / "a.h5", {2: arrays})
    write_dataset(tmp_path / "b.h5", {2: {**arrays, "forces": np.ones((1, 2, 3)), "mult": np.full(1, 3.0)}})
    joined = arrays_of(open_dataset([tmp_path / "a.h5", tmp_path / "b.h5"]), np.arange(2))[2]
    assert np.isnan(joined["forces"][0]).all()
    assert (joined["forces"][1] == 1.0).all()
    assert joined["mult"].tolist() == [1.0, 3.0]
