"""
A file of whole lines that rotates by size.

Knows bytes and nothing of what they mean. Raises what the system raises, and waits only for the disk.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

# Not blocking: a pipe that nobody reads must refuse, not hold the collector up. Files ignore the flag.
_OPEN_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK


class LineFile:
    """
    A file to which whole lines are appended.

    A line that would bring it to `max_bytes` begins a new file: the old one becomes `PATH.1`, that one `PATH.2`, and so
    on, up to `backups` of them. Opens the file at the first write, and anew when somebody else moved or removed it.
    """

    def __init__(self, path: str, max_bytes: int, backups: int) -> None:
        self._path = Path(path)
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
        size = self._size()
        if size and size + len(line) >= self._max_bytes:
            self._rotate()
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
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self._path, _OPEN_FLAGS, 0o666)
        self._torn = self._ends_torn()

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
                file.seek(-1, os.SEEK_END)
                return file.read(1) != b"\n"
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

    def _rotate(self) -> None:
        if self._backups:
            for number in range(self._backups - 1, 0, -1):
                if self._backup(number).exists():
                    self._backup(number).replace(self._backup(number + 1))
            self._path.replace(self._backup(1))
        else:
            self._path.unlink()
        self._open()

    def _backup(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")
