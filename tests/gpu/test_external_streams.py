"""Stages on streams of other libraries, which may be destroyed before anybody asks about them."""

from __future__ import annotations

import pytest

DESTROYED = """
import ctypes, json, threading
import torch
import gpuscope
from gpuscope.testing import capture

cuda, x = ctypes.CDLL("libcuda.so.1"), torch.zeros(1 << 20, device="cuda")
torch.cuda.synchronize()


def new_stream():
    stream = ctypes.c_void_p()
    assert cuda.cuStreamCreate(ctypes.byref(stream), 1) == 0
    return stream


pause = threading.Event()
with capture(interval_s=0.02) as spans:
    for i in range(100):
        raw = new_stream()
        external = torch.cuda.ExternalStream(raw.value)
        if HOW == "given":
            with gpuscope.stage("outside", stream=external), torch.cuda.stream(external):
                x.add_(1)
        else:
            with torch.cuda.stream(external), gpuscope.stage("outside"):
                x.add_(1)
        if HOW != "busy":
            external.synchronize()
        assert cuda.cuStreamDestroy_v2(raw) == 0
        if i % 10 == 0:
            pause.wait(0.03)
    torch.cuda.synchronize()
    flushed, s = gpuscope.flush(10), gpuscope.statistics()
kinds = [span.kind for span in spans]
sound = x.eq(100).all().item()
print(json.dumps([flushed, s.untimed, s.pending, kinds.count("host"), kinds.count("gpu"), sound]))
"""

CAPTURED = """
import ctypes, json
import torch
import gpuscope
from gpuscope.testing import capture

cuda, x = ctypes.CDLL("libcuda.so.1"), torch.zeros(1 << 20, device="cuda")
raw, graph = ctypes.c_void_p(), ctypes.c_void_p()
assert cuda.cuStreamCreate(ctypes.byref(raw), 1) == 0
external = torch.cuda.ExternalStream(raw.value)
with torch.cuda.stream(external):
    x.add_(1)
torch.cuda.synchronize()
with capture(interval_s=0.005) as spans:
    assert cuda.cuStreamBeginCapture_v2(raw, 0) == 0
    with torch.cuda.stream(external):
        for _ in range(10):
            with gpuscope.stage("inside"):
                x.add_(1)
    gpuscope.flush(5)
    ended = cuda.cuStreamEndCapture(raw, ctypes.byref(graph))
    gpuscope.flush(5)
marked = [span.attributes.get("gpuscope.captured") for span in spans if span.kind == "host"]
print(json.dumps([ended, marked.count(True), len(spans)]))
"""


@pytest.mark.parametrize("how", ["current", "given", "busy"])
def test_a_destroyed_stream_crashes_nothing(run_program, how):
    """Every stage has its GPU times, though its stream is gone and its address used again."""
    result = run_program(f"HOW = {how!r}\n{DESTROYED}", timeout_s=60)
    assert result == [True, {}, 0, 100, 100, True]


def test_a_capture_on_a_stream_of_another_library_survives(run_program):
    """The collector asks about no event of it while the capture is open, and its stages are marked."""
    assert run_program(CAPTURED, timeout_s=60) == [0, 10, 10]
