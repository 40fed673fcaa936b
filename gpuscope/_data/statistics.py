"""
`Statistics`: the account of one moment, as `gpuscope.statistics()` returns it.

Data; it counts nothing itself.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Statistics:
    """
    What became of every stage since recording started: recorded = exported + dropped + lost + pending.

    `dropped` counts by reason what was never to be exported or found the queue full; `lost` what should have been
    exported; `untimed` what went out without GPU times (it has another fate besides).
    """

    recorded: int
    exported: int
    pending: int
    dropped: dict[str, int]
    lost: dict[str, int]
    untimed: dict[str, int]
    clock_uncertainty_ns: int | None
    """Half the bracket of the latest anchor, the largest over the GPUs; None before the first."""
    exporters: tuple[str, ...]
    graph_stages: dict[str, int] = field(default_factory=dict)
    """Stages in captures of CUDA graphs: `timed` in each replay, or why they are not."""
    elided: dict[str, int] = field(default_factory=dict)
    """Stages that `torch.compile` left out of what it compiled: how often it traced each, by file, line and function.
    Of the whole process. They are not among the recorded, for there is nothing left that could be."""

    def as_dict(self) -> dict[str, Any]:
        """Return the same as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        """Say it in one line."""
        parts = [f"recorded {self.recorded}", f"exported {self.exported}", f"pending {self.pending}"]
        for name in ("dropped", "lost", "untimed"):
            counts = getattr(self, name)
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
            parts.append(f"{name} {sum(counts.values())}" + (f" ({reasons})" if reasons else ""))
        if self.graph_stages:
            counts = ", ".join(f"{reason} {count}" for reason, count in sorted(self.graph_stages.items()))
            parts.append(f"in graphs {counts}")
        if self.elided:
            parts.append(f"compiled away at {len(self.elided)} places")
        if self.clock_uncertainty_ns is not None:
            parts.append(f"GPU clock within {self.clock_uncertainty_ns / 1e3:.1f} µs")
        return ", ".join(parts)
