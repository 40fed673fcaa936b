"""From rows to columns: every column of every kind of row, with the part in C and with its twin."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from gpuscope._collecting import batch_builder
from gpuscope._collecting.batch_builder import BatchBuilder
from gpuscope._collecting.selection import select
from gpuscope._cuda.graphs.resolve import Placed
from gpuscope._data.batch import RowFlag, SpanDetails
from gpuscope._data.native import StageRecord, Trace, native
from gpuscope._data.record import ExceptionInfo, Site, ThreadInfo
from gpuscope.testing import FakeDevice, FakeStream, ManualClock

OFFSET_NS = 1_700_000_000_000_000_000
TRACE_ID = 0x0AF7651916CD43DD_8448EB211C80319D
GPU_BIT = 1 << 63
MAIN, OTHER = ThreadInfo(1, "main"), ThreadInfo(2, "other")
ERROR = ExceptionInfo("ValueError", "bad", ())


def new_trace(root=None, **facts):
    """A trace that begins here."""
    trace = Trace()
    trace.trace_id, trace.parent_id, trace.remote, trace.sampled = TRACE_ID, 0, False, True
    trace.root, trace.state = root or Site("request", {}), None
    for name, value in facts.items():
        setattr(trace, name, value)
    return trace


def new_record(**facts):
    """A stage that has ended, without a GPU part."""
    record = StageRecord()
    record.members = None
    for name in ("outer", "span", "context_before", "timed_stream", "pair", "range", "attributes", "error", "recorder"):
        setattr(record, name, None)
    record.site, record.trace, record.thread = Site("s", {}), None, MAIN
    record.span_id, record.start_ns, record.end_ns = 5, 1000, 2000
    for name, value in facts.items():
        setattr(record, name, value)
    record.trace = record.trace or new_trace(record.site)
    return record


def row(gpu=(0, 0), uncertainty_ns=0, flags=0, **facts):
    """A resolved stage."""
    return new_record(**facts), *gpu, uncertainty_ns, flags


@pytest.fixture(params=["native", "twin"])
def make_builder(request, monkeypatch):
    """Return a function that makes a builder whose clocks are a fixed distance apart."""
    if request.param == "native" and native is None:
        pytest.skip("the parts in C are not in use")
    monkeypatch.setattr(batch_builder, "native", native if request.param == "native" else None)

    def make(*, warmup=0, device=None):
        clock = ManualClock()
        return BatchBuilder(
            device or FakeDevice(clock),
            warmup=warmup,
            clock=lambda: clock.now_ns,
            epoch_clock=lambda: clock.now_ns + OFFSET_NS,
        )

    return make


@pytest.fixture
def build(make_builder):
    """Return a function that makes a batch of rows."""

    def build(*rows, bridge=None, **options):
        builder = make_builder(**options)
        builder.add(list(rows), bridge)
        return builder.finish(bridge)

    return build


class TestColumns:
    """What stands in the batch of what was in the rows."""

    def test_of_a_stage_on_the_gpu(self, build):
        """Ids, times, the stream and its device."""
        on_gpu = row(gpu=(1500, 2500), uncertainty_ns=7, flags=int(RowFlag.CLAMPED), timed_stream=FakeStream(1, 9))
        batch = build(on_gpu)
        assert (batch.trace_high.tolist(), batch.trace_low.tolist()) == ([TRACE_ID >> 64], [TRACE_ID % 2**64])
        assert (batch.span_id.tolist(), batch.parent_id.tolist()) == ([5], [0])
        assert batch.gpu_span_id.tolist() == [5 | GPU_BIT]
        assert batch.sampled.tolist() == [True]
        host_ns = batch.host_start_ns.tolist() + batch.host_end_ns.tolist()
        gpu_ns = batch.gpu_start_ns.tolist() + batch.gpu_end_ns.tolist()
        assert host_ns == [OFFSET_NS + 1000, OFFSET_NS + 2000]
        assert gpu_ns == [OFFSET_NS + 1500, OFFSET_NS + 2500]
        assert batch.uncertainty_ns.tolist() == [7]
        assert (batch.device.tolist(), batch.stream.tolist()) == ([1], [9])
        assert batch.flags.tolist() == [int(RowFlag.CLAMPED)]
        assert {index: info.index for index, info in batch.devices.items()} == {1: 1}
        assert batch.live is None

    def test_of_a_stage_without_a_gpu_part(self, build):
        """Whatever would tell of a GPU is absent, also where the stage was on a stream."""
        batch = build(row(timed_stream=FakeStream(0, 9)), row())
        for column in (batch.gpu_span_id, batch.gpu_start_ns, batch.gpu_end_ns, batch.stream):
            assert column.tolist() == [0, 0]
        assert batch.device.tolist() == [-1, -1]
        assert batch.devices == {}

    def test_a_device_of_number_zero_is_one(self, build):
        """It is described as any other."""
        batch = build(row(gpu=(1500, 2500), timed_stream=FakeStream(0, 9)))
        assert batch.devices[0].name == "Fake GPU"

    def test_tables_hold_each_thing_once(self, build):
        """Sites, the roots of their traces among them, and threads."""
        first, second = Site("a", {}), Site("b", {})
        batch = build(
            row(site=first, trace=new_trace(second), thread=OTHER),
            row(site=second, trace=new_trace(second), thread=MAIN),
            row(site=first, trace=new_trace(first), thread=OTHER),
        )
        assert batch.sites == (first, second)
        assert batch.threads == (OTHER, MAIN)
        assert batch.site.tolist() == [0, 1, 0]
        assert batch.root.tolist() == [1, 1, 0]
        assert batch.thread.tolist() == [0, 1, 0]

    def test_rows_come_in_the_order_in_which_they_were_added(self, make_builder):
        """Of one call, and of several."""
        builder = make_builder()
        builder.add([row(span_id=3), row(span_id=1)], None)
        builder.add([row(span_id=2)], None)
        assert len(builder) == 3
        assert builder.finish(None).span_id.tolist() == [3, 1, 2]
        assert len(builder) == 0

    def test_parent_is_the_stage_around_it_in_the_same_trace(self, build):
        """Otherwise it is what the trace stands in."""
        outer, trace = new_record(span_id=77), new_trace(parent_id=88)
        inside = new_record(span_id=77, trace=trace)
        batch = build(
            row(outer=inside, trace=trace),
            row(outer=outer, trace=trace),
            row(trace=trace),
        )
        assert batch.parent_id.tolist() == [77, 88, 88]


class TestFlags:
    """What the builder finds out itself."""

    def test_first_calls_are_warm_up(self, build):
        """As many as are set for all, or for the stage; all of them inside a warm-up."""
        usual, own, none = Site("usual", {}), Site("own", {}), Site("none", {})
        own.warmup, none.warmup = 1, 0
        rehearsal = Site("rehearsal", {})
        rehearsal.warms_up = True
        batch = build(
            *(row(site=site) for site in (usual, own, none) for _ in range(3)),
            row(site=none, trace=new_trace(rehearsal)),
            warmup=2,
        )
        assert (batch.flags & RowFlag.WARMUP).tolist() == [1, 1, 0, 1, 0, 0, 0, 0, 0, 1]
        assert (usual.calls, none.calls) == (3, 4)

    def test_parent_in_another_process_is_remote(self, build):
        """Only that of the outermost stage is."""
        remote, local = new_trace(parent_id=88, remote=True), new_trace(parent_id=88)
        outer = new_record(span_id=77, trace=remote)
        batch = build(row(trace=remote), row(trace=remote, outer=outer), row(trace=local))
        assert batch.flags.tolist() == [int(RowFlag.REMOTE_PARENT), 0, 0]


class TestDetails:
    """What few stages have."""

    def test_are_kept_by_row(self, make_builder):
        """Attributes or an error are enough, and the number is that of the row in the batch."""
        builder = make_builder()
        builder.add([row(), row(attributes={"n": 1}), row(error=ERROR)], None)
        builder.add([row(), row(attributes={"n": 2}, error=ERROR)], None)
        details = builder.finish(None).details
        assert {number: (detail.attributes, detail.error) for number, detail in details.items()} == {
            1: ({"n": 1}, None),
            2: (None, ERROR),
            4: ({"n": 2}, ERROR),
        }

    def test_are_the_bridge_s_where_a_span_stands_for_the_stage(self, build):
        """It knows what was said to the span, which may be nothing; of other stages it is not asked."""
        asked = []

        def details(record):
            asked.append(record.span)
            return None if record.span == "silent" else SpanDetails(name=record.span)

        bridge = SimpleNamespace(
            sdk=False, offset_ns=0, keeps_roots=lambda: False, details=details, identify=lambda record: (1, 2, 3, True)
        )
        batch = build(row(span="silent"), row(span="said"), row(attributes={"n": 1}), bridge=bridge)
        assert set(batch.details) == {1, 2}
        assert batch.details[1].name == "said"
        assert batch.details[2].attributes == {"n": 1}
        assert asked == ["silent", "said"]


class TestBridge:
    """What OpenTelemetry has a say in."""

    @pytest.fixture(params=[False, True])
    def bridge(self, request):
        """A bridge, with and without the application's tracer."""
        return SimpleNamespace(
            sdk=request.param,
            offset_ns=0,
            keeps_roots=lambda: False,
            identify=lambda record: (record.span_id << 64 | 2, 30 + record.span_id, 4, record.span_id != 6),
            settle=lambda record: (7, 8, True),
            lazy=lambda record: f"lazy {record.span_id}",
            details=lambda record: None,
        )

    def test_tells_ids_and_what_is_sampled(self, build, bridge):
        """They are taken from it alone."""
        batch = build(row(span="x"), row(span_id=6, span="x"), bridge=bridge)
        assert (batch.trace_high.tolist(), batch.trace_low.tolist()) == ([5, 6], [2, 2])
        assert (batch.span_id.tolist(), batch.parent_id.tolist()) == ([35, 36], [4, 4])
        assert batch.sampled.tolist() == [True, False]

    @pytest.mark.parametrize("sampled", [True, None])
    def test_is_asked_where_it_has_a_say(self, build, bridge, sampled):
        """About every stage with the application's tracer, and otherwise while the sampling is not decided."""
        batch = build(row(span_id=6, trace=new_trace(sampled=sampled)), bridge=bridge)
        if bridge.sdk or sampled is None:
            assert (batch.span_id.tolist(), batch.sampled.tolist()) == ([36], [False])

    def test_has_the_offset_of_the_batch(self, make_builder, bridge):
        """So that both place a stage at the same nanosecond."""
        builder = make_builder()
        builder.add([], bridge)
        assert bridge.offset_ns == OFFSET_NS

    def test_lazy_spans_go_with_the_sdk_alone(self, make_builder, bridge):
        """One a row, and none of stages inside graphs."""
        builder = make_builder()
        builder.add([row(), row(span_id=6)], bridge)
        builder.add_replays(new_placed(), bridge)
        builder.add([row(span_id=9)], bridge)
        batch = builder.finish(bridge)
        assert batch.live == (("lazy 5", "lazy 6", None, None, "lazy 9") if bridge.sdk else None)
        assert batch.parent_id.tolist()[2:4] == [8, 8]


