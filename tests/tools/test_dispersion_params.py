"""Names of functionals and their D3(BJ) and D4 parameters, with and without the packages dftd3 and dftd4."""

import importlib.util
import re

import numpy as np
import pytest
from click.testing import CliRunner

from aimnet2mult import dispersion_params
from aimnet2mult.dispersion_params import (
    ALIASES,
    ALIASES_D4,
    BUILTIN,
    BUILTIN_D4,
    D3Parameters,
    D4Parameters,
    d3bj_parameters,
    d4_parameters,
    known_functionals,
    normalized,
)
from aimnet2mult.tools.dispersion_params import main

HAS_DFTD3 = importlib.util.find_spec("dftd3") is not None
HAS_DFTD4 = importlib.util.find_spec("dftd4") is not None
needs_dftd3 = pytest.mark.skipif(not HAS_DFTD3, reason="needs the package dftd3")
needs_dftd4 = pytest.mark.skipif(not HAS_DFTD4, reason="needs the package dftd4")


@pytest.fixture
def without_dftd3(monkeypatch):
    monkeypatch.setattr(dispersion_params.importlib.util, "find_spec", lambda name: None)
    dispersion_params._database.cache_clear()
    yield
    dispersion_params._database.cache_clear()


def two_body_energy(**damping) -> float:
    """Energy of a small cluster in s-dftd3, sensitive to every parameter."""
    from dftd3.interface import DispersionModel, RationalDampingParam

    numbers = np.array([6, 6, 1, 1, 8])
    coord = np.array([[0, 0, 0], [2.6, 0, 0], [4.0, 1.0, 3.0], [-2.0, -2.0, 1.0], [0, 5.0, 5.0]])
    return float(DispersionModel(numbers, coord).get_dispersion(RationalDampingParam(**damping), grad=False)["energy"])


@needs_dftd3
@pytest.mark.parametrize("functional", sorted(set(BUILTIN) - {"m062x"}))
def test_builtin_values_are_those_of_dftd3(functional):
    # Once through the database file, once through the compiled library, which takes the name.
    assert d3bj_parameters(functional) == BUILTIN[functional]
    three_body = two_body_energy(method=functional) - two_body_energy(method="pbe")
    p, pbe = BUILTIN[functional], BUILTIN["pbe"]
    ours = two_body_energy(s6=p.s6, s8=p.s8, a1=p.a1, a2=p.a2) - two_body_energy(s6=1, s8=pbe.s8, a1=pbe.a1, a2=pbe.a2)
    assert three_body == pytest.approx(ours, abs=1e-12)


@needs_dftd3
@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_are_those_of_dftd3(alias):
    p = d3bj_parameters(alias)
    assert p == d3bj_parameters(ALIASES[alias])
    assert two_body_energy(method=alias) == two_body_energy(method=ALIASES[alias])


@needs_dftd3
def test_every_rational_functional_of_the_database_is_known():
    database = dispersion_params.database_file().read_text()
    names = re.findall(r"\[parameter\.\"?([^\]\"]+)\"?\]\s*\nd3\.bj = ", database)
    assert len(names) > 100
    assert {normalized(name) for name in names} <= set(known_functionals())
    assert d3bj_parameters("revDSD-PBEP86").s6 == 0.4377
    assert d3bj_parameters("LC-wHPBE") == d3bj_parameters("lc_whpbe")


@needs_dftd3
def test_functional_with_zero_damping_only_is_refused():
    with pytest.raises(ValueError, match="'M06-L' has zero damping only, not D3"):
        d3bj_parameters("M06-L")


@pytest.mark.parametrize("name", ["wb97m", "wB97M", "WB97-M", "w_b97_m", "ωB97M", " wb97m "])
def test_spelling(name):
    assert d3bj_parameters(name) == D3Parameters(s6=1.0, s8=0.3908, a1=0.566, a2=3.128)


