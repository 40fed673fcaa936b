"""
How much of the copies and of the host's work an overlapped loop hid behind the GPU's work, and what bounds it now.

Adds up what it is told. Reads one clock, and asks no device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from gpuscope._data.plain.durations import duration

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(slots=True)
class Phases:
    """What one batch took, in milliseconds: on the host by its clock, on the GPU by events on the streams."""

    prepare: float = 0.0
    pin: float = 0.0
    launch: float = 0.0
    """The stage `infer` on the host, which launches the GPU's work; 0 without a GPU."""
    post: float = 0.0
    upload: float = 0.0
    compute: float = 0.0
    """The stage `infer` on the GPU, with the copies of its outputs there; without a GPU, on the host."""
    download: float = 0.0

    @property
    def host(self) -> float:
        return self.prepare + self.pin + self.launch + self.post


class OverlapReport(NamedTuple):
    """
    Where the time of an overlapped loop goes, in mean milliseconds per batch.

    Without the first `depth` batches, and those before the first CUDA graph.
    """

    batches: int
    wall_ms: float
    """From one result to the next."""
    compute_ms: float
    """`infer` and the copies of its outputs on the GPU, or `infer` on the CPU if there is no GPU."""
    upload_ms: float
    download_ms: float
    prepare_ms: float
    pin_ms: float
    """Copying what `prepare` returned into pinned memory."""
    launch_ms: float
    """`infer` on the host."""
    post_ms: float
    elsewhere_ms: float
    """On the host between two results: what the program does with one."""
    overlap_ratio: float
    """The part of copies and host work by which `wall_ms` does not exceed `compute_ms`: 1 if all of it is hidden."""
    bound: str
    """`gpu-bound`, `cpu-bound` or `transfer-bound`: what takes longest; copies up and down run beside each other.
    `unknown` before a batch counts."""
    graph: str
    """Whether `infer` is replayed as a CUDA graph: `on`, `off`, or why not."""

    def __str__(self) -> str:
        """Return two lines for people, or one where there is nothing to judge yet."""
        if not self.batches:
            return (
                "no batch counts yet: the first ones warm up and are left out, as many as are in flight (`depth`), and "
                f"those before a CUDA graph. CUDA graph: {self.graph}"
            )
        gpu = self._in_words("compute", "upload", "download")
        host = self._in_words("prepare", "pin", "launch", "post", "elsewhere")
        hidden = f"{self.overlap_ratio:.0%} of copies and host work hidden"
        each = f"{self.batches:,} batches, {duration(self.wall_ms)} each"
        return f"{each}: {self.bound}, {hidden}; CUDA graph: {self.graph}\ndevice: {gpu}; host: {host}"

    def _in_words(self, *phases: str) -> str:
        return ", ".join(f"{phase} {duration(getattr(self, f'{phase}_ms'))}" for phase in phases)


class PhaseTotals:
    """
    Adds up the phases of batches.

    Args:
        skip: how many of the first batches do not count.
        clock: returns nanoseconds.
        on_gpu: whether `infer` runs on a GPU; otherwise nothing overlaps, and its time is the host's.

    """

    def __init__(self, skip: int, clock: Callable[[], int], *, on_gpu: bool = True) -> None:
        self._on_gpu = on_gpu
        self._skip = skip
        self._clock = clock
        self._done: list[Phases] = []
        self._began_ns = self._ended_ns = 0
        self._elsewhere_ns = 0

    def add(self, phases: Phases) -> None:
        """Count a batch whose result is about to be returned."""
        self._ended_ns = self._clock()
        if self._skip:
            self._skip -= 1
            self._began_ns, self._elsewhere_ns = self._ended_ns, 0
        else:
            self._done.append(phases)

    def resumed(self) -> None:
        """Count the time since the last result as the program's own."""
        if self._ended_ns:
            self._elsewhere_ns += self._clock() - self._ended_ns

    def report(self, *, graph: str) -> OverlapReport:
        """Return the figures so far."""
        count = len(self._done)
        parts = max(count, 1)
        mean = {name: sum(getattr(each, name) for each in self._done) / parts for name in Phases.__slots__}
        wall = (self._ended_ns - self._began_ns) / 1e6 / parts if count else 0.0
        elsewhere = self._elsewhere_ns / 1e6 / parts if count else 0.0
        host = mean["prepare"] + mean["pin"] + mean["launch"] + mean["post"] + elsewhere
        copies = mean["upload"] + mean["download"]
        slower_way = max(mean["upload"], mean["download"])
        bounds = {"gpu-bound": mean["compute"], "cpu-bound": host, "transfer-bound": slower_way}
        work = (copies + host) * self._on_gpu
        hidden = (mean["compute"] + work - wall) / work if work else 0.0
        return OverlapReport(
            batches=count,
            wall_ms=wall,
            elsewhere_ms=elsewhere,
            overlap_ratio=min(max(hidden, 0.0), 1.0),
            bound=_largest(bounds, on_gpu=self._on_gpu) if count else "unknown",
            graph=graph,
            **{f"{name}_ms": value for name, value in mean.items()},
        )


def _largest(bounds: dict[str, float], *, on_gpu: bool) -> str:
    return max(bounds, key=lambda name: bounds[name]) if on_gpu else "cpu-bound"
