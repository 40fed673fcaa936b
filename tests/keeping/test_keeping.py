"""Which traces are exported where `keep` decides: whole ones, once it is known how they went."""

from __future__ import annotations

import contextvars
import math
import random
import threading
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

import gpuscope
from gpuscope import stage
from gpuscope._collecting.keeping.requests import RequestKeys, keys_in_python
from gpuscope._data.native import StageRecord, native

MS = 0.001


def request(bench, took_s=0.01, name="request", inner="infer"):
    """Run a request with two stages inside, one in the other."""
    with stage(name), stage(inner):
        bench.clock.advance(took_s / 2)
        with stage("copy"):
            bench.clock.advance(took_s / 2)


def fail():
    """Raise."""
    raise KeyError


def by_trace(spans):
    """Return the number of spans of each kind and name in each trace."""
    found = {}
    for span in spans:
        found.setdefault(span.trace_id, Counter())[span.name] += 1
    return found


WHOLE = Counter(f"{name}{lane}" for name in ("request", "infer", "copy") for lane in ("", " [gpu]"))


def is_balanced(account):
    """Tell whether recorded = exported + dropped + lost + pending."""
    fates = account.exported + sum(account.dropped.values()) + sum(account.lost.values()) + account.pending
    return fates == account.recorded


class TestWholeTraces:
    """All rows of a kept trace are exported, and none of another."""

    @pytest.mark.parametrize(("share", "requests"), [(0.0, 3_000), (0.01, 20_000), (0.3, 3_000)])
    def test_all_slow_ones_and_a_share(self, make_bench, share, requests):
        """Of 20,000 requests the 1 % that are slow are all kept, with their GPU spans; of the others a share is."""
        bench = make_bench(keep=f"slower=250ms, share={share}")
        draw, slow = random.Random(5), set()
        for number in range(requests):
            with stage("request"):
                token = gpuscope.here()
                is_slow = draw.random() < 0.01
                with stage("infer"):
                    bench.clock.advance(0.3 if is_slow else 0.01)
                    with stage("copy"):
                        pass
                if is_slow:
                    slow.add(token.trace_id)
            if number % 700 == 0:
                bench.collect()
        kept = by_trace(bench.collect())
        assert all(counts == WHOLE for counts in kept.values())
        assert slow <= set(kept)
        others, expected = len(set(kept) - slow), share * (requests - len(slow))
        assert abs(others - expected) <= 5 * math.sqrt(expected * (1 - share)) + 1e-9
        account = bench.statistics()
        assert account.exported == 3 * len(kept)
        assert account.dropped == {"not_kept": 3 * (requests - len(kept))}
        assert (account.pending, account.lost, account.missing) == (0, {}, {})
        assert account.kept["left_out"] == requests - len(kept)
        assert account.kept["slower"] + account.kept.get("share", 0) == len(kept)
        assert gpuscope.summary().stages[0].calls == requests

    def test_the_share_is_that_of_opentelemetrys_sampler(self, make_bench):
        """By the trace's id alone, so that services with the same share keep the same traces."""
        from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

        bench = make_bench(keep="share=0.25")
        sampler, wanted = TraceIdRatioBased(0.25), set()
        for _ in range(400):
            with stage("request"):
                trace_id = gpuscope.here().trace_id
            if sampler.should_sample(None, trace_id, "").decision.is_sampled():
                wanted.add(trace_id)
        assert set(by_trace(bench.collect())) == wanted
        assert 50 < len(wanted) < 150

    @pytest.mark.parametrize("every", [1, 3])
    def test_a_request_that_is_collected_in_parts(self, make_bench, every):
        """Its stages wait for its end, in whatever batches they come."""
        bench = make_bench(keep="slower=250ms")
        for took_s in (0.01, 0.4):
            with stage("request"):
                for number in range(6):
                    with stage("infer"):
                        bench.clock.advance(took_s / 6)
                    if number % every == 0:
                        assert bench.collect() == []
                        assert is_balanced(bench.statistics())
            spans = bench.collect()
        assert by_trace(spans) == {
            spans[0].trace_id: Counter({"request": 1, "request [gpu]": 1, "infer": 6, "infer [gpu]": 6})
        }
        assert bench.statistics().dropped == {"not_kept": 7}

    def test_nothing_is_decided_before_the_gpu_is_done(self, make_bench):
        """A request is as long as its work on the GPU, also where the host has left it long before."""
        bench = make_bench(keep="slower=250ms", completes=False)
        for took_s in (0.1, 0.3):
            with stage("request"):
                with stage("infer"):
                    pass
                bench.clock.advance(took_s)
            assert bench.collect() == []
        assert bench.statistics().pending == 4
        bench.device.complete()
        assert by_trace(bench.collect()) == {
            bench.spans[0].trace_id: Counter({"request": 1, "request [gpu]": 1, "infer": 1, "infer [gpu]": 1})
        }
        assert bench.statistics().dropped == {"not_kept": 2}

    def test_a_request_waits_for_its_stages_on_other_streams(self, make_bench):
        """Its own work may be done before that of a stage inside, whose GPU span then comes with the rest."""
        bench = make_bench(keep="slower=250ms", completes=False)
        other = SimpleNamespace(device_index=0, cuda_stream=8)
        for took_s in (0.01, 0.3):
            with stage("request"):
                with stage("infer", stream=other):
                    pass
                bench.clock.advance(took_s)
            for event in bench.device.lanes[0, 7].recorded.popleft():
                event.done = True
            assert bench.collect() == []
            with stage("later"):
                pass
        bench.device.complete()
        assert bench.named("infer [gpu]")
        (trace,) = by_trace(bench.collect()).values()
        assert trace == Counter({"request": 1, "request [gpu]": 1, "infer": 1, "infer [gpu]": 1})

    def test_work_that_takes_long_on_the_gpu_is_slow(self, make_bench):
        """The host's part is short; the stage on the other stream is done 300 ms after it."""
        bench = make_bench(keep="slower=250ms", completes=False)
        with stage("request"), stage("infer", stream=SimpleNamespace(device_index=0, cuda_stream=8)):
            pass
        for pair in bench.device.lanes[0, 8].recorded:
            pair[1].time_ns += 300_000_000
        bench.device.complete()
        assert len(bench.collect()) == 4

    def test_what_is_given_up_is_decided_with_host_times(self, make_bench):
        """A GPU that never ends keeps no request waiting for longer than the deadline of its events."""
        bench = make_bench(keep="slower=250ms", completes=False, event_deadline_s=10.0)
        request(bench, 0.4)
        bench.collect()
        bench.clock.advance(11)
        assert len(bench.collect()) == 3
        assert bench.statistics().untimed == {"given_up": 3}

    @pytest.mark.parametrize("rule", ["slower=250ms", "p99"])
    def test_work_that_hangs_on_the_gpu_is_slow(self, make_bench, rule):
        """What was given up had taken so long by then, however short the host's part is, in one part or in several."""
        bench = make_bench(keep=rule, completes=False, event_deadline_s=1.0)
        for _ in range(300):
            request(bench)
        bench.device.complete()
        assert bench.collect() == []
        request(bench)
        with stage("request"):
            with stage("infer", stream=SimpleNamespace(device_index=0, cuda_stream=8)):
                pass
            bench.collect()
        for event in bench.device.lanes[0, 7].recorded.pop():
            event.done = True
        bench.clock.advance(1.1)
        assert len(bench.collect()) == 3 + 3
        account = bench.statistics()
        assert (account.untimed, account.kept["left_out"]) == ({"given_up": 4}, 300)

    def test_what_found_no_room_to_wait_for_the_gpu_is_not_slow(self, make_bench):
        """It was not asked whether its work was done, so nothing is known but the host's part."""
        bench = make_bench(keep="slower=250ms", completes=False, queue_size=16)
        for _ in range(16):
            with stage("request"):
                pass
            bench.collect()
        for _ in range(5):
            with stage("request"):
                pass
            bench.clock.advance(0.5)
        bench.collect()
        assert bench.statistics().untimed == {"too_many_pending": 5}
        assert bench.collect() == []


