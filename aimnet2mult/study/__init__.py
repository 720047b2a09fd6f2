"""Learning curves: how the error of a level of theory falls with the number of its labels, with and without others.

`settings` says what a study consists of, `subsets` and `geometries` write its data, `plan` turns it into jobs, which
`jobs` runs, each a command line of the package; `results`, `equivalents`, `pictures` and `report` put together what
they found. The command is `aimnet2mult.tools.learning_curve`.
"""