def test_names_match_exactly():
    assert d3bj_parameters("B97-3c").a2 == 4.1
    assert d3bj_parameters("wb97x").s8 == 0.2641
    for name, nearest_one in [("wB97M-V", "wb97m"), ("wb97x-d3", "wb97x"), ("pbee", "pbe"), ("b3lypp", "b3lyp")]:
        with pytest.raises(ValueError, match=f"{re.escape(name)}.*did you mean .*{nearest_one}"):
            d3bj_parameters(name)
    with pytest.raises(ValueError, match="'M06'"):
        d3bj_parameters("M06")


@needs_dftd3
def test_revpbe_is_not_pbe():
    assert d3bj_parameters("revPBE") == D3Parameters(s6=1.0, s8=2.355, a1=0.5238, a2=3.5016)


def test_m062x_is_used_with_a_warning(caplog):
    assert d3bj_parameters("M06-2X") == BUILTIN["m062x"]
    assert "M06-2X has no published D3(BJ) parameters" in caplog.text


@pytest.mark.usefixtures("without_dftd3")
def test_without_dftd3_the_builtin_table_is_known():
    assert known_functionals() == sorted(BUILTIN)
    assert d3bj_parameters("BP86").s8 == 3.2822
    with pytest.raises(ValueError, match=r"'revPBE' is not known: did you mean pbe.*aimnet2mult\[dispersion\]"):
        d3bj_parameters("revPBE")


