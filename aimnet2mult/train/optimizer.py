"""The optimiser: which weights it trains, in which groups."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from aimnet2mult.config.builder import ConfigError, resolve

if TYPE_CHECKING:
    from aimnet2mult.train.schema import OptimizerConfig

logger = logging.getLogger(__name__)


def build_optimizer(config: "OptimizerConfig", model: nn.Module) -> Optimizer:
    """Build the optimiser and say which weights it trains.

    Patterns are searched in the weights' names (``afv.weight``, ``fidelity_readouts.0.energy_mlp.mlp.0.weight``).
    A weight belongs to the first group of ``param_groups`` whose pattern it matches, else to the group ``default``.

    Parameters
    ----------
    config : OptimizerConfig
        Section ``optimizer`` of the settings.
    model : nn.Module
        Its weights get ``requires_grad`` as ``force_train`` and ``force_no_train`` say.

    Returns
    -------
    Optimizer
        Each group carries its ``name``; empty groups are left out.

    Raises
    ------
    ConfigError
        A pattern that matches no weight, a weight both trained and kept fixed, nothing left to train, or arguments
        that the optimiser refuses.
    """
    weights = dict(model.named_parameters())
    trained = _matches(config.force_train, weights, "optimizer.force_train")
    fixed = _matches(config.force_no_train, weights, "optimizer.force_no_train")
    if both := sorted(trained & fixed):
        raise ConfigError(f"optimizer.force_train: {both[0]} also matches optimizer.force_no_train; keep one of them")
    for name, weight in weights.items():
        weight.requires_grad_((weight.requires_grad or name in trained) and name not in fixed)

    free = {name: weight for name, weight in weights.items() if weight.requires_grad}
    if not free:
        raise ConfigError("optimizer.force_no_train: no weight is left to train")
    groups: list[dict[str, Any]] = []
    for group_name, options in config.param_groups.items():
        matched = _matches([options["re"]], weights, f"optimizer.param_groups.{group_name}.re")
        mine = [name for name in free if name in matched]
        overrides = {key: value for key, value in options.items() if key != "re"}
        groups.append({"name": group_name, "params": [free.pop(name) for name in mine], **overrides})
    groups.insert(0, {"name": "default", "params": list(free.values())})
    groups = [group for group in groups if group["params"]]
    for group in groups:
        count = sum(weight.numel() for weight in group["params"])
        logger.info("optimizer group %s: %d tensors, %d weights", group["name"], len(group["params"]), count)
    return _make_optimizer(config, groups)


def reference_optimizer(config: "OptimizerConfig") -> Optimizer:
    """Return the same optimiser over one weight that nobody uses; its one group has the base learning rate."""
    return _make_optimizer(config, [{"params": [nn.Parameter(torch.zeros(1))]}])


def _make_optimizer(config: "OptimizerConfig", groups: list[dict[str, Any]]) -> Optimizer:
    try:
        optimizer: Optimizer = resolve(config.class_)(groups, **config.kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer: {config.class_}: {error}") from error
    return optimizer


def _matches(patterns: Sequence[str], weights: Mapping[str, nn.Parameter], key: str) -> set[str]:
    """Return the names that match any of the patterns; a pattern without a match is an error."""
    names: set[str] = set()
    for pattern in patterns:
        matched = {name for name in weights if re.search(pattern, name)}
        if not matched:
            examples = ", ".join(list(weights)[:4])
            raise ConfigError(f"{key}: {pattern!r} matches none of the {len(weights)} weights ({examples}, ...)")
        names |= matched
    return names
