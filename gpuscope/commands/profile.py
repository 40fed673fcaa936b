"""
`gpuscope profile`: runs a script with a deep look at a few of its requests, or reads a trace that is there.

The script sees its own `sys.argv`, path, exit code and tracebacks, as without. What is said goes to standard error.
"""

from __future__ import annotations

import argparse
import io
import runpy
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import gpuscope
from gpuscope._errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._deep_look import DeepLook

HELP = "Run a script, and say what bounds its stages: kernels, copies, waits and gaps, by torch.profiler."
INTERRUPTED = 130
EPILOG = "Exit codes: the script's own; 2 bad usage, or a file that cannot be read or written."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.epilog = EPILOG
    parser.add_argument("--requests", type=_count, default=5, metavar="N", help="requests to profile (5)")
    parser.add_argument("--warmup", type=_count_or_none, default=3, metavar="N", help="requests to let pass before (3)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the trace and the report (gpuscope-profile)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="run nothing; read this trace of torch.profiler")
    parser.add_argument(
        "-m", dest="module", action="store_true", help="SCRIPT is the name of a module, as for python -m"
    )
    parser.add_argument("script", nargs="?", metavar="SCRIPT")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARG", help="for the script")


def run(options: argparse.Namespace) -> int:
    """Do either."""
    if (options.trace is None) == (options.script is None):
        raise CommandError("give a script to run, or `--trace FILE`.")
    return _read(options) if options.trace else _run_script(options)


def _read(options: argparse.Namespace) -> int:
    from gpuscope._deep_look import write_report
    from gpuscope.analysis.profile import examine, read_trace

    try:
        report = examine(read_trace(options.trace))
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            write_report(report, options.out)
    except OSError as error:
        raise CommandError(f"{error.filename!r}: {error.strerror}.") from error
    except ValueError as error:
        raise CommandError(f"cannot read {str(options.trace)!r}: {error}") from error
    print(report)
    return 0


def _run_script(options: argparse.Namespace) -> int:
    program = _program(options)
    if not gpuscope.is_enabled():
        gpuscope.enable(exporters="none")
    look = gpuscope.profile(options.requests, options.warmup)
    try:
        with look:
            program()
    except (Exception, KeyboardInterrupt) as error:  # The script's, which ends as it would have without us.
        _show(error)
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
    finally:
        _report(look, options.out or Path("gpuscope-profile"))
    return 0


def _program(options: argparse.Namespace) -> Callable[[], object]:
    """Return what runs the script, with the interpreter's state as the script expects it."""
    if options.module:
        sys.argv[:] = [options.script, *options.arguments]
        sys.path.insert(0, "")
        return lambda: runpy.run_module(options.script, run_name="__main__", alter_sys=True)
    path = Path(options.script).absolute()
    try:
        with io.open_code(str(path)) as file:
            source = file.read()
    except OSError as error:
        raise CommandError(f"cannot read {options.script!r}: {error.strerror}.") from error
    sys.argv[:] = [options.script, *options.arguments]
    sys.path[0] = str(path.resolve().parent)
    main = ModuleType("__main__")
    main.__dict__.update(__file__=str(path), __builtins__=__builtins__)
    # It stays: what the script pickles, or leaves to be run at exit, looks itself up there.
    sys.modules["__main__"] = main
    # Not with the future statements of this module.
    return lambda: exec(compile(source, str(path), "exec", dont_inherit=True), main.__dict__)  # noqa: S102 - as asked


def _show(error: BaseException) -> None:
    """Print a traceback without our own frames."""
    own = traceback.walk_tb(error.__traceback__)
    inner: Any = error.__traceback__
    for frame, _ in own:
        if frame.f_code.co_filename != __file__:
            break
        inner = inner.tb_next
    sys.excepthook(type(error), error.with_traceback(inner), inner)


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
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, not {text!r}")
    return int(text)
