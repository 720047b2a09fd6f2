"""Write ``aimnet2mult/dftd4_data.pt``: the reference data of the DFT-D4 dispersion model, elements H to Lr.

The numbers are those of the open packages tad-dftd4, tad-mctc and tad-multicharge (Apache License 2.0, Copyright the
Grimme Group): the tables of E. Caldeweyher, S. Ehlert, A. Hansen, H. Neugebauer, S. Spicher, C. Bannwarth, S. Grimme,
J. Chem. Phys. 150, 154122 (2019), doi:10.1063/1.5090222, and for the elements from Fr on those of L. Wittmann,
I. Gordiy, M. Friede, B. Helmich-Paris, S. Grimme, A. Hansen, M. Bursch, Phys. Chem. Chem. Phys. 26, 21379 (2024),
doi:10.1039/D4CP01514B. Only the values that the model with EEQ charges needs are kept, references of all elements in
one row.

Run it in an environment of its own (none of the packages is needed at run time)::

    pip install torch "tad-dftd4>=0.8"
    python scripts/make_dftd4_data.py aimnet2mult/dftd4_data.pt

A *reference* is an element in a reference molecule; the K references of all elements stand in one row, sorted by
element. What its atom contributes to the polarizability of the molecule is the molecule's minus that of its
*partners*, atoms of another element. Tables over elements have Z + 1 rows, row 0 is empty; covalent radii and <r⁴>/<r²>
are those of D3 and not repeated here. The file is a dictionary of tensors:

=====================  =======  ===============================================================================
key                    shape    meaning
=====================  =======  ===============================================================================
``element``            (K,)     atomic number of each reference, int32
``cn``                 (K,)     its D4 coordination number, float64
``n_gaussians``        (K,)     number of Gaussians of its weight, 1 or 3, int32
``charge``             (K,)     its EEQ charge, e, float64
``alpha``              (K, 23)  polarizability of the molecule at imaginary frequencies, a0³, float64
``share``              (K,)     part of it, without the partners, that belongs to one atom, float64
``partner``            (K,)     element of the partners, 0 for none, int32
``n_partners``         (K,)     how many of ``partner_alpha`` are subtracted, float64
``partner_charge``     (K,)     EEQ charge of the partners, e, float64
``partner_alpha``      (S, 23)  polarizability of a partner at zero charge, by element, a0³, float64
``effective_charge``   (Z + 1)  nuclear charge that the charge scaling sees, int32
``hardness``           (Z + 1)  chemical hardness of the charge scaling, Hartree/e², float64
``electronegativity``  (Z + 1)  Pauling electronegativity, float64
``eeq``                (Z + 1,  EEQ: electronegativity χ, its dependence κ on the coordination number, hardness η
                       4)       (Hartree), radius (Bohr), float64
=====================  =======  ===============================================================================
"""

import argparse
from pathlib import Path

import torch

# The EEQ tables of tad-multicharge are made in the default type, and single precision cannot hold their digits.
torch.set_default_dtype(torch.double)

from tad_dftd4.data import GAM, ZEFF  # noqa: E402
from tad_dftd4.reference import d4 as reference  # noqa: E402
from tad_dftd4.reference.d4 import charge_eeq  # noqa: E402
from tad_mctc.data.en import PAULING  # noqa: E402
from tad_multicharge.param import eeq2019  # noqa: E402

MAX_ELEMENT = 103
"""Heaviest element with references (Lr)."""


def dftd4_data() -> dict[str, torch.Tensor]:
    """Collect the tables in the form that the module docstring describes."""
    element, place = (reference.refc > 0).nonzero().unbind(1)
    eeq = torch.stack([eeq2019.chi, eeq2019.kcn, eeq2019.eta, eeq2019.rad], dim=1)
    if eeq.dtype != torch.double:
        raise ValueError("tad_multicharge was imported before this script and has its tables in single precision")

    def of_reference(table: torch.Tensor) -> torch.Tensor:
        return table[element, place].clone()

    def of_element(table: torch.Tensor) -> torch.Tensor:
        return table[: MAX_ELEMENT + 1].clone()

    return {
        "element": element.to(torch.int32),
        "cn": of_reference(reference.refcovcn),
        "n_gaussians": of_reference(reference.refc).to(torch.int32),
        "charge": of_reference(charge_eeq.clsq),
        "alpha": of_reference(reference.refalpha),
        "share": of_reference(reference.refascale),
        "partner": of_reference(reference.refsys).to(torch.int32),
        "n_partners": of_reference(reference.refscount),
        "partner_charge": of_reference(charge_eeq.clsh),
        "partner_alpha": reference.secscale * reference.secalpha,
        "effective_charge": of_element(ZEFF()).to(torch.int32),
        "hardness": of_element(GAM(dtype=torch.double)),
        "electronegativity": of_element(PAULING(dtype=torch.double)),
        "eeq": of_element(eeq),
    }


def main() -> None:
    """Write the file that the first argument names."""
    parser = argparse.ArgumentParser(description="Generate the D4 reference data from tad-dftd4.")
    parser.add_argument("output", type=Path, help="file to write, aimnet2mult/dftd4_data.pt")
    output = parser.parse_args().output
    data = dftd4_data()
    torch.save(data, output)
    print(f"{output}: {len(data['element'])} references of {MAX_ELEMENT} elements, {output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
