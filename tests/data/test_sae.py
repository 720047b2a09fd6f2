"""Self-atomic energies: files, sums, fit."""

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aimnet2mult.data.sae import composition, fit_sae, load_sae, sae_energy, save_sae
from aimnet2mult.reference_energies import ReferenceEnergies

# Sizes of all-electron energies, where float32 would be off by some meV.
ENERGIES = {1: -15.82, 6: -1036.17, 8: -2044.72, 35: -70038.65}


def molecules(rows: list[list[int]]) -> np.ndarray:
    width = max(map(len, rows))
    return np.array([row + [0] * (width - len(row)) for row in rows])


def fit(rows: list[list[int]], energies, elements=None):
    numbers = molecules(rows)
    elements = elements or sorted(set(numbers[numbers > 0].tolist()))
    return fit_sae(composition(numbers, elements), np.asarray(energies), elements)


# --- files --------------------------------------------------------------------------------------


@given(st.dictionaries(st.integers(1, 118), st.floats(allow_nan=False, allow_infinity=False), min_size=1))
@settings(max_examples=50, deadline=None)
def test_save_and_load_give_the_same_numbers(tmp_path_factory, sae):
    path = tmp_path_factory.mktemp("sae") / "sae.yaml"
    save_sae(path, sae, comment="from a.h5")
    assert load_sae(path) == sae
    assert list(load_sae(path)) == sorted(sae)


