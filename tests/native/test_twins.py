"""The parts in C do what their twins in Python do, take no nonsense, and leak nothing."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import shutil
import struct
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.context import Context
from opentelemetry.trace import SpanContext

import gpuscope
from gpuscope import stage
from gpuscope._collecting.batch_builder import BatchBuilder, own_identity
from gpuscope._collecting.resolve import Resolver
from gpuscope._cuda.clock import GpuClock
from gpuscope._cuda.timed_stream import TimedStream, stream_of_all
from gpuscope._data.interfaces import Anchor
from gpuscope._data.native import StageRecord, native
from gpuscope._data.record import Site, ThreadInfo
from gpuscope._data.row import FORMAT, ROW
from gpuscope._otel.bridge import Bridge, _new_trace
from gpuscope._otel.lazy_span import Standing, give_ids
from gpuscope._otel.notes import Notes
from gpuscope._recording import hot_path
from gpuscope._recording.stage import Stage
from gpuscope._settings.config import Config
from gpuscope.exporters._encoding.otlp_bytes import SpanEncoder, _columns, _join_in_python
from gpuscope.exporters._encoding.spans import _grouped_in_python
from gpuscope.testing import FakeDevice, FakeStream, ManualClock

from ..exporters.batches import batches

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
    """The tests of stages, failures, exceptions and the collector hold on the twins in Python, too."""
    tests = [
        "recording/test_stage.py",
        "recording/test_unreliable.py",
        "data/test_exceptions.py",
        "collecting/test_collector.py",
        "collecting/test_batch_builder.py",
        "otel/test_otel.py",
        "batches/test_token.py",
        "batches/test_members.py",
        "batches/test_exporting.py",
        "exporters/test_sdk.py",
        "recording/test_source_code.py",
        "collecting/test_gpu_spans.py",
        "collecting/test_generation.py",
        "flight",
    ]
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
    program = (
        "from gpuscope._data.native import native; from gpuscope._recording import hot_path; "
        "print(native, hot_path.begin.__module__)"
    )
    environment = {**os.environ, "GPUSCOPE_NATIVE": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "gpuscope._recording.hot_path"]


def new_record(trace, site, outer=None, **facts):
    """Return a record that has ended."""
    record = StageRecord()
    record.members = None
    record.trace, record.site, record.outer, record.thread = trace, site, outer, ThreadInfo(1, "main")
    record.attributes = record.error = record.span = record.context_before = record.timed_stream = record.pair = None
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
            record.timed_stream = SimpleNamespace(raw=2**64 - 9, index=3, pairs=[]) if gpu_end else None
            found.append((record, draw(TIMES) if gpu_end else 0, gpu_end, draw(TIMES), draw(st.sampled_from([0, 2]))))
            outer = record
    return found


@in_c
def test_rows_have_one_layout():
    """Each column of a row has the same name, place, size and sign in C and in Python."""
    columns = [(name, ROW.fields[name][1], ROW[name].itemsize, ROW[name].kind == "i") for name in ROW.names]
    assert list(native.ROW_LAYOUT) == columns
    assert ROW.itemsize == struct.calcsize(FORMAT) == sum(size for _, _, size, _ in native.ROW_LAYOUT)


@in_c
@given(rows(), st.integers(0, 3), st.booleans())
def test_rows_are_packed_alike(rows, warmup, bridged):
    """The same bytes, the same rows with details, the same tables, the same counts of calls."""
    # A bridge that has no provider to ask: a trace that is undecided goes to `identify`.
    identify = lambda record: (*own_identity(record)[:3], record.trace.sampled is not False)  # noqa: E731
    bridge = SimpleNamespace(identify=identify, sdk=False, keeps_roots=lambda: False) if bridged else None
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


def in_contexts(asked, told, sampled, state, parent_id):
    """Return rows of a stage and one inside it, both in contexts; some were asked for their ids, or told something."""
    remote = parent_id != 0
    trace = _new_trace(2**100 + 1, parent_id, root=Site("a", {}), remote=remote, sampled=sampled, state=state)
    rows, outer = [], None
    for number in range(2):
        record = new_record(trace, trace.root, outer, span_id=number + 1, start=1, end=2)
        record.span, record.context_before = Standing(), Context()
        record.span._attached = Context()
        if asked[number]:
            give_ids(record, SpanContext(trace.trace_id, record.span_id, is_remote=False), None)
        if told[number]:
            record.span._notes = Notes()
        rows.append((record, 0, 0, 0, 0))
        outer = record
    return rows


@in_c
@pytest.mark.parametrize("sampled", [None, True, False])
@pytest.mark.parametrize("state", [None, "vendor=abc"])
@pytest.mark.parametrize("told", [(False, False), (True, False)])
@pytest.mark.parametrize("asked", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("parent_id", [7, 0])
def test_stages_in_contexts_are_settled_alike(asked, told, sampled, state, parent_id):
    """The same ids, whoever settles them; the contexts are let go of, and what a stage was told is not forgotten."""
    bridge = Bridge(Config().changed(exporters="otlp"), get_provider=lambda: None)
    results = []
    for pack in (BatchBuilder._pack_natively, BatchBuilder._pack_in_python):
        rows, builder = (
            in_contexts(asked, told, sampled, state, parent_id),
            BatchBuilder(FakeDevice(ManualClock()), warmup=0),
        )
        packed, with_details = pack(builder, rows, bridge)
        details = {index: bridge.details(rows[index][0]) for index in with_details}
        results.append((packed, {index: what for index, what in details.items() if what is not None}))
        assert all(record.context_before is None and record.span._attached is None for record, *_ in rows)
    assert results[0] == results[1]
    assert len(results[0][1]) == (2 if state else sum(told))


KEY = st.binary(min_size=27, max_size=27)


@in_c
@given(st.lists(KEY, min_size=1, max_size=3).flatmap(lambda few: st.lists(st.sampled_from(few) | KEY, max_size=60)))
def test_rows_are_grouped_alike(keys):
    """The same groups in the same order, and the same number for each row."""
    found, groups = native.group(b"".join(keys), 27)
    assert found == list(dict.fromkeys(keys))
    assert [found[group] for group in np.frombuffer(groups, np.int32)] == keys
    assert _grouped_in_python(np.frombuffer(b"".join(keys), "V27")) == (found, groups)


@in_c
@given(batches())
def test_spans_are_joined_alike(batch):
    """The same bytes."""
    encoder = SpanEncoder()
    spans, templates = encoder.prepare(batch)
    of_rows = [templates[group] for group in spans.groups.tolist()]
    assert encoder.join(spans, templates) == _join_in_python(_columns(spans), of_rows)


@in_c
@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"slices": [(0, 99)]}, "a slice lies outside the row"),
        ({"slices": [(0, 1)] * 17}, "too many slices"),
        ({"columns": [(0, False, np.zeros(1))] * 33}, "too many columns"),
        ({"columns": [(9, False, np.zeros(1))]}, "a column lies outside the row"),
        ({"columns": [(-1, False, np.zeros(1))]}, "a column lies outside the row"),
        ({"columns": [(0, False, np.zeros(0))]}, "a number of eight bytes for each row"),
        ({"columns": [(0, False, np.zeros(2, np.float32))]}, "a number of eight bytes for each row"),
        ({"templates": []}, "a row's group has no template"),
        ({"groups": np.array([-1], np.int32)}, "a row's group has no template"),
        ({"templates": [(b"", 0, b"", 1, b"")]}, "a template must be a tuple"),
        ({"templates": [(b"", 0, "", 0, b"")]}, "a template must be a tuple"),
    ],
)
def test_what_cannot_be_joined_is_refused(changes, error):
    """Nothing is read or written beyond what was given."""
    given = {
        "row": bytes(16),
        "slices": [(0, 16)],
        "columns": [(8, True, np.array([1], np.uint64))],
        "templates": [(b"<", 0, b"-", 0, b">")],
        "groups": np.zeros(1, np.int32),
    }
    one = bytes(15) + b"\1"
    assert native.join(*given.values()) == b"<" + one + b"-" + one + b">"
    with pytest.raises((TypeError, ValueError), match=error):
        native.join(*{**given, **changes}.values())


@pytest.mark.parametrize("find", [stream_of_all, *([] if native is None else [native.stream_of_all])])
def test_records_of_one_stream_are_told_from_others(find):
    """Only where each has a pair, on the same stream."""
    one, other = FakeStream(0, 1), FakeStream(0, 2)

    def record(stream, pair=(1, 2, 3, 4)):
        made = new_record(None, None)
        made.timed_stream, made.pair = stream, pair
        return made

    assert find([record(one) for _ in range(20)]) is one
    assert find([record(one), record(other)]) is None
    assert find([record(one), record(one, None)]) is None
    assert find([record(None, None)]) is None
    assert find([]) is None


NOT_READY, INVALID_VALUE = 600, 1


class NumbersForEvents:
    """A driver whose events are numbers of nanoseconds: done when the GPU's clock is past them, unless captured."""

    def __init__(self, now=2**62, captured=(), capturing=False):
        self.now, self.captured, self.capturing, self.asked = now, captured, capturing, 0
        one, pointer = ctypes.c_int, ctypes.c_void_p
        floats, ints = ctypes.POINTER(ctypes.c_float), ctypes.POINTER(one)
        self.functions = (
            ctypes.CFUNCTYPE(one, pointer)(lambda context: 0),
            ctypes.CFUNCTYPE(one, pointer, ints)(self.stream_is_capturing),
            ctypes.CFUNCTYPE(one, pointer)(self.event_query),
            ctypes.CFUNCTYPE(one, floats, pointer, pointer)(self.event_elapsed),
            ctypes.CFUNCTYPE(one, pointer, pointer)(lambda event, stream: 0),
        )
        self.reader = None

    def in_c(self):
        """Have the questions asked in C."""
        self.reader = native.EventReader(*(ctypes.cast(each, ctypes.c_void_p).value for each in self.functions))
        return self

    def stream_is_capturing(self, stream, status):
        """Answer for all streams alike."""
        status[0] = self.capturing
        return 0

    def event_query(self, event):
        """Answer as the driver does."""
        self.asked += 1
        return INVALID_VALUE if event in self.captured else 0 if event <= self.now else NOT_READY

    def event_elapsed(self, milliseconds, start, end):
        """Tell the distance of two events."""
        code = self.event_query(start) or self.event_query(end)
        milliseconds[0] = 0.0 if code else (end - start) / 1e6
        return code

    def is_capturing(self, timed_stream):
        """Answer as `CudaDevice` does."""
        return self.capturing

    def query(self, record):
        """Answer as `CudaDevice` does."""
        return {0: "done", NOT_READY: "pending"}.get(self.event_query(record.pair[1]), "captured")

    def elapsed_ms(self, start, end):
        """Ask as `CudaDevice` does."""
        milliseconds = (ctypes.c_float * 1)()
        return None if self.event_elapsed(milliseconds, getattr(start, "value", start), end) else milliseconds[0]

    def give_back(self, record):
        """Take the pair back."""
        record.timed_stream.pairs.append(record.pair)
        record.pair = None


