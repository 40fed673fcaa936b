"""
The two halves of recording a stage, `begin` and `end`: the hot code, and the twin of that in C.

On the common path it never locks, logs, formats, imports, reads the environment or does I/O. It never raises into the
application: after one part has failed the others still run, so that no range stays open.
"""

from __future__ import annotations

import _thread
import contextlib
import sys
import threading
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING

from gpuscope._data.native import StageRecord, Trace, native
from gpuscope._data.record import ThreadInfo
from gpuscope._data.values import exception_info
from gpuscope._recording.ancestry import running_stage
from gpuscope._recording.queue import hold

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._data.interfaces import Stream
    from gpuscope._data.record import ExceptionInfo, Site
    from gpuscope._recording.recorder import Recorder

_FRAME_BYTES = 64
_modules = sys.modules
current: ContextVar[StageRecord | None] = ContextVar("gpuscope_stage", default=None)


class _Threads(threading.local):
    facts: ThreadInfo


_threads = _Threads()


def begin_in_python(recorder: Recorder, record: StageRecord, site: Site, stream: Stream, suspends: int) -> None:
    """Start a run of a stage on this thread, in this context. The caller has set the record's attributes."""
    record.recorder = recorder
    record.site = site
    record.start_ns = record.end_ns = 0
    record.outer = record.span = record.context_before = record.timed_stream = record.pair = record.range = (
        record.error
    ) = None
    try:
        outer = current.get()
        if outer is not None and outer.recorder is recorder:
            record.outer = outer
            record.trace = outer.trace
        else:
            record.trace = trace = Trace()
            trace.trace_id = recorder.random_bits(128)
            trace.parent_id = 0
            trace.remote = False
            trace.root = site
            trace.sampled = None
        record.span_id = next(recorder.span_ids)
        try:
            record.thread = _threads.facts
        except AttributeError:
            record.thread = thread_info()
        current.set(record)
        look = recorder.look_for_provider or _first_sight_of_otel(recorder)
        if look is not None and (
            # Even with no provider, its parent may be a remote span or a stage that has already ended.
            look() is not None or (recorder.current_context() if outer is None else outer.end_ns)  # type: ignore[misc]
        ):
            recorder.bridge.enter(record)  # type: ignore[union-attr]  # `look` is its question, so it is there.
        if recorder.nvtx is not None:
            record.range = recorder.nvtx.begin(site, suspends)
        record.start_ns = recorder.clock()
        recorder.device.begin(record, stream)
    except Exception:  # The application must not notice; `end` copes with whatever is missing.
        _begin_failed(recorder, record)


def thread_info() -> ThreadInfo:
    """Return what is known of this thread."""
    if not hasattr(_threads, "facts"):
        ident = threading.get_ident()
        _threads.facts = ThreadInfo(ident, _thread_name(ident))
    return _threads.facts


def _thread_name(ident: int) -> str:
    # `current_thread` would make and keep an object for a thread that Python did not start, or that is about to end.
    try:
        return str(threading._active[ident].name)  # type: ignore[attr-defined]
    except Exception:  # There is none, or the name is the program's own property.
        return f"Thread-{ident}"


def _begin_failed(recorder: Recorder, record: StageRecord) -> None:
    recorder.ledger.untimed("begin_failed")
    with contextlib.suppress(Exception):  # Also what was not reached: a record that lacks it would not be exported.
        if not hasattr(record, "thread"):
            record.thread = thread_info()
    with contextlib.suppress(Exception):  # It may be the clock that failed; the stage is counted by now.
        record.start_ns = record.start_ns or recorder.clock()


def _first_sight_of_otel(recorder: Recorder) -> Callable[[], object] | None:
    return recorder.look_for_provider if "opentelemetry.trace" in _modules and recorder.open_bridge() else None


def start_in_python(recorder: Recorder, site: Site, stream: Stream, suspends: int) -> StageRecord:
    """Begin a run of a stage with a new record, and return that."""
    record = StageRecord()
    record.attributes = None
    begin(recorder, record, site, stream, suspends)
    return record


def end_in_python(record: StageRecord, error: BaseException | None) -> None:
    """Finish a run on the way out of the stage, whether it returns or raises."""
    recorder: Recorder = record.recorder
    try:
        if record.pair is not None:
            recorder.device.end(record)
        record.end_ns = recorder.clock()
        if record.range is not None:
            opened, record.range = record.range, None
            recorder.nvtx.end(opened)  # type: ignore[union-attr]  # It has opened this range.
        if record.span is not None:
            recorder.bridge.leave(record)  # type: ignore[union-attr]  # It has put the span there.
        if error is not None:
            record.error = _note_error(error, record)
        if current.get() is record:
            outer = record.outer
            current.set(outer if outer is None or not outer.end_ns else running_stage(outer))
        if len(recorder.waiting) < recorder.capacity:
            recorder.waiting.append(record)
        elif not recorder.queue.put(record):
            recorder.device.give_back(record)
    except Exception:  # Each remaining step on its own: a range left open would misname all that follows.
        _end_what_is_left(recorder, record)


def _end_what_is_left(recorder: Recorder, record: StageRecord) -> None:
    record.pair = None
    record.end_ns = record.end_ns or record.start_ns
    if record.range is not None:
        with contextlib.suppress(Exception):
            recorder.nvtx.end(record.range)  # type: ignore[union-attr]  # It has opened this range.
    if record.context_before is not None:
        with contextlib.suppress(Exception):
            recorder.bridge.leave(record)  # type: ignore[union-attr]  # It has put the span there.
    if current.get() is record:
        current.set(running_stage(record.outer))
    recorder.ledger.fail("stage_error")


def _note_error(error: BaseException, record: StageRecord) -> ExceptionInfo | None:
    facts = exception_info(error)
    if facts is not None:
        hold(record, len(facts.message) + _FRAME_BYTES * len(facts.frames))
    return facts


begin: Callable[[Recorder, StageRecord, Site, Stream, int], None] = begin_in_python
start: Callable[[Recorder, Site, Stream, int], StageRecord] = start_in_python
end: Callable[[StageRecord, BaseException | None], None] = end_in_python
if native is not None:
    native.prepare(
        # Where it is not Python's own, as below gevent, each greenlet is a thread of its own.
        keeps_threads=threading.local is _thread._local,
        current=current,
        perf_counter=time.perf_counter_ns,
        thread_info=thread_info,
        see_otel=_first_sight_of_otel,
        begin_failed=_begin_failed,
        end_the_rest=_end_what_is_left,
        exception_info=_note_error,
        running=running_stage,
    )
    begin, start, end = native.begin, native.start, native.end
    # A function that goes to another process by value refers to them by name, and there the twins may stand here.
    begin.__module__ = start.__module__ = end.__module__ = __name__
