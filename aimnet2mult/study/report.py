"""The files that a study ends with: tables, pictures, the command lines, and a page that holds all this together."""

import logging
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from aimnet2mult.evaluation import pictures as evaluation_pictures
from aimnet2mult.evaluation.tables import number
from aimnet2mult.study.commands import pretraining_key
from aimnet2mult.study.jobs import Command
from aimnet2mult.study.plan import RUNS, Plan, Point
from aimnet2mult.study.results import Row, csv_text, equivalent_table, error_table, markdown_table
from aimnet2mult.study.settings import JOINT, MIXED, PRETRAINED, SHARE_EXPONENT, pretraining_steps
from aimnet2mult.utils.files import atomic_path, write_text_atomic

logger = logging.getLogger(__name__)

REPORT, RESULTS, TABLE, EQUIVALENTS, COMMANDS = "report.md", "results.csv", "table.md", "equivalents.md", "commands.sh"
PICTURE = "learning_curves"

RESULT = re.compile(rf"(?<![\w./-]){RUNS}/")
"""Beginning of the names of results in a command line."""

COMMANDS_HEAD = """\
#!/usr/bin/env bash
# The command lines of each point of the study, without trials of learning rates. They are run in the folder of the
# study, whose data they use, and write to another folder in it: RUNS=again bash commands.sh, or a part of them.
# OMP_NUM_THREADS says how many threads each has.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-again}
"""


