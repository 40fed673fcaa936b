"""Garbage collections: events of the stages that were open, on any thread, and a metric."""

from __future__ import annotations

import gc
import threading
import time

import pytest

import gpuscope
from gpuscope import stage
from gpuscope._collecting.joins.pauses import ENOUGH_CALLS, MOST_EVENTS, CollectionTimes, Replaying
from gpuscope._data.attributes import EAGER_AGAIN, GC_DURATION, GC_EVENT, GC_GENERATION
from gpuscope._data.metrics import COLLECTIONS
from gpuscope._data.native import native
from gpuscope._data.record import Site
from gpuscope._log import say_what_waits
from gpuscope._recording.current_stage import note_collection, watch_collections
from gpuscope._recording.pauses.collections import (
    MOST,
    Collection,
    Collections,
    collections_since,
    watch_pauses,
)
from gpuscope.testing import ManualClock, capture

from ..exporters.batches import Row, make_batch

HEAP = 200_000
FULL = {"generation": 2, "collected": 0, "uncollectable": 0}
YOUNG = {"generation": 0, "collected": 0, "uncollectable": 0}


def collections_of(span):
    """The events of garbage collections, as (time, duration, generation)."""
    return [(at, told[GC_DURATION], told[GC_GENERATION]) for name, at, told in span.events if name == GC_EVENT]


@pytest.fixture
def heap():
    """Enough objects for a collection of milliseconds."""
    return [[number] for number in range(HEAP)]


def test_a_collection_is_an_event_of_every_open_stage(heap):
    """Each stage that was open while Python collected garbage says so, on whatever thread; no other one does."""
    entered, leave = threading.Event(), threading.Event()

    def wait():
        with stage("elsewhere"):
            entered.set()
            leave.wait(10)

    with capture() as spans:
        thread = threading.Thread(target=wait)
        thread.start()
        entered.wait(10)
        with stage("before"):
            pass
        with stage("outer"), stage("inner"):
            gc.collect()
        with stage("after"):
            pass
        leave.set()
        thread.join()
        gpuscope.flush()
    found = {span.name: collections_of(span) for span in spans}
    assert len(heap) == HEAP
    assert found["before"] == found["after"] == []
    assert [generation for _, _, generation in found["inner"]] == [2]
    assert found["inner"] == found["outer"] == found["elsewhere"]


def test_a_pause_is_as_long_as_an_independent_clock_says(heap):
    """The duration lies within what another clock measures around the call, and is nearly all of that."""
    ratios = []
    with capture() as spans:
        for _ in range(5):
            with stage("request"):
                before_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
                gc.collect()
                ratios.append(time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW) - before_ns)
        gpuscope.flush()
    assert len(heap) == HEAP
    for span, around_ns in zip(spans, ratios, strict=True):
        ((at_ns, took_ns, _),) = collections_of(span)
        # The raw clock is not disciplined by NTP: at most 500 parts of a million apart.
        assert took_ns <= around_ns * 1.0005
        assert span.start_ns <= at_ns <= at_ns + took_ns <= span.end_ns
    assert max(collections_of(span)[0][1] / around for span, around in zip(spans, ratios, strict=True)) > 0.9


def test_short_collections_of_young_objects_are_no_events():
    """A collection that takes microseconds is what Python does all the time."""
    gc.freeze()
    try:
        with capture() as spans:
            with stage("request"):
                for _ in range(100):
                    gc.collect(0)
            gpuscope.flush()
    finally:
        gc.unfreeze()
    assert [each for span in spans for each in collections_of(span) if each[1] < 1_000_000] == []


def test_what_the_program_tells_a_stage_stays():
    """Events come beside attributes."""
    with capture() as spans:
        with stage("request", attributes={"user": 7}):
            gc.collect()
        gpuscope.flush()
    assert spans[0].attributes["user"] == 7
    assert len(collections_of(spans[0])) == 1


def test_a_stage_that_many_collections_meet_keeps_the_newest():
    """What is left out is not kept, and the stage goes out."""
    with capture() as spans:
        with stage("request"):
            for _ in range(MOST_EVENTS + 5):
                gc.collect()
        gpuscope.flush()
    assert len(collections_of(spans[0])) == MOST_EVENTS


def test_the_metric_counts_by_generation():
    """Each collection counts once, whoever asks how often."""
    watch_collections()
    times = CollectionTimes()
    gc.collect()
    gc.collect()
    first, second = times.points()[COLLECTIONS], times.points()[COLLECTIONS]
    full = {point.attributes[GC_GENERATION]: point.value for point in first}[2]
    assert sum(full.counts) >= 2
    assert 0 < full.sum_s < 60
    assert {point.attributes[GC_GENERATION] for point in second} >= {2}


