"""Neighbouring stages share an event: nothing can be enqueued in so little time, and their times stay right."""

from __future__ import annotations

import ctypes
import time

import pytest
import torch

import gpuscope
from gpuscope._cuda.timed_stream import SHARE_NS
from gpuscope._data.native import native
from gpuscope.testing import capture

pytestmark = pytest.mark.skipif(native is None, reason="the twins share no events")


def least_ns(call, *arguments):
    """Return the least that a call takes, of many."""
    clock, least = time.perf_counter_ns, 10**9
    for number in range(20_000):
        before = clock()
        call(*arguments)
        least = min(least, clock() - before)
        if number % 200 == 199:
            torch.cuda.synchronize()
    return least


def test_nothing_is_enqueued_in_so_little_time():
    """An event, a memset and a copy take longer than `SHARE_NS` in the driver alone, the call from Python left out."""
    driver = ctypes.PyDLL("libcuda.so.1")
    stream = torch.cuda.Stream()
    handle, memory = ctypes.c_void_p(stream.cuda_stream), torch.zeros(1024, device="cuda")
    address, zero, size = ctypes.c_uint64(memory.data_ptr()), ctypes.c_ubyte(0), ctypes.c_size_t(64)
    source = torch.zeros(64, dtype=torch.uint8).pin_memory()
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    calls = {
        "event": (driver.cuEventRecord, ctypes.c_void_p(event.cuda_event), handle),
        "memset": (driver.cuMemsetD8Async, address, zero, size, handle),
        "copy": (driver.cuMemcpyHtoDAsync_v2, address, ctypes.c_void_p(source.data_ptr()), size, handle),
    }
    version = ctypes.c_int()
    nothing_ns = least_ns(driver.cuDriverGetVersion, ctypes.byref(version))
    least = {name: least_ns(*call) - nothing_ns for name, call in calls.items()}
    assert min(least.values()) > SHARE_NS, least


def stages_of(rounds, work):
    """Run requests of seven stages that do some work each, and return their GPU spans by request."""
    with capture() as spans:
        for _ in range(rounds):
            torch.cuda._sleep(200_000)  # The GPU is behind, so that events mark the GPU's time and not the host's.
            with gpuscope.stage("request"):
                for number in range(7):
                    with gpuscope.stage(f"stage {number}"):
                        work(number)
    gpu = [span for span in spans if span.kind == "gpu"]
    by_trace = {}
    for span in gpu:
        by_trace.setdefault(span.trace_id, {})[span.name.removesuffix(" [gpu]")] = span
    return list(by_trace.values())


def test_neighbours_share_their_events():
    """In most requests the end of a stage is the start of the next, to the nanosecond."""
    torch.cuda._sleep(1000)
    requests = stages_of(50, lambda _: torch.cuda._sleep(100_000))
    shared = [
        abs(one[f"stage {number}"].end_ns - one[f"stage {number + 1}"].start_ns) <= 1
        for one in requests
        for number in range(6)
    ]
    assert len(requests) == 50
    assert sum(shared) >= 0.5 * len(shared), f"{sum(shared)} of {len(shared)}"


def test_times_of_a_chain_agree_with_the_kernels(cupti):
    """Each kernel lies within the span of its own stage, and stages last as long as their kernels."""
    cycles = [200_000 * (1 + number) for number in range(7)]
    torch.cuda._sleep(1000)
    with cupti.Window() as window:
        requests = stages_of(20, lambda number: torch.cuda._sleep(cycles[number]))
    kernels = window.kernels("spin")
    assert len(kernels) == 20 * 8
    right = []
    for one, (_, *inner) in zip(requests, zip(*[iter(kernels)] * 8, strict=True), strict=True):
        for number, kernel in enumerate(inner):
            span = one[f"stage {number}"]
            length_ns = kernel.end_ns - kernel.start_ns
            allowed_ns = span.attributes["gpuscope.clock.uncertainty"] * 1e9 + 20_000
            right.append(
                abs(span.end_ns - span.start_ns - length_ns) <= max(10_000, length_ns // 50)
                and abs(span.start_ns - kernel.start_ns) <= allowed_ns
                and abs(span.end_ns - kernel.end_ns) <= allowed_ns
            )
    assert sum(right) >= 0.97 * len(right)


def test_a_stage_that_launches_nothing_takes_nothing():
    """Its start and its end are one event, behind whatever the GPU has to do."""
    requests = stages_of(20, lambda number: torch.cuda._sleep(100_000) if number != 3 else None)
    lengths = sorted(one["stage 3"].end_ns - one["stage 3"].start_ns for one in requests)
    assert lengths[len(lengths) // 2] == 0