def calibrated(device, event_cost_ns=0):
    """A resolver on a device, whose clock has two anchors; and a stream."""
    clock = GpuClock()
    clock.calibrate(Anchor(2**32, 10**12, 3500), None)
    clock.calibrate(Anchor(ctypes.c_void_p(2**32 + 10**9), 10**12 + 10**9 + 1500, 3300, event_cost_ns), 1000.0)
    ledger = SimpleNamespace(untimed=lambda reason: None)
    resolver = Resolver(device, ledger, None, clock=lambda: 10**12, event_deadline_ns=2**62, max_pending=99)
    resolver._clocks[0] = clock
    return resolver, TimedStream(0, 7, ctypes.c_void_p(5), [])


def waiting(timed_stream, pairs, launched=()):
    """Records on the stream with these pairs of events."""
    records = []
    for i, (start, end) in enumerate(pairs):
        record = new_record(None, None, start=10**12 + (launched[i] if launched else 0))
        record.timed_stream, record.pair = timed_stream, (start, end, start, end)
        records.append(record)
    return records


gaps = st.tuples(st.integers(1, 2**31), st.integers(0, 2**31), st.integers(-(2**33), 2**33), st.booleans())


@in_c
@given(st.lists(gaps, max_size=9), st.integers(0, 2**34), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_stages_are_resolved_alike(stages, now, capturing, give_up, event_cost_ns):
    """The same rows, to the nanosecond, the same stages left waiting, and the same pairs given back."""
    results = []
    for in_c in (True, False):
        position, pairs, captured = 1, [], set()
        for gap, duration, _, was_captured in stages:
            start, position = position + gap, position + gap + duration
            pairs.append((start, position))
            captured |= {start, position} if was_captured else set()
            position += 1
        device = NumbersForEvents(max(now, 2**32 + 10**9), captured, capturing)
        device.captured.discard(2**32 + 10**9)
        resolver, timed_stream = calibrated(device.in_c() if in_c else device, event_cost_ns)
        records = waiting(timed_stream, pairs, [launched for _, _, launched, _ in stages])
        resolver.accept(records)
        rows = resolver.collect(99, may_ask=True, give_up=give_up)
        assert [row[0] for row in rows] == records[: len(rows)]
        assert len(timed_stream.pairs) == len(rows)
        assert resolver.pending == len(records) - len(rows)
        results.append([row[1:] for row in rows])
    assert results[0] == results[1]


@in_c
def test_few_questions_find_what_is_done():
    """Of many stages that wait for a busy GPU not each is asked about."""
    device = NumbersForEvents(now=2**32 + 10**9 + 500).in_c()
    resolver, timed_stream = calibrated(device)
    resolver.accept(
        waiting(timed_stream, [(2**32 + 10**9 + i, 2**32 + 10**9 + i) for i in range(1, 99)], [-(10**9)] * 98)
    )
    assert len(resolver.collect(99, may_ask=True, give_up=False)) == 98
    device.now, device.asked = 1, 0
    resolver.accept(waiting(timed_stream, [(i, i) for i in range(2, 99)]))
    assert resolver.collect(99, may_ask=True, give_up=False) == []
    assert device.asked < 10


@in_c
def test_an_event_is_bracketed():
    """The readings of the clock lie around the event; what does not come in time, or is refused, is None."""
    device = NumbersForEvents(now=5).in_c()
    before = time.perf_counter_ns()
    first, second = device.reader.bracket(1, 7, 10**9)
    assert before <= first <= second <= time.perf_counter_ns()
    assert device.reader.bracket(9, 7, 1000) is None
    device.captured = {1}
    assert device.reader.bracket(1, 7, 10**9) is None


@in_c
def test_events_in_a_row_are_apart():
    """In ascending order; where one does not come in time, or is refused, nothing is known."""
    device = NumbersForEvents(now=9000).in_c()
    host_ns, apart_ms = device.reader.spacing(struct.pack("=4Q", 1, 5001, 6001, 9000), 7, 10**9)
    assert host_ns > 0
    assert apart_ms == pytest.approx((0.001, 0.002999, 0.005))
    assert device.reader.spacing(struct.pack("=2Q", 1, 9001), 7, 1000) is None
    device.captured = {5001}
    assert device.reader.spacing(struct.pack("=3Q", 1, 5001, 6001), 7, 10**9) is None


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
    "EventRecorder without a function": lambda: native.EventRecorder(0, 1, [], None, None, None, None),
    "EventRecorder.begin": lambda: native.EventRecorder(1, 1, [], int, int, int, int).begin(1, None),
    "EventRecorder.end": lambda: native.EventRecorder(1, 1, [], int, int, int, int).end(StageRecord()),
    "EventReader without a function": lambda: native.EventReader(1, 1, 1, 0, 1),
    "EventReader.read": lambda: native.EventReader(1, 1, 1, 1, 1).read([1], 1, 1, 1, 0, 0, 0, 0, 0.0, 0.0, 0),
    "EventReader.spacing of too few": lambda: native.EventReader(1, 1, 1, 1, 1).spacing(bytes(8), 1, 1),
    "EventReader.spacing of too many": lambda: native.EventReader(1, 1, 1, 1, 1).spacing(bytes(8 * 65), 1, 1),
    "EventReader.spacing of what is not an address": lambda: native.EventReader(1, 1, 1, 1, 1).spacing(bytes(23), 1, 1),
    "EventReader.bracket": lambda: native.EventReader(1, 1, 1, 1, 1).bracket(1),
    "EventReader.read_replays": lambda: native.EventReader(1, 1, 1, 1, 1).read_replays([1], 1, 1, 1),
    "EventReader.read_replays without a fence": lambda: native.EventReader(1, 1, 1, 1, 1).read_replays([b""], 1, 1, 1),
    "exchange without a function": lambda: native.exchange(0, 1, bytes(8), bytes(8)),
    "exchange with too few events": lambda: native.exchange(1, 1, bytes(16), bytes(8)),
    "exchange of what is not an address": lambda: native.exchange(1, 1, bytes(7), bytes(8)),
    "Trace with an id that is too long": lambda: setattr(native.Trace(), "trace_id", 2**128),
    "Trace with an id that is none": lambda: setattr(native.Trace(), "trace_id", "1"),
    "Trace without its id": lambda: delattr(native.Trace(), "trace_id"),
    "pack what is no row": lambda: native.pack([1], {}, {}, own_identity, 2, 0, 1, 2),
    "pack what never began": lambda: native.pack([(StageRecord(), 0, 0, 0, 0)], {}, {}, own_identity, 2, 0, 1, 2),
    "pack numbers that are none": lambda: native.pack([(StageRecord(), "", 0, 0, 0)], {}, {}, own_identity, 2, 0, 1, 2),
}
FUNCTIONS = ("thread_info", "begin_failed", "end_the_rest", "exception_info", "leave_behind", "close_inside")
PREPARED = ("keeps_threads", "current", "perf_counter", *FUNCTIONS)


