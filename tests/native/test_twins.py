"""The parts in C do what their twins in Python do, take no nonsense, and leak nothing."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuscope import _recording, stage
from gpuscope._batch import BatchBuilder, own_identity
from gpuscope._clock import Anchor, GpuClock
from gpuscope._compiled import StageRecord, native
from gpuscope._otel import _new_trace
from gpuscope._record import Site, ThreadFacts
from gpuscope._resolve import Resolver
from gpuscope._stage import Stage
from gpuscope.testing import FakeDevice, ManualClock

ROOT = Path(__file__).parents[2]
in_c = pytest.mark.skipif(native is None, reason="the parts in C are not in use")

TIMES = st.integers(0, 2**40)


def test_parts_in_c_are_used_where_they_can_be_built():
    """With a C compiler and Python's headers an installation has them."""
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if shutil.which("cc") is None or not headers.exists() or os.environ.get("GPUSCOPE_NATIVE") == "0":
        pytest.skip("needs a C compiler and Python's headers")
    assert native is not None


def test_twins_pass_the_same_tests():
    """The tests of stages, failures and the collector hold on the twins in Python, too."""
    tests = ["test_stage.py", "test_unreliable.py", "test_collector.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=ROOT / "tests",
        env={**os.environ, "GPUSCOPE_NATIVE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_variable_chooses_the_twins():
    """`GPUSCOPE_NATIVE=0` leaves the parts in C alone."""
    program = "from gpuscope import _compiled, _recording; print(_compiled.native, _recording.begin.__module__)"
    environment = {**os.environ, "GPUSCOPE_NATIVE": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "gpuscope._recording"]


def new_record(trace, site, outer=None, **facts):
    """Return a record that has ended."""
    record = StageRecord()
    record.trace, record.site, record.outer, record.thread = trace, site, outer, ThreadFacts(1, "main")
    record.attributes = record.error = record.span = record.restore = record.lane = record.pair = None
    record.span_id, record.start_ns, record.end_ns = facts.get("span_id", 1), facts.get("start", 0), facts.get("end", 0)
    return record


@st.composite
def rows(draw):
    """Rows of some requests: nested stages, with and without GPU times, attributes and remote parents."""
    sites = [Site(name, {}) for name in "abc"]
    found = []
    for _ in range(draw(st.integers(1, 4))):
        parent_id = draw(st.sampled_from([0, 7, 2**63 + 5]))
        trace = _new_trace(
            draw(st.integers(1, 2**128 - 1)),
            parent_id,
            root=sites[0],
            remote=bool(parent_id) and draw(st.booleans()),
            sampled=draw(st.sampled_from([None, True, False])),
        )
        outer = None
        for _ in range(draw(st.integers(1, 4))):
            span_id, start, end = draw(st.integers(1, 2**63 - 1)), draw(TIMES), draw(TIMES)
            record = new_record(trace, draw(st.sampled_from(sites)), outer, span_id=span_id, start=start, end=end)
            record.attributes = draw(st.sampled_from([None, {"n": 1}]))
            gpu_end = draw(st.sampled_from([0, 2**41]))
            record.lane = SimpleNamespace(raw=2**64 - 9, index=3, pairs=[]) if gpu_end else None
            found.append((record, draw(TIMES) if gpu_end else 0, gpu_end, draw(TIMES), draw(st.sampled_from([0, 2]))))
            outer = record
    return found


@in_c
@given(rows(), st.integers(0, 3), st.booleans())
def test_rows_are_packed_alike(rows, warmup, bridged):
    """The same bytes, the same odd rows, the same tables, the same counts of calls."""
    # A bridge that has no provider to ask: a trace that is undecided goes to `identify`.
    identify = lambda record: (*own_identity(record)[:3], record.trace.sampled is not False)  # noqa: E731
    bridge = SimpleNamespace(identify=identify, sdk=False) if bridged else None
    if not bridged:
        for record, *_ in rows:
            record.trace.sampled = None
    results = []
    for pack in (BatchBuilder._pack_natively, BatchBuilder._pack_in_python):
        for record, *_ in rows:
            record.site.calls = 0
        builder = BatchBuilder(FakeDevice(ManualClock()), warmup=warmup)
        packed = pack(builder, list(rows), bridge)
        calls = {site.name: site.calls for site in builder._sites}
        results.append((packed, list(builder._sites), len(builder._threads), calls))
    assert results[0] == results[1]


class Elapsed:
    """A driver's function that tells the distance of two events, which are numbers of nanoseconds."""

    def __init__(self):
        def elapsed(milliseconds, start, end):
            milliseconds[0] = ((end or 0) - (start or 0)) / 1e6
            return 0

        kind = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_float), ctypes.c_void_p, ctypes.c_void_p)
        self.function = kind(elapsed)
        self.address = ctypes.cast(self.function, ctypes.c_void_p).value

    def elapsed_ms(self, start, end):
        """Ask as `CudaDevice` does."""
        milliseconds = ctypes.c_float()
        self.function(ctypes.pointer(milliseconds), start, end)
        return milliseconds.value

    def give_back(self, record):
        """Take the pair back."""
        record.lane.pairs.append(record.pair)
        record.pair = None


