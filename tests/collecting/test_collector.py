"""The collector on fake parts: what is resolved, given up, dropped, lost; and the account of it all."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gpuscope import _runtime, stage
from gpuscope._collecting.intake import _BATCH_ROWS
from gpuscope._data.interfaces import BROKEN, PENDING, Anchor
from gpuscope._settings.config import Config
from gpuscope.exporters.memory import MemoryExporter
from gpuscope.testing import FakeDevice, FakeStream, ManualClock


def ask_to_flush(collector, timeout_s):
    """Return a thread that waits for a flush, once the collector knows of it, and the list of its answers."""
    answers = []
    asking = threading.Thread(target=lambda: answers.append(collector.flush(timeout_s, send=True)))
    asking.start()
    while not collector._flushes:
        pass
    return asking, answers


class Stubborn:
    """An exporter that settles when told, or refuses."""

    name = "stubborn"

    def __init__(self) -> None:
        """Hold every delivery."""
        self.held = []

    def export(self, batch, delivery):
        """Keep it."""
        self.held.append((len(batch.site), delivery))

    def settle(self, *, lose: bool) -> None:
        """Report the oldest."""
        stages, delivery = self.held.pop(0)
        delivery.settle(0 if lose else stages, {"refused": stages} if lose else None)

    def flush(self, timeout_s):
        """Say whether anything is held."""
        return not self.held

    def shutdown(self, timeout_s):
        """Forget what is held, unsettled."""


class TestResolving:
    """What becomes of a record's events: times, spans, and the pool again."""

    def test_nothing_waits_for_the_gpu(self, make_bench):
        """A stage whose GPU work is pending is not exported yet, and others are not held up by it."""
        bench = make_bench(completes=False)
        device = bench.device
        with stage("slow"):
            pass
        assert bench.collect() == []
        assert bench.statistics().pending == 1
        device.complete()
        assert len(bench.collect()) == 2
        assert bench.statistics().pending == 0

    def test_stages_of_one_stream_are_settled_by_the_newest(self, make_bench):
        """Work on a stream ends in order: a finished prefix is exported, the rest stays."""
        bench = make_bench(completes=False)
        device = bench.device
        for _ in range(10):
            with stage("s"):
                pass
        device.complete(4)
        bench.collect()
        assert bench.statistics().exported == 4
        assert bench.statistics().pending == 6

    def test_one_question_answers_for_all_that_are_done(self, make_bench):
        """Because the newest tells of those before it, however many there are."""
        asked = []

        class Asked(FakeDevice):
            """Notes whom it is asked about."""

            def query(self, record):
                asked.append(record.site.name)
                return super().query(record)

        bench = make_bench(device=Asked(ManualClock(), completes=True))
        for name in ("a", "b", "c"):
            with stage(name):
                pass
        assert len(bench.collect()) == 6
        assert asked == ["c"]

    def test_what_waits_longest_on_any_stream_is_what_a_flush_waits_for(self, make_bench):
        """Also if later stages on other streams are waited for, too."""
        bench = make_bench(completes=False)
        intake = bench.engine.collector._intake
        with stage("first"):
            pass
        between_ns = bench.clock()
        with stage("second", stream=SimpleNamespace(device_index=0, cuda_stream=8)):
            pass
        bench.collect()
        assert not intake.is_past(between_ns)
        bench.device.complete()
        bench.collect()
        assert intake.is_past(bench.clock())

    def test_the_uncertainty_is_that_of_the_clocks_that_are_known(self, make_bench):
        """None before there is an anchor, and the largest of several; a GPU that has none yet changes nothing."""

        class Three(FakeDevice):
            """Has GPUs whose clocks are read ever less well."""

            def calibrate(self, timed_stream, keep):
                anchor = super().calibrate(timed_stream, keep)
                return Anchor(anchor.event, anchor.host_ns, 10 + timed_stream.index)

        bench = make_bench(device=Three(ManualClock(), completes=True))
        assert bench.statistics().clock_uncertainty_ns is None
        bench.device.lanes[1, 8] = FakeStream(1, 8, capturing=True)
        for index, known in ((1, None), (2, 12), (0, 12)):
            with stage("s", stream=SimpleNamespace(device_index=index, cuda_stream=8)):
                pass
            bench.collect()
            assert bench.statistics().clock_uncertainty_ns == known

    def test_events_that_can_not_be_given_back_are_told_of(self, make_bench, caplog):
        """The stage goes out all the same."""

        class Keeps(FakeDevice):
            """Takes nothing back."""

            def give_back(self, record):
                raise OSError("closed")

        bench = make_bench(device=Keeps(ManualClock()), event_deadline_s=1.0)
        with stage("s"):
            pass
        bench.collect()
        bench.clock.advance(2)
        assert len(bench.collect()) == 1
        (message,) = [record.getMessage() for record in caplog.records]
        assert message.startswith("returning events failed: OSError('closed').")

    def test_other_streams_are_not_held_up(self, make_bench):
        """A hung stream holds up its own stages only."""

        class Other:
            device_index, cuda_stream = 0, 8

        bench = make_bench(completes=False)
        device = bench.device
        with stage("hung"):
            pass
        with stage("fine", stream=Other()):
            pass
        for event in device.lanes[0, 8].recorded[0]:
            event.done = True
        assert {span.name for span in bench.collect()} == {"fine", "fine [gpu]"}

    def test_stage_that_never_completes_is_given_up_and_exported_with_host_times(self, make_bench):
        """After the deadline a stage goes out without its GPU part, flagged and counted."""
        bench = make_bench(completes=False, event_deadline_s=2.0)
        with stage("hung"):
            pass
        bench.collect()
        bench.clock.advance(3)
        (span,) = bench.collect()
        assert span.attributes["gpuscope.given_up"] is True
        assert bench.statistics().untimed == {"given_up": 1}
        assert bench.statistics().exported == 1
        assert bench.device.pairs_in_use == 0

    def test_no_event_is_asked_about_while_its_stream_is_captured(self, make_bench):
        """Stages inside a capture wait until it is over, and are then exported as captured, without GPU times."""
        bench = make_bench()
        with stage("before"):
            pass
        bench.collect()
        timed_stream = bench.device.lanes[0, 7]
        timed_stream.capturing = True
        with stage("inside"):
            pass
        assert bench.named("inside") == []
        timed_stream.capturing = False
        with stage("after"):
            pass
        (inside,) = bench.named("inside")
        assert inside.attributes["gpuscope.captured"] is True
        assert "gpuscope.gpu.duration" not in inside.attributes
        assert "gpuscope.gpu.duration" in bench.named("after")[0].attributes
        assert bench.statistics().untimed == {"captured": 1}

    def test_gpu_time_before_the_launch_is_clamped_and_counted(self, make_bench):
        """A GPU start before its launch by more than the uncertainty is moved to the launch, and says so."""
        bench = make_bench(delay_ns=-1_000_000)
        with stage("early"):
            pass
        host, gpu = bench.named("early")[0], bench.named("early [gpu]")[0]
        assert gpu.start_ns == host.start_ns
        assert gpu.attributes["gpuscope.clamped"] is True

    def test_warm_up_calls_are_flagged(self, make_bench):
        """The first calls of a stage carry the flag, the later ones do not."""
        bench = make_bench(warmup=2)
        for _ in range(3):
            with stage("cold"):
                pass
        flags = ["gpuscope.warmup" in span.attributes for span in bench.named("cold")]
        assert flags == [True, True, False]

    def test_an_event_that_is_broken_costs_one_stage_its_gpu_times(self, make_bench):
        """The stages before and after it on the stream keep theirs."""

        class Faulty(FakeDevice):
            """Answers with an error about the second stage, and about the last one that it is not done."""

            def query(self, record):
                return {"bad": BROKEN, "last": PENDING}.get(record.site.name) or super().query(record)

            def elapsed_ms(self, first, second):
                return None if second is self.lanes[0, 7].recorded[1][1] else super().elapsed_ms(first, second)

        clock = ManualClock()
        bench = make_bench(device=Faulty(clock, completes=True))
        for name in ("before", "bad", "after", "last"):
            with stage(name):
                pass
        spans = {span.name for span in bench.collect()}
        assert spans == {"before", "before [gpu]", "bad", "after", "after [gpu]"}
        assert bench.statistics().untimed == {"device_error": 1}
        assert bench.statistics().pending == 1

    def test_a_device_that_raises_costs_gpu_times_and_no_stage(self, make_bench):
        """Those that were placed before it raised keep theirs; the rest of the window goes out without; all leave."""

        class Raising(FakeDevice):
            """Raises about the third of each five stages."""

            def elapsed_ms(self, first, second):
                if any(second is pair[1] for pair in list(self.lanes[0, 7].recorded)[2::5]):
                    raise OSError("lost")
                return super().elapsed_ms(first, second)

        bench = make_bench(device=Raising(ManualClock(), completes=True))
        for _ in range(2):
            for _ in range(5):
                with stage("s"):
                    pass
            bench.collect()
        assert len(bench.spans) == 10 + 4
        assert bench.statistics().untimed == {"device_error": 6}
        assert bench.statistics().pending == 0
        assert bench.engine.collector._intake.pending == 0
        assert bench.device.pairs_in_use == 0

    @pytest.mark.parametrize("unknown", ["duration", "place"])
    def test_a_distance_that_cannot_be_told_leaves_host_times(self, make_bench, unknown):
        """Of the two that place a stage either may be missing, as where one event was captured."""

        class Forgetful(FakeDevice):
            """Does not know one kind of distance for the second stage."""

            def elapsed_ms(self, first, second):
                pair = self.lanes[0, 7].recorded[1]
                missing = second is pair[1] and (first is pair[0]) is (unknown == "duration")
                return None if missing else super().elapsed_ms(first, second)

        clock = ManualClock()
        bench = make_bench(device=Forgetful(clock, completes=True))
        for name in ("a", "b", "c"):
            with stage(name):
                pass
        assert {span.name for span in bench.collect()} == {"a", "a [gpu]", "b", "c", "c [gpu]"}
        assert bench.statistics().untimed == {"captured": 1}
        assert bench.device.pairs_in_use == 0