def test_damaged_installation_of_dftd3_is_named(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("dftd3", tmp_path / "__init__.py")
    monkeypatch.setattr(dispersion_params.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(dispersion_params.sys, "prefix", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"parameters\.toml: no such file; the installation of dftd3"):
        dispersion_params.database_file()


def test_conda_layout_of_the_database(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("dftd3", tmp_path / "lib" / "dftd3" / "__init__.py")
    shared = tmp_path / "share" / "s-dftd3" / "parameters.toml"
    shared.parent.mkdir(parents=True)
    shared.write_text(
        "[default.parameter]\nd3.bj = {s6=1.0, s9=1.0}\n"
        "[parameter.new-one]\nd3.bj = {a1=0.5, s8=2, a2=3.0}\n[parameter.other]\nd3.zero = {rs6=1.0}\n"
    )
    monkeypatch.setattr(dispersion_params.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(dispersion_params.sys, "prefix", str(tmp_path))
    assert dispersion_params.database_file() == shared
    assert dispersion_params.read_database(shared) == {"newone": D3Parameters(1.0, 2.0, 0.5, 3.0), "other": None}


def test_command_prints_parameters():
    result = CliRunner().invoke(main, ["PBE0"])
    assert result.exit_code == 0
    assert result.output.split() == ["s6", "1", "s8", "1.2177", "a1", "0.4145", "a2", "4.8593"]


def test_command_lists_names():
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 0
    assert set(BUILTIN) <= set(result.stdout.split("\n"))


def test_command_refuses_unknown_name_with_status_2():
    result = CliRunner().invoke(main, ["b3lypp"])
    assert result.exit_code == 2
    assert "did you mean b3lyp" in result.output
    assert "Traceback" not in result.output


# --------------------------------------------------------------------------------------------------
# D4
# --------------------------------------------------------------------------------------------------


def d4_energy(charge_scaling: dict[str, float], **damping) -> float:
    """Energy of a small charged cluster in dftd4, sensitive to every parameter."""
    from dftd4.interface import DampingParam, DispersionModel

    numbers = np.array([6, 6, 1, 1, 8])
    coord = np.array([[0, 0, 0], [2.6, 0, 0], [4.0, 1.0, 3.0], [-2.0, -2.0, 1.0], [0, 5.0, 5.0]])
    model = DispersionModel(numbers, coord, charge=1.0, **charge_scaling)
    return float(model.get_dispersion(DampingParam(**damping), grad=False)["energy"])


@needs_dftd4
@pytest.mark.parametrize("functional", BUILTIN_D4)
def test_builtin_d4_values_are_those_of_dftd4(functional):
    p = d4_parameters(functional)
    assert p == BUILTIN_D4[functional]
    name = {"r2scan3c": "r2scan-3c", "wb97x3c": "wb97x-3c"}.get(functional, functional)
    # The library gives r2scan-3c an s9 of 1, its parameter file that of the publication.
    s9 = 1.0 if functional == "r2scan3c" else p.s9
    assert d4_energy({}, s6=p.s6, s8=p.s8, s9=s9, a1=p.a1, a2=p.a2) == pytest.approx(
        d4_energy({}, method=name), abs=1e-12
    )


@needs_dftd4
@pytest.mark.parametrize("alias", ALIASES_D4)
def test_d4_aliases_are_those_of_dftd4(alias):
    assert d4_parameters(alias) == d4_parameters(ALIASES_D4[alias])
    assert d4_energy({}, method=alias) == d4_energy({}, method=ALIASES_D4[alias])


@needs_dftd4
def test_every_functional_of_the_d4_database_is_known():
    database = dispersion_params.database_file("dftd4").read_text()
    names = re.findall(r"\[parameter\.([^\]]+)\]", database)
    assert len(names) > 90
    assert {normalized(name) for name in names} <= set(known_functionals("d4"))
    assert d4_parameters("revDSD-PBEP86").s6 == 0.5132


def test_d4_names_match_exactly_and_are_not_those_of_d3():
    assert d4_parameters("ωB97M") == D4Parameters(s6=1.0, s8=0.7761, s9=1.0, a1=0.7514, a2=2.7099)
    assert d4_parameters("r²SCAN".replace("²", "2")) == d4_parameters("r2-scan")
    assert d4_parameters("pbe") != d4_parameters("revPBE")
    assert d4_parameters("pbe").s8 != d3bj_parameters("pbe").s8
    for name, nearest_one in [("wB97M-V", "wb97m"), ("pbee", "pbe"), ("M06-2X", "m06")]:
        with pytest.raises(ValueError, match=f"{name}.*is not known to D4: did you mean .*{nearest_one}"):
            d4_parameters(name)


def test_r2scan3c_has_its_own_charge_scaling():
    p = d4_parameters("r2SCAN-3c")
    assert (p.s9, p.ga, p.gc) == (2.0, 2.0, 1.0)
    assert {(p.ga, p.gc) for name, p in BUILTIN_D4.items() if name != "r2scan3c"} == {(3.0, 2.0)}


def test_without_dftd4_the_builtin_table_is_known(monkeypatch):
    monkeypatch.setattr(dispersion_params, "_d4_database", dict)
    assert known_functionals("d4") == sorted(BUILTIN_D4)
    with pytest.raises(ValueError, match=r"'glyp' is not known to D4.*installing dftd4.*aimnet2mult\[dispersion\]"):
        d4_parameters("glyp")


def test_d4_database_without_the_variant(tmp_path):
    path = tmp_path / "parameters.toml"
    path.write_text(
        "[default.parameter]\nd4.bj-eeq-atm = {s6=1.0, s9=1.0, alp=16.0}\n"
        "[parameter.new-one]\nd4.bj-eeq-atm = {a1=0.5, s8=2, a2=3.0}\n"
        "[parameter.other]\nd4.bj-eeq-two = {a1=0.5, s8=2, a2=3.0}\n"
    )
    database = dispersion_params.read_d4_database(path)
    assert database == {"newone": D4Parameters(1.0, 2.0, 1.0, 0.5, 3.0), "other": None}


def test_command_prints_d4_parameters_to_the_last_digit():
    result = CliRunner().invoke(main, ["--method", "d4", "PBE0"])
    assert result.exit_code == 0
    printed = dict(zip(result.output.split()[::2], map(float, result.output.split()[1::2]), strict=True))
    assert D4Parameters(**printed) == d4_parameters("pbe0")
    listed = CliRunner().invoke(main, ["--method", "d4"])
    assert set(BUILTIN_D4) <= set(listed.stdout.split("\n"))
    assert CliRunner().invoke(main, ["--method", "d5", "pbe"]).exit_code == 2
