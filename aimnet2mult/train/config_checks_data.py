"""What is wrong with the settings of data: datasets, self-atomic energies, batches."""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from aimnet2mult.config.builder import nearest
from aimnet2mult.constants import FIDELITY_NAME
from aimnet2mult.data.base import INPUT_KEYS
from aimnet2mult.data.ledger import CACHES, parse_dispersion, subtraction
from aimnet2mult.data.mixed import LABEL_KEYS
from aimnet2mult.data.sampler import BATCH_MODES, SHARES_TOLERANCE, STRATEGIES
from aimnet2mult.data.sgdataset import expand_files
from aimnet2mult.train.failures import world_size
from aimnet2mult.train.schema import FidelityConfig, LoaderConfig, SamplerKwargsConfig, TrainConfig, named_fidelities

SAE_MODES = ("linreg",)


def validates(config: TrainConfig, fidelity: str | None = None) -> bool:
    """Whether the run, or one of its fidelities, has validation data."""
    known = named_fidelities(config)
    files = known.values() if fidelity is None else [known[fidelity]]
    return config.data.val_fraction > 0 or any(entry.val_files for entry in files)


def _check_datasets(config: TrainConfig) -> Iterator[str]:
    data = config.data
    if not 0 <= data.val_fraction < 1:
        yield f"data.val_fraction: expected a fraction in [0, 1), found {data.val_fraction}"
    if data.dispersion_cache not in CACHES:
        known = nearest(data.dispersion_cache, CACHES)
        yield f"data.dispersion_cache: {data.dispersion_cache!r} is not known; {known}"
    if data.fidelities:
        yield from _check_named(config)
    else:
        yield from _check_numbered(config)


def _check_named(config: TrainConfig) -> Iterator[str]:
    """Check fidelities with names."""
    data = config.data
    for key in ("fidelity_datasets", "fidelity_weights", "val_fidelity_datasets"):
        if getattr(data, key):
            word = {"fidelity_datasets": "files", "fidelity_weights": "weight"}.get(key, "val_files")
            yield f"data.{key}: given together with data.fidelities; use data.fidelities.<name>.{word}"
    for number, (name, fidelity) in enumerate(data.fidelities.items()):
        key = f"data.fidelities.{name}"
        if not FIDELITY_NAME.fullmatch(name):
            yield (
                f"{key}: a name consists of letters, digits, _, + and -, and does not begin with a digit; "
                f"found {name!r}"
            )
        if name == "all":
            yield f"{key}: stands for all data in the tables of errors; give it another name"
        if (match := re.fullmatch(r"fid(\d+)", name)) and match[1] != str(number):
            yield f"{key}: is the name of fidelity {match[1]} where none is given, and this one is number {number}"
        if not fidelity.files:
            others = [other for other in data.fidelities if other != name]
            hint = f". If another is meant: {nearest(name, others)}" if others else ""
            yield f"{key}.files: is missing; the HDF5 file of this fidelity, a list of files, or a pattern{hint}"
        yield from _check_patterns_of_files(f"{key}.files", fidelity.files)
        yield from _check_patterns_of_files(f"{key}.val_files", fidelity.val_files or [])
        yield from _check_weight(f"{key}.weight", fidelity.weight)
        yield from _check_dispersion(key, fidelity)
    if _draws_by_weight(config) and not any(fidelity.weight for fidelity in data.fidelities.values()):
        yield "data.fidelities: all weights are 0, no molecule would be drawn"


def _check_numbered(config: TrainConfig) -> Iterator[str]:
    """Check fidelities without names."""
    data = config.data
    found = sorted(data.fidelity_datasets)
    listed = ", ".join(map(str, found))
    if not found:
        yield (
            "data.fidelities: no dataset given. Add data.fidelities.<name>.files=<file.h5>, "
            "or without a name data.fidelity_datasets.0=<file.h5>"
        )
    elif found != list(range(len(found))):
        yield f"data.fidelity_datasets: fidelities must be 0..{len(found) - 1} without gaps, found {listed}"
    for key, datasets in (
        ("data.fidelity_datasets", data.fidelity_datasets),
        ("data.val_fidelity_datasets", data.val_fidelity_datasets or {}),
    ):
        for f, files in sorted(datasets.items()):
            yield from _check_patterns_of_files(f"{key}.{f}", files)
    for f in sorted(set(data.val_fidelity_datasets or {}) - set(found)):
        yield f"data.val_fidelity_datasets: fidelity {f} has no dataset (datasets: {listed})"
    for f, weight in sorted(data.fidelity_weights.items()):
        if f not in found:
            yield (
                f"data.fidelity_weights: fidelity {f} has no dataset (datasets: {listed}). "
                f"Add data.fidelity_datasets.{f} or remove the weight"
            )
        yield from _check_weight(f"data.fidelity_weights.{f}", weight)
    if _draws_by_weight(config) and found and not any(data.fidelity_weights.get(f, 1.0) for f in found):
        yield "data.fidelity_weights: all weights are 0, no molecule would be drawn"