class TestRules:
    """The rules besides time and share."""

    @pytest.mark.parametrize("where", ["nowhere", "root", "inside", "said"])
    def test_errors(self, make_bench, where):
        """An exception that leaves any stage keeps the trace, and so does a stage that was said to have failed."""
        bench = make_bench(keep="error")
        request(bench)
        try:
            with stage("request"):
                with stage("first"):
                    pass
                bench.collect()
                try:
                    with stage("infer") as inner:
                        if where == "said":
                            inner.set_attribute("error.type", "503")
                        if where == "inside":
                            fail()
                except KeyError:
                    pass
                if where == "root":
                    fail()
        except KeyError:
            pass
        found = {span.name for span in bench.collect()}
        assert found == (
            set()
            if where == "nowhere"
            else {"request", "first", "infer", "request [gpu]", "first [gpu]", "infer [gpu]"}
        )

    def test_errors_are_not_kept_unless_wanted(self, make_bench):
        """Without the rule they are requests as any others."""
        bench = make_bench(keep="slower=10s")
        with pytest.raises(ValueError, match="no"), stage("request"):
            raise ValueError("no")
        assert bench.collect() == []
        assert bench.statistics().dropped == {"not_kept": 1}

    @pytest.mark.parametrize("static", [True, False])
    @pytest.mark.parametrize(
        ("no", "yes"), [(False, True), (0, 1), ("no", "yes"), ("0", "1"), (" Off", "x"), ("", "a")]
    )
    def test_a_stage_may_ask_for_it(self, make_bench, static, no, yes):
        """By the attribute `gpuscope.keep`, of this run or of the stage for good. Words for no are as in headers."""
        bench = make_bench(keep="slower=10s")
        for wanted in (no, yes):
            with stage("request"):
                if static:

                    @stage("ask", attributes={"gpuscope.keep": wanted})
                    def ask():
                        """Do nothing."""

                    ask()
                else:
                    with stage("ask") as asking:
                        asking.set_attribute("gpuscope.keep", wanted)
        (trace,) = by_trace(bench.collect()).values()
        assert trace == Counter({"request": 1, "request [gpu]": 1, "ask": 1, "ask [gpu]": 1})
        assert bench.statistics().kept == {"asked": 1, "left_out": 1}

    def test_the_slowest_of_each_kind(self, make_bench):
        """After 200 requests of a kind those beyond its own p99 are kept, and warm-up is none of them."""
        bench = make_bench(keep="p99", warmup=3)
        with stage("fast"):
            bench.clock.advance(9)  # Warm-up.
        for number in range(400):
            request(bench, 0.010 + number % 7 * 0.001, "fast", "i")
            request(bench, 1.0 + number % 7 * 0.1, "slow", "j")
            if number % 20 == 0:
                bench.collect()
        assert bench.collect() == []
        request(bench, 0.5, "fast", "i")
        request(bench, 0.5, "slow", "j")
        request(bench, 5, "slow", "j")
        roots = [span for span in bench.collect() if span.name in ("fast", "slow")]
        assert [(span.name, round(span.duration_ns / 1e9, 1)) for span in roots] == [("fast", 0.5), ("slow", 5.0)]
        assert bench.statistics().kept["p99"] == 2

    def test_headers_of_what_goes_out_stay_sampled(self, make_bench):
        """Other services cannot know yet whether the trace will be kept."""
        make_bench(keep="slower=10s")
        with stage("request"):
            assert gpuscope.here().traceparent.endswith("-01")

    def test_all_stages_count_in_metrics_and_exemplars_lead_to_kept_traces(self, make_bench):
        """Histograms have every request; an exemplar of a trace that is nowhere would lead nobody anywhere."""
        bench = make_bench(keep="slower=250ms", exporters=())
        pipeline = bench.engine.collector.metrics_pipeline
        added = []
        pipeline.add = lambda batch, finished: added.append(batch)
        for took_s in (0.01, 0.3, 0.02):
            request(bench, took_s)
        bench.collect()
        assert sum(len(batch.site) for batch in added) == 9
        (trace_id,) = by_trace(bench.spans)
        seen = np.concatenate([batch.trace_low[batch.sampled] for batch in added])
        assert set(seen.tolist()) == {trace_id & (1 << 64) - 1}


