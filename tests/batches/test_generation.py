"""`Generation`: a member of many batches has one light span, with the sums of its steps."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import ScopeSpans

import gpuscope
from gpuscope._collecting.batches.sums import Sums
from gpuscope._data.metrics import OF_GENERATIONS, OF_GENERATIONS_ON_GPU, REQUEST_DURATION
from gpuscope._data.native import native
from gpuscope._recording.batches import members as reading
from gpuscope._recording.batches.account import Faults
from gpuscope._recording.batches.summed import Summed
from gpuscope._recording.state import state
from gpuscope._version import __version__
from gpuscope.analysis.read import read_lines
from gpuscope.exporters._encoding import otlp_bytes
from gpuscope.exporters._encoding import spans as encoded_spans
from gpuscope.exporters._encoding.otlp_bytes import SpanEncoder
from gpuscope.exporters._encoding.otlp_json import JsonEncoder
from gpuscope.testing import capture

from ..keeps_batches import KeepsBatches

SAID = {"gen_ai.operation.name": "text_completion", "gen_ai.request.model": "llama"}
STEP, LIGHT = "step", "step (shared)"


def run_steps(bench, plan):
    """
    Run generations by a plan: for each step, which of them join with how many tokens; return them by their names.

    Each makes a token in each step but those in which its weight is more than 1 and the next one, too: a prompt in
    pieces. A step takes 2 ms, and 3 ms lie between two.
    """
    names = sorted({name for step in plan for name in step})
    with gpuscope.stage("request"):
        made = {name: gpuscope.Generation(attributes={**SAID, "who": name}) for name in names}
    for number, step in enumerate(plan):
        bench.clock.advance(0.003)
        members = [made[name] for name in step]
        for name in step:
            if step[name] == 1 or plan[number + 1].get(name, 0) <= 1:
                made[name].prefilled()
        with gpuscope.stage(STEP, members=members, weights=[*step.values()], basis="tokens"):
            bench.clock.advance(0.002)
        for name in step:
            if made[name].first_step is not None and made[name].first_step < made[name].steps:
                made[name].had_tokens()
            if not any(name in later for later in plan[number + 1 :]):
                made[name].end()
    return made


PLAN = (
    {"a": 5},
    {"a": 1, "b": 6},
    {"a": 1, "b": 3},
    {"b": 1, "c": 2},
    {"b": 1, "c": 1},
)


def of_name(spans, name):
    """Host spans of a name, in order."""
    return [span for span in spans if span.name == name]


def who(spans, light):
    """Which generation a light span is of: that in whose stage it is."""
    return next(span.attributes["who"] for span in spans if span.span_id == light.parent_id)


class TestSums:
    """What the light span of a generation says of all its steps."""

    @pytest.fixture
    def spans(self, make_bench):
        """Spans of the plan, on the fake GPU."""
        bench = make_bench(delay_ns=1_000_000)
        run_steps(bench, PLAN)
        return bench.collect()

    def test_one_light_span_for_all_steps(self, spans):
        """Each generation has one, whose time is that from its first step to its last."""
        steps, light = of_name(spans, STEP), of_name(spans, LIGHT)
        assert {who(spans, span): span.attributes["gpuscope.batch.steps"] for span in light} == {"a": 3, "b": 4, "c": 2}
        for span in light:
            own = [step for step, joined in zip(steps, PLAN, strict=True) if who(spans, span) in joined]
            assert (span.start_ns, span.end_ns) == (own[0].start_ns, own[-1].end_ns)
            assert span.attributes["gpuscope.batch.basis"] == "tokens"
            assert span.links[0][:2] == (own[0].trace_id, own[0].span_id)
            assert span.attributes["gpuscope.batch.size"] == max(len(step) for step in PLAN if who(spans, span) in step)

    def test_shares_of_all_add_up(self, spans):
        """All shares together are all steps' GPU time, to the nanosecond; prefill and decode are the share."""
        on_gpu = [span for span in spans if span.name == f"{STEP} [gpu]"]
        light = of_name(spans, LIGHT)
        shares = [span.attributes["gpuscope.gpu.share"] for span in light]
        assert sum(shares) == sum(span.end_ns - span.start_ns for span in on_gpu)
        for span in light:
            said = span.attributes
            parts = said["gpuscope.gpu.share.prefill"], said["gpuscope.gpu.share.decode"]
            assert sum(parts) == said["gpuscope.gpu.share"]
            assert all(part > 0 for part in parts)

    def test_a_prompt_in_pieces_is_prefill(self, spans):
        """Steps up to the first token count as prefill, by their weights."""
        took = {span.parent_id: span.end_ns - span.start_ns for span in spans if span.name == f"{STEP} [gpu]"}
        steps = [took[step.span_id] for step in of_name(spans, STEP)]
        found = {who(spans, span): span.attributes for span in of_name(spans, LIGHT)}
        assert found["a"]["gpuscope.gpu.share.prefill"] == steps[0]
        assert found["b"]["gpuscope.gpu.share.prefill"] == pytest.approx(steps[1] * 6 / 7 + steps[2] * 3 / 4, abs=2)
        assert found["c"]["gpuscope.gpu.share.decode"] == pytest.approx(steps[4] / 2, abs=2)

    def test_waits_are_summed(self, spans):
        """The wait is all the time from the token on in which it was in no step."""
        found = {who(spans, span): span.attributes["gpuscope.batch.wait"] for span in of_name(spans, LIGHT)}
        assert found == pytest.approx({"a": 0.009, "b": 0.003 * 5 + 0.002, "c": 0.003 * 5 + 0.002 * 3}, abs=1e-6)

    def test_time_to_first_token_on_both_clocks(self, spans):
        """The host's is until `had_tokens`, the GPU's until the step that makes it is done there."""
        generations = {span.attributes["who"]: span for span in of_name(spans, "generate")}
        steps = of_name(spans, STEP)
        done = {span.parent_id: span.end_ns for span in spans if span.name == f"{STEP} [gpu]"}
        for span in of_name(spans, LIGHT):
            name = who(spans, span)
            first, last = {"a": (0, 2), "b": (2, 4), "c": (3, 4)}[name]
            start_ns, tokens = generations[name].start_ns, last - first + 1
            said = generations[name].attributes
            assert said["gen_ai.usage.output_tokens"] == tokens
            host = said["gen_ai.server.time_to_first_token"], said["gen_ai.server.time_per_output_token"]
            assert host == pytest.approx(((steps[first].end_ns - start_ns) / 1e9, 0.005), abs=1e-6)
            gpu = [span.attributes[f"gpuscope.gpu.time_{which}_token"] for which in ("to_first", "per_output")]
            first_ns, last_ns = done[steps[first].span_id], done[steps[last].span_id]
            expected = (first_ns - start_ns) / 1e9, (last_ns - first_ns) / 1e9 / (tokens - 1)
            assert gpu == pytest.approx(expected, abs=1e-6)

    def test_without_a_gpu_there_is_no_share(self):
        """What rests on GPU times is left out."""
        with capture() as spans:
            generation = gpuscope.Generation()
            for _ in range(2):
                with gpuscope.stage(STEP, members=[generation]):
                    pass
                generation.had_tokens()
            generation.end()
        (light,) = of_name(spans, LIGHT)
        assert light.attributes["gpuscope.batch.steps"] == 2
        assert not [name for name in light.attributes if name.startswith("gpuscope.gpu.")]


