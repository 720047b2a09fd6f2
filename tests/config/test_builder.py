import pytest
import torch

from aimnet2mult.config.builder import MODEL_NAMESPACES, ConfigError, build_module, load_yaml, nearest, resolve


def test_build_gives_independent_objects_and_leaves_the_node():
    node = {"class": "aimnet2mult.modules.MLP", "kwargs": {"n_in": 2, "n_out": 1, "hidden": [3]}}
    a, b = build_module(node, MODEL_NAMESPACES), build_module(node, MODEL_NAMESPACES)
    assert a is not b
    assert a[0].weight is not b[0].weight
    assert node["kwargs"] == {"n_in": 2, "n_out": 1, "hidden": [3]}


def test_dispersion_and_electrostatics_resolve_as_modules():
    for name in ("LRCoulomb", "SRCoulomb", "DFTD3", "D3TS", "DispParam", "Output", "AtomicShift", "Forces"):
        assert issubclass(resolve(f"aimnet2mult.modules.{name}", MODEL_NAMESPACES), torch.nn.Module)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"class": "aimnet2mult.modules.Outpt"}, "did you mean Output"),
        ({"class": "aimnet2mult.modulles.Output"}, "no module aimnet2mult.modulles"),
        ({"class": "os.system", "args": ["true"]}, "may only name classes from"),
        ({"class": "aimnet2mult.modules.MLP", "kwargs": {"n_inn": 3}}, "unknown option n_inn; did you mean n_in"),
        ({"class": "aimnet2mult.modules.MLP", "kwarg": {}}, "unknown key kwarg"),
        ({"class": "MLP"}, "not a dotted class path"),
        ({"kwargs": {}}, "with the key class"),
    ],
)
def test_mistakes_are_named(node, message):
    name = node.get("class", "")
    if "modulles" in name:
        with pytest.raises(ConfigError, match="may only name classes"):
            build_module(node, MODEL_NAMESPACES, "outputs.x")
        with pytest.raises(ConfigError, match=message):
            build_module(node, None, "outputs.x")
    else:
        with pytest.raises(ConfigError, match=message):
            build_module(node, MODEL_NAMESPACES, "outputs.x")


@pytest.mark.parametrize(
    "name",
    [
        "aimnet2mult.models.base.copy_model",
        "aimnet2mult.models.base.save_checkpoint",
        "aimnet2mult.models.base.Path",
        "aimnet2mult.modules.resolve",
        "aimnet2mult.modules.Mapping",
        "torch.nn.init.zeros_",
        "torch.nn.Parameter",
        "torch.nn.utils.parametrizations.weight_norm",
        "torch.nn.functional.relu",
    ],
)
def test_model_files_name_modules_only(tmp_path, name):
    """Functions and other classes may read and write files: they are not called, whatever their arguments."""
    target = tmp_path / "written.pt"
    node = {"class": name, "args": [str(target), str(target)]}
    with pytest.raises(ConfigError, match=rf"outputs\.x\.class: {name} is not a module of a network"):
        build_module(node, MODEL_NAMESPACES, "outputs.x")
    assert not target.exists()


def test_other_files_may_name_functions():
    assert build_module({"class": "fractions.Fraction", "args": [1, 2]}, None) == 0.5
    assert build_module({"class": "math.sqrt", "args": [4.0]}, None) == 2.0
    with pytest.raises(ConfigError, match=r"math\.pi is not a class or function"):
        build_module({"class": "math.pi"}, None)


def test_modules_are_not_reached_through_others():
    for name in ("aimnet2mult.models.base.torch.hub.load", "aimnet2mult.modules.nn.Linear", "torch.nn.modules.x.y"):
        with pytest.raises(ConfigError, match="there is no module"):
            build_module({"class": name}, MODEL_NAMESPACES)
    with pytest.raises(ConfigError, match="may only name classes from"):
        build_module({"class": "torch.nnx.Linear"}, MODEL_NAMESPACES)


def test_model_from_its_file_alone():
    from aimnet2mult.models.base import DEFAULT_MODEL

    model = build_module(DEFAULT_MODEL)
    assert model.num_charge_channels == 2
    assert [type(module).__name__ for module in model.outputs.values()] == [
        "Output",
        "AtomicShift",
        "AtomicSum",
        "LRCoulomb",
    ]


def test_load_yaml_names_file_and_line(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("a: 1\nb: [1, 2\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml: not a YAML file.*line"):
        load_yaml(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_yaml(tmp_path / "absent.yaml")


def test_nearest_lists_what_is_known_if_nothing_is_close():
    assert nearest("zzz", ["energy", "forces"]) == "known: energy, forces"
