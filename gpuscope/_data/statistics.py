"""
`Statistics`: the account of one moment, as `gpuscope.statistics()` returns it.

Data; it counts nothing itself.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, slots=True)
class Statistics:
    """
    What became of every stage since recording started: recorded = exported + dropped + lost + pending.

    Counts are of stages; dictionaries count them by reason.
    """

    recorded: int
    exported: int
    pending: int
    dropped: dict[str, int]
    """Never meant to be exported (not sampled, for example), or refused because the queue was full."""
    lost: dict[str, int]
    """Should have been exported and will not be."""
    untimed: dict[str, int]
    """Went out without GPU times although a GPU is in use. They are counted above as well."""
    clock_uncertainty_ns: int | None
    """How far off GPU times may be, plus or minus: half the bracket of the latest anchor, the largest over the GPUs.
    None before the first anchor."""
    exporters: tuple[str, ...]
    graph_stages: dict[str, int] = field(default_factory=dict)
    """Stages in captures of CUDA graphs: `timed` for those that each replay times, or the reason why it does not."""
    elided: dict[str, int] = field(default_factory=dict)
    """Stages that `torch.compile` left out of what it compiled: how often it traced each, by file, line and function,
    in the whole process. Not part of `recorded`: nothing of them runs."""

    @property
    def missing(self) -> dict[str, int]:
        """What should have been exported and was not, by reason: the lost, and those that found no room."""
        full = {reason: count for reason, count in self.dropped.items() if reason == "queue_full" and count}
        return {**self.lost, **full}

    def as_dict(self) -> dict[str, object]:
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
