"""The optimiser: which weights it trains, in which groups, and which rows of shared tables it must leave alone.

What is kept fixed is kept bitwise: neither weight decay nor momentum changes it. Ways to train a part of a model:

- ``freeze_backbone: true``: only embedding rows and readouts learn;
- the same with ``force_no_train: ['^afv']``: only readouts learn (heads-only training);
- ``freeze_backbone: true`` with ``freeze_fidelities: [dft]``: nothing that a prediction of ``dft`` depends on changes;
- ``param_groups``: other learning rates for other parts (discriminative learning rates).
"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from aimnet2mult.config.builder import ConfigError, resolve
from aimnet2mult.models.base import HEAD_KEY, Layout
from aimnet2mult.models.mixed_fidelity_aimnet2 import is_type_table
from aimnet2mult.train.fidelity_specific_utils import (
    READOUT_PREFIXES,
    fidelity_number,
    layout_of_model,
)
from aimnet2mult.train.utils import accepted_keywords
from aimnet2mult.utils.text import text_table

if TYPE_CHECKING:
    from aimnet2mult.train.schema import OptimizerConfig

logger = logging.getLogger(__name__)


def build_optimizer(config: "OptimizerConfig", model: nn.Module, names: Mapping[int, str] | None = None) -> Optimizer:
    """Build the optimiser and say which weights it trains.

    Patterns are searched in the weights' names (``afv.weight``, ``fidelity_readouts.0.energy_mlp.mlp.0.weight``).
    A weight belongs to the first group of ``param_groups`` whose pattern it matches, else to the group ``default``.
    ``force_train`` has precedence over ``freeze_backbone``.

    Rows that ``freeze_fidelities`` keeps fixed inside a table that learns need nothing of the training loop: their
    gradient is zero as soon as it is computed, before it counts in a norm, and hooks of the optimiser put the rows
    back after each step.

    Parameters
    ----------
    config : OptimizerConfig
        Section ``optimizer`` of the settings.
    model : nn.Module
        Its weights get ``requires_grad`` as the settings say.
    names : mapping, optional
        Name of each fidelity, for ``freeze_fidelities``; default ``fid0``, ``fid1``, ...

    Returns
    -------
    Optimizer
        Each group carries its ``name``; empty groups are left out.

    Raises
    ------
    ConfigError
        A pattern that matches no weight, a weight both trained and kept fixed, a fidelity that does not exist or
        whose readouts are those of others too, nothing left to train, or arguments that the optimiser refuses.
    """
    weights = dict(model.named_parameters())
    fixed, rows = _fixed(config, model, weights, names)
    for name, weight in weights.items():
        weight.requires_grad_(name not in fixed)

    free = {name: weight for name, weight in weights.items() if weight.requires_grad}
    if not free:
        settings = ", ".join(sorted({why for why in fixed.values() if why != BY_MODEL}))
        raise ConfigError(f"{settings}: no weight is left to train")
    groups: list[dict[str, Any]] = []
    for group_name, options in config.param_groups.items():
        matched = _matches([options["re"]], weights, f"optimizer.param_groups.{group_name}.re")
        mine = [name for name in free if name in matched]
        if not mine:
            logger.warning(
                "optimizer.param_groups.%s: left out; the weights that it matches are kept fixed or in another group",
                group_name,
            )
        overrides = {key: value for key, value in options.items() if key != "re"}
        groups.append({"name": group_name, "params": [free.pop(name) for name in mine], **overrides})
    groups.insert(0, {"name": "default", "params": list(free.values())})
    optimizer = _make_optimizer(config, [group for group in groups if group["params"]])
    for name, blocks in rows.items():
        _fix_rows(weights[name], blocks, optimizer)
    if _some_predictions_are_fixed(weights):
        _keep_graph(model, min(optimizer.param_groups[0]["params"], key=Tensor.numel))
    logger.info("what is trained, and what is kept fixed\n%s", "\n".join(_summary(optimizer, weights, fixed, rows)))
    return optimizer


def reference_optimizer(config: "OptimizerConfig") -> Optimizer:
    """Return the same optimiser over one weight that nobody uses; its one group has the base learning rate."""
    return _make_optimizer(config, [{"params": [nn.Parameter(torch.zeros(1))]}])


def _make_optimizer(config: "OptimizerConfig", groups: list[dict[str, Any]]) -> Optimizer:
    optimizer_class = resolve(config.class_)
    try:
        optimizer: Optimizer = optimizer_class(groups, **_batched(optimizer_class, config.kwargs))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer: {config.class_}: {error}") from error
    return optimizer


def _batched(optimizer_class: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by which an optimiser updates all weights together, if it can and nothing else was chosen."""
    accepted = accepted_keywords(optimizer_class) or []
    chosen = {"foreach", "fused", "differentiable"} & kwargs.keys()
    return {**kwargs, "foreach": True} if "foreach" in accepted and not chosen else dict(kwargs)


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


