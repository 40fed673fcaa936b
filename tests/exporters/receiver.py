"""A real OTLP/HTTP receiver on loopback that answers as it is told to."""

from __future__ import annotations

import gzip
import threading
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


@dataclass(frozen=True)
class Answer:
    """
    What to say to one request.

    `hang`: say nothing until `Receiver.release`. `drop`: close the connection instead; `ends`: after the answer.
    """

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    hang: bool = False
    drop: bool = False
    ends: bool = False


def rejects(spans: int) -> Answer:
    """An answer that accepts the request but not all of its spans."""
    response = ExportTraceServiceResponse()
    response.partial_success.rejected_spans = spans
    response.partial_success.error_message = "no room"
    return Answer(body=response.SerializeToString())


@dataclass(frozen=True)
class Request:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    raw: bytes

    @property
    def body(self) -> bytes:
        """The body, decompressed."""
        return gzip.decompress(self.raw) if self.headers.get("content-encoding") == "gzip" else self.raw

    @property
    def message(self) -> ExportTraceServiceRequest:
        """The body, decoded."""
        return ExportTraceServiceRequest.FromString(self.body)

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics of the body by name, from the one resource and scope that it has."""
        (resource,) = ExportMetricsServiceRequest.FromString(self.body).resource_metrics
        (scope,) = resource.scope_metrics
        return {metric.name: metric for metric in scope.metrics}


class Receiver:
    """
    Listens at `endpoint`, keeps `requests`, and gives the queued answers in turn, then plain 200s.

    Wait for what it has received with `wait_for`; nothing sleeps.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.refused = 0
        self.most_bytes = 1 << 40
        """Of a request; a larger one is refused with 413, and its body is kept in no list."""
        self._answers: deque[Answer] = deque()
        self._changed = threading.Condition()
        self._released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.url = f"{self.endpoint}/v1/traces"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self._listening = True

    def answer(self, *answers: Answer | int) -> None:
        """Queue answers; a number is a status."""
        self._answers.extend(Answer(answer) if isinstance(answer, int) else answer for answer in answers)

    def refuse(self) -> None:
        """Stop listening: from now on connections are refused."""
        if self._listening:
            self._listening = False
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def release(self) -> None:
        """Let requests that hang end."""
        self._released.set()

    def close(self) -> None:
        """Free everything."""
        self.release()
        self.refuse()

    def wait_for(self, requests: int, timeout: float = 20) -> list[Request]:
        """Return the requests once there are so many."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.requests) >= requests, timeout), self.requests
            return list(self.requests)

    @property
    def resource_spans(self) -> list[Any]:
        """Every `ResourceSpans` received."""
        return [spans for request in self.requests for spans in request.message.resource_spans]

    @property
    def spans(self) -> list[Any]:
        """Every span received, in order."""
        return [span for resource in self.resource_spans for scope in resource.scope_spans for span in scope.spans]

    def _take(self, request: Request) -> Answer:
        """Keep the request and choose the answer."""
        with self._changed:
            if len(request.raw) > self.most_bytes:
                self.refused += 1
                return Answer(413)
            self.requests.append(request)
            self._changed.notify_all()
            return self._answers.popleft() if self._answers else Answer()


def _handler(receiver: Receiver) -> type[BaseHTTPRequestHandler]:
    """Return a handler that asks the receiver."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Or each answer, which is two small writes, waits 40 ms for an acknowledgement.
        wbufsize = -1

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            answer = receiver._take(Request(self.path, headers, raw))
            if answer.hang:
                receiver._released.wait(60)
            if answer.hang or answer.drop:
                self.close_connection = True
                return
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body)
            self.close_connection = self.close_connection or answer.ends

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    return Handler
