"""The collector as a whole: its thread, what a pass tells whom, what failures cost, and how its time is shared out."""

from __future__ import annotations

import logging
import threading
import time
from types import SimpleNamespace

import pytest

from gpuscope import _runtime, stage
from gpuscope._collecting.intake import _SLICE_ROWS
from gpuscope._settings.config import Config
from gpuscope.exporters.memory import MemoryExporter
from gpuscope.testing import FakeDevice, ManualClock

from ..exporters.receiver import Receiver

PATIENCE_S = 60


class Watching:
    """An exporter that keeps what it is given, and how long it may take."""

    name = "watching"

    def __init__(self, *, fails=False):
        """Choose whether it takes batches."""
        self.batches, self.flushes, self.shutdowns, self.fails = [], [], [], fails

    def export(self, batch, delivery):
        """Take a batch in two pieces of work."""
        if self.fails:
            raise OSError("full")
        self.batches.append(len(batch.site))
        yield
        delivery.settle(len(batch.site))

    def flush(self, timeout_s):
        """Keep the time."""
        self.flushes.append(timeout_s)
        return True

    def shutdown(self, timeout_s):
        """Keep the time."""
        self.shutdowns.append(timeout_s)


@pytest.fixture
def watching():
    """Such an exporter."""
    return Watching()


@pytest.fixture
def running(watching):
    """Recording with a collector's thread, on a GPU that is done at once."""
    config = Config().changed(mode="on", exporters="none", warmup=0, interval_s=0.005)
    clock = ManualClock()
    with _runtime.period(
        config, device=FakeDevice(clock, completes=True), clock=clock, exporters=(watching,)
    ) as engine:
        yield engine


def run(stages=1):
    """Run some stages."""
    for _ in range(stages):
        with stage("s"):
            pass


class TestThread:
    """Start, work, end."""

    def test_it_begins_with_the_first_stage(self, running):
        """Until then there is none; then there is one, and it gets ready."""
        assert not running.collector.is_running
        before = set(threading.enumerate())
        run()
        assert running.collector.is_running
        (thread,) = set(threading.enumerate()) - before
        assert thread.daemon
        assert running.collector.ready.wait(PATIENCE_S)

    def test_it_exports_without_being_asked(self, running, watching):
        """A batch goes out when it is due."""
        run()
        due = threading.Event()
        while not watching.batches:
            running.recorder.clock.advance(1)
            due.wait(0.01)
        assert watching.batches == [1]

    def test_half_a_queue_wakes_it(self, watching):
        """It does not wait for its next pass, which is a minute away; fewer stages wait for that."""
        config = Config().changed(mode="on", exporters="none", interval_s=60.0, queue_size=1000)
        clock, due = ManualClock(), threading.Event()
        with _runtime.period(
            config, device=FakeDevice(clock, completes=True), clock=clock, exporters=(watching,)
        ) as engine:
            run()
            assert engine.flush(PATIENCE_S)
            run(500)
            due.wait(0.05)
            assert watching.batches == [1]
            run()
            began = time.monotonic()
            while sum(watching.batches) < 502 and time.monotonic() - began < PATIENCE_S / 2:
                due.wait(0.01)
            assert sum(watching.batches) == 502
            assert engine.statistics().dropped == {}

    def test_a_flush_is_answered(self, running, watching):
        """At once, however young the batch is, and the exporters are flushed in the time that is left."""
        for number in range(1, 4):
            run()
            assert running.flush(PATIENCE_S)
            assert sum(watching.batches) == number
        assert len(watching.flushes) == 3
        assert all(0 < timeout_s <= PATIENCE_S for timeout_s in watching.flushes)

    def test_a_flush_that_sends_nothing_leaves_the_exporters_alone(self, running, watching):
        """It is for whoever reads the summary."""
        run()
        assert running.flush(PATIENCE_S, send=False)
        assert watching.flushes == []
        assert running.statistics().exported == 1

    def test_it_ends_with_the_period(self, running, watching):
        """Everything is exported, the exporters are shut down in the time that is left, and the thread is gone."""
        run(3)
        assert running.shutdown(PATIENCE_S)
        for thread in threading.enumerate():
            if thread.name == "gpuscope-collector":
                thread.join(PATIENCE_S)
                assert not thread.is_alive()
        assert sum(watching.batches) == 3
        (timeout_s,) = watching.shutdowns
        assert 0 < timeout_s <= PATIENCE_S
        assert running.statistics().pending == 0

    def test_without_a_stage_there_is_nothing_to_end(self, running, watching):
        """The end of such a period comes at once, and it is complete."""
        assert running.shutdown(PATIENCE_S)
        assert not running.collector.is_running
        assert watching.batches == watching.shutdowns == []

    def test_a_flush_that_waits_at_the_end_is_released(self, running):
        """Whoever waits for it goes on; it has not succeeded."""
        run()
        assert running.collector.ready.wait(PATIENCE_S)
        running.recorder.device.completes = False
        run()
        answers = []
        asking = threading.Thread(target=lambda: answers.append(running.flush(PATIENCE_S)))
        asking.start()
        while not running.collector._flushes:
            pass
        began = time.monotonic()
        running.shutdown(1.0)
        asking.join(PATIENCE_S)
        assert answers == [False]
        assert time.monotonic() - began < PATIENCE_S / 2

    @pytest.mark.parametrize("error", [SystemError("odd"), SystemExit("odd")])
    def test_a_failure_of_a_pass_is_told_once_and_the_next_one_comes(self, running, caplog, error):
        """Whatever it is that the program's code raises there."""
        serve, left = running.collector._flushes.serve, [error, error]

        def fail(**how):
            if left:
                raise left.pop()
            serve(**how)

        running.collector._flushes.serve = fail
        run()
        assert running.flush(PATIENCE_S)
        (message,) = [record.getMessage() for record in caplog.records]
        assert f"a pass of the collector failed: {type(error).__name__}('odd')" in message

    def test_a_failure_of_the_end_is_told_and_ends_it(self, running, caplog):
        """Nobody waits for a thread that is gone."""

        def fail(deadline_s):
            raise SystemExit("odd")

        running.collector._finish = fail
        run()
        began = time.monotonic()
        assert not running.shutdown(PATIENCE_S)
        assert time.monotonic() - began < PATIENCE_S / 2
        (message,) = [text for text in map(logging.LogRecord.getMessage, caplog.records) if "the collector" in text]
        assert "the collector failed; nothing more is exported." in message
        assert "odd" in message


