"""Stages inside replays of CUDA graphs, in every report: GPU times alone, below the stage that launched the replay."""

from __future__ import annotations

import json

import pytest

from gpuscope._data.batch import RowFlag
from gpuscope.analysis._structure.kinds import kinds
from gpuscope.analysis._structure.replays import outside_ns, replays_of
from gpuscope.analysis._verdicts.evidence import gather
from gpuscope.analysis.compare import compare
from gpuscope.analysis.figures import figures
from gpuscope.analysis.jaeger import traces
from gpuscope.analysis.perfetto import events
from gpuscope.analysis.read import read
from gpuscope.analysis.timeline import timeline_data
from gpuscope.analysis.verdict import judge
from gpuscope.commands.report import OUTSIDE, _notes, _table

from .recordings import EPOCH_NS, Stage, recording, repeat
from .verdicts.simulate import Machine, serve

IN_GRAPH = RowFlag.IN_GRAPH


def inner(name, launch, gpu, inside=()):
    """Return a stage inside a replay that was launched at a moment."""
    return Stage(name, launch, launch, gpu=gpu, inside=inside, flags=IN_GRAPH)


def request():
    """Return a request with one replay: 600 µs on the stream, of which 500 are in `attention` and `mlp`."""
    norm = inner("norm", 15, (330, 380))
    return Stage(
        "request",
        0,
        700,
        gpu=(3, 690),
        inside=[
            Stage(
                "decode",
                10,
                40,
                gpu=(20, 620),
                inside=[inner("attention", 15, (30, 230)), inner("mlp", 15, (300, 600), [norm])],
            ),
            Stage("fetch", 40, 690, gpu=(620, 680)),
        ],
    )


@pytest.fixture
def requests():
    """Twenty requests."""
    return recording(*repeat(request(), 20, 1000))


def of_stage(found, name):
    """Return the stage of this name."""
    return next(each for each in found.stages if each.name == name)


class TestRelations:
    """Which rows belong to a replay, and what is left of it."""

    def test_replay_is_what_was_launched_at_once(self, requests):
        """Rows of one launch are one replay, from the first start to the last end, of the stage that launched it."""
        replays = replays_of(requests)
        assert len(replays.caller) == 20
        assert {requests.names[stage] for stage in requests.stage[replays.caller]} == {"decode"}
        assert ((replays.start_ns - EPOCH_NS) % 1_000_000).tolist() == [30_000] * 20
        assert ((replays.end_ns - EPOCH_NS) % 1_000_000).tolist() == [600_000] * 20

    def test_two_replays_of_one_stage_are_two(self):
        """Launches at different moments are different replays, though one stage is around both."""
        around = Stage("decode", 0, 400, gpu=(3, 390), inside=[inner("a", 5, (10, 60)), inner("a", 300, (310, 380))])
        assert len(replays_of(recording(around)).caller) == 2

    def test_nested_stages_have_the_launcher_of_the_outermost(self, requests):
        """The launcher of a stage inside a stage of a graph is the one on the host."""
        launcher = requests.callers[requests.in_graph]
        assert {requests.names[stage] for stage in requests.stage[launcher]} == {"decode"}

    def test_left_over_is_what_no_inner_stage_covers(self, requests):
        """Nested stages count once: 600 µs on the stream less 200 and 300."""
        assert set(outside_ns(requests).values()) == {100_000}
        assert len(outside_ns(requests)) == 20


class TestFigures:
    """Tables."""

    def test_inner_stages_have_no_host_times(self, requests):
        """They have their GPU times, their place below the launcher, and no time, launch or share of the host."""
        found = of_stage(figures(requests), "norm")
        assert (found.host_ms, found.launch_to_start_ms, found.host_share) == (None, None, None)
        assert found.gpu_ms.p50 == pytest.approx(0.05)
        assert (found.parent, found.depth, found.replayed_calls, found.calls) == ("mlp", 3, 20, 20)

    def test_launcher_says_what_is_left_over(self, requests):
        """The stage around replays has their time outside any stage; others have none."""
        found = figures(requests)
        assert of_stage(found, "decode").outside_ms.p50 == pytest.approx(0.1)
        assert of_stage(found, "decode").outside_share == pytest.approx(100 / 700)
        assert of_stage(found, "fetch").outside_ms is None

    def test_stage_that_also_runs_eagerly_keeps_its_host_times(self):
        """A stage inside replays and outside has host times of the calls outside, and GPU times of all."""
        eager = Stage("request", 0, 100, gpu=(3, 90), inside=[Stage("a", 10, 30, gpu=(20, 60))])
        replayed = Stage("request", 200, 300, gpu=(203, 290), inside=[inner("a", 210, (220, 280))])
        found = of_stage(figures(recording(eager, replayed)), "a")
        assert (found.host_ms.count, found.gpu_ms.count, found.replayed_calls) == (1, 2, 1)

    def test_report_has_a_line_for_it(self, requests):
        """The table of `gpuscope report` shows the rest of the graph below its stage."""
        cells = [list(column.cells) for column in _table(figures(requests)).columns]
        names = [str(cell).strip() for cell in cells[0]]
        assert names == ["request", "decode", OUTSIDE, "attention", "mlp", "norm", "fetch"]
        assert cells[2][names.index("norm")] == "-"
        assert cells[4][2] == "100 µs"
        assert any("CUDA graph" in note for note in _notes(figures(requests)))

    def test_comparison_counts_a_replay_once(self, requests):
        """The launcher has an effect of its own, and what is inside none that would be added to it."""
        slower = Stage("request", 0, 900, gpu=(3, 890), inside=[])
        found = compare(requests, recording(*repeat(slower, 20, 1000)))
        effects = {(stage.name, stage.lane): stage.effect_ms for stage in found.stages}
        assert effects["decode", "gpu"] == pytest.approx(-0.6)
        assert effects["attention", "gpu"] is None


