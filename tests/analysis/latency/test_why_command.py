"""`gpuscope why`: from a file that was recorded to the parts of one request."""

from __future__ import annotations

import json
from contextvars import copy_context
from pathlib import Path

import numpy as np
import pytest

import gpuscope
from gpuscope.__main__ import main
from gpuscope._settings.config import Config
from gpuscope.analysis.latency.explain import Explainer
from gpuscope.analysis.latency.parts import BATCH, COMPILE, GARBAGE, GPU, HOST, OTHERS, OWN, PARTS, UNEXPLAINED
from gpuscope.analysis.read import read, read_lines
from gpuscope.analysis.runs import only, runs_of
from gpuscope.exporters.file import FileExporter

MS = 1e6


@pytest.fixture
def record(make_bench, tmp_path):
    """Return a function that runs a program on the fake GPU, and returns the file."""

    def run(program, *, delay_ns=0, **settings):
        path = tmp_path / "a.jsonl"
        exporter = FileExporter(Config().changed(file=path), {"service.name": "server"})
        bench = make_bench(exporters=(exporter,), delay_ns=delay_ns, **settings)
        program(bench.clock.advance)
        bench.collect()
        exporter.flush(5)
        return str(path)

    return run


def serve(advance, *, count=2):
    """So many requests are read for 1 ms each, wait 2 ms more, and are served by one batch of 4 ms."""

    def begin():
        stage = gpuscope.stage("request")
        stage.__enter__()
        with gpuscope.stage("parse"):
            advance(0.001)
        return stage, gpuscope.here()

    contexts = [copy_context() for _ in range(count)]
    requests = [context.run(begin) for context in contexts]
    advance(0.002)
    with gpuscope.stage("predict", members=[token for _, token in requests], weights=[1, 3][:count]):
        advance(0.004)
    for context, (stage, _) in zip(contexts, requests, strict=True):
        context.run(stage.__exit__, None, None, None)


def generate(advance):
    """A generation of 3 steps of 2 ms, with 1 ms before each; another one joins the last two."""
    with gpuscope.stage("request"):
        first, second = gpuscope.Generation("first"), gpuscope.Generation("second")
    for number in range(3):
        advance(0.001)
        with gpuscope.stage("step", members=[first, second] if number else [first]):
            advance(0.002)
        first.had_tokens()
    first.end()
    second.end()


def test_a_recording_knows_its_batches(record):
    """Links and shares are there by rows, and stay where one run is taken out of several."""
    recording = read([record(serve)])
    for whole in (recording, only(recording, runs_of(recording)[0])):
        names = [whole.names[stage] for stage in whole.stage]
        links, shares = whole.batches.links, whole.batches.shares
        assert [(names[batch], names[member]) for batch, member in zip(links.batch, links.member, strict=True)] == [
            ("predict", "request")
        ] * 2
        assert sorted(shares.member.tolist()) == sorted(links.member.tolist())
        (batch,) = set(shares.batch.tolist())
        assert shares.share_ns.sum() == whole.gpu_end_ns[batch] - whole.gpu_start_ns[batch]
        assert np.all(shares.size == 2)
        assert sorted((shares.wait_ns / MS).round().tolist()) == [2, 3]


@pytest.mark.parametrize("late_ms", [0, 1])
def test_a_batch(record, late_ms):
    """Waiting, the batch on the GPU by share, and the host; the GPU is as late as it is."""
    explainer = Explainer(read([record(serve, delay_ns=round(late_ms * MS))]))
    found = {}
    for row in explainer.requests().tolist():
        latency = explainer.explain(row)
        found[latency.start_ns] = {part: ns / MS for part, ns in latency.parts.items()}
        assert found[latency.start_ns][UNEXPLAINED] <= 0.02 * latency.whole_ns / MS
        (batch,) = latency.batches
        assert (batch.name, batch.size, batch.runs) == ("predict", 2, 1)
        assert batch.gpu_ms == pytest.approx(4, abs=0.01)
    first, second = found.values()
    assert (first[OWN], first[OTHERS]) == pytest.approx((1 + late_ms * 0.75, 3 - late_ms * 0.75), abs=1.01)
    if not late_ms:
        assert (first[BATCH], first[HOST]) == pytest.approx((3, 1), abs=0.01)
        assert (second[BATCH], second[OWN], second[OTHERS]) == pytest.approx((2, 3, 1), abs=0.01)
    else:
        assert first[GPU] == pytest.approx(1, abs=1.01)


