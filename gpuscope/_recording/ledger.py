"""
The account of every stage: exported, dropped, lost by reason, or still with an exporter.

Counts, and has queues drained and given up under its lock, so that every stage is in one place whenever somebody asks.
It owns no queue and calls no exporter. Application threads come here only when something failed, which is
rare, and for stages in a capture of a CUDA graph, which are counted there (`graph_stage`); never on the common path.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from gpuscope._data.statistics import NOTHING_OBSERVED, Delivery, LookedStage, Observed, Statistics
from gpuscope._recording.batches.account import Faults, SharedSpans
from gpuscope._recording.dynamo import elisions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")

_MOST_LOOKED = 200
"""Stages of deep looks that are kept."""


class Waiting(Protocol):
    """A queue in front of the collector, as the account sees it."""

    @property
    def stages(self) -> int:
        """How many stages wait in it."""

    @property
    def refused(self) -> int:
        """How many stages it has refused since the start."""

    def give_up(self) -> int:
        """Remove everything, unread, and return how many stages that were."""


class Ledger:
    """
    Counts what becomes of stages. Thread-safe.

    A stage is in a queue, then with the collector, then with the exporters, and in the end exported, dropped or lost.
    """

    def __init__(self) -> None:
        # Re-entrant, because a signal handler may ask for statistics while its own thread does.
        self._lock = threading.RLock()
        self._counting = False
        self._notes: deque[tuple[Counter[str], str, int]] = deque()
        """What application threads have noted, until it is counted. They wait for no lock."""
        self._exported = 0
        self._with_collector = 0
        self._with_exporters = 0
        self._dropped: Counter[str] = Counter()
        self._lost: Counter[str] = Counter()
        self._untimed: Counter[str] = Counter()
        self._graph_stages: Counter[str] = Counter()
        self._stalls: Counter[str] = Counter()
        self._closed = False
        self.shared, self.faults = SharedSpans(), Faults()
        self._looks: dict[tuple[str, str], LookedStage] = {}
        self._look_counts: Counter[str] = Counter()

    def take(self, drain: Callable[[], list[T]], stages_in: Callable[[list[T]], int] = len) -> list[T]:
        """
        Move stages from a queue to the collector, in one step as far as `statistics` can see.

        Args:
            drain: takes items out of the queue and returns them.
            stages_in: returns how many stages are in those items.

        """
        with self._lock:
            self._count_notes()
            taken = drain()
            self._with_collector += stages_in(taken)
        return taken

    def drop(self, reason: str, stages: int = 1) -> None:
        """Count stages that are with the collector and are not meant to be exported."""
        with self._lock:
            if not self._closed:
                self._with_collector -= stages
                self._dropped[reason] += stages

    def lose(self, reason: str, stages: int = 1) -> None:
        """Count stages that are with the collector, should have been exported and will not be."""
        with self._lock:
            if stages and not self._closed:
                self._with_collector -= stages
                self._lost[reason] += stages

    def fail(self, reason: str) -> None:
        """Count a stage that never reached the queue."""
        self._note(self._lost, reason, 1)

    def untimed(self, reason: str, stages: int = 1) -> None:
        """Count stages that go out without GPU times although a GPU is in use. Their fate is counted as well."""
        self._note(self._untimed, reason, stages)

    def refuse(self, reason: str, stages: int) -> None:
        """Count stages that will never reach the collector."""
        self._note(self._dropped, reason, stages)

    def graph_stage(self, reason: str, stages: int = 1) -> None:
        """Count stages in a capture by what comes of them in replays. They are also counted as any other stage is."""
        self._note(self._graph_stages, reason, stages)

    def stall(self, kind: str) -> None:
        """Count a stage that makes no progress; what becomes of it is counted as well."""
        self._note(self._stalls, kind, 1)

    def look(self, outcome: str, stages: Iterable[LookedStage] = ()) -> None:
        """Add what one deep look saw of each stage, and count what became of it."""
        with self._lock:
            self._look_counts[outcome] += 1
            for each in stages:
                key = each.root, each.stage
                if key in self._looks or len(self._looks) < _MOST_LOOKED:
                    self._looks[key] = _added(self._looks.get(key), each)

    def _note(self, counter: Counter[str], reason: str, stages: int) -> None:
        self._notes.append((counter, reason, stages))

    def _count_notes(self) -> None:
        """Count what was noted, under the lock; the collector does it in every pass."""
        if self._counting:  # By this very thread, further down its stack.
            return
        try:
            self._counting = True
            for _ in range(len(self._notes)):  # Not until there are none: others go on noting.
                counter, reason, stages = self._notes.popleft()
                counter[reason] += stages
        finally:
            self._counting = False

    def deliver(self, stages: int, exporters: int) -> Delivery:
        """Move stages from the collector to a number of exporters."""
        with self._lock:
            if not self._closed:
                self._with_collector -= stages
                self._with_exporters += stages
        return Delivery(self._settle, stages, exporters)

    def close(self, reason: str, *queues: Waiting) -> None:
        """Count all stages that are still on their way as lost, and ignore what is reported later."""
        with self._lock:
            waiting = sum(queue.give_up() for queue in queues)
            stranded = waiting + self._with_collector + self._with_exporters
            self._with_collector = self._with_exporters = 0
            self._closed = True
            if stranded:
                self._lost[reason] += stranded
            self.shared.close(reason)

    def statistics(
        self,
        *queues: Waiting,
        exporters: tuple[str, ...] = (),
        route: str = "",
        observed: Observed = NOTHING_OBSERVED,
    ) -> Statistics:
        """Return the account of this moment; stages that wait in the queues are pending."""
        with self._lock:
            self._count_notes()
            pending = sum(queue.stages for queue in queues) + self._with_collector + self._with_exporters
            dropped = self._dropped + Counter({"queue_full": sum(queue.refused for queue in queues)})
            return Statistics(
                recorded=self._exported + sum(dropped.values()) + sum(self._lost.values()) + pending,
                exported=self._exported,
                pending=pending,
                dropped=dict(dropped),
                lost=dict(self._lost),
                untimed=dict(self._untimed),
                exporters=exporters,
                route=route,
                graph_stages=dict(self._graph_stages),
                elided=dict(elisions.places),
                **observed._asdict(),
                shared_spans=self.shared.counts(),
                batch_faults=self.faults.counts(),
                stalls=dict(self._stalls),
                looks=tuple(self._looks.values()),
                look_counts=dict(self._look_counts),
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


def _added(before: LookedStage | None, more: LookedStage) -> LookedStage:
    if before is None:
        return more
    sums = {each.name: getattr(before, each.name) + getattr(more, each.name) for each in fields(LookedStage)[2:]}
    return replace(before, **sums)
