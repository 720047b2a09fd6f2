"""Wrong settings, as a user gives them: refused before any data are read, by their dotted key and with the remedy."""

import logging
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import h5py
import pytest
import yaml
from click.testing import CliRunner

import aimnet2mult.train.data as training_data
from aimnet2mult.data.sgdataset import write_dataset
from aimnet2mult.models.base import DEFAULT_MODEL
from aimnet2mult.train import cli
from aimnet2mult.train.calc_sae import calc_sae

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODEL = FIXTURES / "ref_single_model.yaml"
TRAIN, VAL = "data.samplers.train.kwargs", "data.samplers.val.kwargs"
LOSS, CYCLE = "loss.kwargs.components", "torch.optim.lr_scheduler.OneCycleLR"
PLATEAU = "ignite.handlers.ReduceLROnPlateauScheduler"
NO_CHARGES = [f"{LOSS}.charges=null", f"{LOSS}.spin_charges=null"]

WRONG = {
    # --- misspelt, at every level ---
    "top level": ("trainr.epochs=3", "trainr", "did you mean trainer"),
    "section": ("trainer.epoch=3", "trainer.epoch", "did you mean epochs?"),
    "three deep": ("optimizer.grad_clip.maxnorm=1", "optimizer.grad_clip.maxnorm", "did you mean max_norm"),
    "four deep": (f"{TRAIN}.batchsize=64", f"{TRAIN}.batchsize", "did you mean batch_size"),
    "of a fidelity": ("data.fidelities.dft.wieght=2", "data.fidelities.dft.wieght", "did you mean weight?"),
    "optional section": ("trainer.early_stopping.patince=5", "trainer.early_stopping.patince", "did you mean patience"),
    "keyword of the optimiser": (
        "optimizer.kwargs.wieght_decay=0",
        "optimizer.kwargs.wieght_decay",
        "did you mean weight_decay",
    ),
    "keyword of the schedule": ("scheduler.kwargs.patiens=3", "scheduler.kwargs.patiens", "did you mean patience?"),
    "option of a loss component": (
        f"{LOSS}.forces.weigth=2",
        f"{LOSS}.forces.weigth",
        "did you mean weight",
    ),
    "loss component": (f"{LOSS}.force.weight=2", f"{LOSS}.force.fn", "did you mean forces?"),
    "removal of a loss component": (f"{LOSS}.charge=null", f"{LOSS}.charge", "did you mean charges"),
    "property of the metrics": ("metrics.kwargs.cfg.force.scale=1", "metrics.kwargs.cfg.force", "did you mean forces?"),
    "removal of a fidelity": ("data.fidelities.xbt=null", "data.fidelities.xbt", "did you mean xtb?"),
    "label": ("data.y=[energy, force]", "data.y", "did you mean forces?"),
    "word in a list of choices": (f"{TRAIN}.batch_mode=atom", f"{TRAIN}.batch_mode", "did you mean atoms?"),
    "the word total": (
        [f"scheduler.class={CYCLE}", "scheduler.kwargs={max_lr: 1e-3, total_steps: totl}"],
        "scheduler.kwargs.total_steps",
        "did you mean total?",
    ),
    # --- of another type ---
    "text for an integer": ("trainer.epochs=many", "trainer.epochs", "expected an integer"),
    "fraction for an integer": ("trainer.accumulate=1.5", "trainer.accumulate", "expected an integer"),
    "text for a truth value": ("trainer.compile=maybe", "trainer.compile", "expected true or false"),
    "null for a number": ("data.val_fraction=null", "data.val_fraction", "expected a number"),
    "value for a section": ("trainer.ema=0.99", "trainer.ema", "expected a mapping"),
    "text for a list": ("optimizer.freeze_fidelities=dft", "optimizer.freeze_fidelities", "expected a list"),
    "text for components": ("loss.kwargs.components=energy", LOSS, "expected a mapping"),
    "no value": ("trainer.epochs", "trainer.epochs", "such as trainer.epochs=100"),
    # --- out of range ---
    "no accumulation": ("trainer.accumulate=0", "trainer.accumulate", "expected 1 or more"),
    "decay of one": ("trainer.ema.decay=1", "trainer.ema.decay", "below 1"),
    "negative limit of skipped steps": ("trainer.max_skipped=-1", "trainer.max_skipped", "expected 0 or more"),
    "no patience": (
        "trainer.early_stopping.patience=0",
        "trainer.early_stopping.patience",
        "expected 1 or more validations",
    ),
    "negative improvement": (
        "trainer.early_stopping.min_delta=-1",
        "trainer.early_stopping.min_delta",
        "expected a number of 0 or more",
    ),
    "precision": ("trainer.precision=float16", "trainer.precision", "did you mean float"),
    "clipping at zero": ("optimizer.grad_clip.max_value=0", "optimizer.grad_clip.max_value", "positive number or null"),
    "rate of zero": ("optimizer.kwargs.lr=0", "optimizer.kwargs.lr", "expected a positive learning rate"),
    "decay of a group": (
        "optimizer.param_groups.heads={re: readouts, weight_decay: -1}",
        "optimizer.param_groups.heads",
        "Invalid weight_decay",
    ),
    "warm-up from nothing": ("scheduler.warmup.start=0", "scheduler.warmup.start", "(0, 1]"),
    "fraction of all": ("data.val_fraction=1", "data.val_fraction", "[0, 1)"),
    "no checkpoints kept": ("checkpoint.keep_last=0", "checkpoint.keep_last", "keep one checkpoint or more"),
    "minutes": ("checkpoint.every_minutes=0", "checkpoint.every_minutes", "positive number of minutes or null"),
    "large seed": ("seed=5000000000", "seed", "expected a number from 0 to"),
    "weight that is not a number": ("data.fidelities.xtb.weight=.nan", "data.fidelities.xtb.weight", "of 0 or more"),
    # --- files ---
    "no such dataset": ("data.fidelities.xtb.files=none.h5", "data.fidelities.xtb.files", "no such file"),
    "pattern without files": ("data.fidelities.xtb.files=part_*.h5", "data.fidelities.xtb.files", "part_*.h5"),
    "no such SAE file": ("data.fidelities.dft.sae=none.yaml", "data.fidelities.dft.sae", "no such file"),
    "no SAE file": ("data.fidelities.dft.sae=null", "data.fidelities.dft.sae", "aimnet2mult.train.calc_sae"),
    "folder as a dataset": ("data.fidelities.dft.files=.", "data.fidelities.dft.files", "folder"),
    # --- classes and functions ---
    "optimiser": ("optimizer.class=torch.optim.RAdan", "optimizer.class", "did you mean RAdam"),
    "no optimiser": ("optimizer.class=torch.nn.Linear", "optimizer.class", "such as torch.optim.RAdam"),
    "optimiser with a closure": ("optimizer.class=torch.optim.LBFGS", "optimizer.class", "name another one"),
    "module": ("scheduler.class=torch.optim.scheduler.StepLR", "scheduler.class", "there is no module"),
    "no schedule": ("scheduler.class=torch.optim.Adam", "scheduler.class", "torch.optim.lr_scheduler"),
    "function of a loss": (
        f"{LOSS}.forces.fn=aimnet2mult.train.loss.peratom",
        f"{LOSS}.forces.fn",
        "did you mean peratom_loss_fn",
    ),
    "no loss": (f"{LOSS}.energy.fn=math.sqrt", f"{LOSS}.energy.fn", "a function of y_pred and y_true is needed"),
    "another loss": ("loss.class=torch.nn.MSELoss", "loss.class", "name aimnet2mult.train.loss.MTLoss"),
    "other metrics": (
        "metrics.class=ignite.metrics.Accuracy",
        "metrics.class",
        "name aimnet2mult.train.metrics.RegMultiMetric",
    ),
    # --- patterns ---
    "pattern of fixed weights": ("optimizer.force_no_train=['*']", "optimizer.force_no_train", "regular expression"),
    "pattern of a group": (
        "optimizer.param_groups.heads={re: 'x(', lr: 1e-3}",
        "optimizer.param_groups.heads.re",
        "regular expression",
    ),
    # --- fidelities that there are not ---
    "shares": (
        [f"{TRAIN}.sampling_strategy=shares", f"{TRAIN}.shares={{dft: 0.5, xbt: 0.5}}"],
        f"{TRAIN}.shares",
        "did you mean xtb?",
    ),
    "factors of a loss": (
        f"{LOSS}.forces.fidelity_weights.dtf=2",
        f"{LOSS}.forces.fidelity_weights",
        "did you mean dft?",
    ),
    "frozen": ("optimizer.freeze_fidelities=[ccsd]", "optimizer.freeze_fidelities", "known: dft, xtb"),
    "start": ("init_from.xbt=dft", "init_from", "did you mean xtb?"),
    "monitored": ("checkpoint.monitor=dtf/F_mae", "checkpoint.monitor", "did you mean dft/F_mae"),
    "forbidden name": (
        "data.fidelities.0={files: dft.h5, sae: sae_dft.yaml}",
        "data.fidelities.0",
        "does not begin with a digit",
    ),
    "target of closeness": ("sharing.closeness.to=xbt", "sharing.closeness.to", "did you mean xtb?"),
    # --- how fidelities share ---
    "word of the start": ("sharing.start=independant", "sharing.start", "did you mean independent?"),
    "start from a fidelity": ("sharing.start={dft: xtb}", "sharing.start", "expected a text"),
    "embedding": ("sharing.embedding=common", "sharing.embedding", "known: own, shared"),
    "nothing of their own": (
        ["sharing.embedding=shared", "use_fidelity_readouts=false"],
        "sharing.embedding",
        "nothing would tell the fidelities apart",
    ),
    "frozen rows of all": (
        ["sharing.embedding=shared", "optimizer.freeze_fidelities=[dft, '0']"],
        "optimizer.freeze_fidelities",
        "optimizer.force_no_train=['^afv']",
    ),
    "negative closeness": ("sharing.closeness.weight=-1", "sharing.closeness.weight", "a number of 0 or more"),
    "decay in no time": ("sharing.closeness.decay=0", "sharing.closeness.decay", "1 or more steps or null"),
    "name of the penalty": (
        ["sharing.closeness={}", f"{LOSS}.closeness={{fn: aimnet2mult.train.loss.energy_loss_fn, weight: 1}}"],
        f"{LOSS}.closeness",
        "choose another",
    ),
    # --- metrics that there are not ---
    "metric of the plateau": ("scheduler.kwargs.metric_name=E_mse", "scheduler.kwargs.metric_name", "did you mean E_"),
    "metric in a sum": (
        "trainer.early_stopping.monitor={dft/F_mae: 1, val/E_mea: 0.5}",
        "trainer.early_stopping.monitor",
        "did you mean E_mae",
    ),
    "metric of a label that is not read": (
        ["checkpoint.monitor=q_mae", "data.y=[energy, forces]", *NO_CHARGES],
        "checkpoint.monitor",
        "q_mae is not a validation metric",
    ),
    "negative weight in a sum": (
        "checkpoint.monitor={loss: -1}",
        "checkpoint.monitor.loss",
        "expected a positive weight",
    ),
    # --- contradictions ---
    "validation without data": ("data.val_fraction=0", "checkpoint.save_best", "Set data.val_fraction"),
    "early stopping without data": (
        ["data.val_fraction=0", "trainer.early_stopping={}"],
        "trainer.early_stopping",
        "Set data.val_fraction",
    ),
    "validation data of another": (
        ["data.val_fraction=0", "data.fidelities.xtb.val_files=dft.h5", "checkpoint.monitor=dft/F_mae"],
        "checkpoint.monitor",
        "Give files for its validation",
    ),
    "plateau in iterations": ("scheduler.unit=iteration", "scheduler.unit", "set it to null"),
    "nothing to resume from": ("checkpoint.every_minutes=null", "checkpoint.every_minutes", "give one of them"),
    "label of a loss that is not read": (["data.y=[energy, forces]"], f"{LOSS}.charges", f"{LOSS}.charges=null"),
    "factors that are all zero": (
        f"{LOSS}.forces.fidelity_weights={{dft: 0, xtb: 0}}",
        f"{LOSS}.forces.fidelity_weights",
        "make one positive",
    ),
    "shares without the strategy": (f"{TRAIN}.shares={{dft: 1, xtb: 0}}", f"{TRAIN}.shares", "Give both or neither"),
    "shares without shuffling": (
        f"{VAL}={{sampling_strategy: shares, shares: {{dft: 1, xtb: 0}}}}",
        f"{VAL}.shares",
        "set it to true",
    ),
    "step longer than an epoch": (
        ["trainer.accumulate=8", f"{TRAIN}.batches_per_epoch=4"],
        "trainer.accumulate",
        "make one of them fit",
    ),
    "warm-up longer than the run": (
        [f"{TRAIN}.batches_per_epoch=4", "trainer.epochs=10", "scheduler.warmup={}"],
        "scheduler.warmup.iterations",
        "give less",
    ),
    "cycle shorter than the run": (
        [f"scheduler.class={CYCLE}", "scheduler.kwargs={max_lr: 1e-3, total_steps: 10}"],
        "scheduler.kwargs.total_steps",
        "use total_steps: total",
    ),
    "low rate above the rate": ("scheduler.terminate_on_low_lr=1", "scheduler.terminate_on_low_lr", "between 0 and"),
    "nothing learns": (
        ["optimizer.freeze_fidelities=[dft, xtb]", "optimizer.freeze_backbone=true"],
        "optimizer.freeze_fidelities",
        "remove one of them",
    ),
    "frozen readouts that are shared": (
        ["optimizer.freeze_fidelities=[dft]", "use_fidelity_readouts=false"],
        "optimizer.freeze_fidelities",
        "set use_fidelity_readouts=true",
    ),
    "readers that are not there": (
        "data.loaders.train.prefetch_factor=4",
        "data.loaders.train.prefetch_factor",
        "set data.loaders.train.num_workers",
    ),
    "dispersion that is not known": (
        "data.fidelities.dft={dispersion: vv10, subtract_dispersion: true}",
        "data.fidelities.dft.subtract_dispersion",
        "only D3(BJ) can be subtracted. Set it to false",
    ),
    "names and numbers": ("data.fidelity_datasets.0=dft.h5", "data.fidelity_datasets", "use data.fidelities.<name>"),
    # --- where to write, what to log, where to compute ---
    "prefix with a folder": ("checkpoint.filename_prefix=a/b", "checkpoint.filename_prefix", "no / in it"),
    "file as the folder of the run": ("checkpoint.dirname=dft.h5/a", "checkpoint.dirname", "name another place"),
    "mode of W&B": ("wandb.init.mode=of", "wandb.init.mode", "known: online, offline, disabled"),
    "histograms": ("wandb.watch_model.log=some", "wandb.watch_model.log", "expected gradients, parameters or all"),
    "device": ("device=gpu", "device", "expected auto, cpu, cuda or cuda:N"),
    "GPU that is not there": ("device=cuda:99", "device", "this machine has"),
    # --- options of the command ---
    "no such file of settings": (["--config", "none.yaml"], "none.yaml", "no such file"),
    "no such model": (["--model", "none.yaml"], "none.yaml", "no such file"),
    "no such run": (["--resume", "none"], "{folder}/none", "give the folder of a run"),
    "going on elsewhere": (["--resume", "run", "--load", "x.pt"], "--resume", "remove --load"),
}
"""What is given, the key that the message must name, and a part of the remedy."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Names of datasets without content, and of SAE files: enough for settings."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("dft", "xtb"):
        (folder / f"{name}.h5").touch()
        (folder / f"sae_{name}.yaml").write_text("1: -13.6\n")
    return folder


@pytest.fixture
def folder(files, tmp_path, monkeypatch):
    """Working folder with `files`, in which no dataset can be opened."""

    def opened(*_, **__):
        raise AssertionError("a dataset was opened")

    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training_data, "open_dataset", opened)
    monkeypatch.setattr(training_data, "load_sae", opened)
    monkeypatch.setattr(h5py, "File", opened)
    with log_as_before():
        yield tmp_path


@contextmanager
def log_as_before():
    """Undo what the command does to the package's log."""
    package, ignite = logging.getLogger("aimnet2mult"), logging.getLogger("ignite")
    before = package.handlers[:], package.level, ignite.level
    yield
    package.handlers[:] = before[0]
    package.setLevel(before[1])
    ignite.setLevel(before[2])