def test_a_generation(record):
    """Its steps are its batches, one by one: between them it waits, and in them it has its share."""
    path = record(generate)
    explainer = Explainer(read([path]))
    latency = explainer.explain(int(explainer.requests()[0]))
    steps = {batch.runs: batch for batch in latency.batches}
    assert set(steps) == {2, 3}
    assert steps[3].gpu_ms == pytest.approx(6, abs=0.01)
    assert steps[3].share_ms == pytest.approx(4, abs=0.01)
    assert steps[2].share_ms == pytest.approx(2, abs=0.01)
    assert sum(latency.parts.values()) == latency.whole_ns


def collect_garbage(lines, *, duration_ns=500_000):
    """Return lines in which garbage was collected 100 µs into each `parse`, as each open stage says."""
    requests = [json.loads(line) for line in lines]
    spans = [
        span
        for request in requests
        for resource in request.get("resourceSpans", ())
        for scope in resource["scopeSpans"]
        for span in scope["spans"]
        if "gpu" not in span["name"] and "shared" not in span["name"]
    ]
    pauses = [int(span["startTimeUnixNano"]) + 100_000 for span in spans if span["name"] == "parse"]
    values = {"gpuscope.gc.duration": duration_ns, "gpuscope.gc.generation": 2}
    for span in spans:
        span["events"] = [
            {
                "timeUnixNano": str(start_ns),
                "name": "gpuscope.gc",
                "attributes": [{"key": key, "value": {"intValue": str(value)}} for key, value in values.items()],
            }
            for start_ns in pauses
            if int(span["startTimeUnixNano"]) <= start_ns < int(span["endTimeUnixNano"])
        ]
    return [json.dumps(request) + "\n" for request in requests]


def test_garbage_collection_of_a_file(record):
    """It is a part of its own, once, however many stages say so; the file is like any other otherwise."""
    lines = Path(record(serve)).read_text().splitlines()
    before, after = (Explainer(read_lines(each)) for each in (lines, collect_garbage(lines)))
    for row in after.requests().tolist():
        plain, found = before.explain(row), after.explain(row)
        assert found.parts[GARBAGE] == 500_000
        assert found.parts[HOST] == plain.parts[HOST] - 500_000
        assert sum(found.parts.values()) == found.whole_ns == plain.whole_ns
    (kind,) = after.by_kind()
    assert kind.parts_ms[GARBAGE] == pytest.approx(0.5)


@pytest.mark.parametrize("duration_ns", [-1, 2**63, "x"])
def test_garbage_that_cannot_be(record, duration_ns):
    """Such an event counts as malformed, and is not a part."""
    lines = collect_garbage(Path(record(serve)).read_text().splitlines(), duration_ns=duration_ns)
    recording = read_lines(lines)
    assert recording.losses.skipped_lines["malformed events"] > 0
    assert all(not kind.parts_ms[GARBAGE] for kind in Explainer(recording).by_kind())


def compiles(advance):
    """A request that compiles for 3 of its 5 ms."""
    with gpuscope.stage("request"), gpuscope.stage("infer"):
        advance(0.001)
        with gpuscope.stage("torch.compile"):
            advance(0.003)
        advance(0.001)


def test_a_compilation(record, capsys):
    """It is a part of its own, and the report has it per kind of request."""
    path = record(compiles)
    explainer = Explainer(read([path]))
    latency = explainer.explain(int(explainer.requests()[0]))
    assert latency.parts[COMPILE] == pytest.approx(3 * MS, abs=0.05 * MS)
    assert main(["report", path]) == 0
    assert "compile 60%" in " ".join(capsys.readouterr().out.split())