@in_c
@given(st.lists(st.tuples(st.integers(1, 2**33), st.integers(0, 2**33), st.integers(-(2**33), 2**33)), max_size=6))
def test_stages_are_placed_alike(stages):
    """The same start, end, uncertainty and flags, to the nanosecond, and every pair goes back."""
    device = Elapsed()
    clock = GpuClock()
    clock.calibrate(Anchor(ctypes.c_void_p(2**32), 10**12, 3500), None)
    clock.calibrate(Anchor(ctypes.c_void_p(2**32 + 10**9), 10**12 + 10**9 + 1500, 3300), 1000.0)
    resolver = Resolver(device, None, None, clock=None, event_deadline_ns=0, max_pending=9)
    resolver._clocks[0] = clock
    results = []
    for in_c in (True, False):
        lane = SimpleNamespace(pairs=[])
        records = []
        for start, duration, launched in stages:
            record = new_record(None, None, start=10**12 + launched)
            record.lane = lane
            record.pair = (start, start + duration, start, start + duration)
            records.append(record)
        if in_c:
            device.elapsed_address = device.address
            placed = resolver._resolve_natively(records, len(records), 0)
        else:
            placed = [resolver._resolve(record, 0) for record in records]
        assert [row[0] for row in placed] == records
        assert len(lane.pairs) == len(records)
        assert all(record.pair is None for record in records)
        results.append([row[1:] for row in placed])
    assert results[0] == results[1]


@in_c
def test_placing_stops_at_an_event_that_cannot_be_timed():
    """What comes after it is for the caller to look at, one by one, and keeps its pair."""
    device = Elapsed()
    records = [new_record(None, None) for _ in range(3)]
    for record in records:
        record.lane = SimpleNamespace(pairs=[])
        record.pair = (1, 2, 1, 2)
    records[1].pair = (1, 2, 0, 0)
    rows = native.place(records, device.address, 1, 4, 0, 0, 1e6, 0.0)
    assert [row[0] for row in rows] == records[:1]
    assert records[2].pair == (1, 2, 1, 2)


NONSENSE = {
    "begin": lambda: native.begin(None, StageRecord(), None, None, 0),
    "begin without a record": lambda: native.begin(None, None, None, None, 0),
    "begin with too little": lambda: native.begin(None),
    "start": lambda: native.start(object(), None, None, 0),
    "end": lambda: native.end(object(), None),
    "end of what never began": lambda: native.end(StageRecord(), None),
    "new_block": lambda: native.new_block(int, None, None),
    "block without a recorder": lambda: Stage().__enter__(),
    "exit of a block without a recorder": lambda: _entered().__exit__(None, None, None),
    "exit with too little": lambda: Stage().__exit__(),
    "prepare": lambda: native.prepare(**dict.fromkeys(PREPARED)),
    "EventRecorder without a function": lambda: native.EventRecorder(0, [], None, None, None, None),
    "EventRecorder.begin": lambda: native.EventRecorder(1, [], int, int, int, int).begin(1, None),
    "EventRecorder.end": lambda: native.EventRecorder(1, [], int, int, int, int).end(StageRecord()),
    "place": lambda: native.place([1], 1, 1, 0, 0, 0, 0.0, 0.0),
    "place without a function": lambda: native.place([], 0, 1, 0, 0, 0, 0.0, 0.0),
    "pack what is no row": lambda: native.pack([1], {}, {}, own_identity, 2, 0, 1, 2),
    "pack what never began": lambda: native.pack([(StageRecord(), 0, 0, 0, 0)], {}, {}, own_identity, 2, 0, 1, 2),
    "pack numbers that are none": lambda: native.pack([(StageRecord(), "", 0, 0, 0)], {}, {}, own_identity, 2, 0, 1, 2),
}
FUNCTIONS = ("facts_of_thread", "see_otel", "begin_failed", "end_the_rest", "error_facts", "running")
PREPARED = ("current", "trace_type", "perf_counter", *FUNCTIONS)


def _entered():
    block = Stage()
    block.uses = 1
    return block


@in_c
@pytest.mark.parametrize("call", NONSENSE)
def test_nonsense_is_refused(call):
    """Wrong arguments are an exception of Python, not the end of the process."""
    with pytest.raises((TypeError, ValueError, AttributeError)):
        NONSENSE[call]()


def failing():
    """Fail."""
    raise KeyError("x")


def run_stages(decorated):
    """Stages of every kind, with errors and attributes, one inside the other."""
    with stage("outer") as outer:
        outer.set_attribute("a", {})
        with contextlib.suppress(KeyError):
            decorated()
        again = stage("again")
        with again, again:
            pass


def test_nothing_leaks(bench):
    """After stages of every kind, collected, there is as much memory in use as before."""
    decorated = stage("decorated")(failing)

    def blocks_after(times):
        for _ in range(times):
            run_stages(decorated)
            bench.collect()
            bench.spans.clear()
            bench.nvtx.log.clear()
            bench.device.complete()
        gc.collect()
        return sys.getallocatedblocks()

    before = blocks_after(100)
    assert blocks_after(200) - before < 100  # One object a round would be twice as many.


def test_stage_that_refers_to_itself_is_collected(bench):
    """The garbage collector finds a cycle through a stage's attributes, though it does not look at running stages."""

    class Witness:
        alive = 0

        def __init__(self):
            Witness.alive += 1

        def __del__(self):
            Witness.alive -= 1

    with stage("selfish") as selfish:
        selfish.set_attribute("me", selfish)
        selfish.set_attribute("witness", Witness())
    del selfish
    bench.collect()
    bench.spans.clear()
    gc.collect()
    assert Witness.alive == 0


def test_deep_nesting_is_let_go_without_recursion(bench):
    """A chain of tens of thousands of enclosing stages ends without the end of the stack."""
    site = Site("deep", {})
    blocks = [_recording.start(bench.engine.recorder, site, None, 0) for _ in range(50_000)]
    innermost = blocks[-1]
    blocks.clear()
    _recording.current.set(None)
    outer = innermost.outer
    del innermost
    del outer
    assert gc.collect() >= 0
