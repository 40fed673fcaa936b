"""
A quick look at what recording a stage costs on this machine, now.

Good to a few tens of per cent; `benchmarks/` has the careful measurements. Recording must be on.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import gpuscope

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS, CALLS = 10, 200
FLUSH_TIMEOUT_S = 5.0


def stage(torch: Any) -> float:
    """Measure a `with` block, with a GPU part if `torch` is given; return nanoseconds."""
    if torch is not None:
        torch.zeros(1, device="cuda").add_(1)

    def block() -> None:
        for _ in range(CALLS):
            with gpuscope.stage("gpuscope doctor cost"):
                pass

    def between() -> None:
        if torch is not None:
            torch.cuda.synchronize()
        gpuscope.flush(FLUSH_TIMEOUT_S)

    return _quickest(block, between)


def bare_pair(torch: Any) -> float:
    """Measure the recording of two CUDA events that exist already, which is the least that anybody needs."""
    stream = torch.cuda.current_stream()
    first, second = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def block() -> None:
        for _ in range(CALLS):
            first.record(stream)
            second.record(stream)

    return _quickest(block, torch.cuda.synchronize)


def _quickest(block: Callable[[], None], between: Callable[[], object]) -> float:
    # The quickest of several rounds is what the code costs; the others are what else the machine was doing.
    quickest_ns = float("inf")
    for _ in range(ROUNDS):
        start_ns = time.perf_counter_ns()
        block()
        quickest_ns = min(quickest_ns, (time.perf_counter_ns() - start_ns) / CALLS)
        between()
    return quickest_ns
