"""
`gpuscope run`: runs a program with stages by name, and changes nothing else about it.

The program runs in this process, so that the interpreter treats its signals, exceptions and exit as ever, and because
functions of the main module can be made stages only where its code is compiled. Processes that it starts learn of the
stages from their environment: from variables, and from a `sitecustomize` on `PYTHONPATH`.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import os
import signal
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar, cast

import gpuscope
from gpuscope import _runtime, _said
from gpuscope._errors import CommandError
from gpuscope._recording.state import state
from gpuscope._settings import environment
from gpuscope._settings.config import Config
from gpuscope.commands import _program, _watch

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._collecting.engine import Engine

HELP = "Run a Python program with functions that you name as stages, and change nothing else about it."
EPILOG = "Exit codes: the program's own; 2 bad usage. With GPUSCOPE=0 the program runs and nothing is recorded."
P = ParamSpec("P")
T = TypeVar("T")
_HAND_OVER_S = 1.0
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""What asks a server to end; others are put back to their default for other reasons."""
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
    path = None if options.kind else options.program
    changes = _changes(options, environ) | (_record(report, environ, path) if report else {})
    paths = [str(_INHERITED), *filter(None, [environ.get("PYTHONPATH")])]
    environment.export({**changes, "PYTHONPATH": os.pathsep.join(paths)})
    state.audience = True
    _hand_over_first(os.getpid())
    if changes:
        _set_up()
    elif state.engine is not None:
        _said.where(state.engine.config)
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


def _record(out: Path, environ: dict[str, str], program: str | None) -> dict[str, str]:
    """Have every process record into a folder, and a report made of it when this process ends; `program`: its path."""
    if find_spec("rich") is None:
        raise CommandError('`--report` needs `rich`, which is missing; pip install "gpuscope[report]" brings it.')
    if not out.parent.is_dir():
        raise CommandError(f"cannot write {str(out)!r}: there is no folder {str(out.parent)!r}; create it first.")
    if out.is_dir():
        raise CommandError(f"cannot write {str(out)!r}: it is a folder; name a file in it.")
    if program is not None and out == Path(program).absolute():
        raise CommandError(f"{str(out)!r} is the program, which would be overwritten; name another file.")
    folder, keep = _folder_for(out), _file_to_keep(environ)
    environ_of_report = environ | {"GPUSCOPE": "0"}
    # The first handler, which therefore runs last, when the program's children have ended.
    atexit.register(_report, folder, out, keep, environ_of_report, os.getpid())
    _watch.start(folder, out, keep, environ_of_report)
    state.makes_report = True
    exporters = [
        name for name in environ.get("GPUSCOPE_EXPORTER", "").split(",") if name.strip() not in ("", "none", "file")
    ]
    return {
        "GPUSCOPE_EXPORTER": ",".join([*exporters, "file"]),
        "GPUSCOPE_FILE": os.path.join(folder, "{pid}.jsonl"),  # noqa: PTH118
        # So much may be lost by a signal that ends the process at once.
        "GPUSCOPE_INTERVAL": environ.get("GPUSCOPE_INTERVAL", "").strip() or "0.05",
    }


def _file_to_keep(environ: dict[str, str]) -> str:
    """Return the file that the recording is to be in afterwards, where the user asks for one beside the report."""
    config, _ = Config.from_env(environ)
    is_asked_for = "file" in config.exporters or environ.get("GPUSCOPE_FILE", "").strip()
    return str(Path(config.file).absolute()) if is_asked_for else ""


def _folder_for(out: Path) -> str:
    """Make a folder for the recordings, beside the report: if there is none, whoever looks for it finds them."""
    beside = out.is_file() or not out.exists()  # Not a device, such as `/dev/stdout`.
    try:
        return tempfile.mkdtemp(prefix=f"{out.name}-" if beside else "gpuscope-", dir=out.parent if beside else None)
    except OSError as error:
        raise CommandError(f"cannot write into {str(out.parent)!r}: {error.strerror}; name another file.") from error


def _hand_over_first(pid: int) -> None:
    """
    Have what is recorded exported before the program ends its own process, without handlers of `atexit`.

    A server that closed down on SIGTERM puts the signal's default back and raises it again. What the functions do, and
    what the program sees of signals, is as ever.
    """
    from gpuscope.exporters.file import FileExporter  # noqa: F401 - it is there when the first stage ends

    def before(function: Callable[P, T], is_an_end: Callable[..., bool], *, soon: bool = True) -> Callable[P, T]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
            # Whatever this raises, the program is not to learn of it: the call itself says what is wrong with it.
            with contextlib.suppress(Exception):
                if os.getpid() == pid and is_an_end(*args, **kwargs):
                    gpuscope.flush(_HAND_OVER_S)
                    if soon and state.engine is not None:
                        _said.outcome(cast("Engine", state.engine))
            return function(*args, **kwargs)

        return wrapper

    def is_default(number: int) -> bool:
        return signal.getsignal(number) == signal.SIG_DFL

    def puts_default_back(signalnum: int, handler: object) -> bool:  # A program may give these names.
        return signalnum in _ENDING and handler == signal.SIG_DFL

    signal.signal = before(signal.signal, puts_default_back, soon=False)
    signal.raise_signal = before(signal.raise_signal, is_default)
    os.kill = before(os.kill, lambda to, number: to == pid and bool(number) and is_default(number))
    os._exit = before(os._exit, lambda *_: True)
    os.abort = before(os.abort, lambda: True)


def _report(folder: str, out: Path, keep: str, environ: dict[str, str], pid: int) -> None:
    if os.getpid() == pid:  # Else a forked child ends.
        gpuscope.shutdown()
        sys.stderr.write(f"gpuscope run: {_watch.make_report(folder, out, keep, environ)}\n")
