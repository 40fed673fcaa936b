"""
What viewers show beside a stage: its attributes, by the names that live spans have, in values that JSON has.

Formats nothing further.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gpuscope._columns import RowFlag

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpuscope.analysis.recording import Recording

Tags = dict[str, bool | int | float | str]

# Plain integers: `&` of an enumeration's members costs a microsecond.
_NAMED = {int(flag): f"gpuscope.{flag.name}".lower() for flag in RowFlag if flag is not RowFlag.REMOTE_PARENT}
_IN_GRAPH = int(RowFlag.IN_GRAPH)
_NAMED[_IN_GRAPH] = "gpuscope.graph"


def host_tags(recording: Recording, row: int) -> Tags:
    """Return what belongs to the stage's time on the host."""
    thread = recording.threads[recording.thread[row]]
    return {**_own(recording, row), **_flags(recording, row), "thread.id": thread.ident, "thread.name": thread.name}


def gpu_tags(recording: Recording, row: int, outside_ns: Mapping[int, int]) -> Tags:
    """
    Return what belongs to the stage's time on its stream; durations in seconds.

    Args:
        recording: the stage's.
        row: of the stage.
        outside_ns: by stage around replays, its time that is in no stage inside.

    """
    stream = recording.streams[recording.stream[row]]
    start_ns = int(recording.gpu_start_ns[row])
    return {
        # What other stages show beside their time on the host.
        **(_own(recording, row) if recording.flags[row] & _IN_GRAPH else {}),
        **_flags(recording, row),
        "gpuscope.cuda.stream": stream.handle,
        "gpuscope.device.index": stream.device,
        "hw.id": stream.device_uuid,
        "hw.name": stream.device_name,
        "gpuscope.gpu.duration": (int(recording.gpu_end_ns[row]) - start_ns) / 1e9,
        "gpuscope.launch_to_start": (start_ns - int(recording.host_start_ns[row])) / 1e9,
        "gpuscope.clock.uncertainty": int(recording.uncertainty_ns[row]) / 1e9,
        **({"gpuscope.graph.outside": outside_ns[row] / 1e9} if row in outside_ns else {}),
    }


def _own(recording: Recording, row: int) -> Tags:
    return {name: _scalar(value) for name, value in recording.attributes.get(row, {}).items()}


def _flags(recording: Recording, row: int) -> Tags:
    flags = int(recording.flags[row])
    return {name: True for flag, name in _NAMED.items() if flags & flag}


def _scalar(value: Any) -> bool | int | float | str:
    if isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
