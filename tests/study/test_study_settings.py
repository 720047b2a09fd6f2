"""Settings of a study: what is wrong is said at once, with its key and what would be right."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from aimnet2mult.study.commands import Commands, Part, Stage, pretraining_key, text
from aimnet2mult.study.settings import equal_shares, load_study, pretraining_steps, shares_by_size

FIXTURES = Path(__file__).parents[1] / "fixtures"
EXAMPLES = Path(__file__).parents[2] / "examples" / "learning_curve"

STUDY = {
    "target": "dft",
    "model": "model.yaml",
    "train": "train.yaml",
    "fidelities": {"dft": {"files": "fid0.h5"}, "gfn2": {"files": "fid1.h5"}, "gfn1": {"files": "fid2.h5"}},
    "test": "fid0.h5",
    "fractions": [0.1, 1.0],
    "steps": 100,
    "validate_every": 10,
    "protocols": {"target_only": {}, "mixed": {}, "fine_tune": {}, "joint": {}, "delta": {}},
}


@pytest.fixture
def folder(tmp_path):
    for f in range(3):
        (tmp_path / f"fid{f}.h5").symlink_to(FIXTURES / f"tiny_fid{f}.h5")
    (tmp_path / "model.yaml").symlink_to(FIXTURES / "ref_mixed_model.yaml")
    (tmp_path / "train.yaml").write_text("optimizer: {kwargs: {lr: 1.0e-3}}\n")
    return tmp_path


def load(folder, *overrides, **changes):
    (folder / "study.yaml").write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return load_study(folder / "study.yaml", overrides)


def check(folder, *overrides, **changes):
    """Load a study and check the settings of its training runs."""
    Commands(load(folder, *overrides, **changes), folder / "out").check()


@pytest.mark.parametrize("name", ["study.yaml", "sharing.yaml", "unseen.yaml"])
def test_the_studies_of_the_examples(name, tmp_path):
    Commands(load_study(EXAMPLES / name), tmp_path).check()


def test_the_commands_of_the_example(tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLES)
    blocks = re.findall(r"```bash\n(.*?)```", (EXAMPLES / "README.md").read_text(), re.DOTALL)
    changed = 0
    for command in "".join(blocks).replace("\\\n", " ").splitlines():
        overrides = [word for word in shlex.split(command) if "=" in word]
        config = re.search(r"--config (\S+)", command)
        if config:
            Commands(load_study(config[1], overrides), tmp_path).check()
            changed += bool(overrides)
    assert changed == 2


def test_paths_are_relative_to_the_file(folder, monkeypatch):
    monkeypatch.chdir("/")
    study = load(folder)
    assert study.model == folder / "model.yaml"
    assert study.fidelities["gfn2"].files == [folder / "fid1.h5"]
    assert study.test == [folder / "fid0.h5"]


def test_overrides_from_the_command_line(folder):
    study = load(
        folder, "steps=50", "protocols.mixed.shares={dft: 0.5, gfn2: 0.25, gfn1: 0.25}", "protocols.joint=null"
    )
    assert study.steps == 50
    assert study.protocols["mixed"].shares == {"dft": 0.5, "gfn2": 0.25, "gfn1": 0.25}
    assert "joint" not in study.protocols


def test_replicates_pair_orders_and_seeds(folder):
    study = load(folder, seeds=2, subsets={"default": 1, 0.1: 3})
    assert study.replicates(0.1) == [(0, 0), (1, 1), (2, 0)]
    assert study.replicates(0.5) == [(0, 0), (0, 1)]
    assert load(folder, seeds=1, subsets=3).replicates(1.0) == [(0, 0)]  # all molecules: there is one subset


def test_a_protocol_may_have_fewer_fractions(folder):
    study = load(folder, protocols={"mixed": {"fractions": [1.0]}, "joint": {}})
    assert study.fractions_of("mixed") == [1.0]
    assert study.fractions_of("joint") == [0.1, 1.0]
    with pytest.raises(ValueError, match=r"protocols.mixed.fractions: expected some of the study's \[0.1, 1.0\]"):
        load(folder, protocols={"mixed": {"fractions": [0.5]}})


def test_shares_and_steps_by_default(folder):
    study = load(folder, protocols={"fine_tune": {"pretraining": 0.34}, "joint": {}})
    assert equal_shares(["gfn2", "gfn1"]) == {"gfn2": 0.5, "gfn1": 0.5}
    assert pretraining_steps(study, "fine_tune") == 30
    assert pretraining_steps(study, "joint") == 80


def test_scarce_fidelities_are_drawn_more_often_than_they_occur():
    shares = shares_by_size({"dft": 82, "gfn2": 12967, "gfn1": 14907})
    assert shares == pytest.approx({"dft": 0.097, "gfn2": 0.442, "gfn1": 0.461})
    for counts in ({"a": 1, "b": 1, "c": 1}, {"a": 7, "b": 10**8}):
        shares = shares_by_size(counts)
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-12)
        assert min(shares.values()) > 0


def test_protocols_that_pretrain_alike_share_it(folder):
    protocols = {"fine_tune": {}, "joint": {}, "other": {"kind": "joint", "pretraining_settings": {"seed": 3}}}
    study = load(folder, protocols=protocols)
    assert pretraining_key(study, "fine_tune") == pretraining_key(study, "joint") != pretraining_key(study, "other")


def test_a_protocol_may_have_a_model_of_its_own(folder):
    (folder / "other.yaml").symlink_to(FIXTURES / "ref_mixed_model.yaml")
    protocols = {"joint": {}, "other": {"kind": "joint", "model": "other.yaml"}}
    study = load(folder, protocols=protocols)
    assert pretraining_key(study, "joint") != pretraining_key(study, "other")
    commands = Commands(study, folder / "out")
    for name, expected in (("joint", "../model.yaml"), ("other", "../other.yaml")):
        stage = Stage((Part("gfn2", ("fid1.h5",)),), 10, 1e-3, 0, {}, {}, model=study.protocols[name].model)
        command = commands.train("run", stage)
        assert command.arguments[command.arguments.index("--model") + 1] == expected
        assert expected in command.inputs


def test_the_settings_of_all_kinds_are_right(folder):
    check(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": {}}, r"protocol: unknown key .*did you mean protocols"),
        ({"protocols": {"mixed": {"share": {}}}}, r"protocols.mixed.share: unknown key .*did you mean shares"),
        ({"target": "dtf"}, r"target: there is no fidelity 'dtf'; did you mean dft\?"),
        (
            {"protocols": {"fine_tuned": {}}},
            r"protocols.fine_tuned.kind: 'fine_tuned' is not known; did you mean fine_t",
        ),
        ({"protocols": {}}, "protocols: none given"),
        (
            {"protocols": {"target_only": {"shares": {"dft": 1.0}}}},
            "protocols.target_only.shares: .* has no such option",
        ),
        (
            {"protocols": {"mixed": {"shares": {"dft": 1.0}}}},
            "mixed.shares: expected a share for each of dft, gfn2, gfn1",
        ),
        ({"protocols": {"mixed": {"shares": {"dft": 0.5, "gfn2": 0.5, "gfn1": 0.5}}}}, "positive shares of sum 1"),
        ({"protocols": {"delta": {"low": "dft"}}}, "delta.low: 'dft' is not a fidelity beside the target"),
        ({"protocols": {"joint": {"pretraining": 1.5}}}, r"joint.pretraining: expected a share in \(0, 1\)"),
        ({"protocols": {"joint": {"pretraining": 0.01}}}, "joint.pretraining: leaves no steps before or after"),
        ({"protocols": {"target_only": {"reference": "anchored"}}}, "target_only.reference: .* nothing to anchor on"),
        ({"protocols": {"mixed": {"reference": "plane"}}}, "mixed.reference: 'plane' is not known; did you mean plain"),
        ({"protocols": {"mixed": {"terms": ["chrage"]}}}, "mixed.terms: 'chrage' is not known; did you mean charge"),
        ({"fractions": [0.5, 0.1]}, "fractions: expected ascending shares"),
        ({"fractions": [0.1, 1.5]}, "fractions: expected ascending shares"),
        ({"subsets": {"default": 1, 0.3: 2}}, "subsets.0.3: is not among the fractions"),
        ({"seeds": 0}, "seeds: expected 1 or more"),
        ({"learning_rates": [0.0]}, "learning_rates: expected different positive numbers"),
        (
            {"protocols": {"mixed": {"learning_rates": [0.1, 0.1]}}},
            "protocols.mixed.learning_rates: expected different",
        ),
        ({"learning_rates": ["fast"]}, "learning_rates: expected a list"),
        ({"steps": 105}, r"steps: 105 is not a multiple of validate_every \(10\)"),
        ({"score": {"energy": 0.0, "forces": 0.0}}, "score: expected weights"),
        ({"validation": {"fraction": 1.0}}, r"validation.fraction: expected a share in \(0, 1\)"),
        ({"model": "modell.yaml"}, "model: .*modell.yaml: no such file"),
        ({"protocols": {"mixed": {"model": "modell.yaml"}}}, "protocols.mixed.model: .*modell.yaml: no such file"),
        ({"test": "absent.h5"}, "test: .*absent.h5"),
        (
            {"fidelities": {"dft": {"files": "fid0.h5"}}, "protocols": {"mixed": {}}},
            "mixed: needs a fidelity beside dft",
        ),
    ],
)
def test_wrong_settings(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        load(folder, **changes)


def test_all_problems_come_at_once(folder):
    with pytest.raises(ValueError, match="seeds") as error:
        load(folder, seeds=0, steps=7, target="x")
    assert len(str(error.value).splitlines()) >= 3


def test_what_is_missing_is_named(folder):
    (folder / "study.yaml").write_text("target: dft\n")
    with pytest.raises(ValueError, match=r"fidelities: is missing .*\n.*model: is missing"):
        load_study(folder / "study.yaml")


def test_training_settings_with_data_are_refused(folder):
    (folder / "train.yaml").write_text("data: {fidelities: {dft: {files: fid0.h5}}}\n")
    with pytest.raises(ValueError, match=r"train: .*train.yaml sets data.fidelities, which the study does"):
        load(folder)


def test_settings_of_a_protocol_are_checked_before_the_first_run(folder):
    with pytest.raises(ValueError, match=r"protocols.mixed: trainer.epoch: unknown key .*did you mean epochs"):
        check(folder, protocols={"mixed": {"settings": {"trainer.epoch": 3}}})
    with pytest.raises(ValueError, match=r"protocols.joint.pretraining: optimizer.class"):
        check(folder, protocols={"joint": {"pretraining_settings": {"optimizer.class": "torch.optim.Adamm"}}})


def test_values_on_a_command_line_are_read_as_they_were():
    values = ["plain/name.h5", "with space", "1e5", "true", 1.0e-5, None, True, [1, 2], {"dft": 0.4}, "a, b", ""]
    from omegaconf import OmegaConf

    for value in values:
        read = OmegaConf.to_container(OmegaConf.from_dotlist([text("key", value)]))["key"]
        assert read == value
        assert type(read) is type(value)
