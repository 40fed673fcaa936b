"""A ring in memory, in C and in Python, and records to put into it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gpuscope._data import flight as layout
from gpuscope._data.native import StageRecord, Trace, native
from gpuscope._data.record import Site, ThreadInfo
from gpuscope._flight.ring import RingInPython
from gpuscope.analysis._reading.flight_ring import read_flight

MAIN = ThreadInfo(7, "MainThread")


class Ring:
    """One twin over bytes of its own, with so many slots for stages, and what a reader makes of them."""

    def __init__(self, make, record_type, slots, slow_ns, folder):
        slots *= 2
        self.data = bytearray(layout.RING_AT + slots * layout.SLOT_BYTES + 64)
        self.ring = make(self._aligned(slots), slow_ns)
        self.record_type, self.slots, self.folder = record_type, slots, folder
        self.last_id = 100

    def _aligned(self, slots):
        import ctypes

        address = ctypes.addressof(ctypes.c_char.from_buffer(self.data))
        start = -address % layout.SLOT_BYTES
        self.view = memoryview(self.data)[start : start + layout.RING_AT + slots * layout.SLOT_BYTES]
        return self.view

    def record(self, site, outer=None, **facts):
        """Return a record that may be written."""
        trace = Trace()
        trace.trace_id, trace.parent_id, trace.remote, trace.root = (
            (5 << 64) | 6,
            facts.get("parent_id", 0),
            False,
            site,
        )
        trace.sampled = trace.state = None
        trace.remote = facts.get("remote", False)
        record = self.record_type()
        record.trace, record.site, record.outer, record.thread = trace, site, outer, facts.get("thread", MAIN)
        self.last_id += 1
        record.span_id, record.start_ns, record.end_ns = self.last_id, facts.get("start", self.last_id * 1000), 0
        return record

    def begin(self, *args, **facts):
        """Begin a stage and return its record."""
        record = self.record(*args, **facts)
        self.ring.begin(record)
        return record

    def end(self, record, took=500, error=None):
        """End a stage."""
        record.end_ns = record.start_ns + took
        self.ring.end(record, error)

    def run(self, *args, **facts):
        """Begin and end a stage."""
        record = self.begin(*args, **facts)
        self.end(record)
        return record

    def read(self):
        """Return what a reader finds."""
        for name, value in (("magic", layout.MAGIC), ("slots", self.slots)):
            layout.NUMBER.pack_into(self.view, layout.HEAD[name], value)
        path = self.folder / "ring"
        path.write_bytes(self.view)
        return read_flight(path)


class Fields(SimpleNamespace):
    """A record for the twin in Python, where the parts in C have types of their own."""

    flight = None


def twins():
    """The writers that there are, with their kind of record."""
    found = [pytest.param((RingInPython, Fields), id="python")]
    if native is not None:
        found.append(pytest.param((native.FlightRing, StageRecord), id="c"))
    return found


@pytest.fixture(params=twins())
def make_ring(request, tmp_path):
    """Return a function that makes a ring of one twin."""

    def make(slots=64, slow_ns=0):
        writer, record_type = request.param
        return Ring(writer, record_type, slots, slow_ns, tmp_path)

    return make


@pytest.fixture
def site():
    """A stage's name."""
    return Site("infer", {})
