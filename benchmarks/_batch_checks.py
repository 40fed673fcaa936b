"""
Whether what files say of batches is what the program did: for `bench_batches.py`.

Reads the files' JSON itself, and asks gpuscope's own reading only where the time of requests went.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

from _batch_client import trace_of
from _common import percentile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

NEAR_US = 1000
"""The waits have to be as near as this to those by the program's own clock."""


class Span(NamedTuple):
    """One span of a file."""

    name: str
    trace: str
    ident: str
    parent: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    links: list[tuple[str, str]]


def spans_in(folder: Path) -> Iterator[Span]:
    """Yield every span of the files."""
    for path in folder.glob("*.jsonl*"):
        for line in path.read_text().splitlines():
            for group in json.loads(line).get("resourceSpans", ()):
                for scope in group["scopeSpans"]:
                    yield from map(_span, scope["spans"])


def _span(span: dict[str, Any]) -> Span:
    return Span(
        span["name"],
        span["traceId"],
        span["spanId"],
        span.get("parentSpanId", ""),
        int(span["startTimeUnixNano"]),
        int(span["endTimeUnixNano"]),
        {each["key"]: next(iter(each["value"].values())) for each in span["attributes"]},
        [(link["traceId"], link["spanId"]) for link in span.get("links", ())],
    )


class Found:
    """
    The batches of one run.

    Args:
        folder: with the files.
        name: of the batch's stage.

    """

    def __init__(self, folder: Path, name: str) -> None:
        spans = list(spans_in(folder))
        self.batches = {(span.trace, span.ident): span for span in spans if span.name == name}
        self.gpu = {(span.trace, span.parent): span for span in spans if span.name == f"{name} [gpu]"}
        self.light: dict[tuple[str, str], list[Span]] = defaultdict(list)
        for span in spans:
            if span.name == f"{name} (shared)":
                self.light[span.links[0]].append(span)
        self._requests = {(span.trace, span.ident) for span in spans if span.name == "request"}

    def faults(self, ran: list[dict[str, Any]]) -> dict[str, int]:
        """
        Count what is not as it should be, by what it is.

        Args:
            ran: the batches as the model ran them.

        """
        wanted = Counter(tuple(sorted(map(trace_of, batch["items"]))) for batch in ran)
        linked = Counter(tuple(sorted(trace for trace, _ in batch.links)) for batch in self.batches.values())
        light = Counter(span.trace for some in self.light.values() for span in some)
        served = Counter(trace_of(number) for batch in ran for number in batch["items"])
        return {
            "batches that do not link to exactly their requests": _differ(wanted, linked),
            "requests without exactly one light span": _differ(served, light),
            "light spans below another span than their request": sum(
                (span.trace, span.parent) not in self._requests for some in self.light.values() for span in some
            ),
            "light spans that link to no batch": sum(key not in self.batches for key in self.light),
            "batches whose shares do not add up to their GPU time": sum(map(self._off, self.batches)),
        }

    def waits_ns(self) -> dict[str, int]:
        """Return the wait of each member, by its trace."""
        return {
            span.trace: round(span.attributes["gpuscope.batch.wait"] * 1e9)
            for some in self.light.values()
            for span in some
        }

    def _off(self, batch: tuple[str, str]) -> bool:
        """Whether the shares of a batch are not exactly its GPU span's nanoseconds; not of a batch without one."""
        if batch not in self.gpu:
            return False
        span = self.gpu[batch]
        shares = [int(each.attributes["gpuscope.gpu.share"]) for each in self.light[batch]]
        positions = sorted(int(each.attributes["gpuscope.batch.position"]) for each in self.light[batch])
        return sum(shares) != span.end_ns - span.start_ns or positions != list(range(len(shares)))


def _differ(one: Counter[Any], other: Counter[Any]) -> int:
    return (one - other).total() + (other - one).total()


def waits(found: Found, asked_ns: Mapping[int, int], ran: list[dict[str, Any]]) -> dict[str, float]:
    """
    Compare each member's wait with the one by the program's own clock.

    Args:
        found: what the files say.
        asked_ns: by the request's number, when it was about to ask for its batch.
        ran: the batches, and when they began.

    """
    said = found.waits_ns()
    off_us = sorted(
        abs(batch["began_ns"] - asked_ns[number] - said[trace_of(number)]) / 1e3
        for batch in ran
        for number in batch["items"]
        if number in asked_ns and trace_of(number) in said
    )
    near = sum(each <= NEAR_US for each in off_us) / max(1, len(off_us))
    return {"members": len(off_us), "near": near} | {
        f"p{round(100 * share)}_us": percentile(off_us, share) for share in (0.5, 0.9, 0.99, 1.0)
    }


def unexplained(folder: Path) -> dict[str, float]:
    """Return the parts of the requests that batches worked for, each as a part of their whole time."""
    from gpuscope.analysis.latency.explain import Explainer
    from gpuscope.analysis.read import read

    recording = read([folder])
    explainer = Explainer(recording)
    members = set(recording.root[recording.batches.shares.member].tolist())
    latencies = [explainer.explain(row) for row in explainer.requests().tolist() if row in members]
    whole_ns = sum(each.whole_ns for each in latencies)
    assert all(sum(each.parts.values()) == each.whole_ns for each in latencies)
    names = latencies[0].parts if latencies else ()
    return {name: sum(each.parts[name] for each in latencies) / max(1, whole_ns) for name in names}
