"""
Bytes that one batch after another uses, and that nobody else refers to when they are used again.

Knows neither batches nor streams: whoever uses a buffer must know that the GPU is done with it.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_use_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)
"""How many tensors share a storage. PyTorch's own graph trees rest on it; without it no memory is used twice."""


class GrowingBuffer:
    """
    Bytes on the host or on a device. Each use gets as many as it needs, and new memory if they don't suffice.

    A view of them may live on: in what `post` returned, in an object, a closure or another thread, or because `infer`
    kept its input. `let_go` then leaves the memory to that view, and the next use gets memory of its own. So nobody
    has to search for views.
    """

    def __init__(self, device: torch.device, *, pinned: bool = False) -> None:
        self.grew = False
        """Whether the last use needed new memory."""
        self._pinned = pinned
        self._bytes = torch.empty(0, dtype=torch.uint8, device=device)
        self._storage = self._bytes.untyped_storage()
        self._last: torch.Tensor | None = None
        self._key: object = None
        self._mark: object = None

    def shaped(
        self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, strides: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """Return a tensor on the first bytes, contiguous without `strides`; it overwrites what was there before."""
        self.grew = False
        key = shape, dtype, strides
        last = self._last
        if last is None or self._key != key:
            self._last = last = self._cut(shape, dtype, strides)
            self._key, self._mark = key, self._state()
        return last

    def let_go(self) -> None:
        """Give up the memory if anybody else refers to it. Call this when the batch is over, before the next."""
        if self._last is not None and (_use_count is None or self._state() != self._mark):
            self._last = self._key = None
            self._own(torch.empty(0, dtype=torch.uint8, device=self._bytes.device))

    def holds(self, address: int) -> bool:
        """Tell whether an address is in this memory."""
        start = self._bytes.data_ptr()
        return start <= address < start + self._bytes.numel()

    def _cut(
        self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, strides: tuple[int, ...] | None
    ) -> torch.Tensor:
        size = dtype.itemsize * math.prod(shape)
        self.grew = size > self._bytes.numel()
        # A view made in the caller's inference mode could not be used outside it.
        with torch.inference_mode(False):
            if self.grew:
                self._own(_empty(size, self._bytes.device, pinned=self._pinned))
            flat = self._bytes[:size].view(dtype)
            return flat.view(shape) if strides is None else flat.as_strided(shape, strides)

    def _own(self, memory: torch.Tensor) -> None:
        self._bytes, self._storage = memory, memory.untyped_storage()

    def _state(self) -> object:
        # Address and size change if a view was moved into shared memory, for another process, or was resized.
        storage = self._storage
        tensors = _use_count and _use_count(storage._cdata)
        return tensors, sys.getrefcount(storage), sys.getrefcount(self._bytes), storage.data_ptr(), storage.nbytes()


def _empty(size: int, device: torch.device, *, pinned: bool) -> torch.Tensor:
    if pinned:
        from gpuscope.pinned import PinnedBuffer

        pages: torch.Tensor = PinnedBuffer((size,), torch.uint8).tensor
        return pages
    return torch.empty(size, dtype=torch.uint8, device=device)
