"""
The account of every stage: exported, dropped, lost by reason, or still with an exporter.

Counts and nothing else. Application threads come here only when something failed, which is rare.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from gpuscope._replay_queue import ReplayQueue
from gpuscope._tracing import elisions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpuscope._queue import RecordQueue
    from gpuscope._record import StageRecord
    from gpuscope._replay_queue import Replay


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


class Ledger:
    """
    Counts fates. Thread-safe.

    A stage is in the queue, then with the collector, then with the exporters; then exported or lost.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._exported = 0
        self._with_collector = 0
        self._with_exporters = 0
        self._dropped: Counter[str] = Counter()
        self._lost: Counter[str] = Counter()
        self._untimed: Counter[str] = Counter()
        self._graph_stages: Counter[str] = Counter()
        self._closed = False
        self.replays = ReplayQueue()
        """Whose stages wait for the collector as those in the queue do."""

    def take(self, queue: RecordQueue, limit: int) -> list[StageRecord]:
        """Drain the queue into the collector's hands: one step, as far as `statistics` can see."""
        with self._lock:
            records = queue.drain(limit)
            self._with_collector += len(records)
        return records

    def take_replays(self) -> list[Replay]:
        """Do the same with the replays of graphs that wait, for the stages inside them."""
        with self._lock:
            replays = self.replays.drain()
            self._with_collector += sum(len(replay.graph) for replay in replays)
        return replays

    def drop(self, reason: str, stages: int = 1) -> None:
        """Count stages in the collector's hands that are not to be exported."""
        with self._lock:
            if not self._closed:
                self._with_collector -= stages
                self._dropped[reason] += stages

    def lose(self, reason: str, stages: int = 1) -> None:
        """Count stages in the collector's hands that should have been exported and will not be."""
        with self._lock:
            if stages and not self._closed:
                self._with_collector -= stages
                self._lost[reason] += stages

    def fail(self, reason: str) -> None:
        """Count a stage that never reached the queue."""
        with self._lock:
            self._lost[reason] += 1

    def untimed(self, reason: str, stages: int = 1) -> None:
        """Count stages that go out without GPU times though a GPU is in use. They have another fate besides."""
        with self._lock:
            self._untimed[reason] += stages

    def refuse(self, reason: str, stages: int) -> None:
        """Count stages that are never to reach the collector."""
        with self._lock:
            self._dropped[reason] += stages

    def graph_stage(self, reason: str, stages: int = 1) -> None:
        """Count stages in a capture by what comes of them in replays. They have a fate besides, as any stage."""
        with self._lock:
            self._graph_stages[reason] += stages

    def deliver(self, stages: int, exporters: int) -> Delivery:
        """Move stages from the collector's hands into those of a number of exporters."""
        with self._lock:
            if not self._closed:
                self._with_collector -= stages
                self._with_exporters += stages
        return Delivery(self, stages, exporters)

    def close(self, queue: RecordQueue, reason: str) -> int:
        """Give up everything that has no fate yet; what is reported later is ignored. Returns how many that were."""
        with self._lock:
            waiting = len(queue.drain(len(queue))) + self.replays.give_up()
            stranded = waiting + self._with_collector + self._with_exporters
            self._with_collector = self._with_exporters = 0
            self._closed = True
            if stranded:
                self._lost[reason] += stranded
        return stranded

    def statistics(self, queue: RecordQueue, uncertainty_ns: int | None, exporters: tuple[str, ...]) -> Statistics:
        """Return the account of this moment."""
        with self._lock:
            pending = len(queue) + self.replays.stages + self._with_collector + self._with_exporters
            dropped = self._dropped + Counter({"queue_full": queue.refused})
            return Statistics(
                recorded=self._exported + sum(dropped.values()) + sum(self._lost.values()) + pending,
                exported=self._exported,
                pending=pending,
                dropped=dict(dropped),
                lost=dict(self._lost),
                untimed=dict(self._untimed),
                clock_uncertainty_ns=uncertainty_ns,
                exporters=exporters,
                graph_stages=dict(self._graph_stages),
                elided=dict(elisions.places),
            )

    def _settle(self, stages: int, exported: int, reasons: Counter[str]) -> None:
        with self._lock:
            if self._closed:
                return
            self._with_exporters -= stages
            self._exported += exported
            missing = stages - exported
            for reason, count in reasons.most_common():
                share = min(count, missing)
                if share:
                    self._lost[reason] += share
                missing -= share
            if missing:
                self._lost["unaccounted"] += missing


class Delivery:
    """
    One batch on its way through its exporters, each of which calls `settle` exactly once, from any thread.

    A stage counts as exported when at least one exporter delivered it.
    """

    __slots__ = ("_best", "_ledger", "_lock", "_outstanding", "_reasons", "stages")

    def __init__(self, ledger: Ledger, stages: int, exporters: int) -> None:
        self.stages = stages
        self._ledger = ledger
        self._lock = threading.Lock()
        self._outstanding = exporters
        self._best = 0
        self._reasons: Counter[str] = Counter()

    def settle(self, exported: int, lost: Mapping[str, int] | None = None) -> None:
        """Report how many stages of the batch one exporter delivered, and the others by reason."""
        with self._lock:
            if not self._outstanding:
                return
            self._outstanding -= 1
            self._best = max(self._best, exported)
            self._reasons.update(lost or {})
            if self._outstanding:
                return
        self._ledger._settle(self.stages, min(self._best, self.stages), self._reasons)
