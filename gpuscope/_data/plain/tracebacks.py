"""
An exception as the text of a traceback, from what was kept of it.

The text is that of `traceback.format_exception`, less what would need more than was kept: the markers `^^^^` below
lines of the source, further lines of a statement (Python 3.13), the place in the text of a `SyntaxError`, and "Did you
mean". No file is read here: who has the lines of the source passes in the texts of frames.
"""

from __future__ import annotations

from itertools import groupby
from operator import eq
from textwrap import indent
from typing import TYPE_CHECKING

from gpuscope._data.plain.exceptions import facts_of
from gpuscope._data.record import LEFT_OUT

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._data.record import ExceptionInfo, Frame

_CAUSE = "\nThe above exception was the direct cause of the following exception:\n\n"
_CONTEXT = "\nDuring handling of the above exception, another exception occurred:\n\n"
_TITLE = "Traceback (most recent call last):\n"
_SHOWN = 3
"""How often a frame is shown that repeats the one before."""


def text_of_frame(frame: Frame) -> str:
    """Return a frame as a traceback shows it, without the line of the source."""
    if frame is LEFT_OUT:
        return "  [More frames are left out]\n"
    file, line, function = frame
    return f'  File "{file}", line {line}, in {function}\n'


def text_of(error: ExceptionInfo, show: Callable[[Frame], str] = text_of_frame) -> str:
    """Return an exception with all before it as a traceback shows it; `show` gives the text of a frame."""
    pieces: list[str] = []
    _write_all(error, show, 0, pieces)
    return "".join(pieces)


def traceback_of(error: BaseException) -> str:
    """Return an exception as a log shows it."""
    return text_of(facts_of(error))


def _write_all(error: ExceptionInfo, show: Callable[[Frame], str], depth: int, pieces: list[str]) -> bool:
    """Write an exception after what came before it; return whether a group was among them, which closes its box."""
    chain = [error]
    while (before := chain[-1].before) is not None:
        chain.append(before)
    for each in reversed(chain):
        if each.before is not None:
            pieces.append(_inside(depth, _CAUSE if each.is_caused else _CONTEXT))
        if each.members:
            _write_group(each, show, depth, pieces)
        else:
            title = _TITLE if each.frames else ""
            pieces.append(_inside(depth, title + _frames(each, show) + _ending(each)))
    return any(each.members for each in chain)


def _write_group(group: ExceptionInfo, show: Callable[[Frame], str], around: int, pieces: list[str]) -> None:
    depth = around or 1
    if group.frames:
        pieces.append(_inside(depth, f"Exception Group {_TITLE}", "| " if around else "+ "))
    pieces.append(_inside(depth, _frames(group, show) + _ending(group)))
    closed = False
    for number, member in enumerate(group.members, 1):
        corner = "+-" if number == 1 else "  "
        pieces.append(f"{'  ' * depth}{corner}+---------------- {number} ----------------\n")
        closed = _write_all(member, show, depth + 1, pieces)
    if not closed:
        pieces.append(f"{'  ' * (depth + 1)}+------------------------------------\n")


def _inside(depth: int, text: str, margin: str = "| ") -> str:
    """Return the text as it stands inside so many groups."""
    return indent(text, "  " * depth + margin, lambda _: True) if depth else text


def _frames(error: ExceptionInfo, show: Callable[[Frame], str]) -> str:
    frames = error.frames
    if not any(map(eq, frames, frames[1:])):
        return "".join(map(show, frames))
    pieces = []
    for frame, run in groupby(frames):
        times = len(list(run))
        pieces += [show(frame)] * min(times, _SHOWN)
        if times > _SHOWN:
            more = times - _SHOWN
            pieces.append(f"  [Previous line repeated {more} more time{'s' if more > 1 else ''}]\n")
    return "".join(pieces)


def _ending(error: ExceptionInfo) -> str:
    """Return the last line, and the notes."""
    name = error.type.removeprefix("__main__.")
    line = f"{name}: {error.message}\n" if error.message else f"{name}\n"
    return line + "".join(f"{note}\n" for note in error.notes)
