"""Write ``aimnet2mult/d3bj_data.pt``: the reference data of the DFT-D3 dispersion model, elements H to Lr.

The numbers are those of the open package tad-dftd3 (Apache License 2.0, Copyright the tad-dftd3 authors), which
carries the tables of S. Grimme, J. Antony, S. Ehrlich, H. Krieg, J. Chem. Phys. 132, 154104 (2010),
doi:10.1063/1.3382344, and for the elements from Fr on those of L. Wittmann, I. Gordiy, M. Friede, B. Helmich-Paris,
S. Grimme, A. Hansen, M. Bursch, Phys. Chem. Chem. Phys. 26, 21379 (2024), doi:10.1039/D4CP01514B. They are stored
here in another form: each is a decimal number of few digits, so integers hold it exactly and compactly.

Run it in an environment of its own (tad-dftd3 is not needed at run time)::

    pip install torch tad-dftd3
    python scripts/make_d3bj_data.py aimnet2mult/d3bj_data.pt

A *reference* is an element in a certain coordination; the K references of all elements stand in one row, sorted by
element. Reference 0 is the padding atom (Z = 0), which has no dispersion. The file is a dictionary of tensors:

==========  ==========  =========================================================================================
key         shape       meaning
==========  ==========  =========================================================================================
``c6``      (K(K+1)/2)  C6 of each pair of references, lower triangle by rows, int32, 1e-4 Eh·a0⁶
``cn``      (K,)        coordination number of each reference, int32, 1e-4
``element`` (K,)        atomic number of each reference, int32
``radius``  (Z + 1,)    covalent radius of each element, int32, pm
``r4r2``    (Z + 1,)    <r⁴>/<r²> of each element, int32, 1e-4 a0²
``vdw``     (Z(Z+1)/2)  van der Waals radius of each pair of elements, lower triangle by rows from Z = 1 on, int32,
                        1e-4 Å
==========  ==========  =========================================================================================
"""

import argparse
from pathlib import Path

import torch
from tad_dftd3.data import R4R2
from tad_dftd3.reference import Reference
from tad_mctc.data import COV_D3, VDW_PAIRWISE
from tad_mctc.units import length
from torch import Tensor

MAX_ELEMENT = 103
"""Heaviest element with references (Lr)."""

RADIUS_SCALE = 4.0 / 3.0
"""tad-mctc gives covalent radii multiplied by this factor, as the counting function wants them."""


def exact_integers(x: Tensor, scale: float, tolerance: float = 1e-9) -> Tensor:
    """Return ``x * scale`` as int32; an error if ``x`` is not a multiple of 1/``scale`` to round-off."""
    integers = (x.double() * scale).round()
    error = (integers / scale - x).abs().max().item()
    if error > tolerance:
        raise ValueError(f"the table does not consist of multiples of {1 / scale:g}: largest difference {error:.1e}")
    return integers.to(torch.int32)


def d3bj_data() -> dict[str, Tensor]:
    """Collect the tables of tad-dftd3 in the form that the module docstring describes."""
    reference = Reference(dtype=torch.double)
    valid = reference.cn >= 0
    valid[0] = False
    element, place = valid.nonzero().unbind(1)
    c6 = reference.c6[element.unsqueeze(1), element, place.unsqueeze(1), place]
    if not bool((c6 > 0).all()) or not torch.equal(c6, c6.T):
        raise ValueError("the C6 references are not positive and symmetric")

    padding = torch.zeros(1, dtype=torch.double)
    c6 = torch.nn.functional.pad(c6, (1, 0, 1, 0))
    rows, columns = torch.tril_indices(*c6.shape).unbind(0)
    radius = COV_D3(dtype=torch.double)[: MAX_ELEMENT + 1] / (RADIUS_SCALE * length.AA2AU)
    # tad-dftd3 gives sqrt(½ r4r2 √Z).
    charge = torch.arange(1, MAX_ELEMENT + 1, dtype=torch.double)
    r4r2 = 2.0 * R4R2(dtype=torch.double)[1 : MAX_ELEMENT + 1].square() / charge.sqrt()
    elements = torch.tril_indices(MAX_ELEMENT, MAX_ELEMENT) + 1
    # tad-mctc has these radii in single precision.
    vdw = VDW_PAIRWISE(dtype=torch.double)[elements[0], elements[1]] / length.AA2AU
    return {
        "c6": exact_integers(c6[rows, columns], 1e4),
        "cn": exact_integers(torch.cat([padding, reference.cn[element, place]]), 1e4),
        "element": torch.cat([element.new_zeros(1), element]).to(torch.int32),
        "radius": exact_integers(radius, 1e2),
        "r4r2": exact_integers(torch.cat([padding, r4r2]), 1e4),
        "vdw": exact_integers(vdw, 1e4, tolerance=1e-6),
    }


def main() -> None:
    """Write the file that the first argument names."""
    parser = argparse.ArgumentParser(description="Generate the D3(BJ) reference data from tad-dftd3.")
    parser.add_argument("output", type=Path, help="file to write, aimnet2mult/d3bj_data.pt")
    output = parser.parse_args().output
    data = d3bj_data()
    torch.save(data, output)
    print(f"{output}: {len(data['element']) - 1} references of {MAX_ELEMENT} elements, {output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
