"""Fixtures for the tests of back ends: a Jaeger of our own, with spans in memory, and what it answers."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import pytest

from ..spans_of_files import wait_for

CONFIGURATION = """
service:
  extensions: [jaeger_storage, jaeger_query]
  pipelines:
    traces: {{receivers: [otlp], exporters: [jaeger_storage_exporter]}}
  telemetry:
    metrics: {{level: none}}
extensions:
  jaeger_query:
    storage: {{traces: memory}}
    http: {{endpoint: "127.0.0.1:{query}"}}
    grpc: {{endpoint: "127.0.0.1:{query_grpc}"}}
  jaeger_storage:
    backends:
      memory: {{memory: {{max_traces: 10000}}}}
receivers:
  otlp:
    protocols:
      http: {{endpoint: "127.0.0.1:{http}"}}
      grpc: {{endpoint: "127.0.0.1:{grpc}"}}
exporters:
  jaeger_storage_exporter: {{trace_storage: memory}}
"""
"""What `jaeger` does without a file, but for ports of our own, and spans that are there as soon as they are taken."""


@dataclass
class Span:
    """One span: as a file of OTLP lines has it, or one of Jaeger's answers. Times are in the unit of its source."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start: int
    end: int
    attributes: dict[str, tuple[str, Any]]
    """Each with its type."""
    events: list[tuple[int, str, dict[str, Any]]]
    links: list[tuple[str, str]]
    """Trace and span."""
    process: dict[str, tuple[str, Any]]
    error: bool
    scope: str
    warnings: list[str] = field(default_factory=list)


class Jaeger:
    """
    A running Jaeger: where it takes spans, and questions to it.

    Args:
        ports: on loopback, by name.
        knows_hosts: whether its page, too, tells by `host.name` which spans are of one host, as from Jaeger 2.15 on.
            Before, only `/api/v3` did, and the page warns of the clock of every span that ends after its parent.

    """

    def __init__(self, ports: dict[str, int], *, knows_hosts: bool) -> None:
        self._knows_hosts = knows_hosts
        self.http, self.grpc = (f"http://127.0.0.1:{ports[name]}" for name in ("http", "grpc"))
        self._query = f"http://127.0.0.1:{ports['query']}"

    def variables(self, protocol: str, **others: str) -> dict[str, str]:
        """Return the variables by which a program sends its spans here."""
        endpoint = self.grpc if protocol == "grpc" else self.http
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol, **others}

    def ask(self, path: str, **query: object) -> Any:
        """Return an answer, or None where there is none yet."""
        try:
            with urllib.request.urlopen(f"{self._query}{path}?{urlencode(query)}", timeout=10) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    def shown(self, service: str, count: int) -> list[Span]:
        """Return a service's spans in order of their starts, as the web page gets them, once there are so many."""

        def all_of_them() -> list[Span] | None:
            traces = self.ask("/api/traces", service=service, limit=1000)["data"]
            spans = [span for trace in traces for span in _spans_shown(trace)]
            if not self._knows_hosts:
                for span in spans:
                    span.warnings = [text for text in span.warnings if not text.startswith("clock skew")]
            return spans if len(spans) >= count else None

        return sorted(wait_for(all_of_them, seconds=30), key=lambda span: (span.start, span.name.endswith("[gpu]")))

    def kept(self, trace_ids: set[str]) -> list[Span]:
        """Return the spans of these traces as OTLP, which says all that Jaeger keeps."""
        return [span for name in trace_ids for span in spans_of_otlp(self.ask(f"/api/v3/traces/{name}")["result"])]


def spans_of_otlp(message: dict[str, Any]) -> list[Span]:
    """Return the spans of a message in OTLP's JSON, with times in nanoseconds."""
    return [
        Span(
            name=span["name"],
            trace_id=span["traceId"],
            span_id=span["spanId"],
            parent_id=span.get("parentSpanId", ""),
            start=int(span["startTimeUnixNano"]),
            end=int(span["endTimeUnixNano"]),
            attributes=_typed(span),
            events=[(int(e["timeUnixNano"]), e["name"], _typed(e)) for e in span.get("events", ())],
            links=[(link["traceId"], link["spanId"]) for link in span.get("links", ())],
            process=_typed(group["resource"]),
            error=span.get("status", {}).get("code") == 2,
            scope=scope["scope"]["name"],
        )
        for group in message.get("resourceSpans", ())
        for scope in group["scopeSpans"]
        for span in scope["spans"]
    ]


def _typed(holder: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    found = {}
    for entry in holder.get("attributes", ()):
        ((kind, value),) = entry["value"].items()
        found[entry["key"]] = kind, int(value) if kind == "intValue" else value
    return found


def _spans_shown(trace: dict[str, Any]) -> list[Span]:
    found = []
    for span in trace["spans"]:
        process = trace["processes"][span["processID"]]
        tags = {tag["key"]: (tag["type"], tag["value"]) for tag in span["tags"]}
        references = [(each["refType"], each["traceID"], each["spanID"]) for each in span["references"]]
        found.append(
            Span(
                name=span["operationName"],
                trace_id=span["traceID"],
                span_id=span["spanID"],
                parent_id=next((name for kind, _, name in references if kind == "CHILD_OF"), ""),
                start=span["startTime"],
                end=span["startTime"] + span["duration"],
                attributes=tags,
                events=[_log(entry) for entry in span["logs"]],
                links=[(trace_id, name) for kind, trace_id, name in references if kind == "FOLLOWS_FROM"],
                process={tag["key"]: (tag["type"], tag["value"]) for tag in process["tags"]}
                | {"service.name": ("string", process["serviceName"])},
                error=tags.get("error") == ("bool", True),
                scope=tags["otel.scope.name"][1],
                warnings=[*(trace.get("warnings") or ()), *(span["warnings"] or ())],
            )
        )
    return found


def _log(entry: dict[str, Any]) -> tuple[int, str, dict[str, tuple[str, Any]]]:
    fields = {each["key"]: (each["type"], each["value"]) for each in entry["fields"]}
    return entry["timestamp"], fields.pop("event")[1], fields


@pytest.fixture(scope="module")
def jaeger(tmp_path_factory):
    """A Jaeger for all tests of a module, each of which has a service of its own."""
    binary = os.environ.get("GPUSCOPE_JAEGER") or shutil.which("jaeger")
    if binary is None:
        pytest.skip("needs Jaeger 2: `jaeger` on PATH, or its place in GPUSCOPE_JAEGER")
    folder = tmp_path_factory.mktemp("jaeger")
    version = subprocess.run([binary, "version"], capture_output=True, text=True, check=True).stdout
    numbers = re.findall(r"\d+", json.loads(version)["gitVersion"])  # None in a build that was told of none.
    ports = free_ports("http", "grpc", "query", "query_grpc")
    (folder / "jaeger.yaml").write_text(CONFIGURATION.format(**ports))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(
            [binary, f"--config=file:{folder / 'jaeger.yaml'}"], env=kept, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            wait_for(lambda: _listens(process, folder / "log", ports.values()))
            yield Jaeger(ports, knows_hosts=[int(number) for number in numbers] >= [2, 15])
        finally:
            process.terminate()
            process.wait(20)


def free_ports(*names):
    """Ports that were free a moment ago, by name."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in names]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return dict(zip(names, ports, strict=True))


def _listens(process, log, ports):
    assert process.poll() is None, log.read_text()
    try:
        for port in ports:
            socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
