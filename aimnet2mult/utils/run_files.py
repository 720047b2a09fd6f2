"""Names of the files in the folder of a run: training writes them, an evaluation reads them."""

import re

SETTINGS, MODEL_SETTINGS, DATA, SPLIT = "train.yaml", "model.yaml", "data.json", "split.npz"
METRICS, METRICS_TABLE, TIMING = "metrics.jsonl", "metrics.csv", "timing.jsonl"
RUN_RECORD, LOG, MODEL = "run.json", "train.log", "model.pt"

LAST_NAME = re.compile(r"(?P<prefix>[^.].*|)_last_iter_(?P<iteration>\d{9,})\.pt", re.DOTALL)
BEST_NAME = re.compile(
    r"(?P<prefix>[^.].*|)_epoch_(?P<epoch>\d{4,})_iter_(?P<iteration>\d{7,})"
    r"(_.*?(_(?P<score>-?\d+\.\d+(e[-+]\d+)?))?)?\.pt",
    re.DOTALL,
)
"""Names of checkpoints, of the best ones with their score (low is good); a temporary file, with a dot in front, has
neither."""
