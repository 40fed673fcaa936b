"""Recording creates no CUDA context that the program did not create itself."""

from __future__ import annotations

PRIMARY = """
import ctypes
def active_contexts():
    cuda = ctypes.CDLL("libcuda.so.1")
    count, found = ctypes.c_int(), []
    assert cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0
    for index in range(count.value):
        device, flags, active = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
        assert cuda.cuDeviceGet(ctypes.byref(device), index) == 0
        assert cuda.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active)) == 0
        found.append(active.value)
    return found
"""

STAGES = """
import json, torch, gpuscope
from gpuscope.testing import capture
def run(use=lambda: torch.ones(8).sum()):
    with capture(interval_s=0.001) as spans:
        for _ in range(20):
            with gpuscope.stage("outer"), gpuscope.stage("inner"):
                use()
        assert gpuscope.flush(30)
    return [span.kind for span in spans]
"""


def test_a_program_without_cuda_gets_no_context(run_program):
    """Stages in a program that never uses CUDA give host spans, and leave CUDA uninitialised and without a context."""
    answer = run_program(
        STAGES
        + "kinds = run()\ninitialized = torch.cuda.is_initialized()\n"
        + PRIMARY
        + "print(json.dumps([kinds, initialized, active_contexts()]))"
    )
    kinds, initialized, active = answer
    assert kinds == ["host"] * 40
    assert initialized is False
    assert set(active) == {0}


def test_importing_and_enabling_touches_no_device(run_program):
    """With `GPUSCOPE=1` importing gpuscope and torch, recording and exiting create no context."""
    program = (
        "import json, torch, gpuscope\nwith gpuscope.stage('a'):\n    pass\ngpuscope.shutdown(10)\n"
        + PRIMARY
        + "print(json.dumps([torch.cuda.is_initialized(), active_contexts()]))"
    )
    initialized, active = run_program(program, GPUSCOPE="1", GPUSCOPE_EXPORTER="none")
    assert initialized is False
    assert set(active) == {0}


def test_initialising_cuda_is_not_using_a_device(run_program):
    """Where the program has initialised CUDA but used no device, stages create no context that was not there before."""
    before, after, kinds = run_program(
        STAGES
        + PRIMARY
        + "torch.cuda.init()\nbefore = active_contexts()\nkinds = run()\n"
        + "print(json.dumps([before, active_contexts(), kinds]))"
    )
    assert after == before
    if not any(before):
        assert kinds == ["host"] * 40


def test_hidden_devices_give_host_spans(run_program):
    """With no visible device stages give host spans."""
    kinds = run_program(STAGES + "print(json.dumps(run()))", CUDA_VISIBLE_DEVICES="")
    assert kinds == ["host"] * 40


def test_stages_are_timed_from_the_first_use_of_cuda_on(run_program):
    """Stages before the program first uses CUDA are host spans; those after it, in the same process, have GPU spans."""
    first, second = run_program(
        STAGES
        + "first = run()\nx = torch.ones(8, device='cuda')\nsecond = run(lambda: x.add_(1))\n"
        + "print(json.dumps([first, second]))"
    )
    assert first == ["host"] * 40
    assert sorted(second) == ["gpu"] * 40 + ["host"] * 40
