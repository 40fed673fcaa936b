"""
What asks for a dump besides a stage: a signal, and PyTorch's allocator when it is out of memory.

Each only sets a bit, on whatever thread it is. The collector looks in its next pass.
"""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Any

from gpuscope._data import flight as layout
from gpuscope._data.native import native
from gpuscope._log import WarnOnce, later

if TYPE_CHECKING:
    from gpuscope._flight.ring import Ring

_warnings = WarnOnce(say=later)


class OutOfMemory:
    """
    Takes notice when PyTorch's allocator finds no memory on a GPU. Waits for none.

    PyTorch never forgets an observer, so there is one per process, for all periods of recording.
    """

    def __init__(self) -> None:
        self._is_attached = False
        self._times = self._seen = 0
        self.device, self.asked_bytes = -1, 0

    def attach(self) -> None:
        """Look on from now on, if the program has PyTorch and uses a GPU; else the next pass tries again."""
        if self._is_attached:
            return
        torch = sys.modules.get("torch")
        attach = getattr(getattr(torch, "_C", None), "_cuda_attach_out_of_memory_observer", None)
        # It would initialise CUDA, which is the program's to do.
        if torch is None or attach is None or not torch.cuda.is_initialized():
            return
        self._is_attached = True
        attach(self._note)

    def _note(self, device: int, asked_bytes: int, *_: int) -> None:
        self._times += 1
        self.device, self.asked_bytes = device, asked_bytes

    def take(self) -> int:
        """Return a bit if it has happened since somebody asked last."""
        times = self._times
        happened, self._seen = times != self._seen, times
        return layout.OUT_OF_MEMORY if happened else 0


out_of_memory = OutOfMemory()


def listen(ring: Ring) -> None:
    """Have SIGUSR1 ask for a dump, unless the program handles or ignores it."""
    if native is not None:
        if not native.listen(signal.SIGUSR1):
            _warnings.warn("taken", "GPUSCOPE_FLIGHT: the program handles SIGUSR1 itself, so that asks for no dump.")
        return
    try:
        before: Any = signal.getsignal(signal.SIGUSR1)
        if before is signal.SIG_DFL or isinstance(before, _Asks):
            signal.signal(signal.SIGUSR1, _Asks(ring))
        else:
            _warnings.warn("taken", "GPUSCOPE_FLIGHT: the program handles SIGUSR1 itself, so that asks for no dump.")
    except ValueError:
        _warnings.warn(
            "thread", "GPUSCOPE_FLIGHT: SIGUSR1 asks for no dump: handlers are set in the main thread alone."
        )


class _Asks:
    """The handler of the twin."""

    def __init__(self, ring: Any) -> None:
        self._ring = ring

    def __call__(self, *_: object) -> None:
        self._ring.want(layout.SIGNAL)
