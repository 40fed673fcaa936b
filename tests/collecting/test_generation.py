"""Generations as OpenTelemetry's metrics of model servers: what counts as one, and which times are told."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import opentelemetry.metrics._internal as otel_metrics
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from gpuscope import stage
from gpuscope._collecting.aggregation.generation import _MAX_KINDS, _MAX_WAITING, Generation
from gpuscope._collecting.aggregation.summary import OTHER
from gpuscope._data.batch import RowFlag, SpanDetails
from gpuscope._data.metrics import (
    GPU_TIME_TO_FIRST_TOKEN,
    OF_GENERATIONS,
    OF_GENERATIONS_ON_GPU,
    REQUEST_DURATION,
    TIME_PER_OUTPUT_TOKEN,
    TIME_TO_FIRST_TOKEN,
)
from gpuscope._data.record import ExceptionInfo, Site

from ..exporters.batches import NOW_NS, Row, make_batch
from ..exporters.receiver import Receiver

SECOND_NS = 1_000_000_000
GENERATE, PREFILL = Site("generate", {}), Site("prefill", {})
SAID = {
    "gen_ai.operation.name": "text_completion",
    "gen_ai.provider.name": "transformers",
    "gen_ai.request.model": "gpt2",
}


CLOCKS = (TIME_TO_FIRST_TOKEN, TIME_PER_OUTPUT_TOKEN, *OF_GENERATIONS_ON_GPU)


def ms(number):
    """So many milliseconds, in nanoseconds."""
    return number * 1_000_000


def generate(span_id=1, *, said=None, error=None, **facts):
    """The row of a request that takes 100 ms on the host."""
    details = SpanDetails(attributes={**SAID, "new_tokens": 5, **(said or {})}, error=error)
    return Row(GENERATE, span_id=span_id, host_ns=ms(100), details=details, **facts)


def prefill(parent_id=1, **facts):
    """The row of its prefill: 10 ms on the host, and until the 30th ms on the GPU."""
    on_gpu = {"gpu_span_id": 9, "launch_ns": ms(5), "gpu_ns": ms(25)}
    return Row(PREFILL, span_id=parent_id + 1000, parent_id=parent_id, host_ns=ms(10), **{**on_gpu, **facts})


def values(*batches):
    """What batches of rows make: seconds by metric."""
    generation = Generation()
    return {value.spec: pytest.approx(value.seconds) for rows in batches for value in generation.add(make_batch(*rows))}


class TestTimes:
    """When a request begins, has its first token, and ends."""

    def test_the_first_token_is_there_when_the_gpu_has_prefilled(self):
        """The prefill ends on the GPU 30 ms after the request began; four more tokens come in the other 70."""
        assert values([prefill(), generate()]) == {
            REQUEST_DURATION: 0.1,
            TIME_TO_FIRST_TOKEN: 0.03,
            TIME_PER_OUTPUT_TOKEN: 0.07 / 4,
        }

    @pytest.mark.parametrize("facts", [{"gpu_span_id": 0}, {"flags": int(RowFlag.UNPLACED | RowFlag.CLAMPED)}])
    def test_without_a_place_on_the_gpu_the_host_tells(self, facts):
        """Where a prefill has no GPU times, or only a duration, its end on the host counts."""
        assert values([prefill(**facts), generate()])[TIME_TO_FIRST_TOKEN] == 0.01

    def test_a_request_ends_when_host_and_gpu_are_done(self):
        """Work that is still on the GPU when the host returns is part of the request."""
        late = generate(gpu_span_id=8, launch_ns=ms(5), gpu_ns=ms(125))
        assert values([prefill(), late]) == {
            REQUEST_DURATION: 0.13,
            TIME_TO_FIRST_TOKEN: 0.03,
            TIME_PER_OUTPUT_TOKEN: 0.1 / 4,
        }

    def test_a_prefill_in_chunks_ends_with_the_last(self):
        """Each chunk of a prompt is a `prefill`, in whatever order their rows come."""
        chunks = [prefill(gpu_ns=ms(45)), prefill(gpu_ns=ms(15))]
        assert values(chunks, [generate()])[TIME_TO_FIRST_TOKEN] == 0.05

    @pytest.mark.parametrize("batches", [[[prefill()], [generate()]], [[prefill(7)], [generate()], [prefill()]]])
    def test_rows_may_come_in_several_batches(self, batches):
        """And in either order, because a prefill may wait for another stream."""
        assert values(*batches)[TIME_TO_FIRST_TOKEN] == 0.03

    @pytest.mark.parametrize(
        ("said", "per_token"),
        [
            ({"new_tokens": 1}, None),
            ({"new_tokens": "many"}, None),
            ({"new_tokens": 3, "gen_ai.usage.output_tokens": 24}, 0.035),
            ({"new_tokens": None, "gen_ai.usage.output_tokens": 8}, 0.01),
        ],
    )
    def test_the_time_per_token_is_that_of_one_sequence(self, said, per_token):
        """A batch makes a token of each sequence at a time; without their number there is no time per token."""
        found = values([prefill(), generate(said=said)])
        assert found.get(TIME_PER_OUTPUT_TOKEN) == per_token
        assert found[REQUEST_DURATION] == 0.1

    def test_a_clock_that_is_off_makes_no_negative_time(self):
        """A first token before the request is one at its begin."""
        assert values([prefill(start_ns=NOW_NS - SECOND_NS), generate()])[TIME_TO_FIRST_TOKEN] == 0.0


class TestClocks:
    """The host's clock and the GPU's are metrics of their own."""

    def test_what_a_request_says_itself_counts(self):
        """By the names of its attributes; the prefill's end stands in for what it does not say."""
        said = {spec.name: 0.01 * (1 + place) for place, spec in enumerate(CLOCKS)}
        found = values([prefill(), generate(said=said)])
        assert {spec.name: found[spec] for spec in CLOCKS} == said
        found = values([prefill(), generate(said={GPU_TIME_TO_FIRST_TOKEN.name: 0.025})])
        assert found == {
            REQUEST_DURATION: 0.1,
            TIME_TO_FIRST_TOKEN: 0.03,
            TIME_PER_OUTPUT_TOKEN: 0.07 / 4,
            GPU_TIME_TO_FIRST_TOKEN: 0.025,
        }

    @pytest.mark.parametrize("wrong", ["soon", float("nan"), float("inf"), None, 1])
    def test_what_is_no_time_does_not_count(self, wrong):
        """An application may give the attribute any value."""
        said = {spec.name: wrong for spec in CLOCKS}
        assert values([prefill(), generate(said=said)]) == values([prefill(), generate()])

    def test_a_request_that_failed_has_neither(self):
        """As without what it says."""
        said = {spec.name: 0.01 for spec in CLOCKS}
        failed = generate(said=said, error=ExceptionInfo("ValueError", "no", ()))
        assert [*values([prefill(), failed])] == [REQUEST_DURATION]

    def test_by_its_stages(self, make_bench):
        """Prefill and decode on a GPU that is late by 7 ms: the GPU's clock is in its own metrics."""
        bench = make_bench(metrics="otlp", delay_ns=ms(7))
        run_generation(bench)
        points = bench.engine.collector.metrics_pipeline.snapshot().points
        (span,) = bench.named("generate")
        for spec in OF_GENERATIONS_ON_GPU:
            assert points[spec][0].value.sum_s == pytest.approx(span.attributes[spec.name])
        assert points[GPU_TIME_TO_FIRST_TOKEN][0].value.sum_s == pytest.approx(0.027, abs=1e-6)


