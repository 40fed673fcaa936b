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

import pytest

pytest.importorskip("litserve")

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

if __name__ == "__main__":
    size = int(sys.argv[2])
    api = Double(max_batch_size=size, batch_timeout=5.0 if size > 1 else 0.0)
    litserve.LitServer(api, accelerator="cpu").run(port=int(sys.argv[1]), generate_client_file=False)
"""
ON = {"GPUSCOPE": "1", "GPUSCOPE_EXPORTER": "file", "GPUSCOPE_FILE": "spans-{pid}.jsonl", "GPUSCOPE_INTERVAL": "0.05"}
STEPS = {"decode_request": 2, "batch": 1, "predict": 1, "unbatch": 1, "encode_response": 2}


@pytest.fixture
def serve(tmp_path):
    """Return a function that starts a server with batches of a size, and returns one that asks it."""
    (tmp_path / "server.py").write_text(SERVER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GPUSCOPE", "OTEL_"))}
    processes = []

    def start(size):
        command = [sys.executable, "server.py", str(port), str(size)]
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


def steps_in(folder, count):
    """The steps of the worker, once there are so many, and the requests by their span ids."""

    def found():
        spans = spans_in(folder)
        steps = [span for span in spans if span.name.startswith("litserve.")]
        requests = {span.span_id: span for span in spans if span.name == "request"}
        return (
            (steps, requests) if len(steps) >= count and {step.parent_id for step in steps} <= set(requests) else None
        )

    return wait_for(found)


def test_steps_are_children_of_their_request(serve, tmp_path):
    """Each request's steps in the worker are children of that request in the server, without batching."""
    ask = serve(1)
    assert [json.loads(ask(number))["y"] for number in (1, 2)] == [2, 4]
    steps, requests = steps_in(tmp_path, 6)
    for request_id in {step.parent_id for step in steps}:
        own = [step for step in steps if step.parent_id == request_id]
        assert {step.name.removeprefix("litserve.") for step in own} == {"decode_request", "predict", "encode_response"}
        assert {step.trace_id for step in own} == {requests[request_id].trace_id}
    assert len({step.parent_id for step in steps}) == 2
    assert {step.instance for step in steps}.isdisjoint({request.instance for request in requests.values()})


def test_a_batch_belongs_to_its_first_request(serve, tmp_path):
    """The steps of a batch of two are in one trace, that of a request in it."""
    ask = serve(2)
    with ThreadPoolExecutor(2) as pool:
        assert [json.loads(answer)["y"] for answer in pool.map(ask, (1, 2))] == [2, 4]
    steps, _ = steps_in(tmp_path, sum(STEPS.values()))
    names = [step.name.removeprefix("litserve.") for step in steps]
    assert {name: names.count(name) for name in names} == STEPS
    assert len({step.parent_id for step in steps}) == 1