class TestPasses:
    """What one pass of the collector's own thread does."""

    def test_a_batch_is_exported_when_it_would_be_half_a_second_old_at_the_next_pass(self, make_bench):
        """A pass before that leaves it to grow."""
        bench = make_bench(interval_s=0.05)
        collector = bench.engine.collector
        with stage("s"):
            pass
        collector._drain()
        assert bench.spans == []
        bench.clock.advance(0.4)
        collector._drain()
        assert bench.spans == []
        bench.clock.advance(0.06)
        collector._drain()
        assert len(bench.spans) == 2

    def test_with_passes_far_apart_none_leaves_a_batch_to_the_next(self, bench):
        """The pass after it comes in a second."""
        with stage("s"):
            pass
        bench.engine.collector._drain()
        assert len(bench.spans) == 2

    def test_a_full_batch_is_exported_at_once(self, make_bench):
        """And the rest of the backlog waits for its turn."""
        bench = make_bench(queue_size=10_000, interval_s=0.2)
        for _ in range(2 * _BATCH_ROWS - 100):
            with stage("s"):
                pass
        bench.engine.collector._drain()
        assert _BATCH_ROWS <= bench.statistics().exported < 2 * _BATCH_ROWS - 100

    def test_pending_work_is_not_given_up(self, make_bench):
        """However many passes there are before the deadline; afterwards the stages go out without GPU times."""
        bench = make_bench(completes=False, event_deadline_s=5.0)
        for _ in range(3):
            with stage("s"):
                pass
        for _ in range(3):
            bench.engine.collector._drain()
            bench.clock.advance(1)
        assert bench.statistics().pending == 3
        assert bench.statistics().untimed == {}
        bench.clock.advance(3)
        bench.engine.collector._drain()
        assert bench.statistics().untimed == {"given_up": 3}

    def test_a_flush_is_answered_when_all_is_exported(self, make_bench):
        """While work is pending the request stays; when the work is done the batch goes out, however young."""
        bench = make_bench(completes=False)
        collector = bench.engine.collector
        with stage("s"):
            pass
        asking, answers = ask_to_flush(collector, 1000)
        for _ in range(2):
            collector._drain()
            collector._flushes.serve(may_ask=True)
            assert collector._flushes
        bench.device.complete()
        collector._drain()
        collector._flushes.serve(may_ask=True)
        assert not collector._flushes
        asking.join()
        assert answers == [True]
        assert len(bench.spans) == 2

    def test_a_flush_that_is_out_of_time_says_so(self, make_bench):
        """What is pending then is not a success, and no other request is held up by it."""
        bench = make_bench(completes=False)
        collector = bench.engine.collector
        with stage("s"):
            pass
        collector._drain()
        asking, answers = ask_to_flush(collector, 0.0)
        collector._flushes.serve(may_ask=True)
        assert not collector._flushes
        asking.join()
        assert answers == [False]
        assert bench.statistics().pending == 1

    def test_at_the_end_pending_work_is_given_up_after_part_of_the_time(self, make_bench):
        """It goes out with host times, and nothing is lost."""
        bench = make_bench(completes=False)
        with stage("s"):
            pass
        bench.engine.collector._finish(time.monotonic() + 0.2)
        assert [span.name for span in bench.spans] == ["s"]
        assert bench.statistics().exported == 1
        assert bench.statistics().lost == {}


