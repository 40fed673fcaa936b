"""
The door to `rich`, and what commands share: a console, tables, a bar while a recording is read, figures as text.

Shows text as it is, without markup or control codes of a terminal, because names come from recordings.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from gpuscope._errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import Console
    from rich.table import Table

    from gpuscope.analysis.recording import Losses, Recording

RECORD_ONE = (
    "GPUSCOPE=1 GPUSCOPE_EXPORTER=file python PROGRAM records into gpuscope-PID.jsonl; so does `gpuscope demo`."
)
MIN_WIDTH = 80
"""Columns that a report takes at least: in a narrower terminal, or in a pipe."""
MAX_WIDTH = 120
"""Longer lines of text are hard to read."""
NAME_WIDTH = 48
_STDOUT = Path("/dev/stdout")
_FIGURE = re.compile(r"(\d) (s|ms|µs|ns)\b")


def open_console() -> Console:
    """
    Return a console on standard output.

    Raises:
        CommandError: if the extra `report` is not installed.

    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise missing(error) from error
    show_any_text()
    console = Console(markup=False, highlight=False, emoji=False)
    # It would end the process on a pipe that is closed, with another exit code than all else that prints.
    console.on_broken_pipe = _raise_again  # type: ignore[method-assign]
    console.width = max(console.width, MIN_WIDTH)
    return console


def show_any_text() -> None:
    """Have standard output show `?` for letters that its encoding lacks, such as those of a stage's name in ASCII."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _raise_again() -> NoReturn:
    raise  # noqa: PLE0704 - within the `except` of whoever calls it


def missing(error: ImportError) -> CommandError:
    """Return the error for a missing library that reports need."""
    return CommandError(f'`{error.name}` is missing; pip install "gpuscope[report]" brings it.')


def output_of(path: Path) -> Path:
    """Return a path to write to, with `-` as the standard output that it stands for."""
    return _STDOUT if str(path) == "-" else path


def is_standard_output(path: Path) -> bool:
    """Tell whether a path stands for standard output."""
    return path == _STDOUT


def read_recording(paths: Sequence[str]) -> Recording:
    """
    Read files, with a bar on standard error if that is a terminal.

    Raises:
        CommandError: if a file cannot be read, or no file has a stage in it.

    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from gpuscope.analysis.read import read

    console = Console(stderr=True)
    columns = TextColumn("reading"), BarColumn(), DownloadColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        tell = (lambda done, total: bar.update(task, completed=done, total=total)) if console.is_terminal else None
        try:
            recording = read(files_of(paths), progress=tell)
        except OSError as error:
            way_out = f" {RECORD_ONE}" if isinstance(error, FileNotFoundError) else ""
            raise CommandError(f"cannot read {error.filename!r}: {error.strerror or error}.{way_out}") from error
    if not len(recording.stage):
        raise CommandError(_no_stages(paths, recording.losses))
    return recording


def _no_stages(paths: Sequence[str], of: Losses) -> str:
    from gpuscope.analysis.read import is_flight

    names = ", ".join(map(repr, paths))
    for path in paths:
        if is_flight(path):
            return f"{path!r} is a flight recorder's file: `gpuscope flight {path}` makes a recording of it."
    if of.not_kept_alone:
        return f"no stages in {names}: keep has kept none of {of.not_kept_alone:,}; see GPUSCOPE_KEEP of the program."
    lines = "; ".join(losses(of)) or "the files are empty"
    return f"no stages in {names} ({lines}); GPUSCOPE=1 GPUSCOPE_EXPORTER=file records some."


def files_of(paths: Iterable[str]) -> list[str]:
    """Return paths with `-` as the standard input that it stands for."""
    return ["/dev/stdin" if path == "-" else path for path in paths]


def refuse_to_overwrite(paths: Iterable[str], outputs: Iterable[Path]) -> None:
    """
    Check that no output is one of the recordings, and none is given twice.

    Raises:
        CommandError: if that is not so.

    """
    from gpuscope.analysis.read import list_files

    taken = {str(file) for file in list_files(files_of(paths))}
    for output in outputs:
        real = os.path.realpath(output)
        if real in taken:
            raise CommandError(f"{str(output)!r} would be overwritten; name another file.")
        taken.add(real)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """
    Turn failures of writing this file, within the block, into an error that names it.

    Raises:
        CommandError: if the file cannot be written.

    """
    try:
        yield
    except OSError as error:
        raise CommandError(f"cannot write {str(path)!r}: {error.strerror}; name another file.") from error


def make_table(first: str, *others: str) -> Table:
    """Return a table with these columns: the first holds names, the others figures."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold", max_width=NAME_WIDTH)
    for column in others:
        table.add_column(column, justify="right", no_wrap=True, vertical="bottom")
    return table


def width() -> int:
    """Return the columns that text may take."""
    return min(max(shutil.get_terminal_size((MIN_WIDTH, 24)).columns, MIN_WIDTH), MAX_WIDTH)


def say(lines: Iterable[str]) -> None:
    """Print lines, printable and wrapped; what continues a line is indented a little more than it."""
    for line in lines:
        # A figure and its unit stay together.
        text = _FIGURE.sub("\\1\N{NO-BREAK SPACE}\\2", printable(line))
        indent = " " * (len(text) - len(text.lstrip()))
        more = indent + "  " * (bool(indent) or text.startswith("- "))
        wrapped = textwrap.wrap(text, width(), subsequent_indent=more, break_long_words=False) or [""]
        print("\n".join(wrapped).replace("\N{NO-BREAK SPACE}", " "))


def indented(name: str, depth: int, mark: str = "") -> str:
    """Return a name for the first column, indented by its depth and printable."""
    return "  " * min(depth, 12) + printable(name) + mark


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where that is due."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def printable(text: str) -> str:
    """Return text with `?` for whatever cannot be printed, such as control codes."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def percent(part: float | None, sign: str = "") -> str:
    """Return a fraction as text, in percent and without the sign `%`."""
    return "-" if part is None else format(100 * part, f"{sign}.1f")


def losses(of: Losses) -> list[str]:
    """Return what is missing from a recording, as parts of a sentence."""
    counts = {
        "stages dropped": of.dropped,
        "stages lost": of.lost,
        "stages without GPU times": of.untimed,
        "skipped in the files": of.skipped_lines,
    }
    parts = [
        f"{sum(by_reason.values()):,} {what} ({', '.join(f'{printable(why)}: {n:,}' for why, n in by_reason.items())})"
        for what, by_reason in counts.items()
        if by_reason
    ]
    if of.orphans:
        parts.append(f"the stages around {count(of.orphans, 'stage')}")
    return parts
