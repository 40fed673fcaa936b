"""The Grafana dashboard: it is one, and asks for nothing that is not exposed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import CollectorRegistry

from gpuscope._collecting.aggregation.metrics import StageMetrics, account_points
from gpuscope._collecting.aggregation.watched import GpuMeans
from gpuscope._data.batch import RowFlag
from gpuscope._data.metrics import Snapshot
from gpuscope._data.plain.gpu_use import GpuUse
from gpuscope._data.statistics import LookedStage, Statistics
from gpuscope.exporters.metrics_sdk import Instruments

from .batches import NOW_NS, Row, make_batch

DASHBOARD = json.loads((Path(__file__).parents[2] / "integrations/grafana/gpuscope.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]


@pytest.fixture(scope="module")
def exposed():
    """What Prometheus reads of a recording in which everything occurs: labels by name."""
    metrics = StageMetrics(NOW_NS)
    batch = make_batch(Row(gpu_span_id=1, samples=2, had_work=1), Row(flags=int(RowFlag.WARMUP)))
    metrics.add(replace(batch, stream_samples={(0, 7): (2, 1)}))
    metrics.settle(NOW_NS + 10**9, last=True)
    metrics.end_interval()
    use = GpuUse(
        *(0, "GPU-1", "H200", "NVIDIA"),
        watched_s=2.0,
        active_s=1.0,
        energy_j=9.0,
        cycles=1e9,
        throttled_s={"power_cap": 0.1},
        others_s={"worked": 0.5},
        others=1,
        is_part=False,
    )
    look = LookedStage("request", "infer", 1, 1, 1.0, 0.5, 3.0, 1.0, 0.25, 0.5)
    seen = {"gpus": (use,), "looks": (look,), "event_cost_ns": 2_900}
    account = account_points(Statistics(1, 1, 0, {"unsampled": 1}, {"shutdown": 1}, {"captured": 1}, 5, (), **seen))
    means = GpuMeans()
    means.end_interval([use])
    registry = CollectorRegistry()
    provider = MeterProvider([PrometheusMetricReader(registry=registry)])
    Instruments(provider).follow(lambda: Snapshot(0, 1, {**metrics.points(), **account, **means.points()}))
    found = {}
    for family in registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    provider.shutdown()
    return found


def lacking(ours, theirs, path=""):
    """Where the second value lacks something of the first."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        pairs = {key: (value, theirs.get(key)) for key, value in ours.items()}
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = dict(enumerate(zip(ours, theirs, strict=True)))
    else:
        return [] if ours == theirs else [path]
    return [problem for key, pair in pairs.items() for problem in lacking(*pair, f"{path}/{key}")]


def test_it_is_what_grafana_s_schema_says():
    """Read with the classes that Grafana generates of its schema and written again, not one field is left behind."""
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder")
    pytest.importorskip("grafana_foundation_sdk.cog.plugins").register_default_plugins()
    written = json.loads(encoder.JSONEncoder(sort_keys=True).encode(models.Dashboard.from_json(DASHBOARD)))
    assert lacking(DASHBOARD, written) == []


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_use_what_is_exposed(exposed, expression):
    """Each expression is PromQL, and its metrics and labels are those that the Prometheus exporter shows."""
    pytest.importorskip("promql_parser").parse(expression.replace("$__rate_interval", "4m"))
    metrics = re.findall(r"((?:gpuscope|hw)_\w+)\{", expression)
    assert metrics
    assert set(metrics) <= set(exposed)
    labels = set().union(*(exposed[metric] for metric in metrics)) | {"job", "instance"}
    used = re.findall(r"(\w+)=~?\"", expression) + re.findall(r"\w+", " ".join(re.findall(r"by \((.*?)\)", expression)))
    assert set(used) <= labels


@pytest.mark.parametrize("variable", [each for each in DASHBOARD["templating"]["list"] if each["type"] == "query"])
def test_variables_ask_for_what_is_exposed(exposed, variable):
    """The lists to choose from come from labels that are there."""
    metric, label = re.fullmatch(r"label_values\((\w+).*, (\w+)\)", variable["query"]["query"]).groups()
    assert label in exposed[metric] | {"job"}


def test_each_panel_says_what_to_look_for():
    """Every panel has a title and some sentences, a place of its own, and the chosen source of data."""
    for panel in PANELS:
        assert len(panel["description"]) > 60, panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
    taken = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(taken) == len(set(taken))
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
