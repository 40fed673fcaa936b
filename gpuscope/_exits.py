"""
The end of a process: what is handed over, in which order, and what is said of it.

Each function is a handler, which `_runtime` registers. None of them raises into the end of the program.
"""

from __future__ import annotations

import atexit
from typing import TYPE_CHECKING, cast

from gpuscope._recording.state import state

if TYPE_CHECKING:
    from gpuscope._collecting.engine import Engine


def be_first() -> None:
    """Have what there is handed over before the application's providers end."""
    # Handlers run last in, first out. A provider registers its own when it is made, so ours has to be registered anew.
    atexit.unregister(_hand_over)
    atexit.register(_hand_over)


def _hand_over() -> None:
    # Before providers end they get what there is. The program's own handlers may still run stages.
    if state.engine is not None:
        state.engine.hand_over()


def finish() -> None:
    """End recording, and say what came of it."""
    # After all handlers that were registered after this. The recorder stays, so that what comes later still is counted.
    if state.engine is not None:
        from gpuscope import _said  # Not for programs that record nothing.

        state.engine.shutdown_at_exit()
        _said.outcome(cast("Engine", state.engine))


def before_the_end() -> None:
    """Get ready, before the interpreter forbids threads and imports."""
    finish_set_up()
    # Even if the program made a provider in its last moments, our handler is the newest now, and runs first.
    be_first()


def finish_set_up() -> None:
    """Wait until a collector that has just started is ready."""
    if state.engine is not None:
        state.engine.wait_until_ready()
