"""
A view as lines of text, at any width from 60 columns on, and the terminal that they stand on.

What is drawn is text alone: names come from a service, and may hold control codes.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import tty
import unicodedata
from typing import TYPE_CHECKING

from gpuscope._data.plain.durations import duration
from gpuscope.commands._console import printable
from gpuscope.commands._top.view import SORTS, WINDOW_S, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuscope.commands._top.view import Row, View

COLUMNS = ("per s", "p50", "p99", "GPU p50", "GPU %", "open", "oldest", "err")
_WIDTHS = (7, 7, 7, 7, 6, 4, 7, 4)
_LEAST_NAME = 8
_WAITING, _REFUSED = "waiting", "refused_dumps"
_FIXED_LINES = 5
_ALTERNATE, _BACK = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _REST_OF_LINE, _REST = "\x1b[H", "\x1b[K", "\x1b[J"


def lines_of(view: View, path: str, sort: str, size: tuple[int, int]) -> list[str]:
    """
    Return what is shown.

    Args:
        view: the moment.
        path: of the file.
        sort: the key of an order.
        size: columns and lines that there are.

    """
    width, height = size
    rows = rows_of(view, sort)
    room = max(1, height - _FIXED_LINES)
    shown, more = rows[:room], len(rows) - room
    if more > 0:
        shown, more = rows[: room - 1], len(rows) - room + 1
    name_width = max(_LEAST_NAME, width - sum(_WIDTHS) - len(_WIDTHS))
    keys = "  ".join(f"{key} {what}" for key, (what, _) in SORTS.items())
    lines = [
        f"{view.state}: {printable(path)}",
        _account(view),
        "",
        _line("stage", COLUMNS, name_width),
        *(_line(printable(row.name), _cells(row), name_width) for row in shown),
        *([f"and {more} more"] if more > 0 else []),
        f"by {SORTS[sort][0]}; order: {keys}; q quits",
    ]
    return [fit(line, width) for line in lines]


def _account(view: View) -> str:
    per_s = len(view.stage) / view.seconds if view.seconds else 0.0
    since = f" in {view.seconds:.1f} s" if view.seconds < WINDOW_S else ""
    parts = [f"{per_s:,.0f} stages per s{since}", "busy -" if view.busy is None else f"busy {view.busy:.0%}"]
    if _WAITING in view.account:
        parts.append(f"queue {view.account[_WAITING]:,}")
    missing = [
        f"{name} {count:,}" for name, count in view.account.items() if count and name not in (_WAITING, _REFUSED)
    ]
    parts += missing or ["nothing lost"] * bool(view.account)
    if refused := view.account.get(_REFUSED):
        parts.append(f"{refused:,} dump{'' if refused == 1 else 's'} not made, too soon or without room")
    return ", ".join(parts)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        f"{row.rate:,.1f}" if row.rate < 100 else f"{row.rate:,.0f}",  # noqa: PLR2004 - a decimal has room
        _short(row.p50_ms),
        _short(row.p99_ms),
        _short(row.gpu_ms),
        f"{100 * row.gpu_share:.1f}" if row.gpu_ms is not None else "-",
        str(row.running or ""),
        _short(row.longest_ms) if row.running else "",
        str(row.errors or ""),
    )


def _short(ms: float | None) -> str:
    return duration(ms).replace(" ", "")


def _line(name: str, cells: tuple[str, ...], name_width: int) -> str:
    return fit(name, name_width) + "".join(f" {cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))


def fit(text: str, width: int) -> str:
    """Return text of exactly this many columns of a terminal; what is cut off is marked."""
    taken: list[str] = []
    columns = 0
    for letter in text:
        wide = _columns(letter)
        if columns + wide > width:
            while taken and columns + 1 > width:
                columns -= _columns(taken.pop())
            taken.append("…")
            columns += 1
            break
        taken.append(letter)
        columns += wide
    return "".join(taken) + " " * (width - columns)


def _columns(letter: str) -> int:
    if unicodedata.combining(letter):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


class Screen:
    """The terminal that a program was started on."""

    def __init__(self) -> None:
        self._out, self._in = sys.stdout, sys.stdin.fileno()

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Have the whole screen and every key for a block; after it all is as before, whatever ended it."""
        before = termios.tcgetattr(self._in)
        try:
            tty.setcbreak(self._in)
            self._write(_ALTERNATE)
            yield
        finally:
            termios.tcsetattr(self._in, termios.TCSADRAIN, before)
            self._write(_BACK)

    def size(self) -> tuple[int, int]:
        """Return columns and lines."""
        try:
            found = os.get_terminal_size(self._out.fileno())
        except OSError:
            return 80, 24
        return max(60, found.columns), max(8, found.lines)

    def draw(self, lines: list[str]) -> None:
        """Show lines, without a moment of an empty screen."""
        self._write(_HOME + "\n".join(f"{line.rstrip()}{_REST_OF_LINE}" for line in lines) + _REST)

    def keys(self, wait_s: float) -> str:
        """Wait until keys are pressed, for this time at most, and return them."""
        ready, _, _ = select.select([self._in], [], [], wait_s)
        if not ready:
            return ""
        pressed = os.read(self._in, 64)
        return pressed.decode("ascii", "replace") if pressed else "q"  # Nobody is there any more.

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
