"""LitServe: a real server and its worker process, one trace over both."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("litserve")

from gpuscope.analysis.latency.explain import Explainer
from gpuscope.analysis.latency.parts import AFTER, BEFORE, BETWEEN, HOST, UNEXPLAINED
from gpuscope.analysis.read import read

from ..spans_of_files import spans_in, wait_for

SERVER = """
import sys
import litserve
from gpuscope.instrument import instrument

instrument(frameworks="asgi,litserve")

class Double(litserve.LitAPI):
    def setup(self, device): pass
    def decode_request(self, request): return request["x"]
    def predict(self, x): return [2 * each for each in x] if isinstance(x, list) else 2 * x
    def encode_response(self, output): return {"y": output}

class Failing(Double):
    def predict(self, x): raise RuntimeError("no model")

class Counting(Double):
    def predict(self, x):
        for number in range(3):
            yield [number * each for each in x]
    def encode_response(self, outputs):
        for each in outputs:
            yield [{"y": output} for output in each]

if __name__ == "__main__":
    size, kind = int(sys.argv[2]), {"Double": Double, "Failing": Failing, "Counting": Counting}[sys.argv[3]]
    api = kind(max_batch_size=size, batch_timeout=5.0 if size > 1 else 0.0, stream=kind is Counting)
    litserve.LitServer(api, accelerator="cpu").run(port=int(sys.argv[1]), generate_client_file=False)
"""
ON = {"GPUSCOPE": "1", "GPUSCOPE_EXPORTER": "file", "GPUSCOPE_FILE": "spans-{pid}.jsonl", "GPUSCOPE_INTERVAL": "0.05"}
SHARED = "run_batch (shared)"
BATCH = {"run_batch": 1, "batch": 1, "predict": 1, "unbatch": 1}


@pytest.fixture
def serve(tmp_path):
    """Return a function that starts a server with batches of a size, and returns one that asks it."""
    (tmp_path / "server.py").write_text(SERVER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GPUSCOPE", "OTEL_"))}
    processes = []

    def start(size, kind="Double"):
        command = [sys.executable, "server.py", str(port), str(size), kind]
        # In a group of its own, for its children do not all end with it.
        group = {"start_new_session": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        processes.append(subprocess.Popen(command, cwd=tmp_path, env={**kept, **ON}, **group))
        wait_for(lambda: answers("/health"))
        return lambda number: answers("/predict", {"x": number})

    def answers(path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
        try:
            return urllib.request.urlopen(request, timeout=30).read()
        except (urllib.error.URLError, ConnectionError):
            assert processes[0].poll() is None
            return None

    yield start
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


def steps_in(folder, names):
    """The steps of the worker by their names, once there are so many of each, and the requests by their span ids."""

    def found():
        spans = spans_in(folder)
        steps = {name: [span for span in spans if span.name == f"litserve.{name}"] for name in names}
        requests = {span.span_id: span for span in spans if span.name == "request" and "http.route" in span.attributes}
        requests = {key: span for key, span in requests.items() if span.attributes["http.route"] == "/predict"}
        enough = all(len(steps[name]) >= count for name, count in names.items())
        known = {step.parent_id for name in PER_REQUEST & set(names) for step in steps[name]} <= set(requests)
        return (steps, requests) if enough and known else None

    steps, requests = wait_for(found)
    assert {name: len(spans) for name, spans in steps.items()} == names
    return steps, requests


PER_REQUEST = {"decode_request", "encode_response", "put_response", SHARED}


def test_steps_are_children_of_their_request(serve, tmp_path):
    """Each request's steps in the worker are children of that request in the server, without batching."""
    ask = serve(1)
    assert [json.loads(ask(number))["y"] for number in (1, 2)] == [2, 4]
    found, requests = steps_in(tmp_path, {"decode_request": 2, "predict": 2, "encode_response": 2})
    steps = [step for spans in found.values() for step in spans]
    for request_id in {step.parent_id for step in steps}:
        own = [step for step in steps if step.parent_id == request_id]
        assert {step.name.removeprefix("litserve.") for step in own} == {"decode_request", "predict", "encode_response"}
        assert {step.trace_id for step in own} == {requests[request_id].trace_id}
    assert len({step.parent_id for step in steps}) == 2
    assert {step.instance for step in steps}.isdisjoint({request.instance for request in requests.values()})


def assert_belongs_to_all(steps, requests):
    """One batch links to all requests, each of which has a light span of it, and none of its steps."""
    (batch,) = steps["run_batch"]
    assert sorted(batch.links) == sorted((request.trace_id, request.span_id) for request in requests.values())
    assert batch.trace_id not in {request.trace_id for request in requests.values()}
    assert batch.attributes["gpuscope.batch.size"] == str(len(requests))
    assert {span.parent_id for span in steps[SHARED]} == set(requests)
    for span in steps[SHARED]:
        assert span.links == [(batch.trace_id, batch.span_id)]
        assert span.attributes["gpuscope.batch.wait"] > 0
    assert sorted(span.attributes["gpuscope.batch.position"] for span in steps[SHARED]) == ["0", "1"]
    for name in set(steps) - PER_REQUEST - {"run_batch"}:
        assert {step.trace_id for step in steps[name]} == {batch.trace_id}


