"""The flight recorder in a period of recording: what the collector adds, what asks for dumps, what the end leaves."""

from __future__ import annotations

import json
import signal
import sys
from types import SimpleNamespace

import pytest

from gpuscope import stage
from gpuscope._data import flight as layout
from gpuscope._data.batch import RowFlag
from gpuscope._data.native import native
from gpuscope._flight.dumps import copies
from gpuscope._flight.triggers import out_of_memory
from gpuscope.analysis._reading.flight_batch import batch_of
from gpuscope.analysis._reading.flight_ring import flags_of, read_flight
from gpuscope.exporters.memory import MemoryExporter

from ..exporters.batches import Delivery


@pytest.fixture
def path(tmp_path):
    """Where the file is."""
    return tmp_path / "flight"


@pytest.fixture
def flying(make_bench, path):
    """A bench with a flight recorder, in which a request of 100 ms is slow."""
    return make_bench(flight=str(path), flight_bytes=layout.LEAST_BYTES, flight_slow_s=0.1)


def spans_of(path):
    """The spans that a file becomes, by name."""
    spans = []
    batch = batch_of(read_flight(path))
    MemoryExporter(spans).export(batch, Delivery(len(batch.site)))
    return {(span.name, span.kind): span for span in spans}


def passes(bench):
    """Have the collector come by once."""
    bench.collect()
    bench.engine.recorder.poll_flight()


def reasons(path):
    """Why there are copies."""
    return sorted(reason for _, reason, _ in copies(path))


def test_what_the_collector_knows_is_there(flying, path):
    """GPU times, uncertainty, device and ids are those of the spans that are exported."""
    flying.device.delay_ns = 3_000_000
    with stage("request"):
        flying.clock.advance(0.001)
        with stage("infer"):
            flying.clock.advance(0.01)
    exported = {(span.name, span.kind): span for span in flying.collect()}
    found = spans_of(path)
    assert found.keys() == exported.keys()
    for key, span in exported.items():
        assert found[key].span_id == span.span_id
        assert found[key].trace_id == span.trace_id
        assert found[key].parent_id == span.parent_id
        assert found[key].end_ns - found[key].start_ns == span.end_ns - span.start_ns
        here = dict(found[key].attributes)
        assert here.keys() == span.attributes.keys()
        for name, value in span.attributes.items():
            assert here[name] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value)


def test_before_the_collector_came_the_host_is_known(flying, path):
    """A process that dies at once leaves what its threads saw."""
    with stage("request"):
        pass
    running = stage("infer")
    running.__enter__()
    ring = read_flight(path)
    assert (len(ring.stages), len(ring.resolved)) == (2, 0)
    assert set(spans_of(path)) == {("request", "host"), ("infer", "host")}
    assert spans_of(path)["infer", "host"].attributes["gpuscope.not_ended"] is True
    running.__exit__(None, None, None)
    assert "gpuscope.not_ended" not in spans_of(path)["infer", "host"].attributes


def test_flags_and_errors_are_kept(make_bench, path):
    """Warm-up is flagged, and a stage that an exception left has failed."""
    bench = make_bench(flight=str(path), flight_bytes=layout.LEAST_BYTES, warmup=1)
    for _ in range(2):
        with pytest.raises(KeyError), stage("is cold"):
            raise KeyError
    bench.collect()
    ring = read_flight(path)
    assert [flags & RowFlag.WARMUP for flags in flags_of(ring.resolved).tolist()] == [RowFlag.WARMUP, 0]
    assert spans_of(path)["is cold", "host"].status == "ERROR"


def test_the_account_is_in_the_head(flying, path):
    """As of the collector's last pass; and who the process is."""
    with stage("request"):
        pass
    passes(flying)
    ring = read_flight(path)
    assert {name: ring.head[name] for name in ("recorded", "exported", "waiting", "lost")} == {
        "recorded": 1,
        "exported": 1,
        "waiting": 0,
        "lost": 0,
    }
    assert ring.resource["process.pid"] == ring.head["pid"]
    assert ring.devices[0][0]


@pytest.mark.parametrize(("seconds", "wanted"), [(0.099, []), (0.1, ["slow"])])
def test_a_slow_request_is_dumped(flying, path, seconds, wanted):
    """By the collector: nothing is there before it comes."""
    with stage("request"):
        flying.clock.advance(seconds)
    assert reasons(path) == []
    passes(flying)
    assert reasons(path) == wanted


def test_an_exception_that_leaves_a_request_is_dumped(flying, path):
    """Not one that a request handles, nor one that ends a task."""
    with stage("request"), pytest.raises(KeyError), stage("inner"):
        raise KeyError
    with pytest.raises(SystemExit), stage("request"):
        raise SystemExit
    passes(flying)
    assert reasons(path) == []
    with pytest.raises(KeyError), stage("request"):
        raise KeyError
    passes(flying)
    assert reasons(path) == ["error"]
    assert len(read_flight(copies(path)[0][2]).marks) == 1


def test_dumps_that_are_too_many_are_counted(flying, path):
    """A second one within 10 s is none."""
    for _ in range(3):
        with stage("request"):
            flying.clock.advance(1)
        passes(flying)
    assert (reasons(path), read_flight(path).head["refused_dumps"]) == (["slow"], 2)


def test_others_may_ask(flying, path):
    """By a word that becomes part of the name."""
    flying.engine.recorder.flight_recorder.ask("stall")
    passes(flying)
    assert reasons(path) == ["stall"]


