"""
Measures quickly what recording a stage costs on this machine, now.

Good to a few tens of per cent; `benchmarks/` has the careful measurements. Switches nothing on: recording must be on.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import gpuscope

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

ROUNDS, CALLS = 10, 200
FLUSH_TIMEOUT_S = 5.0


def stage(torch: ModuleType | None) -> float:
    """Measure a `with` block, with its GPU part if `torch` is given; return nanoseconds per stage."""
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


def bare_pair(torch: ModuleType) -> float:
    """Measure recording two CUDA events that exist already, the least that anybody needs; return nanoseconds."""
    stream = torch.cuda.current_stream()
    first, second = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def block() -> None:
        for _ in range(CALLS):
            first.record(stream)
            second.record(stream)

    return _quickest(block, torch.cuda.synchronize)


def _quickest(block: Callable[[], None], between: Callable[[], object]) -> float:
    # The quickest of several rounds shows what the code costs; the others show what else the machine was doing.
    quickest_ns = float("inf")
    for _ in range(ROUNDS):
        start_ns = time.perf_counter_ns()
        block()
        quickest_ns = min(quickest_ns, (time.perf_counter_ns() - start_ns) / CALLS)
        between()
    return quickest_ns
