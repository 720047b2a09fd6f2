"""Terms of reference energies in charge and spin, in every program that knows reference energies.

Two checkpoints have the same weights and self-atomic energies, and one has terms besides: whatever computes total
energies from it must differ by Q ε_Q + 2S ε_S, and whatever compares with labels must not differ at all.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase import Atoms
from click.testing import CliRunner

from aimnet2mult.calculators import AIMNet2Calculator
from aimnet2mult.config.builder import ConfigError
from aimnet2mult.data.checks.dataset import Examined, Part
from aimnet2mult.data.checks.findings import Thresholds
from aimnet2mult.data.checks.rows import pieces
from aimnet2mult.data.sae import load_sae, sae_energy, save_sae
from aimnet2mult.data.sgdataset import open_dataset, write_dataset
from aimnet2mult.models.base import copy_model, load_checkpoint, load_model, load_model_config, save_checkpoint
from aimnet2mult.models.exported import load_pt2
from aimnet2mult.models.jit_wrapper import load_jit_model
from aimnet2mult.models.loading import load_potential
from aimnet2mult.models.safe_file import CheckpointError
from aimnet2mult.modules import SelfAtomicEnergies
from aimnet2mult.reference_energies import ReferenceEnergies
from aimnet2mult.tools.check_data import main as check_data
from aimnet2mult.tools.compile_jit import compile_model
from aimnet2mult.tools.compile_pt2 import export_checkpoint
from aimnet2mult.tools.edit_fidelities import main as edit_fidelities
from aimnet2mult.tools.evaluate import main as evaluate
from aimnet2mult.tools.export import export_model
from aimnet2mult.tools.info import main as info
from aimnet2mult.tools.verify import main as verify
from aimnet2mult.train.configuration import load_config
from aimnet2mult.train.resume import Job
from aimnet2mult.train.resume import check_data as check_resumed
from aimnet2mult.train.runner import run_training

ELEMENTS = {1: -13.587, 6: -1029.476, 7: -1485.234, 8: -2041.789, 9: -2715.3, 17: -12518.7}
CHARGE, SPIN = 4.75234567890123, -2.1098765432109
PLAIN = ReferenceEnergies(ELEMENTS)
TERMS = ReferenceEnergies(ELEMENTS, CHARGE, SPIN)


def run(command, *arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, fixtures_dir):
    """Without and with terms: three fidelities, of which the first has terms."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, first in (("plain", PLAIN), ("terms", TERMS)):
        save_checkpoint(
            folder / f"{name}.pt",
            load_checkpoint(fixtures_dir / "ref_mixed.pt")["model"],
            model_config=load_model_config(fixtures_dir / "ref_mixed_model.yaml"),
            num_fidelities=3,
            fidelity_offset=200,
            use_fidelity_readouts=True,
            fidelity_names={0: "dft", 1: "gfn2", 2: "gfn1"},
            sae={0: first, 1: PLAIN, 2: PLAIN},
            species={f: list(ELEMENTS) for f in range(3)},
        )
    return folder / "plain.pt", folder / "terms.pt"


@pytest.fixture(scope="module")
def compiled(checkpoints, tmp_path_factory):
    """The first fidelity of both, and all fidelities of the one with terms."""
    folder = tmp_path_factory.mktemp("compiled")
    plain, terms = (compile_model(path, folder / path.stem, fidelity_level=0)[0] for path in checkpoints)
    combined, _ = compile_model(checkpoints[1], folder / "combined", combined=True)
    return plain, terms, combined


def terms_of(data):
    """Q ε_Q + 2S ε_S of a batch, (B,) float64."""
    return CHARGE * data["charge"].double() + SPIN * (data["mult"].double() - 1.0)


# --- the type -----------------------------------------------------------------------------------


def test_as_a_mapping_they_are_the_self_atomic_energies():
    reference = ReferenceEnergies({8: -2.0, 1: -1.0}, charge=3.0)
    assert list(reference) == [1, 8]
    assert reference[8] == -2.0
    assert 6 not in reference
    assert reference.terms == {"charge": 3.0}
    assert ReferenceEnergies.from_table(reference.table()) == reference
    assert ReferenceEnergies({1: -1.0, 8: -2.0}) == {1: -1.0, 8: -2.0}
    assert reference != {1: -1.0, 8: -2.0}
    assert reference.restricted([8]) == ReferenceEnergies({8: -2.0}, charge=3.0)


