"""
Which stage each answer of the sampler is of: the innermost on its stream at that time.

Arithmetic on columns; asks no GPU. The stages inside another are resolved before it, so an answer goes to the innermost
stage of the first batch that has one. It is kept until all stages that were open at its time are in a batch.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from gpuscope._data.batch import RowFlag
from gpuscope._data.plain.values import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from gpuscope._log import WarnOnce

_Ints: TypeAlias = "NDArray[np.int64]"
_IN_GRAPH, _UNPLACED = int(RowFlag.IN_GRAPH), int(RowFlag.UNPLACED)
_COLUMNS = ("gpu_start_ns", "gpu_end_ns", "stream", "device", "flags")
_NEVER = np.iinfo(np.int64).max
_AT, _STREAM, _DEVICE, _OPEN, _WORK, _UNTIL = range(_FIELDS := 6)
"""
What is kept of answers, a row of numbers each: as in `ANSWER` of `_cuda.stream_sampler`, and last when all stages that
were open on the stream had been left, as far as is known. Plain numbers take a third of the time of such records.
"""
_NONE = np.zeros((_FIELDS, 0), np.int64)
_MOST_WAITING = 65_536
"""Answers that wait for stages to be resolved; beyond it the oldest are given up."""


class Sampling(Protocol):
    """Where answers come from: `_cuda.stream_sampler.StreamSampler`."""

    hz: float
    why_off: str

    def take(self) -> NDArray[np.void]:
        """Return the answers since the last call, oldest first."""

    def counts(self) -> dict[str, int]:
        """Return what was asked since the beginning, and what came of it."""


class SampleJoin:
    """
    Takes answers, and gives them to the rows of batches.

    Args:
        sampling: where they come from.
        warnings: logs each kind of failure once.
        says_why_off: whether to log why there are no answers: somebody has asked for them.

    """

    def __init__(self, sampling: Sampling, warnings: WarnOnce, *, says_why_off: bool = True) -> None:
        self._sampling = sampling
        self._warnings = warnings
        self._says_why_off = says_why_off
        self._has_failed = False
        self._waiting = _NONE
        self._devices: dict[int, tuple[int, int]] = {}
        self._streams: dict[tuple[int, int], tuple[int, int]] = {}
        self._came_to: Counter[str] = Counter()

    def gather(self) -> None:
        """Take the answers that there are. Never raises."""
        if self._says_why_off and self._sampling.why_off:
            self._says_why_off = False
            self._warnings.warn("sampler", "streams are not asked for work: %s.", self._sampling.why_off)
        try:
            if not self._has_failed:
                self._gather()
        except Exception as error:  # It costs samples, and no stage.
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._has_failed = True
        self._warnings.warn("samples", "joining samples with stages failed: %s.", shown(error))

    def _gather(self) -> None:
        taken = self._sampling.take()
        if not taken.size:
            return
        new = np.empty((_FIELDS, taken.size), np.int64)
        new[_AT], new[_STREAM], new[_DEVICE] = taken["at_ns"], taken["stream"].view(np.int64), taken["device"]
        new[_OPEN], new[_WORK], new[_UNTIL] = taken["open"], taken["had_work"], _NEVER
        self._count_rounds(new[_DEVICE], taken["round"], new[_WORK])
        before = self._waiting.shape[1]
        joined = self._waiting = np.concatenate((self._waiting, new), axis=1)
        for mine in _by_stream(joined):
            at_ns, is_quiet = joined[_AT, mine], joined[_OPEN, mine] == 0
            quiet_ns = np.append(at_ns[is_quiet], _NEVER)[is_quiet.cumsum() - is_quiet]
            joined[_UNTIL, mine] = np.minimum(joined[_UNTIL, mine], quiet_ns)
            fresh = mine[mine >= before]
            if fresh.size:
                # Handles are unsigned, and stand here as signed numbers.
                key = int(joined[_DEVICE, fresh[0]]), int(joined[_STREAM, fresh[0]]) % 2**64
                asked, had_work = self._streams.get(key, (0, 0))
                self._streams[key] = asked + fresh.size, had_work + int(joined[_WORK, fresh].sum())
        excess = joined.shape[1] - _MOST_WAITING
        if excess > 0:
            self._give_up(np.arange(joined.shape[1]) < excess)

    def _count_rounds(self, devices: _Ints, rounds: NDArray[np.uint32], work: _Ints) -> None:
        """Count the moments at which a device was asked, and those at which any of its streams had work."""
        for device in set(devices.tolist()):
            mine = np.flatnonzero(devices == device)
            starts = np.flatnonzero(np.append(True, rounds[mine[1:]] != rounds[mine[:-1]]))
            asked, had_work = self._devices.get(device, (0, 0))
            had_work += int(np.maximum.reduceat(work[mine], starts).sum())
            self._devices[device] = asked + starts.size, had_work

    def take_counts(self) -> tuple[dict[int, tuple[int, int]], dict[tuple[int, int], tuple[int, int]]]:
        """
        Return how often each device and each stream was asked since the last call, and how often it had work.

        A device has work if any of its streams has. Streams are known by device and handle.
        """
        taken = self._devices, self._streams
        self._devices, self._streams = {}, {}
        return taken

    def join(self, rows: NDArray[np.void], past_ns: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """
        Return for each row how many answers are its own, and how many of these had work. Never raises.

        Args:
            rows: of one batch, as `ROW` has them, those of inner stages first.
            past_ns: all that was left until then is in this batch, or in one before.

        """
        self.gather()
        samples, had_work = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.int32)
        try:
            if not self._has_failed:
                self._join(rows, past_ns, samples, had_work)
        except Exception as error:  # As above.
            self._fail(error)
        return samples, had_work

    def _join(
        self, rows: NDArray[np.void], past_ns: int, samples: NDArray[np.int32], had_work: NDArray[np.int32]
    ) -> None:
        waiting = self._waiting
        if not waiting.shape[1]:
            return
        left = np.ones(waiting.shape[1], np.bool_)
        # Copies, because the cells of a row lie together, and what follows goes through whole columns.
        starts, ends, streams, devices, flags = (rows[name].astype(np.int64) for name in _COLUMNS)
        ends[flags & _UNPLACED != 0] = 0
        inside = flags & _IN_GRAPH != 0
        for mine in _by_stream(waiting):
            stream, device = waiting[_STREAM, mine[0]], waiting[_DEVICE, mine[0]]
            of_stream = (streams == stream) & (devices == device)
            found = innermost(starts, np.where(of_stream, ends, 0), inside, waiting[_AT, mine])
            hits = np.flatnonzero(found >= 0)
            left[mine[hits]] = False
            np.add.at(samples, found[hits], 1)
            np.add.at(had_work, found[hits], waiting[_WORK, mine[hits]])
        self._waiting = waiting[:, left]
        self._came_to["in_stages"] += waiting.shape[1] - self._waiting.shape[1]
        self._give_up(self._waiting[_UNTIL] <= past_ns)

    def _give_up(self, which: NDArray[np.bool_]) -> None:
        """Let go of answers that no stage is going to have."""
        if which.any():
            between = int((self._waiting[_OPEN, which] == 0).sum())
            self._came_to["between"] += between
            self._came_to["lost"] += int(which.sum()) - between
            self._waiting = self._waiting[:, ~which]

    def account(self) -> dict[str, int]:
        """Return how many answers there were, what they said, and what came of them."""
        # Read first: what has come to something was asked before.
        came_to = {name: self._came_to[name] for name in ("in_stages", "between", "lost")}
        counts = self._sampling.counts()
        if not counts:
            return {}
        found = {name: counts.pop(name) for name in ("asked", "had_work")}
        waiting = found["asked"] - sum(came_to.values()) - counts["dropped"]
        return {**found, **came_to, "waiting": waiting, **{name: count for name, count in counts.items() if count}}

    @property
    def state(self) -> str:
        """Whether streams are asked, for people."""
        return f"off: {self._sampling.why_off}" if self._sampling.why_off else f"{self._sampling.hz:g} times a second"


def _by_stream(answers: _Ints) -> Iterator[_Ints]:
    """Yield the places of each stream's answers."""
    streams, devices = answers[_STREAM], answers[_DEVICE]
    for stream, device in set(zip(streams.tolist(), devices.tolist(), strict=True)):
        yield np.flatnonzero((streams == stream) & (devices == device))


