"""
What threads wait on for the collector, and it for them: `Wake` and `Gate`.

`threading.Event` would do but for its lock. A signal handler, or a finalizer that the garbage collector runs, may come
while its own thread holds that lock, and would wait for ever. Here opening and waking take no lock at all.
"""

from __future__ import annotations

import contextlib
import threading
import time

_LOOK_AGAIN_S = 1.0


def _closed() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


def _open(lock: threading.Lock) -> None:
    with contextlib.suppress(RuntimeError):  # It is open already.
        lock.release()


class Wake:
    """Ends one wait of one thread; a wake that comes early ends the next wait."""

    def __init__(self) -> None:
        self._asleep = _closed()

    def set(self) -> None:
        """End the wait. Any code may call this at any time."""
        _open(self._asleep)

    def wait(self, timeout_s: float) -> bool:
        """Wait until somebody calls `set`, and return whether that came in time."""
        return self._asleep.acquire(timeout=max(0.0, timeout_s))


class Gate:
    """Is opened once; any number of threads may wait for that."""

    def __init__(self) -> None:
        self.is_open = False
        self._bar = _closed()

    def open(self) -> None:
        """Let everybody through, from now on."""
        self.is_open = True
        _open(self._bar)

    def wait(self, timeout_s: float) -> bool:
        """Wait until the gate is open, and return whether that came in time."""
        deadline_s = time.monotonic() + timeout_s
        while not self.is_open and (left_s := deadline_s - time.monotonic()) > 0:
            # In turns, because an interrupt may keep one thread from opening the bar for the next.
            if self._bar.acquire(timeout=min(left_s, _LOOK_AGAIN_S)):
                _open(self._bar)
        return self.is_open
