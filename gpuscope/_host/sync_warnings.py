"""
PyTorch's warnings of synchronisations: heard where Python's filters are asked about them, and shown to nobody.

A filter has an object that is asked whether a warning's text matches. Ours notes the synchronisation, and the filter is
to ignore it. The list of filters keeps ours in front, also in the copies that `warnings.catch_warnings` makes: so
a program that turns warnings into errors, or keeps them, gets none of these.
"""

from __future__ import annotations

import re
import sys
import warnings
from typing import TYPE_CHECKING, Any, SupportsIndex

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

TEXT = "called a synchronizing CUDA operation"
"""PyTorch's words, in `c10/cuda/CUDAFunctions.h`."""
_PROTOTYPE = re.compile("Synchronization debug mode is a prototype")
_WARN = 1
"""Of PyTorch's debug mode: warn, and do not fail."""


def debug_mode() -> int | None:
    """Return what PyTorch does at a synchronisation: 0 nothing, 1 warn, 2 fail; None where it cannot tell."""
    ask = getattr(sys.modules["torch"]._C, "_cuda_get_sync_debug_mode", None)
    return None if ask is None else int(ask())


def set_debug_mode(mode: int) -> None:
    """Set that, without making a context, as `torch.cuda.set_sync_debug_mode` would."""
    sys.modules["torch"]._C._cuda_set_sync_debug_mode(mode)


class Filters(list[Any]):
    """
    Filters of warnings, of which some stay in front of all others.

    Args:
        front: these.
        others: the program's.

    """

    def __init__(self, front: tuple[Any, ...], others: Iterable[Any]) -> None:
        super().__init__((*front, *others))
        self._front = front

    def others(self) -> list[Any]:
        """Return the program's."""
        return [each for each in self if not any(each is ours for ours in self._front)]

    def give_up(self) -> None:
        """Be the program's alone from now on."""
        others, self._front = self.others(), ()
        super().__setitem__(slice(None), others)

    def __getitem__(self, index: Any) -> Any:
        # `catch_warnings` copies the whole list.
        return Filters(self._front, self.others()) if index == slice(None) else super().__getitem__(index)

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index, value)
        super().__setitem__(slice(None), (*self._front, *self.others()))

    def insert(self, index: SupportsIndex, item: Any) -> None:
        """Insert a filter, behind those that stay in front."""
        super().insert(index, item)
        super().__setitem__(slice(None), (*self._front, *self.others()))

    def clear(self) -> None:
        """Take out the program's."""
        self[:] = ()


class SyncWarnings:
    """
    Hears them while it is on. Belongs to the whole process.

    Args:
        hear: called for each, on the thread that waits.

    """

    def __init__(self, hear: Callable[[], None]) -> None:
        self._hear = hear
        self._filters: Filters | None = None
        self._theirs: list[Any] | None = None
        """The list that the program had."""
        self._mode_before: int | None = None

    def match(self, text: str) -> bool:
        """Tell whether a warning is one of a synchronisation that the program has not asked for; and note it."""
        if self._filters is None or not text.startswith(TEXT):
            return False
        self._hear()
        return not self._mode_before

    def begin(self) -> None:
        """Have PyTorch warn, unless the program has said what it is to do."""
        front = (("ignore", _PROTOTYPE, Warning, None, 0), ("ignore", self, Warning, None, 0))
        # The list itself, and not `filterwarnings`, which would have the program's warnings shown once more.
        theirs: Any = warnings.filters
        self._theirs, self._filters = theirs, Filters(front, theirs)
        warnings.filters = self._filters
        self._mode_before = debug_mode()
        if self._mode_before == 0:
            set_debug_mode(_WARN)

    def end(self) -> None:
        """Put back what the program had; a block of `catch_warnings` that is open has its own list, and keeps that."""
        if self._filters is None:
            return
        if self._mode_before == 0 and debug_mode() == _WARN:
            set_debug_mode(0)
        now: Any = warnings.filters
        ours, theirs, self._filters, self._theirs = self._filters, self._theirs, None, None
        if now is ours and theirs is not None:
            theirs[:] = ours.others()
            warnings.filters = theirs
        elif isinstance(now, Filters):
            now.give_up()
        ours.give_up()
        self._mode_before = None
