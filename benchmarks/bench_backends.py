"""
What one server takes: spans per second, CPU time and memory of Jaeger, the OpenTelemetry Collector and `rotel`.

Requests of seven stages with GPU times, encoded by the real exporter, each round with trace ids of its own. They are
posted over HTTP by four connections. `passes on`: OTLP in, OTLP out. `chooses`: the configuration of
`integrations/otel-collector`, as it is, which holds each trace for 15 s. `stores`: Jaeger 2, in memory.
"""

from __future__ import annotations

import gzip
import re
import shutil
import socket
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import requests
from _common import ROOT, arguments, interleave, median, save, table
from _receiver import PATH, Receiver
from _sink import Sink
from bench_volume import SPANS_A_STAGE, STAGES_A_REQUEST, cpu_s, peak_mb, record, rotel, wait_for
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONFIG = ROOT / "integrations/otel-collector/config.yaml"
CONNECTIONS = 4
PAUSE_S = 1
JAEGER = """
extensions:
  jaeger_storage: {{backends: {{some: {{memory: {{max_traces: 1000000}}}}}}}}
  jaeger_query:
    storage: {{traces: some}}
    http: {{endpoint: "127.0.0.1:{query}"}}
    grpc: {{endpoint: "127.0.0.1:{query_grpc}"}}
receivers: {{otlp: {{protocols: {{http: {{endpoint: "127.0.0.1:{http}"}}}}}}}}
exporters: {{jaeger_storage_exporter: {{trace_storage: some}}}}
service:
  extensions: [jaeger_storage, jaeger_query]
  pipelines: {{traces: {{receivers: [otlp], exporters: [jaeger_storage_exporter]}}}}
  telemetry: {{metrics: {{level: none}}}}
"""
WRITTEN = {"none": bytes, "gzip": partial(gzip.compress, compresslevel=1)}
"""What a body is made of its bytes by, as the exporter would."""


def binary(name: str) -> str | None:
    return shutil.which(name)


def payloads_of(stages: int) -> list[ExportTraceServiceRequest]:
    with closing(Receiver()) as receiver:
        sent = record(receiver.endpoint, "none", stages)
    return [ExportTraceServiceRequest.FromString(body) for body in sent.payloads]


