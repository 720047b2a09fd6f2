"""Train a model from the command line: ``python -m aimnet2mult.train.cli --save model.pt key=value ...``."""

import os
import sys

import click

from aimnet2mult.utils.cli import UserError, user_errors

EXTRA_PACKAGES = ("ignite", "omegaconf")
"""Modules that training needs beyond what the package always installs."""

EXIT_INTERRUPTED = 130
"""Exit status after Ctrl-C."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", "-c", metavar="FILE", help="Settings (YAML); paths in it are relative to its folder.")
@click.option("--model", "-m", metavar="FILE", help="Model (YAML).  [default: the packaged full-size AIMNet2]")
@click.option("--save", "-s", metavar="FILE", required=True, help="Where the trained model is written (.pt).")
@click.option("--load", "-l", metavar="FILE", help="Checkpoint whose weights the training starts from.")
@click.option("--verbose", "-v", is_flag=True, help="Show more of what happens, and tracebacks of errors.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@user_errors
def main(
    config: str | None, model: str | None, save: str, load: str | None, verbose: bool, overrides: tuple[str, ...]
) -> None:
    """Train one model on the datasets of one or more fidelities.

    KEY=VALUE changes a setting, the value written as in YAML; paths are relative to the working folder:

    \b
      python -m aimnet2mult.train.cli --config train.yaml --model model.yaml --save model.pt \\
          data.fidelity_datasets.0=dft.h5    data.sae.energy.files.0=sae_dft.yaml \\
          data.fidelity_datasets.1=xtb.h5    data.sae.energy.files.1=sae_xtb.yaml \\
          trainer.epochs=100

    Checkpoints, metrics.jsonl, metrics.csv and the log go to checkpoint.dirname. Ctrl-C saves the model as it stands
    (exit status 130). Several processes: torchrun --nproc_per_node=N -m aimnet2mult.train.cli ...
    """  # noqa: D301 - click wants the control character itself
    # Threads that wait by spinning make training ten times slower where another program has a core, too. Read by
    # OpenMP when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # torch and Ignite take seconds to import; --help does not wait for them.
    try:
        from aimnet2mult.models.base import load_model_config
        from aimnet2mult.train.configuration import load_config
        from aimnet2mult.train.runner import run_training
        from aimnet2mult.train.utils import setup_logging
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRA_PACKAGES:
            raise
        raise UserError(
            f'training needs the package {error.name}, which is not installed: pip install "aimnet2mult[train]"'
        ) from error
    setup_logging(verbose, rank=int(os.environ.get("RANK", "0")))
    settings = load_config(config, overrides)
    model_config = load_model_config(model)
    try:
        result = run_training(settings, model_config, save, load)
    except KeyboardInterrupt:
        click.echo("Interrupted.", err=True)
        sys.exit(EXIT_INTERRUPTED)
    if int(os.environ.get("RANK", "0")) == 0:
        click.echo(f"{result.folder}: checkpoints, metrics, log\n{result.path}: model of epoch {result.epoch}")


if __name__ == "__main__":
    main()
