"""
Children of `multiprocessing` export at their end, as other processes do by handlers of `atexit`.

Imports nothing of `multiprocessing`, and does nothing where the program has not.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def finish_in_children(finish: Callable[[], None]) -> None:
    """Have `finish` called at the end of this process and of those forked from it, where `atexit` is left out."""
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        # A child forgets its finalizers when it begins to run, and is told so.
        util.register_after_fork(finish, _finish_at_end)
        if sys.modules["multiprocessing.process"].parent_process() is not None:
            _finish_at_end(finish)


def _finish_at_end(finish: Callable[[], None]) -> None:
    sys.modules["multiprocessing.util"].Finalize(None, _at_end, (finish,), exitpriority=0)


def _at_end(finish: Callable[[], None]) -> None:
    # A child that was forked, by a fork server too, leaves through `os._exit`; a spawned one comes to `atexit`, and its
    # threads may run until then.
    if sys.modules["multiprocessing"].get_start_method(allow_none=True) != "spawn":
        finish()
