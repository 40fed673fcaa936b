"""
The two halves of recording a stage, `begin` and `end`: the hot code, and the twin of that in C.

On the common path it never locks, logs, formats, imports, reads the environment or does I/O. What a part of ours raises
never reaches the application: after one part has failed the others still run, so that no range stays open. What the
program raises, by Ctrl-C or in its own signal handler, reaches it, after the same. So both may be interrupted between
any two bytecodes: what is opened or handed over is also noted, and C does both in one step (`map`, `iter`).
"""

from __future__ import annotations

import _thread
import contextlib
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from gpuscope._data.native import StageRecord, Trace, native
from gpuscope._data.plain.exceptions import exception_info, size_of_exception
from gpuscope._data.record import ThreadInfo
from gpuscope._interrupts import instead_of, is_the_programs
from gpuscope._recording.current_stage import (
    TAKEN_OUT,
    before,
    close_inside,
    close_range,
    current,
    find_current,
    is_left_behind,
    step_in,
    step_out,
)
from gpuscope._recording.queue import hold

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._data.interfaces import Nvtx, Stream
    from gpuscope._data.record import ExceptionInfo, Site
    from gpuscope._recording.recorder import Recorder

__all__ = ["begin", "current", "end", "end_raised", "new_record", "start", "thread_info", "undo"]


class _Threads(threading.local):
    info: ThreadInfo


_threads = _Threads()


def begin_in_python(recorder: Recorder, record: StageRecord, site: Site, stream: Stream, suspends: int) -> None:
    """Start a run of a stage on this thread, in this context. The caller has set attributes and members."""
    record.start_ns = record.end_ns = 0
    record.outer = record.before = record.place = record.span = record.context_before = record.timed_stream = None
    record.pair = record.range = record.error = record.flight = None
    try:
        record.recorder, record.site = recorder, site
        outer = _find_outer(recorder)
        if outer is not None and outer.recorder is recorder:
            record.outer = outer
            record.trace = outer.trace
        else:
            record.before = outer
            record.trace = trace = Trace()
            trace.trace_id = recorder.random_bits(128)
            trace.parent_id = 0
            trace.remote = False
            trace.root = site
            trace.sampled = trace.state = None
        record.span_id = next(recorder.span_ids)
        try:
            record.thread = _threads.info
        except AttributeError:
            record.thread = thread_info()
        step_in(record)
        look = recorder.look_for_provider
        if look is not None and (
            # Even with no provider, its parent may be a remote span or a stage that has already ended.
            look() is not None or (recorder.current_context() if outer is None else outer.end_ns)  # type: ignore[misc]
        ):
            recorder.bridge.enter(record)  # type: ignore[union-attr]  # `look` is its question, so it is there.
        if recorder.nvtx is not None:
            ranges: list[object] = [None]
            record.range = ranges
            ranges.extend(map(recorder.nvtx.begin, (site,), (suspends,)))
        record.start_ns = recorder.clock()
        if recorder.flight is not None:
            recorder.flight.begin(record)
        recorder.device.begin(record, stream)
    except BaseException as error:  # Judged there: a part's is swallowed, the program's goes on.
        _begin_failed(recorder, record, error)


def _find_outer(recorder: Recorder) -> StageRecord | None:
    outer = find_current()
    while outer is not None and is_left_behind(outer):
        _leave_behind(recorder, outer)
        outer = before(outer)
    return outer


def _leave_behind(recorder: Recorder, record: StageRecord) -> None:
    """Take a stage that has ended elsewhere out of OpenTelemetry's context; that it is no longer current is settled."""
    if record.span is not None and record.recorder is recorder:
        recorder.bridge.leave_behind(record)


def thread_info() -> ThreadInfo:
    """Return what is known of this thread."""
    if not hasattr(_threads, "info"):
        ident = threading.get_ident()
        _threads.info = ThreadInfo(ident, _thread_name(ident))
    return _threads.info


def _thread_name(ident: int) -> str:
    # `current_thread` would make and keep an object for a thread that Python did not start, or that is about to end.
    try:
        return str(threading._active[ident].name)  # type: ignore[attr-defined]
    except Exception as error:  # There is none, or the name is the program's own property.
        return instead_of(error, f"Thread-{ident}")


def _begin_failed(recorder: Recorder, record: StageRecord, error: BaseException) -> None:
    """Let the stage go on without the part that failed, or undo what was begun and raise what is the program's."""
    if is_the_programs(error):
        undo(recorder, record)
        raise error
    recorder.ledger.untimed("begin_failed")
    with contextlib.suppress(Exception):  # Also what was not reached: a record that lacks it would not be exported.
        if not hasattr(record, "thread"):
            record.thread = thread_info()
    with contextlib.suppress(Exception):  # It may be the clock that failed; the stage is counted by now.
        record.start_ns = record.start_ns or recorder.clock()
        if native is None and recorder.flight is not None and record.flight is None:
            recorder.flight.begin(record)


def undo(recorder: Recorder, record: StageRecord) -> None:
    """Leave nothing of a stage that has begun in part: nobody is going to end it."""
    if not hasattr(record, "error") or record.end_ns:  # Nothing has begun, or it is undone.
        return
    record.end_ns = record.start_ns or 1
    recorder.ledger.fail("interrupted")
    _leave_contexts(recorder, record)
    with contextlib.suppress(Exception):
        close_range(record)
    with contextlib.suppress(Exception):
        recorder.device.give_back(record)
    with contextlib.suppress(Exception):  # Most have none.
        recorder.flight.end(record, None)  # type: ignore[union-attr]


