"""Tokens across processes: front, batcher and worker are whole, whichever way the tokens went."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from gpuscope.analysis.read import read

PROGRAM = """
import multiprocessing, sys
import gpuscope

REQUESTS, BATCH = 60, 8


def front(requests, way):
    gpuscope.enable(exporters="file", file="front.jsonl")
    for number in range(REQUESTS):
        with gpuscope.stage("request") as stage:
            stage.set_attribute("number", number)
            token = gpuscope.here()
            if way == "headers":
                headers = {}
                gpuscope.inject(headers)
                requests.put((number, headers))
            else:
                requests.put((number, token.traceparent if way == "traceparent" else token))
    requests.put(None)
    assert gpuscope.shutdown()


def batcher(requests, batches, way):
    gpuscope.enable(exporters="file", file="batcher.jsonl")
    waiting = []
    while (request := requests.get()) is not None:
        number, given = request
        if way == "headers":
            with gpuscope.extract(given), gpuscope.stage("queued"):
                given = gpuscope.here()
        elif way == "traceparent":
            given = gpuscope.Token.from_traceparent(given)
        waiting.append((number, given))
        if len(waiting) == BATCH:
            batches.put(waiting)
            waiting = []
    batches.put(waiting)
    batches.put(None)
    assert gpuscope.shutdown()


def worker(batches):
    gpuscope.enable(exporters="file", file="worker.jsonl")
    while (batch := batches.get()) is not None:
        with gpuscope.stage("predict", members=batch, key=lambda each: each[1]):
            with gpuscope.stage("forward"):
                pass
    assert gpuscope.statistics().batch_faults == {}
    assert gpuscope.shutdown()


if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[2])
    requests, batches = context.Queue(), context.Queue()
    processes = [
        context.Process(target=front, args=(requests, sys.argv[1])),
        context.Process(target=batcher, args=(requests, batches, sys.argv[1])),
        context.Process(target=worker, args=(batches,)),
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
"""


def spans_in(path):
    """Return the spans of a file of OTLP's JSON, if there is one, with their attributes as plain values."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        for resource in json.loads(line).get("resourceSpans", ()):
            for span in resource["scopeSpans"][0]["spans"]:
                values = {each["key"]: next(iter(each["value"].values())) for each in span["attributes"]}
                found.append({**span, "attributes": values})
    return found


@pytest.mark.parametrize("way", ["pickle", "headers", "traceparent"])
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_three_processes_are_one_trace_for_each_request(run_python, tmp_path, way, method):
    """Every request is in one batch, once; each link leads to a span that is there; waits are from the token on."""
    result = run_python(PROGRAM, way, method, GPUSCOPE="idle", GPUSCOPE_QUIET="1")
    assert result.returncode == 0, result.stderr
    spans = {name: spans_in(tmp_path / f"{name}.jsonl") for name in ("front", "batcher", "worker")}
    everything = {(span["traceId"], span["spanId"]): span for each in spans.values() for span in each}
    requests = {span["traceId"]: span for span in spans["front"]}
    assert len(requests) == 60
    members = "queued" if way == "headers" else "request"
    batches = [span for span in spans["worker"] if span["name"] == "predict"]
    links = [(link["traceId"], link["spanId"]) for span in batches for link in span["links"]]
    assert Counter(trace for trace, _ in links) == Counter(requests.keys())
    assert {everything[link]["name"] for link in links} == {members}
    light = [span for span in spans["worker"] if span["name"] == "predict (shared)"]
    assert Counter(span["traceId"] for span in light) == Counter(requests.keys())
    for span in light:
        above = everything[span["traceId"], span["parentSpanId"]]
        (link,) = span["links"]
        batch = everything[link["traceId"], link["spanId"]]
        assert above["name"] == members
        assert batch["name"] == "predict"
        assert (span["startTimeUnixNano"], span["endTimeUnixNano"]) == (
            batch["startTimeUnixNano"],
            batch["endTimeUnixNano"],
        )
        assert span["flags"] & 0x200  # The parent is of another process.
        wait_s = span["attributes"]["gpuscope.batch.wait"]
        begun_s = (int(span["startTimeUnixNano"]) - int(above["startTimeUnixNano"])) / 1e9
        assert 0 <= wait_s <= begun_s + 0.005
        if way == "pickle":  # Their clock is one.
            assert wait_s == pytest.approx(begun_s, abs=0.05)
    recording = read(sorted(tmp_path.glob("*.jsonl")))
    assert recording.losses.orphans == 0
    assert len(recording.stage) == 60 + 60 * (way == "headers") + 2 * len(batches)
