"""
What was found: a stage without progress, which kind of stall that is, and how it is said.

Pure. The layouts are those of `csrc/stall.h` and `csrc/sampler.h`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NEVER_LEFT, NOT_DONE, NOT_BACK = "host_never_left", "gpu_not_done", "host_not_back"
"""
The kinds. The host is in a stage, and the GPU works, or had nothing to do, or it is not known. The host has left it,
and the GPU is not done. The GPU has done the work of the stage, and the host is still in it.
"""
FOUND, STREAM = struct.Struct("=7Q5q128s64s"), struct.Struct("=2Q6q")
BEGINS, ENDS = 0, 1
_WRITTEN = {1: NEVER_LEFT, 2: NOT_BACK}
"""Of `Found.written`."""
OLD_NS = 1_000_000_000
"""An answer of a stream says nothing after that."""


class StreamState(NamedTuple):
    """What one stream answered last: had it work?"""

    watch: int
    stream: int
    device: int
    open: int
    asked_ns: int
    work_since_ns: int
    """Since when all answers were yes; 0 if the last was no."""
    free_since_ns: int
    had_work_ns: int
    """When one was yes last."""

    def is_known(self, now_ns: int) -> bool:
        """Tell whether it was asked of late."""
        return bool(self.asked_ns) and now_ns - self.asked_ns <= OLD_NS

    def text(self, now_ns: int) -> str:
        """Say it."""
        where = f"GPU {self.device}, stream {self.stream:#x}"
        if not self.asked_ns:
            return f"{where}: never asked"
        if not self.is_known(now_ns):
            # Where no stage is open nobody asks after a while.
            what, before = "no answer" if self.open else "not asked", "work" if self.work_since_ns else "no work"
            return f"{where}: {what} for {(now_ns - self.asked_ns) / 1e9:.1f} s, before that {before}"
        if self.work_since_ns:
            return f"{where}: at every question work, for {(now_ns - self.work_since_ns) / 1e9:.1f} s"
        return f"{where}: no work for {(now_ns - self.free_since_ns) / 1e9:.1f} s"


class Found(NamedTuple):
    """A stage that runs without progress, or does not any more."""

    kind: int
    trace_high: int
    trace_low: int
    span_id: int
    thread: int
    site: int
    watch: int
    """Of the stream that it is on, in `StreamState.watch`; 0 where that is not asked."""
    start_ns: int
    active_ns: int
    """When it or a stage inside it last began or ended."""
    limit_ns: int
    now_ns: int
    """When it was found."""
    written: int
    """As which kind the thread in C has written it to the file, because none of Python came; 0 where one did."""
    site_name: bytes
    thread_name: bytes


@dataclass(frozen=True, slots=True)
class Stall:
    """A stall, as it is said and counted. Times are of the records' clock."""

    kind: str
    stage: str
    trace_id: int
    span_id: int
    since_ns: int
    """When something last began or ended in the stage, or was done on its stream."""
    found_ns: int
    limit_ns: int
    where: str
    """The thread, or the GPU and the stream."""
    gil_ns: int = 0
    """For how long no thread of Python could run; 0 where that was not so."""
    facts: tuple[str, ...] = field(default=())
    """Sentences without a full stop."""

    def sentence(self) -> str:
        """Say it in one line."""
        took_s, limit_s = (self.found_ns - self.since_ns) / 1e9, self.limit_ns / 1e9
        what = {
            NEVER_LEFT: f"the host has not left stage {self.stage}, and nothing has begun or ended in it",
            NOT_DONE: f"the host has left stage {self.stage}, and the GPU is not done",
            NOT_BACK: f"the GPU has done the work of stage {self.stage}, and the host is not back",
        }[self.kind]
        gil = (
            f"; no thread of Python ran for {self.gil_ns / 1e9:.1f} s of it: a call kept the GIL" if self.gil_ns else ""
        )
        return f"{self.kind}: {what}, for {took_s:.1f} s (limit {limit_s:.1f} s); {self.where}{gil}"


def found_in(taken: bytes) -> Iterator[Found]:
    """Return what the watch has found."""
    for fields in FOUND.iter_unpack(taken):
        site, thread = (text.partition(b"\0")[0] for text in fields[-2:])
        yield Found._make((*fields[:12], site, thread))


def streams_in(taken: bytes) -> list[StreamState]:
    """Return what streams answered last."""
    return [StreamState(*fields) for fields in STREAM.iter_unpack(taken)]


def kind_of(found: Found, state: StreamState | None, now_ns: int) -> str:
    """Return the kind of stall of a stage that the host is in. The twin is `class_of` in `csrc/stall_report.c`."""
    if state is None or not state.is_known(now_ns):
        return NEVER_LEFT
    is_free = state.free_since_ns > 0 and now_ns - state.free_since_ns >= found.limit_ns // 2
    # Where the stage had no work that was seen, the GPU has nothing to do with it.
    return NOT_BACK if is_free and state.had_work_ns >= found.start_ns else NEVER_LEFT


def host_stall(found: Found, states: Iterable[StreamState], now_ns: int, stages: str = "") -> Stall:
    """Return the stall of a stage that the host is in."""
    states = list(states)
    own = next((each for each in states if found.watch and each.watch == found.watch), None)
    facts = [] if own is None else [own.text(now_ns)]
    facts += [f"beside it {each.text(now_ns)}" for each in states if each is not own]
    facts += [stages] if stages else []
    name = found.site_name.decode("utf-8", "replace")
    return Stall(
        _WRITTEN.get(found.written) or kind_of(found, own, now_ns),
        *(name, found.trace_high << 64 | found.trace_low, found.span_id, found.active_ns, now_ns, found.limit_ns),
        f"thread {found.thread_name.decode('utf-8', 'replace')}, ident {found.thread}",
        gil_ns=now_ns - found.now_ns if found.written else 0,
        facts=tuple(facts),
    )
