"""What Jaeger shows of spans, and a fixture that starts it."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from ..spans_of_files import wait_for
from .servers import Jaeger, get

if TYPE_CHECKING:
    from pathlib import Path


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


class Shown(Jaeger):
    """A running Jaeger, and questions to it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        version = json.loads(subprocess.run([self.command[0], "version"], capture_output=True, check=True).stdout)
        # From 2.15 on its page, too, tells by `host.name` which spans are of one host. Before, only `/api/v3` did, and
        # the page warns of the clock of a span that ends after its parent. A build may not know its version.
        self._knows_hosts = [int(number) for number in re.findall(r"\d+", version["gitVersion"])] >= [2, 15]

    def variables(self, protocol: str) -> dict[str, str]:
        """Return the variables by which a program sends its spans here."""
        endpoint = f"http://127.0.0.1:{self.grpc if protocol == 'grpc' else self.http}"
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol}

    def shown(self, service: str, count: int) -> list[Span]:
        """Return a service's spans in order of their starts, as the web page gets them, once there are so many."""

        def all_of_them() -> list[Span] | None:
            traces = json.loads(get(f"{self.api}/traces", service=service, limit=1000))["data"]
            spans = [span for trace in traces for span in _spans_shown(trace)]
            if not self._knows_hosts:
                for span in spans:
                    span.warnings = [text for text in span.warnings if not text.startswith("clock skew")]
            return spans if len(spans) >= count else None

        return sorted(wait_for(all_of_them, seconds=30), key=lambda span: (span.start, span.name.endswith("[gpu]")))

    def kept(self, trace_ids: set[str]) -> list[Span]:
        """Return the spans of these traces as OTLP, which says all that Jaeger keeps."""
        answers = [json.loads(get(f"{self.api}/v3/traces/{trace_id}")) for trace_id in trace_ids]
        return [span for answer in answers for span in spans_of_otlp(answer["result"])]


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
    with Shown(tmp_path_factory.mktemp("jaeger")) as running:
        yield running