def _draws_by_weight(config: TrainConfig) -> bool:
    """Whether the weights of the fidelities decide what an epoch consists of."""
    sampler = config.data.samplers.train.kwargs
    return sampler.shuffle and sampler.sampling_strategy == "weighted"


def _check_weight(key: str, weight: float) -> Iterator[str]:
    if not math.isfinite(weight) or weight < 0:
        yield f"{key}: expected a weight of 0 or more, found {weight}"


def _check_patterns_of_files(key: str, files: Sequence[Path]) -> Iterator[str]:
    """Check that each name or pattern stands for files that exist."""
    try:
        if files:
            expand_files(files)
    except (FileNotFoundError, ValueError) as error:
        yield f"{key}: {error}"


def _check_dispersion(key: str, fidelity: FidelityConfig) -> Iterator[str]:
    """Check what is said about the dispersion in the labels of a fidelity."""
    try:
        label = parse_dispersion(fidelity.dispersion, f"{key}.dispersion")
        if fidelity.subtract_dispersion:
            subtraction(label, f"{key}.subtract_dispersion")
    except ValueError as error:
        yield str(error)


def _check_file(key: str, path: Path) -> Iterator[str]:
    if not path.is_file():
        yield f"{key}: {path}: {'is a folder' if path.is_dir() else 'no such file'}"


def _check_sae(config: TrainConfig) -> Iterator[str]:
    data = config.data
    if data.sae is None:
        return
    sae = data.sae.energy
    if sae.mode not in SAE_MODES:
        yield f"data.sae.energy.mode: {sae.mode!r} is not a mode; {nearest(sae.mode, SAE_MODES)}"
    if data.fidelities:
        if sae.files or sae.file is not None:
            yield "data.sae.energy: files are given together with data.fidelities; use data.fidelities.<name>.sae"
        for name, fidelity in data.fidelities.items():
            key = f"data.fidelities.{name}.sae"
            if fidelity.sae is None:
                yield f"{key}: is missing. {_sae_remedy(fidelity.files, name)} and add {key}, or set data.sae=null"
            else:
                yield from _check_file(key, fidelity.sae)
        return
    datasets = data.fidelity_datasets
    if sae.file is not None:
        yield from _check_file("data.sae.energy.file", sae.file)
        if sae.files:
            yield "data.sae.energy.file: given together with data.sae.energy.files; remove one of them"
        elif len(datasets) > 1:
            yield "data.sae.energy.file: is for one dataset; name one file per fidelity in data.sae.energy.files"
        return
    for f, path in sorted(sae.files.items()):
        yield from _check_file(f"data.sae.energy.files.{f}", path)
    for f in sorted(set(sae.files) - set(datasets)):
        yield f"data.sae.energy.files: fidelity {f} has no dataset; add data.fidelity_datasets.{f} or remove the file"
    for f in sorted(set(datasets) - set(sae.files)):
        yield (
            f"data.sae.energy.files: fidelity {f} has no SAE file. {_sae_remedy(datasets[f], f'fid{f}')} and add "
            f"data.sae.energy.files.{f}, or set data.sae=null to train on total energies"
        )


def _sae_remedy(files: Sequence[Path], name: str) -> str:
    listed = " ".join(map(str, files)) or "<files>"
    return f"Make one with `python -m aimnet2mult.train.calc_sae {listed} sae_{name}.yaml`"


