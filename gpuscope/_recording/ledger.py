"""
The account of every stage: exported, dropped, lost by reason, or still with an exporter.

Counts and nothing else. Application threads come here only when something failed, which is rare.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, Protocol, TypeVar

from gpuscope._data.delivery import Delivery
from gpuscope._data.statistics import Statistics
from gpuscope._recording.dynamo import elisions

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Waiting(Protocol):
    """A queue before the collector, as far as the account goes."""

    @property
    def stages(self) -> int:
        """The stages that wait in it."""

    @property
    def refused(self) -> int:
        """The stages that it refused since the start."""

    def give_up(self) -> int:
        """Remove everything, unread, and return how many stages that were."""


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

    def take(self, drain: Callable[[], list[T]], stages_in: Callable[[list[T]], int] = len) -> list[T]:
        """
        Move stages from a queue into the collector's hands: one step, as far as `statistics` can see.

        Args:
            drain: removes what the queue hands over, and returns it.
            stages_in: returns how many stages are in that.

        """
        with self._lock:
            taken = drain()
            self._with_collector += stages_in(taken)
        return taken

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
        return Delivery(self._settle, stages, exporters)

    def close(self, reason: str, *queues: Waiting) -> int:
        """Give up everything that has no fate yet; what is reported later is ignored. Returns how many that were."""
        with self._lock:
            waiting = sum(queue.give_up() for queue in queues)
            stranded = waiting + self._with_collector + self._with_exporters
            self._with_collector = self._with_exporters = 0
            self._closed = True
            if stranded:
                self._lost[reason] += stranded
        return stranded

    def statistics(
        self, *queues: Waiting, uncertainty_ns: int | None = None, exporters: tuple[str, ...] = ()
    ) -> Statistics:
        """Return the account of this moment, with the stages that wait in queues."""
        with self._lock:
            pending = sum(queue.stages for queue in queues) + self._with_collector + self._with_exporters
            dropped = self._dropped + Counter({"queue_full": sum(queue.refused for queue in queues)})
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
