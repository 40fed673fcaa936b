"""
The only reader of the process's environment.

Imports next to nothing, because every program that imports gpuscope pays for it, even with recording off.
"""

from __future__ import annotations

import os
import sys

TRUE_WORDS = ("1", "true", "yes", "on")
FALSE_WORDS = ("", "0", "false", "no", "off")
_NOT_ABOUT_RECORDING = ("GPUSCOPE_NATIVE", "GPUSCOPE_QUIET", "GPUSCOPE_STARTUP")


def variables() -> dict[str, str]:
    """Return a copy of the environment as it is now; in a notebook, `GPUSCOPE` is `idle` unless it says otherwise."""
    environ = dict(os.environ)
    # One cell decorates, and a later one records. A kernel has this module from its start.
    if "ipykernel.kernelapp" in sys.modules:
        environ.setdefault("GPUSCOPE", "idle")
    return environ


def wants_native() -> bool:
    """Tell whether the parts in C may be used. They rely on the GIL; importing them would switch it on again."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return False
    # Empty is unset, as with OpenTelemetry's variables.
    return os.environ.get("GPUSCOPE_NATIVE", "").strip().lower() not in FALSE_WORDS[1:]


def is_off(environ: dict[str, str]) -> bool:
    """Tell whether the variables switch gpuscope off for good, so that no other setting matters."""
    return environ.get("GPUSCOPE", "").strip().lower() in FALSE_WORDS


def set_without_the_switch(environ: dict[str, str]) -> set[str]:
    """Return the settings of ours, where nothing says on or off: the variable that does may be missing or misspelt."""
    if "GPUSCOPE" in environ:
        return set()
    return {name for name in environ if name.startswith("GPUSCOPE") and name not in _NOT_ABOUT_RECORDING}


def is_our_command() -> bool:
    """Tell whether this process is one of `gpuscope`'s commands."""
    arguments: list[str] = getattr(sys, "argv", None) or [""]
    if arguments[0] == "-m":  # While Python still looks for the module.
        return sys.orig_argv[-len(arguments) :][:1] == ["gpuscope"]
    return arguments[0].endswith(("/gpuscope", "/gpuscope/__main__.py"))


def is_of_multiprocessing() -> bool:
    """Tell whether `multiprocessing` started this process anew, also before it says so itself."""
    return any(text in each for each in sys.orig_argv for text in ("--multiprocessing-fork", "multiprocessing.fork"))


def is_below_run(environ: dict[str, str]) -> bool:
    """Tell whether `gpuscope run` started this process's parent: it speaks for all below it."""
    return environ.get("PYTHONPATH", "").partition(os.pathsep)[0].endswith(os.path.join("commands", "inherited"))  # noqa: PTH118


def export(values: dict[str, str]) -> None:
    """Set variables for this process and those that it will start; only commands do."""
    os.environ.update(values)