class Load:
    """What is sent in each round."""

    def __init__(self, stages: int) -> None:
        self.requests = payloads_of(stages)
        groups = (group for request in self.requests for group in request.resource_spans)
        self._spans = [span for group in groups for scope in group.scope_spans for span in scope.spans]
        self.spans, self.traces = len(self._spans), len({span.trace_id for span in self._spans})
        assert (self.spans, self.traces) == (stages * SPANS_A_STAGE, stages // STAGES_A_REQUEST)
        self._round = 0

    def bodies(self, compression: str) -> list[bytes]:
        """Return the requests with trace ids that were in none before."""
        self._round += 1
        change = (self._round ^ (self._round - 1)) << 96
        for span in self._spans:
            span.trace_id = (int.from_bytes(span.trace_id, "big") ^ change).to_bytes(16, "big")
        return [WRITTEN[compression](request.SerializeToString()) for request in self.requests]


def post(endpoint: str, bodies: list[bytes], compression: str) -> None:
    """Send all of them, over some connections at once, and see that each is taken."""
    headers = {"Content-Type": "application/x-protobuf"}
    if compression != "none":
        headers["Content-Encoding"] = compression

    def send(part: list[bytes]) -> None:
        with requests.Session() as session:
            for body in part:
                session.post(endpoint + PATH, data=body, headers=headers, timeout=60).raise_for_status()

    with ThreadPoolExecutor(CONNECTIONS) as threads:
        list(threads.map(send, (bodies[first::CONNECTIONS] for first in range(CONNECTIONS))))


def ports(*names: str) -> dict[str, int]:
    with ExitStack() as probes:
        opened = [probes.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in names]
        return {name: probe.getsockname()[1] for name, probe in zip(names, opened, strict=True)}


@contextmanager
def started(command: list[str], port: int) -> Iterator[tuple[str, int]]:
    """Run a server; yield its endpoint, once it listens, and its process id."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.terminate()


def collector(where: dict[str, int], sink: Sink, *changes: str) -> list[str]:
    reader = f"{{pull: {{exporter: {{prometheus: {{host: 127.0.0.1, port: {where['own']}}}}}}}}}"
    changes = (
        f"receivers::otlp::protocols::grpc::endpoint: 127.0.0.1:{where['grpc']}",
        f"receivers::otlp::protocols::http::endpoint: 127.0.0.1:{where['http']}",
        f"exporters::prometheus::endpoint: 127.0.0.1:{where['metrics']}",
        f"exporters::otlp_grpc/jaeger::endpoint: 127.0.0.1:{sink.port}",
        f"service::telemetry::metrics::readers: [{reader}]",
        *changes,
    )
    return [binary("otelcol") or "", f"--config={CONFIG}", *(f"--config=yaml:{change}" for change in changes)]


def decided(port: int) -> float:
    """How many traces the Collector has kept or left out."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    name = "otelcol_processor_tail_sampling_global_count_traces_sampled"
    return sum(float(value) for value in re.findall(rf"^{name}(?:_total)?{{.*}} (\S+)$", text, re.MULTILINE))


def measure(load: Load, compression: str, server: Any, done: Callable[[], bool]) -> dict[str, float]:
    """Send a round to a server that was just started, and return what that cost it."""
    bodies = load.bodies(compression)
    with server as (endpoint, pid):
        before_s, before_mb, start = cpu_s(pid), peak_mb(pid), time.monotonic()
        post(endpoint, bodies, compression)
        taken_s = time.monotonic() - start
        # A Collector that is asked for its counters has more to do, so it is asked once a second.
        while not done():
            time.sleep(PAUSE_S)
        return {
            "spans_a_second": load.spans / taken_s,
            "cpu_s_per_million_spans": (cpu_s(pid) - before_s) / load.spans * 1e6,
            "peak_mb": peak_mb(pid),
            "bytes_held_a_span": (peak_mb(pid) - before_mb) * 1e6 / load.spans,
        }


def through_rotel(load: Load, compression: str) -> dict[str, float]:
    with closing(Sink()) as sink:
        server = rotel(f"http://127.0.0.1:{sink.port}", "grpc")
        return measure(load, compression, server, lambda: sink.spans() >= load.spans)


def through_collector(load: Load, compression: str) -> dict[str, float]:
    where = ports("grpc", "http", "metrics", "own")
    with closing(Sink()) as sink:
        command = collector(where, sink, "service::pipelines::traces::processors: [memory_limiter, batch]")
        return measure(load, compression, started(command, where["http"]), lambda: sink.spans() >= load.spans)


def chosen_by_collector(load: Load, compression: str) -> dict[str, float]:
    where = ports("grpc", "http", "metrics", "own")
    with closing(Sink()) as sink:
        command = collector(where, sink)
        return measure(load, compression, started(command, where["http"]), lambda: decided(where["own"]) >= load.traces)


def stored_by_jaeger(load: Load, compression: str) -> dict[str, float]:
    where = ports("http", "query", "query_grpc")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "jaeger.yaml"
        path.write_text(JAEGER.format(**where))
        command = [binary("jaeger") or "", f"--config={path}"]
        return measure(load, compression, started(command, where["http"]), lambda: True)


WAYS = {
    "rotel passes on": ("rotel", through_rotel),
    "Collector passes on": ("otelcol", through_collector),
    "Collector chooses": ("otelcol", chosen_by_collector),
    "Jaeger stores": ("jaeger", stored_by_jaeger),
}


def built_from(name: str, module: str) -> str:
    """The version of a module in a program of Go, as Go finds it there: a program that one builds says none itself."""
    if not (command := binary(name)):
        return "missing"
    if not shutil.which("go"):
        return "unknown"
    done = subprocess.run(["go", "version", "-m", command], capture_output=True, text=True, timeout=60, check=False)
    found = re.search(rf"\s{module}\s+v(\S+)", done.stdout)
    return found.group(1) if found else "unknown"


def main() -> None:
    options = arguments(__doc__).parse_args()
    stages, rounds = (7_000, 1) if options.quick else (140_000, 5)
    there = {"rotel": find_spec("rotel"), "otelcol": binary("otelcol"), "jaeger": binary("jaeger")}
    load = Load(stages)
    cases = {
        f"{way}, {compression}": partial(function, load, compression)
        for way, (name, function) in WAYS.items()
        if there[name]
        for compression in WRITTEN
    }
    raw = interleave(cases, rounds, warmup=0)
    figures = {case: {name: median([each[name] for each in raw[case]]) for name in raw[case][0]} for case in cases}
    headers = ["", "spans per second", "CPU s per million spans", "peak MB", "bytes held per span"]
    print(table(headers, [[case, *map(float, found.values())] for case, found in figures.items()]))
    save(
        "backends",
        options.out,
        versions={
            "rotel": version("rotel") if there["rotel"] else "missing",
            "otelcol": built_from("otelcol", "go.opentelemetry.io/collector/otelcol"),
            "jaeger": built_from("jaeger", "github.com/jaegertracing/jaeger"),
        },
        spans=load.spans,
        figures=figures,
        rounds=raw,
    )


if __name__ == "__main__":
    main()
