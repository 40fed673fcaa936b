"""
Chrome trace JSON, for the Perfetto UI and everything else that reads it.

There is one track per host thread and per stream, and an arrow from each stage's launch to its execution. Stages inside
a replay of a CUDA graph have neither a slice on a thread nor an arrow. Formats; judges nothing.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from gpuscope.analysis._structure.replays import outside_ns
from gpuscope.analysis._viewers.tags import gpu_tags, host_tags
from gpuscope.analysis._viewers.tracks import gpu_slices, host_slices

if TYPE_CHECKING:
    from collections.abc import Iterator
    from os import PathLike

    from gpuscope.analysis._plain import Plain
    from gpuscope.analysis._viewers.tracks import Slices
    from gpuscope.analysis.recording import Recording

Event: TypeAlias = "dict[str, Plain]"
Tracks = dict[tuple[int, int], tuple[int, int]]
"""(pid, tid) by (thread or stream, layer)."""


def write_perfetto(recording: Recording, path: str | PathLike[str]) -> None:
    """
    Write the recording; timestamps are microseconds since its first stage.

    Raises:
        OSError: The file cannot be written.

    """
    with Path(path).open("w", encoding="ascii") as file:
        file.write('{"displayTimeUnit":"ns","traceEvents":[\n')
        file.writelines(",\n" * (number > 0) + json.dumps(event) for number, event in enumerate(events(recording)))
        file.write("\n]}\n")


def events(recording: Recording) -> Iterator[Event]:
    """Yield the trace's events: names of tracks, then each slice, and after it its end of the arrow, if it has one."""
    host, gpu = host_slices(recording), gpu_slices(recording)
    origin_ns = min((int(slices.start_ns.min()) for slices in (host, gpu) if len(slices.row)), default=0)
    host_tracks, gpu_tracks = _tracks(recording, host, gpu)
    yield from _names(recording, host_tracks, gpu_tracks)
    launched, outside = set(gpu.row.tolist()) & set(host.row.tolist()), outside_ns(recording)
    for row, event in _slices(recording, host, host_tracks, origin_ns):
        yield {**event, "args": {**host_tags(recording, row), **_ids(recording, row)}}
        if row in launched:
            yield _arrow(event, row, {"ph": "s"})
    for row, event in _slices(recording, gpu, gpu_tracks, origin_ns):
        yield {**event, "args": {**gpu_tags(recording, row, outside), **_ids(recording, row)}}
        if row in launched:
            yield _arrow(event, row, {"ph": "f", "bp": "e"})


def _tracks(recording: Recording, host: Slices, gpu: Slices) -> tuple[Tracks, Tracks]:
    """Return the tracks of threads and of streams. Each GPU is a process of its own, and no number is used twice."""
    pids: dict[tuple[int, ...], int] = {(process,): process + 1 for process in range(len(recording.processes))}
    for stream in recording.streams:
        pids.setdefault((stream.process, stream.device), len(pids) + 1)
    tids = itertools.count(len(pids) + 1)
    places = [sorted(set(zip(slices.track.tolist(), slices.layer.tolist(), strict=True))) for slices in (host, gpu)]
    threads, streams = recording.threads, recording.streams
    return (
        {place: (pids[(threads[place[0]].process,)], next(tids)) for place in places[0]},
        {place: (pids[streams[place[0]].process, streams[place[0]].device], next(tids)) for place in places[1]},
    )


def _names(recording: Recording, host_tracks: Tracks, gpu_tracks: Tracks) -> Iterator[Event]:
    for (number, layer), track in host_tracks.items():
        thread = recording.threads[number]
        yield from _named(track, recording.processes[thread.process].name, thread.name, layer)
    for (number, layer), track in gpu_tracks.items():
        stream = recording.streams[number]
        gpu = f"{recording.processes[stream.process].name}: GPU {stream.device} {stream.device_name}".strip()
        name = f"stream {stream.handle:#x}" if stream.handle else "default stream"
        yield from _named(track, gpu, name, layer)


def _named(track: tuple[int, int], process: str, thread: str, layer: int) -> Iterator[Event]:
    pid, tid = track
    name = f"{thread}, overlapping {layer}" if layer else thread
    yield {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": process}}
    yield {"ph": "M", "pid": pid, "name": "process_sort_index", "args": {"sort_index": pid}}
    yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}}
    yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}}


def _slices(recording: Recording, slices: Slices, tracks: Tracks, origin_ns: int) -> Iterator[tuple[int, Event]]:
    """Yield (row, complete event), in order on each track."""
    for row, track, layer, start_ns, end_ns in zip(*(column.tolist() for column in slices), strict=True):
        pid, tid = tracks[track, layer]
        yield (
            row,
            {
                "ph": "X",
                "cat": "gpuscope",
                "name": recording.names[recording.stage[row]],
                "pid": pid,
                "tid": tid,
                "ts": (start_ns - origin_ns) / 1e3,
                "dur": (end_ns - start_ns) / 1e3,
            },
        )


def _arrow(event: Event, row: int, more: Event) -> Event:
    """Return one end of the arrow, at the start of the slice: Perfetto binds it to the slice that began last."""
    place = {key: event[key] for key in ("cat", "pid", "tid", "ts")}
    return {**more, "id": row + 1, "name": "launch", **place}


def _ids(recording: Recording, row: int) -> Event:
    return {"trace_id": recording.trace_id[row], "span_id": recording.span_id[row]}
