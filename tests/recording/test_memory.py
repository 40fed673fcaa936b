"""What waits is bounded in bytes."""

from __future__ import annotations

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from gpuscope import stage
from gpuscope._recording.queue import ByteBudget
from gpuscope._recording.state import state

KIB = 1024
LIMIT = 64 * KIB


def balanced(account):
    """Tell whether every stage of an account is somewhere."""
    lost, dropped = sum(account.lost.values()), sum(account.dropped.values())
    return account.recorded == account.exported + account.pending + lost + dropped


class TestBytes:
    """Stages that were told something large."""

    @pytest.mark.parametrize("form", ["set_attribute", "block", "span", "event", "error", "many", "list"])
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
                elif form == "list":
                    s.set_attribute("prompts", [text[:KIB]] * 4)
        assert state.recorder.budget.used <= LIMIT
        assert 5 < len(bench.named("s")) < 40
        account = bench.statistics()
        assert account.dropped == {"queue_bytes": 40 - account.exported}
        assert balanced(account)

    def test_errors_are_weighed(self, make_bench):
        """The message and the frames of an exception count as well."""
        bench = make_bench(queue_bytes=LIMIT)
        for _ in range(40):
            with pytest.raises(ValueError, match="x"), stage("s"):
                raise ValueError("x" * 4000)
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
        assert len(bench.named("small")) == 3
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
