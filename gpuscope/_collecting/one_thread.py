"""
The thread that the collector runs on.

A stage in a signal handler may start the collector while its own thread is starting it, so that no lock may be waited
for. Two threads may then be started, of which one does the work.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

from gpuscope._collecting.gates import Gate
from gpuscope._data.plain.tracebacks import traceback_of
from gpuscope._log import logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._log import WarnOnce


class OneThread:
    """
    Runs something once, on a daemon thread, however often it is started.

    Args:
        name: the thread's.
        work: what it runs.

    """

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        self._name, self._work = name, work
        self.stopped = Gate()
        self._started = False
        self._taken = threading.Lock()
        """Held for ever by the one thread that does the work."""
        self._ident = 0

    def start(self) -> None:
        """Start the thread. Starting another is harmless: it ends at once."""
        threading.Thread(target=self.run_here, name=self._name, daemon=True).start()
        self._started = True

    @property
    def is_running(self) -> bool:
        """Whether the thread runs, or has run."""
        # The second where an interrupt came while `start` waited for the thread to be there.
        return self._started or self._taken.locked()

    @property
    def is_this(self) -> bool:
        """Whether it is the thread that asks."""
        return self._ident == threading.get_ident()

    def run_here(self) -> None:
        """Do the work on the thread that asks, unless another does it or did."""
        if not self._taken.acquire(blocking=False):
            return
        self._ident = threading.get_ident()
        try:
            self._work()
        except BaseException as error:  # Nobody is left to catch it: it would end up in the application's stderr.
            logger.warning("the collector failed; nothing more is exported.\n%s", traceback_of(error))
        finally:
            self.stopped.open()


def warn_of_gevent(warnings: WarnOnce) -> None:
    """Say that gevent has made greenlets of our threads, where it has."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("threading"):
        warnings.warn(  # Starting a thread lets other greenlets run, which may start one as well.
            "gevent",
            "gevent has patched `threading`, which is unsupported: gpuscope's threads become greenlets that take turns "
            "with the program's, and NVTX ranges of different greenlets close each other.",
        )
