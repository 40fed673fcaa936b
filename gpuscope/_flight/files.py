"""
The file of a flight recorder: made so that nobody else's is touched, and that a write into its mapping can't fail.

A write to a page for which the disk has no room would end the program by SIGBUS, so all blocks are reserved first, and
file systems that give no such promise are refused. The file is never changed in size: what an earlier process left is
renamed or removed, and the new one has another inode, so that whoever reads the old one goes on reading it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import stat
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from gpuscope._data import flight as layout
from gpuscope._flight.dumps import SHARE, keep_of_the_dead

_MOUNTS = Path("/proc/self/mountinfo")
_NO_PROMISE = (
    "btrfs",
    "zfs",
    "bcachefs",
    "nfs",
    "fuse",
    "9p",
    "cifs",
    "smb",
    "ceph",
    "lustre",
    "gpfs",
    "afs",
    "virtiofs",
)
"""File systems, by how their names begin, that may refuse a page although its block was reserved."""
_PID = "{pid}"
_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class RefusedError(Exception):
    """The file cannot be had; the text says why, and what to do."""


@dataclass(frozen=True, slots=True)
class FlightFile:
    """A file that is ours alone, reserved and mapped. `close` lets go of it."""

    base: Path
    """What was asked for; copies are named after it."""
    path: Path
    """The same, or one beside it where another process records there."""
    fd: int
    mapped: mmap.mmap

    def put(self, name: str, value: int) -> None:
        """Set a number of the head."""
        layout.NUMBER.pack_into(self.mapped, layout.HEAD[name], value & layout.LOW_64)

    def add(self, name: str, value: int) -> None:
        """Add to a number of the head."""
        (before,) = layout.NUMBER.unpack_from(self.mapped, layout.HEAD[name])
        self.put(name, before + value)

    def close(self) -> None:
        """Let go of the file: as soon as nobody has a view of the mapping, that goes too."""
        os.close(self.fd)  # And with it the lock.
        with contextlib.suppress(BufferError):
            self.mapped.close()


def open_file(path: str, size: int, *, touch: bool = True) -> FlightFile:
    """
    Make the file, or one with the process's id in its name where another process has that.

    Args:
        path: where; `{pid}` in it becomes the process's id.
        size: in bytes.
        touch: have every page in memory now, so that no stage waits for one.

    Raises:
        RefusedError: it cannot be had.

    """
    wanted = Path(path.replace(_PID, str(os.getpid()))).absolute()
    # It gets its name when it is locked and says what it is, so that nobody takes it for one that was left.
    unnamed = wanted.with_name(f".{wanted.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        _free_place(wanted)  # What is there may be none of ours: then nothing is made.
        _check_room(wanted.parent, size)
        fd = os.open(unnamed, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise RefusedError(f"cannot make {str(wanted)!r}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.fchmod(fd, 0o600)
        os.posix_fallocate(fd, 0, size)
        mapped = mmap.mmap(fd, size)
        for at in range(0, size if touch else 0, mmap.PAGESIZE):
            mapped[at] = 0
        layout.NUMBER.pack_into(mapped, layout.HEAD["magic"], layout.MAGIC)
        place = _named(unnamed, wanted)
    except OSError as error:
        os.close(fd)
        raise RefusedError(f"cannot reserve {size:,} bytes for {str(wanted)!r}: {error.strerror}") from error
    except RefusedError:
        os.close(fd)
        raise
    finally:
        with contextlib.suppress(OSError):
            unnamed.unlink()
    _clear_up(Path(path).absolute(), wanted)
    return FlightFile(wanted, place, fd, mapped)


def _named(unnamed: Path, wanted: Path) -> Path:
    """Give the file its name, or the next one where somebody is faster, and return that."""
    while True:
        place = _free_place(wanted)
        with contextlib.suppress(FileExistsError):
            os.link(unnamed, place, follow_symlinks=False)
            return place


def _free_place(wanted: Path) -> Path:
    """Return a path where nothing is: the one that is wanted or, where another process records there, one beside it."""
    pid = os.getpid()
    beside = (wanted.with_name(f"{wanted.name}.{pid}{f'-{number}' if number else ''}") for number in range(100))
    for place in (wanted, *beside):
        if _make_way(place, takes_empty=True):
            return place
    raise FileExistsError(errno.EEXIST, "other processes record there", str(wanted))


def _clear_up(template: Path, wanted: Path) -> None:
    """
    Rename what processes beside this one have left that did not end well, so that they are not more than `KEPT`.

    Where the path has the process's id in it, what ended well is removed, and the rest stays where it is.
    """
    of_processes = re.compile(re.escape(wanted.name) + r"\.\d+(-\d+)?")
    alike = re.compile(re.escape(template.name).replace(re.escape(_PID), r"\d+"))
    with contextlib.suppress(OSError):
        for place in wanted.parent.iterdir():
            with contextlib.suppress(OSError, RefusedError):
                if of_processes.fullmatch(place.name):
                    _make_way(place)
                elif _PID in template.name and place != wanted and alike.fullmatch(place.name):
                    _make_way(place, keeps_the_dead=True)


def _make_way(place: Path, *, takes_empty: bool = False, keeps_the_dead: bool = False) -> bool:
    """
    Move away what an earlier process of ours left; return whether nothing is there now, False where somebody records.

    With `takes_empty` an empty file is taken for one of ours, with `keeps_the_dead` only what ended well is moved away.

    Raises:
        RefusedError: there is something that is not ours to remove.

    """
    try:
        fd = os.open(place, _FLAGS)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise RefusedError(f"{str(place)!r} is a symbolic link; name a file") from error
        raise
    try:
        return _move_away(place, fd, takes_empty=takes_empty, keeps_the_dead=keeps_the_dead)
    finally:
        os.close(fd)


def _move_away(place: Path, fd: int, *, takes_empty: bool, keeps_the_dead: bool) -> bool:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        raise RefusedError(f"{str(place)!r} is not a plain file of this user; name another path")
    head = os.pread(fd, layout.SLOT_BYTES, 0)
    is_empty = not head and takes_empty
    if int.from_bytes(head[:8], "little") != layout.MAGIC and not is_empty:
        raise RefusedError(f"{str(place)!r} is not a file of a flight recorder; name another path, or remove it")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    if not os.path.samestat(status, place.lstat()):  # Somebody was faster.
        return False
    if status.st_nlink > 1:
        raise RefusedError(f"{str(place)!r} is not a plain file of this user; name another path")
    if not is_empty and not layout.NUMBER.unpack_from(head, layout.HEAD["ended"])[0]:
        if keeps_the_dead:
            return False
        keep_of_the_dead(place, _last_seen_s(head, status.st_mtime))
    else:
        place.unlink()
    return True


def _last_seen_s(head: bytes, changed_s: float) -> float:
    """
    Return when its process was last there, in seconds of the epoch.

    Not when the file was changed, as the file system has it: writes through a mapping need not change that.
    """
    offset_ns, seen_ns = (layout.NUMBER.unpack_from(head, layout.HEAD[name])[0] for name in ("offset_ns", "seen_ns"))
    seen_s = ((offset_ns + seen_ns) & layout.LOW_64) / 1e9
    return seen_s if seen_ns and seen_s <= time.time() else changed_s


def _check_room(folder: Path, size: int) -> None:
    kind = file_system(folder)
    if kind.startswith(_NO_PROMISE):
        raise RefusedError(
            f"{str(folder)!r} is on {kind}, which may refuse what it has reserved; name a file in /dev/shm"
        )
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if size * SHARE > free:
        raise RefusedError(
            f"{size:,} bytes are more than half of what is free in {str(folder)!r}; set GPUSCOPE_FLIGHT_BYTES"
        )


def file_system(folder: Path) -> str:
    """Return the name of a folder's file system, or nothing where the system does not say."""
    best, kind = -1, ""
    real = os.path.realpath(folder)
    with contextlib.suppress(OSError, ValueError):
        for line in _MOUNTS.read_text(errors="surrogateescape").splitlines():
            before, _, after = line.partition(" - ")
            at = before.split()[4].encode("utf-8", "surrogateescape").decode("unicode_escape")
            if (real == at or real.startswith(at.rstrip("/") + "/")) and len(at) >= best:
                best, kind = len(at), after.split()[0]
    return kind