class TestBounds:
    """What is refused, given up and counted."""

    def test_full_queue_refuses_the_newest_and_gives_its_events_back(self, make_bench):
        """A record refused by a full queue is counted as dropped and gives both its events back to the pool."""
        bench = make_bench(queue_size=16, completes=False)
        for number in range(20):
            with stage("s") as s:
                s.set_attribute("number", number)
        assert bench.statistics().dropped == {"queue_full": 4}
        assert bench.device.pairs_in_use == 16
        bench.device.complete()
        assert [span.attributes["number"] for span in bench.named("s")] == list(range(16))

    def test_pending_stages_are_bounded(self, make_bench):
        """A hung stream can't pile up more stages than the queue may hold: the rest go out without GPU times."""
        bench = make_bench(queue_size=16, completes=False)
        for _ in range(5):
            for _ in range(16):
                with stage("s"):
                    pass
            bench.collect()
        assert bench.statistics().pending == 16
        assert bench.statistics().untimed == {"too_many_pending": 64}

    def test_stages_recorded_from_many_threads_are_all_accounted_for(self, make_bench):
        """Four threads at once lose nothing."""
        bench = make_bench(queue_size=100_000)

        def work():
            for _ in range(500):
                with stage("a"), stage("b"):
                    pass

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        bench.collect()
        assert bench.statistics().exported == bench.statistics().recorded == 4000