def test_gpu_memory_that_runs_out_is_dumped(flying, path, monkeypatch):
    """PyTorch's observer is attached once, when the program has initialised CUDA, and only notes that it was called."""
    observers = []
    cuda = SimpleNamespace(is_initialized=lambda: bool(ready))
    torch = SimpleNamespace(
        cuda=cuda, _C=SimpleNamespace(_cuda_attach_out_of_memory_observer=observers.append), __name__="torch"
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(out_of_memory, "_is_attached", False)
    ready = []
    passes(flying)
    assert observers == []
    ready.append(True)
    passes(flying)
    passes(flying)
    (observer,) = observers
    assert observer(0, 1 << 30, 80 << 30, 1 << 20) is None
    assert reasons(path) == []
    passes(flying)
    assert reasons(path) == ["oom"]
    assert out_of_memory.take() == 0


def test_the_signal_is_dumped(flying, path):
    """SIGUSR1, which nobody else handles."""
    signal.raise_signal(signal.SIGUSR1)
    passes(flying)
    assert reasons(path) == ["signal"]


def test_a_signal_that_the_program_handles_is_its_own(run_python, tmp_path):
    """It is called, it is said that no dump comes of it, and none does."""
    program = (
        "import signal, sys, gpuscope\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('mine'))\n"
        "gpuscope.enable(exporters='none', flight='flight', interval_s=0.01)\n"
        "with gpuscope.stage('a'): pass\n"
        "signal.raise_signal(signal.SIGUSR1)\n"
        "gpuscope.flush(); gpuscope.shutdown()"
    )
    done = run_python(program)
    assert (done.returncode, done.stdout) == (0, "mine\n"), done.stderr
    assert "the program handles SIGUSR1 itself" in done.stderr
    assert reasons(tmp_path / "flight") == []


@pytest.mark.skipif(native is None, reason="Python runs handlers in its main thread alone")
def test_the_signal_is_seen_while_the_main_thread_is_in_c(run_python, tmp_path):
    """A call into a library that does not come back is what one wants to look at."""
    program = (
        "import ctypes, os, signal, subprocess, sys, gpuscope\n"
        "from pathlib import Path\n"
        "gpuscope.enable(exporters='none', flight='flight', interval_s=0.01)\n"
        "with gpuscope.stage('before'): pass\n"
        "code = '''import os, signal, sys, time\nfrom pathlib import Path\n"
        "os.kill(int(sys.argv[1]), signal.SIGUSR1)\n"
        "while not list(Path('.').glob('flight.signal-*Z')): os.sched_yield()\n"
        "os.kill(int(sys.argv[1]), signal.SIGKILL)'''\n"
        "with gpuscope.stage('hangs'):\n"
        "    subprocess.Popen([sys.executable, '-c', code, str(os.getpid())])\n"
        "    libc = ctypes.CDLL(None)\n"
        "    while True: libc.pause()\n"
    )
    done = run_python(program)
    assert done.returncode == -signal.SIGKILL, done.stderr
    ((_, reason, copied),) = copies(tmp_path / "flight")
    assert reason == "signal"
    assert [span for span in spans_of(copied) if span[0] == "hangs"] == [("hangs", "host")]


def test_the_end_is_said(make_bench, path):
    """The file stays, and tells that the process ended recording itself; a request that asked late is dumped."""
    bench = make_bench(flight=str(path), flight_bytes=layout.LEAST_BYTES)
    with pytest.raises(KeyError), stage("request"):
        raise KeyError
    assert not read_flight(path).ended_well
    bench.engine.shutdown(1)
    assert read_flight(path).ended_well
    assert reasons(path) == ["error"]
    with stage("late"):
        pass
    assert len(read_flight(path).stages) == 1


def test_without_a_file_stages_go_on(make_bench, path, caplog):
    """It is said once why there is none."""
    path.write_text("precious")
    bench = make_bench(flight=str(path))
    with stage("request"):
        pass
    assert [span.name for span in bench.collect()] == ["request", "request [gpu]"]
    assert path.read_text() == "precious"
    assert "there is no flight recorder: " in caplog.text


def test_off_it_is_nowhere(bench):
    """No ring, and no file."""
    assert bench.engine.recorder.flight is None
    assert bench.engine.recorder.flight_recorder is None


def test_periods_follow_each_other(make_bench, path):
    """The next period of recording has the file to itself."""
    for number in range(2):
        bench = make_bench(flight=str(path), flight_bytes=layout.LEAST_BYTES)
        with stage(f"of {number}"):
            pass
        assert [*read_flight(path).names.values()][1:] == [f"of {number}"]
        bench.engine.shutdown(1)
    assert copies(path) == []


def test_ids_of_a_provider_are_those_of_its_spans(run_python, tmp_path):
    """Where the program's TracerProvider makes the ids the ring learns them late, and the recording has them."""
    program = """
import json, os
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
import gpuscope
memory = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(memory))
trace.set_tracer_provider(provider)
gpuscope.enable(exporters="sdk", flight="flight", interval_s=0.01)
with trace.get_tracer("app").start_as_current_span("above"):
    with gpuscope.stage("request"):
        with gpuscope.stage("infer"):
            pass
gpuscope.flush()
known = {}
for span in memory.get_finished_spans():
    parent = span.parent.span_id if span.parent else 0
    known[span.name] = [span.context.trace_id, span.context.span_id, parent]
print(json.dumps(known))
os._exit(0)
"""
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    known = json.loads(done.stdout)
    found = spans_of(tmp_path / "flight")
    for name in ("request", "infer"):
        span = found[name, "host"]
        assert [span.trace_id, span.span_id, span.parent_id] == known[name]
