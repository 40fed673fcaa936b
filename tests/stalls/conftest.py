"""What looks for stages without progress, in C and in Python, over a ring in memory; its thread is never started."""

from __future__ import annotations

import mmap
from types import SimpleNamespace

import pytest

from gpuscope._data import flight as layout
from gpuscope._data.native import StageRecord, Trace, native
from gpuscope._data.record import Site, ThreadInfo
from gpuscope._flight.ring import RingInPython
from gpuscope._stalls.found import BEGINS, found_in
from gpuscope._stalls.watch import WatchInPython

SECOND = 1_000_000_000
START_S = 1000.0


class Fields(SimpleNamespace):
    """A record for the twin in Python."""

    flight = None


class Watched:
    """A ring, what looks at it, and a clock that is moved by hand: seconds since the beginning."""

    def __init__(self, *, in_c: bool, limit_s: float, warmup: int, slots: int = 256) -> None:
        memory = mmap.mmap(-1, layout.RING_AT + 2 * slots * layout.SLOT_BYTES)
        self.ring = (native.FlightRing if in_c else RingInPython)(memory, 0)
        limit_ns = round(limit_s * 1e9)
        self.watch = (
            native.StallWatch(limit_ns, warmup, SECOND, "/nowhere/file") if in_c else WatchInPython(limit_ns, warmup)
        )
        self._record_type = StageRecord if in_c else Fields
        self._sites: dict[str, Site] = {}
        self._last_id = 100
        self.now_s = 0.0
        assert self.watch.follow(self.ring)

    @property
    def now_ns(self) -> int:
        """The moment."""
        return round((START_S + self.now_s) * SECOND)

    def site(self, name):
        """The site of a name."""
        return self._sites.setdefault(name, Site(name, {}))

    def begin(self, name, outer=None):
        """Begin a stage."""
        trace = Trace()
        trace.trace_id, trace.parent_id, trace.remote, trace.root = (5 << 64) | 6, 0, False, self.site(name)
        trace.sampled = trace.state = None
        record = self._record_type()
        self._last_id += 1
        record.trace, record.site, record.outer, record.thread = trace, self.site(name), outer, ThreadInfo(7, "worker")
        record.span_id, record.start_ns, record.end_ns = self._last_id, self.now_ns, 0
        self.ring.begin(record)
        return record

    def end(self, record):
        """End it."""
        record.end_ns = self.now_ns
        self.ring.end(record, None)

    def run(self, name, outer=None, times=1):
        """Begin and end a stage."""
        for _ in range(times):
            self.end(self.begin(name, outer))

    def look(self, at_s):
        """Look four times a second; return the names of the stages that are found until then, "+" if they go on."""
        found = []
        while self.now_s < at_s:
            found += self.found(min(self.now_s + 0.25, at_s))
        return [("" if each.kind == BEGINS else "+") + each.site_name.decode() for each in found]

    def found(self, at_s):
        """Return what is found, whole."""
        self.now_s = at_s
        return list(found_in(self.watch.scan(self.now_ns)))


def _twins():
    has_watch = hasattr(native, "StallWatch")
    return [*([pytest.param(True, id="c")] if has_watch else []), pytest.param(False, id="python")]


@pytest.fixture(params=_twins())
def make_watched(request):
    """Return a function that makes one twin."""

    def make(limit_s=10.0, warmup=0, **more):
        return Watched(in_c=request.param, limit_s=limit_s, warmup=warmup, **more)

    return make


@pytest.fixture
def watched(make_watched):
    """One with a limit of 10 s and no warm-up."""
    return make_watched()
