"""
The stages inside replays of a CUDA graph into cells of a batch: columns at once, no record and no row a stage.

Asks nobody anything but whose stage each replay was in.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuscope._columns import RowFlag

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from gpuscope._record import Site, StageRecord, ThreadFacts
    from gpuscope._replays import Placed

_CELLS = 16
_WARMUP, _CLAMPED, _IN_GRAPH = int(RowFlag.WARMUP), int(RowFlag.CLAMPED), int(RowFlag.IN_GRAPH)
_LOW = (1 << 64) - 1


class InnerRows:
    """
    Makes cells, and gives each stage a span id of its own.

    Args:
        warmup: how many calls of a stage are flagged as warm-up.

    """

    def __init__(self, warmup: int) -> None:
        self._warmup = warmup
        # Above the ids of host spans, which count up as well, and so near those of no GPU span.
        self._next_id = 1 << 63 | random.SystemRandom().getrandbits(61)

    def cells(
        self,
        placed: Placed,
        sites: dict[Site, int],
        threads: dict[ThreadFacts, int],
        settle: Callable[[StageRecord], tuple[int, int, bool]],
    ) -> bytes:
        """
        Return the bytes of the cells, replay by replay, as `_batch` lays them out.

        Args:
            placed: the replays.
            sites: the batch's table, which is added to.
            threads: the same of threads.
            settle: returns a stage's trace id, span id and whether it is exported.

        """
        graph, replays = placed.graph, placed.replays
        shape = len(replays), len(graph)
        ids, cells = self._new_ids(shape), np.zeros((*shape, _CELLS), np.int64)
        facts = [_facts_of(replay, sites, threads, settle) for replay in replays]
        trace_high, trace_low, outer, stream, root, thread, sampled, launched, device = np.array(facts, np.uint64).T
        parents = np.array(graph.parents)
        unsigned = cells.view(np.uint64)
        unsigned[..., 0], unsigned[..., 1] = trace_high[:, np.newaxis], trace_low[:, np.newaxis]
        unsigned[..., 2] = ids
        unsigned[..., 3] = np.where(parents < 0, outer[:, np.newaxis], ids[:, parents])
        unsigned[..., 4] = stream[:, np.newaxis]
        cells[..., 5] = [sites.setdefault(site, len(sites)) for site in graph.sites]
        for place, column in ((6, root), (7, thread), (8, sampled), (9, launched), (10, launched), (14, device)):
            cells[..., place] = column.astype(np.int64)[:, np.newaxis]
        cells[..., 11], cells[..., 12], cells[..., 13] = placed.start_ns, placed.end_ns, placed.uncertainty_ns
        rehearsed = np.array([replay.outer.trace.root.rehearsal for replay in replays])
        warm = rehearsed[:, np.newaxis] | self._count_calls(graph.sites, len(replays))
        cells[..., 15] = _IN_GRAPH + warm * _WARMUP + placed.clamped[:, np.newaxis] * _CLAMPED
        return cells.tobytes()

    def _new_ids(self, shape: tuple[int, int]) -> NDArray[np.uint64]:
        first, count = self._next_id, shape[0] * shape[1]
        self._next_id += count
        ids: NDArray[np.uint64] = np.arange(first, first + count, dtype=np.uint64).reshape(shape)
        return ids

    def _count_calls(self, sites: tuple[Site, ...], replays: int) -> NDArray[np.bool_]:
        """Count the calls of each stage, and return which are warm-up."""
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


def _facts_of(
    replay: Any,
    sites: dict[Site, int],
    threads: dict[ThreadFacts, int],
    settle: Callable[[StageRecord], tuple[int, int, bool]],
) -> tuple[int, ...]:
    """Return what the stages of one replay share."""
    trace_id, span_id, sampled = settle(replay.outer)
    root = replay.outer.trace.root
    return (
        trace_id >> 64,
        trace_id & _LOW,
        span_id,
        replay.lane.raw,
        sites.setdefault(root, len(sites)),
        threads.setdefault(replay.thread, len(threads)),
        int(sampled),
        replay.launched_ns,
        replay.lane.index,
    )