class TestStage:
    """A generation is a stage, which nothing of the caller's is inside."""

    def test_it_does_not_become_current(self):
        """Two generations and a stage that begin one after the other are all children of the same stage."""
        with capture() as spans, gpuscope.stage("request"):
            made = [gpuscope.Generation(), gpuscope.Generation()]
            with gpuscope.stage("other"):
                pass
            for each in made:
                each.end()
        (request,) = of_name(spans, "request")
        assert {span.parent_id for span in spans if span is not request} == {request.span_id}

    def test_another_thread_ends_it(self):
        """It ends where `end` is called, with the error that is given, once."""
        with capture() as spans:
            generation = gpuscope.Generation(attributes=SAID)

            def fail():
                generation.end(ValueError("no room"))
                generation.end()

            thread = threading.Thread(target=fail)
            thread.start()
            thread.join()
            with gpuscope.stage("next"):
                pass
        (span,) = of_name(spans, "generate")
        assert (span.status, span.attributes["error.type"]) == ("ERROR", "ValueError")
        assert not of_name(spans, "next")[0].parent_id

    def test_it_is_copied_as_itself_and_not_pickled(self):
        """Copies are the same generation; another process gets its token."""
        with capture():
            generation = gpuscope.Generation()
            assert copy.deepcopy([generation])[0] is copy.copy(generation) is generation
            assert pickle.loads(pickle.dumps(generation.token)) == generation.token
            with pytest.raises(TypeError, match="send its `token`"):
                pickle.dumps(generation)
            generation.end()

    def test_off_it_does_nothing(self):
        """While nothing is recorded, its methods do nothing."""
        gpuscope.disable()
        generation = gpuscope.Generation(attributes=SAID)
        with gpuscope.stage(STEP, members=[generation]):
            generation.prefilled()
            generation.had_tokens(2)
            generation.set_attribute("a", 1)
        generation.end()
        assert not generation.token


