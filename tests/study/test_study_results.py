"""Tables and curves of a study's results."""

import math

from aimnet2mult.study.results import Row, curves, equivalent_table


def row(protocol, fraction, structures, energy, forces=1.0, replicate=0):
    """A result; only what the tables read differs."""
    errors = {"energy_mae": energy, "energy_rmse": energy, "forces_mae": forces, "forces_rmse": forces}
    where = {"replicate": replicate, "subset": replicate, "seed": replicate}
    cost = {"learning_rate": 1e-3, "steps": 10, "seconds": 1.0, "cpu_seconds": 1.0, "validation_score": 1.0}
    return Row(
        protocol=protocol, fraction=fraction, structures=structures, molecules=structures, **where, **cost, **errors
    )


def test_fractions_of_as_many_structures_are_one_point_of_the_curve():
    rows = [row("alone", 0.02, 38, 4.0), row("alone", 0.05, 45, 2.0), row("alone", 0.05, 31, 3.0, replicate=1)]
    assert curves(rows, "energy") == {"alone": {38: [4.0, 2.0, 3.0]}}


def test_each_fraction_has_its_own_equivalent():
    rows = [row("alone", 0.1, 100, 4.0), row("alone", 1.0, 1000, 0.4)]
    rows += [row("joint", 0.02, 50, 2.0, 2.0), row("joint", 0.05, 50, 1.0, 2.0), row("joint", 0.1, 100, 0.5, math.nan)]
    lines = equivalent_table(rows, {"alone": "target_only", "joint": "joint"}.__getitem__).splitlines()[2:]
    assert lines == [
        "| joint | 2 % | 50 | 200 | ≤ 100 |",
        "| joint | 5 % | 50 | 400 | ≤ 100 |",
        "| joint | 10 % | 100 | 800 |  |",
    ]


def test_nothing_to_compare_with():
    assert equivalent_table([row("joint", 1.0, 10, 1.0)], {"joint": "joint"}.__getitem__) == ""