# --------------------------------------------------------------------------------------------------
# what is kept fixed
# --------------------------------------------------------------------------------------------------

BY_MODEL = "the model"
BY_PATTERN = "optimizer.force_no_train"
BY_BACKBONE = "optimizer.freeze_backbone"
BY_FIDELITY = "optimizer.freeze_fidelities"
"""What may keep a weight fixed; the model itself does so for its radial basis."""


def _fixed(
    config: "OptimizerConfig", model: nn.Module, weights: Mapping[str, nn.Parameter], names: Mapping[int, str] | None
) -> tuple[dict[str, str], dict[str, list[slice]]]:
    """Find what is kept fixed.

    Returns
    -------
    fixed : dict
        Weight -> what keeps it fixed.
    rows : dict
        Table that learns -> blocks of its rows that do not.
    """
    trained = _matches(config.force_train, weights, "optimizer.force_train")
    fixed = {name: BY_MODEL for name, weight in weights.items() if not (weight.requires_grad or name in trained)}
    patterns = _matches(config.force_no_train, weights, BY_PATTERN)
    if both := sorted(trained & patterns):
        raise ConfigError(f"optimizer.force_train: {both[0]} also matches {BY_PATTERN}; keep one of them")
    fixed |= dict.fromkeys(patterns - fixed.keys(), BY_PATTERN)
    if config.freeze_backbone:
        fixed |= {name: BY_BACKBONE for name in weights if _is_backbone(name) and name not in {*fixed, *trained}}
    if not config.freeze_fidelities:
        return fixed, {}

    layout = layout_of_model(model)
    known = names or {f: f"fid{f}" for f in range(layout.num_fidelities)}
    frozen = {fidelity_number(name, known, BY_FIDELITY) for name in config.freeze_fidelities}
    said = ", ".join(known[f] for f in sorted(frozen))
    learning = [name for name in weights if name not in fixed]
    everyone = len(frozen) == layout.num_fidelities
    of_frozen = [name for name in learning if everyone and not _is_backbone(name)]
    of_frozen += [name for name in learning if (head := HEAD_KEY.fullmatch(name)) and int(head[1]) in frozen]
    if both := [name for name in of_frozen if name in trained]:
        raise ConfigError(f"optimizer.force_train: {both[0]} belongs to {said}, which {BY_FIDELITY} keeps fixed")
    fixed |= dict.fromkeys(of_frozen, BY_FIDELITY)

    shared = [name for name in learning if name not in fixed and not _is_backbone(name) and not HEAD_KEY.match(name)]
    if together := [name for name in shared if not is_type_table(name)]:
        raise ConfigError(
            f"{BY_FIDELITY}: the readouts are those of all fidelities (use_fidelity_readouts: false), so that of "
            f"{said} alone they cannot be fixed. Fix {together[0].rpartition('.')[0]} and its like for all, with "
            f"'^outputs' in {BY_PATTERN}, or leave {said} out"
        )
    if any(_is_backbone(name) and name not in fixed for name in learning):
        logger.warning(
            "%s: predictions of %s change all the same, because the backbone learns; %s: true keeps them",
            BY_FIDELITY,
            said,
            BY_BACKBONE,
        )
    return fixed, {name: _blocks(layout, frozen) for name in shared}


