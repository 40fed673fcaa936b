"""Prometheus with the metrics of a running service, and every question of the dashboard asked of it."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from contextlib import contextmanager

import pytest

from ..exporters.receiver import Receiver
from ..spans_of_files import wait_for
from .servers import FILES, Collector, Prometheus, free_ports, needed, yaml

DASHBOARD = json.loads((FILES / "grafana/gpuscope.json").read_text(encoding="utf-8"))
NOT_HERE = re.compile("hw_|gpuscope_look_|gpuscope_gpu_(clock|throttled|shared|active)")
"""Of NVML, and of deep looks: the service has neither. `tests/exporters` looks at their names."""
ALL_QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
QUERIES = [query for query in ALL_QUERIES if not NOT_HERE.search(query)]
SERVICE = """
import gc, json, sys, threading, time
import numpy as np
from gpuscope import _runtime, stage
from gpuscope._cuda.stream_sampler import ANSWER
from gpuscope.testing import FakeDevice


class Sampling:
    hz, why_off = 200.0, ""

    def take(self):
        return np.array([(time.perf_counter_ns(), 7, 0, 1, time.perf_counter_ns() % 2**32, 1)], ANSWER)

    def counts(self):
        return {}


if sys.argv[1:]:
    from opentelemetry import metrics
    from opentelemetry.exporter.prometheus import PrometheusMetricReader
    from opentelemetry.sdk.metrics import MeterProvider
    from prometheus_client import start_http_server
    metrics.set_meter_provider(MeterProvider([PrometheusMetricReader()]))
    start_http_server(int(sys.argv[1]), "127.0.0.1")

ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
device = FakeDevice(time.perf_counter_ns, delay_ns=200_000, completes=True, event_cost_ns=2_900)
device.sampling = Sampling()
chat = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "ours", "gen_ai.request.model": "small"}
config = _runtime.state.config.changed(gpu_spans="all", warmup=0)
requests = 0
with _runtime.period(config, device=device, clock=time.perf_counter_ns) as engine:
    while not ended.wait(0.01):
        with stage("request", attributes=chat) as request:
            with stage("prefill"):
                ended.wait(0.005)
            with stage("decode"):
                ended.wait(0.001)
            request.set_attribute("gen_ai.usage.output_tokens", 3)
        requests += 1
        requests % 50 or gc.collect()
        for stream in device.lanes.values():  # As in a capture of a CUDA graph, once in a while.
            stream.capturing = requests % 50 == 0
print(json.dumps({"requests": requests, "recorded": engine.statistics().recorded}))
"""
TOKENS = "time_to_first_token", "time_per_output_token"
SECONDS = {"bucket", "sum", "count"}
EXPECTED = {
    *(f"gpuscope_stage_{name}_seconds_{part}" for name in ("duration", "launch_delay") for part in SECONDS),
    *(f"gpuscope_stages_{name}_total" for name in ("recorded", "exported", "dropped", "lost", "untimed")),
    *(f"gpuscope_gpu_{name}_ratio" for name in ("busy", "stream_busy", "occupied", "idle")),
    *(f"gpuscope_gc_duration_seconds_{part}" for part in SECONDS),
    "gpuscope_clock_uncertainty_seconds",
    "gpuscope_gpu_event_cost_seconds",
    *(f"gen_ai_server_{name}_seconds_{part}" for name in ("request_duration", *TOKENS) for part in SECONDS),
    *(f"gpuscope_gpu_{name}_seconds_{part}" for name in TOKENS for part in SECONDS),
}
"""What the README's table of metrics becomes."""


@contextmanager
def service(folder, *arguments, **variables):
    """Run the service; yield a function that ends it and returns what it said."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GPUSCOPE", "OTEL_"))}
    ours = {"GPUSCOPE": "1", "OTEL_SERVICE_NAME": "service", "OTEL_METRIC_EXPORT_INTERVAL": "1000"}
    # Half of the traces are left out, and the first spans are refused: so there are stages dropped and lost.
    ours |= {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.5", "OTEL_BSP_SCHEDULE_DELAY": "500"}
    receiver = Receiver()
    receiver.answer(400)
    ours["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"] = receiver.url
    script = folder / "service.py"
    script.write_text(SERVICE)
    with subprocess.Popen(
        [sys.executable, script, *map(str, arguments)],
        env={**kept, **ours, **variables},
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def end():
            said, _ = process.communicate(timeout=60)
            assert process.returncode == 0
            return json.loads(said)

        try:
            yield end
        finally:
            process.kill()
            receiver.close()


def scraping(*targets):
    """The configuration that is shipped, with these targets for its first job, and a scrape per second."""
    config = yaml.safe_load((FILES / "otel-collector/prometheus.yml").read_text())
    config["global"]["scrape_interval"] = "1s"
    config["scrape_configs"] = config["scrape_configs"][:1]
    config["scrape_configs"][0]["static_configs"] = [{"targets": list(targets)}]
    return yaml.safe_dump(config)


@contextmanager
def through_the_collector(folder):
    """OTLP to the Collector, whose exporter is scraped."""
    with Collector(FILES / "otel-collector/config.yaml", folder) as collector:
        target = f"127.0.0.1:{collector.metrics}"
        with Prometheus(folder, scraping(target), "--enable-feature=exemplar-storage") as prometheus:
            metrics = {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": f"{collector.endpoint}/v1/metrics"}
            with service(folder, GPUSCOPE_METRICS="otlp", **metrics) as end:
                yield prometheus, end


@contextmanager
def from_the_application(folder):
    """The application's own exporter is scraped."""
    (port,) = free_ports(1)
    with Prometheus(folder, scraping(f"127.0.0.1:{port}")) as prometheus, service(folder, port) as end:
        yield prometheus, end


