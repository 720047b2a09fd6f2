"""Use compiled models: by torch.jit.load alone, and through ASE. ``python inference.py FOLDER_OF_COMPILED_MODELS``."""

import sys
from pathlib import Path

import torch

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "output/compiled")

# 1. A production machine: nothing but PyTorch. Plain atomic numbers in, total energy in eV, forces and charges out.
model = torch.jit.load(str(folder / "model_fid0.jpt"))
water = {
    "coord": torch.tensor([[[0.0, 0.0, 0.119], [0.0, 0.763, -0.477], [0.0, -0.763, -0.477]]]),
    "numbers": torch.tensor([[8, 1, 1]]),
}
with torch.no_grad():
    out = model(water)
print(f"H2O, B3LYP-D3(BJ): energy {out['energy'].item():.4f} eV")
print(f"  largest force {out['forces'].abs().max():.3f} eV/Å")
print(f"  charges {[round(q, 3) for q in out['charges'][0].tolist()]} e")

# 2. A script with ASE: relax formic acid with one level of theory, then ask all of them.
from ase.build import molecule  # noqa: E402
from ase.optimize import BFGS  # noqa: E402

from aimnet2mult.calculators import MultiFidelityCalculator  # noqa: E402

calc = MultiFidelityCalculator(folder)
atoms = molecule("HCOOH")
atoms.calc = calc
start = atoms.get_potential_energy()
BFGS(atoms, logfile=None).run(fmax=0.05, steps=100)
print(f"HCOOH relaxed with {calc.names[calc.fidelity]}: {atoms.get_potential_energy() - start:+.3f} eV")
for fidelity, energy in calc.energies(atoms).items():
    print(f"  {calc.names[fidelity]}: {energy:.3f} eV")
