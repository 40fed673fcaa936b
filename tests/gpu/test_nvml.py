"""What NVML says of a real GPU while stages run on it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import pytest
import torch

import gpuscope
from gpuscope._cuda.nvml import library
from gpuscope._cuda.nvml.readings import HIDDEN
from gpuscope.testing import capture


@pytest.fixture(scope="module")
def nvml():
    """NVML, as gpuscope opens it."""
    try:
        return library.Nvml(library.LIBRARY)
    except library.NoNvmlError as error:
        pytest.skip(error.why)


@pytest.fixture
def loop():
    """Return a function that keeps the GPU busy for some seconds, in stages, and one that leaves it alone."""
    a = torch.randn(8192, 8192, device="cuda").half()
    out = torch.mm(a, a)
    torch.cuda.synchronize()
    pause = threading.Event()

    def run(seconds, *, works=True):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with gpuscope.stage("request"):
                if works:
                    for _ in range(8):
                        torch.mm(a, a, out=out)
                    torch.cuda.synchronize()
                else:
                    pause.wait(0.05)

    return run


def told(until):
    """What was said so far of the only GPU in use."""
    assert gpuscope.flush(20)
    until(lambda: gpuscope.statistics().gpus, "a reading of NVML")
    (use,) = gpuscope.statistics().gpus
    return use


def since(before, now):
    """Utilisation and power between two readings."""
    took_s = now.watched_s - before.watched_s
    return (now.active_s - before.active_s) / took_s, (now.energy_j - before.energy_j) / took_s


def test_a_busy_loop_and_one_that_waits(nvml, loop, until):
    """Utilisation above 90 % and power above 50 W while the GPU works; utilisation falls while it does not."""
    with capture(nvml=True, warmup=0):
        loop(1.5)
        before = told(until)
        loop(3.0)
        busy = told(until)
        utilization, power_w = since(before, busy)
        loop(1.5, works=False)
        before = told(until)
        loop(2.0, works=False)
        idle_utilization, _ = since(before, told(until))
    assert utilization > 0.9
    assert 50 < power_w < 2000
    assert idle_utilization < 0.3
    assert 0.1e9 < busy.cycles / busy.watched_s < 5e9
    assert sum(busy.throttled_s.values()) <= 1.01 * busy.watched_s


def test_about_ten_readings_a_second_are_had(nvml, loop, until):
    """Nearly all of the time is watched, and no question is refused."""
    with capture(nvml=True, warmup=0):
        loop(1.0)
        before, began_s = told(until), time.monotonic()
        loop(3.0)
        took_s, now = time.monotonic() - began_s, told(until)
        assert gpuscope.statistics().nvml.startswith("10 times a second")
    assert now.watched_s - before.watched_s > 0.8 * took_s


def test_it_is_the_gpu_in_use(nvml, loop, until):
    """Found by its UUID: the name that NVML has for it is PyTorch's."""
    with capture(nvml=True, warmup=0):
        loop(0.5)
        use = told(until)
    import ctypes

    name, handle = ctypes.create_string_buffer(96), nvml.find(use.uuid)
    assert handle is not None
    assert nvml.call("nvmlDeviceGetName", handle, name, 96) == library.SUCCESS
    assert use.model in name.value.decode()
    assert use.index == torch.cuda.current_device()


def test_this_process_is_no_other(nvml, loop, until):
    """Alone on the GPU, or it is said that nobody knows."""
    with capture(nvml=True, warmup=0):
        loop(3.0)
        use = told(until)
    assert not use.others
    assert use.others_s.keys() <= {"alone", HIDDEN}


OTHER = """
import sys, time, torch
a = torch.randn(4096, 4096, device="cuda")
torch.cuda.synchronize()
print("ready", flush=True)
until = time.monotonic() + 60
while time.monotonic() < until:
    for _ in range(20):
        a @ a
    torch.cuda.synchronize()
"""


def test_another_process_is_seen(nvml, loop, until):
    """One that works, where NVML shows processes at all."""
    with capture(nvml=True, warmup=0):
        loop(2.0)
        if HIDDEN in told(until).others_s:
            pytest.skip("NVML shows no processes here")
        with subprocess.Popen([sys.executable, "-c", OTHER], stdout=subprocess.PIPE, text=True) as other:
            try:
                assert other.stdout.readline() == "ready\n"
                loop(4.0)
                use = told(until)
            finally:
                other.kill()
    assert use.others == 1
    assert use.others_s.get("worked", 0) + use.others_s.get("unknown", 0) > 0.3


CONTEXTS = """
import json, torch, gpuscope
from gpuscope.testing import capture
x = torch.ones(1024, device="cuda")
pause = __import__("threading").Event()
with capture(nvml=True, warmup=0):
    while not gpuscope.statistics().gpus and not gpuscope.statistics().nvml.startswith("not"):
        with gpuscope.stage("request"):
            x.add_(1)
        gpuscope.flush(10)
        pause.wait(0.05)
    pause.wait(1.0)
    has = [torch._C._cuda_hasPrimaryContext(index) for index in range(torch.cuda.device_count())]
    seen = [use.index for use in gpuscope.statistics().gpus]
print(json.dumps([has, seen]))
"""


def test_no_context_comes_of_it(nvml, run_program):
    """Of the GPUs only the one that the program uses has one, and only that is watched."""
    has, seen = run_program(CONTEXTS)
    assert has == [index == 0 for index in range(len(has))]
    assert seen == [0]


ENDS = """
import json, sys, threading, torch, gpuscope
x = torch.ones(1024, device="cuda")
for _ in range(200):
    with gpuscope.stage("infer"):
        x.add_(1)
gpuscope.flush(10)
threading.Event().wait(0.2)
print(json.dumps("done"))
"""


def test_a_process_ends_while_nvml_is_asked(run_program, tmp_path):
    """Its exit code is 0, again and again."""
    for _ in range(3):
        said = run_program(
            ENDS,
            GPUSCOPE="1",
            GPUSCOPE_NVML="1",
            GPUSCOPE_EXPORTER="file",
            GPUSCOPE_FILE=str(tmp_path / "spans-{pid}.jsonl"),
        )
        assert said == "done"
    assert any("gpuscope.gpu.watched" in path.read_text() for path in tmp_path.iterdir())


def test_the_loop_is_not_slowed(nvml, loop):
    """A thousand launches take as long with it as without, within a tenth: this machine may be shared."""
    x = torch.ones(1024, device="cuda")

    def launches():
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        for _ in range(1000):
            with gpuscope.stage("launch"):
                x.add_(1)
        torch.cuda.synchronize()
        return time.perf_counter() - began_s

    quickest = {True: float("inf"), False: float("inf")}
    for _ in range(5):
        for wanted in (True, False):
            with capture(nvml=wanted, warmup=0):
                launches()
                quickest[wanted] = min(quickest[wanted], *(launches() for _ in range(5)))
    assert quickest[True] < 1.1 * quickest[False], json.dumps({str(key): value for key, value in quickest.items()})
