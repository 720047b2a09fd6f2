"""Train a model from the command line: ``python -m aimnet2mult.train.cli key=value ...``."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import click

from aimnet2mult.utils.cli import UserError, user_errors

EXTRA_PACKAGES = ("ignite", "omegaconf")
"""Modules that training needs beyond what the package always installs."""

EXIT_INTERRUPTED = 130
"""Exit status after Ctrl-C."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", "-c", metavar="FILE", help="Settings (YAML); paths in it are relative to its folder.")
@click.option(
    "--model", "-m", metavar="FILE", help="Model (YAML).  [default: that of --load, or the full-size AIMNet2]"
)
@click.option("--save", "-s", metavar="FILE", help="Trained model (.pt).  [default: model.pt in the run's folder]")
@click.option(
    "--load", "-l", metavar="FILE", help="Model file that a new run starts from: checkpoint, format-2 .pt, legacy .jpt."
)
@click.option(
    "--resume",
    "-r",
    metavar="RUN",
    help="Go on with a run: its folder or a checkpoint in it; auto: the run in checkpoint.dirname, if there is one.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in the folder.")
@click.option("--processes", type=click.IntRange(min=1), help="Processes on this machine.  [default: one per GPU]")
@click.option("--print-config", is_flag=True, help="Print the settings that would apply, and end.")
@click.option("--dry-run", is_flag=True, help="Check data, make one step, estimate memory and time; write nothing.")
@click.option("--verbose", "-v", is_flag=True, help="Show more of what happens, and tracebacks of errors.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@user_errors
def main(
    config: str | None,
    model: str | None,
    save: str | None,
    load: str | None,
    resume: str | None,
    overwrite: bool,
    processes: int | None,
    print_config: bool,
    dry_run: bool,
    verbose: bool,
    overrides: tuple[str, ...],
) -> None:
    """Train one model on the datasets of one or more fidelities.

    KEY=VALUE changes a setting, the value written as in YAML; paths are relative to the working folder:

    \b
      python -m aimnet2mult.train.cli --config train.yaml --model model.yaml \\
          data.fidelities.dft.files=dft.h5    data.fidelities.dft.sae=sae_dft.yaml \\
          data.fidelities.xtb.files=xtb.h5    data.fidelities.xtb.sae=sae_xtb.yaml \\
          trainer.epochs=100

    Settings, log, metrics and checkpoints go to checkpoint.dirname (runs/RUN_NAME). SIGTERM and SIGUSR1 write a
    checkpoint and end the program (exit status 0, the trained model is not there yet); go on with --resume. Ctrl-C
    saves the model as it stands, too (exit status 130), a second one ends the program at once. Several machines:
    torchrun -m aimnet2mult.train.cli ...
    """  # noqa: D301 - click wants the control character itself
    if resume is not None and (overwrite or (load is not None and resume != "auto")):
        raise UserError(f"--resume: goes on with a run; remove {'--overwrite' if overwrite else '--load'}")
    # Threads that wait by spinning make training ten times slower where another program has a core, too. Read by
    # OpenMP when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # torch and Ignite take seconds to import; --help does not wait for them.
    try:
        from aimnet2mult.train.dry_run import rehearse
        from aimnet2mult.train.failures import rank_errors
        from aimnet2mult.train.launch import relaunch, wanted_processes
        from aimnet2mult.train.resume import read_job
        from aimnet2mult.train.runner import INTERRUPTED, run_training
        from aimnet2mult.train.schema import to_yaml
        from aimnet2mult.train.utils import setup_logging
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRA_PACKAGES:
            raise
        raise UserError(
            f'training needs the package {error.name}, which is not installed: pip install "aimnet2mult[train]"'
        ) from error
    rank = int(os.environ.get("RANK", "0"))
    setup_logging(verbose, rank)
    with _interruptible(), rank_errors():
        job = read_job(config, model, overrides, resume, overwrite, load)
        if job.resume is not None:
            load = None  # --resume auto --load FILE: what the run began with
        if print_config:
            click.echo(to_yaml(job.config), nl=False)
            return
        if (count := wanted_processes(job.config.device, processes)) > 1:
            sys.exit(relaunch(count, _without_processes(sys.argv[1:])))
        if dry_run:
            text = rehearse(job, save, load)
            if rank == 0:
                click.echo(text)
            return
        result = run_training(job, save, load)
    if rank == 0:
        click.echo(f"{result.folder}: checkpoints, metrics, log")
        if result.saved:
            click.echo(f"{result.path}: model of epoch {result.epoch}")
    if result.end.reason == INTERRUPTED:
        _end_interrupted()


@contextmanager
def _interruptible() -> Iterator[None]:
    """End the program where Ctrl-C raises an exception: before the training, or the second time."""
    try:
        yield
    except KeyboardInterrupt:
        _end_interrupted()


def _end_interrupted() -> NoReturn:
    if int(os.environ.get("RANK", "0")) == 0:
        click.echo("Interrupted.", err=True)
    sys.exit(EXIT_INTERRUPTED)


def _without_processes(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of one of several processes: those given, without the option that asked for several."""
    left = iter(arguments)
    kept = []
    for argument in left:
        if argument == "--processes":
            next(left)
        elif not argument.startswith("--processes="):
            kept.append(argument)
    return kept


if __name__ == "__main__":
    main()
