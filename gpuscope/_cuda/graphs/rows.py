"""
The stages inside replays of a CUDA graph become cells of a batch: whole columns at once, no record or row per stage.

Asks nothing of the device. All it asks of others is which ids the stage around each replay has.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np

from gpuscope._data.batch import RowFlag
from gpuscope._data.row import ROW

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from gpuscope._cuda.graphs.placing import Placed
    from gpuscope._cuda.graphs.replay import Replay
    from gpuscope._data.record import Site, StageRecord, ThreadInfo

_WARMUP, _CLAMPED, _IN_GRAPH = int(RowFlag.WARMUP), int(RowFlag.CLAMPED), int(RowFlag.IN_GRAPH)
_UNPLACED = int(RowFlag.UNPLACED)
_LOW = (1 << 64) - 1
_SHARED = (
    *("trace_high", "trace_low", "parent_id", "stream", "root", "thread", "sampled"),
    *("host_start_ns", "host_end_ns", "device"),
)
"""Columns in which all stages of a replay are alike, except that `parent_id` is that of its outermost stages."""


class InnerRows:
    """
    Makes cells, and gives each stage a span id of its own.

    Args:
        warmup: how many calls of a stage are flagged as warm-up.

    """

    def __init__(self, warmup: int) -> None:
        self._warmup = warmup
        # Above the ids of host spans. Those of GPU spans are up here, too, but both count up from random starts.
        self._next_id = 1 << 63 | random.SystemRandom().getrandbits(61)

    def cells(
        self,
        placed: Placed,
        sites: dict[Site, int],
        threads: dict[ThreadInfo, int],
        settle: Callable[[StageRecord], tuple[int, int, bool]],
    ) -> bytes:
        """
        Return the bytes of the cells, replay by replay, as `ROW` lays them out.

        Args:
            placed: the replays.
            sites: the batch's table of sites, which is added to.
            threads: the batch's table of threads, which is added to.
            settle: returns a stage's trace id, its span id, and whether it is exported.

        """
        graph, replays = placed.graph, placed.replays
        shape = len(replays), len(graph)
        ids, cells = self._new_ids(shape), np.zeros(shape, ROW)
        shared = [_shared_by(replay, sites, threads, settle) for replay in replays]
        for name, column in zip(_SHARED, np.array(shared, np.uint64).T, strict=True):
            cells[name] = column[:, np.newaxis]
        parents = np.array(graph.parents)
        cells["span_id"] = ids
        cells["parent_id"] = np.where(parents < 0, cells["parent_id"], ids[:, parents])
        cells["site"] = [sites.setdefault(site, len(sites)) for site in graph.sites]
        cells["gpu_start_ns"], cells["gpu_end_ns"] = placed.start_ns, placed.end_ns
        cells["uncertainty_ns"] = placed.uncertainty_ns
        warms_up = np.array([replay.outer.trace.root.warms_up for replay in replays])
        warm = warms_up[:, np.newaxis] | self._count_calls(graph.sites, len(replays))
        cells["flags"] = _IN_GRAPH + warm * _WARMUP + placed.clamped[:, np.newaxis] * _CLAMPED
        cells["flags"] += placed.unplaced * _UNPLACED
        return cells.tobytes()

    def _new_ids(self, shape: tuple[int, int]) -> NDArray[np.uint64]:
        first, count = self._next_id, shape[0] * shape[1]
        self._next_id += count
        ids: NDArray[np.uint64] = np.arange(first, first + count, dtype=np.uint64).reshape(shape)
        return ids

    def _count_calls(self, sites: tuple[Site, ...], replays: int) -> NDArray[np.bool_]:
        """Count the calls of each stage, and return which are warm-up: a row per replay, a column per stage."""
        warm = np.zeros((replays, len(sites)), np.bool_)
        if all(site.calls >= self._warmups_of(site) for site in sites):
            for site in sites:
                site.calls += replays
            return warm
        for replay in range(replays):
            for place, site in enumerate(sites):
                site.calls += 1
                warm[replay, place] = site.calls <= self._warmups_of(site)
        return warm

    def _warmups_of(self, site: Site) -> int:
        return self._warmup if site.warmup is None else site.warmup


def _shared_by(
    replay: Replay,
    sites: dict[Site, int],
    threads: dict[ThreadInfo, int],
    settle: Callable[[StageRecord], tuple[int, int, bool]],
) -> tuple[int, ...]:
    """Return what the stages of one replay share, in the order of `_SHARED`."""
    trace_id, span_id, sampled = settle(replay.outer)
    root = replay.outer.trace.root
    return (
        trace_id >> 64,
        trace_id & _LOW,
        span_id,
        replay.timed_stream.raw,
        sites.setdefault(root, len(sites)),
        threads.setdefault(replay.thread, len(threads)),
        int(sampled),
        replay.launched_ns,
        replay.launched_ns,
        replay.timed_stream.index,
    )
