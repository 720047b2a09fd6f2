"""The settings of a run: what is merged, what is refused and in which words."""

import runpy
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from aimnet2mult.train.configuration import DEFAULT_CONFIG, load_config
from aimnet2mult.train.resume import FREE_SETTINGS
from aimnet2mult.train.schema import TrainConfig, named_fidelities, to_dict, to_yaml, yaml_key

DOCS = Path(__file__).parents[2] / "docs" / "configuration.md"
SCRIPT = Path(__file__).parents[2] / "scripts" / "make_configuration_docs.py"
EXAMPLES = Path(__file__).parents[2] / "examples"
PLATEAU = "ignite.handlers.ReduceLROnPlateauScheduler"
STEP = "torch.optim.lr_scheduler.StepLR"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Working folder with three datasets and SAE files (empty: settings are checked before data is read)."""
    for f in range(3):
        (tmp_path / f"fid{f}.h5").touch()
        (tmp_path / f"sae{f}.yaml").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(count=3):
    return [f"data.fidelity_datasets.{f}=fid{f}.h5" for f in range(count)] + [
        f"data.sae.energy.files.{f}=sae{f}.yaml" for f in range(count)
    ]


def problems(*overrides, path=None):
    with pytest.raises(ValueError, match=r"\w: ") as caught:
        load_config(path, [*files(), *overrides])
    return str(caught.value).splitlines()


def write(path, settings):
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(settings))
    return path


# --------------------------------------------------------------------------------------------------
# the list of options
# --------------------------------------------------------------------------------------------------


def test_the_documentation_is_current():
    script = runpy.run_path(str(SCRIPT))
    for name, blocks in script["PAGES"].items():
        page = (DOCS.parent / name).read_text(encoding="utf-8")
        assert script["updated"](page, blocks) == page, "run python scripts/make_configuration_docs.py"
        with pytest.raises(ValueError, match="expected the marks"):
            script["updated"](page.replace("<!-- end of options -->", ""), blocks)


def test_the_documentation_has_a_row_for_every_option():
    def keys(schema, prefix=""):
        for f, hint in zip(fields(schema), typing.get_type_hints(schema).values(), strict=True):
            key = prefix + yaml_key(f.name)
            if not is_dataclass(hint):
                yield key
            inner = [kind for kind in (hint, *typing.get_args(hint)) if is_dataclass(kind)]
            if inner:
                name = ".{name}" if typing.get_origin(hint) is dict else ""
                yield from keys(inner[0], f"{key}{name}.")

    rows = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    documented = [line.split("`")[1] for line in rows if line.count(" | ") == 3]
    expected = list(keys(TrainConfig))
    assert len(expected) > 100
    assert sorted(documented) == sorted(expected)


def test_defaults_in_the_documentation():
    page = DOCS.read_text(encoding="utf-8")
    assert "| `trainer.epochs` | integer | `500` | number of epochs |" in page
    assert "| `trainer.early_stopping.patience` | integer or null | `20` | " in page
    assert "| `checkpoint.dirname` | path | `runs/${run_name}` | " in page
    for key in FREE_SETTINGS:
        assert f"\n- `{key.replace('*', '{name}')}`\n" in page


# --------------------------------------------------------------------------------------------------
# merging
# --------------------------------------------------------------------------------------------------


def test_packaged_file_holds_every_default_of_sections_that_are_always_there():
    def missing(schema, data, prefix=""):
        for f in fields(schema):
            key = prefix + yaml_key(f.name)
            if yaml_key(f.name) not in data:
                yield key
            elif is_dataclass(f.type) and data[yaml_key(f.name)] is not None:
                yield from missing(f.type, data[yaml_key(f.name)], key + ".")

    packaged = yaml.safe_load(DEFAULT_CONFIG.read_text())
    assert list(missing(TrainConfig, packaged)) == []


def test_every_option_says_what_it_means():
    def silent(schema):
        for f in fields(schema):
            if is_dataclass(f.type):
                yield from silent(f.type)
            elif not f.metadata.get("meaning"):
                yield f"{schema.__name__}.{f.name}"

    assert list(silent(TrainConfig)) == []


def test_command_line_gives_integer_fidelities_and_paths_relative_to_the_working_folder(folder):
    config = load_config(None, files())
    assert config.data.fidelity_datasets == {f: [folder / f"fid{f}.h5"] for f in range(3)}
    assert config.data.sae.energy.files[2] == folder / "sae2.yaml"
    assert config.checkpoint.dirname == folder / "runs" / config.run_name


def test_paths_in_a_file_are_relative_to_the_file(folder, monkeypatch):
    settings = {
        "data": {"fidelity_datasets": {0: "../fid0.h5"}, "sae": {"energy": {"file": "../sae0.yaml"}}},
        "checkpoint": {"dirname": "out"},
    }
    path = write(folder / "sub" / "train.yaml", settings)
    monkeypatch.chdir("/")
    config = load_config(path)
    assert config.data.fidelity_datasets[0] == [folder / "fid0.h5"]
    assert config.data.sae.energy.file == folder / "sae0.yaml"
    assert config.checkpoint.dirname == folder / "sub" / "out"


def test_override_beats_file_beats_package(folder):
    path = write(folder / "train.yaml", {"seed": 5, "trainer": {"epochs": 7}, "data": {"val_fraction": 0.2}})
    config = load_config(path, [*files(), "trainer.epochs=9"])
    assert (config.seed, config.trainer.epochs, config.data.val_fraction) == (5, 9, 0.2)
    assert config.optimizer.class_ == "torch.optim.RAdam"


def test_components_in_a_file_replace_the_packaged_ones_but_an_override_changes_one_value(folder):
    energy = {"fn": "aimnet2mult.train.loss.energy_loss_fn", "weight": 2.0}
    path = write(folder / "train.yaml", {"loss": {"kwargs": {"components": {"energy": energy}}}})
    assert load_config(path, files()).loss.kwargs["components"] == {"energy": energy}
    overridden = load_config(None, [*files(), "loss.kwargs.components.forces.weight=0.7"]).loss.kwargs["components"]
    assert list(overridden) == ["energy", "forces", "charges", "spin_charges"]
    assert overridden["forces"]["weight"] == 0.7
    assert overridden["forces"]["kwargs"]["key_true"] == "forces"


def test_null_removes_an_entry(folder):
    removed = ["data.y=[energy, forces]", *(f"loss.kwargs.components.{q}=null" for q in ("charges", "spin_charges"))]
    config = load_config(None, [*files(), *removed, "metrics.kwargs.cfg.charges=null"])
    assert list(config.loss.kwargs["components"]) == ["energy", "forces"]
    assert list(config.metrics.kwargs["cfg"]) == ["energy", "forces", "spin_charges"]


def test_null_for_an_entry_that_is_nowhere_is_refused(folder):
    (line,) = problems("loss.kwargs.components.charge=null")
    assert line.startswith("loss.kwargs.components.charge: null removes an entry, but there is none of this name; did")
    # Entries of the packaged file that a file of settings has replaced are gone already.
    settings = {"metrics": {"kwargs": {"cfg": {"energy": {"abbr": "E"}}}}}
    config = load_config(write(folder / "train.yaml", settings), [*files(), "metrics.kwargs.cfg.charges=null"])
    assert list(config.metrics.kwargs["cfg"]) == ["energy"]


def test_another_scheduler_does_not_inherit_the_settings_of_the_packaged_one(folder):
    cosine = ["scheduler.class=torch.optim.lr_scheduler.CosineAnnealingLR", "scheduler.kwargs.T_max=10"]
    scheduler = load_config(None, [*files(), *cosine]).scheduler
    assert scheduler.kwargs == {"T_max": 10}
    assert scheduler.terminate_on_low_lr is None
    kept = load_config(None, [*files(), "scheduler.terminate_on_low_lr=1e-6", *cosine]).scheduler
    assert kept.terminate_on_low_lr == 1e-6


def test_numbers_in_exponent_form_are_numbers(folder):
    config = load_config(None, [*files(), "optimizer.kwargs.lr=1e-3", "optimizer.kwargs.eps=1E-9"])
    assert config.optimizer.kwargs["lr"] == 1e-3
    assert config.optimizer.kwargs["eps"] == 1e-9


@pytest.mark.parametrize("text", ["1e5", "2026_01", "007", "yes", "12:30"])
def test_texts_on_the_command_line_are_as_they_are_typed(folder, text):
    assert load_config(None, [*files(), f"run_name={text}"]).run_name == text
    assert load_config(None, [*files(), f"run_name='{text}'"]).run_name == text


def test_references_between_keys_and_marks_for_later_work(folder):
    settings = {"run_name": "???", "checkpoint": {"filename_prefix": "${project_name}-a"}, "project_name": "nitro"}
    config = load_config(write(folder / "train.yaml", settings), files())
    assert config.checkpoint.filename_prefix == "nitro-a"
    assert config.run_name.startswith("run_")


def test_names_default_to_time_and_folder(folder):
    config = load_config(None, files())
    assert config.project_name == folder.name
    assert load_config(None, [*files(), "run_name=a"]).run_name == "a"


def test_null_switches_sections_off_and_a_mapping_switches_them_on(folder):
    config = load_config(None, [*files(), "scheduler=null", "data.sae=null", "wandb.init.mode=disabled"])
    assert config.scheduler is None
    assert config.data.sae is None
    assert config.wandb.init.mode == "disabled"
    assert load_config(None, files()).wandb is None


def test_log_frequency_under_its_name_in_wandb(folder):
    config = load_config(None, [*files(), "wandb.log_frequency.train=7"])
    assert config.log_frequency.train == 7
    assert config.wandb is None
    path = write(folder / "t.yaml", {"wandb": {"log_frequency": {"val": 5}}, "log_frequency": {"val": 6}})
    assert "wandb.log_frequency: contradicts log_frequency" in problems(path=path)[0]


def test_one_sae_file_for_one_dataset(folder):
    config = load_config(None, ["data.fidelity_datasets.0=fid0.h5", "data.sae.energy.file=sae0.yaml"])
    assert config.data.sae.energy.file == folder / "sae0.yaml"
    assert any(p.startswith("data.sae.energy.file: given together") for p in problems("data.sae.energy.file=sae0.yaml"))


def test_resolved_settings_load_again_and_give_the_same(folder):
    config = load_config(None, [*files(), "wandb.init.tags=[a, b]", "data.fidelity_weights.1=2"])
    again = load_config(write(folder / "resolved.yaml", to_dict(config)))
    assert again == config


@pytest.mark.parametrize(
    "changes",
    [
        ["scheduler=null", "data.sae=null", "trainer.ema=null"],
        ["scheduler={class: torch.optim.lr_scheduler.CosineAnnealingLR, kwargs: {T_max: total}, unit: iteration}"],
        ["scheduler.warmup={}", "scheduler.kwargs.metric_name={fid0/F_mae: 1, val/loss: 0.5}"],
        ["checkpoint.monitor={fid1/E_rmse: 2}", "trainer.early_stopping={min_delta: 1e-5}", "tensorboard={}"],
        ["optimizer.class=torch.optim.AdamW", "optimizer.kwargs.betas=[0.9, 0.99]", "wandb.watch_model={}"],
        ["optimizer.param_groups.a={re: '^afv', lr: 1e-5}", "optimizer.freeze_fidelities=[fid2]"],
        ["loss.class=aimnet2mult.train.loss.MTAdaWLoss", "loss.kwargs.eta=0.01", "init_from={fid1: dft}"],
        ["loss.kwargs.components.forces.fidelity_weights={fid1: 0.5}", "metrics.kwargs.cfg.charges=null"],
    ],
)
def test_resolved_settings_of_all_kinds_load_again(folder, changes):
    config = load_config(None, [*files(), *changes])
    (folder / "resolved.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(folder / "resolved.yaml") == config
    assert load_config(to_dict(config)) == config


@pytest.mark.parametrize("name", ["train.yaml", "train_small.yaml"])
def test_settings_of_the_examples_are_valid(folder, name):
    sae = [f"data.fidelities.{level}.sae=sae{f}.yaml" for f, level in enumerate(("dft", "gfn2", "gfn1"))]
    config = load_config(EXAMPLES / "config" / name, sae)
    fidelities = named_fidelities(config)
    assert fidelities["dft"].files == [EXAMPLES / "data" / "fid0_dft_train.h5"]
    assert {name: fidelity.weight for name, fidelity in fidelities.items()} == {"dft": 3.0, "gfn2": 1.0, "gfn1": 1.0}


# --------------------------------------------------------------------------------------------------
# refusing
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.epoch=3", "trainer.epoch: unknown key (command line); did you mean epochs?"),
        ("data.val_fractoin=0.1", "data.val_fractoin: unknown key (command line); did you mean val_fraction"),
        ("data.samplers.train.kwargs.batch_sise=1", "data.samplers.train.kwargs.batch_sise: unknown key"),
        ("trainer.epochs=many", "trainer.epochs: expected an integer, found 'many' (command line)"),
        ("trainer.epochs=1.5", "trainer.epochs: expected an integer, found 1.5"),
        ("trainer.epochs=null", "trainer.epochs: expected an integer, found None"),
        ("trainer.epochs=0", "trainer.epochs: expected 1 or more, found 0"),
        ("data.val_fraction=half", "data.val_fraction: expected a number, found 'half'"),
        ("data.val_fraction=1.0", "data.val_fraction: expected a fraction in [0, 1), found 1.0"),
        ("data.separate_val=maybe", "data.separate_val: expected true or false, found 'maybe'"),
        ("data.y=energy", "data.y: expected a list, found 'energy'"),
        ("data.y=[energy, force]", "data.y: 'force' is not known; did you mean forces?"),
        ("data.x=[coord, charge]", "data.x: numbers is missing"),
        ("data=3", "data: expected a mapping, found 3"),
        ("seed=-1", "seed: expected a number from 0 to"),
        ("device=gpu", "device: expected auto, cpu, cuda or cuda:N, found 'gpu'"),
        ("fidelity_offset=100", "fidelity_offset: must be at least 129, found 100"),
        ("epochs", "epochs: expected key=value"),
        ("trainer..epochs=1", "trainer..epochs=1: expected key=value"),
        ("data.y=[energy", "data.y: '[energy' is not a YAML value"),
        ("run_name=${nowhere}", "run_name: Interpolation key 'nowhere' not found"),
        (
            "data.fidelity_datasets.dft=fid0.h5",
            "data.fidelity_datasets: fidelities are the numbers 0, 1, ..., found 'dft'",
        ),
        (
            "data.fidelity_datasets.4=fid0.h5",
            "data.fidelity_datasets: fidelities must be 0..3 without gaps, found 0, 1, 2, 4",
        ),
        ("data.fidelity_datasets.1=none.h5", "none.h5: no such file"),
        ("data.fidelity_datasets.1=.", "is a folder"),
        ("data.val_fidelity_datasets.0=none.h5", "data.val_fidelity_datasets.0: "),
        (
            "data.val_fidelity_datasets.5=fid0.h5",
            "data.val_fidelity_datasets: fidelity 5 has no dataset (datasets: 0, 1, 2)",
        ),
        (
            "data.fidelity_weights.3=1",
            "data.fidelity_weights: fidelity 3 has no dataset (datasets: 0, 1, 2). Add data.",
        ),
        ("data.fidelity_weights.1=-1", "data.fidelity_weights.1: expected a weight of 0 or more, found -1.0"),
        ("data.fidelity_weights.1=nan", "data.fidelity_weights.1: expected a weight of 0 or more"),
        ("data.fidelity_weights={0: 0, 1: 0, 2: 0}", "data.fidelity_weights: all weights are 0"),
        ("data.sae.energy.files.1=none.yaml", "data.sae.energy.files.1: "),
        ("data.sae.energy.mode=linear", "data.sae.energy.mode: 'linear' is not a mode"),
        ("data.samplers.train.kwargs.batch_size=0", "data.samplers.train.kwargs.batch_size: expected 1 or more"),
        ("data.samplers.val.kwargs.batches_per_epoch=0", "data.samplers.val.kwargs.batches_per_epoch: expected"),
        ("data.samplers.train.kwargs.batch_mode=atom", "'atom' is not a mode; did you mean atoms?"),
        ("data.samplers.train.kwargs.sampling_strategy=balance", "'balance' is not a strategy; did you mean balanced?"),
        ("data.loaders.val.num_workers=-1", "data.loaders.val.num_workers: expected 0 or more"),
        (
            "loss.class=aimnet2mult.train.loss.MTLos",
            "loss.class: aimnet2mult.train.loss.MTLos: aimnet2mult.train.loss has",
        ),
        ("loss.kwargs.component={}", "loss.kwargs.component: aimnet2mult.train.loss.MTLoss has no such option"),
        (
            "loss.kwargs.components.forces.weigth=1",
            "loss.kwargs.components.forces.weigth: unknown key; did you mean weight?",
        ),
        (
            "loss.kwargs.components.forces.weight=-1",
            "loss.kwargs.components.forces.weight: expected a number of 0 or more",
        ),
        ("loss.kwargs.components.forces.kwargs.key=1", "loss.kwargs.components.forces.kwargs.key: "),
        ("loss.kwargs.components.forces.fn=aimnet2mult.train.loss.peratom", "did you mean peratom_loss_fn"),
        ("loss.kwargs.components.new={weight: 1}", "loss.kwargs.components.new.fn: is missing"),
        ("data.y=[energy, forces, charges]", "spin_charges: needs the label spin_charges, which data.y does not list"),
        (
            "optimizer.class=torch.optim.Radam",
            "optimizer.class: torch.optim.Radam: torch.optim has no Radam; did you mean RAdam",
        ),
        ("optimizer.class=torch.nn.Linear", "optimizer.class: torch.nn.Linear is not an optimizer"),
        ("optimizer.kwargs.lrr=1", "optimizer.kwargs.lrr: torch.optim.RAdam has no such option; did you mean lr?"),
        ("optimizer.kwargs.lr=fast", "optimizer.kwargs.lr: expected a positive learning rate, found 'fast'"),
        ("optimizer.kwargs.betas=[2, 0.9]", "optimizer: torch.optim.RAdam: Invalid beta parameter"),
        ("optimizer.param_groups.a.lr=1e-3", "optimizer.param_groups.a: expected a mapping with the pattern re"),
        (
            "optimizer.param_groups.a={re: 'x(', lr: 1e-3}",
            "optimizer.param_groups.a.re: 'x(' is not a regular expression",
        ),
        ("optimizer.param_groups.a={re: x, rate: 1e-3}", "optimizer.param_groups.a.rate: unknown option"),
        ("optimizer.force_train=['*']", "optimizer.force_train: '*' is not a regular expression"),
        ("optimizer.grad_clip.max_norm=0", "optimizer.grad_clip.max_norm: expected a positive number or null"),
        ("scheduler.class=torch.optim.Adam", "scheduler.class: Adam is not a scheduler"),
        (
            "scheduler.kwargs.patiens=1",
            f"scheduler.kwargs.patiens: {PLATEAU} has no such option; did you mean patience?",
        ),
        ("scheduler.kwargs.factor=2", f"scheduler: {PLATEAU}: Factor should be < 1.0"),
        (f"scheduler={{class: {STEP}, kwargs: {{step_size: 0}}}}", f"scheduler.kwargs: {STEP}: "),
        ("scheduler.terminate_on_low_lr=1", "scheduler.terminate_on_low_lr: expected a rate between 0 and"),
        ("scheduler.unit=iteration", f"scheduler.unit: {PLATEAU} needs a validation for each step"),
        ("scheduler.unit=step", "scheduler.unit: 'step' is not a unit"),
        ("data.val_fraction=0", "scheduler: needs validation errors, but there is no validation data"),
        ("data.val_fraction=0", "checkpoint.save_best: needs validation errors"),
        ("checkpoint.kwargs.n_saved=0", "checkpoint.kwargs.n_saved: 0; keep one checkpoint or more"),
        ("checkpoint.filename_prefix=a/b", "checkpoint.filename_prefix: 'a/b' cannot begin the name of a file"),
        ("log_frequency.train=0", "log_frequency.train: expected 1 or more"),
        ("log_frequency.val=0", "log_frequency.val: expected 1 or more"),
        ("wandb.init.mode=onlin", "wandb.init.mode: 'onlin' is not a mode; did you mean online"),
        ("wandb.init.nam=x", "wandb.init.nam: unknown key (command line); did you mean name?"),
        ("wandb.watch_model.log=some", "wandb.watch_model.log: expected gradients, parameters or all"),
        ("metrics.class=aimnet2mult.train.metrics.Reg", "metrics.class: "),
        ("metrics.kwargs.cgf={}", "metrics.kwargs.cgf: "),
        ("metrics.kwargs.cfg.energy.scale=0", "metrics.kwargs.cfg.energy.scale: 0 is not a positive number"),
        (
            "loss.kwargs.components.new={fn: aimnet2mult.train.loss.mse_loss_fn, weight: 1}",
            "loss.kwargs.components.new",
        ),
        ("metrics.kwargs.cfg.energy=E", "metrics.kwargs.cfg.energy: expected a mapping"),
    ],
)
def test_nonsense_is_refused_by_its_dotted_key(folder, override, message):
    assert any(message in line for line in problems(override)), problems(override)


def test_all_problems_come_in_one_message(folder):
    lines = problems("trainer.epoch=3", "data.val_fraction=2", "data.fidelity_weights.7=1")
    assert len(lines) == 3


# --------------------------------------------------------------------------------------------------
# fidelities with names
# --------------------------------------------------------------------------------------------------

NAMED = {
    "ccsd": {"files": "fid0.h5", "sae": "sae0.yaml", "weight": 9, "level": "DLPNO-CCSD(T)/CBS", "dispersion": "none"},
    "gfn2": {"files": ["fid1.h5", "fid2.h5"], "sae": "sae1.yaml", "dispersion": {"d4": "gfn2"}},
}


def named(folder, *overrides, **changes):
    """Load settings with the fidelities `NAMED`, changed by name."""
    fidelities = {name: {**entry, **changes.get(name, {})} for name, entry in NAMED.items()}
    return load_config(write(folder / "train.yaml", {"data": {"fidelities": fidelities}}), overrides)


def named_problems(folder, *overrides, **changes):
    with pytest.raises(ValueError, match=r"\w: ") as caught:
        named(folder, *overrides, **changes)
    return str(caught.value).splitlines()


def test_named_fidelities_are_numbered_in_the_order_of_the_file(folder):
    config = named(folder, "data.fidelities.gfn2.weight=0.5", "data.fidelities.gfn2.dispersion=unknown")
    fidelities = named_fidelities(config)
    assert list(fidelities) == ["ccsd", "gfn2"]
    assert fidelities["ccsd"].files == [folder / "fid0.h5"]
    assert fidelities["gfn2"].files == [folder / "fid1.h5", folder / "fid2.h5"]
    assert (fidelities["ccsd"].weight, fidelities["gfn2"].weight) == (9.0, 0.5)
    assert fidelities["gfn2"].dispersion == "unknown"
    assert fidelities["ccsd"].level == "DLPNO-CCSD(T)/CBS"


def test_an_override_replaces_what_is_said_about_dispersion(folder):
    config = named(folder, "data.fidelities.gfn2.dispersion={d3bj: pbe}")
    assert named_fidelities(config)["gfn2"].dispersion == {"d3bj": "pbe"}


def test_a_fidelity_can_be_added_and_removed_on_the_command_line(folder):
    config = named(folder, "data.fidelities.gfn2=null", "data.fidelities.pm7={files: fid2.h5, sae: sae2.yaml}")
    assert list(named_fidelities(config)) == ["ccsd", "pm7"]


def test_a_pattern_stands_for_files(folder):
    config = named(folder, ccsd={"files": "fid[01].h5"})
    assert named_fidelities(config)["ccsd"].files == [folder / "fid[01].h5"]
    assert "nothing_*.h5" in "".join(named_problems(folder, ccsd={"files": "nothing_*.h5"}))


def test_numbered_fidelities_have_names_too(folder):
    config = load_config(None, [*files(2), "data.fidelity_weights.1=3", "data.fidelity_datasets.0=[fid0.h5, fid2.h5]"])
    fidelities = named_fidelities(config)
    assert list(fidelities) == ["fid0", "fid1"]
    assert fidelities["fid0"].files == [folder / "fid0.h5", folder / "fid2.h5"]
    assert (fidelities["fid0"].weight, fidelities["fid1"].weight) == (1.0, 3.0)
    assert fidelities["fid1"].sae == folder / "sae1.yaml"


@pytest.mark.parametrize("text", ["1e5", "12e45678", "1_000", "0x1f", "12:30:00", "yes", "null", "a: b # c, 'x' ωB97"])
def test_settings_that_a_run_stores_load_again(folder, text):
    config = named(folder)
    config.run_name = config.data.fidelities["ccsd"].level = text
    config.data.fidelities["gfn2"].dispersion = {"d4": text}
    (folder / "stored").mkdir()
    (folder / "stored" / "train.yaml").write_text(to_yaml(config), encoding="utf-8")
    again = load_config(folder / "stored" / "train.yaml")
    assert to_dict(again) == to_dict(config)
    assert list(again.data.fidelities) == list(config.data.fidelities)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ccsd": {"file": "x"}}, "data.fidelities.ccsd.file: unknown key"),
        ({"ccsd": {"files": "none.h5"}}, "none.h5"),
        ({"ccsd": {"files": []}}, "data.fidelities.ccsd.files: is missing"),
        ({"ccsd": {"files": 3}}, "data.fidelities.ccsd.files: expected a list of files' names, found 3"),
        ({"ccsd": {"files": [["a.h5"]]}}, "data.fidelities.ccsd.files: expected a list of files' names"),
        ({"ccsd": {"weight": "${nowhere}"}}, "data.fidelities.ccsd.weight: Interpolation key 'nowhere' not found"),
        ({"ccsd": {"val_files": "none.h5"}}, "data.fidelities.ccsd.val_files: "),
        ({"ccsd": {"weight": -1}}, "data.fidelities.ccsd.weight: expected a weight of 0 or more"),
        ({"ccsd": {"sae": None}}, "data.fidelities.ccsd.sae: is missing. Make one with `python -m"),
        ({"ccsd": {"sae": "none.yaml"}}, "data.fidelities.ccsd.sae: "),
        ({"ccsd": {"dispersion": "d5"}}, "data.fidelities.ccsd.dispersion"),
        ({"ccsd": {"dispersion": {"d3bj": "b4lyp"}}}, "b3lyp"),
        ({"ccsd": {"subtract_dispersion": True}}, "data.fidelities.ccsd.subtract_dispersion: "),
        ({"gfn2": {"subtract_dispersion": True}}, "data.fidelities.gfn2.subtract_dispersion: "),
        ({"ccsd": {"weight": 0}, "gfn2": {"weight": 0}}, "data.fidelities: all weights are 0"),
    ],
)
def test_nonsense_about_a_named_fidelity_is_refused(folder, changes, message):
    assert any(message in line for line in named_problems(folder, **changes)), named_problems(folder, **changes)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.fidelity_weights.0=2",
            "data.fidelity_weights: given together with data.fidelities; use data.fidelities",
        ),
        ("data.fidelity_datasets.0=fid0.h5", "use data.fidelities.<name>.files"),
        ("data.sae.energy.files.0=sae0.yaml", "use data.fidelities.<name>.sae"),
        ("data.fidelities.0.files=fid0.h5", "data.fidelities.0: a name consists of letters"),
        ("data.fidelities.a/b={files: fid0.h5, sae: sae0.yaml}", "data.fidelities.a/b: a name consists of letters"),
        ("data.fidelities.ccsd=3", "data.fidelities.ccsd: expected a mapping, found 3"),
        ("data.fidelities.gfn3=null", "data.fidelities.gfn3: null removes an entry, but there is none of this name"),
        ("data.fidelities.gfn3.weight=2", "data.fidelities.gfn3.files: is missing; the HDF5 file of this fidelity, "),
        ("data.fidelities.gfn3.weight=2", "did you mean gfn2?"),
        ("data.fidelities.all={files: fid0.h5, sae: sae0.yaml}", "data.fidelities.all: stands for all data"),
        (
            "data.fidelities.fid1={files: fid0.h5, sae: sae0.yaml}",
            "fid1: is the name of fidelity 1 where none is given",
        ),
        ("data.dispersion_cache=ram", "data.dispersion_cache: 'ram' is not known; known: disk, none"),
        ("data.samplers.train.kwargs.shares={ccsd: 1}", "shares: go with sampling_strategy: shares"),
        ("data.samplers.train.kwargs.sampling_strategy=shares", "shares: go with sampling_strategy: shares"),
        ("data.samplers.train.kwargs.max_padding=1", "max_padding: expected a share in [0, 1)"),
        ("data.loaders.train.prefetch_factor=2", "data.loaders.train.prefetch_factor: needs reader processes"),
        ("data.loaders.val.persistent_workers=true", "data.loaders.val.persistent_workers: needs reader processes"),
        ("data.loaders.val={num_workers: 1, prefetch_factor: 0}", "prefetch_factor: expected 1 or more, found 0"),
    ],
)
def test_contradictions_are_refused(folder, override, message):
    assert any(message in line for line in named_problems(folder, override)), named_problems(folder, override)


def test_what_was_refused_is_not_missing_too(folder):
    for changes in ({"files": 3}, {"sae": [1]}, {"weight": None}):
        (line,) = named_problems(folder, ccsd=changes)
        assert "is missing" not in line
    for fidelities in (3, {"a": None}, {"a": "fid0.h5"}):
        with pytest.raises(ValueError, match=r"data\.fidelities") as caught:
            load_config(write(folder / "train.yaml", {"data": {"fidelities": fidelities}}))
        assert len(str(caught.value).splitlines()) == 1


def test_a_name_as_without_names_for_the_same_number(folder):
    config = named(folder, "data.fidelities.fid2={files: fid0.h5, sae: sae0.yaml}")
    assert list(named_fidelities(config)) == ["ccsd", "gfn2", "fid2"]


def test_weights_that_are_not_used_may_be_zero(folder):
    zero = {"ccsd": {"weight": 0}, "gfn2": {"weight": 0}}
    assert named(folder, "data.samplers.train.kwargs.sampling_strategy=balanced", **zero)
    assert named(folder, "data.samplers.train.kwargs.shuffle=false", **zero)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ("{ccsd: 0.5, gfn3: 0.5}", "shares: there is no fidelity 'gfn3'; did you mean gfn2?"),
        ("{ccsd: 1.0}", "shares: gfn2 is missing"),
        ("{ccsd: 0.5, gfn2: 0.4}", "shares: sum to 0.9, expected 1"),
        ("{ccsd: 1.5, gfn2: -0.5}", "shares: expected shares of 0 or more"),
    ],
)
def test_shares_that_are_none(folder, shares, message):
    key = "data.samplers.train.kwargs"
    lines = named_problems(folder, f"{key}.shares={shares}", f"{key}.sampling_strategy=shares")
    assert any(message in line for line in lines), lines


def test_shares_by_name(folder):
    key = "data.samplers.train.kwargs"
    config = named(folder, f"{key}.shares={{ccsd: 0.25, gfn2: 0.75}}", f"{key}.sampling_strategy=shares")
    assert config.data.samplers.train.kwargs.shares == {"ccsd": 0.25, "gfn2": 0.75}


def test_missing_sae_names_the_remedy(folder):
    with pytest.raises(ValueError, match=r"fidelity 1 has no SAE file. Make one with `python -m .*calc_sae .*fid1.h5"):
        load_config(None, [o for o in files() if "files.1" not in o])


def test_no_dataset(folder):
    with pytest.raises(ValueError, match=r"data\.fidelities: no dataset given"):
        load_config()


def test_files_that_cannot_be_read(folder):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml: no such file"):
        load_config("none.yaml")
    with pytest.raises(FileNotFoundError, match="is a folder, not a file of settings"):
        load_config(folder)
    for text in ("- a\n- b\n", "a: [1\n", "seed: 1\nseed: 2\n", "a: \xff"):
        Path("bad.yaml").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=r"bad\.yaml: "):
            load_config("bad.yaml", files())


def test_wandb_that_is_not_installed_is_named(folder, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert any('pip install "aimnet2mult[train]"' in line for line in problems("wandb.init.project=x"))
    load_config(None, [*files(), "wandb.init.mode=disabled"])
