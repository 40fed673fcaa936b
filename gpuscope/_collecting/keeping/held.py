"""
Stages that wait until it is known whether their trace is kept: where their rows are, and what was decided before.

Decides nothing and counts nothing. Bounded by whoever holds it: `Held.crowded` tells, and `compact` makes room.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpuscope._collecting.selection import select
from gpuscope._data.batch import SharedColumns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

    from gpuscope._data.batch import StageBatch

UNDECIDED, LEFT_OUT, KEPT, NO_ROOM, NO_END = range(5)
"""What may have been decided of a request or a trace."""
_REMEMBERED = 32_768
"""Decisions are remembered until so many more have come, or twice as many: some 100 bytes each. There are two per
request, so at 1,000 requests a second a stage may end 16 s after its request's decision and still follow it."""
_ROOMY = 0.75
"""Of the bound: this much is left after room was made, so that making it is rare."""


def rows_of(batch: StageBatch, mask: NDArray[np.bool_]) -> StageBatch:
    """Return the rows of a batch, of stages or of light spans, for which the mask holds."""
    if mask.all():
        return batch
    part = select(batch, mask)
    if batch.shared is None:
        return part
    columns = {each.name: getattr(batch.shared, each.name)[mask] for each in fields(SharedColumns)}
    return replace(part, shared=SharedColumns(**columns))


class Decided:
    """What was decided of requests and traces, by their keys: of the newest."""

    def __init__(self, remembered: int = _REMEMBERED) -> None:
        self._remembered = remembered
        self._newer: dict[int, int] = {}
        self._older: dict[int, int] = {}

    def get(self, key: int) -> int:
        """Return what was decided, if that is remembered."""
        return self._newer.get(key) or self._older.get(key, UNDECIDED)

    def among(self, keys: list[int]) -> set[int]:
        """Return those of the keys of which something is remembered."""
        return (self._newer.keys() & keys) | (self._older.keys() & keys)

    def note(self, keys: Iterable[int], decision: int) -> None:
        """Remember a decision."""
        self._newer.update(dict.fromkeys(keys, decision))
        if len(self._newer) >= self._remembered:
            self._newer, self._older = {}, self._newer


class Chunk:
    """Rows of one batch of which some wait."""

    __slots__ = ("batch", "left", "times_ns")

    def __init__(self, batch: StageBatch, times_ns: NDArray[np.int64] | None = None) -> None:
        self.batch, self.times_ns = batch, times_ns
        """The second has two lines: when each row ended on the host, and when it was done, as in `Arrived`."""
        self.left = len(batch.site)
        """How many of the rows still wait."""


class Root(NamedTuple):
    """A request's outermost stage, which has ended. Times in nanoseconds of the records' clock."""

    kind: str
    start_ns: int
    ended_ns: int
    """On the host."""
    warms_up: bool


class Waiting:
    """A request, or what came of a trace without one, that waits; times in nanoseconds of the records' clock."""

    __slots__ = ("born_ns", "came_ns", "end_ns", "ended_ns", "parts", "root", "start_ns", "trace")

    def __init__(self, trace: int, born_ns: int) -> None:
        self.trace = trace
        self.born_ns = self.came_ns = born_ns
        """When its first row came, and its last."""
        self.parts: list[tuple[Chunk, NDArray[np.int64]]] = []
        self.root: Root | None = None
        self.start_ns, self.end_ns = 1 << 62, 0
        """Of its stages so far, on host and GPU."""
        self.ended_ns = 0
        """When the last of them ended on the host."""

    @property
    def size(self) -> int:
        """How many rows wait."""
        return sum(len(rows) for _, rows in self.parts)

    @property
    def root_name(self) -> str:
        """The name of the outermost stage, which may not have ended."""
        chunk, rows = self.parts[0]
        name: str = chunk.batch.sites[chunk.batch.root[rows[0]]].name
        return name

    @property
    def done_ns(self) -> int:
        """When all was done, without stages that outlived the outermost one: they come before the decision or not."""
        if self.root is None or self.ended_ns <= self.root.ended_ns:
            return self.end_ns
        done = [self.root.ended_ns]
        for chunk, rows in self.parts:
            if chunk.times_ns is not None:
                ended_ns, done_ns = chunk.times_ns[:, rows]
                done += done_ns[ended_ns <= self.root.ended_ns].tolist()
        return max(done)