class Accounting(RuleBasedStateMachine):
    """recorded = exported + dropped + lost + pending, after any interleaving."""

    def __init__(self):
        """Set up an engine on fake parts."""
        super().__init__()
        self.clock = ManualClock()
        self.device = FakeDevice(self.clock)
        self.stubborn = Stubborn()
        config = Config(mode="on", exporters=("none",), queue_size=16, event_deadline_s=5.0, sampler="always_on")
        self.period = _runtime.period(
            config, device=self.device, clock=self.clock, exporters=(MemoryExporter([]), self.stubborn)
        )
        self.engine = self.period.__enter__()
        self.engine.recorder.accept(self.engine.queue)
        self.ended = 0
        self.open = []

    @rule(stages=st.integers(1, 12))
    def record(self, stages):
        """Run some stages."""
        if self.engine.ended:
            return
        for _ in range(stages):
            with stage("s"):
                pass
        self.ended += stages

    @rule()
    def enter(self):
        """Leave a stage open."""
        if not self.engine.ended:
            opened = stage("open")
            opened.__enter__()
            self.open.append(opened)

    @precondition(lambda self: self.open and not self.engine.ended)
    @rule(which=st.integers(0, 100), fails=st.booleans())
    def leave(self, which, fails):
        """End one of the open stages."""
        self.open.pop(which % len(self.open)).__exit__(None, ValueError("x") if fails else None, None)
        self.ended += 1

    @rule(stages=st.integers(1, 10))
    def complete(self, stages):
        """Let the GPU finish some."""
        self.device.complete(stages)

    @rule(capturing=st.booleans())
    def capture(self, capturing):
        """Begin or end a capture."""
        for timed_stream in self.device.lanes.values():
            timed_stream.capturing = capturing

    @rule(seconds=st.floats(0, 10))
    def wait(self, seconds):
        """Let time pass."""
        self.clock.advance(seconds)

    @precondition(lambda self: not self.engine.ended)
    @rule()
    def step(self):
        """One slice of the collector."""
        self.engine.collector.step()

    @precondition(lambda self: self.stubborn.held)
    @rule(lose=st.booleans())
    def settle(self, lose):
        """The slow exporter reports."""
        self.stubborn.settle(lose=lose)

    @rule()
    def shutdown(self):
        """End the period."""
        self.engine.shutdown(1.0)

    @invariant()
    def adds_up(self):
        """The sum is the number of stages that ended, and no count is negative."""
        account = self.engine.statistics()
        assert account.recorded == self.ended
        total = account.exported + sum(account.dropped.values()) + sum(account.lost.values()) + account.pending
        assert total == self.ended
        assert min(account.exported, account.pending, *account.dropped.values(), *account.lost.values(), 0) == 0
        if self.engine.ended:
            assert account.pending == 0

    def teardown(self):
        """Put the state back."""
        for opened in reversed(self.open):
            opened.__exit__(None, None, None)
        self.period.__exit__(None, None, None)


TestAccounting = Accounting.TestCase
TestAccounting.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class TestSampling:
    """What is not sampled still counts."""

    @given(ratio=st.sampled_from([0.0, 1.0]))
    @settings(max_examples=2, deadline=None)
    def test_unsampled_stages_count_in_the_summary_and_are_not_exported(self, ratio):
        """A trace that is not sampled is dropped by that reason, and still measured."""
        config = Config(mode="on", exporters=("none",), sampler="parentbased_traceidratio", sampler_ratio=ratio)
        spans = []
        clock = ManualClock()
        with _runtime.period(
            config, device=FakeDevice(clock, completes=True), clock=clock, exporters=(MemoryExporter(spans),)
        ) as engine:
            engine.recorder.accept(engine.queue)
            with stage("request"), stage("infer"):
                pass
            while engine.collector.step():
                pass
            assert len(spans) == (4 if ratio else 0)
            assert engine.statistics().dropped == ({} if ratio else {"unsampled": 2})
            assert {line.name for line in engine.summary.summary().stages} == {"request", "infer"}
