"""
Copies of a flight recorder's file beside it, `PATH.REASON-TIME`: who asked, how often, and how many are kept.

The collector makes them, and no thread of the program's. One kind of reason never takes the place of all others.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from gpuscope._data import flight as layout
from gpuscope._flight.ring import write_text

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KEPT = 8
"""So many copies are kept for one path."""
SHARE = 2
"""At most one part in so many of what is free is taken: others use `/dev/shm` too, PyTorch's loaders for one."""
_GAP_S, _MOST_GAP_S = 10.0, 600.0
"""Between two dumps at least; each further one for the same reason waits twice as long as before, up to the second."""
_NAME = re.compile(r"(?P<reason>[a-z]+)-\d{8}T\d{6}\.\d{3}Z(-\d+)?")


class Dumps:
    """
    Makes the dumps of one file.

    Args:
        path: of the file.
        mapped: its bytes.
        clock: seconds, monotonic.

    """

    def __init__(self, path: Path, mapped: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._mapped, self._clock = path, mapped, clock
        self._not_before_s = 0.0
        self._next: dict[str, tuple[float, float]] = {}
        """By reason: from when on the next dump is made, and the gap after that."""

    def make(self, reason: str) -> Path | None:
        """
        Copy the file, and return where to; None where one was made for this a moment ago.

        Whoever sends a signal wants one now, and gets it: only how many are kept is bounded then.

        Raises:
            OSError: it cannot be written.

        """
        now = self._clock()
        not_before_s, gap_s = self._next.get(reason, (0.0, _GAP_S))
        if now < max(not_before_s, self._not_before_s) and reason != layout.REASONS[layout.SIGNAL]:
            return None
        self._next[reason] = now + gap_s, min(2 * gap_s, _MOST_GAP_S)
        self._not_before_s = now + _GAP_S
        remove_oldest(self._path, KEPT - 1)
        _check_room(self._path, len(self._mapped))
        write_text(self._mapped, layout.REASON_AT, reason, layout.REASON_BYTES)
        try:
            path = _free_name(self._path, reason, time.time())
            copy(self._mapped, path)
        finally:
            write_text(self._mapped, layout.REASON_AT, "", layout.REASON_BYTES)
        return path


def _check_room(path: Path, size: int) -> None:
    status = os.statvfs(path.parent)
    if size * SHARE > status.f_bavail * status.f_frsize:
        raise OSError(errno.ENOSPC, "a copy would take more than half of what is free", str(path.parent))


def keep_of_the_dead(path: Path, at_s: float) -> None:
    """
    Rename the file of a process that did not end well, after when that was last there, in seconds of the epoch.

    Raises:
        OSError: it cannot be renamed.

    """
    base = path.with_name(re.sub(r"\.\d+(-\d+)?$", "", path.name))
    os.utime(path, (at_s, at_s))  # Copies are in the order of these.
    path.rename(_free_name(base, layout.DIED, at_s))
    remove_oldest(base)


def remove_oldest(path: Path, kept: int = KEPT) -> None:
    """Keep so many copies: of the reason that has most of them, the oldest goes."""
    found = copies(path)
    while len(found) > kept:
        counts = Counter(reason for _, reason, _ in found)
        often = max(counts.values())
        each = next(each for each in found if counts[each[1]] == often)
        found.remove(each)
        with contextlib.suppress(OSError):
            each[2].unlink()


def copies(path: Path) -> list[tuple[float, str, Path]]:
    """Return what stands beside a path: time, reason and path, the oldest first."""
    found = []
    with contextlib.suppress(OSError):
        for each in path.parent.iterdir():
            rest = each.name.removeprefix(f"{path.name}.")
            match = _NAME.fullmatch(rest) if rest != each.name else None
            if match is not None:
                with contextlib.suppress(OSError):
                    found.append((each.lstat().st_mtime, match["reason"], each))
    return sorted(found)


def _free_name(path: Path, reason: str, at_s: float) -> Path:
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(at_s)) + f".{int(at_s % 1 * 1000):03d}Z"
    names = (f"{path.name}.{reason}-{stamp}{f'-{number}' if number else ''}" for number in range(100))
    return next(place for name in names if not (place := path.with_name(name)).exists())


def copy(source: Any, path: Path) -> None:
    """
    Copy bytes into a new file, a part at a time, so that the GIL is free meanwhile.

    Raises:
        OSError: it cannot be made or written; nothing is left of it then.

    """
    part = path.with_name(f"{path.name}.part")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            with memoryview(source) as view:
                at = 0
                while at < len(view):
                    at += os.write(fd, view[at : at + (1 << 20)])
        finally:
            os.close(fd)
        part.rename(path)
    except BaseException:  # Whatever it is goes on; half a copy would be taken for one.
        with contextlib.suppress(OSError):
            part.unlink()
        raise
