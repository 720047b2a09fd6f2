"""Format-2 artifacts that are malformed or made to harm: refused with a message of one line, nothing run or read."""

import copy
import math
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from aimnet2mult.models.base import load_checkpoint, load_model
from aimnet2mult.models.loading import load_potential
from aimnet2mult.models.safe_file import CheckpointError

LOADERS = (load_model, load_potential, load_checkpoint)
SENTINEL = "touched"
"""File that hostile content would create; the tests run in a folder of their own."""


def _entry(key, value):
    """Change of one entry of an artifact."""

    def change(content):
        content[key] = value

    return change


def _without(key):
    def change(content):
        del content[key]

    return change


def _config(edit):
    """Change of the configuration, written back as text."""

    def change(content):
        config = yaml.safe_load(content["model_yaml"])
        edit(config)
        content["model_yaml"] = yaml.safe_dump(config)

    return change


def _kwargs(**given):
    return _config(lambda config: config["kwargs"].update(given))


def _class(name):
    """The class of a readout."""
    return _config(lambda config: config["kwargs"]["outputs"]["atomic_sum"].update({"class": name}))


def _readout(name, cls, **kwargs):
    """One more readout."""
    return _config(lambda config: config["kwargs"]["outputs"].update({name: {"class": cls, "kwargs": kwargs}}))


def _option(readout, **given):
    return _config(lambda config: config["kwargs"]["outputs"][readout]["kwargs"].update(given))


def _mlp(**given):
    return _config(lambda config: config["kwargs"]["outputs"]["energy_mlp"]["kwargs"]["mlp"].update(given))


def _weight(key, value):
    """Change of a weight: another tensor, or a function of what was there."""

    def change(content):
        state = content["state_dict"]
        state[key] = value(state[key].clone()) if callable(value) else value

    return change


def _set(index, value):
    """One number of a tensor."""

    def change(tensor):
        tensor[index] = value
        return tensor

    return change


def _text(text):
    return _entry("model_yaml", text)


def _quantized(tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def _both(*changes):
    def change(content):
        for one in changes:
            one(content)

    return change


ALIASES = "\n".join(
    ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    + ["class: aimnet.models.AIMNet2", "kwargs: {outputs: *a9}"]
)
MERGES = "\n".join(
    ["m0: &m0 {a: 1, b: 2}"]
    + [f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10)}], c{i}: 1}}" for i in range(1, 10)]
    + ["class: aimnet.models.AIMNet2", "kwargs: *m9"]
)
RUN = f"!!python/object/apply:os.system ['touch {SENTINEL}']"
COULOMB = "aimnet.modules.SRCoulomb"
D3 = {"s8": 0.4, "a1": 0.5, "a2": 3.1}

