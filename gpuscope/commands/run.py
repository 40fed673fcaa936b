"""
`gpuscope run`: runs a program with stages by name, and changes nothing else about it.

The program runs in this process, so that the interpreter treats its signals, exceptions and exit as ever, and because
functions of the main module can be made stages only where its code is compiled. Processes that it starts learn of the
stages from their environment: from variables, and from a `sitecustomize` on `PYTHONPATH`.
"""

from __future__ import annotations

import argparse
import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import gpuscope
from gpuscope import _runtime
from gpuscope._errors import CommandError
from gpuscope._recording.state import state
from gpuscope._settings import environment
from gpuscope.commands import _program

if TYPE_CHECKING:
    from collections.abc import Callable

HELP = "Run a Python program with functions that you name as stages, and change nothing else about it."
EPILOG = "Exit codes: the program's own; 2 bad usage. With GPUSCOPE=0 the program runs and nothing is recorded."
_INHERITED = Path(__file__).resolve().with_name("inherited")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--stage", action="append", default=[], metavar="NAME=PATH", help="a stage, as in GPUSCOPE_STAGES; repeatable")
    add(
        "--framework",
        action="append",
        default=[],
        metavar="NAME",
        help="a framework whose functions are stages, as in GPUSCOPE_FRAMEWORKS; repeatable",
    )
    add("--report", type=Path, metavar="OUT", help="at the end, write a timeline of all processes: one HTML file")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "-m", dest="kind", action="store_const", const="module", help="PROGRAM is a module, as for python -m"
    )
    how.add_argument("-c", dest="kind", action="store_const", const="code", help="PROGRAM is code, as for python -c")
    parser.add_argument("program", metavar="PROGRAM", help="the path of a script, unless -m or -c is given")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARG", help="for the program")


def run(options: argparse.Namespace) -> Callable[[], None]:
    """Prepare everything, and return the function that runs the program."""
    _check(options)
    environ = environment.variables()
    report = options.report and options.report.absolute()
    program = _program.become(options.kind or "script", options.program, options.arguments)
    changes = _changes(options, environ) | (_record(report, environ) if report else {})
    paths = [str(_INHERITED), *filter(None, [environ.get("PYTHONPATH")])]
    environment.export({**changes, "PYTHONPATH": os.pathsep.join(paths)})
    if changes:
        _set_up()
    return program


def _check(options: argparse.Namespace) -> None:
    from gpuscope.instrument._frameworks import modules_of
    from gpuscope.instrument._targets import targets_of

    try:
        targets_of(",".join(options.stage))
        modules_of(options.framework)
    except ValueError as error:
        raise CommandError(str(error)) from error


def _changes(options: argparse.Namespace, environ: dict[str, str]) -> dict[str, str]:
    """Return the variables to set, for this process and those below it."""
    changes = {} if environ.get("GPUSCOPE", "").strip() else {"GPUSCOPE": "1"}
    for variable, given in (("GPUSCOPE_STAGES", options.stage), ("GPUSCOPE_FRAMEWORKS", options.framework)):
        if given:
            changes[variable] = ",".join([*given, *filter(None, [environ.get(variable)])])
    return changes


def _set_up() -> None:
    """Begin again with the variables as they are now, because gpuscope was imported before they were set."""
    gpuscope.shutdown()
    if state.instrumentation is not None:
        from gpuscope.instrument import uninstrument

        uninstrument()
    if _runtime.set_up():
        from gpuscope.instrument._instrumentation import follow_environment

        follow_environment()


def _record(out: Path, environ: dict[str, str]) -> dict[str, str]:
    """Have every process record into a folder, and a report made of it when this process ends."""
    if find_spec("rich") is None:
        raise CommandError('`--report` needs `rich`, which is missing; pip install "gpuscope[report]" brings it.')
    if not out.parent.is_dir():
        raise CommandError(f"cannot write {str(out)!r}: there is no folder {str(out.parent)!r}; create it first.")
    folder = tempfile.mkdtemp(prefix="gpuscope-")
    # The first handler, which therefore runs last, when the program's children have ended.
    atexit.register(_report, folder, out, os.getpid())
    exporters = [
        name for name in environ.get("GPUSCOPE_EXPORTER", "").split(",") if name.strip() not in ("", "none", "file")
    ]
    return {"GPUSCOPE_EXPORTER": ",".join([*exporters, "file"]), "GPUSCOPE_FILE": os.path.join(folder, "{pid}.jsonl")}  # noqa: PTH118


def _report(folder: str, out: Path, pid: int) -> None:
    if os.getpid() != pid:  # A forked child ends.
        return
    gpuscope.shutdown()
    if not os.listdir(folder):  # noqa: PTH208
        os.rmdir(folder)  # noqa: PTH106
        sys.stderr.write("gpuscope run: no report, because no stage was recorded.\n")
        return
    command = [sys.executable, "-m", "gpuscope", "report", folder, "--html", str(out)]
    # In a process of its own: in this one the program may have changed anything.
    environ = environment.variables() | {"GPUSCOPE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)  # noqa: S603
    if done.returncode == 0:
        shutil.rmtree(folder, ignore_errors=True)
        sys.stderr.write(f"gpuscope run: the report is {out}\n")
    else:
        reason = done.stderr.strip().removeprefix("gpuscope report: ")
        sys.stderr.write(f"gpuscope run: no report from {folder}: {reason}\n")
