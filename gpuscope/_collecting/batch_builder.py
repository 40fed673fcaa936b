"""
From rows to columns: makes the `StageBatch` that exporters and reports see.

Exports nothing, and asks a device nothing but to describe itself. Packs a few hundred rows at a time, so that it never
holds the GIL for long.
"""

from __future__ import annotations

import struct
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuscope._cuda.graphs.rows import InnerRows
from gpuscope._data.batch import DeviceInfo, RowFlag, SpanDetails, StageBatch
from gpuscope._data.native import native
from gpuscope._data.row import FORMAT, ROW
from gpuscope._data.wall_clock import WallClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from gpuscope._collecting.joins.samples import SampleJoin
    from gpuscope._collecting.keeping.requests import RequestKeys
    from gpuscope._collecting.resolve import Row
    from gpuscope._cuda.graphs.placing import Placed
    from gpuscope._data.interfaces import Bridge, Device, Identity
    from gpuscope._data.record import Site, StageRecord, ThreadInfo

_LOW = (1 << 64) - 1
_GPU_BIT = np.uint64(1 << 63)
"""Our own ids of host spans lie below it. A host span's id with this bit flipped is the id of its GPU span."""
_pack = struct.Struct(FORMAT).pack  # One row: the columns of `ROW`, in their order.
_WARMUP, _REMOTE_PARENT, _IN_GRAPH = int(RowFlag.WARMUP), int(RowFlag.REMOTE_PARENT), int(RowFlag.IN_GRAPH)


