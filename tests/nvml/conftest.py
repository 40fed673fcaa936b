"""A management library made of C, which says of GPUs what a test told it to."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from gpuscope._cuda.nvml import library

SOURCE = Path(__file__).with_name("fake_nvml.c")
ME = os.getpid()


def uuid_of(index):
    """As CUDA gives it, also that of an instance of a GPU."""
    return f"GPU-00000000-0000-0000-0000-{index:012d}"


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """Return a function that compiles the fake library, that of an older driver with `-DOLD`."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")

    def compiled(*options):
        path = tmp_path_factory.mktemp("nvml") / "libnvidia-ml.so.1"
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", *options, "-o", path, SOURCE], check=True)
        return path

    return compiled


@pytest.fixture(scope="session")
def nvml_file(build):
    """The fake library, compiled."""
    return build()


class FakeNvml:
    """Tells the fake library what to say."""

    def __init__(self, path):
        self.path = str(path)
        self.library = ctypes.CDLL(self.path)

    def says(self, index=0, *, utilization=50, clock_mhz=1500, power_w=300.0, reasons=0):
        """What it says of a GPU."""
        reasons = ctypes.c_ulonglong(reasons)
        self.library.fake_gpu(index, utilization, clock_mhz, round(power_w * 1000), reasons)

    def processes(self, *pids, index=0):
        """Which processes compute on a GPU."""
        self.library.fake_processes(index, (ctypes.c_uint * len(pids))(*pids), len(pids))

    def worked(self, shares, *, index=0, in_s=0.0):
        """How much each process used the GPU, in percent, at a time from now."""
        pids, parts = (ctypes.c_uint * len(shares))(*shares), (ctypes.c_uint * len(shares))(*shares.values())
        at_us = ctypes.c_ulonglong(time.time_ns() // 1000 + round(in_s * 1e6))
        self.library.fake_samples(index, pids, parts, len(shares), at_us)

    def refuses(self, name, code):
        """What a call answers from now on."""
        self.library.fake_refuse(name.encode() if name else None, code)

    def reset(self):
        """As it was in the beginning."""
        self.refuses(None, 0)
        self.library.fake_slow(0)
        for index in range(3):
            self.says(index)
            self.processes(ME, index=index)
            self.worked({}, index=index)


@pytest.fixture
def nvml(nvml_file, monkeypatch):
    """The fake library in place of the real one, with this process on its GPUs."""
    monkeypatch.setattr(library, "LIBRARY", str(nvml_file))
    fake = FakeNvml(nvml_file)
    fake.reset()
    yield fake
    fake.reset()


@pytest.fixture
def until():
    """Return a function that waits for a condition; it fails the test when the condition does not come."""
    pause = threading.Event()

    def wait(condition, what):
        deadline = time.monotonic() + 20
        while not (found := condition()):
            assert time.monotonic() < deadline, f"waited 20 s for {what}"
            pause.wait(0.005)
        return found

    return wait