def test_reference_energy_of_far_fragments_is_the_sum_of_theirs():
    """Na⁺ + Cl⁻, and two radicals with aligned spins: charges add up, and so do unpaired electrons."""
    reference = ReferenceEnergies({1: -13.0, 8: -2040.0, 11: -4400.0, 17: -12500.0}, CHARGE, SPIN)
    for (a, q_a, m_a), (b, q_b, m_b) in [
        (([11], 1, 1), ([17], -1, 1)),
        (([8, 1], 0, 2), ([8, 8], 0, 3)),
        (([8, 8], 1, 2), ([8, 1], 1, 3)),
    ]:
        one, other, pair = (
            sae_energy(np.array([numbers]), reference, np.array([q]), np.array([mult]))[0]
            for numbers, q, mult in [(a, q_a, m_a), (b, q_b, m_b), (a + b, q_a + q_b, m_a + m_b - 1)]
        )
        assert pair == pytest.approx(one + other, rel=1e-15)


def test_terms_need_charge_and_multiplicity():
    with pytest.raises(ValueError, match="needs the charge of each molecule"):
        sae_energy(np.array([[8, 1]]), TERMS, mult=np.ones(1))
    with pytest.raises(ValueError, match="needs the mult of each molecule"):
        sae_energy(np.array([[8, 1]]), TERMS, charge=np.ones(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_module_adds_terms_in_double_precision(molecules, dtype):
    data = molecules(dtype)
    without, terms = (SelfAtomicEnergies(sae).to(dtype)(dict(data))["energy"] for sae in (PLAIN, TERMS))
    assert terms.dtype == torch.float64
    torch.testing.assert_close(terms - without, terms_of(data), rtol=0, atol=1e-11)


# --- checkpoints --------------------------------------------------------------------------------


def is_table_of_version_1(table):
    """The rule by which programs of checkpoint version 1 accept self-atomic energies."""
    return all(type(z) is int and type(energy) in (int, float) for z, energy in table.items())


def test_checkpoints_with_terms_are_refused_by_programs_that_do_not_know_them(checkpoints):
    plain, terms = (torch.load(path, weights_only=True) for path in checkpoints)
    assert (plain["format_version"], terms["format_version"]) == (1, 2)  # "newer than this package"
    assert all(map(is_table_of_version_1, plain["sae"].values()))
    assert not is_table_of_version_1(terms["sae"][0])


def test_checkpoint_round_trip(checkpoints, tmp_path):
    content = load_checkpoint(checkpoints[1])
    assert ReferenceEnergies.from_table(content["sae"][0]) == TERMS
    assert content["sae"][1] == ELEMENTS
    copy_model(checkpoints[1], tmp_path / "copy.pt")
    assert load_checkpoint(tmp_path / "copy.pt")["sae"] == content["sae"]
    _, metadata = load_model(checkpoints[1])
    assert metadata["sae"][0] == TERMS
    assert metadata["implemented_species"] == list(ELEMENTS)


@pytest.mark.parametrize("entry", [{"charge": "4"}, {"spin": float("nan")}, {"polarisability": 1.0}])
def test_terms_in_checkpoints_are_checked(checkpoints, tmp_path, entry):
    content = torch.load(checkpoints[1], weights_only=True)
    content["sae"][0] |= entry
    torch.save(content, tmp_path / "wrong.pt")
    with pytest.raises(CheckpointError, match=r"sae.0 must be \{Z: energy in eV\}, finite, with charge or spin"):
        load_checkpoint(tmp_path / "wrong.pt")


def test_resuming_with_other_terms_is_refused(checkpoints):
    content = {**load_checkpoint(checkpoints[1]), "data": {"fidelities": {}}}
    data = SimpleNamespace(record={"fidelities": {}}, sae={0: TERMS, 1: PLAIN, 2: PLAIN})
    check_resumed(content, data)
    data.sae = {0: ReferenceEnergies(ELEMENTS, CHARGE), 1: PLAIN, 2: PLAIN}
    with pytest.raises(ConfigError, match="self-atomic energies are others than when the run began"):
        check_resumed(content, data)


# --- total energies -----------------------------------------------------------------------------


def test_compiled_model_adds_the_terms(compiled, molecules):
    """Equal to the sum by hand; every layout of the molecules, the network the same to the last bit."""
    data = molecules(torch.float32)
    plain, terms = (load_jit_model(path)(data) for path in compiled[:2])
    expected = plain["energy"] + terms_of(data)
    np.testing.assert_allclose(terms["energy"], expected, rtol=1e-9)
    torch.testing.assert_close(terms["energy"] - plain["energy"], terms_of(data), rtol=0, atol=1e-9)
    for key in ("forces", "charges"):
        assert torch.equal(terms[key], plain[key])


def test_compiled_model_without_charge_and_multiplicity(compiled, molecules):
    data = molecules(torch.float32)
    closed = (data["charge"] == 0) & (data["mult"] == 1)
    batch = {key: data[key][closed] for key in ("coord", "numbers")}
    plain, terms = (load_jit_model(path)(batch)["energy"] for path in compiled[:2])
    assert torch.equal(plain, terms)


def test_flat_layout(compiled, molecules, to_flat):
    data = to_flat(molecules(torch.float32))
    plain, terms = (load_jit_model(path)(data)["energy"] for path in compiled[:2])
    torch.testing.assert_close(terms - plain, terms_of(data), rtol=0, atol=1e-9)


def test_combined_file_adds_the_terms_of_each_molecule_s_fidelity(compiled, molecules):
    data = molecules(torch.float32)
    data["fidelity"] = torch.arange(len(data["numbers"])) % 2
    first = data["fidelity"] == 0
    with_terms = load_jit_model(compiled[2])(data)["energy"]
    single = load_jit_model(compiled[0])({key: data[key] for key in ("coord", "numbers", "charge", "mult")})["energy"]
    torch.testing.assert_close((with_terms - single)[first], terms_of(data)[first], rtol=0, atol=1e-6)  # another file
    everywhere = {**data, "fidelity": torch.tensor(1)}
    others = load_jit_model(compiled[2])(everywhere)["energy"]
    torch.testing.assert_close(with_terms[~first], others[~first], rtol=0, atol=1e-6)  # another batch


def test_potential_and_calculator(checkpoints, compiled, molecules):
    data = molecules(torch.float32)
    plain, terms = (load_potential(path, fidelity="dft")(data)["energy"] for path in checkpoints)
    torch.testing.assert_close(terms - plain, terms_of(data), rtol=0, atol=1e-9)
    energies = []
    for path in compiled[:2]:
        atoms = Atoms("OH2", [[0, 0, 0.1], [0.8, 0, -0.5], [-0.8, 0, -0.5]], info={"charge": 1, "spin": 2})
        atoms.calc = AIMNet2Calculator(path)
        energies.append(atoms.get_potential_energy())
    assert energies[1] - energies[0] == pytest.approx(CHARGE + SPIN, abs=1e-9)


@pytest.mark.slow
def test_exported_program_adds_the_terms(checkpoints, compiled, molecules, tmp_path):
    data = molecules(torch.float64)
    path, _ = export_checkpoint(checkpoints[1], tmp_path / "m", fidelity_level=0, precision="float64")
    model = load_jit_model(compiled[0])
    model.module.double()
    terms = load_pt2(path)(data)["energy"] - model(data)["energy"]
    torch.testing.assert_close(terms, terms_of(data), rtol=0, atol=1e-7)


def test_golden_cases_hold_the_terms(compiled):
    result = run(verify, compiled[1])
    assert result.exit_code == 0, result.output


def test_sae_file_with_terms_of_a_checkpoint_without(fixtures_dir, checkpoints, tmp_path, molecules):
    """Weights that know nothing of themselves, and what contradicts those that do."""
    save_sae(tmp_path / "terms.yaml", TERMS)
    save_sae(tmp_path / "plain.yaml", PLAIN)
    options = {"model": fixtures_dir / "ref_mixed_model.yaml", "fidelity_level": 0}
    data = molecules(torch.float32)
    energies = [
        load_jit_model(
            compile_model(fixtures_dir / "ref_mixed.pt", tmp_path / name, sae=tmp_path / f"{name}.yaml", **options)[0]
        )(data)["energy"]
        for name in ("plain", "terms")
    ]
    torch.testing.assert_close(energies[1] - energies[0], terms_of(data), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="charge term differs from the one that fidelity 0 was trained with"):
        compile_model(checkpoints[1], tmp_path / "m", fidelity_level=0, sae=tmp_path / "plain.yaml")
    compile_model(checkpoints[1], tmp_path / "m", fidelity_level=0, sae=tmp_path / "terms.yaml")


def test_export_to_format_2_is_refused(checkpoints, tmp_path):
    with pytest.raises(ValueError, match=r"fidelity 0 \(dft\) has .* terms in charge .* format 2 has no place"):
        export_model(checkpoints[1], tmp_path / "out.pt", fidelity_level=0)
    assert not (tmp_path / "out.pt").exists()
    export_model(checkpoints[1], tmp_path / "out.pt", fidelity_level=1)


# --- labels -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, reference):
    """The reference molecules as datasets: labels without and with the terms."""
    values = reference("ref_single")
    folder = tmp_path_factory.mktemp("labelled")
    n_atoms = (values["numbers"] > 0).sum(axis=1)
    residuals = np.random.default_rng(0).normal(size=len(n_atoms))
    for name, reference_energies in (("plain", PLAIN), ("terms", TERMS)):
        groups = {}
        for n in np.unique(n_atoms).tolist():
            rows = n_atoms == n
            arrays = {key: values[key][rows] for key in ("charge", "mult")}
            arrays |= {key: values[key][rows][:, :n] for key in ("coord", "numbers")}
            total = sae_energy(arrays["numbers"], reference_energies, arrays["charge"], arrays["mult"])
            groups[n] = {**arrays, "energy": total + residuals[rows]}
        write_dataset(folder / f"{name}.h5", groups)
    return folder / "plain.h5", folder / "terms.h5"


def test_evaluation_compares_like_with_like(checkpoints, compiled, labelled, tmp_path):
    """Labels and predictions both contain the terms: the errors are those of the model without, on labels without."""
    found = []
    for name, model, data in (
        ("plain", checkpoints[0], labelled[0]),
        ("checkpoint", checkpoints[1], labelled[1]),
        ("compiled", compiled[1], labelled[1]),
    ):
        result = run(evaluate, "--model", model, "--data", f"dft={data}", "--output", tmp_path / name)
        assert result.exit_code == 0, result.output
        content = json.loads((tmp_path / name / "errors.json").read_text())
        found.append(content["comparisons"][0]["errors"]["energy"])
    for errors in found[1:]:
        assert errors["mae"] == pytest.approx(found[0]["mae"], rel=1e-6)


def residuals_in_check(path, sae):
    """What the check of data finds usual, and how far it finds molecules from the others of their kind."""
    data = Examined(Part("dft", open_dataset(path), np.zeros(13, bool)), Thresholds(), sae)
    molecules = list(pieces(data.source))
    for some in molecules:
        data.sample.add(some)
    found = data.residuals
    off = np.concatenate([found.mark(some, data.limits)[1] for some in molecules])
    return found.pooled, found.per_atom, off


def test_check_of_data_takes_the_terms_off(labelled, tmp_path):
    (centre, spread), per_atom, off = residuals_in_check(labelled[0], PLAIN)
    for sae, same in ((TERMS, True), (PLAIN, False)):
        pooled, per_atom_with, off_with = residuals_in_check(labelled[1], sae)
        assert (pooled == pytest.approx((centre, spread), abs=1e-8)) is same
        assert (per_atom_with == pytest.approx(per_atom, abs=1e-8)) is same
        assert np.allclose(off_with, off, atol=1e-8) is same
    save_sae(tmp_path / "terms.yaml", TERMS)
    result = run(check_data, f"dft={labelled[1]}", "--sae", f"dft={tmp_path / 'terms.yaml'}")
    assert result.exit_code == 0, result.output
    assert "energy_outlier" not in result.output


def test_training_learns_what_the_terms_leave(fixtures_dir, tmp_path):
    """Training on labels with terms, and on labels without, gives the same network; the checkpoint holds the terms."""
    source = open_dataset(fixtures_dir / "tiny_fid0.h5")
    sae = {z: -1000.0 * z for z in source.elements}
    for name, reference_energies in (("plain", ReferenceEnergies(sae)), ("terms", ReferenceEnergies(sae, 4.75, -2.5))):
        groups = {}
        for _, arrays in source.chunks(sorted(source.keys)):
            terms = 4.75 * arrays["charge"] - 2.5 * (arrays["mult"] - 1.0) if name == "terms" else 0.0
            arrays["energy"] = sae_energy(arrays["numbers"], sae) + np.round(arrays["forces"][:, 0, 0]) + terms
            groups[arrays["numbers"].shape[1]] = arrays
        write_dataset(tmp_path / f"{name}.h5", groups)
        save_sae(tmp_path / f"{name}.yaml", reference_energies)
        settings = [
            f"data.fidelities.dft.files={tmp_path / name}.h5",
            f"data.fidelities.dft.sae={tmp_path / name}.yaml",
            *("device=cpu", "run_name=r", "report=false", "trainer.epochs=1"),
            f"checkpoint.dirname={tmp_path / name}",
            "data.samplers.train.kwargs.batches_per_epoch=2",
        ]
        job = Job(load_config(None, settings), load_model_config(fixtures_dir / "ref_single_model.yaml"))
        run_training(job, tmp_path / f"{name}.pt", None)
    plain, terms = (load_checkpoint(tmp_path / f"{name}.pt") for name in ("plain", "terms"))
    assert all(torch.equal(plain["model"][key], terms["model"][key]) for key in plain["model"])
    assert plain["sae"] == {0: sae}
    assert terms["sae"] == {0: {**sae, "charge": 4.75, "spin": -2.5}}


# --- tools --------------------------------------------------------------------------------------


def test_info_tells_the_terms(checkpoints, compiled):
    text = " ".join(run(info, checkpoints[1]).output.split())
    assert "reference terms charge 4.7523 eV per elementary charge, spin -2.1099 eV per unpaired electron" in text
    text = " ".join(run(info, compiled[1]).output.split())
    assert "reference terms charge 4.7523 eV per elementary charge, spin -2.1099 eV per unpaired electron" in text
    assert json.loads(run(info, checkpoints[1], "--json").output)["metadata"]["sae"]["0"]["charge"] == CHARGE
    assert "reference terms" not in run(info, checkpoints[0]).output


def test_edited_fidelities_keep_their_terms(checkpoints, tmp_path):
    out = tmp_path / "out.pt"
    result = run(edit_fidelities, checkpoints[1], out, "--add", "ccsd=dft", "--drop", "gfn1")
    assert result.exit_code == 0, result.output
    assert "yes + charge + spin" in result.output
    tables = load_checkpoint(out)["sae"]
    assert [ReferenceEnergies.from_table(tables[f]) for f in range(3)] == [TERMS, PLAIN, TERMS]
    result = run(edit_fidelities, checkpoints[1], tmp_path / "merged.pt", "--merge", "x=dft,gfn2")
    assert result.exit_code == 2
    assert "the charge terms of the fidelities merged into x differ" in result.output
    save_sae(tmp_path / "sae.yaml", TERMS)
    result = run(
        edit_fidelities, checkpoints[1], tmp_path / "m.pt", "--merge", "x=dft,gfn2", "--sae", f"x={tmp_path}/sae.yaml"
    )
    assert result.exit_code == 0, result.output
    assert ReferenceEnergies.from_table(load_checkpoint(tmp_path / "m.pt")["sae"][0]) == TERMS
    assert load_sae(tmp_path / "sae.yaml") == TERMS