class Graph:
    """What is known of two stages in a graph."""

    sites, parents = (Site("attention", {}), Site("mlp", {})), (-1, -1)

    def __len__(self):
        """Return the number of stages."""
        return 2


def new_placed():
    """One replay of them in a stage with the id 100."""
    replay = SimpleNamespace(
        outer=new_record(span_id=100), timed_stream=FakeStream(1, 9), thread=MAIN, launched_ns=1000
    )
    times = np.array([[1100, 1200]])
    return Placed(Graph(), [replay], times, times + 50, times * 0 + 7, np.zeros(1, np.bool_))


def test_stages_inside_replays_are_rows(make_builder):
    """On the same epoch as all others, and with one id for the only span that each has."""
    builder = make_builder()
    builder.add_replays(new_placed(), None)
    assert len(builder) == 2
    batch = builder.finish(None)
    assert (batch.gpu_start_ns - OFFSET_NS).tolist() == [1100, 1200]
    assert (batch.host_start_ns - OFFSET_NS).tolist() == [1000, 1000]
    assert batch.gpu_span_id.tolist() == batch.span_id.tolist()
    assert batch.parent_id.tolist() == [100, 100]
    assert batch.sampled.tolist() == [True, True]
    assert batch.live is None


class TestFailures:
    """What is kept and what begins anew when something raises."""

    def test_rows_are_added_all_or_none(self, make_builder):
        """A bridge that fails for one of them adds none."""

        def identify(record):
            if record.span_id == 6:
                raise LookupError
            return 1, 2, 3, True

        bridge = SimpleNamespace(
            sdk=False, offset_ns=0, keeps_roots=lambda: False, identify=identify, details=lambda record: None
        )
        builder = make_builder()
        with pytest.raises(LookupError):
            builder.add([row(span="x"), row(span_id=6, span="x")], bridge)
        assert len(builder) == 0

    def test_a_batch_that_cannot_be_finished_is_let_go(self, make_builder):
        """The next one is empty."""
        builder = make_builder()
        bridge = SimpleNamespace(
            sdk=True, offset_ns=0, keeps_roots=lambda: False, identify=lambda record: (1, 2, 3, True), lazy=None
        )
        builder.add([row()], bridge)
        with pytest.raises(TypeError):
            builder.finish(bridge)
        assert len(builder) == 0

    def test_a_device_that_cannot_be_described_is_unknown_until_it_can(self, make_builder):
        """It is asked again by the next batch, and then no more."""
        asked = []

        class Shy(FakeDevice):
            def facts(self, index):
                asked.append(index)
                if len(asked) == 1:
                    raise OSError
                return super().facts(index)

        builder, names = make_builder(device=Shy(ManualClock())), []
        for _ in range(3):
            builder.add([row(gpu=(1500, 2500), timed_stream=FakeStream(0, 9))], None)
            names.append(builder.finish(None).devices[0].name)
        assert names == ["unknown", "Fake GPU", "Fake GPU"]
        assert asked == [0, 0]