def _is_backbone(name: str) -> bool:
    """Tell whether a weight is common to all fidelities, whatever their readouts."""
    return not name.startswith(("afv.", *READOUT_PREFIXES))


def _blocks(layout: Layout, fidelities: set[int]) -> list[slice]:
    """Rows of a table that belong to fidelities."""
    blocks = [layout.block(f) for f in sorted(fidelities)]
    return [slice(block.start, block.stop) for block in blocks]


def _fix_rows(table: nn.Parameter, blocks: Sequence[slice], optimizer: Optimizer) -> None:
    """Keep blocks of rows bitwise as they are under any optimiser, while the others learn.

    The rows are remembered just before each step, so that weights may be loaded at any time.
    """
    remembered: list[Tensor] = []

    def without_gradient(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        for block in blocks:
            gradient[block] = 0.0
        return gradient

    def remember(*_: Any) -> None:
        remembered[:] = [table.detach()[block].clone() for block in blocks]

    def put_back(*_: Any) -> None:
        for block, rows in zip(blocks, remembered, strict=True):
            table.detach()[block] = rows

    table.register_hook(without_gradient)
    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(put_back)


def _some_predictions_are_fixed(weights: Mapping[str, nn.Parameter]) -> bool:
    """Tell whether there is a fidelity whose predictions depend on no weight that is trained."""
    own = {name: int(match[1]) for name in weights if (match := HEAD_KEY.fullmatch(name))}
    learning = [name for name, weight in weights.items() if weight.requires_grad]
    return all(name in own for name in learning) and {own[name] for name in learning} != set(own.values())


def _keep_graph(model: nn.Module, weight: nn.Parameter) -> None:
    """Let the energies, and through them the forces, of all molecules depend on a trained weight, with the factor 0.

    A batch of nothing but frozen fidelities has no graph otherwise: one process would fail in going backward, and one
    of several would leave the others waiting for its gradient.
    """

    def add_nothing(module: nn.Module, inputs: tuple[dict[str, Tensor], ...], out: dict[str, Tensor]) -> Any:
        if not (module.training and torch.is_grad_enabled()):
            return None
        return {**out, "energy": out["energy"] + 0.0 * weight.sum() * inputs[0]["coord"].sum()}

    model.register_forward_hook(add_nothing)


def _summary(
    optimizer: Optimizer,
    weights: Mapping[str, nn.Parameter],
    fixed: Mapping[str, str],
    rows: Mapping[str, Sequence[slice]],
) -> list[str]:
    """Return a table of what is trained, at which rate, and of what is kept fixed by what."""
    fixed_numbers = {id(weights[name]): sum(weights[name][block].numel() for block in rows[name]) for name in rows}
    lines: list[tuple[str | int, ...]] = []
    for group in optimizer.param_groups:
        count = sum(weight.numel() - fixed_numbers.get(id(weight), 0) for weight in group["params"])
        lines.append((f"trained: group {group['name']}", f"{float(group['lr']):g}", len(group["params"]), count))
    for why in (BY_MODEL, BY_PATTERN, BY_BACKBONE, BY_FIDELITY):
        mine = [weights[name] for name, reason in fixed.items() if reason == why]
        if mine:
            lines.append((f"fixed by {why}", "-", len(mine), sum(weight.numel() for weight in mine)))
    for name in rows:
        lines.append((f"fixed by {BY_FIDELITY}: rows of {name}", "-", "-", fixed_numbers[id(weights[name])]))
    return text_table(("", "learning rate", "tensors", "weights"), lines)
