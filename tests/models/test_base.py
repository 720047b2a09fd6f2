import os

import pytest
import torch

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.models.aimnet2 import AIMNet2
from aimnet2mult.models.base import (
    CheckpointError,
    build_model,
    layout_of_weights,
    load_checkpoint,
    load_model_config,
    load_weights,
    save_checkpoint,
)
from aimnet2mult.models.mixed_fidelity_aimnet2 import MixedFidelityAIMNet2, fidelity_slice, has_shared_embedding
from aimnet2mult.nbops import encode_fidelity


@pytest.fixture
def small_config(fixtures_dir):
    return load_model_config(fixtures_dir / "ref_single_model.yaml")


def test_default_model_is_the_full_size_one():
    model = build_model(load_model_config())
    assert type(model) is AIMNet2
    assert model.cutoff == 5.0
    assert model.cutoff_lr == float("inf")
    assert 1.5e6 < sum(p.numel() for p in model.parameters()) < 2.5e6


def test_fidelities_start_equal_but_independent(small_config, molecules):
    model = build_model(small_config, 3)
    assert isinstance(model, MixedFidelityAIMNet2)
    assert model.afv.weight.shape[0] == 529
    data = molecules(torch.float32)
    energies = [model({**data, "numbers": encode_fidelity(data["numbers"], f, 200)})["energy"] for f in range(3)]
    assert torch.equal(energies[0], energies[1])
    assert torch.equal(energies[0], energies[2])
    heads = [dict(head.named_parameters()) for head in model.fidelity_readouts]
    for name in heads[0]:
        assert heads[0][name] is not heads[1][name]


def test_one_row_of_one_element_decides_whether_the_embedding_is_shared(small_config, reference_model):
    model = build_model(small_config, 3)
    assert has_shared_embedding(model)
    assert has_shared_embedding(reference_model("ref_single"))
    assert not has_shared_embedding(reference_model("ref_mixed"))
    table = model.afv.weight.detach()
    table[[8, 208, 408]] = torch.nan  # the mark of an element that nobody knows
    table[0] = 1.0  # padding belongs to no fidelity
    assert has_shared_embedding(model)
    table[400 + 6, 3] += 1e-6
    assert not has_shared_embedding(model)


@pytest.mark.parametrize("heads", [True, False])
def test_readouts_that_need_plain_atomic_numbers_get_them(small_config, molecules, heads):
    small_config["kwargs"]["outputs"]["dftd3"] = {
        "class": "aimnet2mult.modules.DFTD3",
        "kwargs": {"s8": 0.3908, "a1": 0.566, "a2": 3.128},
    }
    small_config["kwargs"]["outputs"]["dipole"] = {
        "class": "aimnet2mult.modules.Dipole",
        "kwargs": {"center_coord": True},
    }
    model = build_model(small_config, 2, use_fidelity_readouts=heads)
    assert any(key.startswith("outputs.energy_mlp") for key in model.state_dict()) != heads
    data = molecules(torch.float32)
    first, second = (model({**data, "numbers": encode_fidelity(data["numbers"], f, 200)}) for f in range(2))
    torch.testing.assert_close(first["energy"], second["energy"], rtol=0, atol=0)
    torch.testing.assert_close(first["dipole"], second["dipole"], rtol=0, atol=0)


def test_embedding_rows_differ_and_padding_is_zero(small_config):
    weight = build_model(small_config).afv.weight.detach()
    assert (weight[0] == 0).all()
    assert torch.linalg.matrix_rank(weight[1:].double()) == 8
    assert (torch.pdist(weight[1:]) > 1e-3).all()


def test_checkpoint_round_trip(tmp_path, small_config, molecules):
    model = build_model(small_config, 2)
    path = tmp_path / "model.pt"
    save_checkpoint(
        path,
        model,
        model_config=small_config,
        num_fidelities=2,
        fidelity_offset=200,
        use_fidelity_readouts=True,
        fidelity_names={0: "dft", 1: "xtb"},
        fidelity_levels={0: "B3LYP/def2-SVP"},
        dispersion={0: {"labels": {"method": "d3bj", "parameters": {"a1": 0.5}}, "subtracted": True}},
        sae={0: {1: -13.6}, 1: {1: -10.0}},
        species={0: [1], 1: [1]},
    )
    assert list(tmp_path.iterdir()) == [path]
    checkpoint = load_checkpoint(path)
    assert checkpoint["model_config"] == small_config
    assert checkpoint["sae"] == {0: {1: -13.6}, 1: {1: -10.0}}
    assert checkpoint["fidelity_names"] == {0: "dft", 1: "xtb"}
    assert checkpoint["fidelity_levels"] == {0: "B3LYP/def2-SVP"}
    assert checkpoint["dispersion"] == {
        0: {"labels": {"method": "d3bj", "parameters": {"a1": 0.5}}, "subtracted": True}
    }
    assert layout_of_weights(checkpoint["model"], {}, 200).num_fidelities == 2
    again = build_model(checkpoint["model_config"], 2)
    load_weights(again, checkpoint["model"])
    data = molecules(torch.float32)
    assert torch.equal(again(data)["energy"], model(data)["energy"])


