"""
A real OTLP/HTTP receiver for the benchmarks, run as a process of its own: counts the spans that arrive.

Decodes every request with opentelemetry-proto, and keeps nothing but the counts and the times of the metrics. `GET /`
answers with the counts, and `GET /v1/metrics` with the times.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

PATH = "/v1/traces"
METRICS_PATH = "/v1/metrics"


class Receiver:
    """The receiver as the benchmark sees it: started, asked for its counts, closed."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, str(Path(__file__))], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.endpoint = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)

    def counts(self) -> dict[str, int]:
        """Spans received, by the service's name."""
        with urlopen(self.endpoint, timeout=10) as answer:
            return dict(json.load(answer))

    def metric_times(self) -> list[float]:
        """When metrics arrived, in seconds of `time.monotonic`."""
        with urlopen(self.endpoint + METRICS_PATH, timeout=10) as answer:
            return list(json.load(answer))


def serve() -> None:
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    counts: Counter[str] = Counter()
    metric_times: list[float] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path.endswith(METRICS_PATH):
                ExportMetricsServiceRequest.FromString(body)
                metric_times.append(time.monotonic())
            else:
                self._count(ExportTraceServiceRequest.FromString(body))
            self._answer(b"", "application/x-protobuf")

        def _count(self, request: ExportTraceServiceRequest) -> None:
            for resource in request.resource_spans:
                named = {a.key: a.value.string_value for a in resource.resource.attributes}
                spans = sum(len(scope.spans) for scope in resource.scope_spans)
                with lock:
                    counts[named.get("service.name", "unknown")] += spans

        def do_GET(self) -> None:
            with lock:
                answer = json.dumps(metric_times if self.path == METRICS_PATH else counts).encode()
            self._answer(answer, "application/json")

        def _answer(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve()