def innermost(starts: _Ints, ends: _Ints, in_graph: NDArray[np.bool_], at_ns: _Ints) -> _Ints:
    """
    Return the place of the innermost stage at each time, or -1.

    That is the shortest that covers the time: starts may be off by a rounding, and outer and inner may share an event.
    Of two that share both, the one inside comes first, but within a replay after the one around it.

    Args:
        starts: of stages on one stream, those of inner stages first.
        ends: before its start where a stage does not count.
        in_graph: whether it is inside a replay.
        at_ns: in ascending order.

    """
    found = np.full(at_ns.size, -1, np.int64)
    near = np.flatnonzero((starts <= at_ns[-1]) & (ends >= at_ns[0])) if at_ns.size else found[:0]
    if not near.size:
        return found
    first, last = at_ns.searchsorted(starts[near]), at_ns.searchsorted(ends[near], "right")
    covers = np.flatnonzero(last > first)
    hits, first, counts = near[covers], first[covers], (last - first)[covers]
    depth = np.where(in_graph[hits], hits, -1 - hits)
    order = np.lexsort((depth, starts[hits] - ends[hits]))  # The longest first, because the last one wins.
    hits, first, counts = hits[order], first[order], counts[order]
    places = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts - first, counts)
    found[places] = np.repeat(hits, counts)
    return found
