"""`measure` on a GPU."""

from __future__ import annotations

import pytest

import gpuscope

torch = pytest.importorskip("torch")


def test_gpu_time_of_a_known_kernel():
    """A kernel that spins for a known time is measured as that, and half of it as half."""
    cycles = 2_000_000

    measured = gpuscope.measure(
        lambda: torch.cuda._sleep(cycles), lambda: torch.cuda._sleep(2 * cycles), iterations=20, warmup=3
    )
    assert 1.8 < measured[1].gpu_ms.median / measured[0].gpu_ms.median < 2.2
    assert measured[1].host_ms.median < measured[1].gpu_ms.median