def test_bare_state_dict_loads(tmp_path, small_config):
    path = tmp_path / "bare.pt"
    torch.save(build_model(small_config).state_dict(), path)
    assert layout_of_weights(load_checkpoint(path)["model"], {}, 200).num_fidelities == 1


def test_unused_copies_of_the_reference_layout_and_nothing_else(fixtures_dir):
    state = dict(load_checkpoint(fixtures_dir / "ref_mixed.pt")["model"])
    model = build_model(load_model_config(fixtures_dir / "ref_mixed_model.yaml"), 3)
    load_weights(model, state)
    with pytest.raises(CheckpointError, match=r"1 left over \(surprise\)"):
        load_weights(model, {**state, "surprise": torch.zeros(1)})
    del state["fidelity_readouts.2.energy_mlp.mlp.0.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing \(fidelity_readouts.2.energy_mlp.mlp.0.weight\)"):
        load_weights(model, state)


def test_weights_of_another_architecture(fixtures_dir):
    state = load_checkpoint(fixtures_dir / "ref_single.pt")["model"]
    with pytest.raises(CheckpointError, match=r"30 of another shape .*afv.weight \(128, 96\) instead of \(128, 256\)"):
        load_weights(build_model(load_model_config()), state)


def test_fidelity_slice_is_the_fidelity(fixtures_dir, reference_model, molecules):
    mixed = reference_model("ref_mixed")
    data = molecules()
    for f in range(3):
        state = fidelity_slice(mixed.state_dict(), f, 200)
        assert state["afv.weight"].shape[0] == 129
        config = load_model_config(fixtures_dir / "ref_mixed_model.yaml")
        config["kwargs"]["num_types"] = 129
        single = build_model(config).double().eval()
        load_weights(single, state)
        expected = mixed({**data, "numbers": encode_fidelity(data["numbers"], f, 200)})["energy"]
        torch.testing.assert_close(single(data)["energy"], expected, atol=1e-12, rtol=0)


def test_files_that_are_not_checkpoints(tmp_path, compiled):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_checkpoint(tmp_path / "absent.pt")
    text = tmp_path / "text.pt"
    text.write_text("not weights")
    with pytest.raises(CheckpointError, match=r"text\.pt: not a checkpoint"):
        load_checkpoint(text)
    other = tmp_path / "other.pt"
    torch.save({"epoch": 3}, other)
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_checkpoint(other)
    foreign = tmp_path / "foreign.pt"
    torch.save({"linear.weight": torch.zeros(1)}, foreign)
    with pytest.raises(CheckpointError, match=r"no afv\.weight"):
        load_checkpoint(foreign)
    with pytest.raises(CheckpointError, match="a compiled TorchScript model"):
        load_checkpoint(compiled)
    hostile = tmp_path / "hostile.pt"

    class Hostile:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"model": Hostile()}, hostile)
    with pytest.raises(CheckpointError, match="safely"):
        load_checkpoint(hostile)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kwargs: {}\n", "needs the keys class and kwargs"),
        ("class: aimnet2mult.models.aimnet2.AIMNet3\n", "did you mean AIMNet2"),
        ("class: torch.nn.Linear\n", "expected aimnet2mult.models.aimnet2.AIMNet2"),
        ("class: subprocess.Popen\n", "may only name classes"),
    ],
)
def test_model_files_that_are_not(tmp_path, text, message):
    path = tmp_path / "model.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_model_config(path)


def test_mistakes_in_the_model_file_are_named(small_config):
    small_config["kwargs"]["outputs"]["energy_mlp"]["kwargs"]["n_inn"] = 3
    with pytest.raises(ConfigError, match=r"outputs.energy_mlp.kwargs: unknown option n_inn"):
        build_model(small_config)


def test_disk_that_is_full_is_named(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"model\.pt: cannot be written; is the disk full"):
            save_checkpoint(
                tmp_path / "model.pt",
                {"w": torch.ones(100_000)},
                model_config=None,
                num_fidelities=1,
                fidelity_offset=200,
                use_fidelity_readouts=True,
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
