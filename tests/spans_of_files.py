"""What the `file` exporters of several processes have written, and waiting for it."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@dataclass
class Span:
    """A span, and the attributes of the process that it comes from."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    resource: dict[str, Any]
    attributes: dict[str, Any]
    links: list[tuple[str, str]]
    """Trace ids and span ids of what the span links to."""

    @property
    def instance(self) -> str:
        """The `service.instance.id` of its process."""
        return self.resource["service.instance.id"]


def spans_in(folder: Path) -> list[Span]:
    """Every span in a folder's files, by name."""
    found = []
    for path in folder.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):  # The last may be half written.
                found += _spans_of_line(json.loads(line))
    return sorted(found, key=lambda span: (span.name, span.span_id))


def _spans_of_line(line: dict[str, Any]) -> list[Span]:
    return [
        Span(
            span["name"],
            span["traceId"],
            span["spanId"],
            span.get("parentSpanId", ""),
            _attributes(group["resource"]),
            _attributes(span),
            [(link["traceId"], link["spanId"]) for link in span.get("links", ())],
        )
        for group in line.get("resourceSpans", ())
        for scope in group["scopeSpans"]
        for span in scope["spans"]
    ]


def _attributes(holder: dict[str, Any]) -> dict[str, Any]:
    return {entry["key"]: next(iter(entry["value"].values())) for entry in holder["attributes"]}


def wait_for(what: Callable[[], Any], *, seconds: float = 60) -> Any:
    """Return what is asked for once it is there."""
    pause = threading.Event()  # An event that nobody sets is a wait that a test may have.
    for _ in range(int(seconds / 0.02)):
        if answer := what():
            return answer
        pause.wait(0.02)
    return pytest.fail(f"waited {seconds} s in vain")
