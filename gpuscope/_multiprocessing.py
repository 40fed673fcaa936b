"""
Has children of `multiprocessing` export when they end, as other processes do through `atexit`.

Never imports `multiprocessing`; does nothing if the program has not imported it.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def finish_in_children(finish: Callable[[], None]) -> None:
    """Have `finish` called at the end of this process and of those forked from it, where `atexit` is skipped."""
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        # A child drops all finalizers when it begins to run, and only then calls what is registered here.
        util.register_after_fork(finish, _finish_at_end)
        if sys.modules["multiprocessing.process"].parent_process() is not None:
            _finish_at_end(finish)


def _finish_at_end(finish: Callable[[], None]) -> None:
    # The last of all: finalizers of the program's may still run stages.
    sys.modules["multiprocessing.util"].Finalize(None, _at_end, (finish,), exitpriority=-(1 << 30))


def _at_end(finish: Callable[[], None]) -> None:
    # A child that was forked, also by a fork server, leaves through `os._exit`. A spawned one does run the handlers of
    # `atexit`, and its threads may run until then.
    if sys.modules["multiprocessing"].get_start_method(allow_none=True) == "spawn":
        return
    others = [each for each in threading.enumerate() if not each.daemon and each is not threading.current_thread()]
    if not others:
        finish()
        return
    # The child waits for its threads only after its finalizers, and then for this one, too.
    threading.Thread(target=_finish_after, args=(others, finish), name="gpuscope-end", daemon=False).start()


def _finish_after(threads: list[threading.Thread], finish: Callable[[], None]) -> None:
    for thread in threads:
        thread.join()
    finish()