def test_saved_file_names_the_elements(tmp_path):
    save_sae(tmp_path / "sae.yaml", {35: -70038.5, 1: -13.5}, comment="two\nlines")
    lines = (tmp_path / "sae.yaml").read_text().splitlines()
    assert lines[1:] == ["# two", "# lines", "1: -13.5  # H", "35: -70038.5  # Br"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no self-atomic energies"),
        ("{}", "no self-atomic energies"),
        ("- 1\n- 2\n", "holds a list, not a mapping"),
        ("just words", "holds a str, not a mapping"),
        ("{1: -0.5", "not a YAML file"),
        ("H: -0.5", "key 'H' is not an atomic number from 1 to 118"),
        ("0: -0.5", "key 0 is not"),
        ("119: -0.5", "key 119 is not"),
        ("true: -0.5", "key True is not"),
        ("1.0: -0.5", "key 1.0 is not"),
        ("1: abc", r"energy of H \(1\) is 'abc'"),
        ("1: .nan", r"energy of H \(1\) is nan"),
        ("6: -.inf", r"energy of C \(6\) is -inf"),
        ("1:", r"energy of H \(1\) is None"),
        ("1: [1.0]", r"energy of H \(1\) is \[1.0\]"),
        ("1: -0.5\n6: -38.0\n1: -0.6\n", "element 1 occurs twice, in lines 1 and 3"),
        ("1: -0.5\ncharges: 3.0\n", "key 'charges' is not an atomic number from 1 to 118, nor charge or spin"),
        ("charge: 3.0\nspin: 1.0\n", "no self-atomic energies"),
        ("1: -0.5\ncharge: abc\n", r"term charge \(eV per elementary charge\) is 'abc'"),
        ("1: -0.5\nspin: .inf\n", r"term spin \(eV per unpaired electron\) is inf"),
        ("1: -0.5\ncharge: 3.0\ncharge: 3.0\n", "term charge occurs twice, in lines 2 and 3"),
    ],
)
def test_load_refuses_what_is_not_a_table_of_energies(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_sae(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@given(*[st.floats(allow_nan=False, allow_infinity=False)] * 2)
@settings(max_examples=50, deadline=None)
def test_terms_are_saved_exactly(tmp_path_factory, charge, spin):
    path = tmp_path_factory.mktemp("sae") / "sae.yaml"
    save_sae(path, ReferenceEnergies(ENERGIES, charge, spin))
    assert load_sae(path) == ReferenceEnergies(ENERGIES, charge, spin)


def test_file_with_terms_is_refused_where_they_are_not_known(tmp_path):
    """Earlier versions take atomic numbers only as keys."""
    save_sae(tmp_path / "sae.yaml", ReferenceEnergies({1: -13.5}, charge=4.5))
    assert (tmp_path / "sae.yaml").read_text().splitlines()[1:] == [
        "1: -13.5  # H",
        "charge: 4.5  # eV per elementary charge",
    ]


def test_load_names_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.yaml: no such file"):
        load_sae(tmp_path / "none.yaml")


def test_load_takes_integers_as_energies(tmp_path):
    (tmp_path / "sae.yaml").write_text("1: -13\n")
    assert load_sae(tmp_path / "sae.yaml") == {1: -13.0}


# --- sums ---------------------------------------------------------------------------------------


def test_sae_energy_sums_in_float64_and_skips_padding():
    numbers = np.array([[35, 35, 1, 0], [8, 1, 1, 0]], dtype=np.int32)
    expected = [2 * ENERGIES[35] + ENERGIES[1], ENERGIES[8] + 2 * ENERGIES[1]]
    energies = sae_energy(numbers, ENERGIES)
    assert energies.dtype == np.float64
    np.testing.assert_allclose(energies, expected, rtol=1e-15)


def test_sae_energy_names_the_elements_that_are_absent():
    with pytest.raises(
        ValueError, match=r"N \(7\), Cl \(17\) are not among the self-atomic energies: H \(1\), C \(6\)"
    ):
        sae_energy(np.array([[1, 7, 17]]), ENERGIES)
    with pytest.raises(ValueError, match="201 is not an atomic number"):
        sae_energy(np.array([[1, 201]]), ENERGIES)
    with pytest.raises(ValueError, match="-1 is not an atomic number"):
        sae_energy(np.array([[1, -1]]), ENERGIES)


def test_sae_energy_of_no_molecules():
    assert sae_energy(np.zeros((0, 3), dtype=int), ENERGIES).shape == (0,)


@given(st.lists(st.lists(st.sampled_from([0, 1, 6, 8, 35]), min_size=5, max_size=5), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_subtracting_and_adding_sae_is_the_identity(rows):
    numbers = np.array(rows)
    residual = np.random.default_rng(0).normal(size=len(rows))
    total = residual + sae_energy(numbers, ENERGIES)
    np.testing.assert_allclose(total - sae_energy(numbers, ENERGIES), residual, atol=1e-9)


# --- fit ----------------------------------------------------------------------------------------


def random_molecules(n: int, elements: list[int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    numbers = rng.choice([0, *elements], size=(n, 8))
    numbers[:, 0] = rng.choice(elements, size=n)
    return numbers


def test_fit_recovers_exact_energies():
    numbers = random_molecules(300, list(ENERGIES))
    fitted = fit_sae(composition(numbers, list(ENERGIES)), sae_energy(numbers, ENERGIES), list(ENERGIES))
    assert fitted.rank == 4
    assert fitted.inseparable == []
    assert fitted.sae == pytest.approx(ENERGIES, abs=1e-8)
    assert fitted.residual_max < 1e-8


def test_fit_equals_lstsq_before_and_after_trimming():
    elements = [1, 6, 8]
    numbers = random_molecules(500, elements, seed=1)
    counts = composition(numbers, elements).astype(float)
    rng = np.random.default_rng(2)
    energies = sae_energy(numbers, ENERGIES) + rng.normal(size=500)
    energies[:8] += 500.0  # outliers that only the second fit leaves out
    fitted = fit_sae(counts, energies, elements)

    first = energies - counts @ np.linalg.lstsq(counts, energies, rcond=None)[0]
    kept = (first >= np.quantile(first, 0.02)) & (first <= np.quantile(first, 0.98))
    second = np.linalg.lstsq(counts[kept], energies[kept], rcond=None)[0]
    residuals = energies - counts @ second
    assert list(fitted.sae.values()) == pytest.approx(second, abs=1e-8)
    assert fitted.n_used == kept.sum() == 480
    assert fitted.residual_std_all == pytest.approx(first.std())
    assert fitted.residual_std == pytest.approx(residuals[kept].std())
    assert fitted.residual_rms == pytest.approx(np.sqrt((residuals**2).mean()))
    assert fitted.residual_max == pytest.approx(np.abs(residuals).max())
    assert fitted.residual_std_per_atom == pytest.approx((residuals / counts.sum(1)).std())
    assert fitted.residual_std < 2 < fitted.residual_std_all


def test_fit_in_blocks_equals_fit_at_once(monkeypatch):
    elements = [1, 6, 8]
    numbers = random_molecules(100, elements, seed=3)
    counts = composition(numbers, elements)
    energies = sae_energy(numbers, ENERGIES) + np.random.default_rng(4).normal(size=100)
    at_once = fit_sae(counts, energies, elements)
    monkeypatch.setattr("aimnet2mult.data.sae.BLOCK_ROWS", 7)
    in_blocks = fit_sae(counts, energies, elements)
    assert in_blocks.sae == pytest.approx(at_once.sae, abs=1e-8)
    assert in_blocks.rank == at_once.rank


def test_order_of_columns_does_not_matter():
    numbers = random_molecules(60, [1, 6, 8], seed=5)
    energies = sae_energy(numbers, ENERGIES)
    there = fit_sae(composition(numbers, [1, 6, 8]), energies, [1, 6, 8])
    back = fit_sae(composition(numbers, [8, 6, 1]), energies, [8, 6, 1])
    assert there.sae == pytest.approx(back.sae, abs=1e-8)
    assert there.atoms == back.atoms
    assert list(back.sae) == [1, 6, 8]


def test_counts_of_molecules_and_atoms():
    fitted = fit([[8, 1, 1], [8, 8], [1, 1], [6, 8]], [-76.0, -150.0, -1.1, -113.0])
    assert fitted.molecules == {1: 2, 6: 1, 8: 3}
    assert fitted.atoms == {1: 4, 6: 1, 8: 4}
    assert any("C (6) occurs in one molecule only" in sentence for sentence in fitted.warnings())


def test_water_alone_cannot_separate_hydrogen_and_oxygen():
    fitted = fit([[8, 1, 1]] * 20, [-76.0] * 20)
    assert fitted.rank == 1
    assert fitted.inseparable == [[1, 8]]
    # Minimum norm: the solution lies along the composition (2, 1).
    assert fitted.sae == pytest.approx({1: -76.0 * 2 / 5, 8: -76.0 / 5})
    assert "cannot separate the energies of H (1), O (8)" in fitted.report()


def test_inseparable_elements_are_named_in_their_groups():
    rows = [[8, 1, 1], [8, 1, 1, 8, 1, 1], [17, 11], [6, 9, 9, 9, 9], [6], [17, 11, 6]] * 5
    fitted = fit(rows, sae_energy(molecules(rows), dict.fromkeys(range(1, 40), -1.0)))
    assert fitted.inseparable == [[1, 8], [11, 17]]
    assert fitted.sae[6] == pytest.approx(-1.0)
    assert fitted.sae[9] == pytest.approx(-1.0)
    assert fitted.rank == 4


def test_trimming_never_loses_an_element():
    """Two odd molecules are the only ones with bromine; without them its energy would come out as zero."""
    rows = [[6, 1, 1, 1, 1], [6, 1, 1], [1, 1]] * 50 + [[1, 35], [1, 35]]
    noise = np.zeros(len(rows))
    noise[-2:] = [-30.0, 30.0]
    fitted = fit(rows, sae_energy(molecules(rows), ENERGIES) + noise)
    assert fitted.inseparable == []
    assert fitted.sae[35] == pytest.approx(ENERGIES[35])


def test_fit_refuses_bad_input():
    with pytest.raises(ValueError, match="at least one molecule"):
        fit_sae(np.zeros((0, 1)), np.zeros(0), [1])
    with pytest.raises(ValueError, match="energy of molecule 1 is nan"):
        fit([[1], [1]], [-0.5, np.nan])
    with pytest.raises(ValueError, match=r"no molecule holds Br \(35\)"):
        fit([[1, 1]], [-1.1], elements=[1, 35])
    with pytest.raises(ValueError, match=r"counts have shape \(2, 1\), expected \(2, 2\)"):
        fit_sae(np.ones((2, 1)), np.zeros(2), [1, 6])


def test_fit_on_real_all_electron_energies(request):
    """The first fit's spread of B3LYP energies up to -142215 eV agrees with numpy's least squares on the file."""
    path = request.config.rootpath / "tests" / "fixtures" / "tiny_fid0.h5"
    with h5py.File(path) as file:
        numbers = [group["numbers"][:] for group in file.values()]
        energies = np.concatenate([group["energy"][:] for group in file.values()])
    elements = sorted({int(z) for part in numbers for z in np.unique(part)})
    counts = np.concatenate([composition(part, elements) for part in numbers])
    fitted = fit_sae(counts, energies, elements)
    reference = energies - counts @ np.linalg.lstsq(counts.astype(float), energies, rcond=None)[0]
    assert fitted.residual_std_all == pytest.approx(reference.std(), rel=1e-8)
    assert fitted.residual_std < fitted.residual_std_all < 5.0
    assert fitted.n_molecules == 160
    assert fitted.sae[6] == pytest.approx(-1036, abs=3)


# --- terms in charge and spin -------------------------------------------------------------------


def charged_molecules(n: int, elements: list[int], seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Random molecules, and what terms multiply: charges of -1, 0 and 1, up to three unpaired electrons."""
    rng = np.random.default_rng(seed)
    terms = {"charge": rng.integers(-1, 2, n).astype(float), "spin": rng.integers(0, 4, n).astype(float)}
    return random_molecules(n, elements, seed), terms


def test_fit_recovers_exact_terms():
    elements = list(ENERGIES)
    numbers, terms = charged_molecules(300, elements)
    reference = ReferenceEnergies(ENERGIES, charge=9.5, spin=-1.25)
    energies = sae_energy(numbers, reference, terms["charge"], terms["spin"] + 1)
    fitted = fit_sae(composition(numbers, elements), energies, elements, terms)
    assert fitted.sae == pytest.approx(ENERGIES, abs=1e-8)
    assert (fitted.sae.charge, fitted.sae.spin) == pytest.approx((9.5, -1.25), abs=1e-8)
    assert (fitted.rank, fitted.inseparable) == (6, [])
    one = fit_sae(
        composition(numbers, elements), energies + 1.25 * terms["spin"], elements, {"charge": terms["charge"]}
    )
    assert (one.sae.charge, one.sae.spin) == (pytest.approx(9.5, abs=1e-8), 0.0)


def test_standard_errors_and_condition_number():
    """(AᵀA)⁻¹ and the condition number by their definitions; so few molecules of each kind that none is trimmed."""
    elements = [1, 6, 8]
    numbers, terms = charged_molecules(200, elements)
    design = np.column_stack([composition(numbers, elements), *terms.values()])
    energies = design @ [-13.0, -1030.0, -2040.0, 4.0, 1.0] + np.random.default_rng(1).normal(size=200)
    fitted = fit_sae(composition(numbers, elements), energies, elements, terms)
    x, squares, _, _ = np.linalg.lstsq(design, energies, rcond=None)
    assert fitted.n_used == 200
    assert [*fitted.sae.values(), fitted.sae.charge, fitted.sae.spin] == pytest.approx(x, abs=1e-8)
    expected = np.sqrt(squares[0] / (200 - 5) * np.diag(np.linalg.inv(design.T @ design)))
    assert list(fitted.standard_errors.values()) == pytest.approx(expected)
    assert list(fitted.standard_errors) == [1, 6, 8, "charge", "spin"]
    assert fitted.condition == pytest.approx(np.linalg.cond(design / np.linalg.norm(design, axis=0)))
    assert "Rank 5 for 5 coefficients, condition number" in fitted.report()
    assert not fitted.warnings()


def test_ions_are_not_trimmed_wholesale():
    """Ions of both signs lie 8 eV above the line, further than all else: 2 % of each kind go, and not all of them."""
    elements = [1, 6, 8]
    numbers = random_molecules(4000, elements)
    charge = np.zeros(4000)
    charge[:30], charge[30:60] = 1.0, -1.0
    noise = np.random.default_rng(0).normal(0.0, 0.1, 4000)
    energies = sae_energy(numbers, ENERGIES) + 5.0 * charge + 8.0 * np.abs(charge) + noise
    fitted = fit_sae(composition(numbers, elements), energies, elements, {"charge": charge})
    assert fitted.n_used == 4000 - 2 * int(0.02 * 3940)
    assert fitted.sae.charge == pytest.approx(5.0, abs=0.1)
    assert fitted.sae == pytest.approx({z: ENERGIES[z] for z in elements}, abs=0.05)


def test_terms_that_the_data_do_not_determine_are_zero_and_said():
    elements = [1, 8]
    numbers = random_molecules(200, elements)
    nothing = {"charge": np.zeros(200), "spin": np.zeros(200)}
    fitted = fit_sae(composition(numbers, elements), sae_energy(numbers, ENERGIES), elements, nothing)
    assert (fitted.sae.charge, fitted.sae.spin) == (0.0, 0.0)
    assert fitted.warnings() == [
        "Warning: no molecule is charged; the charge term is 0.",
        "Warning: no molecule has unpaired electrons; the spin term is 0.",
    ]
    assert np.isnan(fitted.standard_errors["charge"])
    ammonium = fit_sae(np.tile([4, 1], (50, 1)), np.full(50, -1500.0), [1, 7], {"charge": np.ones(50)})
    assert ammonium.inseparable == [[1, 7, "charge"]]
    assert "cannot separate the energies of H (1), N (7), charge" in ammonium.report()


def test_few_molecules_and_vague_coefficients_are_warned_of():
    elements = [1, 6, 8]
    numbers = random_molecules(14, elements, seed=2)
    energies = sae_energy(numbers, ENERGIES) + 3.0 * np.random.default_rng(0).normal(size=14)
    few, vague = fit_sae(composition(numbers, elements), energies, elements).warnings()
    assert "14 molecules for 3 coefficients, fewer than 5 for each" in few
    assert "standard error of C (6), O (8) is above 0.5 eV" in vague
    many = random_molecules(15, elements, seed=2)
    assert not fit_sae(composition(many, elements), sae_energy(many, ENERGIES), elements).warnings()


def test_weights_are_those_of_weighted_least_squares():
    elements = [1, 6, 8]
    numbers, terms = charged_molecules(120, elements, seed=3)
    rng = np.random.default_rng(1)
    energies = sae_energy(numbers, ENERGIES) + rng.normal(size=120)
    weights = np.where(rng.random(120) < 0.5, 1.0, 0.05)
    fitted = fit_sae(composition(numbers, elements), energies, elements, terms, weights)
    design = np.column_stack([composition(numbers, elements), *terms.values()])
    x = np.linalg.lstsq(design * weights[:, None], energies * weights, rcond=None)[0]
    assert [*fitted.sae.values(), fitted.sae.charge, fitted.sae.spin] == pytest.approx(x, abs=1e-8)
    residuals = (energies - design @ x)[weights == 1.0]
    assert fitted.residual_rms == pytest.approx(np.sqrt((residuals**2).mean()))
