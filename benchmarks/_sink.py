"""
A receiver of OTLP over gRPC for the benchmarks, run as a process of its own: counts the spans that arrive, in all.

Prints its port, and then the count for every line that it reads.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"


class Sink:
    """The receiver as the benchmark sees it: started, asked for its count, closed."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.port = self._said()

    def spans(self) -> int:
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        return self._said()

    def _said(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=10)


def serve() -> None:
    import grpc
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service

    lock, count = threading.Lock(), 0

    def take(request, _context):
        nonlocal count
        with lock:
            count += sum(len(scope.spans) for resource in request.resource_spans for scope in resource.scope_spans)
        return b""

    # The answer is a message with nothing in it, which is no bytes.
    handler = grpc.unary_unary_rpc_method_handler(take, service.ExportTraceServiceRequest.FromString, bytes)
    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Export": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    for _ in sys.stdin:
        print(count, flush=True)
    server.stop(None)


if __name__ == "__main__":
    serve()
