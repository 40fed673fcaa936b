"""The C types taken apart: a deleted attribute or one of another type is an exception of Python at most."""

from __future__ import annotations

import contextlib
import gc

import pytest

from gpuscope import _runtime, stage
from gpuscope._data.native import StageRecord, TimedStreamFields, Trace, native
from gpuscope._recording import hot_path
from gpuscope._recording.stage import Stage

DELETED = object()
VALUES = (DELETED, None, 0, -1, 2**70, 1.5, "text", b"", (), (None,) * 4, (None, None, "c", "d"), [], {}, object(), int)
RECORD = [
    *("attributes", "context_before", "end_ns", "error", "outer", "pair", "range", "recorder", "site", "span"),
    *("span_id", "start_ns", "thread", "timed_stream", "trace", "owner", "stream", "uses"),
]
TRACE = ["parent_id", "remote", "root", "sampled", "trace_id"]
TIMED_STREAM = ["context", "foreign", "guarded", "handle", "index", "pairs", "raw"]
RECORDER = [
    *("bridge", "capacity", "clock", "current_context", "device", "ledger", "look_for_provider", "nvtx", "queue"),
    *("random_bits", "span_ids", "waiting"),
]


@contextlib.contextmanager
def damaged(part, name, value):
    """Damage an attribute for a block, where the type lets it be done, and then put it back."""
    before = getattr(part, name, DELETED)
    with contextlib.suppress(Exception):
        delattr(part, name) if value is DELETED else setattr(part, name, value)
    try:
        yield
    finally:
        with contextlib.suppress(Exception):
            if before is not DELETED:
                setattr(part, name, before)


def tried(work):
    """Do something that may raise, and leave nothing current."""
    with contextlib.suppress(Exception):
        work()
    hot_path.current.set(None)


def enter_and_leave(block):
    """Run an empty block."""
    with block:
        pass


def run_inside(name, value, part_of):
    """Run a stage with another one inside, and damage the outer one meanwhile for good."""
    with stage("outer") as outer:
        part = part_of(outer)
        with contextlib.suppress(Exception):
            delattr(part, name) if value is DELETED else setattr(part, name, value)
        with stage("inner"):
            pass


def still_works(machine):
    """Run a stage and find it among the spans."""
    machine.collect()
    machine.spans.clear()
    with stage("after"):
        pass
    return any(span.name == "after" for span in machine.collect())


@pytest.mark.parametrize("name", RECORD)
def test_a_damaged_record_ends_nothing(machine, name):
    """Before it is entered, while it runs, and while it waits for the collector; those beside it are exported."""
    for value in VALUES:
        if name == "pair" and isinstance(value, str | tuple) and machine.engine.recorder.device.reader is None:
            continue  # `ctypes` hands a text to the driver as an address.
        block = stage("before")
        with damaged(block, name, value):
            tried(lambda block=block: enter_and_leave(block))
        tried(lambda value=value: run_inside(name, value, lambda outer: outer))
        waiting = stage("waiting")
        tried(lambda waiting=waiting: enter_and_leave(waiting))
        with damaged(waiting, name, value):
            tried(machine.collect)
        tried(machine.collect)
        del block, waiting
    gc.collect()
    assert still_works(machine)


@pytest.mark.parametrize("name", TRACE)
def test_a_damaged_trace_ends_nothing(machine, name):
    """While its stage runs, and so for those inside and for the collector."""
    for value in VALUES:
        tried(lambda value=value: run_inside(name, value, lambda outer: outer.trace))
        tried(machine.collect)
    assert still_works(machine)


@pytest.mark.parametrize("name", TIMED_STREAM)
def test_a_damaged_stream_ends_nothing(machine, name):
    """While a stage runs on it, for the next one, and for the collector."""
    with stage("first"):
        pass
    machine.collect()
    (timed_stream,) = machine.timed_streams.values()
    for value in VALUES:
        with damaged(timed_stream, name, value):
            tried(lambda: enter_and_leave(stage("outer")))
            tried(machine.collect)
    assert still_works(machine)


@pytest.mark.parametrize("name", RECORDER)
def test_a_damaged_recorder_ends_nothing(machine, name):
    """While a stage begins and ends with it."""
    recorder = _runtime.state.recorder
    for value in VALUES:
        with damaged(recorder, name, value):
            tried(lambda: enter_and_leave(stage("outer")))
    assert still_works(machine)


@pytest.mark.skipif(native is None, reason="the parts in C are not in use")
@pytest.mark.parametrize("kind", [StageRecord, Trace, TimedStreamFields, Stage])
def test_a_bare_object_ends_nothing(machine, kind):
    """One that was made by hand, with no attribute set, is refused wherever it is given."""
    del machine
    bare = kind()
    recorder, site = _runtime.state.recorder, None
    for call in (
        lambda: native.begin(recorder, bare, site, None, 0),
        lambda: native.end(bare, None),
        lambda: native.start(recorder, bare, bare, bare),
        lambda: native.new_block(Stage, bare, bare).__enter__(),
        lambda: native.StageBlock.__enter__(bare),
        lambda: bare.__exit__(None, None, None),
        lambda: native.pack([(bare, 0, 0, 0, 0)], {}, {}, repr, 0, 0, 1, 2),
        lambda: native.pack([(bare, 1, 1, 1, 0)], {}, {}, repr, 2, 0, 1, 2),
        lambda: recorder.device.begin(bare, None),
        lambda: recorder.device.end(bare),
    ):
        tried(call)
    for name in dir(kind):
        if not name.startswith("__"):
            with contextlib.suppress(Exception):
                getattr(bare, name)
            with contextlib.suppress(Exception):
                delattr(bare, name)
