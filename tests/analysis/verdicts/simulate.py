"""
A host that launches work and GPU streams that execute it in order: recordings whose answer is known by construction.

Times are microseconds. The host's clock moves when it works, launches or waits; a stream is busy until what it was
given is done. Costs are about those of PyTorch on an H200; a seed makes them vary as real ones do.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gpuscope._data.batch import RowFlag
from gpuscope.analysis.recording import Losses, Recording

from ..recordings import Stage, recording

EVENT_LATENCY, LAUNCH_LATENCY, WAKE_UP, EVENT_COST, LAUNCH_COST = 3.0, 4.0, 8.0, 2.0, 6.0
REPLAY_COST = 15.0
WARMUP_CALLS = 3


@dataclass
class Machine:
    """One process with one host thread, one GPU, and as many streams as are named."""

    seed: int = 0
    spread: float = 0.03
    """Durations vary by about so much of themselves."""
    now: float = 0.0
    busy_until: dict[int, float] = field(default_factory=dict)
    had_work: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    """By stream, when its queue was not empty: from each launch until that was done."""
    roots: list[Stage] = field(default_factory=list)
    has_gpu: bool = True
    scale: float = 1.0
    """All durations that are asked for are so many times as long; the latencies of the machine are not."""
    rename: Callable[[str], str] = str

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._open: list[list[Stage]] = [self.roots]
        self._calls: dict[str, int] = {}

    @contextlib.contextmanager
    def stage(
        self, name: str, *, stream: int = 0, flags: int = 0, timed: bool = True, **attributes: Any
    ) -> Iterator[None]:
        """Record a stage around what is done in the block."""
        start = self.now
        gpu_start = self._event(stream)
        self._open.append([])
        yield
        inside = self._open.pop()
        gpu_end = self._event(stream)
        calls = self._calls[name] = self._calls.get(name, 0) + 1
        if "bytes" in attributes:
            attributes["bytes"] *= self.scale
        flags |= RowFlag.WARMUP if calls <= WARMUP_CALLS else 0
        gpu = (gpu_start, gpu_end) if timed and self.has_gpu else None
        self._open[-1].append(
            Stage(self.rename(name), start, self.now, gpu, inside, stream=stream, flags=flags, attributes=attributes)
        )
        self.now += 2

    def work(self, duration: float) -> None:
        """Let the host do something of its own."""
        self.now += self._vary(duration)

    def launch(self, duration: float, *, stream: int = 0, cost: float = LAUNCH_COST) -> None:
        """Give a stream a kernel, or a graph, or a copy that does not block."""
        self.now += self._vary(cost)
        start = max(self.now + LAUNCH_LATENCY, self._free(stream))
        self._work_until(stream, start + self._vary(duration))

    def replay(self, *parts: tuple[str | None, Any], stream: int = 0, cost: float = REPLAY_COST) -> None:
        """
        Launch a CUDA graph.

        Args:
            parts: in order: the name of a stage inside, None for work in no stage; and how long it takes, or its parts.
            stream: that executes it.
            cost: of the launch.

        """
        self.now += self._vary(cost)
        start = max(self.now + LAUNCH_LATENCY, self._free(stream))
        stages, end = self._parts(parts, start, stream)
        self._work_until(stream, end)
        self._open[-1] += stages

    def _parts(self, parts: Any, at: float, stream: int) -> tuple[list[Stage], float]:
        if not isinstance(parts, tuple):
            return [], at + self._vary(parts)
        found: list[Stage] = []
        for name, within in parts:
            inside, end = self._parts(within, at, stream)
            if name is not None:
                calls = self._calls[name] = self._calls.get(name, 0) + 1
                flags = RowFlag.IN_GRAPH | (RowFlag.WARMUP if calls <= WARMUP_CALLS else 0)
                inside = [Stage(self.rename(name), self.now, self.now, (at, end), inside, stream=stream, flags=flags)]
            found, at = [*found, *inside], end
        return found, at

    def wait(self, *, stream: int = 0) -> None:
        """Let the host wait until a stream is done."""
        if self._free(stream) > self.now:
            self.now = self._free(stream) + WAKE_UP

    def blocking_copy(self, duration: float, *, stream: int = 0) -> None:
        """Copy from or to pageable memory: the host waits for what is before it, and for the copy."""
        self.launch(duration, stream=stream)
        self.wait(stream=stream)

    def let_wait(self, stream: int, other: int) -> None:
        """Let a stream wait until another has done what it was given so far."""
        self.now += EVENT_COST
        self._work_until(stream, max(self._free(stream), self._free(other)))

    def recording(self, losses: Losses | None = None) -> Recording:
        """Return what was recorded."""
        return recording(*self.roots, losses=losses)

    def asked(self, every: float = 500.0, *, seed: int = 0) -> list[Stage]:
        """Return the requests with what the streams answered when they were asked at random times, so often."""
        rows = [stage for root in self.roots for stage in root.walk() if stage.gpu]
        found: dict[int, tuple[int, int]] = {}
        for stream in sorted({stage.stream for stage in rows}):
            chance = np.random.default_rng((seed, stream))
            times = np.cumsum(chance.exponential(every, int(2 * self.now / every) + 100))
            owner = np.full(len(times), -1)
            for index, stage in enumerate(rows):  # Outer ones come before inner ones.
                if stage.stream == stream:
                    owner[(times >= stage.gpu[0]) & (times < stage.gpu[1])] = index
            begins, ends = np.array(self.had_work.get(stream, [(0.0, 0.0)])).T
            last = np.searchsorted(begins, times, side="right") - 1
            busy = (last >= 0) & (times < np.maximum.accumulate(ends)[np.maximum(last, 0)])
            for index in np.unique(owner[owner >= 0]).tolist():
                found[id(rows[index])] = int((owner == index).sum()), int(busy[owner == index].sum())
        return [_answered(root, found) for root in self.roots]

    def _work_until(self, stream: int, end: float) -> None:
        self.had_work.setdefault(stream, []).append((self.now, end))
        self.busy_until[stream] = end

    def _event(self, stream: int) -> float:
        if not self.has_gpu:
            return 0.0
        self.now += EVENT_COST
        return max(self.now + EVENT_LATENCY, self._free(stream))

    def _free(self, stream: int) -> float:
        return self.busy_until.get(stream, 0.0)

    def _vary(self, duration: float) -> float:
        return self.scale * duration * max(0.2, self._random.gauss(1.0, self.spread))


def _answered(stage: Stage, found: dict[int, tuple[int, int]]) -> Stage:
    samples, had_work = found.get(id(stage), (0, 0))
    inside = [_answered(inner, found) for inner in stage.inside]
    return replace(stage, inside=inside, samples=samples, had_work=had_work)


def serve(request: Callable[[Machine], None], *, count: int = 40, machine: Machine | None = None) -> Machine:
    """Run so many requests, each in a stage `request`."""
    machine = machine or Machine()
    for _ in range(count):
        with machine.stage("request"):
            request(machine)
    return machine