class TestTelling:
    """Who is told of what."""

    def test_each_pass_is_told_of(self, make_bench):
        """Also within a backlog, once per interval, because under constant load a pass does not end."""
        told = []
        bench = make_bench(queue_size=10_000, interval_s=0.001)
        bench.engine.collector._on_pass = told.append
        run()
        bench.engine.collector._drain()
        assert told == [bench.engine.recorder]
        run(9000)
        bench.engine.collector._drain()
        assert len(told) >= 4

    def test_the_program_has_pauses(self, make_bench):
        """After every slice and every part of a batch, so that a thread that wants the GIL waits for one of them."""
        bench, pauses = make_bench(queue_size=10_000), []
        bench.engine.collector._breathe = lambda: pauses.append(len(bench.spans))
        run(1)
        bench.engine.collector.step()
        assert pauses == [0, 0, 0, 2]  # The batch, the summary, the metrics, and the exporter.
        pauses.clear()
        run(3 * _SLICE_ROWS)
        bench.engine.collector._drain()
        assert len(pauses) >= 3

    def test_whoever_is_told_may_fail(self, make_bench, caplog):
        """It is logged once, and the pass goes on."""

        def fail(recorder):
            raise LookupError("no file")

        bench = make_bench(interval_s=0.2)
        bench.engine.collector._on_pass = fail
        run()
        for _ in range(2):
            bench.engine.collector._drain()
        assert len(bench.engine.collector._intake) == 1
        (message,) = [record.getMessage() for record in caplog.records]
        assert "checking whether a deep look was asked for failed: LookupError('no file')" in message

    def test_a_provider_is_told_of_when_it_is_first_seen(self, make_bench):
        """Once, and again for another one."""
        told = []
        bench = make_bench()
        bench.engine.collector._on_provider = lambda: told.append(bench.engine.recorder.bridge.provider)
        bench.engine.recorder.open_bridge()
        bridge = bench.engine.recorder.bridge
        for provider in (None, "first", "first", "second", "second"):
            bridge.look_for_provider = lambda provider=provider: provider
            bench.engine.collector.step()
        assert told == ["first", "second"]


