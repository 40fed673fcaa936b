"""
The parts that the time of a request is divided into, and what is said of one request and of a kind.

Nothing here acts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpuscope.analysis._plain import Plain

QUEUE, BATCH = "queue", "waiting for the batch"
BEFORE, AFTER, BETWEEN = "before the token", "after the batch", "between processes"
OWN, OTHERS = "own share of the GPU", "the others' share"
COPIES, GPU, HOST, UNEXPLAINED = "copies", "waiting for the GPU", "host in stages", "unexplained"
GARBAGE, COMPILE = "garbage collection", "compile"
PARTS = (BEFORE, QUEUE, BATCH, GPU, OWN, OTHERS, COPIES, HOST, GARBAGE, COMPILE, AFTER, BETWEEN, UNEXPLAINED)
"""In the order in which a request usually meets them."""
MEANS = {
    BEFORE: "until it had its token",
    QUEUE: "other batches or requests ran there",
    BATCH: "none of them ran",
    GPU: "its work was launched, others' ran",
    OWN: "its work; its share of its batches",
    OTHERS: "the rest of its batches",
    COPIES: "stages that say how many `bytes`",
    HOST: "its own, and its batches",
    GARBAGE: "Python's, while the host was at it",
    COMPILE: "`torch.compile`",
    AFTER: "until its own stage ended",
    BETWEEN: "in no stage of either",
    UNEXPLAINED: "as far as stages show",
}


@dataclass(frozen=True)
class InBatch:
    """One batch that worked for a request, or all steps of a generation. Times are in milliseconds."""

    name: str
    size: int
    runs: int
    gpu_ms: float
    share_ms: float


@dataclass(frozen=True)
class Latency:
    """Where the time of a request went."""

    row: int
    name: str
    trace_id: str
    start_ns: int
    whole_ns: int
    parts: Mapping[str, int]
    """Nanoseconds by part, all of `PARTS` in their order; they add up to `whole_ns`."""
    stages: Mapping[str, int]
    """`HOST` by the stage's name, the longest first."""
    unclear: Mapping[str, int]
    """What of `UNEXPLAINED` is in a stage that either worked on the host or waited for the GPU: by its name."""
    batches: tuple[InBatch, ...]

    def as_dict(self) -> dict[str, Plain]:
        """Return it as plain data, for JSON; times are in milliseconds."""
        return {
            "name": self.name,
            "trace_id": self.trace_id,
            "start_ns": self.start_ns,
            "whole_ms": self.whole_ns / 1e6,
            "parts_ms": {part: ns / 1e6 for part, ns in self.parts.items()},
            "stages_ms": {name: ns / 1e6 for name, ns in self.stages.items()},
            "batches": [vars(each).copy() for each in self.batches],
        }


@dataclass(frozen=True)
class OfKind:
    """Where the time of a kind of request goes: means over its requests."""

    name: str
    requests: int
    """That this is of: evenly over the recording, `MOST` at most, without warm-up if there are others."""
    whole_ms: float
    parts_ms: Mapping[str, float]

    def as_dict(self) -> dict[str, Plain]:
        """Return it as plain data, for JSON."""
        return {
            "name": self.name,
            "requests": self.requests,
            "whole_ms": self.whole_ms,
            "parts_ms": dict(self.parts_ms),
        }