class TestMembers:
    """Generations beside tokens, and what goes wrong."""

    def test_among_tokens(self, make_bench):
        """A token has a light span per batch, beside a generation, which has one for both."""
        bench = make_bench()
        with gpuscope.stage("request"):
            token, generation = gpuscope.here(), gpuscope.Generation()
        for _ in range(2):
            with gpuscope.stage(STEP, members=[token, generation]):
                bench.clock.advance(0.001)
        generation.end()
        light = of_name(bench.collect(), LIGHT)
        assert sorted(span.attributes.get("gpuscope.batch.steps", 0) for span in light) == [0, 0, 2]

    def test_twice_in_a_batch(self, make_bench):
        """It counts once, and is complete all the same; the fault is counted."""
        bench = make_bench()
        generation = gpuscope.Generation()
        with gpuscope.stage(STEP, members=[generation, generation]):
            pass
        generation.end()
        (light,) = of_name(bench.collect(), LIGHT)
        assert light.attributes["gpuscope.batch.steps"] == 1
        assert gpuscope.statistics().batch_faults == {"twice": 1}

    def test_what_has_ended_joins_as_its_token(self, make_bench):
        """A batch after the end is as for any token: with a light span of its own."""
        bench = make_bench()
        generation = gpuscope.Generation()
        generation.end()
        with gpuscope.stage(STEP, members=[generation]):
            pass
        (light,) = of_name(bench.collect(), LIGHT)
        assert "gpuscope.batch.steps" not in light.attributes

    def test_it_may_be_collected_before_it_ends(self, make_bench):
        """Steps that are exported while it goes on count all the same; without an end there is no light span."""
        bench = make_bench()
        generation, other = gpuscope.Generation(), gpuscope.Generation()
        for _ in range(3):
            with gpuscope.stage(STEP, members=[generation, other]):
                pass
            assert not of_name(bench.collect(), LIGHT)
        generation.had_tokens()
        generation.end()
        (light,) = of_name(bench.collect(), LIGHT)
        assert light.attributes["gpuscope.batch.steps"] == 3

    def test_links_alone(self, make_bench):
        """With `batch_spans="links"` there is no light span, and metrics count it."""
        bench = make_bench(batch_spans="links")
        run_steps(bench, PLAN)
        assert not of_name(bench.collect(), LIGHT)
        points = bench.engine.collector.metrics_pipeline.snapshot().points
        assert sum(points[REQUEST_DURATION][0].value.counts) == 3

    def test_what_has_not_ended_is_counted_as_lost(self):
        """At the end of recording, a generation that goes on has no light span, which is counted."""
        with capture():
            generation = gpuscope.Generation()
            with gpuscope.stage(STEP, members=[generation]):
                pass
            assert gpuscope.flush()
            engine = state.engine
        assert engine.statistics().shared_spans == {"shutdown": 1}

    def test_a_lost_step(self):
        """What ended and has lost a step is let go after the patience, with the fault counted."""
        now, faults = [0], Faults()
        sums, summed = Sums(faults, lambda: now[0], 10), Summed(gpuscope.Token(), SAID)
        summed.steps, summed.ended = 2, True
        sums._open[id(summed)] = one = type("One", (), {})()
        one.summed, one.seen, one.overdue_ns = summed, 1, 0
        assert not sums._is_whole(one)
        now[0] = 10
        assert sums._is_whole(one)
        assert faults.counts() == {"missing_steps": 1}