class BatchBuilder:
    """
    Makes batches, one after another, and counts each stage's calls to flag its first ones as warm-up.

    Args:
        device: the GPUs, which are asked for their names.
        warmup: how many calls of a stage are flagged as warm-up.
        clock: nanoseconds, monotonic; the clock of the records.
        epoch_clock: nanoseconds since the epoch.
        samples: knows how often streams were asked for work, and during which stages; None where nothing is asked.
        requests: notes which request each row belongs to; None where nobody asks.

    """

    def __init__(
        self,
        device: Device,
        *,
        warmup: int,
        clock: Callable[[], int] = time.perf_counter_ns,
        epoch_clock: Callable[[], int] = time.time_ns,
        samples: SampleJoin | None = None,
        requests: RequestKeys | None = None,
    ) -> None:
        self._device = device
        self._samples, self._requests = samples, requests
        self._warmup = warmup
        self._wall = WallClock(clock, epoch_clock)
        self._device_infos: dict[int, DeviceInfo] = {}
        self._inner = InnerRows(warmup)
        self.offset_ns: NDArray[np.int64] = np.array(0)
        """By so much the times of the last batch are later than the records': of each row, or of all."""
        self._begin()

    def _begin(self) -> None:
        self._offset_ns: int | None = None
        self._offsets_ns: list[int] | None = None
        """Each row's, where they may differ."""
        self._sites: dict[Site, int] = {}
        self._threads: dict[ThreadInfo, int] = {}
        self._packed: list[bytes] = []
        self._details: dict[int, SpanDetails] = {}
        self._records: list[StageRecord | None] = []
        self._is_live = False
        """Whether the application's provider makes the spans. One way for all of a batch, as when that began."""
        self._count = 0
        self.held_bytes = 0
        """Of what the stages so far were told, as far as it was weighed."""

    def __len__(self) -> int:
        """The rows of the batch so far."""
        return self._count

    def add(self, rows: list[Row], bridge: Bridge | None) -> None:
        """
        Add a few rows to the batch: all of them or, if anything fails, none.

        Args:
            rows: resolved stages.
            bridge: knows the ids of stages in the application's traces; None without OpenTelemetry.

        """
        self._fix_offset(bridge)
        packed, with_details = (self._pack_in_python if native is None else self._pack_natively)(rows, bridge)
        try:
            found = {self._count + index: _details(rows[index][0], bridge) for index in with_details}
        except Exception:  # The caller counts what fails, and tries again row by row.
            _uncount(rows)
            raise
        details = {row: what for row, what in found.items() if what is not None}
        self.held_bytes += sum(getattr(what.attributes, "size", 0) for what in details.values())
        self._packed.append(packed)
        self._place(row[0] for row in rows)
        self._details.update(details)
        for index in with_details:
            # What runs inside a batch refers to it, and may be a member of the next one: no chain of them is held.
            rows[index][0].members = None
        self._count += len(rows)
        if self._is_live:
            self._records += [row[0] for row in rows]
        if self._requests is not None:
            self._requests.add(rows)

    def add_events(self, rows: list[Row], take: Callable[[int], Any]) -> None:
        """Add to the rows that were added last what is known of stalls, by the record's span id."""
        for row, (record, *_) in enumerate(rows, self._count - len(rows)):
            if (event := take(record.span_id)) is not None:
                at_ns = event[1] + (self._offset_ns or 0)
                self._details.setdefault(row, SpanDetails()).events += ((event[0], at_ns, event[2]),)

    def add_replays(self, placed: Placed, bridge: Bridge | None) -> None:
        """Add the stages inside replays of a graph: all of them or, if anything fails, none."""
        self._fix_offset(bridge)
        settle = _own_ids if bridge is None else bridge.settle
        self._packed.append(self._inner.cells(placed, self._sites, self._threads, settle))
        self._place(replay.outer for replay in placed.replays for _ in range(len(placed.graph)))
        self._count += placed.start_ns.size
        if self._is_live:
            self._records += [None] * placed.start_ns.size
        if self._requests is not None:
            self._requests.add_replays(placed)

    def _fix_offset(self, bridge: Bridge | None) -> None:
        """Read the epoch's offset, once per batch, and share it with the bridge; settle whose the spans are."""
        if self._offset_ns is None:
            self._is_live = bridge is not None and bridge.sdk
            self._offset_ns = self._wall.read()
            self._offsets_ns = [] if self._wall.has_stepped else None
            if bridge is not None:
                # The bridge starts the spans of the application's provider. With the same offset both place a stage at
                # the same nanosecond. Set here and nowhere else; until the first batch the bridge reads the clocks.
                bridge.wall, bridge.offset_ns = self._wall, self._offset_ns

    def _place(self, records: Iterable[StageRecord]) -> None:
        if self._offsets_ns is not None:
            self._offsets_ns += map(self._wall.offset_of, records)

    def _pack_natively(self, rows: list[Row], bridge: Bridge | None) -> tuple[bytes, list[int]]:
        identify, own = own_identity, 2
        if bridge is not None:
            # The sampler that keeps all is asked once for all of them.
            identify, own = bridge.identify, 0 if self._is_live else 3 if bridge.keeps_roots() else 1
        packed: tuple[bytes, list[int]] = native.pack(
            rows, self._sites, self._threads, identify, own, self._warmup, _WARMUP, _REMOTE_PARENT
        )
        return packed

    def _pack_in_python(self, rows: list[Row], bridge: Bridge | None) -> tuple[bytes, list[int]]:
        """Return the rows as bytes, and the places of those with details."""
        identify = bridge.identify if bridge is not None else own_identity
        sites, threads = self._sites, self._threads
        packed: list[bytes] = []
        with_details: list[int] = []
        try:
            for record, gpu_start_ns, gpu_end_ns, uncertainty_ns, flags in rows:
                trace_id, span_id, parent_id, sampled = identify(record)
                trace, site, timed_stream = record.trace, record.site, record.timed_stream
                calls = site.calls + 1
                if calls <= (self._warmup if site.warmup is None else site.warmup) or trace.root.warms_up:
                    flags |= _WARMUP  # noqa: PLW2901
                if trace.remote and parent_id == trace.parent_id:
                    flags |= _REMOTE_PARENT  # noqa: PLW2901
                stream, device = (timed_stream.raw, timed_stream.index) if gpu_end_ns else (0, -1)
                more = record.error is not None or record.span is not None or record.members is not None
                if record.attributes or more:
                    with_details.append(len(packed))
                packed.append(_pack(
                    trace_id >> 64, trace_id & _LOW, span_id, parent_id, stream,
                    sites.setdefault(site, len(sites)), sites.setdefault(trace.root, len(sites)),
                    threads.setdefault(record.thread, len(threads)), sampled, record.start_ns, record.end_ns,
                    gpu_start_ns, gpu_end_ns, uncertainty_ns, device, flags,
                ))  # fmt: skip
                site.calls = calls
        except Exception:  # As above.
            _uncount(rows[: len(packed)])
            raise
        return b"".join(packed), with_details

    def finish(self, bridge: Bridge | None, past_ns: int = 0) -> StageBatch:
        """
        Return the batch, which has at least one row, and begin another, whatever happens.

        Args:
            bridge: as for `add`.
            past_ns: all stages that ended until then are in this batch, or in one before; matters to samples alone.

        """
        try:
            rows = np.frombuffer(b"".join(self._packed), ROW)
            batch, samples = self._assemble(rows, bridge), self._samples
            if samples is None:
                return batch
            asked, had_work = samples.join(rows, past_ns)
            devices, streams = samples.take_counts()
            return replace(batch, samples=asked, had_work=had_work, device_samples=devices, stream_samples=streams)
        finally:
            self._begin()

    def _assemble(self, rows: NDArray[np.void], bridge: Bridge | None) -> StageBatch:
        offset_ns = self.offset_ns = np.array(self._offsets_ns or self._offset_ns or 0, np.int64)
        has_gpu = rows["gpu_end_ns"] != 0
        span_id, device = rows["span_id"].copy(), rows["device"].astype(np.int32)
        gpu_span_id = np.where(rows["flags"] & _IN_GRAPH, span_id, span_id ^ _GPU_BIT)
        live = None
        if bridge is not None and self._is_live:
            live = tuple(record and bridge.lazy(record) for record in self._records)
        # Copies, so that columns are contiguous and the batch does not keep the rows alive.
        return StageBatch(
            sites=tuple(self._sites),
            threads=tuple(self._threads),
            devices={index: self._device_info(index) for index in set(device.tolist()) if index >= 0},
            site=rows["site"].astype(np.int32),
            root=rows["root"].astype(np.int32),
            thread=rows["thread"].astype(np.int32),
            trace_high=rows["trace_high"].copy(),
            trace_low=rows["trace_low"].copy(),
            span_id=span_id,
            parent_id=rows["parent_id"].copy(),
            gpu_span_id=np.where(has_gpu, gpu_span_id, np.uint64(0)),
            sampled=rows["sampled"].astype(np.bool_),
            host_start_ns=rows["host_start_ns"] + offset_ns,
            host_end_ns=rows["host_end_ns"] + offset_ns,
            gpu_start_ns=np.where(has_gpu, rows["gpu_start_ns"] + offset_ns, 0),
            gpu_end_ns=np.where(has_gpu, rows["gpu_end_ns"] + offset_ns, 0),
            uncertainty_ns=rows["uncertainty_ns"].copy(),
            device=device,
            stream=rows["stream"].copy(),
            flags=rows["flags"].astype(np.uint32),
            details=self._details,
            live=live,
        )

    def _device_info(self, index: int) -> DeviceInfo:
        if index not in self._device_infos:
            try:
                self._device_infos[index] = self._device.facts(index)
            except BaseException:  # A name is not worth a batch; the next batch asks again.
                return DeviceInfo(index, "unknown", "unknown")
        return self._device_infos[index]


def _uncount(rows: list[Row]) -> None:
    """Take calls back that were counted, because these rows are not in the batch, or are about to be added again."""
    for row in rows:
        row[0].site.calls -= 1


def own_identity(record: StageRecord) -> Identity:
    """Return (trace id, span id, parent id, sampled) of a stage without a bridge to OpenTelemetry."""
    outer, trace = record.outer, record.trace
    inside = outer is not None and outer.trace is trace
    return trace.trace_id, record.span_id, outer.span_id if inside and outer else trace.parent_id, True


def _own_ids(record: StageRecord) -> tuple[int, int, bool]:
    """Return (trace id, span id, sampled) of such a stage; it may still run."""
    return record.trace.trace_id, record.span_id, True


def _details(record: StageRecord, bridge: Bridge | None) -> SpanDetails | None:
    if record.span is not None and bridge is not None:
        found = bridge.details(record)
    else:
        found = SpanDetails(attributes=record.attributes, error=record.error)
    if record.members is not None:
        found = found or SpanDetails()
        found.members = record.members, record.start_ns
    return found
