"""
Exceptions of the program as plain data: what left a stage, where it was raised, and what it was raised from.

The rules are those of `values`, because this runs on the way out of a stage: a tensor in an exception must not be
printed, which would wait for the GPU. Neither exceptions nor frames are kept, because they may hold GPU memory; nor are
lines of the source read. All of it is bounded: exceptions, the frames and notes of each, and the steps to find them.
"""

from __future__ import annotations

import sys
from itertools import groupby
from typing import TYPE_CHECKING, Any

from gpuscope._data.plain.descriptions import MAX_TEXT, Value, full_name_of
from gpuscope._data.plain.values import message_of, shown
from gpuscope._data.record import LEFT_OUT, ExceptionInfo

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._data.record import Frame

_MAX_EXCEPTIONS = 8
"""Of one failure: what it was raised from, and the members of groups."""
_MAX_FRAMES = 64
"""Of one exception. Those that repeat the one before, as in a recursion, are one."""
_MAX_STEPS = 1024
_MAX_NOTES = 16
_FRAME_BYTES, _REFERENCE_BYTES = 64, 8
_RECOMPUTED = "torch.utils.checkpoint._StopRecomputationError"
"""Activation checkpointing raises this in the function that it computes again, once it has all that it needs."""
_EARLIER = ExceptionInfo("...", "earlier exceptions are left out", ())

# The descriptors themselves, because a class may replace the attributes by code of its own.
_traceback_of: Callable[[BaseException], Any] = BaseException.__dict__["__traceback__"].__get__
_cause_of: Callable[[BaseException], BaseException | None] = BaseException.__dict__["__cause__"].__get__
_context_of: Callable[[BaseException], BaseException | None] = BaseException.__dict__["__context__"].__get__
_suppresses_context: Callable[[BaseException], bool] = BaseException.__dict__["__suppress_context__"].__get__
_own_attributes: Callable[[BaseException], dict[str, Value]] = BaseException.__dict__["__dict__"].__get__
_Group: Any = getattr(sys.modules["builtins"], "BaseExceptionGroup", ())  # Python 3.10 has none.
_members_of: Callable[[Any], tuple[BaseException, ...]] = _Group.__dict__["exceptions"].__get__ if _Group else tuple


def exception_info(error: BaseException) -> ExceptionInfo | None:
    """Return what is kept of an exception that leaves a stage; None for those that are not failures."""
    kind = type(error)
    name = full_name_of(kind)
    if issubclass(kind, GeneratorExit) or name == _RECOMPUTED:
        return None
    # `__exit__` may be called by hand, with anything.
    return _facts(error, name, []) if issubclass(kind, BaseException) else facts_of(error)


def facts_of(error: BaseException) -> ExceptionInfo:
    """
    Return what is kept of an exception.

    What it was raised from is in `before`, as in a traceback: the cause or, unless that is suppressed, the context. A
    circle ends where it would come back. Of a group (PEP 654) the members are kept, as long as there is room.
    """
    name = full_name_of(type(error))
    if not issubclass(type(error), BaseException):
        return ExceptionInfo(name, shown(error), ())
    return _facts(error, name, [])


def size_of_exception(error: ExceptionInfo) -> int:
    """Return roughly how many bytes are kept of an exception, with those before it."""
    size = len(error.message) + min(len(error.frames), _MAX_FRAMES) * _FRAME_BYTES
    if len(error.frames) > _MAX_FRAMES:
        size += len(error.frames) * _REFERENCE_BYTES
    if error.notes:
        size += sum(map(len, error.notes))
    if error.before is not None:
        size += size_of_exception(error.before)
    return size + sum(map(size_of_exception, error.members)) if error.members else size


def _facts(error: BaseException, name: str, seen: list[int]) -> ExceptionInfo:
    seen.append(id(error))
    earlier, is_caused = _cause_of(error), True
    if earlier is None or id(earlier) in seen:
        earlier, is_caused = None if _suppresses_context(error) else _context_of(error), False
    before = None
    if earlier is not None and id(earlier) not in seen:
        before = _EARLIER if len(seen) >= _MAX_EXCEPTIONS else _facts(earlier, full_name_of(type(earlier)), seen)
    notes = _notes(_own_attributes(error))
    members = _members(error, seen) if issubclass(type(error), _Group) else ()
    return ExceptionInfo(name, message_of(error), _frames(error), notes, before, is_caused, members)


def _members(group: BaseException, seen: list[int]) -> tuple[ExceptionInfo, ...]:
    members, kept = _members_of(group), []
    for number, member in enumerate(members):
        if len(seen) >= _MAX_EXCEPTIONS:
            kept.append(ExceptionInfo("...", f"{len(members) - number} more exceptions are left out", ()))
            break
        kept.append(_facts(member, full_name_of(type(member)), seen))
    return tuple(kept)


def _frames(error: BaseException) -> tuple[Frame, ...]:
    """Return where the exception was raised, outermost first. One that repeats the one before is the same object."""
    frames: list[Frame] = []
    traceback, last_code, last_instruction = _traceback_of(error), None, 0
    for _ in range(_MAX_STEPS):
        if traceback is None:
            break
        code = traceback.tb_frame.f_code
        if code is not last_code or traceback.tb_lasti != last_instruction:
            last_code, last_instruction = code, traceback.tb_lasti
            # To find out the number of a line costs as much as all the rest.
            frame = code.co_filename, traceback.tb_lineno, code.co_name
        frames.append(frame)
        traceback = traceback.tb_next
    if traceback is not None:
        frames.append(LEFT_OUT)
    return tuple(frames if len(frames) <= _MAX_FRAMES else _without_middle(frames))


def _without_middle(frames: list[Frame]) -> list[Frame]:
    """Return the outermost and the innermost frames, if there are too many, where what repeats counts once."""
    runs = [list(run) for _, run in groupby(frames)]
    if len(runs) > _MAX_FRAMES:
        half = _MAX_FRAMES // 2
        runs[half:-half] = [[LEFT_OUT]]
    return [frame for run in runs for frame in run]


def _notes(own: dict[str, Value]) -> tuple[str, ...]:
    """Return the notes of an exception (PEP 678) that are texts; the program may have put anything there."""
    if type(own) is not dict or type(notes := own.get("__notes__")) is not list:
        return ()
    return tuple(note[:MAX_TEXT] for note in notes[:_MAX_NOTES] if type(note) is str)
