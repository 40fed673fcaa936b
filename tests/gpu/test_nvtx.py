"""A real NVIDIA tool finds gpuscope's NVTX ranges, and the right kernels in them."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
USUAL_PLACE = "/usr/local/cuda/bin/ncu"
PROGRAM = """
import torch, gpuscope
x = torch.ones(4096, device="cuda")
decorated = gpuscope.stage("infer")(lambda: x.cos_())
x.tanh_()
with gpuscope.stage("infer"):
    x.sigmoid_()
x.exp_()
try:
    with gpuscope.stage("infer"):
        x.sin_()
        raise ValueError
except ValueError:
    pass
x.tanh_()
with gpuscope.stage("other"):
    x.exp_()
decorated()
x.exp_()
torch.cuda.synchronize()
"""


@pytest.fixture
def ncu():
    """The path of Nsight Compute's command line."""
    path = shutil.which("ncu") or shutil.which(USUAL_PLACE)
    if path is None:
        pytest.skip("needs ncu")
    return path


def test_ncu_selects_the_kernels_of_a_stage(ncu, tmp_path):
    """
    `ncu --nvtx-include "gpuscope@infer/"` profiles the kernels launched in stages named `infer` and no others.

    Those are a block, one that raised, and a decorated function.
    """
    log = tmp_path / "ncu.log"
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    options = ["--nvtx", "--nvtx-include", "gpuscope@infer/", "--metrics", "gpu__time_duration.sum", "--csv"]
    options += ["--print-kernel-base", "demangled", "--clock-control", "none", "--log-file", str(log)]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GPUSCOPE", "OTEL_", "NVTX_"))}
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    done = subprocess.run(
        [ncu, *options, sys.executable, str(script)],
        env=kept | {"GPUSCOPE": "1", "GPUSCOPE_EXPORTER": "none"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    text = log.read_text() if log.exists() else ""
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{text}"
    rows = list(csv.DictReader(line for line in text.splitlines() if line.startswith('"')))
    kernels = [row["Kernel Name"] for row in rows]
    assert len(kernels) == 3, text
    for kernel, word in zip(kernels, ("sigmoid", "sin", "cos"), strict=True):
        assert f"{word}_kernel" in kernel
