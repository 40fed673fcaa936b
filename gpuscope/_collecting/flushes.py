"""
Flushes: somebody waits, on another thread, until what has ended so far is exported.

Decides when a flush is over and whether it succeeded; the work itself is the collector's.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from gpuscope._collecting.gates import Gate

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._collecting.intake import Intake

_GIVING_UP_S = 1.0
"""The most that it may take to let stages go out without GPU times; it takes milliseconds."""


class Flush:
    """What somebody waits for."""

    def __init__(self, deadline_s: float, until_ns: int, *, send: bool, give_up: bool) -> None:
        self.deadline_s = deadline_s
        self.until_ns = until_ns
        """Covers the stages that had ended by then, on the records' clock."""
        self.send = send
        self.give_up = give_up
        """Whether stages whose GPU work has not ended at the deadline go out without GPU times."""
        self.done = Gate()
        self.succeeded = False

    def remaining_s(self) -> float:
        """Return what is left of its time."""
        return max(0.0, self.deadline_s - time.monotonic())


class Flushes:
    """
    Those that are waited for.

    Args:
        intake: knows what is in a batch already.
        clock: that of the records.
        wake: has the collector come.
        export: hands the batch so far to the exporters.
        send: has the exporters send what they hold, within the time that remains; returns whether they did.
        pass_on: the same for what goes past the application's provider.
        missing: returns how many stages should have been exported so far and were not.

    """

    def __init__(
        self,
        intake: Intake,
        *,
        clock: Callable[[], int],
        wake: Callable[[], object],
        export: Callable[[], None],
        send: Callable[[Callable[[], float]], bool],
        pass_on: Callable[[Callable[[], float]], bool],
        missing: Callable[[], int],
    ) -> None:
        self._intake = intake
        self._clock, self._wake = clock, wake
        self._export, self._send, self._pass_on, self._missing = export, send, pass_on, missing
        self._waiting: list[Flush] = []
        self._hand_over_by_s = float("inf")
        self._missing_before = 0
        """As it was at the last flush that sent."""

    def __bool__(self) -> bool:
        """Tell whether anybody waits."""
        return bool(self._waiting)

    def wait(self, timeout_s: float, *, send: bool) -> bool:
        """Have everything that has ended resolved and, with `send`, exported; return whether that was done in time."""
        flush = self.ask(timeout_s, send=send)
        return flush.done.wait(timeout_s) and flush.succeeded

    def hand_over(self, timeout_s: float, share: float, by_s: float | None) -> bool:
        """
        Have everything handed to the exporters, after a share of the time also without GPU times.

        What goes past the application's provider is sent as well. Returns whether all that was done in time.

        Args:
            timeout_s: how long that may take.
            share: of the time.
            by_s: by when at the latest, on the clock `monotonic`, also whenever this is called again.

        """
        self._hand_over_by_s = by_s or self._hand_over_by_s
        timeout_s = min(timeout_s, self._hand_over_by_s - time.monotonic())
        if timeout_s <= 0:
            return False
        flush = self.ask(share * timeout_s, send=False, give_up=True)
        return flush.done.wait(timeout_s) and flush.succeeded

    def ask(self, timeout_s: float, *, send: bool, give_up: bool = False) -> Flush:
        """Have a flush served, and do not wait for it."""
        flush = Flush(time.monotonic() + timeout_s, self._clock(), send=send, give_up=give_up)
        self._waiting.append(flush)
        self._wake()
        return flush

    def serve(self, *, may_ask: bool) -> None:
        """End those that are over. For the collector's thread, in each pass."""
        before = self._missing_before
        for flush in list(self._waiting):
            done = self._intake.is_past(flush.until_ns)
            if not done and flush.remaining_s():
                continue
            self._waiting.remove(flush)
            while not done and flush.give_up and time.monotonic() < flush.deadline_s + _GIVING_UP_S:
                self._intake.slice(may_ask=may_ask, give_up=True)
                done = self._intake.is_past(flush.until_ns)
            missing = self._missing()
            self._export()
            if flush.send:
                done &= self._send(flush.remaining_s)
                self._missing_before = self._missing()
                # What was lost since the last flush is not exported, whether it was lost now or a while ago.
                done &= self._missing_before == before
            elif flush.give_up:
                done &= self._pass_on(flush.remaining_s) and self._missing() == missing
            flush.succeeded = done
            flush.done.open()

    def end(self) -> None:
        """Let go of those who wait: nothing more will come."""
        for flush in self._waiting:
            flush.done.open()
