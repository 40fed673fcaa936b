"""
NVML's figures of the GPUs that stages are on, some ten times a second, on a thread of its own.

The thread asks without the GIL, and nobody waits for it: an answer may take milliseconds, and of a GPU that fails
seconds. It begins with the first batch that has a GPU, and is there only while recording is on.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from typing import TYPE_CHECKING

from gpuscope._cuda.nvml import library
from gpuscope._cuda.nvml.readings import Gpu, own_pids
from gpuscope._data.plain.gpu_use import GpuUse
from gpuscope._data.plain.values import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gpuscope._cuda.nvml.readings import Others, Reading
    from gpuscope._data.batch import DeviceInfo

HZ = 10.0
_OTHERS_EVERY_S = 1.0
"""Processes come and go seldom."""
_LONGEST_S = 1.0
"""A reading stands for this long at most: the process may have been stopped meanwhile."""
_STOP_S = 0.1
"""The thread ends within one answer of NVML; nobody waits longer than this."""


class Totals:
    """One GPU, with its readings added up."""

    def __init__(self, info: DeviceInfo, gpu: Gpu) -> None:
        self.gpu = gpu
        self._others: Others | None = None
        self._asked_s = -_OTHERS_EVERY_S
        self.use = GpuUse(
            *(info.index, info.uuid, info.name, info.vendor),
            watched_s=0.0,
            active_s=None,
            energy_j=None,
            cycles=None,
            throttled_s=None,
            others_s={},
            others=None,
            is_part=gpu.whole is not None,
        )

    def read(self, now_s: float, since_s: float) -> None:
        """Take a reading, which stands for the time since the last."""
        reading, before = self.gpu.read(), self.use
        if self._others is None or now_s - self._asked_s >= _OTHERS_EVERY_S:
            self._others, self._asked_s = self.gpu.others(), now_s
        others = self._others
        did = dict(before.others_s)
        for state, part in ((others.state, others.work or 1.0), ("idle", 1.0 - (others.work or 1.0))):
            if part:
                did[state] = did.get(state, 0.0) + part * since_s
        self.use = GpuUse(
            *(before.index, before.uuid, before.model, before.vendor),
            watched_s=before.watched_s + since_s,
            active_s=_more(before.active_s, reading.utilization, since_s),
            energy_j=_more(before.energy_j, reading.power_w, since_s),
            cycles=_more(before.cycles, reading.clock_hz, since_s),
            throttled_s=_held(before.throttled_s, reading, since_s),
            others_s=did,
            others=others.processes,
            is_part=before.is_part,
        )


def _more(total: float | None, value: float | None, since_s: float) -> float | None:
    return total if value is None else (total or 0.0) + value * since_s


def _held(totals: dict[str, float] | None, reading: Reading, since_s: float) -> dict[str, float] | None:
    if reading.throttled is None:
        return totals
    found = dict(totals or {})
    if reading.throttled:
        found[reading.throttled] = found.get(reading.throttled, 0.0) + since_s
    return found


class GpuWatch:
    """
    The GPUs of one period of recording.

    Args:
        hz: how often a second NVML is asked, on average; 0 for never.
        name: of the library; by default NVML's own.
        clock: seconds, monotonic.

    """

    def __init__(self, hz: float = HZ, *, name: str | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.hz = hz
        self.why_off = ""
        self._name = name
        self._clock = clock
        self._is_wanted = True
        self._infos: dict[int, DeviceInfo] = {}
        self._nvml: library.Nvml | None = None
        self._totals: dict[int, Totals] = {}
        self._unknown: tuple[int, ...] = ()
        """GPUs that NVML does not know."""
        self._thread: threading.Thread | None = None
        self._random = random.Random()  # noqa: S311 - not the program's, which may have seeded that
        self._asleep = threading.Lock()
        """Held while the thread runs; who lets go of it ends its pause. A signal handler need not wait for it."""

    # ---- the collector's thread

    def follow(self, devices: Mapping[int, DeviceInfo]) -> None:
        """Ask about these GPUs too from now on; a lookup where they are known. Never raises."""
        if devices.keys() <= self._infos.keys() and (self._thread is not None or not self._is_wanted):
            return
        if self.hz > 0:
            self._infos = {**self._infos, **devices}
            if self._infos and self._thread is None and self._is_wanted and not self.why_off:
                self._begin()

    def _begin(self) -> None:
        self._asleep.acquire(blocking=False)
        self._thread = threading.Thread(target=self._run, name="gpuscope-nvml", daemon=True)
        try:
            self._thread.start()
        except Exception:  # No memory for it, or the interpreter ends: it costs these figures alone.
            self._thread, self.why_off = None, "no thread was to be had"

    # ---- any thread

    def start(self) -> None:
        """Ask again, after `stop`, from the next batch on."""
        self._is_wanted = True

    def stop(self) -> None:
        """Ask nothing until `start`; the thread ends."""
        self._is_wanted = False
        thread, self._thread = self._thread, None
        if thread is not None:
            with contextlib.suppress(RuntimeError):  # It is awake.
                self._asleep.release()
            thread.join(_STOP_S)

    @property
    def uses(self) -> tuple[GpuUse, ...]:
        """What was said so far of each GPU."""
        return tuple(each.use for _, each in sorted(self._totals.items()) if each.use.watched_s)

    @property
    def state(self) -> str:
        """Whether NVML is asked, for people; empty before there is a GPU to ask about."""
        if not self._infos:
            return ""
        if self.why_off:
            return f"not at all: {self.why_off}"
        unknown, parts = self._unknown, [number for number, each in list(self._totals.items()) if each.use.is_part]
        said = [f"not of GPU {number}, which it does not know" for number in unknown]
        said += [f"of GPU {number}, which is a part of one (MIG), not how much it is used" for number in parts]
        return "; ".join([f"{self.hz:g} times a second", *said])

    # ---- the thread

    def _run(self) -> None:
        try:
            self._watch()
        except library.NoNvmlError as error:
            self.why_off = error.why
        except Exception as error:  # It costs these figures, and nothing else.
            self.why_off = f"asking it failed ({shown(error)})"

    def _watch(self) -> None:
        me, pids = threading.current_thread(), own_pids()
        self._nvml = self._nvml or library.Nvml(self._name or library.LIBRARY)
        last_s = self._clock()
        while self._thread is me:
            now_s = self._clock()
            for each in list(self._totals.values()):
                each.read(now_s, min(now_s - last_s, _LONGEST_S))
            last_s = now_s
            self._open(self._nvml, pids)
            # Not at equal distances, which could beat with the program's own rhythm.
            self._asleep.acquire(timeout=self._random.uniform(0.5, 1.5) / self.hz)

    def _open(self, nvml: library.Nvml, pids: frozenset[int]) -> None:
        """Find the GPUs that have come since the last time."""
        infos = self._infos
        for index in infos.keys() - self._totals.keys() - {*self._unknown}:
            handle = nvml.find(infos[index].uuid)
            if handle is None:
                self._unknown += (index,)
            else:
                self._totals[index] = Totals(infos[index], Gpu(nvml, handle, pids))