def _check_keys(config: TrainConfig) -> Iterator[str]:
    """Check what is read of each molecule."""
    data = config.data
    for key, names, known in (("data.x", data.x, INPUT_KEYS), ("data.y", data.y, LABEL_KEYS)):
        for name in names:
            if name not in known:
                yield f"{key}: {name!r} is not known; {nearest(name, known)}"
        if len(set(names)) != len(names):
            yield f"{key}: a name is listed twice"
    for name in ("coord", "numbers"):
        if name not in data.x:
            yield f"data.x: {name} is missing; add it"
    if "energy" not in data.y:
        yield "data.y: energy is missing; add it"


def _check_batches(config: TrainConfig) -> Iterator[str]:
    """Check how batches are made."""
    samplers, names = config.data.samplers, list(named_fidelities(config))
    for stage in ("train", "val"):
        yield from _check_sampler(f"data.samplers.{stage}.kwargs", getattr(samplers, stage).kwargs, names)
        yield from _check_loader(f"data.loaders.{stage}", getattr(config.data.loaders, stage))
    train = samplers.train.kwargs
    if not train.shuffle and world_size() > 1:
        yield (
            f"data.samplers.train.kwargs.shuffle: without it {world_size()} processes may have different numbers of "
            "batches and wait for each other forever; set it to true, or train in one process"
        )
    accumulate = config.trainer.accumulate
    if 0 < train.batches_per_epoch < accumulate:
        yield (
            f"trainer.accumulate: a step of {accumulate} batches is longer than an epoch "
            f"(data.samplers.train.kwargs.batches_per_epoch: {train.batches_per_epoch}); make one of them fit"
        )


def _check_sampler(key: str, sampler: SamplerKwargsConfig, names: list[str]) -> Iterator[str]:
    if sampler.batch_size < 1:
        yield f"{key}.batch_size: expected 1 or more, found {sampler.batch_size}"
    if sampler.batches_per_epoch < 1 and sampler.batches_per_epoch != -1:
        yield f"{key}.batches_per_epoch: expected 1 or more, or -1 for all, found {sampler.batches_per_epoch}"
    if sampler.batch_mode not in BATCH_MODES:
        yield f"{key}.batch_mode: {sampler.batch_mode!r} is not a mode; {nearest(sampler.batch_mode, BATCH_MODES)}"
    if sampler.sampling_strategy not in STRATEGIES:
        known = nearest(sampler.sampling_strategy, STRATEGIES)
        yield f"{key}.sampling_strategy: {sampler.sampling_strategy!r} is not a strategy; {known}"
    if not 0 <= sampler.max_padding < 1:
        yield f"{key}.max_padding: expected a share in [0, 1), found {sampler.max_padding}"
    yield from _check_shares(key, sampler, names)


def _check_shares(key: str, sampler: SamplerKwargsConfig, names: list[str]) -> Iterator[str]:
    """Check the shares of the fidelities."""
    shares = sampler.shares
    if (sampler.sampling_strategy == "shares") != bool(shares):
        yield (
            f"{key}.shares: go with sampling_strategy: shares, found {shares} and "
            f"{sampler.sampling_strategy}. Give both or neither"
        )
        return
    if shares and not sampler.shuffle:
        yield f"{key}.shares: have no effect with shuffle: false, which takes each molecule once; set it to true"
    for name in shares:
        if name not in names:
            yield f"{key}.shares: there is no fidelity {name!r}; {nearest(name, names)}"
    for name in names:
        if name not in shares and shares:
            yield f"{key}.shares: {name} is missing; give each fidelity its share (0 for none)"
    if any(not math.isfinite(share) or share < 0 for share in shares.values()):
        yield f"{key}.shares: expected shares of 0 or more, found {shares}"
    elif shares and abs(sum(shares.values()) - 1.0) > SHARES_TOLERANCE:
        yield f"{key}.shares: sum to {sum(shares.values()):g}, expected 1"


def _check_loader(key: str, loader: LoaderConfig) -> Iterator[str]:
    if loader.num_workers < 0:
        yield f"{key}.num_workers: expected 0 or more, found {loader.num_workers}"
    if loader.prefetch_factor is not None and loader.prefetch_factor < 1:
        yield f"{key}.prefetch_factor: expected 1 or more, found {loader.prefetch_factor}"
    for name in ("prefetch_factor", "persistent_workers"):
        if getattr(loader, name) and loader.num_workers == 0:
            yield f"{key}.{name}: needs reader processes; set {key}.num_workers or leave it out"


CHECKS = (_check_datasets, _check_sae, _check_keys, _check_batches)
"""Checks of the section ``data``, in the order of their messages."""
