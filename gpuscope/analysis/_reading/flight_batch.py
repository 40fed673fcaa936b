"""
The stages of a flight recorder's file as a `StageBatch`, as if they had just been resolved.

A stage that has not ended gets the newest time in the file as its end, and a flag that says so. Judges nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuscope._data import flight as layout
from gpuscope._data.batch import DeviceInfo, RowFlag, SpanDetails, StageBatch
from gpuscope._data.record import Site, ThreadInfo
from gpuscope.analysis._reading.flight_ring import durations_ns, flags_of, have_ended, numbers_of, unrounded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope.analysis._reading.flight_ring import FlightRing

_GPU_BIT = np.uint64(1 << 63)
_LOW_48 = np.uint64(layout.LOW_48)
_FAILED = ("ERROR", None)
"""The status of a stage that an exception left; the ring does not say which."""


def batch_of(ring: FlightRing) -> StageBatch:
    """Return the stages of a file; it has some."""
    stages = ring.stages
    found = _matches(stages, ring.resolved)
    known = found >= 0
    resolved = ring.resolved[found] if len(ring.resolved) else np.zeros((len(stages), 8), np.uint64)
    resolved = np.where(known[:, None], resolved, np.uint64(0))
    ended, start_ns = have_ended(stages), stages[:, 4].astype(np.int64)
    end_ns = np.where(ended, start_ns + durations_ns(stages), max(ring.last_ns, int(start_ns.max())))
    ids = np.where(known[:, None], resolved[:, :3], stages[:, :3])
    gpu_ns, device = resolved[:, 5] & _LOW_48, (resolved[:, 5] >> np.uint64(48)).astype(np.int32) - 1
    has_gpu = device >= 0
    gpu_start_ns = np.where(has_gpu, resolved[:, 4].astype(np.int64) + ring.offset_ns, 0)
    flags = _flags(stages, resolved)
    sites, site = _sites(ring)
    parent = _rows_of(stages[:, 3], stages[:, 2])
    threads, thread = np.unique(stages[:, 6], return_inverse=True)
    gpu_span_id = np.where(flags & RowFlag.IN_GRAPH, ids[:, 2], ids[:, 2] ^ _GPU_BIT)
    return StageBatch(
        sites=sites,
        threads=tuple(ThreadInfo(ident, ring.threads.get(ident, f"Thread-{ident}")) for ident in threads.tolist()),
        devices=_devices(ring, device),
        site=site,
        root=site[_roots(parent)],
        thread=thread.ravel().astype(np.int32),
        trace_high=ids[:, 0].copy(),
        trace_low=ids[:, 1].copy(),
        span_id=ids[:, 2].copy(),
        parent_id=np.where(parent >= 0, ids[parent, 2], stages[:, 3]),
        gpu_span_id=np.where(has_gpu, gpu_span_id, np.uint64(0)),
        sampled=np.ones(len(stages), np.bool_),
        host_start_ns=start_ns + ring.offset_ns,
        host_end_ns=end_ns + ring.offset_ns,
        gpu_start_ns=gpu_start_ns,
        gpu_end_ns=np.where(has_gpu, gpu_start_ns + gpu_ns.astype(np.int64), 0),
        uncertainty_ns=np.where(has_gpu, unrounded(resolved[:, 6] >> np.uint64(48)), 0),
        device=device,
        stream=np.where(has_gpu, resolved[:, 6] & _LOW_48, np.uint64(0)),
        flags=flags,
        details={row: SpanDetails(status=_FAILED) for row in np.flatnonzero(stages[:, 5] & np.uint64(2)).tolist()},
    )


def _rows_of(wanted: NDArray[np.uint64], ids: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the row of each id, or -1."""
    order = np.argsort(ids, kind="stable")
    at = np.minimum(np.searchsorted(ids, wanted, sorter=order), len(ids) - 1)
    return np.where(ids[order[at]] == wanted, order[at], -1)


def _matches(stages: NDArray[np.uint64], resolved: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return which row of `resolved` belongs to each stage, or -1: by the id or, where it got another, by the start."""
    if not len(resolved):
        return np.full(len(stages), -1)
    by_id = _rows_of(stages[:, 2], resolved[:, 2])
    keys = [
        rows[:, column] << np.uint64(layout.SITE_BITS) | numbers_of(rows).astype(np.uint64)
        for rows, column in ((stages, 4), (resolved, 3))
    ]
    by_start = _rows_of(keys[0], keys[1])
    taken = np.zeros(len(resolved), np.bool_)
    taken[by_id[by_id >= 0]] = True
    by_start[(by_start >= 0) & taken[by_start]] = -1
    return np.where(by_id >= 0, by_id, by_start)


def _flags(stages: NDArray[np.uint64], resolved: NDArray[np.uint64]) -> NDArray[np.uint32]:
    flags = flags_of(resolved) & layout.ROW_FLAGS
    flags |= np.where(flags_of(stages) & layout.REMOTE, RowFlag.REMOTE_PARENT, 0)
    flags |= np.where(have_ended(stages), 0, RowFlag.NOT_ENDED)
    return flags.astype(np.uint32)


def _sites(ring: FlightRing) -> tuple[tuple[Site, ...], NDArray[np.int32]]:
    numbers, site = np.unique(numbers_of(ring.stages), return_inverse=True)
    sites = tuple(Site(ring.names.get(number, layout.OTHER_STAGES), {}) for number in numbers.tolist())
    return sites, site.ravel().astype(np.int32)


def _roots(parent: NDArray[np.int64]) -> NDArray[np.int64]:
    root = np.where(parent < 0, np.arange(len(parent)), parent)
    for _ in range(len(parent).bit_length()):  # What a damaged file puts inside itself never comes to an end.
        root = root[root]
    return root


def _devices(ring: FlightRing, device: NDArray[np.int32]) -> dict[int, DeviceInfo]:
    unknown = ("unknown", "unknown")
    return {index: DeviceInfo(index, *ring.devices.get(index, unknown)) for index in set(device.tolist()) if index >= 0}
