"""Errors of plain GFN2-xTB against the DFT labels of the test file: forces as they are, on the same geometries.

Needs tblite (pip install tblite). Run it in this folder: python plain_gfn2.py
"""

import h5py
import numpy as np
from tblite.interface import Calculator

HARTREE, BOHR = 27.211386, 0.52917721  # eV, Å: those of the data

errors = []
with h5py.File("../data/fid0_dft_test.h5") as file:
    for group in file.values():
        for numbers, coord, charge, mult, forces in zip(
            *(group[key][()] for key in ("numbers", "coord", "charge", "mult", "forces")), strict=True
        ):
            gfn2 = Calculator("GFN2-xTB", numbers, coord.astype(float) / BOHR, float(charge), int(mult) - 1)
            gfn2.set("verbosity", 0)
            errors.append(-gfn2.singlepoint().get("gradient") * HARTREE / BOHR - forces)
error = np.concatenate(errors)
print(f"{len(errors)} structures, forces: MAE {np.abs(error).mean():.3f}, RMSE {np.sqrt((error**2).mean()):.3f} eV/Å")