CASES = {
    # --- entries ---
    "no configuration": (_without("model_yaml"), "holds no weights"),
    "no weights": (_without("state_dict"), "the entry state_dict is missing"),
    "no cutoff": (_without("cutoff"), "the entry cutoff is missing"),
    "version 1": (_entry("format_version", 1), "format_version 1 is not known; known: 2"),
    "version 3": (_entry("format_version", 3), "format_version 3 is not known"),
    "version text": (_entry("format_version", "2"), "format_version '2' is not known"),
    "version true": (_entry("format_version", True), "format_version True is not known"),
    "version float": (_entry("format_version", 2.0), "format_version 2.0 is not known"),
    "version huge": (_entry("format_version", 10**400), "format_version a number of 1329 bits is not known"),
    # --- configuration as text ---
    "configuration of bytes": (_text(b"class: x"), "it asks for _codecs.encode"),
    "configuration of a dictionary": (_text({"class": "x"}), "model_yaml is of the type dict, expected str"),
    "configuration empty": (_text(""), "expected a mapping with the key class"),
    "configuration a list": (_text("- 1\n- 2"), "expected a mapping with the key class"),
    "configuration not YAML": (_text("class: [1, 2\nkwargs: }"), "not YAML of plain types"),
    "configuration of control characters": (_text("class: \x00\x01"), "not YAML of plain types"),
    "configuration runs a command": (_text(RUN), "could not determine a constructor for the tag"),
    "configuration names a class by tag": (
        _text(f"class: aimnet.models.AIMNet2\nkwargs: {{outputs: {{a: {RUN}}}}}"),
        "could not determine a constructor",
    ),
    "configuration makes an object": (
        _text("class: aimnet.models.AIMNet2\nkwargs: !!python/object/new:subprocess.Popen [[touch, touched]]"),
        "could not determine a constructor",
    ),
    "configuration of a date": (_text("class: x\nkwargs: {a: 2020-01-01}"), "a value of the type date"),
    "configuration of bytes inside": (_text("class: x\nkwargs: {a: !!binary aGVsbG8=}"), "a value of the type bytes"),
    "configuration of a set": (_text("class: x\nkwargs: {a: !!set {b, c}}"), "a value of the type set"),
    "configuration with a key that is a list": (_text("? [1, 2]\n: 3"), "not YAML of plain types"),
    "configuration of aliases": (_text(ALIASES), "nested too deeply, or endlessly"),
    "configuration of merges": (_text(MERGES), "merges mappings"),
    "configuration in itself": (_text("&a [*a]"), "nested too deeply, or endlessly|with the key class"),
    "configuration in itself as a mapping": (
        _text("class: aimnet.models.AIMNet2\nkwargs: &k {outputs: {a: *k}}"),
        "nested too deeply, or endlessly",
    ),
    "configuration nested": (_text("[" * 90_000), "nested too deeply"),
    "configuration nested in mappings": (_text("{a: " * 20_000), "nested too deeply"),
    "configuration long": (_text("# " + "x" * 10_000_000), "10,000,002 characters, more than any model needs"),
    "configuration of many values": (_text("[" + "1," * 45_000 + "1]"), "nested too deeply, or endlessly"),
    "configuration with a number of many digits": (
        _text("class: x\nkwargs: {nfeature: " + "9" * 5000 + "}"),
        "not YAML of plain types",
    ),
    "configuration of infinity": (_kwargs(aim_size=math.inf), "inf is not a finite number"),
    # --- classes ---
    "network of another class": (
        _config(lambda config: config.update({"class": "os.system"})),
        "class 'os.system' is not a network; known: aimnet.models.AIMNet2",
    ),
    "network of several fidelities": (
        _config(lambda config: config.update({"class": "aimnet2mult.models.base.load_model"})),
        "is not a network",
    ),
    "network with arguments by place": (
        _config(lambda config: config.update(args=["touch touched"])),
        "the key 'args' is not allowed, only class and kwargs",
    ),
    "readout with arguments by place": (
        _config(lambda config: config["kwargs"]["outputs"]["atomic_sum"].update(args=["touch touched"])),
        "atomic_sum: the key 'args' is not allowed",
    ),
    "readout without class": (
        _config(lambda config: config["kwargs"]["outputs"].update(x={"kwargs": {}})),
        "outputs.x: expected a mapping with the key class",
    ),
    "readout of text": (_config(lambda config: config["kwargs"]["outputs"].update(x="y")), "outputs.x: expected a map"),
    "readouts of a list": (_kwargs(outputs=[1, 2]), "outputs must be a mapping of readouts"),
    "no readouts": (_kwargs(outputs={}), "outputs must be a mapping of readouts"),
    "arguments of a list": (
        _config(lambda config: config["kwargs"]["outputs"]["atomic_sum"].update(kwargs=[1])),
        "atomic_sum: kwargs must be a mapping, found list",
    ),
    "misspelt": (
        _class("aimnet.modules.AtomicSumm"),
        "'aimnet.modules.AtomicSumm' is not one .*did you mean AtomicSum",
    ),
    **{
        f"class {name}": (_class(name), f"class '{name}' is not one that a model file may name")
        for name in (
            *("os.system", "subprocess.Popen", "builtins.eval", "builtins.open", "torch.load", "torch.hub.load"),
            *("torch.nn.Linear", "torch.nn.Module", "torch.jit.load", "pathlib.Path"),
            *("aimnet2mult.models.base.copy_model", "aimnet2mult.modules.resolve", "aimnet2mult.modules.Forces"),
            *("aimnet2mult.models.base.torch.hub.load", "aimnet.modules.os.system", "Output", ".Output", ""),
        )
    },
    "class in nested arguments": (
        _option("atomic_sum", key_in={"class": "os.system", "args": ["touch touched"]}),
        "expected the name of a key|no class may be named here",
    ),
    "class in the geometry": (_kwargs(aev={"class": "torch.load", "rc_s": 5.0}), "aev: no class may be named here"),
    "class of the network of a readout": (_mlp(**{"class": "os.system"}), "mlp.*no class may be named|unknown option"),
    "activation that is no module": (
        _mlp(activation_fn="torch.nn.init.ones_"),
        "activation_fn 'torch.nn.init.ones_' is not one of torch.nn",
    ),
    "activation of any module": (_mlp(activation_fn="torch.nn.Module"), "'torch.nn.Module' is not one of torch.nn"),
    "activation misspelt": (_mlp(activation_fn="torch.nn.GeLU"), "did you mean .*GELU"),
    "activation that is a command": (_mlp(activation_fn="os.system"), "'os.system' is not one of torch.nn"),
    "activation with arguments": (_mlp(activation_kwargs={"alpha": 1.0}), "activations with arguments are not supp"),
    "start of weights that is a command": (_mlp(weight_init_fn="os.system"), "'os.system' is not one of torch.nn.init"),
    # --- files on disk ---
    "file of a table": (
        _readout("disp", "aimnet.modules.lr.DispParam", ptfile="touched"),
        "ptfile names a file on disk, which a model file must not",
    ),
    "path among the arguments": (_kwargs(num_types="/etc/passwd"), "looks like the name of a file"),
    "path of a home": (_option("atomic_sum", key_in="~secrets"), "looks like the name of a file"),
    # --- names of readouts ---
    **{
        f"name {name}": (_readout(name, "aimnet.modules.AtomicSum", key_in="energy", key_out="energy"), "cannot be the")
        for name in (
            *("__class__", "_modules", "a.b", "", "1", "a b", "forward", "training", "keys", "items", "values", "pop"),
            *("add_module", "load_state_dict", "to", 7),
        )
    },
    "name of a Coulomb energy": (
        _readout("lrcoulomb", "aimnet.modules.Dipole", key_in="charges", key_out="dipole"),
        "outputs.lrcoulomb: the name is kept for LRCoulomb",
    ),
    "name of a dispersion energy": (
        _readout("dftd3", "aimnet.modules.Dipole"),
        "outputs.dftd3: the name is kept for DFTD3 or D3TS",
    ),
    "name of self-atomic energies": (_readout("self_atomic_energies", "aimnet.modules.Dipole"), "the name is kept for"),
    "many readouts": (
        _config(
            lambda config: config["kwargs"]["outputs"].update(
                {f"d{i}": {"class": "aimnet.modules.DFTD3", "kwargs": D3} for i in range(500)}
            )
        ),
        "504 outputs, more than any model has",
    ),
    "two dispersion energies": (
        _config(
            lambda config: config["kwargs"]["outputs"].update(
                {f"d{i}": {"class": "aimnet.modules.DFTD3", "kwargs": D3} for i in range(2)}
            )
        ),
        r"DFTD3 is among the outputs 2 times \(d0, d1\)",
    ),
    # --- sizes ---
    "size of 10^9": (_kwargs(nfeature=10**9), "1000000000 is larger than any size of a model"),
    "size of 10^6": (_kwargs(nfeature=10**6), "describes a network of .* weights, state_dict holds"),
    "size negative": (_kwargs(nfeature=-8), "nfeature must be a positive whole number, found -8"),
    "size zero": (_kwargs(ncomb_v=0), "ncomb_v must be a positive whole number, found 0"),
    "size true": (_kwargs(nfeature=True), "nfeature must be a positive whole number, found True"),
    "size of a float": (_kwargs(aim_size=32.0), "aim_size must be a positive whole number, found 32.0"),
    "size of text": (_kwargs(nfeature="8"), "nfeature must be a positive whole number, found '8'"),
    "size missing": (_config(lambda config: config["kwargs"].pop("nfeature")), "nfeature must be a positive .* None"),
    "hidden empty": (_kwargs(hidden=[]), "describes a network of"),
    "hidden of numbers": (_kwargs(hidden=[48, 32]), "hidden must be a list of lists"),
    "hidden of one pass": (_kwargs(hidden=[[48, 32]]), "describes a network of"),
    "hidden of 10^6": (_kwargs(hidden=[[10**6, 10**6]] * 3), "describes a network of 3,000"),
    "hidden of many": (_kwargs(hidden=[[1] * 9_000, [1]]), "describes a network of|nested"),
    "hidden of a readout": (_mlp(hidden=10**5), "mlp.hidden: expected a list of widths"),
    "hidden of a readout of text": (_mlp(hidden="24"), "mlp.hidden: expected a list of widths"),
    "readout of 10^6": (_option("energy_mlp", n_in=10**6), "describes a network of"),
    "geometry of 10^6 functions": (_kwargs(aev={"rc_s": 5.0, "nshifts_s": 10**6}), "describes a network of"),
    "geometry of no function": (_kwargs(aev={"rc_s": 5.0, "shifts_s": []}), "aev.nshifts_s must be a positive"),
    "geometry of a list": (_kwargs(aev=[5.0]), "aev must be a mapping"),
    "geometry of another range": (_kwargs(aev={"rc_s": -1.0, "nshifts_s": 12}), "cannot be built: aev.rc_s = -1.0"),
    "geometry of text": (_kwargs(aev={"rc_s": "five", "nshifts_s": 12}), "the model cannot be built"),
    "geometry unknown": (_kwargs(aev={"rc_s": 5.0, "nshifts_s": 12, "rcs": 1}), "unknown option rcs"),
    "three charge channels": (_kwargs(num_charge_channels=3), "describes a network of"),
    "unknown argument": (_kwargs(nfeatures=8), "unknown option nfeatures; did you mean nfeature"),
    "unknown argument of a readout": (
        _option("atomic_sum", kye_in="energy"),
        "unknown option kye_in; did you mean key",
    ),
    "key of a number": (_option("atomic_sum", key_in=5), "atomic_sum.key_in: expected the name of a key"),
    "key missing": (
        _config(lambda config: config["kwargs"]["outputs"]["atomic_sum"]["kwargs"].pop("key_in")),
        "cannot be built: .*key_in",
    ),
    "embedding of another model": (_weight("afv.weight", torch.zeros(64, 48)), "of another shape .afv.weight"),
    # --- weights ---
    "weights a list": (_entry("state_dict", [1, 2]), "state_dict is of the type list, expected Mapping"),
    "weights empty": (_entry("state_dict", {}), "afv.weight, the embedding of the elements, is missing"),
    "weights not tensors": (_weight("afv.weight", [1.0, 2.0]), "afv.weight is of the type list, expected a tensor"),
    "weights by number": (_weight(3, torch.zeros(1)), "state_dict: a key of the type int is not the name of a weight"),
    "weight missing": (
        lambda content: content["state_dict"].pop("mlps.0.0.bias"),
        "describes a network of .* weights, state_dict holds",
    ),
    "geometry missing": (lambda content: content["state_dict"].pop("aev.eta_s"), r"1 missing \(aev.eta_s\)"),
    "weight left over": (_weight("surprise", torch.zeros(3)), r"1 left over \(surprise\)"),
    "weight left over of a readout": (
        _weight("outputs.other.weight", torch.zeros(3)),
        r"1 left over \(outputs.other.weight\)",
    ),
    "weight of another shape": (_weight("mlps.0.0.weight", lambda w: w.T.clone()), "of another shape .mlps.0.0.weight"),
    "shifts of no readout": (
        _weight("outputs.atomic_shifd.shifts.weight", torch.zeros(64, 1)),
        r"1 left over \(outputs.atomic_shifd.shifts.weight\)",
    ),
    "embedding a vector": (_weight("afv.weight", torch.zeros(64)), "is missing or not a matrix"),
    "embedding of one row": (_weight("afv.weight", lambda w: w[:1].clone()), "afv.weight has 1 rows"),
    "embedding of 10^4 rows": (_weight("afv.weight", torch.zeros(10_000, 96)), "afv.weight has 10000 rows"),
    "shifts of fewer rows": (
        _weight("outputs.atomic_shift.shifts.weight", lambda w: w[:3].clone()),
        "has the shape .3, 1., expected 64 rows",
    ),
    "shifts of a vector": (_weight("outputs.atomic_shift.shifts.weight", lambda w: w[:, 0].clone()), "shape .64,."),
    "expanded": (_weight("mlps.0.0.weight", torch.zeros(1).expand(48, 240)), "the file holds fewer numbers for it"),
    "expanded to 10 GB": (
        _weight("afv.weight", torch.zeros(1).expand(64, 40_000_000)),
        "the file holds fewer numbers for it",
    ),
    "one tensor for many": (
        lambda content: content["state_dict"].update(
            dict.fromkeys((f"mlps.{i}.weight" for i in range(5000)), torch.zeros(10_000))
        ),
        "the file holds fewer numbers for it",
    ),
    "sparse": (
        _weight("mlps.0.0.weight", torch.zeros(48, 240).to_sparse()),
        "it asks for torch._utils._rebuild_sparse_tensor",
    ),
    "quantized": (_weight("mlps.0.0.bias", _quantized), "it asks for torch._utils._rebuild_qtensor"),
    "complex": (
        _weight("mlps.0.0.bias", torch.zeros(48, dtype=torch.complex64)),
        "not of floating-point numbers but torch.complex64",
    ),
    "integers": (
        _weight("mlps.0.0.bias", torch.zeros(48, dtype=torch.int64)),
        "not of floating-point numbers but torch.int64",
    ),
    "truth values": (
        _weight("mlps.0.0.bias", torch.zeros(48, dtype=torch.bool)),
        "not of floating-point numbers but torch.bool",
    ),
    "eight bits": (
        _weight("mlps.0.0.bias", torch.zeros(48).to(torch.float8_e4m3fn)),
        "floating-point numbers but torch.float8_e4m3fn",
    ),
    "meta": (_weight("mlps.0.0.bias", torch.zeros(48, device="meta")), "mlps.0.0.bias has no numbers"),
    "meta of 10^12": (_weight("mlps.0.0.bias", torch.zeros(10**12, device="meta")), "mlps.0.0.bias has no numbers"),
    "NaN": (_weight("mlps.0.0.weight", _set((0, 0), math.nan)), "mlps.0.0.weight holds NaN or infinite values"),
    "infinite": (_weight("mlps.0.0.weight", _set((0, 0), -math.inf)), "mlps.0.0.weight holds NaN or infinite values"),
    "infinite geometry": (_weight("aev.eta_s", _set((), math.inf)), "aev.eta_s holds NaN or infinite"),
    "infinite row of no element": (_weight("afv.weight", _set(2, math.inf)), "afv.weight holds infinite values"),
    "NaN in the row of padding": (_weight("afv.weight", _set(0, math.nan)), "afv.weight holds NaN .* in rows of"),
    "NaN in a shift": (
        _weight("outputs.atomic_shift.shifts.weight", _set(6, math.nan)),
        "shifts.weight holds NaN or infinite values in rows of implemented_species",
    ),
    # --- elements ---
    "species of NaN rows": (
        _weight("afv.weight", _set(6, math.nan)),
        r"implemented_species has C \(6\), which the embedding .afv.weight. does not know",
    ),
    "species zero": (_entry("implemented_species", [0, 1]), "implemented_species has .*0.*, which the embedding"),
    "species 119": (_entry("implemented_species", [1, 119]), "implemented_species has .*119.*, which the embedding"),
    "species negative": (_entry("implemented_species", [-1, 1]), "implemented_species has .*-1.*, which the embedding"),
    "species of a huge number": (
        _entry("implemented_species", [1, 10**400]),
        "implemented_species has .*, which the embedding",
    ),
    "species none": (_entry("implemented_species", []), "implemented_species must be a list of atomic numbers"),
    "species of truth values": (_entry("implemented_species", [True]), "implemented_species must be a list of atomic"),
    "species of text": (_entry("implemented_species", ["H"]), "implemented_species must be a list of atomic numbers"),
    "species of floats": (_entry("implemented_species", [1.0, math.nan]), "implemented_species must be a list of"),
    "species one number": (_entry("implemented_species", 1), "implemented_species must be a list of atomic numbers"),
    "species a tensor": (_entry("implemented_species", torch.arange(3)), "list of atomic numbers, found something of"),
    # --- ranges and energies ---
    "cutoff NaN": (_entry("cutoff", math.nan), "cutoff must be a finite number, found nan"),
    "cutoff infinite": (_entry("cutoff", math.inf), "cutoff must be a finite number, found inf"),
    "cutoff negative": (_entry("cutoff", -5.0), "cutoff must be positive, found -5.0"),
    "cutoff zero": (_entry("cutoff", 0), "cutoff must be positive, found 0"),
    "cutoff text": (_entry("cutoff", "5.0"), "cutoff must be a finite number, found '5.0'"),
    "cutoff true": (_entry("cutoff", True), "cutoff must be a finite number, found True"),
    "cutoff a tensor": (_entry("cutoff", torch.tensor(5.0)), "cutoff must be a finite number, found something of"),
    "cutoff of a huge number": (_entry("cutoff", 10**400), "cutoff must be a finite number, found a number of 1329"),
    "cutoff of another network": (_entry("cutoff", 6.0), "cutoff is 6.0 Å, but the network reaches 5 Å"),
    "cutoff of a kilometre": (
        _both(_entry("cutoff", 1e13), _weight("aev.rc_s", torch.tensor(1e13)), _weight("aev.rc_v", torch.tensor(1e13))),
        "cutoff must be a finite|more than any network reaches",
    ),
    "cutoff of a hundred Å": (
        _both(_entry("cutoff", 100.0), _weight("aev.rc_s", torch.tensor(100.0))),
        "cutoff is 100 Å, more than any network reaches",
    ),
    "Coulomb unknown": (_entry("coulomb_mode", "embedded"), "coulomb_mode 'embedded' is not one of sr_embedded, full"),
    "Coulomb a list": (_entry("coulomb_mode", ["none"]), "coulomb_mode something of the type list is not one of"),
    "Coulomb a tensor": (_entry("coulomb_mode", torch.zeros(2)), "coulomb_mode something of the type Tensor is not"),
    "Coulomb without its readout": (
        _config(lambda config: config["kwargs"]["outputs"].pop("srcoulomb")),
        "coulomb_mode is sr_embedded, but model_yaml has no Coulomb energy among its outputs",
    ),
    "Coulomb that is not said": (_entry("coulomb_mode", "none"), r"none, but model_yaml has SRCoulomb \(srcoulomb\)"),
    "Coulomb that is all inside": (_entry("coulomb_mode", "full_embedded"), "full_embedded, but model_yaml has SRC"),
    "Coulomb twice": (_readout("again", COULOMB), "sr_embedded, but model_yaml has .*srcoulomb.*again|.*again"),
    "Coulomb that is not needed": (_entry("needs_coulomb", False), "needs_coulomb is not set"),
    "Coulomb needed by text": (_entry("needs_coulomb", "yes"), "needs_coulomb must be true or false, found 'yes'"),
    "Coulomb needed by 1": (_entry("needs_coulomb", 1), "needs_coulomb must be true or false, found 1"),
    "Coulomb range missing": (_entry("coulomb_sr_rc", None), "coulomb_sr_rc must be a finite number, found None"),
    "Coulomb range NaN": (_entry("coulomb_sr_rc", math.nan), "coulomb_sr_rc must be a finite number, found nan"),
    "Coulomb range negative": (_entry("coulomb_sr_rc", -4.6), "coulomb_sr_rc must be positive"),
    "Coulomb range beyond the network": (
        _both(
            _entry("coulomb_sr_rc", 6.0),
            _option("srcoulomb", rc=6.0),
            _weight("outputs.srcoulomb.rc", torch.tensor(6.0)),
        ),
        "coulomb_sr_rc is 6.0 Å, beyond the cutoff of the network",
    ),
    "Coulomb range of the configuration": (
        _option("srcoulomb", rc=4.0),
        "outputs.srcoulomb.rc is not the 4 Å of model",
    ),
    "Coulomb range of the metadata": (_entry("coulomb_sr_rc", 4.0), "coulomb_sr_rc and coulomb_sr_envelope are 4.0 Å"),
    "Coulomb range of the weights": (
        _weight("outputs.srcoulomb.rc", torch.tensor(3.0)),
        "outputs.srcoulomb.rc is not the 4.6 Å of model_yaml",
    ),
    "Coulomb range of two numbers": (_weight("outputs.srcoulomb.rc", torch.ones(2)), "srcoulomb.rc is not the 4.6 Å"),
    "Coulomb range of text": (_option("srcoulomb", rc="4.6"), "srcoulomb.rc must be a finite number, found '4.6'"),
    "Coulomb envelope unknown": (_entry("coulomb_sr_envelope", "gauss"), "coulomb_sr_envelope 'gauss' is not one of"),
    "Coulomb envelope of the metadata": (_entry("coulomb_sr_envelope", "cosine"), "are 4.6 Å, cosine, but model_yaml"),
    "Coulomb envelope a list": (_entry("coulomb_sr_envelope", ["exp"]), "coulomb_sr_envelope something of the type l"),
    "D3 without parameters": (_entry("d3_params", None), "needs_dispersion is set, but d3_params is missing"),
    "D3 of a list": (_entry("d3_params", [1.0]), "needs_dispersion is set, but d3_params is missing"),
    "D3 without a2": (_entry("d3_params", {"s8": 0.4, "a1": 0.5}), "d3_params.a2 must be a finite number, found None"),
    "D3 infinite": (_entry("d3_params", {**D3, "s8": math.inf}), "d3_params.s8 must be a finite number, found inf"),
    "D3 NaN": (_entry("d3_params", {**D3, "s6": math.nan}), "d3_params.s6 must be a finite number, found nan"),
    "D3 of text": (_entry("d3_params", {**D3, "a1": "0.5"}), "d3_params.a1 must be a finite number, found '0.5'"),
    "D3 negative": (_entry("d3_params", {**D3, "a1": -0.5}), "a1 and a2 must not be negative, found -0.5 and 3.1"),
    "D3 needed by 1": (_entry("needs_dispersion", 1), "needs_dispersion must be true or false, found 1"),
    "D3 beside learned dispersion": (
        _both(_readout("d3ts", "aimnet.modules.D3TS", **D3), _entry("has_embedded_d3ts", True)),
        r"needs_dispersion is set, but the model has a dispersion energy of its own \(d3ts\)",
    ),
    "D3 beside D3": (_readout("dftd3", "aimnet.modules.DFTD3", **D3), "a dispersion energy of its own .dftd3"),
    "learned dispersion that is not said": (
        _both(_readout("d3ts", "aimnet.modules.D3TS", **D3), _entry("needs_dispersion", False)),
        "has_embedded_d3ts contradicts model_yaml",
    ),
    "learned dispersion that is not there": (_entry("has_embedded_d3ts", True), "has_embedded_d3ts contradicts"),
    # --- other metadata ---
    "family a list": (_entry("family", ["x"]), "family must be of the type str or absent"),
    "charged systems by text": (_entry("supports_charged_systems", "no"), "supports_charged_systems must be of the"),
    "own entry a list": (_entry("aimnet2mult", [1]), "aimnet2mult must be a mapping, found list"),
    "own entry of text": (_entry("aimnet2mult", "x"), "aimnet2mult must be a mapping, found str"),
    "own energies a list": (_entry("aimnet2mult", {"sae": [1.0]}), "aimnet2mult.sae must be a mapping of atomic"),
    "own energies by text": (_entry("aimnet2mult", {"sae": {"H": 1.0}}), "aimnet2mult.sae must be a mapping of atomic"),
    "own energies NaN": (_entry("aimnet2mult", {"sae": {1: math.nan}}), "aimnet2mult.sae.1 must be a finite number"),
    "own energies of text": (_entry("aimnet2mult", {"sae": {1: "x"}}), "aimnet2mult.sae.1 must be a finite number"),
    "own level a number": (_entry("aimnet2mult", {"level_of_theory": 1}), "aimnet2mult.level_of_theory must be text"),
    "own name a list": (_entry("aimnet2mult", {"fidelity_name": []}), "aimnet2mult.fidelity_name must be text"),
}


