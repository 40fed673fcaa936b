"""
The file that says what stalled: one part per stall, with the stacks of all threads of Python.

The thread in C writes to the same file where no thread of Python runs (`csrc/stall_report.c`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import stat
import tempfile
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuscope._stalls.found import Stall

MOST_BYTES = 1 << 20
"""A file that is larger gets nothing more."""
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def path_beside(flight: str) -> str:
    """
    Return the path of the file: beside the flight recorder's, if files can be made there.

    Otherwise it is in the system's temporary folder.
    """
    pid = str(os.getpid())
    if flight:
        path = os.path.abspath(f"{flight.replace('{pid}', pid)}.stalls-{pid}.txt")  # noqa: PTH100 - text for C
        if os.access(os.path.dirname(path), os.W_OK | os.X_OK):  # noqa: PTH120 - as above
            return path
    return os.path.join(tempfile.gettempdir(), f"gpuscope-stalls-{pid}.txt")  # noqa: PTH118 - as above


def write(path: str, stalls: Sequence[Stall], *, has_stacks: bool, main: Sequence[tuple[str, int, str]] = ()) -> bool:
    """Append stalls, and the stacks of all threads, to the file; `main` is the main thread's as it kept the GIL."""
    try:
        file = os.open(path, _FLAGS, 0o600)
    except OSError:
        return False
    try:
        status = os.fstat(file)
        is_ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink == 1
        if not is_ours or status.st_size >= MOST_BYTES:
            return False
        os.write(file, _text(stalls, main).encode("utf-8", "replace"))
        if has_stacks:
            _write_stacks(file)
    except OSError:
        return False
    finally:
        os.close(file)
    return True


def _text(stalls: Sequence[Stall], main: Sequence[tuple[str, int, str]]) -> str:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    lines = [f"---- stall, {stamp}, process {os.getpid()}"]
    for each in stalls:
        lines += [each.sentence(), f"trace: {each.trace_id:032x}, span: {each.span_id:016x}", *each.facts]
    if main:
        lines.append("the main thread, as it let go of the GIL (most recent call first):")
        lines += [f'  File "{file}", line {line} in {function}' for file, line, function in main]
    return "\n".join(lines) + "\n"


def _write_stacks(file: int) -> None:
    names = {}
    with contextlib.suppress(RuntimeError):  # A thread has begun meanwhile.
        names = {ident: thread.name for ident, thread in threading._active.items()}  # type: ignore[attr-defined]  # noqa: SLF001
    said = ", ".join(f"{ident:#018x} is {name}" for ident, name in names.items())
    os.write(file, f"stacks of all threads ({said}):\n".encode("utf-8", "replace"))
    faulthandler.dump_traceback(file, all_threads=True)
