"""
The streams that stages are timed on: which one is current, which may be destroyed, and event pairs for them.

Calls the driver to make events and to find contexts, and asks nothing about a stream: `CudaDevice` does.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from gpuscope._cuda.spares import spares
from gpuscope._cuda.timed_stream import TimedStream, new_pair
from gpuscope._data.native import native
from gpuscope._interrupts import is_the_programs

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from gpuscope._cuda.driver import Driver, Handle
    from gpuscope._cuda.stream_sampler import StreamSampler
    from gpuscope._cuda.timed_stream import Pair
    from gpuscope._data.interfaces import Stream

_PAIRS_AT_ONCE = 16
_MAX_FOREIGN = 64
"""Streams of a device that are kept though they may be gone. One that is used again is opened anew."""


class OpenStreams:
    """
    The streams of all devices.

    Args:
        driver: makes events.
        torch: says which stream is current.
        count_untimed: counts a stage without GPU times, by reason.
        max_pairs: how many event pairs this period may make, on all devices together, less those that it found.
        sampling: is told of each stream that is opened.

    """

    def __init__(
        self,
        driver: Driver,
        torch: ModuleType,
        count_untimed: Callable[[str], None],
        *,
        max_pairs: int,
        sampling: StreamSampler,
    ) -> None:
        self.tables: list[dict[int, TimedStream]] = [{} for _ in range(torch.cuda.device_count())]
        """For each device its streams by their addresses."""
        self.current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", None) or torch.cuda.current_device
        self.current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
            lambda index: torch.cuda.current_stream(index).cuda_stream
        )
        self.pairs_made = 0
        """Those that an earlier period has left are among them."""
        self._torch = torch
        self._driver = driver
        self._count_untimed = count_untimed
        self._max_pairs = max_pairs
        self._sampling = sampling
        self._contexts: dict[int, tuple[Handle, list[Pair]]] = {}
        self._lock = threading.RLock()  # A garbage collection within may run a stage.

    def find(self, stream: Stream) -> TimedStream | None:
        """Return a stream that was given, or the current one for None; None if its device is not in use."""
        if stream is None:
            return self.current(self.current_device())
        index, raw = stream.device_index, stream.cuda_stream
        return self.tables[index].get(raw) or self._open(index, raw, lambda: stream)

    def current(self, index: int) -> TimedStream | None:
        """Return the current stream of a device; None if that is not in use."""
        raw = self.current_stream(index)
        return self.tables[index].get(raw) or self._open(index, raw, lambda: self._torch.cuda.current_stream(index))

    def _open(self, index: int, raw: int, get_stream: Callable[[], Stream]) -> TimedStream | None:
        with self._lock:
            if index not in self._contexts:
                context = self._driver.active_context(index)
                if context is None:
                    self._count_untimed("device_not_in_use")
                    return None
                opened = context, spares.pairs(context)
                if self._contexts.setdefault(index, opened) is opened:
                    self.pairs_made += len(opened[1])
            table, foreign = self.tables[index], raw != 0 and _may_go(get_stream)
            if foreign:
                _forget_oldest(table)
            timed_stream = table.setdefault(raw, TimedStream(index, raw, *self._contexts[index], foreign=foreign))
        self._sampling.watch(timed_stream)
        return timed_stream

    def guard_default_streams(self) -> None:
        """Have questions precede all that is recorded on them, and no others asked: see `FOREIGN_CAPTURERS`."""
        for table in self.tables:
            if 0 in table and not table[0].guarded:
                table[0].guarded = True
                self._sampling.unwatch(table[0])

    def release(self) -> None:
        """Give back the newest event of each stream, which the next stage might have shared."""
        if native is not None:
            for table in self.tables:
                for timed_stream in list(table.values()):
                    native.end_sharing(timed_stream)

    def take_pair(self, timed_stream: TimedStream) -> Pair | None:
        """Return a pair, a new one if need be; None if there are none, which is counted."""
        free: list[Pair] = timed_stream.pairs
        if free:
            return _held(free.pop())
        with self._lock:
            wanted = max(0, min(_PAIRS_AT_ONCE, self._max_pairs - self.pairs_made))
            self.pairs_made += wanted
        new = self._new_pairs(timed_stream, wanted)
        if not new:
            self._count_untimed("no_free_events")
            return None
        pair = new.pop()
        free.extend(new)
        return _held(pair)

    def _new_pairs(self, timed_stream: TimedStream, wanted: int) -> list[Pair]:
        """Make pairs, as many as the driver can; those that it can't make are not counted as made."""
        new: list[Pair] = []
        try:
            with self._driver.current(timed_stream.context):
                for _ in range(wanted):
                    start, end = self._driver.new_event(), self._driver.new_event()
                    new.append(new_pair(start, end))
        except Exception as error:  # Out of memory, say. The next stage tries again.
            if is_the_programs(error):
                timed_stream.pairs.extend(new)
                raise
            return new
        finally:
            with self._lock:
                self.pairs_made -= wanted - len(new)
        return new


def _held(pair: Pair) -> Pair:
    """Return a pair that was in the pool, with one who holds it."""
    if native is not None:
        pair.users = 1  # type: ignore[attr-defined]  # It is an `EventPair`.
    return pair


def _may_go(get_stream: Callable[[], Stream]) -> bool:
    """
    Tell by PyTorch's id of a stream whether others may destroy it.

    The ids of the streams of its pools, which it never destroys, are odd, and the default stream's is 0. Every other id
    is the address of a stream that PyTorch was given (`ExternalStream`). What is not PyTorch's has none.
    """
    try:
        ident = getattr(get_stream(), "stream_id", None)
    except Exception as error:  # It may go, as far as is known.
        if is_the_programs(error):
            raise
        return True
    return not isinstance(ident, int) or (ident != 0 and ident % 2 == 0)


def _forget_oldest(table: dict[int, TimedStream]) -> None:
    foreign = [raw for raw, timed_stream in table.items() if timed_stream.foreign]
    if len(foreign) >= _MAX_FOREIGN:
        del table[foreign[0]]