@pytest.fixture(scope="module")
def original(fixtures_dir):
    return torch.load(fixtures_dir / "peer_v2_lr.pt", weights_only=True)


@pytest.fixture
def nothing_touched(tmp_path, monkeypatch):
    """A folder in which nothing may appear but what the test writes, and no file may be read but the given one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield tmp_path
    assert not (tmp_path / SENTINEL).exists()


def _refused(path, message):
    """Assert that a file is refused by every loader, at once, in one line that names it."""
    for load in LOADERS:
        start = time.perf_counter()
        with pytest.raises(CheckpointError, match=message) as caught:
            load(path)
        assert time.perf_counter() - start < 2.0
        text = str(caught.value)
        assert text.startswith(f"{path}: ")
        assert "\n" not in text
        assert len(text) < len(str(path)) + 600


@pytest.mark.parametrize("name", CASES)
def test_artifact_is_refused(name, original, nothing_touched, monkeypatch):
    change, message = CASES[name]
    content = {**original, "state_dict": dict(original["state_dict"])}
    change(content)
    path = nothing_touched / "model.pt"
    torch.save(content, path)
    opened = []
    load = torch.load
    packaged = str(Path(sys.modules["aimnet2mult"].__file__).parent)

    def counting(file, *args, **kwargs):
        opened.append(str(file))
        return load(file, *args, **kwargs)

    monkeypatch.setattr(torch, "load", counting)
    _refused(path, message)
    # Tables of this package apart, nothing else was read.
    assert {file for file in opened if not file.startswith(packaged)} <= {str(path)}


def test_the_file_without_a_change_is_taken(original, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(copy.copy(original), path)
    for load in LOADERS:
        load(path)