def test_a_batch_belongs_to_all_its_requests(serve, tmp_path):
    """A batch of two is a span of its own, linked with both; decoding and encoding are in each one's own trace."""
    ask = serve(2)
    with ThreadPoolExecutor(2) as pool:
        assert [json.loads(answer)["y"] for answer in pool.map(ask, (1, 2))] == [2, 4]
    steps, requests = steps_in(tmp_path, BATCH | {"decode_request": 2, "encode_response": 2, SHARED: 2})
    assert_belongs_to_all(steps, requests)
    for name in ("decode_request", "encode_response"):
        assert {step.parent_id for step in steps[name]} == set(requests)


def test_batches_one_after_the_other(serve, tmp_path):
    """The next batch has members of its own alone."""
    ask = serve(2)
    for _ in range(2):
        with ThreadPoolExecutor(2) as pool:
            assert [json.loads(answer)["y"] for answer in pool.map(ask, (1, 2))] == [2, 4]
    steps, requests = steps_in(tmp_path, {"run_batch": 2, "predict": 2, "decode_request": 4, SHARED: 4})
    assert {step.parent_id for step in steps["decode_request"]} == set(requests)
    links = [link for batch in steps["run_batch"] for link in batch.links]
    assert sorted(links) == sorted((request.trace_id, request.span_id) for request in requests.values())


def test_a_batch_that_fails(serve, tmp_path):
    """Where `predict` raises, the batch says so in its own span and in each member's, and the server goes on."""
    ask = serve(2, "Failing")
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, (1, 2))) == [None, None]
    steps, requests = steps_in(tmp_path, {"run_batch": 1, "batch": 1, "predict": 1, SHARED: 2})
    assert_belongs_to_all(steps, requests)
    (batch,) = steps["run_batch"]
    assert all(span.attributes["error.type"] == "RuntimeError" for span in (batch, *steps[SHARED]))


def test_where_the_time_of_requests_went(serve, tmp_path):
    """Of requests in batches hardly anything is unexplained: before the token and after the batch have names."""
    ask = serve(2)
    for _ in range(5):
        with ThreadPoolExecutor(2) as pool:
            assert [json.loads(answer)["y"] for answer in pool.map(ask, (1, 2))] == [2, 4]
    steps, requests = steps_in(tmp_path, {"run_batch": 5, SHARED: 10, "put_response": 10})
    assert {step.parent_id for step in steps["put_response"]} == set(requests)
    explainer = Explainer(read([tmp_path]))
    rows = [row for row in explainer.requests().tolist() if explainer.recording.span_id[row] in requests]
    latencies = [explainer.explain(row) for row in rows]
    assert len(latencies) == 10
    whole_ns = sum(each.whole_ns for each in latencies)
    assert sum(each.parts[UNEXPLAINED] for each in latencies) <= 0.02 * whole_ns
    for latency in latencies:
        assert sum(latency.parts.values()) == latency.whole_ns
        assert min(latency.parts[part] for part in (BEFORE, HOST, AFTER)) > 0


def test_where_the_time_of_single_requests_went(serve, tmp_path):
    """Without batches, too: they go to the worker and come back, or wait for others."""
    ask = serve(1)
    for number in range(5):
        ask(number)
    _, requests = steps_in(tmp_path, {"predict": 5, "put_response": 5})
    explainer = Explainer(read([tmp_path]))
    rows = [row for row in explainer.requests().tolist() if explainer.recording.span_id[row] in requests]
    latencies = [explainer.explain(row) for row in rows]
    assert len(latencies) == 5
    recording = explainer.recording
    for latency in latencies:
        assert sum(latency.parts.values()) == latency.whole_ns
        assert min(latency.parts[part] for part in (BETWEEN, HOST)) > 0
        steps = np.flatnonzero((recording.root == latency.row) & (recording.parent >= 0))
        in_worker_ns = recording.host_end_ns[steps].max() - recording.host_start_ns[steps].min()
        assert latency.parts[UNEXPLAINED] <= in_worker_ns  # Between its steps there.


def steps_of_stream(folder):
    """The steps by their names, once the batch is there with its light spans."""
    steps = {}
    for span in spans_in(folder):
        steps.setdefault(span.name.removeprefix("litserve."), []).append(span)
    return steps if len(steps.get(SHARED, ())) == 2 and "run_batch" in steps else None


def test_a_batch_that_streams(serve, tmp_path):
    """The batch lasts until the last answer: the steps that make the answers are in it."""
    ask = serve(2, "Counting")
    with ThreadPoolExecutor(2) as pool:
        assert [answer.count(b"y") for answer in pool.map(ask, (1, 2))] == [3, 3]
    steps = wait_for(lambda: steps_of_stream(tmp_path))
    (batch,) = steps["run_batch"]
    requests = {span.parent_id: span for span in steps["decode_request"]}
    assert len(batch.links) == 2
    assert {span for _, span in batch.links} == set(requests)
    assert {step.trace_id for step in steps["predict"]} == {batch.trace_id}
    assert len(steps["predict"]) >= 3
