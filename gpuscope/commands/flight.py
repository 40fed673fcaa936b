"""
`gpuscope flight`: the file of a flight recorder becomes a recording that `report`, the timeline and `send` read.

Reads a file whose process is dead, or runs on. Changes it not.
"""

from __future__ import annotations

import fcntl
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from gpuscope._data.attributes import PROCESS_PID, SERVICE_NAME
from gpuscope._data.plain.durations import duration
from gpuscope._errors import CommandError
from gpuscope.commands import _console

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from gpuscope._data.plain.values import Clean
    from gpuscope.analysis._reading.flight_ring import FlightRing

HELP = "Turn the file of a flight recorder (GPUSCOPE_FLIGHT) into a recording, and say what it ended with."
_MOST_NAMED = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.add_argument("file", metavar="PATH", help="the file, or a copy of it that was made beside it")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="write the recording to this file (if left out, NAME.jsonl in the current folder; - prints it)",
    )


def run(options: argparse.Namespace) -> int:
    """Write the recording, and say what the file holds."""
    from gpuscope._version import __version__ as version
    from gpuscope.analysis._reading.flight_batch import batch_of
    from gpuscope.exporters._encoding.otlp_json import JsonEncoder

    ring = read_ring(options.file)
    if not len(ring.stages):
        raise CommandError(f"no stage is in {options.file!r}: none began, or recording was off.")
    output = _console.output_of(options.output or Path(f"{Path(options.file).name}.jsonl"))
    text = JsonEncoder(_resource(ring), version).encode(batch_of(ring)) + "\n"
    if _console.is_standard_output(output):
        print(text, end="")
        return 0
    if output.exists() and output.samefile(options.file):
        raise CommandError(f"{str(output)!r} would be overwritten; name another file.")
    with _console.writing(output):
        output.write_text(text, encoding="utf-8")
    _console.show_any_text()
    _console.say(
        [*said(ring, is_held=is_held(options.file)), f"recording: {output}", f"`gpuscope report {output}` shows more."]
    )
    return 0


def read_ring(path: str) -> FlightRing:
    """
    Read a file.

    Raises:
        CommandError: it cannot be read.

    """
    from gpuscope.analysis._reading.flight_ring import NotAFlightError, read_flight

    try:
        return read_flight(path)
    except OSError as error:
        raise CommandError(
            f"cannot read {path!r}: {error.strerror or error}. GPUSCOPE=1 GPUSCOPE_FLIGHT={path} has a program make it."
        ) from error
    except NotAFlightError as error:
        raise CommandError(f"{path!r} is not the file of a flight recorder, or one that was not finished.") from error


def _resource(ring: FlightRing) -> dict[str, Clean]:
    """Return the attributes of the process; little where it died within its first second."""
    return dict(ring.resource) or {SERVICE_NAME: "unknown_service", PROCESS_PID: ring.head["pid"]}


def is_held(path: str) -> bool:
    """Tell whether a process records into a file now."""
    with Path(path).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # A file system without locks.
            return False
    return False


def said(ring: FlightRing, *, is_held: bool) -> Iterator[str]:
    """Yield what the file tells, a line each."""
    from gpuscope.analysis._reading.flight_ring import durations_ns, have_ended

    began_ns = int(ring.stages[0, 4])
    took = duration((ring.last_ns - began_ns) / 1e6)
    how = "still runs" if is_held else "ended well" if ring.ended_well else "did not end well"
    if ring.reason:
        how = "ran on when this copy was made"
    why = f" This copy was made because of: {_console.printable(ring.reason)}." if ring.reason else ""
    count = _console.count(len(ring.stages), "stage")
    yield f"{count} of the last {took} of process {ring.head['pid']}, which {how}.{why}"
    last_ns = max(began_ns, int((ring.stages[:, 4].astype("int64") + durations_ns(ring.stages)).max()))
    at = datetime.fromtimestamp((last_ns + ring.offset_ns) / 1e9, tz=timezone.utc)
    yield f"The last beginning or end of a stage: {at:%Y-%m-%d %H:%M:%S.%f} UTC."
    running = ring.stages[~have_ended(ring.stages)]
    if len(running):
        yield f"Not ended: {_console.count(len(running), 'stage')}."
        yield from (f"- {line}" for line in _running(ring))
    if ring.torn:
        yield f"{_console.count(ring.torn, 'record')} not whole, and left out: somebody was writing."


def _running(ring: FlightRing) -> Iterator[str]:
    """Yield the innermost stages that have not ended, with those around them, the oldest first."""
    from gpuscope.analysis._reading.flight_ring import have_ended, numbers_of

    running = ring.stages[~have_ended(ring.stages)]
    rows = dict(
        zip(running[:, 2].tolist(), zip(running.tolist(), numbers_of(running).tolist(), strict=True), strict=True)
    )
    around = {row[3] for row, _ in rows.values()}
    innermost = [row for row, _ in rows.values() if row[2] not in around]
    for row in innermost[:_MOST_NAMED]:
        names: list[str] = []
        at = row[2]
        while at in rows and len(names) < _MOST_NAMED:
            names.append(ring.names.get(rows[at][1], "?"))
            at = rows[at][0][3]
        thread = ring.threads.get(row[6], str(row[6]))
        took = duration((ring.last_ns - row[4]) / 1e6)
        path = _console.printable(" > ".join(reversed(names)))
        yield f"{path}: for {took}, thread {_console.printable(thread)}, trace {row[0]:016x}{row[1]:016x}"
    if len(innermost) > _MOST_NAMED:
        yield f"and {len(innermost) - _MOST_NAMED} more"
