"""What waits is bounded in bytes, and what has been exported is gone, though the garbage collector is off."""

from __future__ import annotations

import gc
import threading

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from gpuscope import stage
from gpuscope._recording.queue import ByteBudget
from gpuscope._recording.state import state
from gpuscope.testing import FakeEvent

KIB = 1024
LIMIT = 64 * KIB


def balanced(account):
    """Tell whether every stage of an account is somewhere."""
    lost, dropped = sum(account.lost.values()), sum(account.dropped.values())
    return account.recorded == account.exported + account.pending + lost + dropped


class TestBytes:
    """Stages that were told something large."""

    @pytest.mark.parametrize("form", ["set_attribute", "block", "span", "event", "error", "many", "events", "list"])
    def test_what_does_not_fit_is_dropped_and_counted(self, make_bench, monkeypatch, form):
        """Of stages that wait, only so many bytes are kept, whatever it is that is large; the others are counted."""
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", TracerProvider())
        bench, text = make_bench(queue_bytes=LIMIT), "x" * 4 * KIB
        for _ in range(40):
            with stage("s", attributes={"prompt": text} if form == "block" else None) as s:
                span = trace.get_current_span()
                if form == "set_attribute":
                    s.set_attribute("prompt", text)
                elif form == "span":
                    span.set_attribute("prompt", text)
                elif form == "event":
                    span.add_event("prompt", {"text": text})
                elif form == "error":
                    span.record_exception(ValueError(text))
                elif form == "many":
                    for number in range(128):
                        s.set_attribute(f"n{number}", number)
                elif form == "events":
                    for number in range(100):
                        span.add_event("small", {"number": number})
                elif form == "list":
                    s.set_attribute("prompts", [text[:KIB]] * 4)
        assert state.recorder.budget.used <= LIMIT
        assert 0 < len(bench.named("s")) < 40
        account = bench.statistics()
        assert account.dropped == {"queue_bytes": 40 - account.exported}
        assert balanced(account)

    @pytest.mark.parametrize("cause", [False, True])
    def test_errors_are_weighed(self, make_bench, cause):
        """The message and the frames of an exception count as well, and those of its cause."""
        bench, long = make_bench(queue_bytes=LIMIT), "x" * 4000

        def fail():
            if cause:
                raise ValueError("x") from ValueError(long)
            raise ValueError(long)

        for _ in range(40):
            with pytest.raises(ValueError, match="x"), stage("s"):
                fail()
        bench.collect()
        assert bench.statistics().dropped["queue_bytes"] > 10

    def test_events_of_what_was_dropped_go_back(self, make_bench):
        """A stage that is dropped keeps no CUDA events, and one with nothing large is exported all the same."""
        bench = make_bench(queue_bytes=LIMIT)
        for _ in range(3):
            with stage("large") as s:
                s.set_attribute("prompt", "x" * LIMIT)
            with stage("small") as s:
                s.set_attribute("batch", 8)
        assert len(bench.named("small")) == len(bench.named("small [gpu]")) == 3
        assert bench.named("large") == []
        assert bench.device.pairs_in_use == 0

    def test_bytes_come_back_once_they_are_exported(self, make_bench):
        """There is room again, so that what is told slowly enough is all exported."""
        bench = make_bench(queue_bytes=LIMIT)
        for _ in range(40):
            with stage("s") as s:
                s.set_attribute("prompt", "x" * 16 * KIB)
            bench.collect()
        del s
        assert bench.statistics().exported == 40
        assert state.recorder.budget.used == 0

    def test_a_batch_is_bounded_in_bytes(self, make_bench):
        """Large stages go out in several batches, because encoding one takes its size again, several times."""
        batches = []

        class Sizes:
            name = "sizes"

            def export(self, batch, delivery):
                batches.append(len(batch.site))
                delivery.settle(len(batch.site))

            def flush(self, timeout_s):
                return True

            shutdown = flush

        bench = make_bench(exporters=(Sizes(),))
        for _ in range(64):
            with stage("s") as s:
                s.set_attribute("prompt", "x" * 128 * KIB)
        while bench.engine.collector._intake.slice(may_ask=True):
            if bench.engine.collector._intake.is_full:
                bench.engine.collector._export()
        bench.collect()
        assert sum(batches) == 64
        assert max(batches) <= 16

    def test_the_account_of_bytes_waits_for_nobody(self):
        """It may be asked while it is being counted, as the garbage collector may do: then it says what was known."""
        budget = ByteBudget(100)
        held = budget.take(60)
        assert (budget.used, budget.take(60)) == (60, None)
        with budget._lock:
            del held
            assert budget.used == 60
        assert budget.used == 0


@pytest.fixture
def no_garbage_collector():
    """Collect what there is, and switch the garbage collector off."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def requests(count):
    """Run so many requests, in the ways in which stages are used."""

    @stage("decorated")
    def decorated(fail):
        trace.get_current_span().set_attribute("a", 1)
        if fail:
            raise ValueError("bad")

    for number in range(count):
        with stage("block") as s:
            s.set_attribute("prompt", "x" * 2000)
            try:
                decorated(number % 2)
            except ValueError:
                trace.get_current_span().add_event("bad", {"x": 1})


@pytest.mark.usefixtures("no_garbage_collector")
class TestCycles:
    """Many servers switch the garbage collector off, so no stage may need it."""

    @pytest.mark.parametrize("provider", [None, TracerProvider()], ids=["no provider", "provider"])
    @pytest.mark.parametrize("queue_size", [8192, 16], ids=["exported", "refused"])
    def test_no_stage_needs_the_garbage_collector(self, make_bench, monkeypatch, provider, queue_size):
        """Whether a stage was exported or refused, nothing of it is left."""
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
        bench = make_bench(queue_size=queue_size)

        def run():
            requests(200)
            bench.collect()
            bench.spans.clear()
            # A fake device keeps the events of all streams, as a real one does. Other tests have types with an `==`.
            return sum(type(each) is not tuple and type(each) is not FakeEvent for each in gc.get_objects())

        gc.collect()  # What other tests have left is nobody's here.
        before = run()
        assert run() - before < 100
        assert gc.collect() < 100

    @pytest.mark.parametrize("provider", [None, TracerProvider()], ids=["no provider", "provider"])
    def test_an_abandoned_generator_is_garbage(self, bench, monkeypatch, provider):
        """A generator that leads back to itself by what its stage was told, or by the context, is collected."""
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
        ended = []

        class Owner:
            generator = None

        def abandon(link):
            owner = Owner()

            def generator():
                try:
                    with stage("g") as s:
                        s.set_attribute("owner", owner if link == "attribute" else 1)
                        yield 1
                finally:
                    ended.append(link)

            owner.generator = generator()
            if link == "context":
                from opentelemetry import context

                context.attach(context.set_value("owner", owner))
            next(owner.generator)

        for link in ("nothing", "attribute", "context"):
            thread = threading.Thread(target=abandon, args=(link,))
            thread.start()
            thread.join()
        del thread  # From Python 3.14 on it holds the context that it ran in.
        gc.collect()
        assert sorted(ended) == ["attribute", "context", "nothing"]
