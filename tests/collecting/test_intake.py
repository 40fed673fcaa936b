"""From the queues to the batch: how much a slice takes, what it waits for, and when a batch is due."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gpuscope import stage
from gpuscope._collecting.intake import _BACKLOG_ROWS, _BATCH_ROWS, _SLICE_ROWS
from gpuscope._cuda.graphs.replay import Replay
from gpuscope._data.record import Site, ThreadInfo
from gpuscope.testing import FakeEvent, FakeStream

MAIN = ThreadInfo(1, "main")
GRAPH_STREAM = FakeStream(0, 9)


class Graph:
    """A captured graph with so many stages, one after another, each between two nodes of its own."""

    is_broken = False

    def __init__(self, stages):
        """Name the nodes."""
        self.sites, self.parents = (Site("inner", {}),) * stages, (-1,) * stages
        self.starts, self.ends = tuple(range(0, 2 * stages, 2)), tuple(range(1, 2 * stages, 2))
        self.free = []

    def __len__(self):
        """Return the number of stages."""
        return len(self.sites)

    def give_back(self, events, *, was_read=False):
        """Take the events of a replay back."""
        self.free.append(events)


class Intake:
    """The intake of a collector that is stepped by hand, and what comes to it."""

    def __init__(self, bench):
        """Take the collector apart."""
        self.bench, self.collector = bench, bench.engine.collector
        self.it = self.collector._intake

    def record(self, stages):
        """Run some stages."""
        for _ in range(stages):
            with stage("s"):
                pass

    def replay(self, stages, *, done=True):
        """Launch a graph with so many stages inside; return its events."""
        clock = self.bench.clock
        launched_ns, trace = clock(), SimpleNamespace(trace_id=1, root=Site("outer", {}), sampled=True)
        events = [FakeEvent(clock(), done=done) for _ in range(2 * stages + 1)]
        replay = Replay(
            Graph(stages),
            SimpleNamespace(events=events, fence=events[-1], addresses=b""),
            GRAPH_STREAM,
            launched_ns=launched_ns,
            outer=SimpleNamespace(trace=trace, span_id=2, span=None),
            thread=MAIN,
        )
        self.bench.engine.replays.put([None, replay])
        return events

    def slice(self, **options):
        """Do one slice; return whether there is more to do."""
        return self.it.slice(may_ask=True, **options)


@pytest.fixture
def make_intake(make_bench):
    """Return a function that makes one, with settings of its own."""
    return lambda **settings: Intake(make_bench(**{"queue_size": 100_000, "interval_s": 0.001, **settings}))


@pytest.fixture
def intake(make_intake):
    """One whose GPU is done at once."""
    return make_intake()


class TestDue:
    """When a batch is exported."""

    def test_before_its_first_row_is_half_a_second_old(self, intake):
        """At the last pass before that: neither earlier, nor later because more rows come."""
        clock = intake.bench.clock
        clock.advance(10)
        for _ in range(2):
            intake.record(1)
            intake.slice()
            assert not intake.it.is_due
            clock.advance(0.4)
            intake.record(1)
            intake.slice()
            clock.advance(0.0989)
            assert not intake.it.is_due
            clock.advance(0.0002)
            assert intake.it.is_due
            intake.it.finish()

    def test_at_once_when_it_is_full(self, intake):
        """So many rows are a batch, however young."""
        intake.record(_BATCH_ROWS)
        while len(intake.it) < _BATCH_ROWS - _SLICE_ROWS:
            intake.slice()
        assert not intake.it.is_full
        assert not intake.it.is_due
        while intake.slice():
            pass
        assert len(intake.it) == _BATCH_ROWS
        assert intake.it.is_full
        assert intake.it.is_due

    def test_not_while_few_more_wait(self, intake):
        """They come into the same batch, because a small one costs nearly as much; many make one of their own."""
        few = _BATCH_ROWS // 2 - 1
        intake.record(_BATCH_ROWS + few)
        while len(intake.it) < _BATCH_ROWS:
            intake.slice()
        assert not intake.it.is_full
        intake.record(1)
        assert intake.it.is_full
        while intake.slice():
            pass
        assert len(intake.it) == _BATCH_ROWS + few + 1
        assert intake.it.is_full

    @pytest.mark.parametrize(("inner", "batches"), [(4095, 1), (4096, 2), (3 * 4096, 4), (7 * 4096, 8), (20 * 4096, 8)])
    def test_many_replays_make_larger_batches(self, intake, inner, batches):
        """For every 4,096 stages inside replays that wait, the rows of a batch more are enough, up to 4,096."""
        enough = min(batches * _BATCH_ROWS, 4096)
        for _ in range(inner // 4096):
            intake.replay(4096, done=False)
        intake.replay(inner % 4096, done=False)
        intake.slice()
        assert intake.it.pending == inner
        intake.record(enough)
        while len(intake.it) < enough:
            assert not intake.it.is_full
            intake.slice()
        assert intake.it.is_full


class TestSlice:
    """How much a slice takes, and whether there is more."""

    @pytest.mark.parametrize(
        ("waiting", "taken", "more"),
        [(0, 0, False), (_SLICE_ROWS - 1, _SLICE_ROWS - 1, False), (_SLICE_ROWS, _SLICE_ROWS, True),
         (_BACKLOG_ROWS - 1, _SLICE_ROWS, True), (_BACKLOG_ROWS, 2 * _SLICE_ROWS, True),
         (2 * _BACKLOG_ROWS, 3 * _SLICE_ROWS, True), (20 * _BACKLOG_ROWS, _BATCH_ROWS, True)],
    )  # fmt: skip
    def test_of_records(self, intake, waiting, taken, more):
        """The usual size, and as much again for every so many records that wait, up to a batch."""
        intake.record(waiting)
        assert intake.slice() is more
        assert len(intake.it) == taken

    def test_there_is_more_while_a_record_waits(self, make_intake):
        """Also where the GPU is not done with those that were taken."""
        intake = make_intake(completes=False)
        intake.record(_SLICE_ROWS + 1)
        assert intake.slice()
        assert not intake.slice()
        assert len(intake.it) == 0

    def test_stages_inside_replays_count_a_quarter(self, intake):
        """As many as cost what the records of a slice do."""
        intake.replay(4 * _SLICE_ROWS)
        assert intake.slice()
        assert len(intake.it) == 4 * _SLICE_ROWS
        intake.replay(2 * _SLICE_ROWS)
        intake.replay(2 * _SLICE_ROWS - 1)
        assert not intake.slice()
        assert len(intake.it) == 8 * _SLICE_ROWS - 1

    def test_replays_that_wait_are_left_for_the_next_slice(self, intake):
        """The backlog of replays is not read in one go."""
        for _ in range(4):
            intake.replay(2 * _SLICE_ROWS)
        intake.slice()
        assert len(intake.it) == 4 * _SLICE_ROWS
        intake.slice()
        assert len(intake.it) == 8 * _SLICE_ROWS

    def test_replays_that_wait_make_larger_slices(self, intake):
        """Four stages inside them weigh as much as one record."""
        intake.record(3 * _SLICE_ROWS)
        intake.replay(4 * (_BACKLOG_ROWS - 1 - 3 * _SLICE_ROWS) + 3, done=False)
        intake.slice()
        assert len(intake.it) == _SLICE_ROWS
        intake.replay(4 * _SLICE_ROWS + 1, done=False)
        intake.slice()
        assert len(intake.it) == 3 * _SLICE_ROWS

    def test_spans_of_the_sdk_are_few_at_a_time(self, intake):
        """Where each stage starts a span of the application's tracer, four are a slice, and else not."""
        recorder = intake.bench.engine.recorder
        recorder.open_bridge()
        intake.record(_SLICE_ROWS + 200)
        intake.slice()
        assert len(intake.it) == _SLICE_ROWS
        recorder.bridge.sdk = True
        intake.slice()
        assert len(intake.it) == _SLICE_ROWS + 4
        recorder.bridge.sdk = False


