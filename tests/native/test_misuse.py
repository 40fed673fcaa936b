"""The C types taken apart: a deleted attribute or one of another type is an exception of Python at most."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref

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
    *("bridge", "capacity", "clock", "current_context", "device", "flight", "ledger", "look_for_provider", "nvtx"),
    *("queue", "random_bits", "span_ids", "waiting"),
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


@pytest.mark.parametrize("name", ["recorder", "off_stages"])
def test_a_damaged_state_ends_nothing(machine, name):
    """While recording is on and while it is off: blocks and decorated functions raise at most."""
    state, decorated = _runtime.state, stage("decorated")(lambda: None)
    with stage("known"):
        pass
    for recorder in (state.recorder, None):
        with damaged(state, "recorder", recorder):
            for value in VALUES:
                with damaged(state, name, value):
                    for call in (lambda: enter_and_leave(stage("known")), lambda: stage("unknown"), decorated):
                        tried(call)
                tried(lambda: enter_and_leave(stage("known")))
    gc.collect()
    assert still_works(machine)


@pytest.mark.skipif(native is None, reason="the parts in C are not in use")
def test_a_shortcut_takes_no_nonsense(bench):
    """What is no function, no state, no table, no block or no arguments is refused, on and off."""
    good = (repr, _runtime.state, {}, Stage)
    assert native.Shortcut(*good)("x") == "'x'"
    for place, value in itertools.product(range(4), VALUES[1:]):
        made = []
        with contextlib.suppress(TypeError):
            made.append(native.Shortcut(*good[:place], value, *good[place + 1 :]))
        assert not made or (callable(value) and place == 0) or (isinstance(value, dict) and place == 2)
    for arguments, options in ((good[:1], {}), (good[:3], {}), ((*good, 1), {}), (good, {"a": 1}), ((), {})):
        with pytest.raises(TypeError):
            native.Shortcut(*arguments, **options)
    for recorder in (_runtime.state.recorder, None):
        _runtime.state.recorder = recorder


@pytest.mark.skipif(native is None, reason="the parts in C are not in use")
def test_a_table_that_changes_while_it_is_asked(bench):
    """A name of the program's own class may do anything when it is compared, also replace the table."""
    state = _runtime.state

    class Evil(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other):
            state.off_stages = {}
            gc.collect()
            return str.__eq__(self, other)

    for recorder in (state.recorder, None):
        state.recorder = recorder
        for turn in range(5):
            state.off_stages = {Evil("evil"): object()}
            tried(lambda: stage("evil"))
            tried(lambda turn=turn: stage(f"evil{turn}"))


@pytest.mark.skipif(native is None, reason="the parts in C are not in use")
def test_a_shortcut_is_collected(bench):
    """One that refers to itself goes; its names and what they led to go with it."""

    class Own(native.Shortcut):
        def __init__(self, *_):
            self.me = self

    own = Own(repr, _runtime.state, {}, Stage)
    _runtime.state.recorder = None
    stage("kept")
    assert own("kept") is stage("kept")
    gone = weakref.ref(own)
    del own
    gc.collect()
    assert gone() is None


@pytest.mark.skipif(native is None, reason="the parts in C are not in use")
def test_a_noop_block_takes_no_nonsense():
    """Made by hand it works; its methods are bound to such blocks alone."""
    block = native.NoopBlock()
    with block as entered:
        assert entered is block
    native.keep(block)
    native.keep(block)
    with block as entered:
        assert entered is block
    binder = vars(native.NoopBlock)["__enter__"]
    for nonsense in (1, "text", object(), native.NoopBlock):
        for call in (
            lambda nonsense=nonsense: native.keep(nonsense),
            lambda nonsense=nonsense: binder.__get__(nonsense, int),
            lambda nonsense=nonsense: native.NoopBlock.__enter__(nonsense),
        ):
            with pytest.raises(TypeError):
                call()
    with pytest.raises(TypeError):
        type(binder)()
    with pytest.raises(TypeError):
        native.NoopBlock(1)
    gone = weakref.ref(type("Own", (native.NoopBlock,), {})())
    gc.collect()
    assert gone() is None
