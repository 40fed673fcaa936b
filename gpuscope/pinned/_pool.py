"""
`PinnedPool`: page-locked buffers that are allocated once, lent, and reused.

Copies between pinned memory and a GPU run beside the program. Pinning itself is slow and takes a lock of the driver: do
it at set-up, not per request, and not while another thread captures a CUDA graph. Nothing here waits for a stream or a
device, except that giving memory back to the system may. Where memory can't be pinned, everything works the same with
pageable memory, after one warning; without a GPU, copies are made at once, on the host.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from gpuscope._data.plain.values import shown
from gpuscope._errors import PoolExhaustedError
from gpuscope.pinned._blocks import BlockPool, PoolStatistics
from gpuscope.pinned._buffer import PinnedBuffer
from gpuscope.pinned._checks import checked_dtype, checked_shape
from gpuscope.pinned._memory import HostMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

    from gpuscope.pinned._checks import DTypeLike

__all__ = ["PinnedBuffer", "PinnedPool", "PoolExhaustedError", "PoolStatistics"]


class PinnedPool:
    """
    A bounded number of reused pinned buffers of one shape and dtype, for many threads; a context manager that closes.

    A buffer is handed out again only once its own last copy is done. One that is let go without a release is not
    reused, because its `array` may still be held, but it no longer counts towards the bound.

    Args:
        shape: as for `PinnedBuffer`.
        dtype: as for `PinnedBuffer`.
        max_buffers: buffers that may exist at once.
        step: buffers that are allocated together when none is free, from the first `acquire` on.
        when_exhausted: what `acquire` does when all are taken: wait for one ("block"), or raise `PoolExhaustedError`
            ("raise").
        timeout_s: seconds that `acquire` waits at most; None: no limit.

    Raises:
        TypeError: for an invalid shape, a dtype that torch can't copy on the host, and numbers that are not whole.
        ValueError: for a negative size, numbers below 1, another `when_exhausted`, and a `timeout_s` that is negative
            or not used.

    """

    def __init__(
        self,
        shape: int | Sequence[int],
        dtype: DTypeLike,
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
        self._waits, self._timeout_s = when_exhausted == "block", timeout_s
        self._blocks = BlockPool(
            lambda: HostMemory(sizes, found), math.prod(sizes) * found.itemsize, maximum=max_buffers, step=step
        )

    def acquire(self) -> PinnedBuffer:
        """
        Return a buffer that nobody uses and whose last copy is done. Its contents are left over from its last user.

        Use it as a context manager, or call its `release`, which is allowed while its copy runs.

        Raises:
            PoolExhaustedError: if all buffers are taken, with `when_exhausted="raise"`.
            TimeoutError: if none came free in `timeout_s`.
            RuntimeError: after `close`, also if it was called while this waited.

        """
        return PinnedBuffer._of_pool(self._blocks, self._blocks.take(block=self._waits, timeout_s=self._timeout_s))

    def statistics(self) -> PoolStatistics:
        """Return how many buffers exist, are in use and are copying, the peak, and how often `acquire` waited."""
        return self._blocks.statistics()

    def trim(self) -> int:
        """Give the memory of idle buffers back to the system, and return how many bytes. May wait for the GPU."""
        return self._blocks.trim()

    def close(self) -> None:
        """Give all memory back, that of buffers in use once they are released; `acquire` raises from then on."""
        self._blocks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _check_numbers(**numbers: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int):
            raise TypeError(f"`{name}` is {shown(number)}: expected a whole number.")
        if number < 1:
            raise ValueError(f"`{name}` is {shown(number)}: expected 1 or more.")


def _check_waiting(when_exhausted: object, timeout_s: float | None) -> None:
    if when_exhausted not in ("block", "raise"):
        raise ValueError(f'`when_exhausted` is {shown(when_exhausted)}: expected "block" or "raise".')
    if timeout_s is not None and (timeout_s < 0 or when_exhausted == "raise"):
        raise ValueError(
            f'`timeout_s` is {shown(timeout_s)}: expected 0 or more, and only with `when_exhausted="block"`.'
        )
