"""A CUDA driver made of C, and recording on it: with the parts in C, and with their twins in Python."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from gpuscope import _runtime
from gpuscope._collecting import batch_builder
from gpuscope._cuda import anchors, cuda_device, open_streams, stream_sampler, timed_stream
from gpuscope._cuda.driver import Driver
from gpuscope._cuda.graphs import events, quiet
from gpuscope._cuda.spares import Spares
from gpuscope._data.native import native
from gpuscope._settings.config import Config
from gpuscope.exporters.memory import MemoryExporter

SOURCE = Path(__file__).with_name("fake_cuda.c")


@pytest.fixture(scope="session")
def driver_file(tmp_path_factory):
    """The fake driver, compiled."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    path = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-pthread", "-O1", "-o", path, SOURCE], check=True)
    return path


class Machine:
    """Two GPUs on the fake driver, what PyTorch says of them, and recording on them, collected by hand."""

    def __init__(self, library):
        self.library = library
        self.device, self.streams = 0, {0: 0x70, 1: 0x71}
        self.external = set()
        """Streams that are not of PyTorch's pools."""
        self.engine, self.spans = None, []
        self.launches, self.sample_hz = 0, 0.0

    def torch(self):
        """Return what stands for PyTorch."""
        torch = ModuleType("torch")
        torch.cuda = SimpleNamespace(
            is_initialized=lambda: True,
            device_count=lambda: 2,
            current_stream=lambda index: self.stream(self.streams[index], index),
        )
        torch.compiler = SimpleNamespace(is_dynamo_compiling=lambda: False)
        torch._C = SimpleNamespace(
            _cuda_getDevice=lambda: self.device, _cuda_getCurrentRawStream=self.streams.__getitem__
        )
        return torch

    def stream(self, raw, index=0):
        """Return what stands for PyTorch's object of a stream."""
        ident = raw if raw in self.external else raw << 5 | 3
        return SimpleNamespace(cuda_stream=raw, device_index=index, stream_id=ident)

    def new_external(self, index=0):
        """Return a stream that is made as other libraries do, behind PyTorch's object."""
        raw = self.library.fake_new_stream()
        self.external.add(raw)
        return self.stream(raw, index)

    def graphs(self):
        """Return what stands for the module with PyTorch's class of graphs."""
        machine, library, module = self, self.library, ModuleType("torch.cuda.graphs")
        for name in ("fake_end_capture", "fake_instantiate"):
            getattr(library, name).restype = ctypes.c_void_p
        unlocked = ctypes.CDLL(library._name)  # Lets go of the GIL, as PyTorch does to launch and to destroy.

        class CUDAGraph:
            """Behaves as PyTorch's, as far as graphs of record nodes go."""

            def __new__(cls, keep_graph=False):
                return super().__new__(cls)

            def __init__(self, keep_graph=False):
                self.keeps, self.template, self.executable = keep_graph, None, None
                self.error = None
                """Raised by what comes next."""

            def capture_begin(self, pool=None, capture_error_mode="global"):
                library.fake_begin_capture(ctypes.c_void_p(machine.streams[machine.device]))

            def capture_end(self):
                self.template = ctypes.c_void_p(library.fake_end_capture())
                if self.error is not None:
                    raise self.error
                if not self.keeps:
                    self.executable = ctypes.c_void_p(library.fake_instantiate(self.template))
                    library.fake_destroy_graph(self.template)

            def instantiate(self):
                assert self.keeps
                self.executable = ctypes.c_void_p(library.fake_instantiate(self.template))

            def replay(self):
                if self.error is not None:
                    raise self.error
                if self.template is None:
                    raise RuntimeError("capture it first")
                if self.executable is None:
                    self.executable = ctypes.c_void_p(library.fake_instantiate(self.template))
                unlocked.fake_launch(self.executable)
                machine.launches += 1

            def raw_cuda_graph_exec(self):
                if self.executable is None:
                    raise RuntimeError("instantiate it first")
                return self.executable.value

            def reset(self):
                if self.executable is not None:
                    unlocked.fake_destroy_executable(self.executable)
                self.template = self.executable = None

        module.CUDAGraph = CUDAGraph
        return module

    @contextlib.contextmanager
    def period(self, *exporters):
        """Record, and collect by hand; spans also go to these exporters."""
        config = Config().changed(mode="on", exporters="none", warmup=0, queue_size=16, sample_hz=self.sample_hz)
        exporters = (MemoryExporter(self.spans), *exporters)
        with _runtime.period(config, exporters=exporters, clock=time.perf_counter_ns) as engine:
            engine.recorder.accept(engine.queue)
            self.engine = engine
            yield

    def collect(self):
        """Let the collector do all it can, and return host and GPU spans in order of their starts."""
        while self.engine.collector.step():
            pass
        return sorted(self.spans, key=lambda span: (span.start_ns, span.kind == "gpu"))

    def idle_pairs(self, stream=0x70, index=0):
        """Return how many pairs of events nobody holds; no stage shares an event from now on."""
        self.engine.recorder.device.open_streams.release()
        return len(self.timed_streams[index, stream].pairs)

    @property
    def timed_streams(self):
        """All streams that were opened, by device and stream."""
        return {
            (timed_stream.index, timed_stream.raw): timed_stream
            for table in self.engine.recorder.device.open_streams.tables
            for timed_stream in table.values()
        }

    @property
    def untimed(self):
        """Stages without GPU times, by reason."""
        return self.engine.statistics().untimed


@pytest.fixture(params=["native", "twins"])
def machine(request, driver_file, monkeypatch):
    """Recording on two GPUs of the fake driver."""
    if request.param == "native" and native is None:
        pytest.skip("the parts in C are not in use")
    for module in (batch_builder, cuda_device, events, open_streams, quiet, stream_sampler, timed_stream):
        monkeypatch.setattr(module, "native", native if request.param == "native" else None)
    for module in (anchors, open_streams):
        monkeypatch.setattr(module, "spares", Spares())
    monkeypatch.setattr(cuda_device, "SHARE_NS", getattr(request.module, "SHARE_NS", 0))
    library = ctypes.PyDLL(str(driver_file))
    machine = Machine(library)
    machine.sample_hz = getattr(request.module, "SAMPLE_HZ", 0.0)
    monkeypatch.setattr(cuda_device, "load_driver", lambda: Driver(library))
    monkeypatch.setitem(sys.modules, "torch", machine.torch())
    monkeypatch.setitem(sys.modules, "torch.cuda.graphs", machine.graphs())
    monkeypatch.setattr(_runtime.state, "graphs", None)
    with machine.period():
        yield machine
        library.fake_answer(0, 0)
        library.fake_capture(None)
        library.fake_refuse_exchanges(0)
        library.fake_make_events(-1)
        library.fake_delay_anchors(ctypes.c_longlong(0))
        library.fake_hold_records(0)
        library.fake_work(1_000_000)
        library.fake_stream_answer(0)
        library.fake_delay_streams(0)
        assert library.fake_crashes() == 0
