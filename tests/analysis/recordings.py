"""
Synthetic recordings in a compact notation: times in microseconds, from whatever zero suits the test.

    recording(
        Stage("request", 0, 900, gpu=(3, 898), inside=[
            Stage("infer", 10, 300, gpu=(15, 880), attributes={"batch_size": 8}),
            Stage("copy back", 300, 890, gpu=(880, 888)),
        ]),
    )

`repeat` makes many requests of one; `WARMUP` and the other flags are `RowFlag`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gpuscope.analysis._reading.stalls import Collected, Stalls
from gpuscope.analysis._structure.batches import Batches, Links, Shares
from gpuscope.analysis.recording import Losses, Process, Recording, Stream, Thread

EPOCH_NS = 1_700_000_000_000_000_000
"""Where the zero of the notation lies."""


@dataclass(frozen=True)
class Stage:
    """One run of a stage. `gpu` is (start, end) on the same scale as the host's, or None without a GPU part."""

    name: str
    start: float
    end: float
    gpu: tuple[float, float] | None = None
    inside: Sequence[Stage] = ()
    stream: int = 0
    """The handle; as many streams as handles, processes and devices that occur with a `gpu`."""
    device: int = 0
    process: str = "server"
    """Stages inside are in the process of the outermost, whatever they say."""
    thread: str = "MainThread"
    flags: int = 0
    error: bool = False
    uncertainty: float = 3.0
    samples: int = 0
    had_work: int = 0
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def shifted(self, by: float) -> Stage:
        """Return the same, and all inside it, so many microseconds later."""
        gpu = self.gpu and (self.gpu[0] + by, self.gpu[1] + by)
        inside = [stage.shifted(by) for stage in self.inside]
        return replace(self, start=self.start + by, end=self.end + by, gpu=gpu, inside=inside)

    def walk(self) -> Iterator[Stage]:
        """Yield this stage and all inside it, outer ones first."""
        yield self
        for stage in self.inside:
            yield from stage.walk()


def repeat(stage: Stage, count: int, every: float) -> list[Stage]:
    """Return the stage so many times, one each `every` microseconds."""
    return [stage.shifted(number * every) for number in range(count)]


def recording(*roots: Stage, losses: Losses | None = None) -> Recording:
    """Return the recording of these outermost stages and of all inside them."""
    return _build(list(_rows(roots)), losses or Losses())


@dataclass
class _Row:
    stage: Stage
    process: str
    parent: _Row | None
    root: _Row | None
    index: int = -1


def _rows(roots: Iterable[Stage]) -> Iterator[_Row]:
    # A stack, since stages may be nested deeper than Python recurses.
    stack = [_Row(stage, stage.process, None, None) for stage in reversed(list(roots))]
    while stack:
        row = stack.pop()
        yield row
        stack.extend(_Row(stage, row.process, row, row.root or row) for stage in reversed(row.stage.inside))


