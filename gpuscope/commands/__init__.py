"""
The commands of `gpuscope`: one file each, with `add_arguments(parser)` and `run(options) -> exit code`.

They use gpuscope as any program would, through its public names; only `doctor` looks behind them. Nothing imports
them but `gpuscope.__main__`, and what is heavy they import when they run.
"""

from __future__ import annotations


class CommandError(Exception):
    """
    A command cannot do what was asked of it; the message says what to do.

    Its exit code is that of a usage error, so that 1 keeps one meaning: it ran, and something is wrong.
    """

    exit_code = 2