@dataclass
class Report:
    """What is written at the end of a study.

    Attributes
    ----------
    plan : Plan
        The study.
    rows : list of Row
        Points that have results.
    lacking : list of Point
        Those that have not.
    """

    plan: Plan
    rows: Sequence[Row]
    lacking: Sequence[Point]

    def write(self) -> Path:
        """Write all files; return the page."""
        folder = self.plan.folder
        equivalents = self._equivalents()
        write_text_atomic(folder / RESULTS, csv_text(self.rows))
        write_text_atomic(folder / TABLE, error_table(self.rows))
        write_text_atomic(folder / EQUIVALENTS, equivalents)
        write_text_atomic(folder / COMMANDS, self._command_lines())
        os.chmod(folder / COMMANDS, 0o755)
        picture = self._pictures()
        write_text_atomic(folder / REPORT, self._page(equivalents, picture))
        return folder / REPORT

    def _pictures(self) -> bool:
        """Write the pictures, if there is something to show and matplotlib is installed."""
        if not self.rows:
            return False
        if not evaluation_pictures.available():
            logger.warning('no pictures: matplotlib is not installed, pip install "aimnet2mult[report]"')
            return False
        from aimnet2mult.study.pictures import learning_curves

        for kind, content in learning_curves(self.rows, self.plan.study.reference_lines).items():
            with atomic_path(self.plan.folder / f"{PICTURE}.{kind}") as temporary:
                temporary.write_bytes(content)
        return True

    def _equivalents(self) -> str:
        table = equivalent_table(self.rows, self.plan.study.kind)
        if not table:
            return "No protocol trains on the target alone, or it has no results yet: nothing to compare with.\n"
        return (
            f"{table}\nThe number of target structures at which training on the target alone has the same mean error "
            "(interpolated on logarithmic scales), with the 16 % and 84 % quantiles of 1000 resamplings of the "
            "replicates. ≥: better than the target alone with all its structures; ≤: worse than with the fewest.\n"
        )

    # ------------------------------------------------------------------------------------------------
    # the page
    # ------------------------------------------------------------------------------------------------

    def _page(self, equivalents: str, picture: bool) -> str:
        study, data = self.plan.study, self.plan.data
        parts = [
            f"# Learning curves of {study.target}",
            f"{data.structures} structures of {data.molecules} molecules to train on, {data.validation_structures} to "
            f"validate, {data.test_structures} to test.",
            *([f"![learning curves]({PICTURE}.png)"] if picture else []),
            "## Errors on the test molecules",
            "Mean and standard deviation over replicates (other molecules and another seed in each).",
            error_table(self.rows),
            "## Equivalent number of target structures",
            equivalents,
            *self._reference_lines(),
            "## What was equal",
            self._equal(),
            "## What was chosen, and how",
            self._chosen(),
            *self._gaps(),
            "## Command lines",
            f"[{COMMANDS}]({COMMANDS}) reproduces each point; [{RESULTS}]({RESULTS}) has all of them.",
        ]
        return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"

    def _reference_lines(self) -> list[str]:
        lines = self.plan.study.reference_lines
        if not lines:
            return []
        body = [
            [name, *("" if value is None else number(value) for value in (line.energy_mae, line.forces_mae))]
            for name, line in lines.items()
        ]
        return ["## To compare with", markdown_table(["", "energy MAE, eV", "forces MAE, eV/Å"], body)]

    def _equal(self) -> str:
        study = self.plan.study
        if study.unseen:
            others = "The other fidelities have no molecules of the compositions of validation and test."
        else:
            others = "The other fidelities keep all their molecules, those of validation and test, too."
        lines = [
            f"- The model ({study.model.name}) and the settings of training ({study.train.name}), apart from what a "
            "protocol says.",
            f"- The cost: {study.steps} optimiser steps for each point, batches of the same size. Pretraining counts; "
            "it is done once for each seed and shared by the points of all protocols that pretrain alike.",
            "- The molecules: replicate k has the k-th nested order of the molecules and seed k in all protocols. A "
            "subset has whole molecules, and enough of them to determine the reference energies of all elements.",
            f"- Validation: {self.plan.data.validation_structures} structures of the target, whole compositions that "
            f"no subset has. {others}",
            "- The test molecules were evaluated with the final models, and chose nothing.",
        ]
        return "\n".join(lines + [f"- {name}: {self._about(name)}." for name in study.protocols])

    def _about(self, name: str) -> str:
        """What a protocol does, in short."""
        study, protocol, kind = self.plan.study, self.plan.study.protocols[name], self.plan.study.kind(name)
        words = [kind]
        if protocol.model is not None:
            words.append(f"model {protocol.model.name}")
        if kind in PRETRAINED:
            words.append(f"pretrained for {pretraining_steps(study, name)} steps on {', '.join(study.others)}")
        if kind in (MIXED, JOINT):
            given = ", ".join(f"{key} {value:g}" for key, value in protocol.shares.items())
            words.append(f"drawn in the shares {given or f'(number of structures)^{SHARE_EXPONENT}'}")
        if len(study.rates_of(name)) == 1:
            words.append(f"learning rate {study.rates_of(name)[0]:g}")
        words.append(f"reference energies {protocol.reference}" + "".join(f" + {term}" for term in protocol.terms))
        words += [f"{key} = {value}" for key, value in protocol.settings.items()]
        words += [f"pretraining {key} = {value}" for key, value in protocol.pretraining_settings.items()]
        return "; ".join(words)

    def _chosen(self) -> str:
        study = self.plan.study
        lines = [
            "Checkpoints: by `checkpoint.monitor` of the training settings, on the validation structures of the target."
        ]
        if any(len(rates) > 1 for rates in (study.learning_rates, *map(study.rates_of, study.protocols))):
            lines.append(
                f"Learning rates: the best of those below by {study.score.energy:g} × energy MAE (eV) + "
                f"{study.score.forces:g} × forces MAE (eV/Å) on these structures, for each protocol with replicate 0; "
                "other fractions take that of the nearest one. Pretraining: that with the lowest validation loss on "
                f"{100 * study.validation.others:g} % of the compositions of its own data, with seed 0."
            )
            lines.append(self._trials())
        return "\n\n".join(lines)

    def _trials(self) -> str:
        """Validation scores of the trials, and losses of those of pretraining."""
        plan, study = self.plan, self.plan.study
        trials = [
            (protocol, f"{100 * fraction:g} %", plan.scores(protocol, fraction))
            for protocol in study.protocols
            if len(study.rates_of(protocol)) > 1
            for fraction in plan.tune_fractions(protocol)
        ]
        pretrainings: dict[str, list[str]] = {}
        for name in study.protocols:
            if study.kind(name) in PRETRAINED:
                pretrainings.setdefault(pretraining_key(study, name), []).append(name)
        if len(study.learning_rates) > 1:
            trials += [
                (f"pretraining of {', '.join(names)} (loss)", "", plan.pretraining_losses(names[0]))
                for names in pretrainings.values()
            ]
        rates = sorted({*study.learning_rates, *(rate for name in study.protocols for rate in study.rates_of(name))})
        body = [[name, fraction, *(_score(scores, rate) for rate in rates)] for name, fraction, scores in trials]
        return markdown_table(["protocol", "fraction", *(f"score at {rate:g}" for rate in rates)], body)

    def _gaps(self) -> list[str]:
        lines = [f"- {point.name}: no result" for point in self.lacking] + [f"- {text}" for text in self.plan.left_out]
        return ["## What is missing", "\n".join(lines)] if lines else []

    # ------------------------------------------------------------------------------------------------
    # the command lines
    # ------------------------------------------------------------------------------------------------

    def _command_lines(self) -> str:
        lines = [COMMANDS_HEAD]
        written: set[str] = set()
        done = {(row.protocol, row.fraction, row.replicate) for row in self.rows}
        for point in self.plan.points:
            if (point.protocol, point.fraction, point.replicate) in done:
                commands = [command for command in self.plan.history(point) if command.folder not in written]
                lines += [f"\n# {point.name}", *map(command_line, commands)]
                written.update(command.folder for command in commands)
        return "\n".join(lines) + "\n"


def _score(scores: Mapping[float, float], rate: float) -> str:
    """What a learning rate has given, the best one in bold; empty: it was not tried."""
    if rate not in scores:
        return ""
    text = number(scores[rate])
    finite = filter(math.isfinite, scores.values())
    return f"**{text}**" if scores[rate] == min(finite, default=None) else text


def command_line(command: Command) -> str:
    """Return a command for a shell; folders of results begin with ``$RUNS``."""
    words = [command.module, *command.arguments]
    quoted = [RESULT.sub('"$RUNS"/', shlex.quote(word)) for word in words]
    return f'mkdir -p "$RUNS"/{command.folder.removeprefix(RUNS + "/")}\n"$PYTHON" -m {" ".join(quoted)}'