def _build(rows: list[_Row], losses: Losses) -> Recording:
    rows.sort(key=lambda row: row.stage.start)
    for index, row in enumerate(rows):
        row.index = index
    names = _unique(row.stage.name for row in rows)
    processes = _unique(row.process for row in rows)
    threads = _unique((row.process, row.stage.thread) for row in rows)
    streams = _unique((row.process, row.stage.device, row.stage.stream) for row in rows if row.stage.gpu)
    return Recording(
        names=tuple(names),
        processes=tuple(Process(name, {"service.name": name}) for name in processes),
        threads=tuple(Thread(processes[process], 1 + number, name) for (process, name), number in threads.items()),
        streams=tuple(
            Stream(processes[process], device, "NVIDIA H200", f"GPU-{device:08x}", handle)
            for process, device, handle in streams
        ),
        stage=np.array([names[row.stage.name] for row in rows], np.int32),
        thread=np.array([threads[row.process, row.stage.thread] for row in rows], np.int32),
        stream=np.array(
            [streams[row.process, row.stage.device, row.stage.stream] if row.stage.gpu else -1 for row in rows],
            np.int32,
        ),
        parent=np.array([row.parent.index if row.parent else -1 for row in rows], np.int64),
        root=np.array([(row.root or row).index for row in rows], np.int64),
        host_start_ns=_ns(row.stage.start for row in rows),
        host_end_ns=_ns(row.stage.end for row in rows),
        gpu_start_ns=_ns(row.stage.gpu and row.stage.gpu[0] for row in rows),
        gpu_end_ns=_ns(row.stage.gpu and row.stage.gpu[1] for row in rows),
        uncertainty_ns=np.array([row.stage.uncertainty * 1e3 if row.stage.gpu else 0 for row in rows], np.int64),
        flags=np.array([row.stage.flags for row in rows], np.uint32),
        error=np.array([row.stage.error for row in rows], np.bool_),
        samples=np.array([row.stage.samples for row in rows], np.int64),
        had_work=np.array([row.stage.had_work for row in rows], np.int64),
        trace_id=tuple(f"{(row.root or row).index + 1:032x}" for row in rows),
        span_id=tuple(f"{row.index + 1:016x}" for row in rows),
        attributes={row.index: dict(row.stage.attributes) for row in rows if row.stage.attributes},
        losses=losses,
    )


def _unique(keys: Iterable[Any]) -> dict[Any, int]:
    """Return each key's place in the order of first appearance."""
    places: dict[Any, int] = {}
    for key in keys:
        places.setdefault(key, len(places))
    return places


def _ns(times_us: Iterable[float | None]) -> np.ndarray:
    return np.array([0 if time is None else EPOCH_NS + round(time * 1e3) for time in times_us], np.int64)


def handed_over(of: Recording, thread: str, process: str = "worker") -> Recording:
    """Return a recording in which what ran on threads of a name ran in a process of its own."""
    number = len(of.processes)
    threads = [each._replace(process=number) if each.name == thread else each for each in of.threads]
    return replace(of, threads=tuple(threads), processes=(*of.processes, Process(process, {"service.name": process})))


def paused(of: Recording, *pauses: tuple[float, float], process: int = 0) -> Recording:
    """Return a recording in which Python collected garbage from one moment to another, in a process."""
    at = [(EPOCH_NS + round(start * 1e3), round((end - start) * 1e3)) for start, end in pauses]
    found = {}
    for row, (first_ns, last_ns) in enumerate(zip(of.host_start_ns.tolist(), of.host_end_ns.tolist(), strict=True)):
        own = [Collected(start_ns, took_ns, 2) for start_ns, took_ns in at if first_ns <= start_ns < last_ns]
        if own and of.threads[of.thread[row]].process == process:
            found[row] = tuple(own)
    return replace(of, stalls=Stalls(found))


def batched(of: Recording, *batches: tuple[int, Mapping[int, tuple[float, float]]]) -> Recording:
    """
    Return a recording in which stages have worked for others.

    Args:
        of: any recording.
        batches: for each the row of its stage, and by the row of each member how many microseconds it has waited, and
            its share of the GPU time in microseconds; a negative share is none.

    """
    pairs = [(batch, member) for batch, members in batches for member in members]
    lines = [
        (
            *(member, batch, of.host_start_ns[batch], of.host_end_ns[batch]),
            *(of.gpu_start_ns[batch], of.gpu_end_ns[batch]),
            *(round(wait * 1e3), round(share * 1e3) if share >= 0 else -1, len(members), 1),
        )
        for batch, members in batches
        for member, (wait, share) in members.items()
    ]
    links = Links(*(np.array(column, np.int64) for column in zip(*pairs, strict=True)))
    shares = Shares(*(np.array(column, np.int64) for column in zip(*lines, strict=True)))
    return replace(of, batches=Batches(links, shares))
