"""Processes that stall on a driver that is made of C: what the GPU did is told from what streams and events answer."""

from __future__ import annotations

import json

import pytest

from gpuscope._data.native import native

pytestmark = pytest.mark.skipif(not hasattr(native, "StallWatch"), reason="streams are asked by the parts in C")
PROGRAM = """
import ctypes, json, os, sys, threading, time
from types import ModuleType, SimpleNamespace
import gpuscope
from gpuscope import stage
from gpuscope._cuda import cuda_device
from gpuscope._cuda.driver import Driver

library = ctypes.PyDLL(sys.argv[1])
where = threading.local()
torch = sys.modules["torch"] = ModuleType("torch")
def stream(raw): return SimpleNamespace(cuda_stream=raw, device_index=0, stream_id=raw << 5 | 3)
torch.cuda = SimpleNamespace(
    is_initialized=lambda: True,
    device_count=lambda: 1,
    current_stream=lambda index: stream(getattr(where, "raw", 0x70)),
)
torch.compiler = SimpleNamespace(is_dynamo_compiling=lambda: False)
torch._C = SimpleNamespace(
    _cuda_getDevice=lambda: 0, _cuda_getCurrentRawStream=lambda index: getattr(where, "raw", 0x70)
)
cuda_device.load_driver = lambda: Driver(library)
gpuscope.enable(exporters="none", metrics="none", stall="600ms", warmup=2, nvtx=False, interval_s=0.1)
usleep = ctypes.PyDLL(None).usleep
pause = threading.Event()
def load(has_work, raw=0x70): library.fake_load(ctypes.c_void_p(raw), has_work)
def request(wait=lambda: None):
    with stage("request"):
        with stage("infer"):
            wait()
for _ in range(4):
    request()
gpuscope.flush()
def until(condition, limit_s=20):
    before = time.monotonic()
    while not condition():
        assert time.monotonic() - before < limit_s
        pause.wait(0.01)
    return time.monotonic() - before
def stalls(): return gpuscope.statistics().stalls
def path(): return gpuscope._runtime.state.engine.recorder.stalls.path
def end(**more):
    gpuscope.flush()
    found = gpuscope.statistics()
    text = open(path()).read() if os.path.exists(path()) else ""
    balance = found.recorded == found.exported + sum(found.dropped.values()) + sum(found.lost.values()) + found.pending
    print(json.dumps({"stalls": found.stalls, "text": text, "balance": balance, "pending": found.pending, **more}))
"""


@pytest.fixture
def run(run_python, driver_file, tmp_path):
    """Return a function that runs a program, and returns what it says at its end."""

    def run(program):
        done = run_python(PROGRAM + program, str(driver_file), TMPDIR=str(tmp_path))
        assert done.returncode == 0, done.stderr
        return {**json.loads(done.stdout.splitlines()[-1]), "log": done.stderr}

    return run


def test_the_host_waits_for_a_gpu_that_works(run):
    """It has not left the stage, and the stream has had work at every question."""
    said = run(
        """
load(1)
request(lambda: until(stalls))
load(0)
end()
"""
    )
    assert said["stalls"] == {"host_never_left": 1}
    assert "GPU 0, stream 0x70: at every question work, for 0." in said["log"]
    assert said["balance"]


def test_the_gpu_is_done_and_the_host_is_not_back(run):
    """Its stream had work during the stage, and has none any more: a lock keeps the host."""
    said = run(
        """
def wait():
    load(1)
    pause.wait(0.1)
    load(0)
    until(stalls)
request(wait)
end()
"""
    )
    assert said["stalls"] == {"host_not_back": 1}
    assert "host_not_back: the GPU has done the work of stage infer, and the host is not back" in said["log"]
    assert "GPU 0, stream 0x70: no work for 0." in said["log"]


def test_a_call_that_keeps_the_gil_after_the_gpu_is_done(run):
    """The thread in C says which it is, by what streams answered: neither needs the GIL."""
    said = run(
        """
def wait():
    load(1)
    usleep(100_000)
    load(0)
    usleep(2_500_000)
request(wait)
until(stalls)
end()
"""
    )
    in_c, _, in_python = said["text"].partition("stacks follow")
    assert "host_not_back: the GPU has done the work of stage infer" in in_c
    assert "a call keeps the GIL" in in_c
    assert "GPU 0, stream 0x70: no work for" in in_c
    assert "a call kept the GIL" in in_python
    assert said["stalls"] == {"host_not_back": 1}


def test_the_host_has_left_and_the_gpu_is_not_done(run):
    """By its events, which the collector asks about; healthy streams beside it are said to have no work."""
    said = run(
        """
def serve(raw):
    where.raw = raw
    with stage("healthy"):
        pass
for raw in (0x71, 0x72, 0x73):
    thread = threading.Thread(target=serve, args=(raw,))
    thread.start()
    thread.join()
for _ in range(3): request()
gpuscope.flush()
library.fake_hold()
load(1)
request()
took = until(stalls)
load(0)
library.fake_work(1_000_000)
until(lambda: not gpuscope.statistics().pending)
end(took=took)
"""
    )
    assert said["stalls"] == {"gpu_not_done": 1}
    assert said["took"] < 0.6 + 1 + 0.5
    assert "GPU 0, stream 0x70" in said["log"]
    for raw in ("0x71", "0x72", "0x73"):
        assert f"beside it GPU 0, stream {raw}: no work for" in said["text"]
    assert "last done there: " in said["log"]
    assert (said["balance"], said["pending"]) == (True, 0)


def test_nothing_is_said_while_a_graph_is_captured(run):
    """PyTorch's captures hold all questions: much is slow for once, and nothing is known."""
    said = run(
        """
from gpuscope._data.native import native
native.hold_samplers()
request(lambda: pause.wait(2))
native.release_samplers()
end(before=dict(stalls()))
"""
    )
    assert (said["before"], said["stalls"], said["text"]) == ({}, {}, "")
