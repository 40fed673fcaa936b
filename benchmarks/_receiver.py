"""
A real receiver of OTLP, by HTTP and gRPC, run as a process of its own: counts the spans that arrive.

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
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

if TYPE_CHECKING:
    from collections.abc import Callable

PATH = "/v1/traces"
METRICS_PATH = "/v1/metrics"


class Receiver:
    """The receiver as the benchmark sees it: started, asked for its counts, closed."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, str(Path(__file__))], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        http_port, grpc_port = map(int, self._process.stdout.readline().split())
        self.endpoint = f"http://127.0.0.1:{http_port}"
        self.grpc_endpoint = f"http://127.0.0.1:{grpc_port}"
        """Port 0 where `grpcio` is not installed."""

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

    def count(request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            named = {a.key: a.value.string_value for a in resource.resource.attributes}
            spans = sum(len(scope.spans) for scope in resource.scope_spans)
            with lock:
                counts[named.get("service.name", "unknown")] += spans

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
                count(ExportTraceServiceRequest.FromString(body))
            self._answer(b"", "application/x-protobuf")

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
    by_grpc, grpc_port = _listen_by_grpc(count)
    print(server.server_address[1], grpc_port, flush=True)
    server.serve_forever()
    del by_grpc  # Which would have ended without this name.


def _listen_by_grpc(count: Callable[[Any], None]) -> tuple[Any, int]:
    """Return the server and its port, or 0 where `grpcio` is not installed."""
    try:
        import grpc
    except ImportError:
        return None, 0
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
        TraceServiceServicer,
        add_TraceServiceServicer_to_server,
    )

    class Service(TraceServiceServicer):
        def Export(self, request: Any, _context: Any) -> Any:  # noqa: N802 - the service's own word
            count(request)
            return ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.max_receive_message_length", 64 << 20)])
    add_TraceServiceServicer_to_server(Service(), server)
    port: int = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, port


if __name__ == "__main__":
    serve()