class TestRequests:
    """What is a request."""

    def test_a_failed_request_has_a_duration_only(self):
        """As OpenTelemetry says, with the error's type."""
        generation = Generation()
        error = ExceptionInfo("torch.OutOfMemoryError", "no", ())
        (value,) = generation.add(make_batch(prefill(), generate(error=error)))
        assert (value.spec, value.attributes) == (REQUEST_DURATION, {**SAID, "error.type": "torch.OutOfMemoryError"})

    @pytest.mark.parametrize(
        "rows",
        [
            [generate()],
            [prefill(), Row(GENERATE, span_id=1)],
            [prefill(), Row(GENERATE, span_id=1, details=SpanDetails(attributes={"gen_ai.request.model": "gpt2"}))],
            [prefill(parent_id=3), generate()],
        ],
        ids=["a client's call", "says nothing", "says no operation", "another's prefill"],
    )
    def test_other_stages_are_none(self, rows):
        """Only a stage that says its operation and has a prefill of its own is a request to a model here."""
        assert values(rows) == {}

    def test_what_a_decorator_says_counts_too(self):
        """A stage's own attributes are on each of its runs, and a run's come first."""
        site = Site("answer", {**SAID, "gen_ai.request.model": "usual"})
        rows = [prefill(1), Row(site, span_id=1)]
        rows += [prefill(2), Row(site, span_id=2, details=SpanDetails(attributes={"gen_ai.request.model": "other"}))]
        models = [value.attributes["gen_ai.request.model"] for value in Generation().add(make_batch(*rows))]
        assert sorted(models) == ["other", "other", "usual", "usual"]

    def test_warm_up_requests_are_requests(self):
        """Somebody has waited for the slow first one."""
        assert REQUEST_DURATION in values([prefill(flags=int(RowFlag.WARMUP)), generate(flags=int(RowFlag.WARMUP))])

    def test_what_waits_is_bounded(self):
        """Prefills without a request, and requests without a prefill, do not pile up."""
        generation = Generation()
        for number in range(1, _MAX_WAITING + 50):
            generation.add(make_batch(prefill(number), generate(10**9 + number)))
        assert (len(generation._first_ns), len(generation._waiting)) == (_MAX_WAITING, _MAX_WAITING)

    def test_series_are_bounded(self):
        """However many models there are, later ones share a series, and none is left out."""
        generation = Generation()
        for number in range(1, 2 * _MAX_KINDS + 1):
            said = {"gen_ai.request.model": f"m{number}"}
            generation.add(make_batch(prefill(number), generate(number, said=said)))
        points = generation.points()[REQUEST_DURATION]
        assert len(points) == _MAX_KINDS + 1
        assert points[-1].attributes == {"gen_ai.operation.name": OTHER}
        assert sum(sum(point.value.counts) for point in points) == 2 * _MAX_KINDS


