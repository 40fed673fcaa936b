"""
What Python's start runs in each interpreter where gpuscope is installed and one of its variables is set.

`GPUSCOPE_STAGES` and its like name functions of a program that does not import gpuscope. A line in `site-packages`,
which `backend.py` puts there, imports this package as `_gpuscope_startup`; it waits for the modules that are named, and
imports gpuscope as the first of them comes. Until then nothing is imported, and nothing is said: formatters, installers
and test runners start with the same variables. Never imports torch, and never raises.
"""

from __future__ import annotations

import os
import sys

_OFF = ("", "0", "false", "no", "off")
NAMES = ("GPUSCOPE_STAGES", "GPUSCOPE_FRAMEWORKS", "GPUSCOPE_STAGES_FILE")
"""The variables that name stages."""


def _is_wanted() -> bool:
    is_off = "GPUSCOPE" in os.environ and os.environ["GPUSCOPE"].strip().lower() in _OFF
    is_switched_off = os.environ.get("GPUSCOPE_STARTUP", "1").strip().lower() in _OFF[1:]
    return not is_off and not is_switched_off and not _is_our_command()


def _is_our_command() -> bool:
    """Tell whether this process is one of `gpuscope`'s commands, which see to it themselves."""
    arguments = sys.argv or [""]
    if arguments[0] == "-m":
        return sys.orig_argv[-len(arguments) :][:1] == ["gpuscope"]
    return os.path.basename(arguments[0]) == "gpuscope"  # noqa: PTH119 - `pathlib` costs 2 ms


if __name__ == "_gpuscope_startup" and _is_wanted():
    import atexit

    from _gpuscope_startup.following import follow, say_that_nobody_came

    if any(os.environ.get(name, "").strip() for name in NAMES):
        follow(*(os.environ.get(name, "") for name in NAMES))
    else:
        atexit.register(say_that_nobody_came, os.getpid())