def test_metrics(make_bench):
    """Each generation is a request of a model server: by the host's clock and by the GPU's, as its spans say."""
    bench = make_bench()
    run_steps(bench, PLAN)
    spans = bench.collect()
    points = bench.engine.collector.metrics_pipeline.snapshot().points
    on_host, on_gpu = of_name(spans, "generate"), of_name(spans, LIGHT)
    for specs, some in ((OF_GENERATIONS[1:], on_host), (OF_GENERATIONS_ON_GPU, on_gpu)):
        for spec in specs:
            (point,) = points[spec]
            assert point.attributes == SAID
            assert point.value.sum_s == pytest.approx(sum(span.attributes[spec.name] for span in some))
    (point,) = points[REQUEST_DURATION]
    started_ns = of_name(spans, "generate")[0].start_ns
    ends = [span.end_ns for span in spans if span.name == f"{LIGHT} [gpu]"]
    assert point.value.sum_s == pytest.approx(sum(end_ns - started_ns for end_ns in ends) / 1e9)


@pytest.mark.parametrize("twins", [False, True])
def test_it_arrives_by_every_way(make_bench, monkeypatch, twins):
    """Protobuf and a file have what the memory has, of steps as of light spans."""
    if twins:
        monkeypatch.setattr(otlp_bytes, "native", None)
        monkeypatch.setattr(encoded_spans, "native", None)
    keeps = KeepsBatches()
    bench = make_bench(exporters=(keeps,), delay_ns=1_000_000)
    run_steps(bench, PLAN)
    expected = {span.span_id: span for span in bench.collect()}
    encoder = SpanEncoder()
    decoded = [span for batch in keeps.batches for span in ScopeSpans.FromString(encoder.encode(batch)).spans]
    assert len(decoded) == len(expected)
    for span in decoded:
        known = expected[int.from_bytes(span.span_id, "big")]
        assert (span.name, span.start_time_unix_nano, span.end_time_unix_nano) == (
            known.name,
            known.start_ns,
            known.end_ns,
        )
        said = {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}
        assert said == known.attributes
    lines = JsonEncoder({"service.name": "tests"}, __version__)
    recording = read_lines([lines.encode(batch) for batch in keeps.batches])
    shares = recording.batches.shares
    light = of_name(expected.values(), LIGHT)
    assert sorted(shares.steps.tolist()) == [2, 3, 4]
    assert sorted(shares.share_ns.tolist()) == sorted(span.attributes["gpuscope.gpu.share"] for span in light)
    assert len(recording.batches.links.batch) == sum(map(len, PLAN))


TWINS = {"Python": (reading._tokens_of_in_python, reading._joined_in_python)}
if native is not None:
    TWINS["C"] = native.tokens_of, native.joined


@pytest.mark.parametrize("twin", TWINS)
def test_what_joins_a_batch(twin):
    """Each that has not ended joins once, whatever else is there; a batch of others has no steps."""
    tokens_of, joined = TWINS[twin]
    with capture(), gpuscope.stage("request"):
        token, ended, *others = gpuscope.here(), *(gpuscope.Generation() for _ in range(3))
        ended.end()
    first, second = others
    assert tokens_of((first, ended, second)) == (first.token, ended.token, second.token)
    assert tokens_of((first, token)) is tokens_of((first, None)) is None
    assert tokens_of(()) == ()
    assert joined((first, second, first, ended, token, None)) == (0, 0, None, None, None, None)
    assert joined((second,)) == (1,)
    assert joined((first, second)) == (1, 2)
    assert (first.steps, second.steps, ended.steps) == (2, 3, 0)
    assert joined((ended, token)) is joined(()) is None