class TestPoints:
    """The histograms."""

    def test_buckets_are_those_that_opentelemetry_wants(self):
        """Each metric has bounds of its own, and a value that is one belongs to the bucket below it."""
        generation = Generation()
        generation.add(make_batch(prefill(), generate()))
        for spec, bucket in ((REQUEST_DURATION, 0.16), (TIME_TO_FIRST_TOKEN, 0.04), (TIME_PER_OUTPUT_TOKEN, 0.025)):
            (point,) = generation.points()[spec]
            assert point.attributes == SAID
            assert len(point.value.counts) == len(spec.bounds_s) + 1
            assert point.value.counts.index(1) == spec.bounds_s.index(bucket)
        generation.add(make_batch(prefill(gpu_ns=ms(35)), generate()))
        (point,) = generation.points()[TIME_TO_FIRST_TOKEN]
        assert point.value.counts[TIME_TO_FIRST_TOKEN.bounds_s.index(0.04)] == 2
        assert point.value.sum_s == pytest.approx(0.07)

    def test_the_slowest_exported_request_is_the_exemplar_once(self):
        """It links to a span that there is."""
        generation = Generation()
        for span_id, gpu_ns, sampled in ((1, 25, True), (2, 45, True), (3, 85, False), (4, 35, True)):
            batch = make_batch(prefill(span_id, gpu_ns=ms(gpu_ns)), generate(span_id))
            generation.add(replace(batch, sampled=np.full(2, sampled, np.bool_)))
        (point,) = generation.points(exemplars=True)[TIME_TO_FIRST_TOKEN]
        exemplar = point.value.exemplar
        assert (exemplar.span_id, exemplar.trace_id) == (2, Row().trace_id)
        assert exemplar.seconds == pytest.approx(0.05)
        assert generation.points(exemplars=True)[TIME_TO_FIRST_TOKEN][0].value.exemplar is None


def run_generation(bench):
    """Record a request as `generate` of transformers does; the prefill takes 20 ms on the host, the decodes 80."""
    with stage("generate", attributes=SAID) as request:
        for name, seconds in (("prefill", 0.02), *[("decode", 0.02)] * 4):
            with stage(name):
                bench.clock.advance(seconds)
        request.set_attribute("new_tokens", 5)
    bench.collect()


EXPECTED = {REQUEST_DURATION.name: 0.1, TIME_TO_FIRST_TOKEN.name: 0.02, TIME_PER_OUTPUT_TOKEN.name: 0.02}
"""Sums in seconds, without what a GPU adds by coming later."""


