"""
What NVML said of the GPUs: sentences for reports, and how much other processes worked.

Of several processes that watched one GPU, the one that did so longest speaks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuscope._data.plain.durations import duration
from gpuscope._data.plain.gpu_use import throttled

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from gpuscope._data.plain.gpu_use import GpuUse
    from gpuscope.analysis.recording import Recording

WORTH_SAYING = 0.01
"""The part of the time from which it is said what other processes did."""


def sentences(recording: Recording) -> Iterator[str]:
    """Yield what NVML said of each GPU, as sentences."""
    longest: dict[str, GpuUse] = {}
    for process, use in recording.gpus:
        key = use.uuid or f"{process} {use.index}"
        if key not in longest or use.watched_s > longest[key].watched_s:
            longest[key] = use
    for use in longest.values():
        if use.watched_s > 0:
            yield from _about(use)


def _about(use: GpuUse) -> Iterator[str]:
    name = f"GPU {use.index}" + (f" ({use.model})" if use.model else "")
    watched = duration(1e3 * use.watched_s)
    said = []
    if use.active_s is not None:
        said.append(f"kernels of any process ran for {min(1.0, use.active_s / use.watched_s):.0%} of {watched}")
    if use.energy_j is not None:
        said.append(f"{use.energy_j / use.watched_s:.0f} W on average")
    if use.throttled_s and (held := throttled(use.throttled_s, use.watched_s)):
        share, _, causes = held.partition(": ")
        said.append(f"throttled for {share} of the recording: {causes}")
    if said:
        yield f"By NVML, {name}: {'; '.join(said)}."
    if use.is_part:
        yield f"The process had a part of {name} (MIG). Power and throttling are the whole GPU's."
    yield from _about_others(use, name)


def _about_others(use: GpuUse, name: str) -> Iterator[str]:
    worked, unknown, hidden = (
        use.others_s.get(state, 0.0) / use.watched_s for state in ("worked", "unknown", "hidden")
    )
    if worked >= WORTH_SAYING:
        yield f"Other processes worked on {name} for {worked:.0%} of the time."
    if unknown >= WORTH_SAYING:
        yield f"Other processes were on {name} for {unknown:.0%} of the time; NVML cannot tell whether they worked."
    if hidden >= WORTH_SAYING:
        yield f"NVML does not show whether other processes were on {name}, as in most containers."


def share_of_others(recording: Recording, rows: NDArray[np.int64]) -> tuple[float, float]:
    """
    Return the largest part of the time in which other processes worked on a GPU that these rows used, or may have.

    The first is what NVML saw of their work, the second the time in which they were there and it saw no more.
    """
    if not recording.gpus or not len(rows):
        return 0.0, 0.0
    streams = {recording.streams[each] for each in set(recording.stream[rows].tolist()) if each >= 0}
    used = {(stream.process, stream.device_uuid, stream.device) for stream in streams}
    found = [
        (use.others_s.get("worked", 0.0) / use.watched_s, use.others_s.get("unknown", 0.0) / use.watched_s)
        for process, use in recording.gpus
        if use.watched_s > 0 and (process, use.uuid, use.index) in used
    ]
    return max(found, key=sum, default=(0.0, 0.0))