class TestAfterTheDecision:
    """What ends after its request follows the decision."""

    @pytest.mark.parametrize("took_s", [0.01, 0.4])
    def test_stages_that_end_later(self, make_bench, took_s):
        """A thread that was begun inside goes on after the request's end."""
        bench = make_bench(keep="slower=250ms")
        began, go_on = threading.Event(), threading.Event()

        def work():
            """Run a stage that lasts."""
            with stage("late"):
                began.set()
                go_on.wait(20)

        with stage("request"):
            thread = threading.Thread(target=contextvars.copy_context().run, args=(work,))
            thread.start()
            began.wait(20)
            bench.clock.advance(took_s)
        bench.collect()
        go_on.set()
        thread.join()
        request(bench, 0.9, "another")
        names = {span.name for span in bench.collect()}
        assert "another" in names
        assert ("late" in names) == ("request" in names) == (took_s > 0.25)
        assert is_balanced(bench.statistics())
        assert not bench.statistics().pending

    @pytest.mark.parametrize("is_apart", [True, False])
    @pytest.mark.parametrize("took_s", [0.01, 0.4])
    def test_stages_that_begin_later(self, make_bench, took_s, is_apart):
        """A task that was started inside begins a stage after the request's end, below OpenTelemetry's context."""
        pytest.importorskip("opentelemetry")
        bench = make_bench(keep="slower=250ms")
        bench.engine.recorder.open_bridge()
        with stage("request"):
            inside = contextvars.copy_context()
            bench.clock.advance(took_s)
        if is_apart:
            bench.collect()

        def later():
            """Run a stage."""
            with stage("late"):
                pass

        inside.run(later)
        names = {span.name for span in bench.collect()}
        assert ("late" in names) == ("request" in names) == (took_s > 0.25)
        assert not bench.statistics().pending
        assert bench.statistics().kept == ({"slower": 1} if took_s > 0.25 else {"left_out": 1})

    def test_further_requests_of_a_kept_trace_are_kept(self, make_bench):
        """And those of one that was left out are decided on their own."""
        bench = make_bench(keep="slower=250ms")
        headers = [{"traceparent": f"00-{number:032x}-{number:016x}-01"} for number in (1, 2)]
        for number, took_s in ((0, 0.3), (0, 0.01), (1, 0.01), (1, 0.3), (1, 0.01)):
            with gpuscope.extract(headers[number]):
                request(bench, took_s)
            bench.collect()
        assert {trace: counts["request"] for trace, counts in by_trace(bench.spans).items()} == {1: 2, 2: 2}

    def test_requests_of_one_trace_at_once_are_kept_together(self, make_bench):
        """Whether they come in one batch or the first still waits when the second is decided."""
        bench = make_bench(keep="slower=250ms")
        with gpuscope.extract({"traceparent": f"00-{7:032x}-{7:016x}-01"}):
            request(bench, 0.01, "first")
            request(bench, 0.4, "second")
        assert {span.name for span in bench.collect()} > {"first", "second"}

    def test_one_of_a_trace_that_still_waits_is_kept_with_another(self, make_bench):
        """Its rows so far, and those to come."""
        bench = make_bench(keep="slower=250ms")
        inside, go_on = threading.Event(), threading.Event()

        def work():
            """Run a request of two stages; it ends when told."""
            with gpuscope.extract(headers), stage("waits"):
                with stage("before"):
                    pass
                inside.set()
                go_on.wait(20)

        headers = {"traceparent": f"00-{8 << 64 | 1 << 63:032x}-{8:016x}-01"}
        thread = threading.Thread(target=work)
        thread.start()
        inside.wait(20)
        assert bench.collect() == []
        with gpuscope.extract(headers), stage("slow"):
            bench.clock.advance(0.4)
        assert {span.name for span in bench.collect()} == {"before", "before [gpu]", "slow", "slow [gpu]"}
        go_on.set()
        thread.join()
        assert bench.named("waits")

    @pytest.mark.parametrize("parts", ["one", "two", "the late one first"])
    def test_a_stage_that_outlives_its_request_does_not_make_it_slow(self, make_bench, parts):
        """Whether it comes with the request, before it, or after the decision."""
        bench = make_bench(keep="slower=250ms", completes=False)
        go_on, began = threading.Event(), threading.Event()

        def work():
            """Run a stage that lasts, on another stream."""
            with stage("late", stream=SimpleNamespace(device_index=0, cuda_stream=8)):
                began.set()
                go_on.wait(20)

        with stage("request"):
            thread = threading.Thread(target=contextvars.copy_context().run, args=(work,))
            thread.start()
            began.wait(20)
            with stage("infer"):
                bench.clock.advance(0.01)
        if parts == "two":
            bench.device.complete()
            bench.collect()
        bench.clock.advance(0.4)
        go_on.set()
        thread.join()
        if parts == "the late one first":
            for event in bench.device.lanes[0, 8].recorded.popleft():
                event.done = True
            bench.collect()
        bench.device.complete()
        assert bench.collect() == []
        assert bench.statistics().kept == {"left_out": 1}
        assert bench.statistics().dropped == {"not_kept": 3}


