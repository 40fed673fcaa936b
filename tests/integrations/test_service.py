"""A web service as most people run it, under load and ended by SIGTERM: each request is whole, and by itself."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import gpuscope

from ..spans_of_files import spans_in, wait_for

for package in ("fastapi", "uvicorn"):
    pytest.importorskip(package)

BODY = bytes(range(256)) * 800
"""200 kB, which come in several parts."""
BELOW = {
    "/loop": ["preprocess", "inference"],
    "/threads": ["preprocess", "inference"],
    "/executor": ["predict", ("predict", "preprocess"), ("predict", "inference")],
    "/stream": ["preprocess", *["token"] * 5],
    "/background": ["preprocess", "inference"],
}
"""The stages of a request to each path: directly below it, or (parent, name). A generator ends in a fifth step."""
BESIDE = {"/background": ["note"]}
"""Work after the answer: in the request's trace, beside the request, which has ended."""
CLIENTS, EACH = 6, 10


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def answers(port):
    """Whether the service is up."""
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0


def ask_often(port, client):
    """Ask for every path in turn over one kept connection; return the trace of each request with its path."""
    connection, asked = http.client.HTTPConnection("127.0.0.1", port, timeout=30), {}
    for number in range(EACH):
        path = list(BELOW)[(client + number) % len(BELOW)]
        trace_id = f"{client + 1:016x}{number + 1:016x}"
        headers = {"traceparent": f"00-{trace_id}-{1:016x}-01", "Content-Type": "application/octet-stream"}
        connection.request("POST", path, BODY, headers)
        answer = connection.getresponse()
        assert (answer.status, bool(answer.read())) == (200, True), path
        asked[trace_id] = path
    connection.close()
    return asked


def serve_and_ask(folder, *options):
    """Run the service, ask it from several clients at once, end it; return what was asked."""
    port = free_port()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("GPUSCOPE", "OTEL_"))}
    ours = {"GPUSCOPE": "1", "GPUSCOPE_EXPORTER": "file", "GPUSCOPE_FRAMEWORKS": "asgi", "GPUSCOPE_WARMUP": "0"}
    paths = [str(Path(gpuscope.__file__).parents[1]), str(Path(__file__).parent)]
    command = ["-m", "uvicorn", "service_app:app", "--port", str(port), "--log-level", "warning", *options]
    process = subprocess.Popen(
        [sys.executable, *command], env=kept | ours | {"PYTHONPATH": os.pathsep.join(paths)}, cwd=folder
    )
    try:
        wait_for(lambda: answers(port) or process.poll() is not None)
        with ThreadPoolExecutor(CLIENTS) as clients:
            asked = {}
            for one in clients.map(lambda client: ask_often(port, client), range(CLIENTS)):
                asked |= one
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    return asked


@pytest.mark.parametrize(
    "options",
    [
        ("--loop", "asyncio", "--http", "h11"),
        ("--loop", "asyncio", "--http", "httptools"),
        ("--loop", "uvloop", "--http", "httptools"),
        ("--loop", "uvloop", "--http", "h11", "--workers", "2"),
    ],
    ids=" ".join,
)
def test_requests_are_separate_and_whole(tmp_path, options):
    """Each request is in the trace of its client, with its own stages below it, and nothing is lost."""
    if not all(importlib.util.find_spec(name) for name in options if name in ("uvloop", "httptools")):
        pytest.skip("needs what `uvicorn[standard]` brings")
    asked = serve_and_ask(tmp_path, *options)
    assert len(asked) == CLIENTS * EACH
    spans = [span for span in spans_in(tmp_path) if not span.name.endswith("[gpu]")]
    by_id = {span.span_id: span for span in spans}
    traces = {trace_id: [span for span in spans if span.trace_id == trace_id] for trace_id in asked}
    assert sum(map(len, traces.values())) == len(spans)
    for trace_id, path in asked.items():
        roots = [span for span in traces[trace_id] if span.parent_id == f"{1:016x}"]
        assert sorted(span.name for span in roots) == sorted(["request", *BESIDE.get(path, ())]), path
        inside = [by_id[span.parent_id].name for span in traces[trace_id] if span not in roots]
        names = [span.name for span in traces[trace_id] if span not in roots]
        said = Counter(name if above == "request" else (above, name) for above, name in zip(inside, names, strict=True))
        assert said == Counter(BELOW[path]), path
    assert len({span.instance for span in spans}) <= (2 if "--workers" in options else 1)

    report = tmp_path / "report.json"
    files = list(map(str, tmp_path.glob("gpuscope-*.jsonl")))
    done = subprocess.run(
        [sys.executable, "-m", "gpuscope", "report", *files, "--json", str(report)],
        env={**os.environ, "PYTHONPATH": str(Path(gpuscope.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"{len(asked)} requests" in done.stdout
    assert json.loads(report.read_text())
