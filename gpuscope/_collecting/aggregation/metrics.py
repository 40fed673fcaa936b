"""
Every stage as a metric, exported or not: histograms, how occupied and how busy the GPUs are, and the account of losses.

Keeps the columns of a few batches at most, until it counts them together. Asks no clock, and knows no exporter.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from gpuscope._collecting.aggregation.generation import Generation
from gpuscope._collecting.aggregation.histograms import Histograms
from gpuscope._collecting.aggregation.joined_columns import columns_of, join
from gpuscope._collecting.aggregation.occupancy import Occupancy
from gpuscope._collecting.aggregation.sampled import BusyRatios
from gpuscope._collecting.aggregation.summary import OTHER
from gpuscope._collecting.aggregation.watched import sums_of, sums_of_looks
from gpuscope._data.attributes import (
    CUDA_STREAM,
    DEVICE_INDEX,
    HW_ID,
    HW_MODEL,
    HW_TYPE,
    HW_VENDOR,
    LANE,
    REASON,
    STAGE,
    STALL_KIND,
)
from gpuscope._data.batch import RowFlag
from gpuscope._data.metrics import (
    BUSY,
    DROPPED,
    DURATION,
    EVENT_COST,
    EXPORTED,
    IDLE,
    LAUNCH_DELAY,
    LOST,
    OCCUPIED,
    RECORDED,
    STALLS,
    STREAM_BUSY,
    UNCERTAINTY,
    UNTIMED,
    DataPoint,
    Histogram,
)
from gpuscope._data.plain.values import as_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuscope._collecting.aggregation.generation import Measurement
    from gpuscope._collecting.aggregation.joined_columns import Columns
    from gpuscope._data.batch import DeviceInfo, FinishedGeneration, StageBatch
    from gpuscope._data.metrics import InstrumentSpec
    from gpuscope._data.record import Site
    from gpuscope._data.statistics import Statistics

    Points = dict[InstrumentSpec, Sequence[DataPoint]]

MAX_STAGES = 48
"""Stages with series of their own; later ones share one. OpenTelemetry's SDK keeps 2,000 points per instrument, and the
20 buckets of 49 stages on the host and on one GPU just fit into that."""
_BLOCK = MAX_STAGES + 1
"""How many series a block has: one per stage. Series are numbered block by block."""
_HOST, _NOWHERE, _DEVICES = 0, 1, 3
"""The first block of each kind. Each device has two blocks, for durations and for launch delays. A row without a GPU
part has the device -1, so its GPU durations, which mean nothing, are counted in the two blocks before, which nobody
reads. That is cheaper than a mask. Warm-up calls are counted there too."""
_ROWS_AT_ONCE, _BATCHES_AT_ONCE = 1024, 8
"""Batches are kept and counted together, because what costs is the number of numpy calls: 1,024 rows take some 0.4 ms
of the GIL, half as long per row as 256 do."""
_WARMUP, _IN_GRAPH, _UNPLACED = int(RowFlag.WARMUP), int(RowFlag.IN_GRAPH), int(RowFlag.UNPLACED)


class StageMetrics:
    """
    Takes every batch, and returns points at any time, on any thread.

    Args:
        start_ns: when recording started, in nanoseconds since the epoch.

    """

    def __init__(self, start_ns: int) -> None:
        self._lock = threading.RLock()  # A signal handler may come while its own thread holds it.
        self._stages: dict[str, int] = {}
        self._devices: dict[int, DeviceInfo] = {}
        self._uncounted: list[Columns] = []
        self._uncounted_rows = 0
        self._histograms = Histograms()
        self._occupancy = Occupancy(start_ns)
        self._busy = BusyRatios()
        self._generation = Generation()

    def add(self, batch: StageBatch, generations: Sequence[FinishedGeneration] = ()) -> list[Measurement]:
        """
        Count the rows of a batch, and return the values of the generations in it and of those given.

        Warm-up calls count towards the occupancy only, except that a generation is a request, which somebody made.
        """
        with self._lock:
            self._devices.update(batch.devices)
            numbers = [self._number(site) for site in batch.sites]
            self._uncounted.append(columns_of(batch, numbers))
            self._busy.add(batch, numbers)
            self._uncounted_rows += len(batch.site)
            if self._uncounted_rows >= _ROWS_AT_ONCE or len(self._uncounted) >= _BATCHES_AT_ONCE:
                self._count()
            return self._generation.add(batch) + self._generation.take(generations)

    def _count(self) -> None:
        if not self._uncounted_rows:
            return
        rows = join(self._uncounted)
        self._uncounted, self._uncounted_rows = [], 0
        series, times_ns = np.empty((3, len(rows.stage)), np.int64), np.empty((3, len(rows.stage)), np.int64)
        series[0] = rows.stage + np.where(rows.flags & _IN_GRAPH, _NOWHERE, _HOST) * _BLOCK
        series[1] = rows.stage + (rows.device * 2 + _DEVICES) * _BLOCK
        series[2] = series[1] + _BLOCK
        series[:, np.flatnonzero(rows.flags & _WARMUP)] = _NOWHERE * _BLOCK
        series[2, np.flatnonzero(rows.flags & _UNPLACED)] = _NOWHERE * _BLOCK
        times_ns[0] = rows.host_end_ns - rows.host_start_ns
        times_ns[1] = rows.gpu_end_ns - rows.gpu_start_ns
        times_ns[2] = rows.gpu_start_ns - rows.host_start_ns
        seconds = times_ns / 1e9
        self._histograms.add(series.ravel(), seconds.ravel())
        self._histograms.remember(rows, series[:2].ravel(), seconds[:2].ravel())
        self._occupancy.add(rows)

    def settle(self, now_ns: int, *, last: bool = False) -> None:
        """Count the GPUs' time for good, as far as it is certain; with `last`, up to now."""
        with self._lock:
            self._count()
            self._occupancy.settle(now_ns - (0 if last else self._occupancy.wait_ns))

    def end_interval(self) -> None:
        """End the interval whose ratios the points have."""
        with self._lock:
            self._occupancy.end_interval()
            self._busy.end_interval()

    def points(self, *, exemplars: bool = False) -> Points:
        """Return the points as of now; with `exemplars`, those since they were last taken."""
        with self._lock:
            self._count()
            slowest = self._histograms.take_exemplars() if exemplars else {}
            points: dict[InstrumentSpec, list[DataPoint]] = {DURATION: [], LAUNCH_DELAY: []}
            for number, counts, sum_s in self._histograms.counts():
                block, stage = divmod(number, _BLOCK)
                if not _NOWHERE <= block < _DEVICES:
                    spec, attributes = self._describe(block, stage)
                    points[spec].append(DataPoint(attributes, Histogram(counts, sum_s, slowest.get(number))))
            occupied = [(self._gpu(index), ratio) for index, ratio in self._occupancy.ratios.items()]
            return {
                **points,
                BUSY: self._busy_points(),
                STREAM_BUSY: [
                    DataPoint({CUDA_STREAM: stream, **self._where(index)}, ratio)
                    for (index, stream), ratio in self._busy.streams.items()
                    if index in self._devices
                ],
                OCCUPIED: [DataPoint(gpu, ratio) for gpu, ratio in occupied],
                IDLE: [DataPoint(gpu, 1.0 - ratio) for gpu, ratio in occupied],
                **self._generation.points(exemplars=exemplars),
            }

    def _busy_points(self) -> list[DataPoint]:
        names, known = list(self._stages), self._devices
        devices = [DataPoint(self._gpu(index), ratio) for index, ratio in self._busy.devices.items() if index in known]
        return devices + [
            DataPoint({STAGE: names[stage], **self._where(index)}, ratio)
            for (index, stage), ratio in self._busy.stages.items()
            if index in known
        ]

    def _describe(self, block: int, stage: int) -> tuple[InstrumentSpec, dict[str, str | int]]:
        name: dict[str, str | int] = {STAGE: list(self._stages)[stage]}
        if block == _HOST:
            return DURATION, {**name, LANE: "host"}
        index, is_delay = divmod(block - _DEVICES, 2)
        where = self._where(index)
        return (LAUNCH_DELAY, {**name, **where}) if is_delay else (DURATION, {**name, LANE: "gpu", **where})

    def _where(self, index: int) -> dict[str, str | int]:
        return {DEVICE_INDEX: index, HW_ID: self._devices[index].uuid}

    def _gpu(self, index: int) -> dict[str, str | int]:
        """Return what is known of a GPU. Only its own gauges say all that; the others' many series have its `hw.id`."""
        info = self._devices[index]
        return {**self._where(index), HW_TYPE: "gpu", HW_MODEL: info.name, HW_VENDOR: info.vendor}

    def _number(self, site: Site) -> int:
        """Return the number of a stage by its name; names beyond the limit share one."""
        name = as_text(site.name)
        if name not in self._stages and len(self._stages) >= MAX_STAGES:
            name = OTHER
        return self._stages.setdefault(name, len(self._stages))


def account_points(statistics: Statistics, *, for_file: bool = False) -> Points:
    """Return the account of stages, what is known of times, and what GPUs and deep looks said, as points."""
    points: Points = {RECORDED: [DataPoint({}, statistics.recorded)], EXPORTED: [DataPoint({}, statistics.exported)]}
    for spec, counts in ((DROPPED, statistics.dropped), (LOST, statistics.lost), (UNTIMED, statistics.untimed)):
        points[spec] = [DataPoint({REASON: reason}, count) for reason, count in sorted(counts.items())]
    if statistics.stalls:
        points[STALLS] = [DataPoint({STALL_KIND: kind}, count) for kind, count in sorted(statistics.stalls.items())]
    if statistics.clock_uncertainty_ns is not None:
        points[UNCERTAINTY] = [DataPoint({}, statistics.clock_uncertainty_ns / 1e9)]
    if statistics.event_cost_ns is not None:
        points[EVENT_COST] = [DataPoint({}, statistics.event_cost_ns / 1e9)]
    return {**points, **sums_of(statistics.gpus), **sums_of_looks(statistics.looks, squares=for_file)}
