"""Metrics through a MeterProvider, read back through OpenTelemetry's own Prometheus exporter."""

from __future__ import annotations

import math

import numpy as np
import pytest
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gpuscope._data.metrics import (
    BOUNDS_S,
    DURATION,
    LOST,
    OCCUPIED,
    RECORDED,
    UNCERTAINTY,
    DataPoint,
    Histogram,
    Snapshot,
)
from gpuscope.exporters.metrics_sdk import Instruments

INFER = {"gpuscope.stage": "infer", "gpuscope.lane": "host"}
BUCKET = "gpuscope_stage_duration_seconds_bucket"


def snapshot(recorded=9, seconds=(0.001,)):
    """Some metrics of a moment."""
    counts = np.bincount(np.searchsorted(BOUNDS_S, seconds), minlength=len(BOUNDS_S) + 1)
    points = {
        DURATION: [DataPoint(INFER, Histogram(tuple(counts.tolist()), float(sum(seconds))))],
        OCCUPIED: [DataPoint({"gpuscope.device.index": 0}, 0.25)],
        RECORDED: [DataPoint({}, recorded)],
        LOST: [DataPoint({"gpuscope.reason": "shutdown"}, 2)],
        UNCERTAINTY: [DataPoint({}, 3.5e-6)],
    }
    return Snapshot(1, 2, points)


class Scraped:
    """A provider with a Prometheus reader, and our instruments in it."""

    def __init__(self):
        self.registry, self.memory = CollectorRegistry(), InMemoryMetricReader()
        self.provider = MeterProvider([PrometheusMetricReader(registry=self.registry), self.memory])
        self.instruments = Instruments(self.provider)

    def samples(self):
        """What Prometheus would read, by name: (labels, value)."""
        found = {}
        for family in text_string_to_metric_families(generate_latest(self.registry).decode()):
            for sample in family.samples:
                labels = {key: text for key, text in sample.labels.items() if not key.startswith("otel_scope")}
                found.setdefault(sample.name, []).append((labels, sample.value))
        found.pop("target_info", None)
        return found


@pytest.fixture
def scraped():
    """A provider of its own, shut down at the end."""
    made = Scraped()
    yield made
    made.provider.shutdown()


def quantile(share, buckets):
    """`histogram_quantile` as Prometheus documents it, for buckets of (le, cumulative count)."""
    rank, below, before = share * buckets[-1][1], 0.0, 0.0
    for le, count in buckets:
        if count >= rank:
            return before if math.isinf(le) else before + (le - before) * (rank - below) / (count - below)
        below, before = count, le
    raise AssertionError(buckets)


def test_names_are_those_of_a_histogram_in_prometheus(scraped):
    """Prometheus sees what it would see of true histograms, and counters and gauges with their units."""
    scraped.instruments.follow(snapshot)
    found = scraped.samples()
    assert set(found) == {
        BUCKET,
        "gpuscope_stage_duration_seconds_sum",
        "gpuscope_stage_duration_seconds_count",
        "gpuscope_gpu_occupied_ratio",
        "gpuscope_stages_recorded_total",
        "gpuscope_stages_lost_total",
        "gpuscope_clock_uncertainty_seconds",
    }
    assert found["gpuscope_stages_lost_total"] == [({"gpuscope_reason": "shutdown"}, 2.0)]
    assert found["gpuscope_stage_duration_seconds_count"] == [
        ({"gpuscope_stage": "infer", "gpuscope_lane": "host"}, 1.0)
    ]


def test_quantiles_come_out_right(scraped):
    """Buckets are cumulative and end with all, so that a quantile lies in the bucket where the true one does."""
    seconds = np.random.default_rng(3).lognormal(math.log(0.004), 1.0, 5000)
    scraped.instruments.follow(lambda: snapshot(seconds=seconds.tolist()))
    buckets = sorted((float(labels["le"]), value) for labels, value in scraped.samples()[BUCKET])
    assert [le for le, _ in buckets] == [*BOUNDS_S, math.inf]
    assert buckets[-1][1] == len(seconds)
    for share in (0.1, 0.5, 0.9, 0.99):
        found, true = quantile(share, buckets), float(np.quantile(seconds, share))
        assert np.searchsorted(BOUNDS_S, found) == np.searchsorted(BOUNDS_S, true)


def test_one_scrape_is_of_one_moment(scraped):
    """All metrics of one answer come from one snapshot, and the next answer from a new one."""
    taken = []

    def source():
        taken.append(snapshot(recorded=len(taken) + 1))
        return taken[-1]

    scraped.instruments.follow(source)
    assert [scraped.samples()["gpuscope_stages_recorded_total"][0][1] for _ in range(3)] == [1.0, 2.0, 3.0]


def test_a_source_that_fails_shows_nothing_and_harms_nobody(scraped, caplog):
    """The application's reader gets its own metrics whatever happens here, and no error; the log says it once."""
    scraped.provider.get_meter("theirs").create_counter("theirs").add(1)

    def source():
        raise RuntimeError("no")

    scraped.instruments.follow(source)
    for _ in range(2):
        assert set(scraped.samples()) == {"theirs_total"}
    assert [record.message.partition(":")[0] for record in caplog.records] == ["metrics could not be observed"]


def test_one_recording_at_a_time(scraped):
    """A second recording shows once the first has ended, whose sums stay until then: readers ask once more at exit."""
    first, second = (lambda: snapshot(recorded=1)), (lambda: snapshot(recorded=2))
    assert scraped.samples() == {}
    assert scraped.instruments.follow(first)
    assert not scraped.instruments.follow(second)
    assert scraped.samples()["gpuscope_stages_recorded_total"] == [({}, 1.0)]
    scraped.instruments.leave(second, second())
    assert "gpuscope_gpu_occupied_ratio" in scraped.samples()
    scraped.instruments.leave(first, first())
    ended = scraped.samples()
    assert ended["gpuscope_stages_recorded_total"] == [({}, 1.0)]
    assert not {"gpuscope_gpu_occupied_ratio", "gpuscope_clock_uncertainty_seconds"} & set(ended)
    assert scraped.instruments.follow(second)
    assert scraped.samples()["gpuscope_stages_recorded_total"] == [({}, 2.0)]


def test_a_fork_s_child_shows_nothing_of_its_parent(scraped):
    """What was forgotten is not shown, ended or not."""
    scraped.instruments.follow(snapshot)
    scraped.instruments.forget()
    assert scraped.samples() == {}


def test_other_readers_see_plain_numbers(scraped):
    """A reader that is no Prometheus gets the same figures, monotonic where they only grow."""
    scraped.instruments.follow(snapshot)
    (resource,) = scraped.memory.get_metrics_data().resource_metrics
    metrics = {metric.name: metric for scope in resource.scope_metrics for metric in scope.metrics}
    assert metrics["gpuscope.stages.recorded"].data.is_monotonic
    assert not metrics["gpuscope.stage.duration.seconds_bucket"].data.is_monotonic
    assert (metrics["gpuscope.clock.uncertainty"].unit, metrics["gpuscope.stages.lost"].unit) == ("s", "{stage}")
