"""The benchmark of keeping runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_benchmark_finds_all_slow_requests_whole(tmp_path):
    """In its quick mode; whose figures of costs mean nothing, and whose counts do."""
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_keep.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "keep.json").read_text())
    checked = result["checked"]
    assert checked["slow_and_whole"] == checked["slow"] > 0
    assert checked["not_whole"] == 0
    assert checked["deviations"] < 5
    assert set(result["rounds"]) == {"all", "keep", "none"}
    assert result["machine"]["cpu"]
