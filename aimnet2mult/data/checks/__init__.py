"""Faults of datasets found before training: what is wrong, where, what it probably means and what to do.

`check` reads whole datasets, piece by piece, in bounded memory, and compares fidelities and the validation data with
one another; `quick_checks` looks at a sample of one dataset, and training always runs it; `leakage` looks for
validation geometries among the training data. `aimnet2mult.tools.check_data` is the command line.

Where to find what, in the order in which it happens:

`rows`
    molecules read from a dataset, and `ROW_CHECKS`, a table of functions that judge each molecule by itself;
`sample`, `dataset`
    what is kept of a dataset while it is read (`Examined`);
`units`, `residuals`, `geometry`, `pairs`
    what numbers tell about units, energies about outliers, distances about equal and close geometries;
`fidelity`
    `FIDELITY_CHECKS`, a table of functions of an `Examined` dataset, and what its elements are beside the others';
`overlap`
    geometries that several datasets have: leaks, repeats, shared ones;
`findings`, `run`
    what is reported, and the entry points.

A new check is one more entry of one of the two tables.
"""

from aimnet2mult.data.checks.findings import SEVERITIES, Finding, Place, Report, Summary, Thresholds, unreadable
from aimnet2mult.data.checks.run import check, leakage, quick_checks

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
