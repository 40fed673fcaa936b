"""
Which stage each answer of the sampler is of: the innermost on its stream at that time.

Arithmetic on columns; asks no GPU. The stages inside another are resolved before it, so an answer goes to the innermost
stage of the first batch that has one. It is kept until all stages that were open at its time are in a batch.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Protocol

import numpy as np

from gpuscope._cuda.stream_sampler import NO_ANSWERS
from gpuscope._data.batch import RowFlag
from gpuscope._data.plain.values import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from gpuscope._log import WarnOnce

_IN_GRAPH, _UNPLACED = int(RowFlag.IN_GRAPH), int(RowFlag.UNPLACED)
_NEVER = np.iinfo(np.int64).max
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
        self._waiting = NO_ANSWERS
        self._until_ns = np.zeros(0, np.int64)
        """Of each: when all stages that were open on its stream had been left, as far as is known."""
        self._devices: dict[int, tuple[int, int]] = {}
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
        new = self._sampling.take()
        if not new.size:
            return
        until_ns = np.full(new.size, _NEVER)
        for mine in _by_stream(new):
            quiet_ns = new["at_ns"][mine][new["open"][mine] == 0]
            if quiet_ns.size:
                until_ns[mine] = _next(quiet_ns, new["at_ns"][mine])
                stream, device = new["stream"][mine[0]], new["device"][mine[0]]
                before = (self._waiting["stream"] == stream) & (self._waiting["device"] == device)
                self._until_ns[before & (self._until_ns == _NEVER)] = quiet_ns[0]
        self._count_rounds(new)
        self._waiting = np.concatenate((self._waiting, new))
        self._until_ns = np.concatenate((self._until_ns, until_ns))
        excess = self._waiting.size - _MOST_WAITING
        if excess > 0:
            self._give_up(np.arange(self._waiting.size) < excess)

    def _count_rounds(self, new: NDArray[np.void]) -> None:
        """Count the moments at which a device was asked, and those at which any of its streams had work."""
        for device in np.unique(new["device"]).tolist():
            mine = new[new["device"] == device]
            starts = np.flatnonzero(np.concatenate(([True], mine["round"][1:] != mine["round"][:-1])))
            asked, had_work = self._devices.get(device, (0, 0))
            work = int(np.maximum.reduceat(mine["had_work"], starts).sum())
            self._devices[device] = asked + starts.size, had_work + work

    def take_devices(self) -> dict[int, tuple[int, int]]:
        """Return how often each device was asked since the last call, and how often any of its streams had work."""
        taken, self._devices = self._devices, {}
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
        taken = np.zeros(waiting.size, np.bool_)
        usable = (rows["gpu_end_ns"] != 0) & (rows["flags"] & _UNPLACED == 0)
        for mine in _by_stream(waiting):
            of_stream = usable & (rows["stream"] == waiting["stream"][mine[0]])
            of_stream &= rows["device"] == waiting["device"][mine[0]]
            candidates = np.flatnonzero(of_stream)
            if not candidates.size:
                continue
            found = innermost(rows[candidates], waiting["at_ns"][mine])
            hits = found >= 0
            taken[mine[hits]] = True
            owners = candidates[found[hits]]
            samples += np.bincount(owners, minlength=len(rows)).astype(np.int32)
            work = waiting["had_work"][mine[hits]]
            had_work += np.bincount(owners, work, minlength=len(rows)).astype(np.int32)
        self._came_to["in_stages"] += int(taken.sum())
        self._keep(~taken)
        self._give_up(self._until_ns <= past_ns)

    def _give_up(self, which: NDArray[np.bool_]) -> None:
        """Let go of answers that no stage is going to have."""
        if which.any():
            between = int((self._waiting["open"][which] == 0).sum())
            self._came_to["between"] += between
            self._came_to["lost"] += int(which.sum()) - between
            self._keep(~which)

    def _keep(self, which: NDArray[np.bool_]) -> None:
        self._waiting, self._until_ns = self._waiting[which], self._until_ns[which]

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


def _by_stream(answers: NDArray[np.void]) -> Iterator[NDArray[np.int64]]:
    """Yield the places of each stream's answers."""
    if answers.size:
        streams, devices = answers["stream"], answers["device"]
        for stream in np.unique(streams):
            for device in np.unique(devices[streams == stream]):
                yield np.flatnonzero((streams == stream) & (devices == device))


def _next(moments_ns: NDArray[np.int64], at_ns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each time the first of the moments that is not before it."""
    found: NDArray[np.int64] = np.append(moments_ns, _NEVER)[moments_ns.searchsorted(at_ns)]
    return found


def innermost(rows: NDArray[np.void], at_ns: NDArray[np.int64]) -> NDArray[np.int64]:
    """
    Return the place of the innermost stage at each time, or -1.

    That is the shortest that covers the time: starts may be off by a rounding, and outer and inner may share an event.
    Of two that share both, the one inside comes first, but within a replay after the one around it.

    Args:
        rows: of one stream, as `ROW` has them, those of inner stages first.
        at_ns: in ascending order.

    """
    starts, ends = rows["gpu_start_ns"], rows["gpu_end_ns"]
    found = np.full(at_ns.size, -1, np.int64)
    first, last = at_ns.searchsorted(starts), at_ns.searchsorted(ends, "right")
    hits = np.flatnonzero(last > first)
    if hits.size:
        depth = np.where(rows["flags"][hits] & _IN_GRAPH, hits, -1 - hits)
        hits = hits[np.lexsort((depth, starts[hits] - ends[hits]))]  # The longest first, because the last one wins.
        counts = last[hits] - first[hits]
        places = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts - first[hits], counts)
        found[places] = np.repeat(hits, counts)
    return found
