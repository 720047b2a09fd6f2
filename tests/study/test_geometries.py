"""Geometries that two levels have in common: found whatever their order, with the difference of the labels."""

import numpy as np
import pytest

from aimnet2mult.data.sgdataset import open_dataset, write_dataset
from aimnet2mult.study.geometries import difference_data


@pytest.fixture
def levels(tmp_path):
    """Two levels: structures 1 and 4 of the first are 2 and 0 of the second, the latter moved by 5e-4 Å."""
    rng = np.random.default_rng(0)
    coord = rng.normal(size=(6, 3, 3)).astype(np.float32)
    numbers = np.tile([8, 1, 1], (6, 1))
    charge, mult = np.zeros(6, np.float32), np.ones(6, np.float32)
    forces = rng.normal(size=(6, 3, 3)).astype(np.float32)
    high = {"coord": coord, "numbers": numbers, "charge": charge, "mult": mult, "forces": forces}
    write_dataset(tmp_path / "high.h5", {3: {**high, "energy": -2000.0 - np.arange(6.0)}})
    low_coord = rng.normal(size=(4, 3, 3)).astype(np.float32)
    low_coord[2], low_coord[0], low_coord[1] = coord[1], coord[4] + 5e-4, coord[0]
    low = {"coord": low_coord, "numbers": numbers[:4], "charge": charge[:4], "mult": mult[:4], "forces": forces[:4]}
    low["charge"] = np.array([0, 1, 0, 0], np.float32)  # the third geometry in common is that of an ion
    write_dataset(tmp_path / "low.h5", {3: {**low, "energy": -10.0 * np.arange(4.0)}, 4: other_size()})
    return open_dataset(tmp_path / "high.h5"), open_dataset(tmp_path / "low.h5"), forces


def other_size():
    return {"coord": np.zeros((1, 4, 3)), "numbers": np.ones((1, 4), int), "charge": np.zeros(1), "energy": np.zeros(1)}


def test_differences_of_equal_geometries(levels):
    high, low, forces = levels
    groups, found = difference_data(high, np.arange(6), low)
    assert found.tolist() == [1, 4]
    assert groups[3]["energy"].tolist() == [-2001.0 + 20.0, -2004.0]
    np.testing.assert_array_equal(groups[3]["forces"], np.stack([forces[1] - forces[2], forces[4] - forces[0]]))
    assert "charges" not in groups[3]


def test_only_the_structures_that_are_asked_for(levels):
    high, low, _ = levels
    _, found = difference_data(high, np.array([4, 5, 0]), low)
    assert found.tolist() == [4]


def test_geometries_further_apart_are_others(levels, tmp_path):
    high, _, _ = levels
    arrays = next(arrays for _, arrays in high.read(np.arange(6), sorted(high.keys)))
    write_dataset(tmp_path / "moved.h5", {3: {**arrays, "coord": arrays["coord"] + np.float32(2e-3)}})
    groups, found = difference_data(high, np.arange(6), open_dataset(tmp_path / "moved.h5"))
    assert groups == {}
    assert len(found) == 0
