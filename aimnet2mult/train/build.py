"""Model, loss and metric of a run, from its settings and its data."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aimnet2mult.config.builder import ConfigError, nearest, resolve
from aimnet2mult.dispersion import RationalDispersion
from aimnet2mult.models.aimnet2 import AIMNet2
from aimnet2mult.models.base import CheckpointError, build_model, load_checkpoint
from aimnet2mult.train.data import Data
from aimnet2mult.train.fidelity_specific_utils import start_from_checkpoint
from aimnet2mult.train.loss import MTLoss
from aimnet2mult.train.metrics import RegMultiMetric
from aimnet2mult.train.schema import TrainConfig
from aimnet2mult.train.sharing import start_independently
from aimnet2mult.train.utils import accepted_keywords

logger = logging.getLogger(__name__)


def build_network(config: TrainConfig, model_config: Mapping[str, Any], data: Data, load: str | Path | None) -> AIMNet2:
    """Build the model (a plain AIMNet2 for one fidelity) and start it from a checkpoint if there is one."""
    count = data.train.num_fidelities
    model = build_model(dict(model_config), count, config.fidelity_offset, config.use_fidelity_readouts)
    n_weights = sum(weight.numel() for weight in model.parameters())
    logger.info("model: %s, number of fidelities %d, number of weights %d", type(model).__name__, count, n_weights)
    if any(isinstance(module, RationalDispersion) for module in model.modules()):
        for name, fidelity in data.fidelities.items():
            if fidelity.subtract_dispersion:
                raise ConfigError(
                    f"data.fidelities.{name}.subtract_dispersion: the model has a dispersion energy among its outputs, "
                    "which would then be added to labels without dispersion. Remove one of the two"
                )
    if config.sharing.start == "independent":
        start_independently(model, model_config, embedding=config.sharing.embedding == "own")
    if load is not None:
        checkpoint = load_checkpoint(load)
        try:
            lines = start_from_checkpoint(
                model, checkpoint, model_config, data.train, data.train_indices, data.names, config.init_from
            )
        except CheckpointError as error:
            raise ConfigError(f"{load}: {error}") from error
        logger.info("weights from %s\n%s", load, "\n".join(lines))
    return model


def build_metric(config: TrainConfig, data: Data) -> RegMultiMetric:
    """Build the metric of the validation; errors of each fidelity stand under its name."""
    kwargs = dict(config.metrics.kwargs)
    metric_class = resolve(config.metrics.class_)
    accepted = accepted_keywords(metric_class)
    if accepted is None or "fidelity_names" in accepted:
        kwargs.setdefault("fidelity_names", data.names)
    if accepted is None or "num_fidelities" in accepted:
        kwargs.setdefault("num_fidelities", len(data.names))
    metric: RegMultiMetric = metric_class(**kwargs)
    return metric


def build_loss(config: TrainConfig, data: Data) -> MTLoss:
    """Build the loss; a component without labels, and a fidelity without labels for it, are pointed out."""
    kwargs = dict(config.loss.kwargs)
    numbers = {name: f for f, name in data.names.items()}
    kwargs["components"] = {
        name: _with_numbers(component, numbers, f"loss.kwargs.components.{name}.fidelity_weights")
        for name, component in kwargs["components"].items()
    }
    loss_fn: MTLoss = resolve(config.loss.class_)(**kwargs)
    loss_fn.check_fidelities(len(numbers))
    labels = {
        name: {label for label, count in known["labels"].items() if count["molecules"]}
        for name, known in data.record["fidelities"].items()
    }
    for component, label in loss_fn.key_true.items():
        if label is not None and not any(label in present for present in labels.values()):
            logger.warning("loss component %s: no dataset has the label %s, it is always zero", component, label)
    used = set(loss_fn.key_true.values())
    for name, present in labels.items():
        if None not in used and not present & used:
            logger.warning("%s: no molecule has a label that the loss uses; nothing is learned from it", name)
    return loss_fn


def _with_numbers(component: Mapping[str, Any], numbers: Mapping[str, int], where: str) -> dict[str, Any]:
    """Return a component of the loss whose ``fidelity_weights`` are for numbers instead of names."""
    weights = component.get("fidelity_weights")
    if weights is None:
        return dict(component)
    for name in weights:
        if name not in numbers:
            raise ConfigError(f"{where}: there is no fidelity {name!r}; {nearest(str(name), list(numbers))}")
    return {**component, "fidelity_weights": {numbers[name]: weight for name, weight in weights.items()}}