def start_in_python(recorder: Recorder, site: Site, stream: Stream, suspends: int) -> StageRecord:
    """Begin a run of a stage with a new record, and return that."""
    record = _new_record()
    begin(recorder, record, site, stream, suspends)
    return record


def end_in_python(record: StageRecord, error: BaseException | None) -> None:
    """Finish a run on the way out of the stage, whether it returns or raises."""
    recorder: Recorder = record.recorder
    if record.end_ns:  # Its beginning was interrupted, and undone.
        return
    left = [None, record]
    try:
        if record.pair is not None:
            recorder.device.end(record)
        record.end_ns = recorder.clock()
        if recorder.flight is not None:
            recorder.flight.end(record, error)
        if step_out(record) == TAKEN_OUT:
            if record.span is not None:
                recorder.bridge.leave(record)  # type: ignore[union-attr]  # It has put the span there.
        elif record.span is not None:
            recorder.bridge.leave_elsewhere(record)  # type: ignore[union-attr]
        if isinstance(record.range, list) and recorder.nvtx is not None:
            _leave_range(recorder.nvtx, record.range)
        if error is not None:
            record.error = _note_error(error, record)
        _hand_over(recorder, left)
    except BaseException as failure:  # As above.
        _end_what_is_left(recorder, record, failure, record not in left)


def _leave_range(nvtx: Nvtx, opened: list[object]) -> None:
    if isinstance(opened[-1], list):  # Its door knows whether it is closed.
        nvtx.end(opened[-1])
    # Takes it out and closes it, in one step.
    deque(map(nvtx.end, iter(opened.pop, None)), 0)


def _hand_over(recorder: Recorder, left: list[StageRecord | None]) -> None:
    """Queue the record that is in the list, and take it out of there in the same step; after that it is counted."""
    record = left[1]
    if len(recorder.waiting) < recorder.capacity:
        recorder.waiting.extend(iter(left.pop, None))
    elif not any(map(recorder.queue.put, iter(left.pop, None))):
        recorder.device.give_back(record)  # type: ignore[arg-type]


def _end_what_is_left(recorder: Recorder, record: StageRecord, error: BaseException, queued: bool) -> None:
    """Do what `end` has not done, each step on its own; raise what is the program's."""
    programs = is_the_programs(error)
    if programs and not record.end_ns:
        with contextlib.suppress(Exception):
            if record.pair is not None:
                recorder.device.end(record)
            record.end_ns = recorder.clock()
    record.end_ns = record.end_ns or record.start_ns or 1
    if recorder.flight is not None and (native is None or hasattr(recorder.flight, "inner")):  # C ends its ring itself.
        recorder.flight.end(record, None)
    _leave_contexts(recorder, record)
    with contextlib.suppress(Exception):
        close_range(record)
    if not queued:
        _account(recorder, record, interrupted=programs)
    if programs:
        raise error


def _account(recorder: Recorder, record: StageRecord, *, interrupted: bool) -> None:
    left = [None, record]
    if interrupted:
        with contextlib.suppress(Exception):
            _hand_over(recorder, left)
    if len(left) > 1:
        with contextlib.suppress(Exception):  # The pool is one pair poorer.
            recorder.device.give_back(record)
        record.pair = None
        recorder.ledger.fail("stage_error")


def _leave_contexts(recorder: Recorder, record: StageRecord) -> None:
    done = step_out(record)
    if record.span is not None and recorder.bridge is not None:
        with contextlib.suppress(Exception):
            (recorder.bridge.leave if done == TAKEN_OUT else recorder.bridge.leave_elsewhere)(record)


def _note_error(error: BaseException, record: StageRecord) -> ExceptionInfo | None:
    facts = exception_info(error)
    if facts is not None:
        hold(record, size_of_exception(facts))
    return facts


def end_raised_in_python(record: StageRecord, error: BaseException, harmless: type[BaseException] | None) -> None:
    """
    Finish a run that an exception has left, unless it came before the run began or after it ended.

    A second interrupt, as the first step of this function, comes before the `try`: see `block.StageBlock.__exit__`.
    """
    try:
        if hasattr(record, "recorder"):
            end_in_python(record, None if type(error) is harmless else error)
    except BaseException:  # An interrupt, which goes on; the second `end` does nothing where it came after the first.
        if hasattr(record, "recorder"):
            end_in_python(record, None)
        raise


def _new_record() -> StageRecord:
    record = StageRecord()
    record.attributes = record.members = None
    return record


new_record: Callable[[], StageRecord] = _new_record
"""A record that may begin. Who begins it in a `try` can end it, wherever in `begin` an interrupt comes."""
end_raised: Callable[[StageRecord, BaseException, type[BaseException] | None], None] = end_raised_in_python
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
        begin_failed=_begin_failed,
        end_the_rest=_end_what_is_left,
        exception_info=_note_error,
        leave_behind=_leave_behind,
        close_inside=close_inside,
    )
    new_record, begin, start, end = native.new_record, native.begin, native.start, native.end
    end_raised = native.end_raised
    # A function that goes to another process by value refers to them by name, and there the twins may stand here.
    new_record.__module__ = begin.__module__ = start.__module__ = end.__module__ = end_raised.__module__ = __name__