class TestBounds:
    """Memory has a bound, and what finds no room is counted."""

    def test_the_oldest_go_first(self, make_bench):
        """A request whose stages fill the memory before it ends is not kept, whole, and the next one is."""
        bench = make_bench(keep="slower=1h, error, rows=1024")
        with stage("request"):
            for number in range(1500):
                with stage("s"):
                    pass
                if number % 100 == 0:
                    bench.collect()
        bench.collect()
        account = bench.statistics()
        assert account.dropped == {"keep_full": 1501}
        assert account.missing == {"keep_full": 1501}
        assert account.kept == {"no_room": 1}
        with pytest.raises(ValueError, match="no"), stage("request"):
            raise ValueError("no")
        assert len(bench.collect()) == 2

    def test_a_stage_around_everything_is_named_and_errors_in_it_are_kept(self, make_bench, caplog):
        """More room would not help it, so the log says which it is; what fails later is kept, with what follows."""
        bench = make_bench(keep="error, rows=1024")
        with stage("serve"):
            for number in range(1500):
                with stage("fine"):
                    pass
                if number % 100 == 0:
                    bench.collect()
            assert bench.collect() == []
            assert caplog.text.count("The stage 'serve' ran on") == 1
            with pytest.raises(KeyError), stage("bad"):
                fail()
            assert {span.name for span in bench.collect()} == {"bad", "bad [gpu]"}
        assert bench.statistics().kept == {"no_room": 1, "error": 1}
        assert bench.statistics().dropped == {"keep_full": 1500}
        assert is_balanced(bench.statistics())

    def test_requests_with_a_trace_of_their_own_are_no_part_of_a_stage_around_everything(self, make_bench, caplog):
        """As the log advises."""
        bench = make_bench(keep="error, rows=1024")
        with stage("serve"):
            for number in range(1500):
                with gpuscope.extract(gpuscope.Token()), stage("fine"):
                    pass
                if number % 100 == 0:
                    bench.collect()
            bench.collect()
            assert bench.statistics().dropped == {"not_kept": 1500}
        assert "serve" not in caplog.text

    def test_many_requests_at_once_name_no_stage(self, make_bench, caplog):
        """There more room does help."""
        bench = make_bench(keep="error, rows=1024")
        running = [contextvars.copy_context() for _ in range(20)]
        for around in running:
            around.run(stage("request").__enter__)
        for _ in range(15):
            for around in running:
                around.run(lambda: [stage("s").__enter__().__exit__(None, None, None) for _ in range(5)])
            bench.collect()
        assert bench.statistics().dropped.keys() == {"keep_full"}
        assert "ran on" not in caplog.text

    @pytest.mark.parametrize("rule", ["error", "slower=250ms"])
    def test_a_request_whose_outermost_stage_was_refused_does_not_wait_for_ever(self, make_bench, rule):
        """After ten minutes without a row it is left out, or kept where what has come says that it was slow."""
        bench = make_bench(keep=rule, queue_size=16)
        with stage("request"):
            for _ in range(20):
                with stage("s"):
                    bench.clock.advance(0.02)
        bench.collect()
        account = bench.statistics()
        assert (account.pending, account.dropped) == (16, {"queue_full": 5})
        bench.clock.advance(590)
        bench.collect()
        assert bench.statistics().pending == 16
        bench.clock.advance(90)
        found = bench.collect()
        account = bench.statistics()
        assert account.pending == 0
        assert is_balanced(account)
        if rule == "error":
            assert (found, account.kept) == ([], {"no_end": 1})
            assert account.missing == {"queue_full": 5, "keep_no_end": 16}
        else:
            assert (len(found), account.kept) == (32, {"slower": 1})

    def test_a_request_that_goes_on_for_long_waits_for_its_end(self, make_bench):
        """As long as something comes of it now and then."""
        bench = make_bench(keep="error")
        with stage("request") as root:
            for _ in range(10):
                with stage("s"):
                    bench.clock.advance(300)
                bench.collect()
            root.set_attribute("error.type", "503")
        assert len(bench.collect()) == 2 * 11

    def test_what_is_slow_by_then_is_kept(self, make_bench):
        """That a request will be slow is certain before its end."""
        bench = make_bench(keep="slower=250ms, rows=1024")
        with stage("request"):
            bench.clock.advance(0.3)
            for number in range(2000):
                with stage("s"):
                    bench.clock.advance(MS)
                if number % 100 == 0:
                    bench.collect()
        assert len(bench.collect()) == 2 * 2001
        assert bench.statistics().kept == {"slower": 1}

    def test_a_request_that_never_ends_holds_its_own_rows_alone(self, make_bench):
        """Rows of others, that came in the same batches, are let go of."""
        bench = make_bench(keep="slower=1h, rows=1024")
        endless = contextvars.copy_context()
        endless.run(stage("endless").__enter__)

        def run():
            """Run a stage inside."""
            with stage("step"):
                pass

        for _ in range(30):
            for _ in range(10):
                endless.run(run)
                for _ in range(10):
                    contextvars.Context().run(request, bench)
            bench.collect()
        held = bench.engine.collector._onward._keeper._held
        assert held._rows <= 1024
        assert held.waiting_rows == 300
        assert bench.statistics().dropped == {"not_kept": 300 * 30}
        assert bench.statistics().pending == 300

    def test_many_decisions_are_not_remembered_for_ever(self, make_bench):
        """Those of the newest requests are."""
        bench = make_bench(keep="slower=1h")
        decided = bench.engine.collector._onward._keeper._decided
        decided._remembered = 100
        for number in range(1000):
            with stage("request"):
                pass
            if number % 20 == 0:
                bench.collect()
        assert len(decided._newer) + len(decided._older) <= 250

    def test_large_attributes_count_too(self, make_bench):
        """Half of what waits is decided when what stages were told takes half of the room for that."""
        bench = make_bench(keep="slower=1h", queue_bytes=200_000)
        with stage("request"):
            for _ in range(20):
                with stage("s") as inner:
                    inner.set_attribute("text", "x" * 20_000)
                bench.collect()
        bench.collect()
        account = bench.statistics()
        assert set(account.dropped) == {"keep_full"}
        assert is_balanced(account)


class TestTheEnd:
    """Flushes, shutdown, failures."""

    def test_a_flush_decides_what_can_be_decided(self, make_bench):
        """What still runs stays undecided, and pending."""
        with gpuscope.testing.capture(keep="slower=1h") as spans:
            with stage("request", attributes={"gpuscope.keep": True}):
                pass
            with stage("runs", attributes={"gpuscope.keep": True}):
                with stage("inside"):
                    pass
                assert gpuscope.flush()
                assert {span.name for span in spans} == {"request"}
                assert gpuscope.statistics().pending == 1
            assert gpuscope.flush()
            assert {span.name for span in spans} == {"request", "runs", "inside"}

    def test_what_is_undecided_at_the_end_is_exported(self):
        """A request that was cut off is worth seeing; there are few of them."""

        def serve():
            """Run a stage."""
            with stage("cut off"):
                pass

        with gpuscope.testing.capture(keep="slower=1h") as spans:
            with stage("request"):
                pass
            around = contextvars.copy_context()
            around.run(stage("endless").__enter__)
            around.run(serve)
            assert gpuscope.flush()
            assert not spans
        assert {span.name for span in spans} == {"cut off"}

    def test_what_fails_costs_what_waits(self, make_bench, caplog):
        """It is counted as lost, and the next requests are decided as before."""
        bench = make_bench(keep="slower=250ms")
        keeper = bench.engine.collector._onward._keeper
        with stage("request"):
            with stage("inside"):
                pass
            bench.collect()
            keeper.decide, decide = (lambda *_: 1 / 0), keeper.decide
            with stage("another"):
                pass
            bench.collect()
            keeper.decide = decide
        request(bench, 0.4)
        bench.collect()
        account = bench.statistics()
        assert account.lost == {"internal_error": 2}
        assert is_balanced(account)
        assert "making a batch failed: ZeroDivisionError" in caplog.text
        assert bench.named("copy")

    def test_off_costs_nothing(self, bench):
        """Nothing is made, and no row is asked which request it belongs to."""
        collector = bench.engine.collector
        assert collector._onward._keeper is None
        assert collector._intake._requests is None
        assert bench.statistics().kept == {}

    def test_threads(self):
        """Requests on several threads at once are kept whole, each by how it went."""
        with gpuscope.testing.capture(keep="error", interval_s=0.001) as spans:

            def serve(seed):
                """Run requests, of which some fail."""
                draw = random.Random(seed)
                for _ in range(300):
                    try:
                        with stage("request"):
                            with stage("infer"), stage("copy"):
                                pass
                            if draw.random() < 0.05:
                                fail()
                    except KeyError:
                        failed.append(1)

            failed = []
            threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert gpuscope.flush()
            account = gpuscope.statistics()
        assert set(map(frozenset, (counts.items() for counts in by_trace(spans).values()))) == {
            frozenset({"request": 1, "infer": 1, "copy": 1}.items())
        }
        assert len(by_trace(spans)) == len(failed) == account.kept["error"]
        assert account.dropped == {"not_kept": 3 * (1200 - len(failed))}


class TestBatches:
    """Batches that work for several requests."""

    def test_the_light_span_of_a_member_follows_its_request(self, make_bench):
        """Whether the batch comes before the request's end or after its decision."""
        bench = make_bench(keep="slower=250ms")
        tokens = []
        for took_s in (0.01, 0.4):
            with stage("request"):
                tokens.append(gpuscope.here())
                bench.clock.advance(took_s)
                with stage("predict", members=[gpuscope.here()]):
                    pass
                bench.collect()
        bench.collect()
        with stage("batch", members=tokens):
            pass
        spans = bench.collect()
        kept = [span for span in spans if span.name in ("predict (shared)", "batch (shared)")]
        assert [span.trace_id for span in kept] == [tokens[1].trace_id] * 2
        assert bench.statistics().shared_spans == {"not_kept": 2, "exported": 2}

    def test_a_member_elsewhere_goes_with_the_batch(self, make_bench):
        """Its request is not in this process, so that of the batch decides."""
        bench = make_bench(keep="slower=250ms")
        token = gpuscope.Token.from_traceparent(f"00-{9 << 64 | 1 << 63:032x}-{9:016x}-01")
        for took_s in (0.01, 0.4):
            with stage("predict", members=[token]):
                bench.clock.advance(took_s)
            bench.collect()
        assert [span.name for span in bench.collect()].count("predict (shared)") == 1
        assert bench.statistics().shared_spans == {"not_kept": 1, "exported": 1}

    def test_what_nobody_claims_is_left_out_after_a_while(self, make_bench):
        """A member that is a span of the application's has no request here whose end would decide."""
        from opentelemetry import trace

        bench = make_bench(keep="slower=250ms")
        bench.engine.recorder.open_bridge()
        context = trace.SpanContext(77 << 64 | 1 << 63, 5, is_remote=False, trace_flags=trace.TraceFlags(1))
        with trace.use_span(trace.NonRecordingSpan(context)):
            token = gpuscope.here()
        with stage("predict", members=[token]):
            pass
        bench.collect()
        assert bench.statistics().shared_spans == {}
        bench.clock.advance(601)
        bench.collect()
        assert bench.statistics().shared_spans == {"not_kept": 1}


def test_stages_inside_replays_belong_to_the_request_of_the_launch(make_bench):
    """They come as columns, a row per replay and stage."""
    make_bench(keep="error")
    with stage("request") as root, stage("infer") as inner:
        pass
    keys = RequestKeys()
    replays = [SimpleNamespace(outer=inner), SimpleNamespace(outer=root)]
    keys.add_replays(SimpleNamespace(replays=replays, graph=range(3)))
    found, is_root = keys.take()
    assert found.tolist() == [root.span_id] * 6
    assert not is_root.any()


@pytest.mark.skipif(native is None, reason="the parts in C are not in use")
@pytest.mark.parametrize("with_bridge", [False, True])
def test_twins_find_the_same_requests(make_bench, with_bridge):
    """Of stages inside others, of traces from elsewhere, of tasks that go on, and of what was never begun."""
    bench = make_bench(keep="error")
    if with_bridge:
        bench.engine.recorder.open_bridge()
    inside = contextvars.copy_context()
    for headers in ({}, {"traceparent": f"00-{5:032x}-{6:016x}-01"}):
        with gpuscope.extract(headers), stage("request"), stage("infer"):
            inside = contextvars.copy_context()
            with stage("request"), gpuscope.extract({"traceparent": f"00-{7:032x}-{6:016x}-01"}), stage("elsewhere"):
                pass
        contextvars.Context().run(request, bench)
        inside.run(request, bench)
    rows = [(record, 0, 0, 0, 0) for record in bench.engine.queue.waiting]
    assert len(rows) == 20
    keys, roots = keys_in_python(rows)
    assert native.request_keys(rows) == (keys, roots)
    assert sum(roots) == len(set(np.frombuffer(keys, np.uint64).tolist()) - {0})
    assert native.request_keys([]) == keys_in_python([]) == (b"", b"")
    assert native.request_keys([(StageRecord(),)]) == (bytes(8), bytes(1))
    for nonsense in (None, (), [None], [()], [(1, 2)]):
        with pytest.raises(TypeError, match="must be"):
            native.request_keys(nonsense)
