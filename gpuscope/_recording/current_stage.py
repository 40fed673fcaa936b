"""
Which stage is current, in which context, and which stages are around a stage. `csrc/current.h` is the twin.

A stage is made current in the context that it is entered in, and its *place* says so until it is taken out of there.
When it ends there, what was current before is current again, whatever has become current since and was never left: a
generator that somebody stopped reading, for one. A stage that ends in another context can't be taken out of its own.
Whoever finds it there later, ended and in its place, knows that it was left behind. Found elsewhere, it was inherited,
as by a task that was started inside it, and what begins there belongs to its trace.

Before 3.12 Python collects garbage within allocations, also within those of `ContextVar.set`. If a finalizer then sets
any variable of the same context, the first `set` goes on with memory that was freed (it borrows the context's table).
So a stage that begins while its own thread collects garbage is made current in `_within` instead, and in no context.
"""

from __future__ import annotations

import gc
import sys
import threading
from contextvars import ContextVar, copy_context
from functools import partial, update_wrapper
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from gpuscope._data.native import native
from gpuscope._data.plain.values import shown
from gpuscope._interrupts import is_the_programs
from gpuscope._recording.pauses.collections import watch_pauses

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._data.record import StageRecord

P = ParamSpec("P")
R = TypeVar("R")

ELSEWHERE, TAKEN_OUT = 0, 1
"""What `step_out` did: nothing, or little, in a context that is not the stage's; or all that there is to do."""
_COLLECTS_ANYWHERE = sys.version_info < (3, 12)

current: ContextVar[StageRecord | None] = ContextVar("gpuscope_stage", default=None)


class _Within(threading.local):
    """What is current in the finalizers that a garbage collection runs, by thread."""

    stage: StageRecord | None = None


class _Phases(list[str]):
    """
    Longer than `_IDLE` while garbage is collected.

    `gc` sets one of these attributes in C alone: a callback in Python would swallow what a signal handler raises in it.
    """

    start = property(fset=list.append)
    stop = property(fset=list.__init__)  # To the three keys of what `gc` tells.


_IDLE = 3
_within, _phases = _Within(), _Phases("gcu")
note_collection_in_python = partial(setattr, _phases)


def is_collecting_in_python() -> bool:
    """Tell whether this code runs within a garbage collection, where no context variable may be set."""
    return len(_phases) > _IDLE


note_collection, is_collecting = note_collection_in_python, is_collecting_in_python
if native is not None:
    note_collection, is_collecting = native.note_collection, native.is_collecting


def before(record: StageRecord) -> StageRecord | None:
    """Return what was current when the stage was entered."""
    return record.outer if record.before is None else record.before


def find_current() -> StageRecord | None:
    """Return the current stage, which may have ended."""
    if is_collecting() and _within.stage is not None and not _within.stage.end_ns:
        return _within.stage
    return current.get()


def is_left_behind(record: StageRecord) -> bool:
    """Tell whether the current stage has ended elsewhere and is still in its place, which is here."""
    if not record.end_ns or not record.place or is_collecting():
        return False
    try:
        current.reset(record.place)
    except (ValueError, RuntimeError):  # Another context's.
        return False
    record.place = current.set(record)
    return True


def step_in(record: StageRecord) -> None:
    """Make the stage current."""
    if is_collecting():
        _within.stage = record
        return
    _held = copy_context() if _COLLECTS_ANYWHERE else None  # Keeps the table that `set` borrows.
    record.place = current.set(record)


def step_out_in_python(record: StageRecord) -> int:
    """Make current what was current before the stage; return `TAKEN_OUT` or `ELSEWHERE`."""
    outer = before(record)
    if is_collecting():
        if _within.stage is record:
            _within.stage = outer
        return ELSEWHERE
    _held = copy_context() if _COLLECTS_ANYWHERE else None
    now = current.get()
    own = _leave_place(record)
    inside = now is record or (own and _is_inside(now, record))
    current.set(outer if inside else now)
    if inside and now is not record:
        close_inside(record, now)
    if own:
        record.before = None
    return TAKEN_OUT if own and inside else ELSEWHERE


