"""
The command line: `gpuscope demo`, `doctor`, `report`, `why`, `compare`, `send`, `flight`, `top`, `profile`, `run`.

Only finds the command and turns its failure into an exit code; what a command does is in `gpuscope.commands`.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from gpuscope._errors import CommandError
from gpuscope.commands import compare, demo, doctor, flight, profile, report, run, send, why
from gpuscope.commands._top import command as top

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "demo": demo,
    "doctor": doctor,
    "report": report,
    "why": why,
    "compare": compare,
    "send": send,
    "flight": flight,
    "top": top,
    "profile": profile,
    "run": run,
}
INTERRUPTED = 130
PIPE_CLOSED = 141


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        The exit code. 0: all is well. 1: the command ran, and something is wrong. 2: it could not run. 130: it was
        interrupted. 141: whoever read the output went away, as `head` does.

    """
    options = _parser().parse_args(argv)
    try:
        result = COMMANDS[options.command].run(options)
        if not callable(result):
            if sys.stdout is not None:  # It may have been closed before the start.
                sys.stdout.flush()
            return int(result)
    except CommandError as error:
        sys.stderr.write(f"gpuscope {options.command}: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return PIPE_CLOSED
    except OSError as error:
        # Commands have seen to the files that they name. What is left is their output, on a full disk for one.
        _discard_output()
        what = "write to standard output" if error.filename is None else f"read or write {error.filename!r}"
        sys.stderr.write(f"gpuscope {options.command}: cannot {what}: {error.strerror or error}.\n")
        return CommandError.exit_code
    # A program of the user's, whose exceptions are its own.
    result()
    return 0


def _discard_output() -> None:
    # Otherwise Python would fail once more when it flushes at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    from gpuscope import __version__

    parser = argparse.ArgumentParser(
        prog="gpuscope", description="See where the time of a GPU inference goes, stage by stage."
    )
    parser.add_argument("--version", action="version", version=f"gpuscope {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
