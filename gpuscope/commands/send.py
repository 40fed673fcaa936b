"""
`gpuscope send`: a recording of the `file` exporter goes to an OTLP endpoint, as `otlp` would have sent it live.

Reads, sends and says what became of it. Changes no file.
"""

from __future__ import annotations

import sys
from hashlib import blake2b
from threading import Event
from typing import TYPE_CHECKING

import gpuscope
from gpuscope._errors import CommandError
from gpuscope._settings.complaints import SPANS
from gpuscope._settings.environment import export, variables
from gpuscope._settings.shown import shown_url
from gpuscope.analysis._reading.files import Reader, is_flight, list_files
from gpuscope.commands import _console
from gpuscope.commands._endpoint import options as endpoint_options

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from gpuscope.exporters._recorded import RecordedLines
    from gpuscope.exporters._resend import Resender
    from gpuscope.exporters._transport.http import Client

HELP = "Send recordings of the `file` exporter to an OTLP endpoint, such as Jaeger or an OpenTelemetry Collector."
EPILOG = (
    "Exit codes: 0 all was taken; 1 some was not; 2 bad usage, or nothing to send. Times, ids and attributes are those "
    "of the recording; a back end may refuse what is old."
)
RECORDS = "GPUSCOPE=1 GPUSCOPE_EXPORTER=file python your_program.py records some"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.epilog = EPILOG
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="a recording (its rotated files are sent too), a folder of recordings, or - for standard input",
    )
    endpoint_options.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Send the files; return 1 if any of what they hold did not arrive."""
    _console.show_any_text()
    config, complaints = endpoint_options.settings(options)
    for complaint in complaints:
        if SPANS in complaint.uses:
            sys.stderr.write(f"gpuscope send: {complaint}\n")
    files = _files(options.files)

    from gpuscope.exporters._recorded import RecordedLines
    from gpuscope.exporters._resend import FirstTry, Resender
    from gpuscope.exporters._transport.grpc_client import TRACES, client_for
    from gpuscope.exporters._transport.http import Endpoint
    from gpuscope.exporters._transport.sender import without_instrumentation

    export({"GRPC_VERBOSITY": variables().get("GRPC_VERBOSITY", "NONE")})  # What fails is said in one sentence.
    interrupt = Event()
    client: Client = client_for(Endpoint.for_traces(config), TRACES, interrupt, version=gpuscope.__version__)
    client = FirstTry(client, interrupt)
    lines, resender = RecordedLines(every_gpu_span=config.gpu_spans == "all"), Resender(client)
    try:
        with without_instrumentation():
            _send(files, lines, resender)
    finally:
        client.close()
    if not resender.stages:
        raise CommandError(_why_nothing(options.files, lines))
    print(_said(files, lines, resender, shown_url(config.traces_url)))
    if resender.delivered < resender.stages:
        print(f"`{_doctor(options)}` says what is there, and what to set.")
    return 1 if resender.delivered < resender.stages or lines.skipped else 0


def _files(paths: list[str]) -> list[Path]:
    try:
        # The oldest of rotated files first, so that a back end sees spans in the order of their times.
        return list_files(_console.files_of(paths))[::-1]
    except OSError as error:
        raise CommandError(f"cannot read {error.filename!r}: {error.strerror or error}; {RECORDS}.") from error


def _send(files: list[Path], lines: RecordedLines, resender: Resender) -> None:
    seen: set[bytes] = set()
    try:
        for line in Reader(files, None, lines.skipped).lines():
            # Of a copy of a file nothing is sent again. Lines hold a batch each, so these are few.
            digest = blake2b(line, digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                for part in lines.parts(line):
                    resender.add(part)
    except OSError as error:
        resender.finish()
        raise CommandError(
            f"cannot read {error.filename!r}: {error.strerror or error}; {resender.delivered:,} stages were sent."
        ) from error
    resender.finish()


def _why_nothing(paths: list[str], lines: RecordedLines) -> str:
    names = ", ".join(map(repr, paths))
    for path in paths:
        if is_flight(path):
            return f"{path!r} is a flight recorder's file: `gpuscope flight {path}` makes a recording of it."
    if lines.skipped and lines.skipped.keys() <= {"truncated", "damaged"}:
        return f"{names}: ends within its first line; it is damaged, or still being written: send it when it is whole."
    if not lines.skipped:
        return f"no spans in {names}: empty, or without a stage that ended; {RECORDS}."
    return f"{names}: not a recording (skipped: {_counts(lines.skipped)}); OTLP JSON lines are expected: {RECORDS}."


def _said(files: list[Path], lines: RecordedLines, resender: Resender, url: str) -> str:
    """Return one sentence: what was sent, from where and to where, and what was not."""
    from gpuscope.exporters._resend import NOT_SENT

    whence = _console.printable(files[0].name) if len(files) == 1 else _console.count(len(files), "file")
    whence += f", {_console.count(lines.processes, 'process')}"
    if resender.delivered == resender.stages:
        said = f"Sent {_console.count(resender.spans, 'span')} of {_console.count(resender.stages, 'stage')}"
        said += f" ({whence}) to {url}"
    else:
        said = f"Sent {resender.delivered:,} of {_console.count(resender.stages, 'stage')} ({whence}) to {url}"
        lost = dict(resender.lost)
        unsent = lost.pop(NOT_SENT, 0)
        said += f"; not taken: {_counts(lost)}" + (f" ({resender.worst.detail})" if resender.worst.detail else "")
        said += f"; not sent after that: {unsent:,}" if unsent else ""
    if lines.skipped:
        said += f"; could not be read: {_counts(lines.skipped)}"
    return f"{said}."


def _counts(of: dict[str, int]) -> str:
    return ", ".join(f"{_console.printable(reason)}: {number:,}" for reason, number in of.items())


def _doctor(options: argparse.Namespace) -> str:
    given = f" --endpoint {shown_url(options.endpoint)}" if options.endpoint else ""
    given += f" --protocol {options.protocol}" if options.protocol else ""
    return f"gpuscope doctor{given}"