class Held:
    """All that wait, oldest first, by the keys of their requests; by that of its trace what belongs to none."""

    def __init__(self, most_rows: int) -> None:
        self._most_rows = most_rows
        self._waiting: dict[int, Waiting] = {}
        self._by_trace: dict[int, list[int]] = {}
        self._chunks: dict[Chunk, None] = {}
        self._rows = 0
        """Of all chunks, also those that wait no more."""
        self._left = 0
        """Of these, those that wait."""

    def __len__(self) -> int:
        """The requests that wait."""
        return len(self._waiting)

    def __iter__(self) -> Iterator[int]:
        """Go through their keys, oldest first."""
        return iter(self._waiting)

    def get(self, key: int) -> Waiting | None:
        """Return what waits."""
        return self._waiting.get(key)

    def has(self, trace: int) -> bool:
        """Tell whether anything of a trace waits."""
        return trace in self._by_trace

    def traces_among(self, traces: list[int]) -> set[int]:
        """Return those of the traces of which anything waits."""
        return self._by_trace.keys() & traces

    def of_trace(self, trace: int) -> list[int]:
        """Return the keys of what waits of a trace."""
        return list(self._by_trace.get(trace, ()))

    def open(self, key: int, trace: int, born_ns: int) -> Waiting:
        """Return what waits under a key, new or not."""
        waiting = self._waiting.get(key)
        if waiting is None:
            waiting = self._waiting[key] = Waiting(trace, born_ns)
            self._by_trace.setdefault(trace, []).append(key)
        return waiting

    def hold(self, batch: StageBatch, times_ns: NDArray[np.int64] | None) -> Chunk:
        """Hold rows, which the caller then adds to whom they belong to; the times are those of `Chunk`."""
        chunk = Chunk(batch, times_ns)
        self._chunks[chunk] = None
        self._rows += chunk.left
        self._left += chunk.left
        return chunk

    def close(self, key: int) -> Waiting:
        """Take out what waits under a key; the caller takes its rows, now."""
        waiting = self._waiting.pop(key)
        keys = self._by_trace[waiting.trace]
        keys.remove(key)
        if not keys:
            del self._by_trace[waiting.trace]
        for chunk, rows in waiting.parts:
            chunk.left -= len(rows)
            self._left -= len(rows)
            if not chunk.left:
                del self._chunks[chunk]
                self._rows -= len(chunk.batch.site)
        return waiting

    @property
    def is_crowded(self) -> bool:
        """Whether more rows are held than may be."""
        return self._rows > self._most_rows

    def is_roomy(self, target: int | None = None) -> bool:
        """Tell whether few enough rows wait for many to come before room has to be made again; or `target` of them."""
        return self._left <= (_ROOMY * self._most_rows if target is None else target)

    @property
    def waiting_rows(self) -> int:
        """How many rows wait."""
        return self._left

    def compact(self, breathe: Callable[[], None]) -> None:
        """Let go of rows that wait no more, beside which others do; pause after each chunk."""
        parts: dict[Chunk, list[tuple[Waiting, int]]] = {}
        for waiting in self._waiting.values():
            for place, (chunk, _) in enumerate(waiting.parts):
                parts.setdefault(chunk, []).append((waiting, place))
        self._chunks.clear()
        self._rows = self._left = 0
        for chunk, users in parts.items():
            mask = np.zeros(len(chunk.batch.site), np.bool_)
            for waiting, place in users:
                mask[waiting.parts[place][1]] = True
            moved = np.cumsum(mask) - 1
            times_ns = None if chunk.times_ns is None else chunk.times_ns[:, mask]
            smaller = self.hold(rows_of(chunk.batch, mask), times_ns)
            for waiting, place in users:
                waiting.parts[place] = smaller, moved[waiting.parts[place][1]]
            breathe()
