"""
Stack traces with lines of the source, as OpenTelemetry's SDK gives them.

For the collector's thread: files are read here. Code of the program, as loaders are, never runs: a line comes out of an
ordinary file, or from `linecache` if it is there already, as the cells of a notebook are. Any other line is left out.
All is bounded. A line is looked for once, no further into a file than where it stands, and not in a file that is huge.
"""

from __future__ import annotations

import linecache
import stat
import tokenize
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from gpuscope._data.plain.tracebacks import text_of, text_of_frame

if TYPE_CHECKING:
    from gpuscope._data.record import ExceptionInfo, Frame

_CACHED_FRAMES = 4096
_MAX_LINE = 512
"""Characters that are shown of a line."""
_MAX_FILE_BYTES = 1 << 21
"""Some 50,000 lines, which are passed over in about 8 ms. The GIL is free in between, at each read."""


def stacktrace(error: ExceptionInfo) -> str:
    """Return an exception, with all before it, as a traceback shows it."""
    return text_of(error, _show)


def _show(frame: Frame) -> str:
    # What is not a file may be something else next time: `<string>`.
    return _with_source(frame) if frame[0].startswith("<") else _with_source_of_file(frame)


def _with_source(frame: Frame) -> str:
    file, line, _ = frame
    try:
        source = (_loaded_line(file, line) or _line_of_file(file, line)).strip()[:_MAX_LINE]
    except Exception:  # Whatever there is by that name, it is not a source: the trace goes without the line.
        source = ""
    return text_of_frame(frame) + (f"    {source}\n" if source else "")


_with_source_of_file = lru_cache(_CACHED_FRAMES)(_with_source)


def _loaded_line(file: str, line: int) -> str:
    entry = linecache.cache.get(file)
    if entry is None or len(entry) == 1:  # Of one, a loader would be asked.
        return ""
    lines = entry[2]
    return lines[line - 1] if 0 < line <= len(lines) else ""


def _line_of_file(file: str, line: int) -> str:
    # Only an ordinary file: a pipe would be emptied, or waited for.
    found = Path(file).stat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_FILE_BYTES:
        return ""
    with tokenize.open(file) as lines:
        return next(islice(lines, line - 1, line), "")
