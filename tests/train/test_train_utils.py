"""Keywords, devices, log."""

import logging

import pytest
import torch
from ignite.handlers import ReduceLROnPlateauScheduler

from aimnet2mult.config.builder import resolve
from aimnet2mult.train import utils
from aimnet2mult.train.utils import accepted_keywords, pick_device

IGNITE = "ignite.handlers."


def test_keywords_of_a_class_include_those_passed_on():
    assert {"start_value", "cycle_size", "monotonic"} <= set(
        accepted_keywords(resolve(IGNITE + "LinearCyclicalScheduler"))
    )
    assert {"metric_name", "patience"} <= set(accepted_keywords(ReduceLROnPlateauScheduler))
    assert accepted_keywords(lambda **anything: None) is None


def test_devices(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="asks for GPU 0, this machine has 0"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert pick_device("auto", local_rank=3) == torch.device("cuda", 3)
    assert pick_device("cuda:1") == torch.device("cuda", 1)


def test_only_rank_zero_speaks(capsys):
    logger = logging.getLogger("aimnet2mult")
    before = (logger.handlers[:], logger.level)
    try:
        for rank in (0, 1):
            utils.setup_logging(verbose=False, rank=rank)
            logging.getLogger("aimnet2mult.train.x").info("from rank %d", rank)
            logging.getLogger("aimnet2mult.train.x").debug("detail")
        error = capsys.readouterr().err
        assert "from rank 0" in error
        assert "from rank 1" not in error
        assert "detail" not in error
    finally:
        logger.handlers[:], logger.level = before
