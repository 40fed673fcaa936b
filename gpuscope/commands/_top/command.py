"""
`gpuscope top`: a live table of a running service, from the file of its flight recorder or of the `file` exporter.

Opens no port and attaches to nothing: it reads a file.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from gpuscope.commands import _console

if TYPE_CHECKING:
    import argparse

    from gpuscope.commands._top.screen import Screen
    from gpuscope.commands._top.sources import Source

HELP = "Watch a running service: its stages in the last ten seconds, from the file of its flight recorder."
EPILOG = (
    "open: stages that have not ended, and how long the oldest of them runs. GPU %: time on streams per second. busy: "
    "how often streams that were asked for work had some (GPUSCOPE_SAMPLE_HZ). Where the output is not a terminal, one "
    "table is printed, as with --once."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.epilog = EPILOG
    parser.add_argument("file", metavar="PATH", help="the file of GPUSCOPE_FLIGHT, or of the exporter `file`")
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="time between two looks (1)")
    parser.add_argument("--sort", choices=("name", "rate", "p50", "p99", "GPU", "open"), default="rate")
    parser.add_argument("--once", action="store_true", help="print one table and end")


def run(options: argparse.Namespace) -> int:
    """Show the table until somebody presses `q`."""
    from gpuscope.commands._top.screen import Screen
    from gpuscope.commands._top.sources import source_of
    from gpuscope.commands._top.view import SORTS

    source = source_of(options.file)
    sort = next(key for key, (name, _) in SORTS.items() if name == options.sort)
    _console.show_any_text()
    if options.once or not (sys.stdout.isatty() and sys.stdin.isatty()):
        return _once(source, options.file, sort)
    screen = Screen()
    with screen.taken():
        _watch(source, screen, options, sort)
    return 0


def _once(source: Source, path: str, sort: str) -> int:
    from gpuscope.commands._top.screen import lines_of

    lines = lines_of(source.look(), path, sort, (_console.width(), 10_000))
    print("\n".join(line.rstrip() for line in lines[:-1]))
    return 0


def _watch(source: Source, screen: Screen, options: argparse.Namespace, sort: str) -> None:
    from gpuscope.commands._top.screen import lines_of
    from gpuscope.commands._top.view import SORTS

    interval_s = max(0.1, options.interval)
    view, looked_s = source.look(), time.monotonic()
    while True:
        screen.draw(lines_of(view, options.file, sort, screen.size()))
        for key in screen.keys(max(0.0, looked_s + interval_s - time.monotonic())):
            if key == "q":
                return
            sort = key if key in SORTS else sort
        if time.monotonic() >= looked_s + interval_s:
            view, looked_s = source.look(), time.monotonic()
