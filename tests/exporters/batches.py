"""Batches of stages for the exporters' tests: by hand, and from hypothesis."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st

from gpuscope._data.batch import DeviceInfo, RowFlag, SpanDetails, StageBatch
from gpuscope._data.record import Site, ThreadInfo

NOW_NS = 1_700_000_000_000_000_000
SITE = Site("infer", {"model": "vit"}, "app.model.infer", ("/app/model.py", 12))
THREAD = ThreadInfo(140_000_000_000_123, "MainThread")
DEVICE = DeviceInfo(0, "NVIDIA H200", "GPU-01234567-89ab-cdef-0123-456789abcdef")


@dataclass
class Row:
    """One stage; without a GPU part unless `gpu_span_id` is set."""

    site: Site = SITE
    thread: ThreadInfo = THREAD
    trace_id: int = 0x0AF7651916CD43DD8448EB211C80319C
    span_id: int = 0xB7AD6B7169203331
    parent_id: int = 0
    gpu_span_id: int = 0
    start_ns: int = NOW_NS
    host_ns: int = 1_000_000
    launch_ns: int = 20_000
    gpu_ns: int = 5_000_000
    uncertainty_ns: int = 3_500
    device: int = 0
    stream: int = 7
    flags: int = 0
    details: SpanDetails | None = field(default=None)
    samples: int = 0
    had_work: int = 0


def make_batch(*rows: Row, devices: dict[int, DeviceInfo] | None = None) -> StageBatch:
    """Return the rows as columns."""
    sites = list(dict.fromkeys(row.site for row in rows))
    threads = list(dict.fromkeys(row.thread for row in rows))
    sampled = any(row.samples for row in rows)

    def column(kind: type, values: Any) -> Any:
        return np.array(list(values), dtype=kind)

    def gpu(kind: type, value: Any, absent: int) -> Any:
        return column(kind, (value(row) if row.gpu_span_id else absent for row in rows))

    return StageBatch(
        sites=tuple(sites),
        threads=tuple(threads),
        devices={0: DEVICE} if devices is None else devices,
        site=column(np.int32, (sites.index(row.site) for row in rows)),
        root=column(np.int32, (0 for _ in rows)),
        thread=column(np.int32, (threads.index(row.thread) for row in rows)),
        trace_high=column(np.uint64, (row.trace_id >> 64 for row in rows)),
        trace_low=column(np.uint64, (row.trace_id & (2**64 - 1) for row in rows)),
        span_id=column(np.uint64, (row.span_id for row in rows)),
        parent_id=column(np.uint64, (row.parent_id for row in rows)),
        gpu_span_id=column(np.uint64, (row.gpu_span_id for row in rows)),
        sampled=column(np.bool_, (True for _ in rows)),
        host_start_ns=column(np.int64, (row.start_ns for row in rows)),
        host_end_ns=column(np.int64, (row.start_ns + row.host_ns for row in rows)),
        gpu_start_ns=gpu(np.int64, lambda row: row.start_ns + row.launch_ns, 0),
        gpu_end_ns=gpu(np.int64, lambda row: row.start_ns + row.launch_ns + row.gpu_ns, 0),
        uncertainty_ns=gpu(np.int64, lambda row: row.uncertainty_ns, 0),
        device=gpu(np.int32, lambda row: row.device, -1),
        stream=gpu(np.uint64, lambda row: row.stream, 0),
        flags=column(np.uint32, (row.flags for row in rows)),
        details={number: row.details for number, row in enumerate(rows) if row.details is not None},
        samples=column(np.int32, (row.samples for row in rows)) if sampled else None,
        had_work=column(np.int32, (row.had_work for row in rows)) if sampled else None,
        device_samples={0: (sum(row.samples for row in rows), sum(row.had_work for row in rows))} if sampled else None,
    )


@dataclass
class Delivery:
    """Stands in for a delivery: keeps what an exporter reports of a batch."""

    stages: int
    reports: list[tuple[int, dict[str, int]]] = field(default_factory=list)

    def settle(self, exported: int, lost: dict[str, int] | None = None) -> None:
        """Keep the report."""
        self.reports.append((exported, dict(lost or {})))


@dataclass
class Account:
    """The deliveries of one exporter."""

    deliveries: list[Delivery] = field(default_factory=list)

    def open(self, batch: StageBatch | int) -> Delivery:
        """Return the delivery of a batch, or of so many stages."""
        self.deliveries.append(Delivery(batch if isinstance(batch, int) else len(batch.site)))
        return self.deliveries[-1]

    @property
    def exported(self) -> int:
        """Stages delivered."""
        return sum(report[0] for delivery in self.deliveries for report in delivery.reports)

    @property
    def pending(self) -> int:
        """Stages with the exporter."""
        return sum(delivery.stages for delivery in self.deliveries if not delivery.reports)

    @property
    def lost(self) -> dict[str, int]:
        """Stages lost, by reason."""
        return dict(sum((Counter(report[1]) for item in self.deliveries for report in item.reports), Counter()))

    def check(self) -> None:
        """Assert that every delivery was settled once, and every stage of it accounted for."""
        for delivery in self.deliveries:
            ((exported, lost),) = delivery.reports
            assert exported + sum(lost.values()) == delivery.stages


def id_numbers(bits: int) -> st.SearchStrategy[int]:
    """Ids that are not zero."""
    return st.integers(1, 2**bits - 1)


class Unprintable:
    """An object that cannot be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no")


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.sampled_from([np.float32(1.5), np.int64(-3), np.bool_(True), 1, True, 1.0, 0.0, -0.0, "\ud800", Unprintable()])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
KEYS = st.sampled_from(["batch_size", "model", "thread.name", "error.type", "gpuscope.stage", "é", 5])
ATTRIBUTES = st.dictionaries(KEYS, VALUES, max_size=4)
DETAILS = st.builds(
    SpanDetails,
    attributes=st.none() | ATTRIBUTES,
    name=st.none() | st.text(max_size=5),
    status=st.none() | st.tuples(st.sampled_from(["OK", "ERROR", "UNSET"]), st.none() | st.text(max_size=5)),
    events=st.lists(st.tuples(st.text(max_size=5), st.integers(1, 2**63), ATTRIBUTES), max_size=2).map(tuple),
    links=st.lists(st.tuples(id_numbers(128), id_numbers(64), ATTRIBUTES), max_size=2).map(tuple),
    trace_state=st.sampled_from(["", "vendor=a,other=th:8"]),
    dropped=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
SITES = st.builds(
    Site,
    name=st.text(min_size=1, max_size=5),
    attributes=ATTRIBUTES,
    function=st.none() | st.just("app.run"),
)
ROWS = st.builds(
    Row,
    thread=st.sampled_from([THREAD, ThreadInfo(2, "worker")]),
    trace_id=id_numbers(128),
    span_id=id_numbers(64),
    parent_id=st.just(0) | id_numbers(64),
    gpu_span_id=st.just(0) | id_numbers(64),
    start_ns=st.integers(1000, 2**62),
    host_ns=st.integers(0, 2**40),
    launch_ns=st.integers(-1000, 2**40),
    gpu_ns=st.integers(0, 2**40),
    device=st.sampled_from([0, 1]),
    stream=st.sampled_from([0, 7, 2**47 - 1]),
    flags=st.integers(0, sum(RowFlag)).map(lambda flags: flags & ~int(RowFlag.SHARED)),
    details=st.none() | DETAILS,
    samples=st.just(0) | st.sampled_from([1, 127, 128, 2**31 - 1]),
)


@st.composite
def batches(draw: st.DrawFn) -> StageBatch:
    """Batches of a few stages, in which groups repeat."""
    sites = draw(st.lists(SITES, min_size=1, max_size=3))
    rows = draw(st.lists(ROWS, min_size=1, max_size=8))
    for row in rows:
        row.site = draw(st.sampled_from(sites))
        row.had_work = draw(st.integers(0, row.samples))
        if row.flags & RowFlag.IN_GRAPH:
            # A stage inside a graph: one span, below another, and nothing that its run alone could have told.
            row.gpu_span_id, row.parent_id, row.host_ns, row.details = row.span_id, row.parent_id or 1, 0, None
    return make_batch(*rows, devices={0: DEVICE})
