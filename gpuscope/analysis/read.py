"""
Files of the `file` exporter, read into one `Recording`.

Relates stages to each other; judges nothing. Never fails on what a file contains.
"""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from gpuscope._data.attributes import HOST_NAME, PROCESS_PID, SERVICE_NAME
from gpuscope._data.batch import RowFlag
from gpuscope.analysis._reading.files import Reader, is_flight, list_files
from gpuscope.analysis._reading.spans import GpuPart, Lines
from gpuscope.analysis._structure.batches import Batches, Links, Shares
from gpuscope.analysis.recording import Losses, Process, Recording

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from os import PathLike

    from numpy.typing import NDArray

    from gpuscope.analysis._reading.spans import HostPart, SpanKey

__all__ = ["is_flight", "list_files", "read", "read_lines"]

_NEAR = 2**20
"""
A span id at most this far from a known one is taken to be ours. Ours are counted up from a random start, so an id that
somebody else made at random is this near once in ten million times, even beside a million of ours.
"""
_NO_GPU = GpuPart(-1, 0, 0, 0, 0, 0, 0)


def read(paths: Iterable[str | PathLike[str]], *, progress: Callable[[int, int], object] | None = None) -> Recording:
    """
    Read every stage in the files; lines that cannot be read are counted in `Recording.losses`.

    A stage inside a span of the application is a root here, because that span is not in the files.

    Args:
        paths: Files, each of which is read with its rotated files (`PATH.1` and so on), and folders, of which every
            `*.jsonl` file is read in the same way. They may be compressed by gzip, and may be pipes.
        progress: Called after each line with the bytes read so far and the bytes of all files, as far as known.

    Raises:
        OSError: A path does not exist, a file cannot be read, or a folder has no `*.jsonl` file.

    """
    lines = Lines()
    reader = Reader(list_files(paths), progress, lines.skipped)
    with _no_garbage_collection():
        for line in reader.lines():
            lines.add(line)
        return _recording(lines)


def read_lines(texts: Iterable[str]) -> Recording:
    """Read every stage in lines as the `file` exporter writes them, which are in no file."""
    lines = Lines()
    with _no_garbage_collection():
        for text in texts:
            lines.add(text.encode())
        return _recording(lines)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Save a quarter of the time: hundreds of thousands of small objects are made here, and none is in a cycle."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _recording(lines: Lines) -> Recording:
    rows = _rows(lines)
    place = {row.key: index for index, row in enumerate(rows)}
    parts = [lines.gpu.pop(row.key, _NO_GPU) for row in rows]
    if lines.gpu:
        lines.skipped["GPU spans without a host span"] = len(lines.gpu)
    stage, thread, start_ns, end_ns, flags, error = _columns([row.numbers for row in rows], 6)
    stream, gpu_start_ns, gpu_end_ns, uncertainty_ns, gpu_flags, samples, had_work = _columns(parts, 7)
    parent = _parents(rows, place)
    return Recording(
        names=tuple(lines.names),
        processes=_processes([resource for _, resource in lines.processes.values()]),
        threads=tuple(lines.threads),
        streams=tuple(lines.streams),
        stage=stage.astype(np.int32),
        thread=thread.astype(np.int32),
        stream=stream.astype(np.int32),
        parent=parent,
        root=_roots(parent),
        host_start_ns=start_ns,
        host_end_ns=end_ns,
        gpu_start_ns=gpu_start_ns,
        gpu_end_ns=gpu_end_ns,
        uncertainty_ns=uncertainty_ns,
        flags=(flags | gpu_flags).astype(np.uint32),
        error=error.astype(np.bool_),
        samples=samples,
        had_work=had_work,
        trace_id=tuple(row.key[0] for row in rows),
        span_id=tuple(row.key[1] for row in rows),
        # Of a stage inside a replay whose caller is missing there are attributes, and no row.
        attributes={place[key]: values for key, values in lines.attributes.items() if key in place},
        losses=_losses(lines, _orphans(rows, parent)),
        gpus=lines.gpus.gpus(),
        looks=lines.looks.looks(),
        stalls=lines.stalls.stalls(place),
        batches=Batches(
            Links(*_columns(lines.light.links(place), 2)), Shares(*_columns(lines.light.shares(place), 10))
        ),
    )


