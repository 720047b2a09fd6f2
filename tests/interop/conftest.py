"""The published ``aimnet`` package in processes of its own, and what its numbers are compared with.

The tests of this group run where the variables AIMNET_PYTHON and AIMNET_LEGACY_PYTHON name Pythons that have the
package (``environments.sh`` makes them); elsewhere they are skipped.
"""

import itertools
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from aimnet2mult.models.base import load_checkpoint
from aimnet2mult.models.interchange import PUBLISHED_ROWS

TOLERANCES = {"energy": 1e-5, "forces": 1e-4, "charges": 1e-5, "spin_charges": 1e-5, "stress": 1e-7}
"""Largest differences between the two packages: eV, eV/Å, e, eV/Å³."""


class AimnetProcess:
    """``aimnet_process.py``, running with another Python.

    Parameters
    ----------
    python : str
        The Python.
    folder : Path
        For its files.
    """

    def __init__(self, python, folder):
        self.folder = folder
        self.numbers = itertools.count()
        self.log = (folder / "log.txt").open("w")
        script = Path(__file__).with_name("aimnet_process.py")
        answers, write = os.pipe()
        self.answers = os.fdopen(answers)
        self.process = subprocess.Popen(
            [python, str(script), str(write)],
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            pass_fds=[write],
            text=True,
        )
        os.close(write)

    def ask(self, **task):
        """Have a task done; what the package raises is raised as RuntimeError."""
        print(json.dumps(task), file=self.process.stdin, flush=True)
        answer = self.answers.readline()
        if not answer:
            raise RuntimeError(f"the process ended: {(self.folder / 'log.txt').read_text()[-2000:]}")
        if "error" in json.loads(answer):
            raise RuntimeError(json.loads(answer)["error"])

    def call(self, function, *arguments):
        """Run a command of the package, ``module:name``."""
        self.ask(task="call", function=function, arguments=[str(a) for a in arguments])

    def evaluate(self, model, systems, coulomb=None, dftd3=None, stress=False, hessian=False, also=(), attributes=None):
        """Results of its calculator for a list of systems."""
        number = next(self.numbers)
        given, found = self.folder / f"systems{number}.npz", self.folder / f"results{number}.npz"
        np.savez(given, **{f"{i}.{key}": value for i, system in enumerate(systems) for key, value in system.items()})
        self.ask(
            task="evaluate",
            model=str(model),
            systems=str(given),
            results=str(found),
            coulomb=coulomb,
            dftd3=dftd3,
            stress=stress,
            hessian=hessian,
            also=list(also),
            attributes=attributes or {},
        )
        results = [{} for _ in systems]
        with np.load(found) as content:
            for key in content:
                i, name = key.split(".")
                results[int(i)][name] = content[key]
        return results

    def close(self):
        """End it; waiting for all that it has loaded to be taken down would take seconds."""
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.answers.close()
        self.log.close()


def _process(variable, tmp_path_factory):
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no Python with the aimnet package (tests/interop/environments.sh makes one)")
    process = AimnetProcess(python, tmp_path_factory.mktemp(variable.lower()))
    yield process
    process.close()


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """The present version of the package."""
    yield from _process("AIMNET_PYTHON", tmp_path_factory)


@pytest.fixture(scope="session")
def legacy_program(tmp_path_factory):
    """The version that wrote TorchScript files."""
    yield from _process("AIMNET_LEGACY_PYTHON", tmp_path_factory)


@pytest.fixture(scope="session")
def two_channels(fixtures_dir):
    """Configuration and weights of the fixture that resolves spin, as the package takes them.

    Its names, its number of elements, and the range of the Coulomb energy, which it asks for.
    """
    text = (fixtures_dir / "ref_single_model.yaml").read_text()
    config = yaml.safe_load(text.replace("aimnet2mult.models.aimnet2.", "aimnet.models.").replace("2mult.", "."))
    config["kwargs"]["outputs"]["lrcoulomb"]["kwargs"]["rc"] = 4.6
    weights = load_checkpoint(fixtures_dir / "ref_single.pt")["model"]
    for key in ("afv.weight", "outputs.atomic_shift.shifts.weight"):
        weights[key] = weights[key][:PUBLISHED_ROWS]
    return config, weights


@pytest.fixture(scope="session")
def systems(reference):
    """The 13 reference molecules, each without padding, positions in float32."""
    values = reference("ref_single")
    return [
        {
            "coord": values["coord"][i, :n].astype(np.float32),
            "numbers": values["numbers"][i, :n],
            "charge": np.float32(values["charge"][i]),
            "mult": np.float32(values["mult"][i]),
        }
        for i, n in enumerate(values["natoms"])
    ]


@pytest.fixture(scope="session")
def crystals(reference):
    """Two water molecules in a triclinic cell; the same cell twice, with the atoms of one half displaced."""
    values = reference("peer_v2_lr")
    small = {key: values[f"water2_triclinic_{key}"] for key in ("coord", "numbers", "cell")}
    shifted = small["coord"] + small["cell"][0] + np.random.default_rng(1).normal(0.0, 0.05, small["coord"].shape)
    double = {
        "coord": np.concatenate([small["coord"], shifted]).astype(np.float32),
        "numbers": np.concatenate([small["numbers"]] * 2),
        "cell": small["cell"] * np.array([[2.0], [1.0], [1.0]], dtype=np.float32),
    }
    return [{**crystal, "charge": np.float32(0.0), "mult": np.float32(1.0)} for crystal in (small, double)]


@pytest.fixture(scope="session")
def cluster(crystals):
    """Molecule of 150 atoms: water molecules on a grid. More than the dense layout takes in either package."""
    rng = np.random.default_rng(2)
    water = crystals[0]["coord"][:3] - crystals[0]["coord"][0]
    assert list(crystals[0]["numbers"][:3]) == [8, 1, 1]
    coord = []
    for corner in itertools.islice(itertools.product(range(4), repeat=3), 50):
        turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        coord.append(water @ turn + 3.0 * np.array(corner))
    return {
        "coord": np.concatenate(coord).astype(np.float32),
        "numbers": np.tile(crystals[0]["numbers"][:3], len(coord)),
        "charge": np.float32(0.0),
        "mult": np.float32(1.0),
    }


def our_results(potential, systems, stress=False):
    """Results of a potential for a list of systems, one by one."""
    potential.module.compute_stress = stress
    results = []
    for system in systems:
        data = {key: torch.as_tensor(np.asarray(value)).unsqueeze(0) for key, value in system.items()}
        results.append({key: value[0].numpy() for key, value in potential(data).items()})
    potential.module.compute_stress = False
    return results


def check_agreement(found, expected, keys=("energy", "forces", "charges"), tolerances=TOLERANCES):
    """Compare two lists of results, system by system; NaN is no agreement."""
    assert len(found) == len(expected)
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        for key in keys:
            a, b = np.asarray(one[key], dtype=np.float64), np.asarray(other[key], dtype=np.float64)
            difference = np.abs(a.reshape(b.shape) - b).max()
            assert difference <= tolerances[key], f"system {i}: {key} differs by {difference:.2e}"


@pytest.fixture(scope="session")
def evaluated():
    """`our_results`."""
    return our_results


@pytest.fixture(scope="session")
def agree():
    """`check_agreement`."""
    return check_agreement