def test_epoch_is_the_tightest_of_three_readings():
    """It is read once a batch, between two readings of the other clock; a difference too small for a step is none."""
    clock = iter([0, 100, 200, 300, 400, 420, 430, 1000, 1010, 1100, 1200, 1300, 1400, 1500])
    epoch = iter([9050, 5250, 5411, 7005, 7150, 9350])
    builder = BatchBuilder(None, warmup=0, clock=lambda: next(clock), epoch_clock=lambda: next(epoch))
    for _ in range(2):
        builder.add([row()], None)
        builder.add([row()], None)
        assert builder.finish(None).host_start_ns.tolist() == [1000 + 5001] * 2


def test_select_keeps_rows_with_all_that_is_theirs(make_builder):
    """Columns, details by their new numbers, and lazy spans."""
    bridge = SimpleNamespace(
        sdk=True,
        offset_ns=0,
        identify=lambda record: (1, record.span_id, 0, True),
        lazy=lambda record: f"lazy {record.span_id}",
    )
    builder = make_builder()
    builder.add([row(span_id=n + 1, attributes={"n": n} if n else None) for n in range(4)], bridge)
    batch = builder.finish(bridge)
    kept = select(batch, np.array([True, False, True, True]))
    assert kept.span_id.tolist() == [1, 3, 4]
    assert {number: detail.attributes["n"] for number, detail in kept.details.items()} == {1: 2, 2: 3}
    assert kept.live == ("lazy 1", "lazy 3", "lazy 4")
    assert kept.sites == batch.sites
    builder.add([row(), row()], None)
    assert select(builder.finish(None), np.array([False, True])).live is None
