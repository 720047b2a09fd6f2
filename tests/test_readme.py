"""What the README says works."""

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml

from aimnet2mult.models.base import build_model, load_model_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")), "benchmarks/README.md"]


def code_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path, fixtures_dir, sae_file, monkeypatch):
    """A working folder with the compiled models that the snippets name."""
    from aimnet2mult.tools.compile_jit import compile_model

    (tmp_path / "folder_of_compiled_models").mkdir()
    for f in range(2):
        compile_model(
            fixtures_dir / "ref_mixed.pt",
            tmp_path / "folder_of_compiled_models" / "model",
            model=fixtures_dir / "ref_mixed_model.yaml",
            fidelity_level=f,
            sae=sae_file,
        )
    shutil.copy(tmp_path / "folder_of_compiled_models" / "model_fid0.jpt", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", range(2), ids=["inference", "ase"])
def test_python_snippets_run(folder, number):
    if "ase" in code_blocks("python")[number]:
        pytest.importorskip("ase")
    # As a user would: a process of its own, where warnings are no errors.
    subprocess.run([sys.executable, "-c", code_blocks("python")[number]], check=True, cwd=folder, timeout=300)


@pytest.mark.parametrize("page", PAGES)
def test_modules_and_files_that_are_named_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for module in set(re.findall(r"python -m (aimnet2mult[\w.]+)", text)):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
    for script in set(re.findall(r"python (benchmarks/\w+\.py)", text)):
        assert (ROOT / script).is_file(), script
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target


def test_schedule_in_the_page_on_training_is_valid(fixtures_dir, tmp_path):
    pytest.importorskip("omegaconf")
    from aimnet2mult.train.configuration import load_config

    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    settings, _ = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "train.yaml").write_text(textwrap.dedent("  " + settings.lstrip()), encoding="utf-8")
    files = [f"data.fidelities.dft.files={fixtures_dir / 'tiny_fid0.h5'}", "data.sae=null"]
    schedule = load_config(tmp_path / "train.yaml", files).scheduler
    assert schedule.kwargs["T_max"] == "total"
    assert schedule.warmup.iterations == 1000


def test_readouts_in_the_page_on_training_and_in_the_example_make_a_model():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    _, readouts = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    config = load_model_config()
    written = yaml.safe_load(readouts)["outputs"]
    known = config["kwargs"]["outputs"]
    config["kwargs"]["outputs"] = {name: known[name] if node == "..." else node for name, node in written.items()}
    example = (ROOT / "examples" / "config" / "model.yaml").read_text(encoding="utf-8")
    with_options = yaml.safe_load(re.sub(r"^    # (\s*\w+:.*)$", r"    \1", example, flags=re.MULTILINE))
    for given in (config, with_options):
        model = build_model(given, 2)
        assert list(model.fidelity_readouts[1]) == ["energy_mlp", "atomic_scale", "atomic_shift", "charge_mlp"]
        assert list(model.shared_readouts) == ["atomic_sum", "charge_correction", "lrcoulomb"]
        out = model({"coord": torch.eye(3)[None], "numbers": torch.tensor([[208, 201, 201]])})
        assert out["charges"].sum().abs() < 1e-5


