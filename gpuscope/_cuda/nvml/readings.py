"""
What NVML says of one GPU at one moment, and which other processes compute on it.

Reads; adds nothing up. What a GPU, a driver or a container does not tell is None, and is not asked again.
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gpuscope._cuda.nvml.library import (
    CLOCK_SM,
    NEVER,
    NOT_FOUND,
    REASONS,
    SUCCESS,
    Process,
    ProcessSample,
    Utilization,
)

if TYPE_CHECKING:
    from gpuscope._cuda.nvml.library import Argument, Nvml

ALONE, IDLE, WORKED, UNKNOWN, HIDDEN = "alone", "idle", "worked", "unknown", "hidden"
"""
Of the other processes on a GPU: there are none; those that are there did not work, or did; they are there, and whether
they worked cannot be told; whether there are any cannot be told.
"""
_MOST_PROCESSES = 256
_STATUS = Path("/proc/self/status")
_REASONS_OF = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
"""The name since driver 535, and the one before."""
_PROCESSES_OF = ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetComputeRunningProcesses_v2")


class Reading(NamedTuple):
    """One moment of a GPU."""

    utilization: float | None
    """Part of the last sample period, 1/6 to 1 second, in which a kernel of any process ran."""
    clock_hz: float | None
    """Of its multiprocessors."""
    power_w: float | None
    throttled: str | None
    """What holds its clocks down, empty if nothing does."""


class Others(NamedTuple):
    """The other processes that compute on a GPU."""

    state: str
    processes: int | None
    """How many there are at least; None where that is hidden."""
    work: float = 0.0
    """The part of the time in which they used it, where `state` is `WORKED`."""


class Gpu:
    """
    One GPU, or one instance of it (MIG).

    Args:
        nvml: the library.
        handle: what NVML knows it by.
        pids: the numbers of this process.

    """

    def __init__(self, nvml: Nvml, handle: ctypes.c_void_p, pids: frozenset[int]) -> None:
        self._nvml, self._handle, self._pids = nvml, handle, pids
        self.whole = nvml.whole(handle)
        """The GPU that this instance is a part of; clock and power are known of that alone."""
        self._never: set[str] = set()
        self.errors = 0
        """Questions that NVML refused though it may answer them another time."""
        self._seen_us = time.time_ns() // 1000
        self._processes = (Process * _MOST_PROCESSES)()
        self._samples = (ProcessSample * _MOST_PROCESSES)()

    def read(self) -> Reading:
        """Ask four questions."""
        utilization, number, power, reasons = Utilization(), ctypes.c_uint(), ctypes.c_uint(), ctypes.c_ulonglong()
        whole = self.whole or self._handle
        is_used = self._ask("nvmlDeviceGetUtilizationRates", self._handle, ctypes.byref(utilization))
        has_clock = self._ask("nvmlDeviceGetClockInfo", whole, CLOCK_SM, ctypes.byref(number))
        has_power = self._ask("nvmlDeviceGetPowerUsage", whole, ctypes.byref(power))
        has_reasons = any(self._ask(name, whole, ctypes.byref(reasons)) for name in _REASONS_OF)
        return Reading(
            utilization=min(1.0, utilization.gpu / 100) if is_used else None,
            clock_hz=number.value * 1e6 if has_clock else None,
            power_w=power.value / 1e3 if has_power else None,
            throttled=next((name for bit, name in REASONS if reasons.value & bit), "") if has_reasons else None,
        )

    def others(self) -> Others:
        """
        Tell which other processes compute on it, and whether they worked since the last call.

        In a container NVML may show no process at all, or the numbers that processes have outside. Where it does not
        show this one, which is there, one of the others may be it.
        """
        pids = self._compute_pids()
        if pids is None:
            return Others(HIDDEN, None)
        if self._pids.isdisjoint(pids):
            return Others(UNKNOWN, len(pids) - 1) if len(pids) > 1 else Others(HIDDEN, None)
        others = pids - self._pids
        if not others:
            return Others(ALONE, 0)
        work = self._work_of(others)
        if work is None:
            return Others(UNKNOWN, len(others))
        return Others(WORKED if work else IDLE, len(others), work)

    def _compute_pids(self) -> set[int] | None:
        for name in _PROCESSES_OF:
            count = ctypes.c_uint(_MOST_PROCESSES)
            if self._ask(name, self._handle, ctypes.byref(count), self._processes):
                return {each.pid for each in self._processes[: min(count.value, _MOST_PROCESSES)]}
        return None

    def _work_of(self, pids: set[int]) -> float | None:
        """Return for which part of the time these processes used it since the last call; None where nobody knows."""
        name, count = "nvmlDeviceGetProcessUtilization", ctypes.c_uint(_MOST_PROCESSES)
        seen_us = ctypes.c_ulonglong(self._seen_us)
        # Nothing is found where no process used it.
        if not self._ask(name, self._handle, self._samples, ctypes.byref(count), seen_us, also=(NOT_FOUND,)):
            return None
        found: dict[int, list[int]] = {}
        for each in self._samples[: min(count.value, _MOST_PROCESSES)]:
            # Some drivers leave entries that they do not fill.
            if each.at_us > self._seen_us and each.pid in pids:
                found.setdefault(each.pid, []).append(min(each.sm, 100))
        self._seen_us = max(self._seen_us, *(each.at_us for each in self._samples), 0)
        ctypes.memset(self._samples, 0, ctypes.sizeof(self._samples))
        return min(1.0, sum(sum(parts) / len(parts) for parts in found.values()) / 100)

    def _ask(self, name: str, *arguments: Argument, also: tuple[int, ...] = ()) -> bool:
        """Ask a question, unless it was refused for good; return whether there is an answer."""
        if name in self._never:
            return False
        code = self._nvml.call(name, *arguments)
        if code == SUCCESS or code in also:
            return True
        if code in NEVER:
            self._never.add(name)
        else:
            self.errors += 1
        return False


def own_pids() -> frozenset[int]:
    """Return the numbers of this process: also those outside of its container, where the system tells them."""
    pids = {os.getpid()}
    try:
        lines = _STATUS.read_text().splitlines()
        pids |= {int(word) for line in lines if line.startswith("NSpid:") for word in line.split()[1:]}
    except (OSError, ValueError):  # No Linux, or no such folder.
        pass
    return frozenset(pids)
