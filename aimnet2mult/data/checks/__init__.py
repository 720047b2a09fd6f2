"""Faults of datasets found before training: what is wrong, where, what it probably means and what to do.

`check` reads whole datasets, piece by piece, in bounded memory, and compares fidelities and the validation data with
one another; `quick_checks` looks at a sample of one dataset, and training always runs it; `leakage` looks for
validation geometries among the training data. `aimnet2mult.tools.check_data` is the command line.

The checks stand in four tables, and a new one is one more entry:

`aimnet2mult.data.checks.rows.ROW_CHECKS`
    functions of a piece of data that mark the molecules at fault;
`aimnet2mult.data.checks.sample.SAMPLE_CHECKS`
    functions of a sample of a dataset: units of energies and coordinates, the size of forces;
`aimnet2mult.data.checks.dataset.FIDELITY_CHECKS`
    functions of what is known about a dataset after all of it has been read;
`aimnet2mult.data.checks.run.JOINT_CHECKS`
    functions of all datasets together.
"""

from aimnet2mult.data.checks.findings import SEVERITIES, Finding, Place, Report, Summary, Thresholds
from aimnet2mult.data.checks.run import check, leakage, quick_checks, unreadable

__all__ = [
    "SEVERITIES",
    "Finding",
    "Place",
    "Report",
    "Summary",
    "Thresholds",
    "check",
    "leakage",
    "quick_checks",
    "unreadable",
]
