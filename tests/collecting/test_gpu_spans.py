"""`GPUSCOPE_GPU_SPANS`: which stages have a GPU span where they go to a back end."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import numpy as np
import pytest

from gpuscope import stage
from gpuscope._collecting.active_exporters import with_work
from gpuscope._data.batch import NO_WORK_NS, NO_WORK_TRIMMED_NS, RowFlag
from gpuscope._data.metrics import DURATION
from gpuscope.exporters.memory import MemoryExporter

from ..exporters.batches import Row, make_batch


class BackEnd(MemoryExporter):
    """Keeps what an exporter to a back end is given."""

    name = "back end"
    every_gpu_span = False


@pytest.fixture
def make(make_bench):
    """Return a function that makes a bench and the list of what its back end gets."""

    def made(**settings):
        spans = []
        return make_bench(exporters=(BackEnd(spans),), metrics="otlp", **settings), spans

    return made


def run(bench, *durations_ns, **keywords):
    """Record stages, each so long between its two events, and let the collector do its work."""
    for number, duration_ns in enumerate(durations_ns):
        with stage(f"s{number}", **keywords):
            bench.clock.advance(duration_ns / 1e9)
    bench.collect()


def names(spans, kind):
    """The stages that have a span of a kind."""
    return [span.attributes["gpuscope.stage"] for span in spans if span.kind == kind]


def test_a_stage_without_work_has_a_host_span_only(make):
    """Two events with nothing between lie up to 2.5 µs apart, and a kernel between them makes it more than 3."""
    bench, spans = make()
    run(bench, 0, 2_500, 3_200, 4_000, 50_000)
    assert names(spans, "host") == ["s0", "s1", "s2", "s3", "s4"]
    assert names(spans, "gpu") == ["s2", "s3", "s4"]
    without = next(span for span in spans if span.name == "s0")
    assert not {"gpuscope.gpu.duration", "gpuscope.launch_to_start"} & without.attributes.keys()


def lengths(spans, kind):
    """Nanoseconds by stage, of one kind."""
    return {span.attributes["gpuscope.stage"]: span.duration_ns for span in spans if span.kind == kind}


def test_what_the_events_took_is_no_part_of_a_busy_stage(make):
    """It is taken off what was left before the GPU came to it, of which 500 ns and less are not work."""
    bench, spans = make(delay_ns=1_000_000, event_cost_ns=2_900)
    run(bench, 2_900, 3_399, 3_400, 49_999)  # Each reading of the clock takes a nanosecond.
    assert lengths(spans, "gpu") == {"s2": 501, "s3": 47_100}
    assert bench.statistics().event_cost_ns == 2_900
    assert "events take 2.9 µs per pair" in str(bench.statistics())


def test_what_the_events_took_stays_where_the_gpu_may_have_waited(make):
    """The GPU came to this stage while the host was still in it."""
    bench, spans = make(delay_ns=1_000, event_cost_ns=2_900)
    run(bench, 3_499, 49_999)
    assert lengths(spans, "gpu") == {"s0": 3_500, "s1": 50_000}


def test_inner_stages_end_no_later_than_the_outer(make):
    """Whatever was taken off: where it was taken off the outer one, it was off each inner one."""
    bench, spans = make(delay_ns=4_000, event_cost_ns=2_900, gpu_spans="all")
    for outside_ns in range(0, 8_000, 500):
        with stage("outer"):
            with stage("inner"):
                bench.clock.advance(3e-6)
            bench.clock.advance(outside_ns / 1e9)
        bench.collect()
    gpu = [span for span in spans if span.kind == "gpu"]
    inner, outer = ([span for span in gpu if span.name == name] for name in ("inner [gpu]", "outer [gpu]"))
    longer = [a.duration_ns - b.duration_ns for a, b in zip(outer, inner, strict=True)]
    off_both = [ns < outside_ns + 100 for ns, outside_ns in zip(longer, range(0, 8_000, 500), strict=True)]
    assert off_both == sorted(off_both, reverse=True)
    assert set(off_both) == {True, False}
    assert all(a.end_ns <= b.end_ns for a, b in zip(inner, outer, strict=True))


def test_all_keeps_them(make):
    """As it says."""
    bench, spans = make(gpu_spans="all")
    run(bench, 0, 50_000)
    assert names(spans, "gpu") == ["s0", "s1"]


def test_an_exporter_may_want_every_one(make):
    """What is kept in memory for tests has all, beside a back end that has not."""
    bench, spans = make()
    run(bench, 0)
    assert names(bench.spans, "gpu") == ["s0"]
    assert names(spans, "gpu") == []


def test_nothing_is_lost_by_it(make):
    """The account, the metrics and the summary are as they would be with every span."""
    found = []
    for setting in ("all", "work"):
        bench, _ = make(gpu_spans=setting)
        run(bench, 0, 50_000)
        points = bench.engine.collector.metrics_pipeline.snapshot().points[DURATION]
        statistics = bench.statistics()
        found.append((
            statistics.recorded, statistics.exported, statistics.dropped, statistics.lost, statistics.untimed,
            [(point.attributes, point.value.counts) for point in points],
            bench.engine.summary.summary().stages,
        ))  # fmt: skip
    assert found[0] == found[1]
    assert found[0][0] == found[0][1] == 2


def test_the_file_has_every_one(make_bench, tmp_path):
    """Its readers tell a stage that kept its stream waiting from one that had none, so they get all, by default."""
    bench = make_bench(exporters=(), file=str(tmp_path / "trace.jsonl"))
    from gpuscope.exporters.file import FileExporter

    exporter = FileExporter(bench.engine.config, {})
    bench.engine.collector.active_exporters._active.append(exporter)
    run(bench, 0)
    exporter.shutdown(1)
    (line,) = (tmp_path / "trace.jsonl").read_text().splitlines()
    spans = json.loads(line)["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert [span["name"] for span in spans] == ["s0", "s0 [gpu]"]


def test_a_stage_inside_a_graph_keeps_its_only_span():
    """It has no host span, so whoever left its GPU span out would leave out the stage."""
    inside = {"gpu_ns": 10, "flags": int(RowFlag.IN_GRAPH), "span_id": 5, "gpu_span_id": 5, "parent_id": 3}
    batch = with_work(make_batch(Row(**inside), Row(gpu_span_id=9, gpu_ns=10), Row()))
    assert batch.gpu_span_id.tolist() == [5, 0, 0]


def test_the_limit_is_less_where_what_events_took_was_taken_off():
    """Where that is not known, because nobody measured it for one, the limit stays what it was."""
    trimmed = int(RowFlag.TRIMMED)
    rows = [
        Row(gpu_span_id=7, flags=flags, gpu_ns=length_ns)
        for flags, length_ns in ((trimmed, NO_WORK_TRIMMED_NS), (trimmed, NO_WORK_TRIMMED_NS + 1), (0, NO_WORK_NS))
    ]
    assert with_work(make_batch(*rows)).gpu_span_id.tolist() == [0, 7, 0]


def test_no_other_column_changes():
    """The GPU's times stay, and the batch that was given is as it was: other exporters have it."""
    rows = [Row(gpu_span_id=7, gpu_ns=length_ns) for length_ns in (NO_WORK_NS, NO_WORK_NS + 1)]
    batch = make_batch(*rows)
    found = with_work(batch)
    assert (batch.gpu_span_id.tolist(), found.gpu_span_id.tolist()) == ([7, 7], [0, 7])
    assert found.gpu_span_id.dtype == np.uint64
    back = replace(found, gpu_span_id=batch.gpu_span_id)
    assert all(getattr(back, field.name) is getattr(batch, field.name) for field in fields(batch))


def test_a_typo_is_refused():
    """With the words that there are."""
    from gpuscope._settings.config import Config

    config, warnings = Config.from_env({"GPUSCOPE_GPU_SPANS": "wrk"})
    assert config.gpu_spans == "work"
    assert "one of work, all (did you mean work?)" in warnings[0]