def _rows(lines: Lines) -> list[HostPart]:
    """Return the rows in order. Stages inside replays are left out if no stage on the host is around them."""
    rows = [row for row in lines.host.values() if not row.numbers.flags & RowFlag.IN_GRAPH]
    known = {row.key for row in rows}
    inside = {key: row for key, row in lines.host.items() if key not in known}
    while reached := [row for row in inside.values() if (row.key[0], row.parent) in known]:
        rows += reached
        known = {row.key for row in reached}
        for key in known:
            del inside[key]
    # If stages start together, the outer one comes first. Those inside one replay have the same host times.
    rows.sort(key=lambda row: (row.numbers.start_ns, -row.numbers.end_ns, lines.gpu.get(row.key, _NO_GPU)[1:2]))
    return rows


def _columns(rows: Sequence[tuple[int, ...]], count: int) -> list[NDArray[np.int64]]:
    columns = zip(*rows, strict=True) if rows else [()] * count
    return [np.array(column, np.int64) for column in columns]


def _parents(rows: list[HostPart], place: Mapping[SpanKey, int]) -> NDArray[np.int64]:
    """Return the row of each row's parent, or -1, also for rows that a damaged file puts inside themselves."""
    parent = np.array([place.get((row.key[0], row.parent), -1) for row in rows], np.int64)
    # Each step is twice as long as the last. What never arrives at -1 leads into a circle.
    above = np.append(parent, -1)
    for _ in range(len(rows).bit_length()):
        above = above[above]
    parent[above[:-1] >= 0] = -1
    return parent


def _roots(parent: NDArray[np.int64]) -> NDArray[np.int64]:
    own = np.arange(len(parent))
    root = np.where(parent < 0, own, parent)
    while (root != (further := root[root])).any():
        root = further
    return root


def _orphans(rows: list[HostPart], parent: NDArray[np.int64]) -> int:
    """Return how many rows lack a parent that was a stage of ours, and not a span of the application."""
    missing = [
        int(row.parent, 16)
        for row, at in zip(rows, parent.tolist(), strict=True)
        if at < 0 and row.parent and not row.numbers.flags & RowFlag.REMOTE_PARENT
    ]
    if not missing:
        return 0
    ids = np.array(missing, np.uint64)
    known = np.sort(np.array([int(row.key[1], 16) for row in rows], np.uint64))
    after = np.searchsorted(known, ids)
    # Unsigned differences wrap around, so the smaller of the two is the distance.
    near = [known[np.clip(at, 0, len(known) - 1)] for at in (after - 1, after)]
    distance = np.min([np.minimum(ids - each, each - ids) for each in near], axis=0)
    return int((distance <= _NEAR).sum())


def _processes(resources: Sequence[Mapping[str, object]]) -> tuple[Process, ...]:
    """Return the processes. Their names contain no more than what tells them apart."""
    services = [str(resource.get(SERVICE_NAME, "unknown service")) for resource in resources]
    hosts = [str(resource.get(HOST_NAME, "an unknown host")) for resource in resources]
    times = Counter(services)
    processes = []
    for name, host, resource in zip(services, hosts, resources, strict=True):
        pid = f" {resource.get(PROCESS_PID, '')}" if times[name] > 1 else ""
        place = f" on {host}" if len(set(hosts)) > 1 else ""
        processes.append(Process(name + pid + place, resource))
    return tuple(processes)


def _losses(lines: Lines, orphans: int) -> Losses:
    return Losses(
        skipped_lines=dict(lines.skipped),
        orphans=orphans,
        dropped=lines.account.of("dropped"),
        lost=lines.account.of("lost"),
        untimed=lines.account.of("untimed"),
    )