class TestFailures:
    """What they cost."""

    def test_a_thread_that_cannot_be_prepared_asks_no_gpu(self, make_bench, caplog):
        """Stages wait for a pass in which it can; those that need no GPU do not."""

        class Shy(FakeDevice):
            """Cannot be attached to for a while."""

            shy = True

            def attach(self):
                """Fail, or not."""
                if self.shy:
                    raise OSError("no context")

        bench = make_bench(device=Shy(ManualClock(), completes=True))
        run()
        assert bench.collect() == []
        assert bench.statistics().pending == 1
        bench.device.shy = False
        assert len(bench.collect()) == 2
        (message,) = [record.getMessage() for record in caplog.records]
        assert "preparing a pass of the collector failed: OSError('no context')" in message

    def test_a_batch_that_cannot_be_counted_is_lost_and_the_next_is_not(self, make_bench, caplog):
        """Its stages are lost by a reason, and the log tells of it once."""
        bench = make_bench()
        summary = bench.engine.collector._onward._summary
        bench.engine.collector._onward._summary = SimpleNamespace(add=lambda batch: 1 / 0)
        for _ in range(2):
            run(3)
            bench.collect()
        bench.engine.collector._onward._summary = summary
        run(2)
        bench.collect()
        account = bench.statistics()
        assert (account.exported, account.lost, account.pending) == (2, {"internal_error": 6}, 0)
        (message,) = [record.getMessage() for record in caplog.records]
        assert "making a batch failed: ZeroDivisionError" in message

    def test_an_exporter_that_fails_does_not_keep_a_batch_from_the_others(self, make_bench, watching):
        """What one of them has exported is exported."""
        bench = make_bench(exporters=(Watching(fails=True), watching))
        run(3)
        bench.collect()
        account = bench.statistics()
        assert (account.exported, account.lost, account.pending) == (3, {}, 0)
        assert watching.batches == [3]
        assert len(bench.spans) == 6

    def test_an_exporter_that_fails_alone_costs_its_stages_once(self, running, watching):
        """They are lost by that reason, whatever else is counted of the batch."""
        watching.fails = True
        run(3)
        running.flush(PATIENCE_S)
        account = running.statistics()
        assert (account.exported, account.lost, account.pending) == (0, {"exporter_error": 3}, 0)

    def test_stages_that_are_not_sampled_are_left_out_of_a_batch(self, make_bench):
        """Those beside them are exported, and the metrics and the summary have all."""
        bench = make_bench(sampler="traceidratio", sampler_ratio=0.5)
        run(200)
        bench.collect()
        account = bench.statistics()
        assert 0 < account.exported < 200
        assert account.dropped == {"unsampled": 200 - account.exported}
        assert account.recorded == 200
        assert sum(span.kind == "host" for span in bench.spans) == account.exported
        assert sum(line.calls for line in bench.engine.summary.summary().stages) == 200


class TestEnd:
    """How the time of a shutdown is shared out."""

    def test_pending_work_has_part_of_the_time(self, make_bench):
        """It is asked about for six tenths of it, then goes out with host times, and exporters have the rest."""
        watching = Watching()
        bench = make_bench(completes=False, exporters=(watching,))
        run()
        began = time.monotonic()
        bench.engine.collector._finish(began + 1.0)
        assert time.monotonic() - began >= 0.55
        (timeout_s,) = watching.shutdowns
        assert timeout_s <= 0.45
        assert bench.statistics().untimed == {"given_up": 1}
        assert bench.statistics().exported == 1

    def test_metrics_have_a_tenth_of_the_rest(self, make_bench):
        """Where they go to an endpoint themselves; the exporters of spans have nine tenths."""
        watching, receiver = Watching(), Receiver()
        settings = {"metrics": "otlp", "metrics_interval_s": 3600.0, "otlp_base_endpoint": receiver.endpoint}
        bench = make_bench(exporters=(watching,), **settings)
        run()
        bench.engine.collector._finish(time.monotonic() + 1000.0)
        receiver.close()
        (timeout_s,) = watching.shutdowns
        assert 850 < timeout_s <= 900
        assert [request.path for request in receiver.requests] == ["/v1/metrics"]

    def test_work_that_is_done_is_not_waited_for(self, make_bench):
        """Then the exporters have all the time."""
        watching = Watching()
        bench = make_bench(exporters=(watching,))
        run(1000)
        bench.engine.collector._finish(time.monotonic() + 1000.0)
        (timeout_s,) = watching.shutdowns
        assert 900 < timeout_s <= 1000
        assert bench.statistics().exported == 1000

    def test_without_time_nothing_is_waited_for_and_all_is_counted(self, make_bench):
        """What is still open is lost."""
        watching = Watching()
        bench = make_bench(completes=False, exporters=(watching,))
        run(3)
        bench.engine.collector._finish(0.0)
        assert watching.shutdowns == [0.0]
        account = bench.statistics()
        assert (account.pending, account.lost) == (0, {"shutdown": 3})


def test_spans_that_are_exported_in_memory_are_there_at_the_end():
    """Without a flush, by the end of the period alone."""
    spans, clock = [], ManualClock()
    config = Config().changed(mode="on", exporters="none", warmup=0, interval_s=30.0)
    device = FakeDevice(clock, completes=True)
    with _runtime.period(config, device=device, clock=clock, exporters=(MemoryExporter(spans),)):
        run(5)
    assert [span.kind for span in spans].count("host") == 5
