"""The benchmark for GPUs runs on any device; here, on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_it_runs_on_a_cpu(tmp_path):
    output = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--small", "--no-compile", "--repeats", "1", "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *options], check=True, env=environment, timeout=250
    )
    result = json.loads(output.read_text())
    assert {row["mode"] for row in result["training"]} == {"float32", "float32, TF32", "bf16"}
    assert all(row["seconds"] > 0.0 for part in ("training", "inference") for row in result[part])
    assert [row["atoms"] for row in result["dynamics"]] == [21, 99]
    error = {row["mode"]: row["largest force error, eV/Å"] for row in result["accuracy"]}
    assert 0.0 < error["float32"] < 1e-5 < error["bf16"] < 0.1
    page = output.with_suffix(".md").read_text()
    assert "| 300 | bf16 |" in page