class TestWays:
    """From stages that run to what a receiver or the application's readers get."""

    @pytest.fixture
    def reader(self, monkeypatch):
        """The reader of a MeterProvider that the application has set."""
        made = InMemoryMetricReader()
        provider = MeterProvider([made])
        monkeypatch.setattr(otel_metrics, "_METER_PROVIDER", provider)
        yield made
        provider.shutdown()

    @pytest.mark.parametrize("delay_ns", [0, ms(7)])
    def test_stages_become_metrics(self, make_bench, delay_ns):
        """With a GPU that is late, the first token is late by as much, and the tokens after it are not."""
        bench = make_bench(metrics="otlp", delay_ns=delay_ns)
        run_generation(bench)
        points = bench.engine.collector.metrics_pipeline.snapshot().points
        late = delay_ns / 1e9
        sums = {spec: points[spec][0].value.sum_s for spec in OF_GENERATIONS}
        assert sums == {
            REQUEST_DURATION: pytest.approx(0.1 + late, abs=1e-6),
            TIME_TO_FIRST_TOKEN: pytest.approx(0.02 + late, abs=1e-6),
            TIME_PER_OUTPUT_TOKEN: pytest.approx(0.02, abs=1e-6),
        }

    @pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
    def test_otlp_sends_them(self, make_bench, protocol):
        """True histograms with their own bounds and attributes, decoded with OpenTelemetry's messages."""
        if protocol == "grpc":
            pytest.importorskip("grpc")
            from ..exporters.receiver_of_grpc import GrpcReceiver as Kind
        else:
            Kind = Receiver  # noqa: N806
        with contextlib.closing(Kind()) as receiver:
            where = {"otlp_base_endpoint": receiver.endpoint, "otlp_metrics_protocol": protocol}
            bench = make_bench(metrics="otlp", metrics_interval_s=3600.0, **where)
            bench.engine.collector.metrics_pipeline.refresh()
            run_generation(bench)
            bench.engine.collector.metrics_pipeline.flush(lambda: 20.0)
            if protocol == "grpc":
                scope = receiver.metrics[-1].resource_metrics[0].scope_metrics[0]
                metrics = {metric.name: metric for metric in scope.metrics}
            else:
                metrics = receiver.requests[-1].metrics
            for spec in OF_GENERATIONS:
                (point,) = metrics[spec.name].histogram.data_points
                assert metrics[spec.name].unit == "s"
                assert tuple(point.explicit_bounds) == spec.bounds_s
                assert (point.count, sum(point.bucket_counts)) == (1, 1)
                assert point.sum == pytest.approx(EXPECTED[spec.name], abs=1e-6)
                assert {item.key: item.value.string_value for item in point.attributes} == SAID
                assert point.exemplars[0].span_id.hex() == f"{bench.named('generate')[0].span_id:016x}"

    def test_the_applications_provider_has_them_as_true_histograms(self, make_bench, reader):
        """By OpenTelemetry's names, with the bounds that it wants, each request once."""
        bench = make_bench(metrics="auto")
        bench.engine.collector.metrics_pipeline.refresh()
        run_generation(bench)
        run_generation(bench)
        found = {}
        for scope in reader.get_metrics_data().resource_metrics[0].scope_metrics:
            found |= {metric.name: metric for metric in scope.metrics}
        for spec in OF_GENERATIONS:
            (point,) = found[spec.name].data.data_points
            assert (found[spec.name].unit, point.explicit_bounds) == ("s", spec.bounds_s)
            assert (point.count, dict(point.attributes)) == (2, SAID)
            assert point.sum == pytest.approx(2 * EXPECTED[spec.name], abs=1e-6)
            assert not [name for name in found if name.startswith(f"{spec.name}.")]

    def test_without_metrics_nothing_is_counted(self, make_bench, reader):
        """`none` means none."""
        bench = make_bench(metrics="none")
        bench.engine.collector.metrics_pipeline.refresh()
        run_generation(bench)
        assert not set(bench.engine.collector.metrics_pipeline.snapshot().points) & {*OF_GENERATIONS}
        assert reader.get_metrics_data() is None


def test_the_names_are_opentelemetrys():
    """As its package for conventions spells them."""
    attributes = pytest.importorskip("opentelemetry.semconv._incubating.attributes.gen_ai_attributes")
    metrics = pytest.importorskip("opentelemetry.semconv._incubating.metrics.gen_ai_metrics")
    assert {spec.name for spec in OF_GENERATIONS} == {
        metrics.GEN_AI_SERVER_REQUEST_DURATION,
        metrics.GEN_AI_SERVER_TIME_TO_FIRST_TOKEN,
        metrics.GEN_AI_SERVER_TIME_PER_OUTPUT_TOKEN,
    }
    names = ("GEN_AI_OPERATION_NAME", "GEN_AI_PROVIDER_NAME", "GEN_AI_REQUEST_MODEL")
    assert set(SAID) == {getattr(attributes, name) for name in names}