def fidelities():
    return [
        f"data.fidelities.{name}.{key}={value}"
        for name in ("dft", "xtb")
        for key, value in (("files", f"{name}.h5"), ("sae", f"sae_{name}.yaml"))
    ]


def content(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def refused(folder, arguments):
    """Call the command; return the lines of its message, having made sure that it did nothing else."""
    before = content(folder)
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert content(folder) == before
    assert "Traceback" not in result.output
    printed, found, message = result.output.partition("Error: ")
    assert found
    assert printed == "", "nothing but the message"
    return message.splitlines()


def test_there_are_forty_mistakes_and_more():
    assert len(WRONG) >= 40


def test_without_a_mistake_the_data_are_opened(folder):
    result = CliRunner().invoke(cli.main, ["--model", str(MODEL), *fidelities(), "device=cpu"])
    assert isinstance(result.exception, AssertionError)
    assert "a dataset was opened" in str(result.exception)


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_refused_before_data_are_read(folder, name):
    given, key, remedy = WRONG[name]
    given = [given] if isinstance(given, str) else given
    model = [] if "--model" in given or "--resume" in given else ["--model", str(MODEL)]
    lines = refused(folder, [*model, *([] if "--resume" in given else fidelities()), *given])
    begin = f"{key.format(folder=folder)}: "
    assert any(line.startswith(begin) and remedy in line for line in lines), lines


WRONG_FILES = {
    "key": ("seeds: 1\n", "seeds: unknown key ({path}); did you mean seed?"),
    "key far down": ("data: {loaders: {train: {workers: 2}}}\n", "data.loaders.train.workers: unknown key ({path}); "),
    "type": ("trainer: {epochs: [3]}\n", "trainer.epochs: expected an integer, found [3] ({path})"),
    "section": ("checkpoint: best\n", "checkpoint: expected a mapping, found 'best' ({path})"),
    "reference": ("run_name: ${nam}\n", "run_name: Interpolation key 'nam' not found"),
    "a model instead": ((FIXTURES / "ref_single_model.yaml").read_text(), "class: unknown key ({path}); "),
    "a list": ("- trainer\n", "{path}: expected a mapping of settings, found a list"),
    "no YAML": ("trainer: {epochs: 3\n", "{path}: not a YAML mapping of settings"),
    "a key twice": ("seed: 1\nseed: 2\n", "{path}: not a YAML mapping of settings"),
    "tabs": ("trainer:\n\tepochs: 3\n", "{path}: not a YAML mapping of settings"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_mistake_in_a_file_is_found_there(folder, name):
    text, message = WRONG_FILES[name]
    (folder / "train.yaml").write_text(text)
    lines = refused(folder, ["--config", "train.yaml", *fidelities()])
    expected = message.format(path="train.yaml")
    assert any(line.startswith(expected) for line in lines), lines


def test_several_processes_need_equal_numbers_of_batches(folder, monkeypatch):
    from aimnet2mult.train.configuration import load_config

    load_config(None, [*fidelities(), f"{TRAIN}.shuffle=false"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=rf"{TRAIN}.shuffle: without it 2 processes .* set it to true"):
        load_config(None, [*fidelities(), f"{TRAIN}.shuffle=false"])


# --------------------------------------------------------------------------------------------------
# going on with other settings
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of one step on one small dataset, and its working folder."""
    folder = tmp_path_factory.mktemp("run")
    source = FIXTURES / "tiny_fid0.h5"
    with h5py.File(source) as file:
        group = file["003"]
        arrays = {key: group[key][:20] for key in group}
    write_dataset(folder / "dft.h5", {3: arrays})
    calc_sae(folder / "dft.h5", folder / "sae.yaml")
    dataset = [f"data.fidelities.dft.files={folder / 'dft.h5'}", f"data.fidelities.dft.sae={folder / 'sae.yaml'}"]
    settings = ["device=cpu", "trainer.epochs=1", "report=false", f"checkpoint.dirname={folder / 'run'}"]
    with log_as_before():
        result = CliRunner().invoke(cli.main, ["--model", str(MODEL), *dataset, *settings])
    assert result.exit_code == 0, (result.output, result.exception)
    return folder


WRONG_RESUMES = {
    "another rate": (["optimizer.kwargs.lr=1"], "optimizer.kwargs.lr: 0.0004 when the run began, 1 now"),
    "another split": (["data.val_fraction=0.5"], "data.val_fraction: 0.1 when the run began, 0.5 now"),
    "another precision": (["trainer.precision=float64"], "trainer.precision: float32 when the run began, float64 now"),
    "no averages": (["trainer.ema=null"], "trainer.ema: {'decay': 0.999} when the run began, None now"),
    "a misspelt key": (["trainer.epoch=5"], "trainer.epoch: unknown key (command line); did you mean epochs?"),
    "another model": (["--model", str(DEFAULT_MODEL)], "--model: "),
    "overwriting": (["--overwrite"], "--resume: goes on with a run; remove --overwrite"),
}


@pytest.mark.parametrize("name", WRONG_RESUMES)
def test_what_a_run_that_goes_on_must_not_change(run, folder, name):
    given, message = WRONG_RESUMES[name]
    before = content(run)
    lines = refused(folder, ["--resume", str(run / "run"), *given])
    assert any(line.startswith(message) for line in lines), lines
    assert content(run) == before


def test_the_folder_of_another_run_is_refused(run, folder):
    lines = refused(folder, ["--model", str(MODEL), *fidelities(), "device=cpu", f"checkpoint.dirname={run / 'run'}"])
    assert any("--resume" in line and "--overwrite" in line for line in lines), lines


# --------------------------------------------------------------------------------------------------
# as a process
# --------------------------------------------------------------------------------------------------


def test_all_problems_come_in_one_message_of_a_real_process(files, tmp_path):
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    settings = {
        "trainer": {"epoch": 3, "max_skipped": -1},
        "data": {"fidelities": {"dft": {"files": "dft.h5", "sae": "none.yaml"}}},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings))
    before = content(tmp_path)
    wrong = ["checkpoint.monitor=E_mea", "optimizer.class=torch.optim.RAdan", "data.val_fraction=two"]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "aimnet2mult.train.cli", "--config", "train.yaml", *wrong],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert time.monotonic() - start < 20  # four seconds, on a machine with something else to do
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.removeprefix("Error: ").splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        "trainer.epoch",
        "data.val_fraction",
        "data.fidelities.dft.sae",
        "optimizer.class",
        "trainer.max_skipped",
        "checkpoint.monitor",
    ]
    assert content(tmp_path) == before
