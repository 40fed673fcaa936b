"""
What viewers show beside a stage: its attributes, under the names that live spans use, as values that JSON has.

Knows no viewer's format.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gpuscope._data.attributes import (
    CLOCK_UNCERTAINTY,
    CUDA_STREAM,
    DEVICE_INDEX,
    FLAGS,
    GPU_DURATION,
    GPU_HAD_WORK,
    GPU_SAMPLES,
    GRAPH_OUTSIDE,
    HW_ID,
    HW_MODEL,
    LAUNCH_TO_START,
    THREAD_ID,
    THREAD_NAME,
)
from gpuscope._data.batch import RowFlag

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpuscope.analysis.recording import Recording

Tags = dict[str, bool | int | float | str]

# Plain integers: `&` of an enumeration's members costs a microsecond.
_NAMED = {int(flag): name for flag, name in FLAGS.items()}
_IN_GRAPH = int(RowFlag.IN_GRAPH)


def host_tags(recording: Recording, row: int) -> Tags:
    """Return the tags of a stage's time on the host."""
    thread = recording.threads[recording.thread[row]]
    return {**_own(recording, row), **_flags(recording, row), THREAD_ID: thread.ident, THREAD_NAME: thread.name}


def gpu_tags(recording: Recording, row: int, outside_ns: Mapping[int, int]) -> Tags:
    """
    Return the tags of a stage's time on its stream. Durations are in seconds.

    Args:
        recording: The recording that the stage is in.
        row: The stage's row.
        outside_ns: For each stage around replays, the nanoseconds that no stage inside covers.

    """
    stream = recording.streams[recording.stream[row]]
    start_ns = int(recording.gpu_start_ns[row])
    return {
        # Other stages show these beside their time on the host.
        **(_own(recording, row) if recording.flags[row] & _IN_GRAPH else {}),
        **_flags(recording, row),
        CUDA_STREAM: stream.handle,
        DEVICE_INDEX: stream.device,
        HW_ID: stream.device_uuid,
        HW_MODEL: stream.device_name,
        GPU_DURATION: (int(recording.gpu_end_ns[row]) - start_ns) / 1e9,
        LAUNCH_TO_START: (start_ns - int(recording.host_start_ns[row])) / 1e9,
        CLOCK_UNCERTAINTY: int(recording.uncertainty_ns[row]) / 1e9,
        **_answers(recording, row),
        **({GRAPH_OUTSIDE: outside_ns[row] / 1e9} if row in outside_ns else {}),
    }


def _answers(recording: Recording, row: int) -> Tags:
    samples = int(recording.samples[row])
    return {GPU_SAMPLES: samples, GPU_HAD_WORK: int(recording.had_work[row]) / samples} if samples else {}


def _own(recording: Recording, row: int) -> Tags:
    return {name: _scalar(value) for name, value in recording.attributes.get(row, {}).items()}


def _flags(recording: Recording, row: int) -> Tags:
    flags = int(recording.flags[row])
    return {name: True for flag, name in _NAMED.items() if flags & flag}


def _scalar(value: object) -> bool | int | float | str:
    if isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
