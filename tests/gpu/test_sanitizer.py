"""NVIDIA's own checker watches the helpers at work."""

from __future__ import annotations

import shutil
import subprocess
import sys
from textwrap import dedent

import pytest

SANITIZER = shutil.which("compute-sanitizer")
PROGRAM = dedent(
    """
    import torch, gpuscope

    def infer(x):
        return {"twice": x * 2, "sum": x.sum(1)}

    for graph in (False, True):
        batches = [torch.full((8 + i % 2, 64), float(i)) for i in range(12)]
        loop = gpuscope.overlap(batches, infer, lambda y: float(y["twice"][0, 0]), depth=3, graph=graph)
        assert list(loop) == [2.0 * i for i in range(12)]
    pool = gpuscope.PinnedPool((8, 64), torch.float32, max_buffers=2)
    with pool.acquire() as buffer:
        there = buffer.fill_from(torch.ones(8, 64)).to_device("cuda", torch.cuda.Stream())
        assert buffer.copy_from_device(there + 1).result().eq(2).all()
    print("ran to its end")
    """
)


@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is part of the CUDA toolkit")
@pytest.mark.timeout(240)
def test_overlap_and_pinned_buffers_are_clean():
    """No access out of bounds, to freed memory, or misaligned, in eager loops, graphs and copies."""
    command = [SANITIZER, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "ERROR SUMMARY: 0 errors" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
    assert "ran to its end" in done.stdout
    assert done.returncode == 0