def test_links_alone(record):
    """Without light spans the batch's GPU time is divided equally."""
    path = record(serve, batch_spans="links")
    explainer = Explainer(read([path]))
    latency = explainer.explain(int(explainer.requests()[0]))
    (batch,) = latency.batches
    assert batch.share_ms == pytest.approx(batch.gpu_ms / 2, abs=0.001)


def test_what_it_prints(record, capsys):
    """A sentence, a bar, a table that ends with the whole, and what each batch was."""
    path = record(serve)
    assert main(["why", "--slowest", path]) == 0
    out = capsys.readouterr().out
    assert out.startswith("`request` took ")
    bar = next(line for line in out.splitlines() if line.startswith("["))
    assert set(bar[1:-1]) <= set(".qbGostHgc>-?")
    assert 70 <= len(bar) <= 100
    assert "waiting for the batch" in out
    assert " 100.0  until host and GPU were done" in out
    assert "`predict`, a batch of 2: 4.00 ms on the GPU, of which" in out
    assert "no measurement" in out


def cold_one(advance):
    """Sixty requests of 1 ms, of which the fortieth waits 500 ms, after three of warm-up."""
    for number in range(63):
        with gpuscope.stage("request"), gpuscope.stage("infer"):
            advance(0.5 if number == 43 else 0.001)


@pytest.mark.parametrize("option", ["--slowest", "--p99"])
def test_what_the_report_does_not_judge_is_said(record, capsys, option):
    """The one that is explained is the report's slowest, and where to find the cold one is beside it."""
    path = record(cold_one)
    assert main(["why", option, path]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.startswith("`request` took 1.0")
    assert "1 more request took longer, with warm-up or a late cold call inside, which the report does not judge" in out
    assert "up to 500 ms (trace " in out


@pytest.mark.parametrize("option", ["--slowest", "--p99", "--median"])
def test_json(record, capsys, option):
    """All parts, in their order, which add up."""
    assert main(["why", option, "--json", "--kind", "request", record(serve)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["parts_ms"]) == list(PARTS)
    assert sum(found["parts_ms"].values()) == pytest.approx(found["whole_ms"])
    assert sum(found["stages_ms"].values()) == pytest.approx(found["parts_ms"][HOST])


def test_by_trace(record, capsys):
    """By a trace's id or its beginning."""
    path = record(serve)
    trace = read([path]).trace_id[0]
    for text in (trace, trace[:8].upper()):
        assert main(["why", text, path]) == 0
        assert trace in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["FILE"], "is not a trace id; give one, or at least its first 4 digits, before the files"),
        (["abcd"], "no file is named; write `gpuscope why abcd FILE`."),
        (["0123456789abcdef", "FILE"], "no request has a trace id that begins with '0123456789abcdef'"),
        (
            ["--slowest", "--kind", "nothing", "FILE"],
            "no request begins with the stage 'nothing'; some do with 'request'.",
        ),
        (["--median", "--kind", "predict", "FILE"], "'predict' is a batch; choose one of its members: --kind request."),
        (["--slowest", "missing.jsonl"], "cannot read 'missing.jsonl'"),
    ],
)
def test_what_cannot_be(record, capsys, arguments, said):
    """Each says what is wrong, and ends with 2."""
    path = record(serve)
    assert main(["why", *(path if each == "FILE" else each for each in arguments)]) == 2
    assert said in capsys.readouterr().err


def test_the_report_has_kinds(record, tmp_path, capsys):
    """A sentence per kind of request, and the figures as JSON."""
    path = record(serve)
    assert main(["report", path, "--json", str(tmp_path / "out.json")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "`request`, " in out
    assert "waiting for the batch " in out
    (kind,) = json.loads((tmp_path / "out.json").read_text())["latency"]
    assert kind["name"] == "request"
    assert sum(kind["parts_ms"].values()) == pytest.approx(kind["whole_ms"])
