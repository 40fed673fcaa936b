"""
Where the hot path calls a device, and what may stand there for a while.

Decides nothing: the device says which functions are its own, and whoever swaps others in takes them out again.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._data.interfaces import Stream
    from gpuscope._data.record import StageRecord

Begin: TypeAlias = "Callable[[StageRecord, Stream], None]"
End: TypeAlias = "Callable[[StageRecord], None]"


class EntryPoints:
    """
    `begin` and `end`, which the hot path looks up and calls for each stage.

    `swap` and `_become` are the only places where they are set, both under one lock: threads may call both at once, and
    neither is on the hot path.
    """

    begin: Begin
    end: End
    usual: tuple[Begin, End]
    """The device's own functions of this moment."""
    _stands_in = False

    def __init__(self) -> None:
        self._setting = threading.RLock()  # A garbage collection within may end a capture.

    def swap(self, begin: Begin | None = None, end: End | None = None) -> None:
        """
        Have the hot path call these from now on or, without any, the device's own functions again.

        What stands in calls `usual`, which it looks up each time. The device may change its own functions meanwhile,
        when PyTorch is first used or recording ends; that does not take out what stands in, and is not undone later.
        """
        with self._setting:
            self._stands_in = begin is not None
            self.begin, self.end = begin or self.usual[0], end or self.usual[1]

    def _become(self, begin: Begin, end: End) -> None:
        """Change the device's own functions."""
        with self._setting:
            self.usual = begin, end
            if not self._stands_in:
                self.begin, self.end = begin, end
