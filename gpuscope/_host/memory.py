"""
The memory that PyTorch's CUDA allocator gave out, by stage: at its begin, at its end, and the peak between.

The allocator knows one peak per device. So it is read and reset where a stage begins, each stage that is open keeps
the largest of what is read until it ends, and the program goes on to see its own peaks: what was reset away is added to
what PyTorch's statistics say, and the program's own resets are told to the stages first. The readings neither wait for
the GPU nor make a context. Exact but for this: a peak that another thread makes in the microseconds between a reading
and the reset belongs to nobody.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, TypeAlias

from gpuscope._data.attributes import MEMORY_BEGIN, MEMORY_END, MEMORY_MALLOCS, MEMORY_PEAK, MEMORY_RETRIES
from gpuscope._data.plain.values import shown
from gpuscope._interrupts import is_the_programs
from gpuscope._log import WarnOnce, later
from gpuscope._recording.state import state

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._data.flight import Flight
    from gpuscope._data.record import StageRecord
    from gpuscope._recording.recorder import Recorder

Numbers: TypeAlias = "dict[str, Any]"
"""The allocator's statistics, nested, as PyTorch has them."""
_STATISTICS = ("_cuda_memoryStats", "_accelerator_getDeviceStats")
_RESETS = ("_cuda_resetPeakMemoryStats", "_accelerator_resetPeakStats")
_PEAK = "peak"
_warnings = WarnOnce(say=later)


class Open:
    """One stage that is measured."""

    def __init__(self, device: int | None, begin: int, retries: int, mallocs: int) -> None:
        self.device = device
        """None where the program did not use CUDA yet."""
        self.begin = self.peak = begin
        self.retries, self.mallocs = retries, mallocs


class Peaks:
    """The allocator's peaks, shared by all stages that are open, and the program's view of them. One per process."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._open: list[Open] = []
        self._kept: dict[int, Numbers] = {}
        """By device: the peaks that were reset away, since the program last reset them itself."""
        self._read: Callable[[int], Numbers] | None = None
        self._reset: Callable[[int], object] | None = None

    def enter(self) -> Open:
        """Return a new stage, measured from now on."""
        with self._lock:
            device = self._device()
            if device is None:
                opened = Open(None, 0, 0, 0)
            else:
                found = self._fold(device)
                if _peak(found) > _current(found) and self._reset is not None:
                    self._kept[device] = _larger(self._kept.get(device, {}), found)
                    self._reset(device)
                opened = Open(device, _current(found), *_counts(found))
            self._open.append(opened)
            return opened

    def leave(self, opened: Open) -> dict[str, int]:
        """End its measurement, and return it as attributes; nothing where no GPU is used."""
        with self._lock:
            if opened in self._open:
                self._open.remove(opened)
            device = self._device() if opened.device is None else opened.device
            if device is None or self._read is None:
                return {}
            found = self._fold(device)
            peak = max(opened.peak, _peak(found))
            if opened.device is None and device in self._kept:  # Nothing was there before.
                peak = max(peak, _peak(self._kept[device]))
            retries, mallocs = _counts(found)
            return {
                MEMORY_BEGIN: opened.begin,
                MEMORY_END: _current(found),
                MEMORY_PEAK: peak,
                MEMORY_RETRIES: retries - opened.retries,
                MEMORY_MALLOCS: mallocs - opened.mallocs,
            }

    def _fold(self, device: int) -> Numbers:
        """Read the statistics, and give their peak to all stages that are open on the device."""
        found: Numbers = self._read(device)  # type: ignore[misc]  # There is a device, so there it is.
        peak = _peak(found)
        for each in self._open:
            if each.device == device and each.peak < peak:
                each.peak = peak
        return found

    # ---- PyTorch

    def _device(self) -> int | None:
        """Return the current device, and be between PyTorch and its allocator; None where the program uses none."""
        torch: Any = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return None
        if self._read is None:
            self._stand_between(torch._C)
        return int(torch._C._cuda_getDevice())

    def _stand_between(self, library: Any) -> None:
        read, reset = getattr(library, _STATISTICS[0]), getattr(library, _RESETS[0])
        for name in _STATISTICS:
            if (original := getattr(library, name, None)) is not None:
                setattr(library, name, self._as_the_program_knows_it(original))
        for name in _RESETS:
            if (original := getattr(library, name, None)) is not None:
                setattr(library, name, self._after_the_stages(original))
        self._read, self._reset = read, reset

    def _as_the_program_knows_it(self, original: Callable[[int], Numbers]) -> Callable[[int], Numbers]:
        @functools.wraps(original)
        def statistics(device: int) -> Numbers:
            with self._lock:
                found = original(device)
                return _larger(found, self._kept[device]) if device in self._kept else found

        return statistics

    def _after_the_stages(self, original: Callable[[int], object]) -> Callable[[int], object]:
        @functools.wraps(original)
        def reset(device: int) -> object:
            with self._lock:
                if isinstance(device, int) and device >= 0 and self._open:
                    self._fold(device)
                result = original(device)
                self._kept.pop(device, None)
                return result

        return reset

    def forget(self) -> None:
        """Hold nothing of the parent's: this process is the child of a fork."""
        self._lock = threading.RLock()
        self._open = []


