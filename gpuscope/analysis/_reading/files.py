"""
Files of recordings: which there are, and their lines, also from a pipe, compressed by gzip or damaged.

Knows nothing of what a line says. Raises only what the system does.
"""

from __future__ import annotations

import gzip
import stat
import zlib
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING, cast

from gpuscope._data import flight as layout

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Iterable, Iterator
    from io import BufferedReader
    from os import PathLike

_GZIP = b"\x1f\x8b"
_HEAD_BYTES = 4096


def list_files(paths: Iterable[str | PathLike[str]]) -> list[Path]:
    """
    Return the files that `read` reads for these paths, each once.

    Raises:
        OSError: A path does not exist, or a folder has no `*.jsonl` file.

    """
    files: dict[Path, None] = {}
    for given in paths:
        if not fspath(given):  # Of nothing, `Path` makes the present folder.
            raise FileNotFoundError(2, "No such file or directory", "")
        path = Path(given)
        first = _in_folder(path) if stat.S_ISDIR(path.stat().st_mode) else [path]
        if not first:
            raise FileNotFoundError(2, "no `*.jsonl` file in this folder", str(path))
        for each in first:
            files.update(dict.fromkeys(map(_resolved, (each, *_rotated(each)))))
    return list(files)


def is_flight(path: str) -> bool:
    """Tell whether this is the file of a flight recorder; not of a pipe, from which nothing is taken."""
    try:
        if not Path(path).is_file():
            return False
        with Path(path).open("rb") as file:
            return file.read(8) == layout.MAGIC.to_bytes(8, "little")
    except (OSError, ValueError):
        return False


def _in_folder(path: Path) -> list[Path]:
    return sorted(each for name in ("*.jsonl", "*.jsonl.gz") for each in path.glob(name) if not each.is_dir())


def _resolved(path: Path) -> Path:
    try:
        return path.resolve(strict=True)
    except OSError:
        # What `/dev/stdin` leads to may have no path of its own: a pipe, or a file that was removed.
        path.stat()
        return path


def _rotated(path: Path) -> list[Path]:
    """Return `PATH.1`, `PATH.2` and so on, or `PATH.2.gz`, up to the first that does not exist."""
    found: list[Path] = []
    while True:
        backup = path.with_name(f"{path.name}.{len(found) + 1}")
        there = [each for each in (backup, backup.with_name(f"{backup.name}.gz")) if each.is_file()]
        if not there:
            return found
        found.append(there[0])


class Reader:
    """
    Reads files line by line.

    Args:
        files: which.
        progress: called after each line with the bytes read so far and the bytes of all files, as far as known.
        skipped: counts what cannot be read, by reason.

    """

    def __init__(
        self, files: Iterable[Path], progress: Callable[[int, int], object] | None, skipped: Counter[str]
    ) -> None:
        self._files = [*files]
        self._progress = progress
        self._skipped = skipped
        self._total = sum(file.stat().st_size for file in self._files)
        self._done = 0

    def lines(self) -> Iterator[bytes]:
        """
        Yield every line.

        Raises:
            OSError: A file cannot be read.

        """
        for file in self._files:
            try:
                with file.open("rb") as opened:
                    yield from self._lines(opened)
            except OSError as error:
                # Reading, unlike opening, does not say of what.
                error.filename = error.filename or str(file)
                raise

    def _lines(self, opened: BufferedReader) -> Iterator[bytes]:
        # Not by the name: a pipe has none, and a file may have the wrong one.
        compressed = opened.peek(len(_GZIP)).startswith(_GZIP)
        stream = cast("BufferedReader", gzip.GzipFile(fileobj=opened)) if compressed else opened
        before = self._done
        try:
            head = stream.peek(_HEAD_BYTES)[:_HEAD_BYTES]
            if b"\0" in head and b"\n" not in head:
                # Not text, and what has no lines may be endless.
                self._skipped["binary"] += 1
                return
            for line in stream:
                yield line
                if self._progress is not None:
                    self._done = before + opened.tell() if compressed and opened.seekable() else self._done + len(line)
                    self._progress(self._done, max(self._total, self._done))
        except EOFError:
            self._skipped["truncated"] += 1
        except (gzip.BadGzipFile, zlib.error):
            self._skipped["damaged"] += 1
