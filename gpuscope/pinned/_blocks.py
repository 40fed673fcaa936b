"""
The blocks of memory of a pool: who may have which block, and when. Thread-safe and bounded.

Allocates outside its lock, because pinning takes milliseconds. Never hands out a block whose copy still runs.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from gpuscope._errors import PoolExhaustedError
from gpuscope.pinned._memory import give_back

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope.pinned._memory import HostMemory

_ASK_S = 0.0002
"""How often a waiting thread asks about copies: waiting for an event takes no timeout, and would miss a release."""
_COUNT_S = 0.05
"""How often it counts back buffers let go without a release: a finalizer must not take the lock, so it wakes nobody."""


class PoolStatistics(NamedTuple):
    """The counts of a pool at one moment, in buffers unless a name says bytes."""

    allocated: int
    """Buffers that exist; at most `max_buffers`."""
    in_use: int
    """Of the allocated, those acquired and not released."""
    copying: int
    """Of the allocated, those released whose last copy still runs."""
    peak_in_use: int
    acquired: int
    """Calls of `acquire` that returned a buffer."""
    waited: int
    """Calls of `acquire` that found the pool exhausted and waited."""
    allocated_bytes: int


class BlockPool:
    """
    Blocks of memory, all alike: the idle ones, and the count of those handed out.

    Args:
        make: allocates one block.
        block_bytes: size of a block.
        maximum: blocks at once.
        step: blocks that are made together.

    """

    def __init__(self, make: Callable[[], HostMemory], block_bytes: int, *, maximum: int, step: int) -> None:
        self._make, self._block_bytes = make, block_bytes
        self._maximum, self._step = maximum, step
        # A condition's lock is reentrant: the garbage collector may release a buffer while this thread holds it.
        self._changed = threading.Condition()
        self._idle: deque[HostMemory] = deque()
        self._forgotten: deque[None] = deque()
        self._closed = False
        self._allocated = self._in_use = self._peak_in_use = self._acquired = self._waited = 0

    def take(self, *, block: bool, timeout_s: float | None) -> HostMemory:
        """Return a block that nobody uses: an idle one, a new one, or, with `block`, the first that comes free."""
        with self._changed:
            memory, planned = self._find(block=block, timeout_s=timeout_s)
            self._allocated += planned
            self._in_use += 1
            if memory is not None:
                self._count()
                return memory
        return self._grow(planned)

    def _find(self, *, block: bool, timeout_s: float | None) -> tuple[HostMemory | None, int]:
        """Return an idle block, or how many to make."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        waits = False
        while True:
            self._check_open()
            self._count_back()
            memory = self._first_done()
            planned = min(self._step, self._maximum - self._allocated) if memory is None else 0
            if memory is not None or planned:
                return memory, planned
            if not block:
                raise PoolExhaustedError(f"{self._state()} Release buffers sooner, or increase `max_buffers`.")
            self._waited += not waits
            waits = True
            self._pause(deadline_s, timeout_s)

    def _first_done(self) -> HostMemory | None:
        for position, memory in enumerate(self._idle):
            if memory.ready():
                del self._idle[position]
                return memory
        return None

    def _pause(self, deadline_s: float | None, timeout_s: float | None) -> None:
        longest_s = _ASK_S if self._idle else _COUNT_S
        if deadline_s is not None:
            longest_s = min(longest_s, deadline_s - time.monotonic())
            if longest_s <= 0:
                raise TimeoutError(
                    f"{self._state()} None came free in {timeout_s} s: release buffers sooner, or increase "
                    "`max_buffers` or `timeout_s`."
                )
        self._changed.wait(longest_s)

    def _grow(self, planned: int) -> HostMemory:
        """Make blocks that `take` has counted already; return the first."""
        try:
            memory, *others = [self._make() for _ in range(planned)]
        except BaseException:  # `take` counted them first, so that other threads make no more than `maximum`.
            with self._changed:
                self._allocated -= planned
                self._in_use -= 1
                self._changed.notify_all()
            raise
        with self._changed:
            self._count()
        self._put(others)
        return memory

    def _count(self) -> None:
        self._acquired += 1
        self._peak_in_use = max(self._peak_in_use, self._in_use)

    def give(self, memory: HostMemory) -> None:
        """Take a block back; it is handed out again once its copy is done."""
        self._put([memory], released=1)

    def _put(self, memories: list[HostMemory], released: int = 0) -> None:
        with self._changed:
            self._in_use -= released
            surplus = memories if self._closed else []
            self._allocated -= len(surplus)
            if not self._closed:
                self._idle.extend(memories)
                self._changed.notify(len(memories))
        give_back(surplus)

    def forget(self) -> None:
        """Note that a block was let go without a release. Takes no lock, so a finalizer may call it at any moment."""
        self._forgotten.append(None)

    def _count_back(self) -> None:
        while self._forgotten:
            self._forgotten.popleft()
            self._allocated -= 1
            self._in_use -= 1

    def trim(self) -> int:
        """Give the idle blocks whose copy is done back to the system; return how many bytes."""
        with self._changed:
            done = [memory for memory in self._idle if memory.ready()]
            self._idle = deque(memory for memory in self._idle if memory not in done)
            self._allocated -= len(done)
            self._changed.notify_all()
        give_back(done)
        return len(done) * self._block_bytes

    def close(self) -> None:
        """Give back every idle block now, and each other one when it is released; hand out no more."""
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, deque()
            self._allocated -= len(idle)
            self._changed.notify_all()
        give_back(idle)

    def statistics(self) -> PoolStatistics:
        """Return the counts of this moment."""
        with self._changed:
            self._count_back()
            return PoolStatistics(
                allocated=self._allocated,
                in_use=self._in_use,
                copying=sum(not memory.ready() for memory in self._idle),
                peak_in_use=self._peak_in_use,
                acquired=self._acquired,
                waited=self._waited,
                allocated_bytes=self._allocated * self._block_bytes,
            )

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("The pool is closed: acquire before `close`, or make a new `PinnedPool`.")

    def _state(self) -> str:
        return (
            f"All {self._maximum} buffers of the pool are taken: {self._in_use} in use, {len(self._idle)} released "
            "but still copying."
        )
