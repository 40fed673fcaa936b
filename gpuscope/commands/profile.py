"""
`gpuscope profile`: runs a script with a deep look at a few of its requests, or reads a trace that exists.

Changes nothing that the script sees: `sys.argv`, path, exit code and tracebacks are its own. What is said about its
requests goes to standard error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import gpuscope
from gpuscope._errors import CommandError
from gpuscope.commands import _console, _program

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._profiling.deep_look import DeepLook

HELP = "Run a script and say what bounds its stages, by the kernels, copies, waits and gaps that torch.profiler sees."
EPILOG = "Exit codes: the script's own; 2 bad usage, or a file that cannot be read or written."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.epilog = EPILOG
    parser.add_argument("--requests", type=_count, default=5, metavar="N", help="requests to profile (default: 5)")
    parser.add_argument(
        "--warmup", type=_count_or_none, default=3, metavar="N", help="requests to let pass first (default: 3)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder for the trace and the report (default: gpuscope-profile)"
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="run nothing; read this trace of torch.profiler")
    parser.add_argument(
        "-m", dest="module", action="store_true", help="SCRIPT is the name of a module, as for python -m"
    )
    parser.add_argument("script", nargs="?", metavar="SCRIPT", help="the path of a script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARG", help="for the script")


def run(options: argparse.Namespace) -> int | Callable[[], None]:
    """Read the trace, or return what runs the script."""
    if (options.trace is None) == (options.script is None):
        raise CommandError("give a script to run, or `--trace FILE` instead of one.")
    return _read(options) if options.trace else _program_of(options)


def _read(options: argparse.Namespace) -> int:
    from gpuscope._profiling.deep_look import write_report
    from gpuscope._profiling.examine import examine, read_trace

    (path,) = _console.files_of([str(options.trace)])
    try:
        report = examine(read_trace(path))
    except OSError as error:
        raise CommandError(f"cannot read {path!r}: {error.strerror or error}.") from error
    except ValueError as error:
        raise CommandError(f"cannot read {path!r}: {error}") from error
    if options.out is not None:
        with _console.writing(options.out):
            options.out.mkdir(exist_ok=True)
            write_report(report, options.out)
    _console.show_any_text()
    print("\n".join(map(_console.printable, str(report).split("\n"))))
    return 0


def _program_of(options: argparse.Namespace) -> Callable[[], None]:
    """Prepare everything, and return the function that runs the script."""
    folder = (options.out or Path("gpuscope-profile")).absolute()  # The script may change its folder.
    _check_folder(folder)
    program = _program.become("module" if options.module else "script", options.script, options.arguments)
    if not gpuscope.is_enabled():
        gpuscope.enable(exporters="none")
    look = gpuscope.profile(options.requests, options.warmup)

    def profiled() -> None:
        try:
            with look:
                program()
        finally:
            _report(look, folder)

    return profiled


def _check_folder(folder: Path) -> None:
    """Refuse before the script runs what cannot be written after it."""
    if not folder.parent.is_dir():
        raise CommandError(f"cannot write {str(folder)!r}: there is no folder {str(folder.parent)!r}; create it first.")
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"cannot write into {str(folder)!r}: it is not a folder; name another with `--out`.")


def _report(look: DeepLook, folder: Path) -> None:
    try:
        if look.report is not None:
            look.save(folder)
            sys.stderr.write(
                f"{look}\nwritten to {folder}: trace.json (for https://ui.perfetto.dev), report.txt, report.json\n"
            )
            return
    except OSError as error:
        sys.stderr.write(f"gpuscope profile: cannot write to {str(folder)!r}: {error.strerror}.\n")
    sys.stderr.write(f"{look}\n")


def _count(text: str) -> int:
    return _whole(text, 1)


def _count_or_none(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of {least} or more, not {text!r}")
    return int(text)