@contextmanager
def by_otlp(folder):
    """OTLP to Prometheus itself."""
    flag = "web.enable-otlp-receiver"
    known = subprocess.run([needed("prometheus"), "--help"], capture_output=True, text=True, check=False)
    if flag not in known.stdout + known.stderr:
        pytest.skip("this Prometheus is older than 3 and takes no OTLP")
    with Prometheus(folder, scraping(), f"--{flag}") as prometheus:
        metrics = {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": f"{prometheus.url}/api/v1/otlp/v1/metrics"}
        with service(folder, GPUSCOPE_METRICS="otlp", **metrics) as end:
            yield prometheus, end


@pytest.fixture(
    scope="module", params=[through_the_collector, from_the_application, by_otlp], ids=lambda way: way.__name__
)
def running(request, tmp_path_factory):
    """A service that goes on working, and a Prometheus that has its metrics, in one of three ways."""
    with request.param(tmp_path_factory.mktemp("prometheus")) as (prometheus, end):
        yield prometheus, end


def asked(prometheus, query):
    """The answer to a query of the dashboard, with all jobs and stages chosen and rates over less time."""
    for variable, value in {"$job": ".*", "$stage": ".*", "$__rate_interval": "10s"}.items():
        query = query.replace(variable, value)
    return prometheus.query(query)


def numbers(prometheus, query):
    """Every figure of an answer, once there are some and all are numbers."""
    found = [value for _, value in asked(prometheus, query)]
    return found if found and all(map(math.isfinite, found)) else None


def names(prometheus):
    """Every metric of ours that it has."""
    return {labels["__name__"] for labels, _ in prometheus.query('{__name__=~"gpuscope_.+|gen_ai_.+"}')}


def test_names_are_as_documented(running):
    """Whichever way they come, all metrics of the README have the names that Prometheus' conventions make of them."""
    prometheus, _ = running
    wait_for(lambda: names(prometheus) >= EXPECTED)
    assert names(prometheus) == EXPECTED


@pytest.mark.parametrize("query", QUERIES)
def test_the_dashboard_is_answered(running, query):
    """Each of its queries returns numbers while the service runs."""
    prometheus, _ = running

    assert min(wait_for(lambda: numbers(prometheus, query))) >= 0
    if by := re.search(r"sum by \((?:le, )?gpuscope_stage\)", query):
        found = {labels["gpuscope_stage"] for labels, _ in asked(prometheus, query)}
        assert found == {"request", "prefill", "decode"}, by.group()


def test_its_lists_have_choices(running):
    """Job and stage can be chosen from what there is."""
    prometheus, _ = running
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"]).groups()
            metric = metric.replace("$job", ".*")
            assert wait_for(lambda metric=metric: prometheus.query(metric))
            assert {labels.get(label) for labels, _ in prometheus.query(metric)} - {None, ""}


def test_figures_are_those_of_the_service(running):
    """Ratios are parts of one, the GPU is named, and percentiles lie where the stages' lengths do."""
    prometheus, _ = running
    (labels, occupied), *others = wait_for(lambda: prometheus.query("gpuscope_gpu_occupied_ratio > 0"))
    assert not others
    ((_, idle),) = prometheus.query("gpuscope_gpu_idle_ratio")
    assert 0 < occupied <= 1
    assert 0 <= idle < 1
    assert labels["hw_id"].startswith("GPU-")
    for name, least in (("prefill", 0.005), ("request", 0.005), ("decode", 0.001)):
        series = f'gpuscope_stage_duration_seconds_bucket{{gpuscope_stage="{name}", gpuscope_lane="host"}}'
        query = f"histogram_quantile(0.5, sum by (le) (rate({series}[10s])))"
        # A figure lies anywhere between the bounds of a bucket: 1, 2.5, 5 and 10 ms.
        (value,) = wait_for(lambda query=query: numbers(prometheus, query))
        assert least < value < 1, name


def test_the_last_figures_arrive(tmp_path):
    """What the service has counted when it ends is in Prometheus, by way of the Collector."""
    with through_the_collector(tmp_path) as (prometheus, end):
        wait_for(lambda: prometheus.query("gpuscope_stages_recorded_total > 10"))
        said = end()
        assert said["recorded"] == 3 * said["requests"]
        query = "gpuscope_stages_recorded_total"
        wait_for(lambda: [value for _, value in prometheus.query(query)] == [said["recorded"]])
        each = dict.fromkeys(("request", "prefill", "decode"), said["requests"])

        def counted():
            found = prometheus.query('gpuscope_stage_duration_seconds_count{gpuscope_lane="host"}')
            return {labels["gpuscope_stage"]: value for labels, value in found}

        # Of one export the Collector may have shown a part when it was asked.
        wait_for(lambda: counted() == each)
        series = 'gpuscope_stage_duration_seconds_bucket{gpuscope_stage="request"}'
        assert {len(labels["trace_id"]) for labels in wait_for(lambda: prometheus.exemplars(series))} == {32}