def test_settings_in_the_page_on_data_are_valid(tmp_path, monkeypatch):
    pytest.importorskip("omegaconf")
    from aimnet2mult.train.configuration import load_config
    from aimnet2mult.train.schema import named_fidelities

    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (settings,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    for name in ("ccsd", "wb97m_a", "wb97m_b_1", "wb97m_val", "gfn2"):
        (tmp_path / f"{name}.h5").touch()
        (tmp_path / f"sae_{name.partition('_')[0]}.yaml").touch()
    (tmp_path / "train.yaml").write_text(settings, encoding="utf-8")
    fidelities = named_fidelities(load_config(tmp_path / "train.yaml", ["data.fidelities.ccsd.weight=20"]))
    assert list(fidelities) == ["ccsd", "wb97m", "gfn2"]
    assert fidelities["ccsd"].weight == 20
    assert fidelities["wb97m"].subtract_dispersion


@pytest.mark.parametrize(
    "module", sorted(set(re.findall(r"python -m (aimnet2mult[\w.]+)", README))), ids=lambda m: m.rpartition(".")[2]
)
def test_help_of_every_command(module):
    result = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0
    assert "Usage:" in result.stdout


def test_ci_installs_and_tests_as_the_readme_says():
    commands = " ".join(code_blocks("bash")[1].split("&&"))
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for part in ("torch==2.13.0", '".[all,test]"', "pytest -n 2"):
        assert part in commands
        assert part in ci


def test_importing_the_package_loads_nothing_optional():
    code = (
        "import sys, aimnet2mult, aimnet2mult.models.jit_wrapper, aimnet2mult.data.mixed\n"
        "loaded = {'ignite', 'omegaconf', 'wandb', 'ase', 'matplotlib', 'dftd3', 'dftd4'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_importing_the_package_alone_does_not_load_torch():
    code = "import sys, aimnet2mult; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.slow
def test_the_example_from_beginning_to_end(tmp_path):
    """The example's scripts with one epoch; compiled models give what the checkpoint gives."""
    pytest.importorskip("ase")
    import os

    import numpy as np

    from aimnet2mult.data.sae import reference_energy
    from aimnet2mult.data.sgdataset import SizeGroupedDataset
    from aimnet2mult.models.base import build_model, load_checkpoint, load_weights
    from aimnet2mult.models.jit_wrapper import load_jit_model
    from aimnet2mult.nbops import encode_fidelity
    from aimnet2mult.tools.compile_jit import compile_model

    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    short = ["trainer.epochs=1", "data.samplers.train.kwargs.batches_per_epoch=60"]  # more steps than the warm-up
    for script in ("run_example.sh", "continue_training.sh"):
        subprocess.run(["bash", str(ROOT / "examples" / script), *short], check=True, env=environment, timeout=900)
    assert (tmp_path / "report" / "errors.md").is_file()
    assert (tmp_path / "report_dft" / "errors.md").is_file()

    checkpoint = load_checkpoint(tmp_path / "model.pt")
    model = build_model(checkpoint["model_config"], checkpoint["num_fidelities"]).eval()
    load_weights(model, checkpoint["model"])
    test = SizeGroupedDataset(ROOT / "examples" / "data" / "fid0_dft_test.h5")
    without_d3, _ = compile_model(tmp_path / "model.pt", tmp_path / "without_d3", fidelity_level=0)
    deployed = {
        0: load_jit_model(without_d3),
        1: load_jit_model(tmp_path / "compiled" / "model_fid1.jpt"),
        2: load_jit_model(tmp_path / "compiled" / "model_fid2.jpt"),
    }
    keys = ["coord", "numbers", "charge", "mult"]
    for _, arrays in test.read(np.arange(len(test)), keys):
        data = {key: torch.as_tensor(arrays[key]) for key in keys}
        for f, compiled in deployed.items():
            encoded = {**data, "numbers": encode_fidelity(data["numbers"].long(), f, 200)}
            with torch.no_grad():
                energy = model(encoded)["energy"].numpy() + reference_energy(arrays, checkpoint["sae"][f])
            np.testing.assert_allclose(compiled(data)["energy"], energy, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_example_of_fine_tuning(tmp_path):
    """The script with few epochs: a model is trained, exported, and trained further with other labels."""
    import os

    from aimnet2mult.models.base import load_checkpoint

    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment |= {"EPOCHS": "5", "PRETRAINING": "1"}  # more steps than the warm-up
    script = str(ROOT / "examples" / "fine_tune.sh")
    done = subprocess.run(["bash", script], check=True, env=environment, timeout=900, capture_output=True, text=True)
    assert "one charge channel becomes two" in done.stdout + done.stderr
    pretrained, tuned = load_checkpoint(tmp_path / "pretrained.pt"), load_checkpoint(tmp_path / "fine_tuned.pt")
    assert pretrained["model"]["conv_q.agh"].shape[0] == 1
    assert tuned["model"]["conv_q.agh"].shape[0] == 2
    for name in ("fine_tuned", "scratch"):
        assert (tmp_path / f"report_{name}" / "errors.md").is_file()


TOOLS = [
    f"aimnet2mult.{path.parent.name}.{path.stem}"
    for folder in ("train", "tools")
    for path in sorted((ROOT / "aimnet2mult" / folder).glob("*.py"))
    if "__main__" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("tool", TOOLS)
def test_help_waits_for_neither_torch_nor_h5py(tool):
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'h5py', 'ignite', 'ase', 'matplotlib')))"
    code = f"{blocked}; sys.argv = ['tool', '--help']; import runpy; runpy.run_module('{tool}', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout
