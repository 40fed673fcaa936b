"""A batch belongs to all its members: links, light spans, shares and waits; and faults in what it was told."""

from __future__ import annotations

import asyncio
import copy
import math
import pickle
import threading

import pytest

import gpuscope
from gpuscope._data.plain.values import shown
from gpuscope.testing import FakeDevice, ManualClock, capture

SHARED = "gpuscope.batch.shared"


def requests(count):
    """Run so many requests, one after another, and return their tokens."""
    tokens = []
    for _ in range(count):
        with gpuscope.stage("request"):
            tokens.append(gpuscope.here())
    return tokens


def remote(number, *, sampled=True):
    """Return the token of a span of another process."""
    return gpuscope.Token.from_traceparent(f"00-{number:032x}-{number:016x}-{sampled:02x}")


def hosts(spans, name):
    """Return the host spans of this name."""
    return [span for span in spans if span.name == name and span.kind == "host"]


def test_a_batch_is_linked_with_each_of_its_members(bench):
    """It links to each member's span, and the light span below that links back; times and GPU are the batch's."""
    tokens = requests(3)
    with gpuscope.stage("predict", members=tokens) as batch:
        batch.set_attribute("model", "vit")
    spans = bench.collect()
    (stage,) = hosts(spans, "predict")
    (gpu,) = (span for span in spans if span.name == "predict [gpu]")
    assert [(trace, span) for trace, span, _ in stage.links] == [(token.trace_id, token.span_id) for token in tokens]
    assert (stage.attributes["gpuscope.batch.size"], stage.attributes["gpuscope.batch.basis"]) == (3, "equal")
    assert stage.attributes["model"] == "vit"
    light = hosts(spans, "predict (shared)")
    assert [(span.trace_id, span.parent_id) for span in light] == [(token.trace_id, token.span_id) for token in tokens]
    for place, span in enumerate(light):
        assert (span.start_ns, span.end_ns) == (stage.start_ns, stage.end_ns)
        assert span.links == ((stage.trace_id, stage.span_id, {}),)
        assert span.attributes[SHARED] is True
        assert span.attributes["gpuscope.batch.position"] == place
        assert span.attributes["gpuscope.batch.size"] == 3
        assert "model" not in span.attributes
    below = [span for span in spans if span.name == "predict (shared) [gpu]"]
    assert [span.parent_id for span in below] == [span.span_id for span in light]
    assert {(span.start_ns, span.end_ns, span.attributes[SHARED]) for span in below} == {
        (gpu.start_ns, gpu.end_ns, True)
    }
    assert sum(span.attributes["gpuscope.gpu.share"] for span in light) == gpu.duration_ns
    assert len({span.span_id for span in spans}) == len(spans)


def test_waits_are_from_the_token_to_the_beginning(bench):
    """In seconds, on one clock."""
    first = requests(1)
    bench.clock.advance(0.25)
    second = requests(1)
    bench.clock.advance(0.5)
    with gpuscope.stage("predict", members=first + second):
        bench.clock.advance(3)
    waits = [span.attributes["gpuscope.batch.wait"] for span in hosts(bench.collect(), "predict (shared)")]
    assert waits == pytest.approx([0.75, 0.5], abs=1e-6)


def test_gpu_time_is_allotted_by_weight(bench):
    """Whole nanoseconds, which add up to those of the batch, and the basis says by what."""
    tokens = requests(3)
    with gpuscope.stage("predict", members=tokens, weights=[1, 2.5, 0], basis="tokens"):
        bench.clock.advance(0.001)
    spans = bench.collect()
    (gpu,) = (span for span in spans if span.name == "predict [gpu]")
    light = hosts(spans, "predict (shared)")
    shares = [span.attributes["gpuscope.gpu.share"] for span in light]
    assert sum(shares) == gpu.duration_ns
    assert shares[1] == pytest.approx(gpu.duration_ns * 2.5 / 3.5, abs=1)
    assert shares[2] == 0
    assert {type(share) for share in shares} == {int}
    assert {span.attributes["gpuscope.batch.basis"] for span in light} == {"tokens"}


def test_without_a_gpu_there_are_no_shares():
    """Nothing was measured, so nothing is allotted."""
    with capture() as spans:
        tokens = requests(2)
        with gpuscope.stage("predict", members=tokens):
            pass
    light = hosts(spans, "predict (shared)")
    assert len(light) == 2
    assert not any("gpuscope.gpu.share" in span.attributes for span in light)


def test_a_member_that_is_not_sampled_gets_nothing(bench):
    """Neither a link nor a span, and its share is nobody else's."""
    tokens = [remote(1), remote(2, sampled=False), remote(3)]
    with gpuscope.stage("predict", members=tokens):
        bench.clock.advance(0.01)
    spans = bench.collect()
    (stage,) = hosts(spans, "predict")
    assert [trace for trace, _, _ in stage.links] == [1, 3]
    assert stage.attributes["gpuscope.batch.size"] == 3
    light = hosts(spans, "predict (shared)")
    assert [span.attributes["gpuscope.batch.position"] for span in light] == [0, 2]
    (gpu,) = (span for span in spans if span.name == "predict [gpu]")
    assert sum(span.attributes["gpuscope.gpu.share"] for span in light) <= gpu.duration_ns * 2 // 3 + 2


@pytest.mark.parametrize("sampler", ["always_off", "parentbased_always_off"])
def test_a_batch_is_kept_if_a_member_is(make_bench, sampler):
    """Also what is inside it, although the sampler would keep neither."""
    bench = make_bench(sampler=sampler)
    for sampled in (False, True):
        with gpuscope.stage("predict", members=[remote(1, sampled=False), remote(2, sampled=sampled)]):
            with gpuscope.stage("forward"):
                pass
            bench.collect()
    names = [span.name for span in bench.collect() if span.kind == "host"]
    assert sorted(names) == ["forward", "predict", "predict (shared)"]
    assert bench.statistics().dropped["unsampled"] == 2


def test_a_batch_of_running_members_takes_their_decision(make_bench):
    """A member's own trace may be undecided when its batch is over."""
    bench = make_bench(sampler="traceidratio", sampler_ratio=0.0)
    with gpuscope.stage("request"):
        with gpuscope.stage("predict", members=[gpuscope.here()]):
            pass
        assert bench.collect() == []
    assert bench.collect() == []


@pytest.mark.parametrize("sampled", [True, False])
def test_a_running_member_of_another_processs_trace_is_settled(bench, sampled):
    """Its stage has a parent elsewhere, whose decision holds, and has not ended when the batch is resolved."""
    headers = {"traceparent": f"00-{5:032x}-{6:016x}-{sampled:02x}", "tracestate": "vendor=a"}
    with gpuscope.extract(headers), gpuscope.stage("request"):
        token = gpuscope.here()
        with gpuscope.stage("predict", members=[token, remote(7)]):
            pass
        light = hosts(bench.collect(), "predict (shared)")
    assert [span.trace_id for span in light] == ([5, 7] if sampled else [7])
    assert light[0].parent_id == (token.span_id if sampled else 7)
    assert bench.statistics().batch_faults == {}


def test_tokens_of_nothing_count_and_get_nothing(bench):
    """Somebody waited for the batch, and nobody knows where."""
    tokens = [gpuscope.Token(), *requests(1)]
    with gpuscope.stage("predict", members=tokens):
        pass
    (light,) = hosts(bench.collect(), "predict (shared)")
    assert (light.attributes["gpuscope.batch.size"], light.attributes["gpuscope.batch.position"]) == (2, 1)


def test_links_alone_are_written_if_that_is_wanted(make_bench):
    """`GPUSCOPE_BATCH_SPANS=links`."""
    bench = make_bench(batch_spans="links")
    tokens = requests(2)
    with gpuscope.stage("predict", members=tokens):
        pass
    spans = bench.collect()
    assert len(hosts(spans, "predict")[0].links) == 2
    assert hosts(spans, "predict (shared)") == []


def test_a_batch_that_fails_fails_in_each_trace(bench):
    """The members' traces show the status and the type; the exception itself is with the batch."""
    tokens = requests(2)
    with pytest.raises(KeyError), gpuscope.stage("predict", members=tokens):
        raise KeyError("lost")
    spans = bench.collect()
    for span in hosts(spans, "predict (shared)"):
        assert (span.status, span.attributes["error.type"], span.events) == ("ERROR", "KeyError", ())
        assert span.description == hosts(spans, "predict")[0].description


def test_light_spans_are_no_stages(bench):
    """Account, summary and totals count the batch once; the light spans have an account of their own."""
    tokens = requests(4)
    with gpuscope.stage("predict", members=tokens):
        pass
    bench.collect()
    found = bench.statistics()
    assert (found.recorded, found.exported) == (5, 5)
    assert found.shared_spans == {"exported": 4}
    assert "shared spans exported 4" in str(found)
    assert "shared" not in str(gpuscope.summary())


def test_light_spans_that_fail_to_go_out_are_counted_apart(make_bench):
    """An exporter that fails loses them by reason, and no stage more."""

    class Fails:
        name = "fails"

        def export(self, batch, delivery):
            delivery.settle(0, {"broken": delivery.stages})

        def flush(self, timeout_s):
            return True

        def shutdown(self, timeout_s):
            pass

    bench = make_bench()
    bench.engine.collector.active_exporters._active = [Fails()]
    with gpuscope.stage("predict", members=[remote(1), remote(2)]):
        pass
    bench.collect()
    found = bench.statistics()
    assert (found.recorded, found.lost) == (1, {"broken": 1})
    assert found.shared_spans == {"broken": 2}


def test_a_block_is_a_batch_each_time_that_it_is_entered(bench):
    """The members are read anew, also by an entry inside an entry."""
    members = requests(1)
    block = gpuscope.stage("predict", members=members)
    with block:
        members += requests(1)
        with block:
            pass
    spans = hosts(bench.collect(), "predict")
    assert sorted(len(span.links) for span in spans) == [1, 2]


def test_copies_and_pickles_of_a_block_are_batches_too(bench):
    """What was said of it goes along; the tokens are settled by that."""
    tokens = requests(2)
    block = gpuscope.stage("predict", members=tokens, weights=[1, 3], basis="rows")
    for again in (copy.copy(block), pickle.loads(pickle.dumps(block))):
        with again:
            pass
    stages = hosts(bench.collect(), "predict")
    assert [span.attributes["gpuscope.batch.basis"] for span in stages] == ["rows", "rows"]
    for span in stages:
        assert span.links == tuple((token.trace_id, token.span_id, {}) for token in tokens)


class Request:
    """As a server has it."""

    def __init__(self, token, rows=1):
        self.token, self.rows = token, rows


def counted(rows):
    """As it is before it is decorated."""
    return len(rows)


def make_forms():
    """Return functions that are decorated in each way, while recording is on or may be."""

    class Model:
        @gpuscope.stage("method", members="batch", key="token")
        def method(self, batch):
            return len(batch)

        @gpuscope.stage("static", members="batch", key=lambda each: each.token)
        @staticmethod
        def static(batch):
            return len(batch)

        @classmethod
        @gpuscope.stage("class", members="batch['requests']", key="token")
        def of_class(cls, batch):
            return len(batch["requests"])

    @gpuscope.stage("async", members="batch", key="token")
    async def coroutine(batch, *, extra=1):
        """Return the size, after a pause."""
        await asyncio.sleep(0)
        return len(batch)

    model = Model()
    return {
        "method": model.method,
        "static": model.static,
        "class": lambda batch: model.of_class({"requests": batch}),
        "async": lambda batch: asyncio.run(coroutine(batch)),
        "functions": gpuscope.stage(
            "functions", members=lambda rows: [each.token for each in rows], weights=lambda rows: [1] * len(rows)
        )(counted),
        "object": lambda batch: gpuscope.stage("object", members="rows", key="t")(counted)(
            [{"t": each.token} for each in batch]
        ),
    }


@pytest.mark.parametrize("form", ["method", "static", "class", "async", "functions", "object"])
def test_a_decorated_function_reads_its_arguments(bench, form):
    """By a function, an expression, and a key; of each kind of function that has a call."""
    batch = [Request(token) for token in requests(3)]
    assert make_forms()[form](batch) == 3
    (stage,) = hosts(bench.collect(), form)
    assert [span for _, span, _ in stage.links] == [each.token.span_id for each in batch]


def test_a_decorated_function_is_a_batch_once_recording_is_on(make_bench, monkeypatch):
    """As idle, it calls nothing of the members."""
    monkeypatch.setattr(gpuscope._runtime.state, "may_toggle", True)
    asked = []

    @gpuscope.stage("later", members=lambda batch: asked.append(1) or batch)
    def function(batch):
        return len(batch)

    block = gpuscope.stage("block", members=[])
    with block:
        assert function([]) == 0
    assert asked == []
    bench = make_bench()
    assert function(requests(2)) == 2
    assert len(hosts(bench.collect(), "later")[0].links) == 2


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"members": gpuscope.Token()}, TypeError),
        ({"members": 5}, TypeError),
        ({"members": [], "weights": 5}, TypeError),
        ({"weights": [1]}, TypeError),
        ({"basis": "tokens"}, TypeError),
        ({"members": [], "basis": "tokens"}, TypeError),
        ({"members": [], "weights": [], "basis": " "}, TypeError),
        ({"members": [], "key": 5}, TypeError),
        ({"members": "1 +"}, ValueError),
    ],
)
@pytest.mark.parametrize("on", [True, False])
def test_misuse_is_refused_whether_recording_is_on_or_off(make_bench, arguments, error, on):
    """A program does not fail on the day when recording is switched on."""
    if on:
        make_bench()
    with pytest.raises(error):
        gpuscope.stage("predict", **arguments)


@pytest.mark.parametrize("members", [[1], lambda *_: [], "nosuch"])
def test_what_cannot_be_read_by_call_is_refused_at_decoration(bench, members):
    """A fixed list for a function, an expression of no parameter; and what has no single call."""

    def function(batch):
        return batch

    def generator(batch):
        yield batch

    if callable(members):
        for target in (generator, print):
            with pytest.raises(TypeError):
                gpuscope.stage("s", members=members)(target)
    else:
        with pytest.raises((TypeError, ValueError)):
            gpuscope.stage("s", members=members)(function)


FAULTS = {
    "no_members": lambda tokens: {"members": []},
    "not_tokens": lambda tokens: {"members": [*tokens, None]},
    "twice": lambda tokens: {"members": [*tokens, pickle.loads(pickle.dumps(tokens[0]))]},
    "weights_length": lambda tokens: {"members": tokens, "weights": [1]},
    "weights": lambda tokens: {"members": tokens, "weights": [1, -1, 2]},
    "unreadable": lambda tokens: {"members": tokens, "key": "nosuch"},
}
MORE_WEIGHTS = ([math.nan, 1, 1], [math.inf, 1, 1], [0, 0, 0], ["1", 1, 1], [None, 1, 1])


@pytest.mark.parametrize("reason", FAULTS)
def test_a_fault_is_counted_and_the_stage_runs(make_bench, reason, caplog):
    """In production: one line in the log for each kind, weights are equal, and every request has its part once."""
    bench = make_bench()
    tokens = requests(3)
    for _ in range(2):
        with gpuscope.stage("predict", **FAULTS[reason](tokens)):
            bench.clock.advance(0.01)
    spans = bench.collect()
    assert len(hosts(spans, "predict")) == 2
    assert bench.statistics().batch_faults == {reason: 2}
    bench.collect()  # What was found by the collector itself is said in its next pass.
    assert sum("predict" in record.message for record in caplog.records) == 1, caplog.text
    light = hosts(spans, "predict (shared)")
    assert len(light) == (0 if reason in ("no_members", "unreadable") else 6)
    assert all(span.attributes["gpuscope.batch.basis"] == "equal" for span in light)
    gpu = [span.duration_ns for span in spans if span.name == "predict [gpu]"]
    if light and reason != "not_tokens":
        assert sum(span.attributes["gpuscope.gpu.share"] for span in light) == sum(gpu)
    assert bench.statistics().recorded == bench.statistics().exported == 5


@pytest.mark.parametrize("weights", MORE_WEIGHTS)
def test_weights_that_mean_nothing_are_equal(bench, weights):
    """Not a number, infinite, all zero, or no numbers at all."""
    with gpuscope.stage("predict", members=requests(3), weights=weights):
        bench.clock.advance(0.01)
    light = hosts(bench.collect(), "predict (shared)")
    assert {span.attributes["gpuscope.batch.basis"] for span in light} == {"equal"}
    assert bench.statistics().batch_faults == {"weights": 1}


@pytest.mark.parametrize("reason", FAULTS)
def test_a_fault_is_raised_in_tests(reason):
    """`capture` is strict: a clear error as the batch begins, and nothing has begun."""
    with capture() as spans:
        tokens = requests(3)
        with pytest.raises((ValueError, AttributeError)), gpuscope.stage("predict", **FAULTS[reason](tokens)):
            pass
        with gpuscope.stage("next"):
            assert gpuscope.here()
    assert [span.name for span in spans] == ["request"] * 3 + ["next"]
    assert spans[-1].parent_id == 0


@pytest.mark.parametrize("weights", MORE_WEIGHTS)
def test_wrong_weights_are_raised_in_tests(weights):
    """With what was seen and where."""
    with capture():
        tokens = requests(3)
        with (
            pytest.raises(ValueError, match="weights of the batch"),
            gpuscope.stage("predict", members=tokens, weights=weights),
        ):
            pass


def test_strictness_is_a_setting(make_bench):
    """`GPUSCOPE_STRICT=1` raises outside of tests as well, also in a decorated function."""
    make_bench(strict=True)
    with pytest.raises(ValueError, match="no members"), gpuscope.stage("predict", members=[]):
        pass
    with pytest.raises(ValueError, match="no members"):
        gpuscope.stage("predict", members="batch")(lambda batch: batch)([])
    with pytest.raises(ValueError, match="decorated function"), gpuscope.stage("predict", members="batch"):
        pass


def test_a_thousand_members_are_none_too_many(bench):
    """Each has its link and its span, once."""
    tokens = [remote(number) for number in range(1, 1001)]
    with gpuscope.stage("predict", members=tokens):
        bench.clock.advance(0.01)
    spans = bench.collect()
    assert len(hosts(spans, "predict")[0].links) == 1000
    light = hosts(spans, "predict (shared)")
    assert [span.trace_id for span in light] == list(range(1, 1001))
    (gpu,) = (span for span in spans if span.name == "predict [gpu]")
    assert sum(span.attributes["gpuscope.gpu.share"] for span in light) == gpu.duration_ns


def test_members_that_find_no_room_drop_the_stage(make_bench):
    """What waits is bounded by `GPUSCOPE_QUEUE_BYTES`, as attributes are."""
    bench = make_bench(queue_bytes=65_536)
    tokens = requests(1)
    for _ in range(2):
        with gpuscope.stage("predict", members=tokens * 900):
            pass
    bench.collect()
    assert bench.statistics().dropped["queue_bytes"] == 1


def test_members_of_another_recording_are_linked_as_well(make_bench):
    """A token may outlive the period of recording that it is of."""
    first = make_bench()
    (token,) = requests(1)
    first.collect()
    first.engine.shutdown(1)
    bench = make_bench()
    with gpuscope.stage("predict", members=[token]):
        pass
    (light,) = hosts(bench.collect(), "predict (shared)")
    assert light.parent_id == token.span_id


def test_a_batch_lets_go_of_its_members_once_they_are_looked_at(bench):
    """A server whose batches start the next requests inside them would else hold all earlier ones."""
    with gpuscope.stage("predict", members=requests(2)) as batch:
        assert len(batch.members.tokens) == 2
    bench.collect()
    assert batch.members is None


def test_batches_of_many_threads_do_not_mix(bench):
    """Each thread enters the same block with members of its own."""
    block = gpuscope.stage("predict", members=[remote(1)])

    def work():
        for _ in range(20):
            with block, gpuscope.stage("forward"):
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {len(span.links) for span in hosts(bench.collect(), "predict")} == {1}
    assert bench.statistics().shared_spans == {"exported": 80}


def test_reports_leave_light_spans_out():
    """They repeat the times of the batch's stage: in a recording they are neither stages nor malformed."""
    clock = ManualClock()
    with capture(device=FakeDevice(clock), clock=clock) as spans:
        tokens = requests(2)
        with gpuscope.stage("predict", members=tokens):
            clock.advance(0.01)
    recording = spans.recording()
    assert recording.names == ("request", "predict")
    assert len(recording.stage) == 3
    assert not any(recording.losses.skipped_lines.values())
    assert recording.losses.orphans == 0
    assert shown(recording.attributes) == "{}"
