"""Does what tests ask of the published ``aimnet`` package; run by conftest.py with a Python that has the package.

A task is a line of JSON on standard input; its answer, ``{}`` or ``{"error": ...}``, a line of JSON on the file
descriptor whose number is the argument, since the package prints what it likes. Arrays go through files. It serves all
versions of the package, and imports nothing of ours.
"""

import importlib
import json
import os
import sys
import warnings

import numpy as np
import torch
from aimnet.calculators.calculator import AIMNet2Calculator


def call(task):
    """Run a command of the package: ``function`` (module:name), ``arguments``."""
    module, name = task["function"].split(":")
    getattr(importlib.import_module(module), name).main(task["arguments"], standalone_mode=False)


def evaluate(task):
    """Evaluate systems one by one with the calculator of the package.

    ``model``: file. ``systems``, ``results``: names of .npz files with arrays ``<number>.<key>``. ``coulomb``,
    ``dftd3``: arguments of set_lrcoulomb_method and set_dftd3_cutoff, or null. ``stress``, ``hessian``: whether to
    compute them. ``also``: results beside the usual ones. ``attributes``: of the calculator, to be set first.
    """
    calculator = AIMNet2Calculator(task["model"])
    for name, value in task["attributes"].items():
        setattr(calculator, name, value)
    calculator.keys_out = [*calculator.keys_out, *task["also"]]
    if task["coulomb"] is not None:
        calculator.set_lrcoulomb_method(**task["coulomb"])
    if task["dftd3"] is not None:
        calculator.set_dftd3_cutoff(**task["dftd3"])
    systems, results = {}, {}
    with np.load(task["systems"]) as content:
        for key in content:
            number, name = key.split(".")
            systems.setdefault(number, {})[name] = content[key]
    for number, system in systems.items():
        found = calculator(system, forces=True, stress=task["stress"], hessian=task["hessian"])
        for key, value in found.items():
            results[f"{number}.{key}"] = value.detach().numpy()
    np.savez(task["results"], **results)


def main():
    """Answer until standard input ends."""
    answers = os.fdopen(int(sys.argv[1]), "w")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for line in sys.stdin:
        task = json.loads(line)
        answer = {}
        try:
            {"call": call, "evaluate": evaluate}[task["task"]](task)
        # Whatever goes wrong is for the test to judge.
        except (Exception, SystemExit) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
