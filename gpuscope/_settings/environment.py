"""
The only reader of the process's environment.

Imports next to nothing, because every program that imports gpuscope pays for it, even with recording off.
"""

from __future__ import annotations

import os
import sys

TRUE_WORDS = ("1", "true", "yes", "on")
FALSE_WORDS = ("", "0", "false", "no", "off")


def variables() -> dict[str, str]:
    """Return a copy of the environment as it is now; in a notebook, `GPUSCOPE` is `idle` unless it says otherwise."""
    environ = dict(os.environ)
    # One cell decorates, and a later one records.
    if "ipykernel" in sys.modules:
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


def is_set_up_without_being_on(environ: dict[str, str]) -> bool:
    """Tell whether there are settings but nothing that says on or off: the variable that does may be misspelt."""
    return "GPUSCOPE" not in environ and any(
        name.startswith("GPUSCOPE") and name != "GPUSCOPE_NATIVE" for name in environ
    )


def export(values: dict[str, str]) -> None:
    """Set variables for this process and those that it will start; only `gpuscope run` does."""
    os.environ.update(values)
