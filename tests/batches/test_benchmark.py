"""The benchmark of batches in its quick mode: it runs, and what it checks holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_batches.py"
OF_TIME = "the program's own clock"
"""In the text of goals that a busy machine may miss."""


def test_every_request_of_every_batch(tmp_path):
    """Batches, light spans and shares are those of the program, and nothing is unexplained."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GPUSCOPE", "OTEL_"))}
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert [goal["text"] for goal in result["goals"] if not goal["met"] and OF_TIME not in goal["text"]] == []
    for way in result["ways"].values():
        assert way["members"] == way["waits"]["members"] > 100
        assert way["waits"]["p50_us"] < 1000
    assert set(result["ways"]) | set(result["left_out"]) == {"asyncio", "LitServe"}