class TestVerdicts:
    """What is said of them."""

    def test_gaps_inside_a_replay_are_the_gpus(self):
        """A host that works while a graph runs does not keep the GPU waiting, whatever is between its stages."""

        def one_replay(machine):
            with machine.stage("infer"):
                machine.replay(("a", 200), (None, 3600), ("b", 200))
                machine.work(4200)

        def two_replays(machine):
            with machine.stage("infer"):
                machine.replay(("a", 200))
                machine.work(3800)
                machine.replay(("b", 200))
                machine.work(400)

        idle = []
        for program in (one_replay, two_replays):
            stages = serve(program).recording()
            evidence = gather(stages)
            rows = stages.parent < 0
            host_ns = (stages.host_end_ns - stages.host_start_ns)[rows]
            idle.append(float((evidence.idle_ns[rows] / host_ns).mean()))
        assert idle[0] < 0.1
        assert idle[1] > 0.8

    def test_inner_stage_gets_no_host_side_verdict(self, requests):
        """It is the GPU's, by a sentence that says how much of its graph it is, and no gain is promised."""
        found = of_stage(judge(requests), "mlp")
        assert found.verdict == "gpu-bound"
        assert found.because == "It takes 50% of the time on the GPU of `decode`, whose CUDA graph contains it."
        assert (found.gain_ms, found.host_ms, found.idle_share, found.assumes) == (None, None, None, None)
        assert found.duration_ms == pytest.approx(0.3)

    @pytest.mark.parametrize(("times", "why"), [(5, "5 calls"), (20, "shorter than")])
    def test_inner_stage_can_be_unknown(self, times, why):
        """Too few calls and too short ones get no verdict."""
        around = Stage("request", 0, 100, gpu=(3, 90), inside=[inner("a", 5, (10, 30))])
        found = of_stage(judge(recording(*repeat(around, times, 1000))), "a")
        assert found.verdict == "unknown"
        assert why in found.because

    def test_findings_are_plain_text(self, requests):
        """The verdicts print, and go into JSON."""
        findings = judge(requests)
        assert "`norm`: gpu-bound" in str(findings)
        json.dumps(findings.as_dict())


class TestViewers:
    """Files for viewers."""

    def test_perfetto_has_them_on_the_stream_only(self, requests):
        """One slice each, inside that of the stage that launched, with the flag, and without an arrow."""
        found = [event for event in events(requests) if event.get("name") == "mlp"]
        assert len(found) == 20
        assert all(event["args"]["gpuscope.graph"] is True for event in found)
        starts = sum(event["ph"] == "s" for event in events(requests))
        assert starts == sum(event["ph"] == "f" for event in events(requests)) == 60
        decode = [event for event in events(requests) if event.get("name") == "decode" and event["ph"] == "X"]
        outside = [
            event["args"]["gpuscope.graph.outside"] for event in decode if "gpuscope.gpu.duration" in event["args"]
        ]
        assert outside == [pytest.approx(100e-6)] * 20

    def test_jaeger_has_a_gpu_span_below_the_host_span(self, requests):
        """The outer ones are children of the launcher's host span, nested ones of the outer GPU span."""
        spans = next(traces(requests))["spans"]
        by_name = {span["operationName"]: span for span in spans}
        assert "attention" not in by_name
        parents = {
            name: by_name[name]["references"][0]["spanID"] for name in ("attention [gpu]", "norm [gpu]", "decode [gpu]")
        }
        assert parents["attention [gpu]"] == parents["decode [gpu]"] == by_name["decode"]["spanID"]
        assert parents["norm [gpu]"] == by_name["mlp [gpu]"]["spanID"]

    def test_timeline_knows_no_bubble_inside_a_replay(self, requests):
        """The gap between two inner stages is no bubble but queued work; inner stages have no row on a thread."""
        data = timeline_data(requests)
        (device,) = data["devices"]
        gap = 250_000
        assert not any(start <= gap < end for start, end in zip(*device["idle"].values(), strict=True))
        assert any(start <= gap < end for start, end in zip(*device["queued"].values(), strict=True))
        in_graphs = [row for row, flags in enumerate(data["columns"]["flags"]) if flags & IN_GRAPH]
        assert {data["columns"]["host_row"][row] for row in in_graphs} == {-1}
        assert list(data["outside"].values()) == [100_000] * 20


