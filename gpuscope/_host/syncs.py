"""
`watch_syncs`: a block that finds lines which wait for the GPU or copy pageable memory.

Adds up what the watch notes; the watch itself is in `sync_watch.py`.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from gpuscope._host.sync_calls import Sync
from gpuscope._host.sync_watch import SyncWatch

if TYPE_CHECKING:
    from types import TracebackType

_MOST = 65_536
"""Calls that are kept until they are added up; of more the oldest are left out, and counted."""


class Syncs(list[Sync]):
    """
    What was found: one entry per line, stage and kind of call, filled when the block ends.

    `lost` says how many calls found no room.

    Args:
        watch: finds them.
        until_s: of `time.monotonic`; what is found later ends the watch. None for never.
        listens: whether PyTorch is to warn of waits, too, which changes filters of warnings meanwhile.

    """

    def __init__(self, watch: SyncWatch, *, until_s: float | None = None, listens: bool = True) -> None:
        super().__init__()
        self.listens = listens
        self._until_s = until_s
        self.lost = 0
        self._watch = watch
        self._calls: deque[tuple[Any, ...]] = deque(maxlen=_MOST)
        self._count = itertools.count()

    def take(self, found: tuple[Any, ...]) -> None:
        """Put one call down, on any thread."""
        if self._until_s is not None and time.monotonic() > self._until_s:
            self._watch.stop(self)
            return
        next(self._count)
        self._calls.append(found)

    def __enter__(self) -> Syncs:  # noqa: PYI034 - nobody derives from it
        self._watch.start(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.stop(self)
        self.gather()

    def gather(self) -> None:
        """Add up what was put down so far."""
        sums: dict[tuple[Any, ...], list[Any]] = {}
        calls = list(self._calls)
        for *key, moved, took_ns in calls:
            each = sums.setdefault(tuple(key), [0, 0, 0])
            each[0] += 1
            each[1] = None if moved is None or each[1] is None else each[1] + moved
            each[2] += took_ns
        found = [Sync._make((*key, count, moved, ns / 1e9)) for key, (count, moved, ns) in sums.items()]
        self[:] = sorted(found, key=lambda sync: -sync.calls)
        self.lost = next(self._count) - len(calls)


watch = SyncWatch()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=watch.forget)


def watch_syncs() -> Syncs:
    """
    Find lines that make the host wait for the GPU or copy pageable memory, within a block; on all threads.

    The list is filled when the block ends. While it is on, calls of `.item()`, `.cpu()`, `.to()` and their like take
    some microseconds longer. What a compiled region or a CUDA graph does is not looked at.

    Examples:
        `with gpuscope.watch_syncs() as found: serve(request)`, and then `assert not found`

    """
    return Syncs(watch)