def _leave_place(record: StageRecord) -> bool:
    if not record.place:
        return False
    try:
        current.reset(record.place)
    except ValueError:  # This is another context, so its own may still have it.
        return False
    except RuntimeError:  # It has been taken out by now.
        pass
    record.place = None
    return True


def _is_inside(now: StageRecord | None, record: StageRecord) -> bool:
    while now is not None and now is not record:
        now = before(now)
    return now is record


def close_inside(record: StageRecord, now: StageRecord | None) -> None:
    """Close what is still open between a stage that ends and the current one: NVTX ranges, and remote contexts."""
    while now is not None and now is not record:
        if hasattr(now, "close"):
            now.close()
        elif not now.end_ns and now.thread is record.thread:  # Pushed ranges nest by thread.
            close_range(now)
        now = before(now)


def close_range(record: StageRecord) -> None:
    """Close the stage's NVTX range, if it is open."""
    opened, record.range = record.range, None
    if native is None and isinstance(opened, list):  # See `hot_path.begin_in_python`.
        opened = opened[1] if len(opened) > 1 else None
    if opened is not None and record.recorder.nvtx is not None:
        try:
            record.recorder.nvtx.end(opened)
        except Exception as error:  # It costs a range; what the program raises goes on.
            if is_the_programs(error):
                raise


step_out = step_out_in_python if native is None else native.step_out


def watch_collections() -> None:
    """Have `gc` tell of its collections: finalizers may run within `ContextVar.set`; and how long they take matters."""
    if (_COLLECTS_ANYWHERE or native is not None) and note_collection not in gc.callbacks:
        gc.callbacks.append(note_collection)
    watch_pauses()


def parent_stage(record: StageRecord) -> StageRecord | None:
    """Return the enclosing stage, or None if a span of the application's lies between."""
    outer = record.outer
    return outer if outer is not None and outer.trace is record.trace else None


def root_stage(record: StageRecord) -> StageRecord:
    """Return the outermost stage of the same trace."""
    while (outer := parent_stage(record)) is not None:
        record = outer
    return record


def running_stage(record: StageRecord | None) -> StageRecord | None:
    """
    Return the stage itself or the innermost one around it that has not ended.

    Stages held open across a `yield` may end out of order, so a stage that has ended can enclose one that runs.
    """
    while record is not None and record.end_ns:
        record = record.outer
    return record


def bind(function: Callable[P, R]) -> Callable[P, R]:
    """
    Return the function bound to the current context: its stages are below the current stage, on any thread.

    Thread pools run what they are given in a context of their own, where no stage is current. `asyncio.to_thread` and
    Starlette's thread pool take the context along; `loop.run_in_executor` and `ThreadPoolExecutor.submit` do not. What
    is bound may be called any number of times, at once too. It behaves the same with recording off. Pickle does not
    take it: for other processes there are `inject` and `extract`.

    Examples:
        `await loop.run_in_executor(pool, gpuscope.bind(infer), images)`, and `pool.map(gpuscope.bind(infer), batches)`

    Args:
        function: what is to be called.

    Raises:
        TypeError: for what is not callable, and for a coroutine function, because tasks take their context along.

    """
    from inspect import iscoroutinefunction

    if not callable(function):
        raise TypeError(
            f"`bind` takes a function, not {shown(function)}. Write `bind(f)`, and pass arguments to the call."
        )
    if iscoroutinefunction(function):
        raise TypeError("`bind` takes no coroutine function: tasks of asyncio take their context along by themselves.")
    context = copy_context()

    def bound(*args: P.args, **kwargs: P.kwargs) -> R:
        return context.copy().run(function, *args, **kwargs)

    return update_wrapper(bound, function)
