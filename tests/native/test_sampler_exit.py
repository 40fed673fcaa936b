"""Processes that end while streams are asked 5,000 times a second, on a driver that is made of C."""

from __future__ import annotations

import signal

import pytest

from gpuscope._data.native import native

pytestmark = pytest.mark.skipif(not hasattr(native, "StreamSampler"), reason="nothing is asked without the parts in C")
PROGRAM = """
import ctypes, os, signal, sys, threading
from types import ModuleType, SimpleNamespace
import gpuscope
from gpuscope import _runtime, stage
from gpuscope._cuda import cuda_device
from gpuscope._cuda.driver import Driver

library = ctypes.PyDLL(sys.argv[1])
torch = sys.modules["torch"] = ModuleType("torch")
torch.cuda = SimpleNamespace(
    is_initialized=lambda: True,
    device_count=lambda: 1,
    current_stream=lambda index: SimpleNamespace(cuda_stream=0x70, device_index=0, stream_id=0x70 << 5 | 3),
)
torch.compiler = SimpleNamespace(is_dynamo_compiling=lambda: False)
torch._C = SimpleNamespace(_cuda_getDevice=lambda: 0, _cuda_getCurrentRawStream=lambda index: 0x70)
cuda_device.load_driver = lambda: Driver(library)
gpuscope.enable(exporters="none", metrics="none", sample_hz=5000.0, nvtx=False)

def work():
    for _ in range(200):
        with stage("infer"):
            pass

work()
asked = _runtime.state.engine.recorder.device.sampling
pause = threading.Event()
while not asked.counts()["asked"]:
    with stage("infer"):
        pause.wait(0.001)
print("asked", flush=True)
"""
ENDS = {
    "return": "",
    "exit": "sys.exit(0)",
    "of a thread": "threading.Thread(target=work).start()",
    "in a stage": "stage('open').__enter__()",
    "after a shutdown": "gpuscope.shutdown()",
    "while off": "gpuscope.disable()",
    "on and off": "for _ in range(50): gpuscope.disable(); gpuscope.enable(); work()",
    "anew": "for n in range(10): gpuscope.enable(exporters='none', metrics='none', sample_hz=4000.0 + n); work()",
    "by libc": "ctypes.CDLL(None).exit(0)",
    "at once": "os._exit(0)",
    "held up": "library.fake_delay_streams(900_000_000); work()",
    "in a child": "pid = os.fork()\nif pid: sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\nwork()",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_process_ends_as_it_would(run_python, driver_file, end):
    """Its exit code is its own, nothing is said, and a driver that holds a question up is not waited for."""
    done = run_python(PROGRAM + ENDS[end], str(driver_file))
    assert (done.returncode, done.stdout, done.stderr) == (0, "asked\n", "")


@pytest.mark.parametrize(("end", "code"), [("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM), ("raise 3", 1)])
def test_a_process_that_fails_fails_as_it_would(run_python, driver_file, end, code):
    """By a signal or an exception."""
    done = run_python(PROGRAM + end, str(driver_file))
    assert (done.returncode, done.stdout) == (code, "asked\n")
