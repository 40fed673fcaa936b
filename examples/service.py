"""
A web service with OpenTelemetry spans of its own, and gpuscope's stages among them.

The service makes a span for each HTTP request, as instrumentation of a web framework would, and one for a look-up
inside a stage. Stages become children of the spans around them and parents of the spans inside them, and go where the
service's spans go, through its own TracerProvider. To need no web framework, it is built on the standard library.

    GPUSCOPE=1 python examples/service.py
    GPUSCOPE=1 OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318 python examples/service.py   # and into Jaeger, say
"""

import json
import os
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from opentelemetry import propagate, trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from torch import nn

import gpuscope

# This one keeps its spans, to print them. A real service would only send them, as this one does where it is told to.
EXPORTER = InMemorySpanExporter()
PROVIDER = TracerProvider(resource=Resource.create({"service.name": "classifier"}))
PROVIDER.add_span_processor(SimpleSpanProcessor(EXPORTER))
if "OTEL_EXPORTER_OTLP_ENDPOINT" in os.environ:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    PROVIDER.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
trace.set_tracer_provider(PROVIDER)
tracer = trace.get_tracer("classifier")

torch.manual_seed(0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODEL = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)).eval().to(DEVICE)
NAMES = ("cat", "dog", "bird", "fish")


@gpuscope.stage("preprocess")
def preprocess(numbers: list[float]) -> torch.Tensor:
    return torch.tensor(numbers, device=DEVICE).reshape(1, 16)


@gpuscope.stage("inference")
@torch.inference_mode()
def infer(batch: torch.Tensor) -> torch.Tensor:
    return MODEL(batch)


@gpuscope.stage("postprocess")
def postprocess(logits: torch.Tensor) -> str:
    best = int(logits.argmax())
    # The service's own span, inside a stage.
    with tracer.start_as_current_span("look up name"):
        return NAMES[best]


class Handler(BaseHTTPRequestHandler):
    """Answers `POST /classify` with the name of what was sent."""

    def do_POST(self) -> None:
        """Answer one request."""
        caller = propagate.extract({name.lower(): value for name, value in self.headers.items()})
        # The service's own span, around the stages.
        with tracer.start_as_current_span("POST /classify", context=caller, kind=trace.SpanKind.SERVER):
            numbers = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with gpuscope.stage("classify"):
                name = postprocess(infer(preprocess(numbers)))
            body = json.dumps({"name": name}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Keep the output to what is worth reading."""


def ask(port: int, numbers: list[float]) -> str:
    """Call the service as a client with a trace of its own would."""
    with tracer.start_as_current_span("client", kind=trace.SpanKind.CLIENT):
        headers: dict[str, str] = {}
        propagate.inject(headers)
        request = urllib.request.Request(f"http://127.0.0.1:{port}/classify", json.dumps(numbers).encode(), headers)
        with urllib.request.urlopen(request) as response:
            return json.load(response)["name"]


def print_traces() -> None:
    """Print each trace as the tree that a trace viewer would show."""
    spans = sorted(EXPORTER.get_finished_spans(), key=lambda span: span.start_time)
    children: dict[int | None, list] = {}
    for span in spans:
        children.setdefault(span.parent.span_id if span.parent else None, []).append(span)

    def show(span, depth: int) -> None:
        milliseconds = (span.end_time - span.start_time) / 1e6
        made_by = span.instrumentation_scope.name
        print(f"{'  ' * depth + span.name:<32} {milliseconds:8.3f} ms   by {made_by}")
        for child in children.get(span.context.span_id, []):
            show(child, depth + 1)

    for root in children.get(None, []):
        show(root, 0)


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    for request in range(3):
        print("It is a", ask(server.server_port, [float(request + n) for n in range(16)]))
    server.shutdown()
    serving.join()
    server.server_close()

    # Stages reach the provider in the background; a service that is shut down need not do this.
    gpuscope.flush(5)
    print()
    print_traces()
    print(f"\n{gpuscope.summary()}")


if __name__ == "__main__":
    main()
