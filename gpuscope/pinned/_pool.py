"""
Page-locked host memory that is allocated once and reused: `PinnedBuffer`, and `PinnedPool`, which lends many of them.

Copies between pinned memory and a GPU run beside the program. Pinning itself is slow and takes a lock of the driver,
so it is for set-up, never for each request, and not for while another thread captures a CUDA graph. Nothing here waits
for a stream or a device; giving memory back may. Where memory can't be pinned, everything works the same with pageable
memory, after one warning; without a GPU, copies are made at once, on the host.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from gpuscope._errors import PoolExhaustedError
from gpuscope.pinned._buffer import PinnedBuffer
from gpuscope.pinned._checks import checked_dtype, checked_shape
from gpuscope.pinned._memory import HostMemory
from gpuscope.pinned._stock import BlockPool, PoolStatistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

__all__ = ["PinnedBuffer", "PinnedPool", "PoolExhaustedError", "PoolStatistics"]


class PinnedPool:
    """
    Pinned buffers of one shape and dtype, for many threads: a bounded number, reused; a context manager that closes it.

    A buffer is handed out again only once its own last copy is done. One that is let go without a release is not
    reused, because its `array` may still be held, but it no longer counts towards the bound.

    Args:
        shape: as for `PinnedBuffer`.
        dtype: as for `PinnedBuffer`.
        max_buffers: how many there may be at once.
        step: how many are allocated together when none is free; none are before the first `acquire`.
        when_exhausted: whether `acquire` then waits for a buffer ("block") or raises `PoolExhaustedError` ("raise").
        timeout_s: how long it waits at most; None: without end.

    Raises:
        TypeError: for a shape or dtype that is none, or that torch can't copy on the host, and for broken numbers.
        ValueError: for numbers below 1, another `when_exhausted`, or a `timeout_s` that is negative or not used.

    """

    def __init__(
        self,
        shape: int | Sequence[int],
        dtype: Any,
        *,
        max_buffers: int = 8,
        step: int = 2,
        when_exhausted: Literal["block", "raise"] = "block",
        timeout_s: float | None = None,
    ) -> None:
        _check_numbers(max_buffers=max_buffers, step=step)
        _check_waiting(when_exhausted, timeout_s)
        sizes, found = checked_shape(shape), checked_dtype(dtype)
        self.shape, self.dtype = sizes, found
        self._blocks, self._timeout_s = when_exhausted == "block", timeout_s
        self._stock = BlockPool(
            lambda: HostMemory(sizes, found), math.prod(sizes) * found.itemsize, maximum=max_buffers, step=step
        )

    def acquire(self) -> PinnedBuffer:
        """
        Return a buffer that nobody uses and whose last copy is done; what is in it is left over from before.

        Use it as a context manager, or call its `release`, also while its copy runs.

        Raises:
            PoolExhaustedError: if there is none and there may be no more, with `when_exhausted="raise"`.
            TimeoutError: if none came free in `timeout_s`.
            RuntimeError: after `close`, also if that came while waiting.

        """
        return PinnedBuffer._of_stock(self._stock, self._stock.take(block=self._blocks, timeout_s=self._timeout_s))

    def statistics(self) -> PoolStatistics:
        """Return how many buffers there are, in use and copying, the peak, and how often `acquire` had to wait."""
        return self._stock.statistics()

    def trim(self) -> int:
        """Give the memory of idle buffers back to the system, and return how many bytes; this may wait for the GPU."""
        return self._stock.trim()

    def close(self) -> None:
        """Give all memory back, that of buffers in use when they are released; `acquire` is an error from then on."""
        self._stock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _check_numbers(**numbers: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int):
            raise TypeError(f"`{name}` is {number!r}: expected a whole number.")
        if number < 1:
            raise ValueError(f"`{name}` is {number!r}: expected 1 or more.")


def _check_waiting(when_exhausted: object, timeout_s: float | None) -> None:
    if when_exhausted not in ("block", "raise"):
        raise ValueError(f'`when_exhausted` is {when_exhausted!r}: expected "block" or "raise".')
    if timeout_s is not None and (timeout_s < 0 or when_exhausted == "raise"):
        raise ValueError(f'`timeout_s` is {timeout_s!r}: expected 0 or more, and only with `when_exhausted="block"`.')