def test_python_tells_of_a_collection_once():
    """However many periods of recording there are, there are no more callbacks."""
    watch_collections()
    before = list(gc.callbacks)
    watch_collections()
    watch_pauses()
    assert gc.callbacks == before
    assert native is None or note_collection in gc.callbacks


class TestTwin:
    """The twin in Python, called as `gc` would."""

    def tell(self, twin, phase, facts):
        """Do as `gc` does."""
        for callback in twin.callbacks:
            callback(phase, dict(facts))

    def test_full_and_long_collections_are_known(self):
        """Short ones of young objects are not."""
        clock = ManualClock(0)
        twin = Collections(clock)
        for facts, seconds in ((FULL, 0.0), (YOUNG, 0.0), (YOUNG, 0.002), (FULL, 0.003)):
            self.tell(twin, "start", facts)
            clock.advance(seconds)
            self.tell(twin, "stop", facts)
        count, found = twin.since(0)
        assert count == 3
        assert [(each.generation, round((each.end_ns - each.start_ns) / 1e6)) for each in found] == [
            (2, 0),
            (0, 2),
            (2, 3),
        ]
        assert twin.since(2) == (3, found[2:])
        assert twin.since(3) == (3, [])

    def test_a_collection_that_began_unseen_is_left_out(self):
        """The callbacks may be put there within one."""
        clock = ManualClock(0)
        twin = Collections(clock)
        self.tell(twin, "stop", FULL)
        self.tell(twin, "start", FULL)
        self.tell(twin, "stop", FULL)
        assert len(twin.since(0)[1]) == 1

    def test_only_the_newest_are_kept(self):
        """Memory is bounded."""
        twin = Collections(ManualClock(0))
        for _ in range(MOST + 10):
            self.tell(twin, "start", FULL)
            self.tell(twin, "stop", FULL)
        count, found = twin.since(0)
        assert (count, len(found)) == (MOST + 10, MOST)


@pytest.mark.skipif(native is None, reason="of the parts in C")
def test_the_part_in_c_keeps_the_newest():
    """Memory is bounded there, too, and nonsense is refused."""
    before, _ = collections_since(0)
    for _ in range(MOST + 10):
        native.note_collection("start", FULL)
        native.note_collection("stop", FULL)
    count, found = collections_since(before)
    assert count >= before + MOST + 10
    assert len(found) == MOST
    assert all(isinstance(each, Collection) and each.start_ns <= each.end_ns for each in found)
    native.note_collection("stop", "nonsense")
    native.note_collection("start", {})
    native.note_collection("stop", {"generation": "old"})
    with pytest.raises(TypeError):
        native.collections_since("many")
    with pytest.raises(OverflowError):
        native.collections_since(-1)


class TestReplaying:
    """A stage that replayed CUDA graphs, and does so no more."""

    def calls(self, replaying, site, count, replays):
        """Run a batch of so many calls, with so many replays since the last; return the row that is told of."""
        site.replays += replays
        batch = make_batch(*[Row(site=site, host_ns=10) for _ in range(count)])
        found = replaying.look(batch)
        return [row for row, details in found.details.items() if (details.attributes or {}).get(EAGER_AGAIN)]

    def test_it_is_said_once(self):
        """After enough calls with replays, and then enough without one; again only after it replayed again."""
        replaying, site = Replaying(), Site("infer", {})
        assert self.calls(replaying, site, ENOUGH_CALLS, ENOUGH_CALLS) == []
        assert self.calls(replaying, site, ENOUGH_CALLS - 1, 0) == []
        assert self.calls(replaying, site, 2, 0) == [1]
        assert self.calls(replaying, site, 500, 0) == []
        say_what_waits()
        # The calls without one count against it: it has to be usual again.
        assert self.calls(replaying, site, 10_000, 10_000) == []
        assert self.calls(replaying, site, ENOUGH_CALLS, 0) == [ENOUGH_CALLS - 1]

    def test_a_stage_that_replays_now_and_then_is_no_news(self):
        """Where replays were never usual, their absence says nothing."""
        replaying, site = Replaying(), Site("infer", {})
        assert self.calls(replaying, site, 100, 10) == []
        assert self.calls(replaying, site, 500, 0) == []

    def test_few_calls_are_no_habit(self):
        """A graph that was replayed in the warm-up alone is left alone."""
        replaying, site = Replaying(), Site("infer", {})
        assert self.calls(replaying, site, 5, 5) == []
        assert self.calls(replaying, site, 500, 0) == []

    def test_stages_without_graphs_are_not_looked_at(self):
        """And pay nothing."""
        replaying, site = Replaying(), Site("infer", {})
        assert self.calls(replaying, site, 500, 0) == []
        assert replaying._seen == {}
