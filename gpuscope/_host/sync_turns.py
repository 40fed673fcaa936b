"""
A watch for hidden synchronisations now and then: for a share of the time, at moments without a rhythm.

The collector begins and ends it in its passes. If there is no further pass, the first call that is seen after its time
ends it.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

from gpuscope._host.syncs import Syncs, watch
from gpuscope._log import later
from gpuscope._recording.state import state
from gpuscope._settings.host import seconds_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._host.sync_calls import Sync
    from gpuscope._host.sync_watch import SyncWatch
    from gpuscope._recording.recorder import Recorder

_MOST_PLACES = 256
"""Lines that are told of; the attributes of stages have the others."""
_LATE_S = 5.0
"""A watch that no pass has ended by then ends itself."""


class SyncTurns:
    """
    Takes turns.

    Args:
        share: what `GPUSCOPE_SYNCS` says.
        watch: wraps and listens.
        clock: seconds, monotonic.
        tell: is given a line for each place that is new.

    """

    def __init__(
        self,
        share: str,
        *,
        watch: SyncWatch = watch,
        clock: Callable[[], float] = time.monotonic,
        tell: Callable[..., None] = later,
    ) -> None:
        self._on_s, self._every_s = seconds_of(share)
        self._watch, self._clock, self._tell = watch, clock, tell
        self._random = random.Random()  # noqa: S311 - not the program's, which may have seeded that
        self._syncs: Syncs | None = None
        self._told: set[tuple[str, int, str]] = set()
        self._due_s = clock() + self._pause_s()

    def _pause_s(self) -> float:
        rest_s = self._every_s - self._on_s
        return self._random.uniform(0.5, 1.5) * rest_s if rest_s else 0.0

    def poll(self, _: Recorder | None = None) -> None:
        """Begin or end a turn if it is time: a microsecond where it is not."""
        now_s = self._clock()
        if now_s < self._due_s:
            return
        if self._syncs is None:
            if state.recorder is not None and not (state.graphs is not None and state.graphs.quiet.is_capturing):
                until_s = now_s + self._on_s + _LATE_S
                # Without PyTorch's warnings: they would reach a program that has filters of its own.
                self._syncs, self._due_s = Syncs(self._watch, until_s=until_s, listens=False), now_s + self._on_s
                self._syncs.__enter__()
        else:
            syncs, self._syncs, self._due_s = self._syncs, None, now_s + self._pause_s()
            syncs.__exit__(None, None, None)
            self._say(syncs)

    def _say(self, syncs: list[Sync]) -> None:
        for each in syncs:
            key = (each.file, each.line, each.operation)
            if key not in self._told and len(self._told) < _MOST_PLACES:
                self._told.add(key)
                self._tell("the host waits for the GPU or copies pageable memory: %s.", each)