class TestWaiting:
    """What is not done on the GPU."""

    def test_stages_and_replays_are_waited_for(self, make_intake):
        """Both count as pending, those inside replays by their number, and none is given up."""
        intake = make_intake(completes=False)
        intake.record(3)
        events = intake.replay(5, done=False)
        intake.slice()
        assert intake.it.pending == 8
        assert len(intake.it) == 0
        intake.bench.device.complete()
        for event in events:
            event.done = True
        intake.slice()
        assert intake.it.pending == 0
        assert len(intake.it) == 8
        assert intake.bench.statistics().untimed == {}

    def test_what_is_given_up_goes_out_or_is_lost(self, make_intake):
        """At the end stages go out with host times, and replays, which have none, are lost."""
        intake = make_intake(completes=False)
        intake.record(3)
        intake.replay(5, done=False)
        intake.slice(give_up=True)
        assert intake.it.pending == 0
        assert len(intake.it) == 3
        assert intake.bench.statistics().untimed == {"given_up": 3}
        assert intake.bench.statistics().lost == {"given_up": 5}

    def test_no_device_is_asked_where_that_is_not_allowed(self, intake):
        """Without a prepared thread all that needs the GPU waits."""
        intake.record(3)
        intake.replay(5)
        intake.it.slice(may_ask=False)
        assert intake.it.pending == 8

    def test_uncertainty_is_that_of_the_anchor(self, intake):
        """It is unknown until one was taken."""
        assert intake.bench.statistics().clock_uncertainty_ns is None
        intake.record(1)
        intake.slice()
        assert intake.bench.statistics().clock_uncertainty_ns == 1


def test_what_cannot_be_added_is_lost_and_counted(intake, caplog):
    """A bridge that fails costs the stages of one slice; the next one goes on, and the log tells of it once."""

    def identify(record):
        raise LookupError("no such trace")

    recorder = intake.bench.engine.recorder
    bridge = recorder.bridge
    recorder.bridge = SimpleNamespace(sdk=False, offset_ns=0, keeps_roots=lambda: False, identify=identify)
    for _ in range(2):
        intake.record(3)
        intake.slice()
    recorder.bridge = bridge
    assert intake.bench.statistics().lost == {"internal_error": 6}
    assert len(intake.it) == 0
    (message,) = [record.getMessage() for record in caplog.records]
    assert "adding to a batch failed: LookupError('no such trace')" in message
    intake.record(3)
    intake.slice()
    assert len(intake.it) == 3