def span(name, span_id, parent, start, end, **attributes):
    """Return a span as OTLP JSON has it; times in microseconds."""
    values = {"gpuscope.stage": name, "thread.id": 1, "thread.name": "main", **attributes}
    kinds = {bool: "boolValue", int: "intValue", float: "doubleValue", str: "stringValue"}
    return {
        "traceId": f"{1:032x}",
        "spanId": f"{span_id:016x}",
        **({"parentSpanId": f"{parent:016x}"} if parent else {}),
        "startTimeUnixNano": str(EPOCH_NS + start * 1000),
        "endTimeUnixNano": str(EPOCH_NS + end * 1000),
        "attributes": [
            {"key": key, "value": {kinds[type(value)]: str(value) if type(value) is int else value}}
            for key, value in values.items()
        ],
    }


def on_gpu(launched, start):
    """Return the attributes of a GPU span that was launched at a time."""
    return {
        "gpuscope.cuda.stream": 7,
        "gpuscope.device.index": 0,
        "hw.name": "H200",
        "hw.id": "GPU-1",
        "gpuscope.clock.uncertainty": 3e-6,
        "gpuscope.launch_to_start": (start - launched) / 1e6,
    }


class TestRead:
    """Files of the `file` exporter."""

    @pytest.fixture
    def read_spans(self, tmp_path):
        """Return a function that reads spans from a file."""

        def reading(*spans):
            scopes = [{"scope": {"name": "gpuscope"}, "spans": list(spans)}]
            path = tmp_path / "spans.jsonl"
            path.write_text(json.dumps({"resourceSpans": [{"resource": {}, "scopeSpans": scopes}]}) + "\n")
            return read([path])

        return reading

    def test_gpu_spans_of_replays_become_rows(self, read_spans):
        """In any order: with the launch for both host times, the parent that the span names, and their attributes."""
        stages = read_spans(
            span("norm", 4, 3, 60, 70, **on_gpu(15, 60), **{"gpuscope.graph": True}),
            span("mlp", 3, 1, 50, 90, **on_gpu(15, 50), **{"gpuscope.graph": True, "layer": 2}),
            span("decode", 2, 1, 20, 95, **on_gpu(10, 20)),
            span("decode", 1, 0, 10, 40, **{"gpuscope.host.duration": 3e-5}),
        )
        assert [stages.names[stage] for stage in stages.stage] == ["decode", "mlp", "norm"]
        assert stages.parent.tolist() == [-1, 0, 1]
        assert stages.in_graph.tolist() == [False, True, True]
        assert (stages.host_start_ns - EPOCH_NS).tolist() == [10_000, 15_000, 15_000]
        assert (stages.host_end_ns - EPOCH_NS).tolist() == [40_000, 15_000, 15_000]
        assert (stages.gpu_end_ns - EPOCH_NS).tolist() == [95_000, 90_000, 70_000]
        assert stages.attributes == {1: {"layer": 2}}
        assert stages.losses.skipped_lines == {}

    def test_stages_that_begin_at_one_node_are_the_outer_first(self, read_spans):
        """Also where they end at one node, and whatever the order in the file: each is told below its own."""
        stages = read_spans(
            span("attention", 5, 4, 50, 70, **on_gpu(15, 50), **{"gpuscope.graph": True}),
            span("layer", 4, 3, 50, 90, **on_gpu(15, 50), **{"gpuscope.graph": True}),
            span("mlp", 6, 4, 70, 90, **on_gpu(15, 70), **{"gpuscope.graph": True}),
            span("encoder", 3, 1, 50, 90, **on_gpu(15, 50), **{"gpuscope.graph": True}),
            span("request", 2, 1, 20, 95, **on_gpu(10, 20)),
            span("request", 1, 0, 10, 40, **{"gpuscope.host.duration": 3e-5}),
        )
        assert [(kind.name, kind.parent) for kind in kinds(stages)] == [
            ("request", None), ("encoder", "request"), ("layer", "encoder"), ("attention", "layer"), ("mlp", "layer")
        ]  # fmt: skip

    def test_replay_whose_launcher_is_missing_is_counted(self, read_spans):
        """Without the stage on the host there is no row, and the file's losses say so."""
        stages = read_spans(
            span("mlp", 3, 1, 50, 90, **on_gpu(15, 50), **{"gpuscope.graph": True}),
            span("norm", 4, 3, 60, 70, **on_gpu(15, 60), **{"gpuscope.graph": True}),
        )
        assert len(stages.stage) == 0
        assert stages.losses.skipped_lines == {"GPU spans without a host span": 2}


def test_simulated_replays_nest(requests):
    """The simulation's graph has its parts one after another, nested ones inside, launched at one moment."""
    machine = Machine(spread=0.0)
    with machine.stage("decode"):
        machine.replay(("a", 100), (None, 50), ("b", (("c", 10), (None, 5))))
    (root,) = machine.roots
    a, b = root.inside
    assert a.gpu[1] + 50 == b.gpu[0]
    assert (b.gpu[1] - b.gpu[0], b.inside[0].gpu) == (15, (b.gpu[0], b.gpu[0] + 10))
    assert {a.start, a.end, b.start, b.inside[0].start} == {machine.now - 2 - 2}