def _entered():
    block = Stage()
    block.uses = 1
    return block


@in_c
@pytest.mark.parametrize("call", NONSENSE)
def test_nonsense_is_refused(call):
    """Wrong arguments are an exception of Python, not the end of the process."""
    with pytest.raises((TypeError, ValueError, AttributeError, OverflowError)):
        NONSENSE[call]()


def failing():
    """Fail."""
    raise KeyError("x")


def run_stages(decorated, names):
    """Stages of every kind, with errors and attributes, one inside the other."""
    with stage("outer") as outer:
        outer.set_attribute("a", {})
        with contextlib.suppress(KeyError):
            decorated()
        again = stage("again")
        with again, again:
            pass
        for number in range(names):
            with stage(f"name {number}"), stage("options", attributes={"number": number}):
                pass
        for wrong in ({"colour": 1}, {"warmup": -1}):
            with contextlib.suppress(TypeError, ValueError):
                stage("again", **wrong)


@pytest.mark.parametrize("state", ["on", "idle"])
def test_nothing_leaks(bench, state):
    """After stages of every kind, collected, there is as much memory in use as before."""
    decorated, names = stage("decorated")(failing), 1
    if state == "idle":
        gpuscope.disable()
        names = 70

    def blocks_after(times):
        for _ in range(times):
            run_stages(decorated, names)
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
    blocks = [hot_path.start(bench.engine.recorder, site, None, 0) for _ in range(50_000)]
    innermost = blocks[-1]
    blocks.clear()
    hot_path.current.set(None)
    outer = innermost.outer
    del innermost
    del outer
    assert gc.collect() >= 0
