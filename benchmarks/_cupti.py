"""
What CUPTI saw of a stretch of the program, through torch.profiler; and spinning kernels to hold stages against.

CUPTI's timestamps are an independent clock, not the truth: it converts GPU time to host time by readings of its own,
and Kineto converts those to the epoch; a few microseconds of every difference may be theirs. The tests use this too.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import gpuscope

LEAD_CYCLES = 300_000
"""About 150 µs: long enough for the host to launch the stage's own kernel behind it."""
NAME = "spin"


@dataclass(frozen=True)
class Activity:
    """A kernel, or a call of the CUDA runtime or driver; epoch nanoseconds."""

    category: str
    name: str
    start_ns: int
    end_ns: int
    correlation: int
    thread: Any


class Window:
    """
    A context in which CUPTI records; its activities are there afterwards.

    With `waits=True` CUPTI also reports synchronisations, whichever interface asked for them.
    """

    def __init__(self, *, waits: bool = False) -> None:
        self.activities: list[Activity] = []
        self._waits = waits

    def __enter__(self) -> Window:  # noqa: PYI034
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        # Not while timing: it makes CUPTI watch events as well.
        config = torch._C._profiler._ExperimentalConfig(enable_cuda_sync_events=True) if self._waits else None
        self._profiler = profile(activities=activities, experimental_config=config)
        self._profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize()
        self._profiler.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(path))
            trace = json.loads(path.read_text())
        base = trace.get("baseTimeNanoseconds", 0)
        self.activities = [_activity(event, base) for event in trace["traceEvents"] if _is_cuda(event)]

    def kernels(self, word: str) -> list[Activity]:
        """Kernels with `word` in their names, in the order of their launch."""
        found = [a for a in self.activities if a.category == "kernel" and word in a.name]
        return sorted(found, key=lambda kernel: kernel.correlation)

    def launches(self) -> dict[int, Activity]:
        """The calls that launched kernels, by correlation."""
        return {a.correlation: a for a in self.activities if a.category.startswith("cuda_") and "Launch" in a.name}

    def waits(self) -> list[str]:
        """
        The names of all calls and activities that wait for the GPU, on any thread.

        CUPTI files an event that was asked about and found done (`cuEventQuery`, `cuEventElapsedTime`) as an
        "Event Sync" too, and a stream that was asked about (`cuStreamQuery`) as a "Stream Sync"; `syncs` has those,
        with their lengths. A call of `cudaStreamSynchronize` is seen as a call.
        """
        found = []
        for activity in self.activities:
            call = activity.category in ("cuda_runtime", "cuda_driver") and "Synchronize" in activity.name
            seen = activity.category == "cuda_sync" and activity.name not in ("Wait Event", "Event Sync", "Stream Sync")
            if call or (seen and "Wait Event" not in activity.name):
                found.append(activity.name)
        return sorted(found)

    def syncs(self, kind: str) -> list[int]:
        """How long each "Event Sync" or "Stream Sync" took, in nanoseconds."""
        return sorted(a.end_ns - a.start_ns for a in self.activities if a.category == "cuda_sync" and kind in a.name)


@dataclass(frozen=True)
class Difference:
    """One stage against the kernel inside it; nanoseconds, positive where the stage's reading is later or longer."""

    index: int
    kernel_start_ns: int
    kernel_ns: int
    start_ns: int
    end_ns: int
    duration_ns: int
    uncertainty_ns: int

    def is_right_duration(self) -> bool:
        return abs(self.duration_ns) <= max(5_000, self.kernel_ns // 100)

    def is_close_duration(self) -> bool:
        return abs(self.duration_ns) <= max(2_000, self.kernel_ns // 100)

    def is_right_place(self) -> bool:
        allowed = self.uncertainty_ns + 20_000
        return abs(self.start_ns) <= allowed and abs(self.end_ns) <= allowed

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class Spins:
    """Launches numbered stages, each with one spinning kernel inside and one before it that hides the launch."""

    def __init__(self) -> None:
        self.launched = 0

    def launch(self, stream: Any, cycles: int, *, explicit: bool = False) -> int:
        """One stage on a stream: the current one, or the stage's `stream=`. Return its number."""
        index, self.launched = self.launched, self.launched + 1
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LEAD_CYCLES)
            if not explicit:
                with gpuscope.stage(NAME) as stage:
                    stage.set_attribute("index", index)
                    torch.cuda._sleep(cycles)
                return index
        with gpuscope.stage(NAME, stream=stream) as stage:
            stage.set_attribute("index", index)
            with torch.cuda.stream(stream):
                torch.cuda._sleep(cycles)
        return index


def pairs(window: Window, indices: list[int]) -> tuple[dict[int, Activity], int]:
    """
    The kernel of each stage launched in the window, by the stage's number; and how many cannot be compared.

    A stage whose kernel was launched after the kernel before it had ended measures the host's delay too.
    """
    spins, launches = window.kernels("spin"), window.launches()
    if len(spins) != 2 * len(indices):
        raise ValueError(f"CUPTI saw {len(spins)} of {2 * len(indices)} spinning kernels; this window cannot be used.")
    found, late = {}, 0
    for index, lead, kernel in zip(indices, spins[::2], spins[1::2], strict=True):
        launch = launches.get(kernel.correlation)
        if launch is None or launch.end_ns > lead.end_ns:
            late += 1
            continue
        found[index] = kernel
    return found, late


def differences(spans: list[Any], kernels: dict[int, Activity]) -> tuple[list[Difference], int]:
    """
    The captured spans' differences to the kernels, in the order of the numbers; and how many cannot be compared.

    A stage that the host left after its kernel had ended measures the host's delay too.
    """
    hosts = {span.span_id: span for span in spans if span.kind == "host" and span.name == NAME}
    found, late = [], 0
    for span in spans:
        host = hosts.get(span.parent_id) if span.kind == "gpu" else None
        if host is None or (index := host.attributes["index"]) not in kernels:
            continue
        kernel = kernels[index]
        if host.end_ns > kernel.end_ns:
            late += 1
            continue
        start, end = span.start_ns - kernel.start_ns, span.end_ns - kernel.end_ns
        uncertainty = round(span.attributes["gpuscope.clock.uncertainty"] * 1e9)
        length = kernel.end_ns - kernel.start_ns
        found.append(Difference(index, kernel.start_ns, length, start, end, end - start, uncertainty))
    return sorted(found, key=lambda difference: difference.index), late


def _is_cuda(event: dict[str, Any]) -> bool:
    return event.get("ph") == "X" and event.get("cat") in ("kernel", "cuda_runtime", "cuda_driver", "cuda_sync")


def _activity(event: dict[str, Any], base: int) -> Activity:
    start = base + round(event["ts"] * 1000)
    end = start + round(event.get("dur", 0) * 1000)
    correlation = event.get("args", {}).get("correlation", -1)
    return Activity(event["cat"], event["name"], start, end, correlation, event.get("tid"))
