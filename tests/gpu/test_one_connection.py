"""A GPU whose only connection is busy: its clock is hard to read, and nothing may spin for it."""

from __future__ import annotations

import pytest

BUSY = """
import json, threading, time
import torch
import gpuscope
from gpuscope.testing import capture

x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
y = x @ x
torch.cuda.synchronize()
streams, waiting, pause, stages = [torch.cuda.Stream() for _ in range(4)], [], threading.Event(), 0
with capture() as spans:
    end, cpu, mine = time.perf_counter() + 5, time.process_time(), time.thread_time()
    while time.perf_counter() < end:  # Some 60 ms of work are always queued.
        events = []
        for stream in streams:
            with torch.cuda.stream(stream), gpuscope.stage("product"):
                for _ in range(10):
                    torch.mm(x, x, out=y)
                events.append(torch.cuda.Event())
                events[-1].record()
            stages += 1
        waiting.append(events)
        if len(waiting) > 1:
            for event in waiting.pop(0):
                while not event.query():
                    pause.wait(0.001)
    others = (time.process_time() - cpu) - (time.thread_time() - mine)
    torch.cuda.synchronize()
    flushed, untimed = gpuscope.flush(10), gpuscope.statistics().untimed
gpu = [span for span in spans if span.kind == "gpu"]
sure = [span for span in gpu if "gpuscope.unplaced" not in span.attributes]
worst = max((span.attributes["gpuscope.clock.uncertainty"] for span in sure), default=0)
print(json.dumps([flushed, untimed, len(gpu) == stages, others / 5, worst]))
"""


@pytest.mark.parametrize("connections", ["1", "8"])
def test_a_busy_connection_costs_no_thread(run_program, connections):
    """All stages have durations, what has a place is placed well, and other threads take a fifth of a core at most."""
    result = run_program(BUSY, timeout_s=60, CUDA_DEVICE_MAX_CONNECTIONS=connections)
    *rest, share, worst_s = result
    assert rest == [True, {}, True]
    assert share < 0.2
    assert worst_s < 0.001
