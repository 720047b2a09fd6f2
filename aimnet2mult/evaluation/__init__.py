"""How good a model is: its predictions beside the labels of datasets, as numbers, pictures and a page.

``models`` (a checkpoint, a compiled model, a model in training -> predictions) and ``run_folder`` (what a run left
behind) -> ``compare`` (every molecule of a dataset) -> ``statistics`` (sums, samples, worst molecules) -> ``report``,
which writes ``tables`` (JSON, CSV, Markdown), ``pictures`` and ``page`` (HTML). ``properties`` says what is compared
and in which units, ``history`` reads ``metrics.jsonl``.

The command line is `aimnet2mult.tools.evaluate`; a training calls `aimnet2mult.evaluation.report.training_report`.
"""
