"""Learning curves of a level of theory, with and without the help of others.

``python -m aimnet2mult.tools.learning_curve --config study.yaml --output study`` trains on nested subsets of the
target's molecules by several protocols, at equal cost, and writes tables, pictures and the command lines of each
point. Interrupted, it goes on with the same command. The work is done by `aimnet2mult.study`.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aimnet2mult.utils.cli import UserError, user_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aimnet2mult.study.jobs import Workshop
    from aimnet2mult.study.plan import Plan

logger = logging.getLogger(__name__)

EXIT_INCOMPLETE, EXIT_INTERRUPTED = 1, 130


def learning_curve(
    config: str | Path,
    output: str | Path,
    overrides: Sequence[str] = (),
    *,
    jobs: int = 1,
    threads: int | None = None,
    device: str | None = None,
) -> list[str]:
    """Run a study, or what is left of it, and write its report.

    Parameters
    ----------
    config : str or Path
        Settings of the study (YAML), see `aimnet2mult.study.settings`.
    output : str or Path
        Folder for data, runs and results; made if it does not exist.
    overrides : sequence of str
        Settings as ``dotted.key=value``.
    jobs : int
        Commands that run at a time.
    threads : int, optional
        Threads of each; default: the cores of this process, shared by them.
    device : str, optional
        Device of training and evaluation; default: that of the training settings.

    Returns
    -------
    list of str
        Points without a result.

    Raises
    ------
    ValueError, OSError
        What is wrong with the settings or the files; no run has begun then.
    aimnet2mult.study.jobs.StudyError
        The folder is in use by another study.
    """
    from aimnet2mult.study.jobs import Workshop
    from aimnet2mult.study.report import Report
    from aimnet2mult.study.results import collect

    plan = planned(config, output, overrides)
    threads = threads or max(1, len(os.sched_getaffinity(0)) // jobs)
    workshop = Workshop(plan.folder, jobs, threads, device)

    def report() -> list[str]:
        rows, lacking = collect(plan, workshop)
        Report(plan, rows, lacking).write()
        return [point.name for point in lacking]

    try:
        workshop.run(plan.jobs())
    except KeyboardInterrupt:
        report()
        raise
    return report()


def planned(config: str | Path, output: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """Check the settings of a study, write its data, and return the plan of its jobs; as `learning_curve`."""
    from aimnet2mult.study.commands import Commands
    from aimnet2mult.study.data import prepare
    from aimnet2mult.study.plan import Plan
    from aimnet2mult.study.settings import load_study

    study = load_study(config, overrides)
    folder = Path(output).absolute()
    Commands(study, folder).check()
    folder.mkdir(parents=True, exist_ok=True)
    return Plan(study, folder, prepare(study, folder))


def summary(plan: Plan, workshop: Workshop) -> str:
    """Return what a study consists of and what it costs: numbers of runs and steps, and hours as far as known."""
    from aimnet2mult.study.jobs import StudyError
    from aimnet2mult.utils.text import text_table

    steps = {job.name: job.steps for job in plan.jobs() if job.steps}
    rows: list[Sequence[Any]] = []
    groups = [("pretraining", [name for name in steps if name.startswith("pretraining ")])]
    groups += [(p, [name for name in steps if name.startswith(f"{p}, ")]) for p in plan.study.protocols]
    rows = [(group, len(names), sum(steps[name] for name in names)) for group, names in groups if names]
    total = sum(row[2] for row in rows)
    lines = text_table(["part", "training runs", "steps"], [*rows, ("all", len(steps), total)])
    seconds, measured = 0.0, 0
    for point in plan.points:
        try:
            command = plan.training(point)
        except StudyError:
            continue
        if workshop.is_done(command):
            seconds += workshop.state(command.folder)["seconds"]
            measured += plan.own_steps(point)
    lines.append("")
    lines.append(f"points: {len(plan.points)}")
    if measured:
        rate = seconds / measured
        lines.append(
            f"{rate:.3g} s a step in the runs that are done: {total * rate / 3600:.1f} h for all, one at a time"
        )
    else:
        lines.append("time: not known before the first run is done")
    return "\n".join(lines + [f"left out: {text}" for text in plan.left_out])


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config", "-c", required=True, metavar="FILE", help="The study (YAML); paths are relative to its folder."
)
@click.option(
    "--output", "-o", required=True, type=click.Path(path_type=Path), help="Folder for data, runs and results."
)
@click.option("--jobs", "-j", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at a time.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of each run.  [default: cores / jobs]")
@click.option("--device", help="auto, cpu, cuda or cuda:N.  [default: as the training settings say]")
@click.option("--dry-run", is_flag=True, help="Check the settings, write the data, and say how many runs there are.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@user_errors
def main(
    config: str,
    output: Path,
    jobs: int,
    threads: int | None,
    device: str | None,
    dry_run: bool,
    overrides: tuple[str, ...],
) -> None:
    """Measure learning curves of one fidelity by several training protocols.

    KEY=VALUE changes a setting of the study, the value written as in YAML. The same command goes on with a study that
    was interrupted (Ctrl-C, SIGTERM), and runs again what a changed setting concerns. Exit status 1: some points
    have no result.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if os.name != "posix":
        raise UserError("learning_curve runs on Unix systems only")
    try:
        from aimnet2mult.study.jobs import StudyError, Workshop
    except ModuleNotFoundError as error:
        if error.name not in ("ignite", "omegaconf"):
            raise
        raise UserError(
            f'training needs the package {error.name}, which is not installed: pip install "aimnet2mult[train]"'
        ) from error
    if dry_run:
        plan = planned(config, output, overrides)
        click.echo(summary(plan, Workshop(plan.folder)))
        return
    try:
        lacking = learning_curve(config, output, overrides, jobs=jobs, threads=threads, device=device)
    except StudyError as error:
        raise UserError(str(error)) from error
    except KeyboardInterrupt:
        click.echo("Interrupted; the same command goes on.", err=True)
        sys.exit(EXIT_INTERRUPTED)
    click.echo(output / "report.md")
    if lacking:
        click.echo("\n".join([f"{len(lacking)} points have no result:", *lacking]), err=True)
        sys.exit(EXIT_INCOMPLETE)


if __name__ == "__main__":
    main()
