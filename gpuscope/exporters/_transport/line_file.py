"""
A file of whole lines that rotates by size.

Several processes may write to one path. Knows bytes and nothing of what they mean. Raises what the system raises, and
waits only for the disk. Makes no folder: a path that was mistyped is refused.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# Not blocking: a pipe that nobody reads must refuse, not hold the collector up. Files ignore the flag.
_OPEN_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK

_LOCK_TRIES, _LOCK_PAUSE_S = 20, 0.001
"""Others hold a lock for well under a millisecond."""


class LineFile:
    """
    A file to which whole lines are appended.

    A line that would bring it to `max_bytes` begins a new file: the old one becomes `PATH.1`, that one `PATH.2`, and so
    on, up to `backups` of them. Opens the file at the first write, and anew when somebody else moved or removed it.
    In a folder where anybody may write, it follows no symbolic link and takes no file of another user; where some
    others may, as its group or its owner, it follows links of its own user alone.
    """

    def __init__(self, path: str, max_bytes: int, backups: int) -> None:
        # Absolute, because the program may change its directory.
        self._path = Path(path).absolute()
        self._max_bytes = max_bytes
        self._backups = backups
        self._fd = -1
        self._torn = False
        """Whether the file ends within a line."""

    def write(self, line: bytes) -> None:
        """
        Append the line, which comes without its line end.

        Raises:
            OSError: from the system. Either no part of the line is left, or the next write begins on a new line.

        """
        self._open()
        if self._is_too_long_for(line):
            self._make_room()
        # Not for the sake of the line: whoever looks whether a dead process left part of one must not see half of ours.
        with self._lock(fcntl.LOCK_SH):
            self._append(line)

    def _append(self, line: bytes) -> None:
        size = self._size()
        written, data = 0, b"\n" * self._torn + line + b"\n"
        try:
            # One call, normally: lines of several processes in one file do not mix. Unbuffered, so that a reader sees
            # the line now and nothing that failed is tried again behind our back.
            while written < len(data):
                written += os.write(self._fd, data[written:])
            self._torn = False
        except OSError:
            if written:
                self._take_back(size, written)
            raise

    def close(self) -> None:
        """Close the file; a further write opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        if self._fd >= 0 and self._is_current():
            return
        self.close()
        folder = self._path.parent.stat()
        shared = bool(folder.st_mode & stat.S_IWOTH)
        follows = not shared and (_is_ours_alone(folder) or self._is_our_link())
        self._fd = os.open(self._path, _OPEN_FLAGS | (0 if follows else os.O_NOFOLLOW), 0o666)
        if shared and os.fstat(self._fd).st_uid != os.geteuid():
            self.close()
            raise PermissionError(errno.EPERM, "a file of another user, in a folder where anybody may write")
        with self._lock(fcntl.LOCK_EX) as alone:
            self._torn = alone and self._ends_torn()

    def _is_our_link(self) -> bool:
        try:
            return self._path.lstat().st_uid == os.geteuid()
        except FileNotFoundError:
            return False

    def _is_current(self) -> bool:
        try:
            there = self._path.stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(self._fd))

    def _ends_torn(self) -> bool:
        """Whether a process that died left part of a line; True also where that cannot be read."""
        if not self._size():
            return False
        try:
            with self._path.open("rb") as file:
                if not os.path.samestat(os.fstat(file.fileno()), os.fstat(self._fd)):
                    return False  # Another process has moved ours meanwhile, and so has left it whole.
                file.seek(-1, os.SEEK_END)
                return file.read(1) != b"\n"
        except FileNotFoundError:  # The same, and nobody has made another yet.
            return False
        except OSError:
            return True

    def _size(self) -> int:
        status = os.fstat(self._fd)
        # A pipe or a terminal has no size and is not rotated.
        return status.st_size if stat.S_ISREG(status.st_mode) else 0

    def _take_back(self, size: int, written: int) -> None:
        """Remove the written part of a line; where that cannot be done, the next write ends that line first."""
        self._torn = True
        if self._size() == size + written:
            os.ftruncate(self._fd, size)
            self._torn = False

    def _is_too_long_for(self, line: bytes) -> bool:
        size = self._size()
        return bool(size) and size + len(line) >= self._max_bytes

    @contextlib.contextmanager
    def _lock(self, kind: int) -> Iterator[bool]:
        """
        Hold the lock of the current file: together with others for writing, alone for moving it.

        Yields whether it was to be had: a process that holds it and was stopped must not stop us.
        """
        got = not stat.S_ISREG(os.fstat(self._fd).st_mode) or _try_to_lock(self._fd, kind)
        try:
            yield got
        finally:
            # Closing the file would not do where a fork's child has it too.
            with contextlib.suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _make_room(self) -> None:
        """
        Move the full file, unless another process is about to: what we write to it then goes into a backup.

        Whoever holds the lock of the current file is the only one who moves any.
        """
        with self._lock(fcntl.LOCK_EX) as alone:
            if alone and self._is_current():
                self._rotate()
        self._open()

    def _rotate(self) -> None:
        if self._backups:
            for number in range(self._backups - 1, 0, -1):
                if self._backup(number).exists():
                    self._backup(number).replace(self._backup(number + 1))
            self._path.replace(self._backup(1))
        else:
            self._path.unlink()

    def _backup(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")


def _is_ours_alone(folder: os.stat_result) -> bool:
    """Whether nobody else, but root, may put a link into it."""
    return folder.st_uid in (0, os.geteuid()) and not folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _try_to_lock(fd: int, kind: int) -> bool:
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_PAUSE_S)
        except OSError:  # A file system without locks: as good as alone.
            return True
        else:
            return True
    return False