def _current(found: Numbers) -> int:
    return int(found["allocated_bytes"]["all"]["current"])


def _peak(found: Numbers) -> int:
    return int(found["allocated_bytes"]["all"][_PEAK])


def _counts(found: Numbers) -> tuple[int, int]:
    """Return how often the allocator tried again, and took memory of the driver."""
    mallocs = found.get("num_device_alloc")
    return int(found.get("num_alloc_retries", 0)), int(
        found["segment"]["all"]["allocated"] if mallocs is None else mallocs
    )


def _larger(found: Numbers, other: Numbers) -> Numbers:
    """Return the statistics with the larger of both peaks each."""
    return {
        name: _larger(value, other.get(name, {}))
        if isinstance(value, dict)
        else max(value, other.get(name, value))
        if name == _PEAK
        else value
        for name, value in (found or other).items()
    }


peaks = Peaks()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=peaks.forget)


class Probe:
    """
    Stands where the flight recorder's ring does, and calls that as well: both want to know of begins and ends.

    Args:
        inner: what stood there.
        recorder: whose stages they are.
        outermost: whether all outermost stages are measured.

    """

    def __init__(self, inner: Flight | None, recorder: Recorder, *, outermost: bool) -> None:
        self.inner = inner
        self.outermost = outermost
        self._recorder = recorder
        self._measured: dict[int, Open] = {}
        """By the stages' own ids."""

    def begin(self, record: StageRecord) -> None:
        """Note that a stage has begun, and measure it if that is wanted."""
        if self.inner is not None:
            self.inner.begin(record)
            if self._recorder.flight is not self:  # What stood there has put another in its place.
                self.inner, self._recorder.flight = self._recorder.flight, self
        if record.site.memory or (self.outermost and record.outer is None):
            try:
                self._measured[record.span_id] = peaks.enter()
            except Exception as error:  # The stage goes on, without its memory.
                if is_the_programs(error):
                    raise
                _warnings.warn("memory", "the memory of stages is not measured: %s.", shown(error))

    def end(self, record: StageRecord, error: BaseException | None) -> None:
        """Note that it has ended, and how much memory it had."""
        opened = self._measured.pop(record.span_id, None)
        if opened is not None:
            try:
                found = peaks.leave(opened)
                if found:
                    record.attributes = {**(record.attributes or {}), **found}
            except Exception as failure:  # As above.
                if is_the_programs(failure):
                    raise
                _warnings.warn("memory", "the memory of stages is not measured: %s.", shown(failure))
        if self.inner is not None:
            self.inner.end(record, error)


def attach(recorder: Recorder) -> None:
    """Have a recorder measure memory, if a stage or the settings of its period ask for that."""
    engine = state.engine
    outermost = engine is not None and engine.recorder is recorder and engine.config.memory
    if isinstance(recorder.flight, Probe):
        recorder.flight.outermost |= outermost
    elif outermost or state.measures_memory:
        recorder.flight = Probe(recorder.flight, recorder, outermost=outermost)
