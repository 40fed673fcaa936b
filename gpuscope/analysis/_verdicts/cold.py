"""
Late cold calls: slow calls after the warm-up, caused by a new input shape, autotuning or compilation, for example.

Finds them and says what they cost; judges no stage. Verdicts list them and leave them out. Slow calls that come often,
again and again, or in a row are not cold: they are what the stage is like, and stay. So do requests that stalled.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from gpuscope._data.plain.durations import duration
from gpuscope.analysis._structure.ancestors import ancestors
from gpuscope.analysis._structure.kinds import end_to_end_ns
from gpuscope.analysis._structure.sizes import shape_of, sizes_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from gpuscope.analysis._structure.sizes import Shape
    from gpuscope.analysis.recording import Recording

MIN_CALLS = 10
"""With fewer calls it cannot be said what is usual."""
MIN_ALIKE = 3
"""So many other calls of a shape are enough to tell what it usually costs."""
TIMES = 3.0
"""A cold call takes at least so many times as long as usual,"""
EXCESS_NS = 100_000
"""and at least so much longer, and by at least"""
MATTERS = 0.05
"""this part of what a request of its kind usually takes: less changes no request;"""
SCORE = 6.0
"""without a new shape it is also so many robust standard deviations above the median, on a logarithmic scale."""
MAD_TO_SIGMA = 1.4826
"""Standard deviation over median absolute deviation of normally distributed values: 1 / 0.6745."""
MAX_SHARE = 0.05
"""Where more than this part of the calls is slow, slow calls are not isolated,"""
MOST_ISOLATED = 3
"""nor where there are more than so many of a stage in a kind of request, over all processes: then they are a tail."""
MOST_LINES = 5
ISOLATED = "isolated"


@dataclass(frozen=True, kw_only=True)
class ColdCall:
    """One late cold call: the stage that was itself slow. The stages around it are left out with it."""

    row: int
    """In the recording."""
    name: str
    start_ns: int
    """Since the epoch."""
    trace_id: str
    outside: bool
    """Whether there are stages inside it: what was slow is the time outside them."""
    ms: float
    """What the call itself cost, without the stages inside: on the host or on its stream, whichever stood out more."""
    usual_ms: float
    """The same of calls like it, on the same side."""
    because: str
    """`first call with batch_size=16`, or `isolated`."""

    def __str__(self) -> str:
        what = f"`{self.name}` itself, outside its stages," if self.outside else f"`{self.name}`"
        return f"{what} {duration(self.ms)} instead of {duration(self.usual_ms)}, {self.because}"


@dataclass(frozen=True, slots=True, eq=False)
class Cold:
    """The cold calls, and a mask of the rows to leave out because of them: the calls, and the stages around them."""

    calls: tuple[ColdCall, ...]
    rows: NDArray[np.bool_]


_found: WeakKeyDictionary[Recording, Cold] = WeakKeyDictionary()
"""Of recordings that still exist, so that figures and verdicts of one do not look for them twice."""


def find_cold(recording: Recording) -> Cold:
    """Return the late cold calls of a recording. Of each request only the one that cost most is listed."""
    if recording not in _found:
        _found[recording] = _find(recording)
    return _found[recording]


def _find(recording: Recording) -> Cold:
    host_ns, stream_ns = _own_ns(recording)
    matters_ms = _matters_ms(recording)
    found: dict[int, ColdCall] = {}
    for rows in _by_stage(recording):
        shapes = {row: shape_of(recording, row) for row in rows.tolist()} if len(rows) >= MIN_CALLS else {}
        for cost_ns in (host_ns, stream_ns):
            # A time on the host is compared with times on the host, and one on a stream with those on streams.
            there = rows[cost_ns[rows] >= 0]
            for row, usual_ns, because in _cold_in(recording, there, cost_ns, shapes):
                call = _call(recording, row, float(cost_ns[row]), usual_ns, because)
                if _excess_ms(call) >= max(matters_ms[row], _excess_ms(found[row]) if row in found else 0.0):
                    found[row] = call
    found = _without_tails(recording, found)
    cold = np.zeros(len(recording.stage), np.bool_)
    cold[list(found)] = True
    left_out = cold.copy()
    for rows, above in ancestors(recording.parent):
        left_out[above[cold[rows]]] = True
    return Cold(_dearest(recording, found.values()), left_out)


def _without_tails(recording: Recording, found: dict[int, ColdCall]) -> dict[int, ColdCall]:
    """Return the calls without those that come again and again, and without those of requests that stalled."""
    kind = {row: (int(recording.stage[row]), int(recording.stage[recording.root[row]])) for row in found}
    often = Counter(kind[row] for row, call in found.items() if call.because == ISOLATED)
    stalled = {int(recording.root[row]) for row in recording.stalls.stalled}
    return {
        row: call
        for row, call in found.items()
        if (call.because != ISOLATED or often[kind[row]] <= MOST_ISOLATED) and int(recording.root[row]) not in stalled
    }


def _call(recording: Recording, row: int, cost_ns: float, usual_ns: float, because: str) -> ColdCall:
    return ColdCall(
        row=row,
        name=recording.names[recording.stage[row]],
        start_ns=int(recording.host_start_ns[row]),
        trace_id=recording.trace_id[row],
        outside=not recording.leaf[row],
        ms=cost_ns / 1e6,
        usual_ms=usual_ns / 1e6,
        because=because,
    )


def _excess_ms(call: ColdCall) -> float:
    return call.ms - call.usual_ms


def _own_ns(recording: Recording) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return what each call itself costs on the host, without inner stages, and on its stream, if a leaf; else -1."""
    own_ns = recording.host_end_ns - recording.host_start_ns
    inner = np.flatnonzero(recording.parent >= 0)
    inside_ns = np.zeros_like(own_ns)
    np.add.at(inside_ns, recording.parent[inner], own_ns[inner])
    alone = recording.measured & (inside_ns == 0)
    host_ns: NDArray[np.int64] = np.where(recording.in_graph, -1, np.maximum(own_ns - inside_ns, 0))
    stream_ns: NDArray[np.int64] = np.where(alone, recording.gpu_end_ns - recording.gpu_start_ns, -1)
    return host_ns, stream_ns


def _matters_ms(recording: Recording) -> NDArray[np.float64]:
    """Return for each row how much longer than usual a call must be to matter to a request of its kind."""
    took_ns = end_to_end_ns(recording)
    roots = np.flatnonzero((recording.parent < 0) & ~recording.warmup & ~recording.not_ended)
    matters_ms = np.zeros(len(recording.stage))
    kind = recording.stage[recording.root]
    for each in np.unique(kind[roots]).tolist():
        matters_ms[kind == each] = MATTERS * float(np.median(took_ns[roots[kind[roots] == each]])) / 1e6
    return matters_ms


def _by_stage(recording: Recording) -> list[NDArray[np.int64]]:
    """Return the rows of each stage, per kind of request and process, in the order of time."""
    process = np.array([thread.process for thread in recording.threads], np.int64)[recording.thread]
    keys = np.stack([process, recording.stage[recording.root], recording.stage])
    _, group = np.unique(keys, axis=1, return_inverse=True)
    group = group.ravel()
    order = np.argsort(group, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(group[order])) + 1) if len(order) else []


def _cold_in(
    recording: Recording, rows: NDArray[np.int64], cost_ns: NDArray[np.int64], shape: Mapping[int, Shape]
) -> list[tuple[int, float, str]]:
    """Return (row, usual cost, reason) of the cold calls of one stage."""
    if len(rows) < MIN_CALLS:
        return []
    shapes: dict[Shape, list[int]] = {}
    for row in rows.tolist():
        shapes.setdefault(shape[row], []).append(row)
    warm = ~recording.warmup & ~recording.not_ended
    found = _first_of_their_shape(shapes, warm, cost_ns) if len(shapes) > 1 else []
    new = {row for row, _, _ in found}
    for alike in shapes.values():
        settled = np.array([row for row in alike if warm[row] and row not in new], np.int64)
        found += _isolated(settled, cost_ns)
    return found


def _first_of_their_shape(
    shapes: dict[Shape, list[int]], warm: NDArray[np.bool_], cost_ns: NDArray[np.int64]
) -> list[tuple[int, float, str]]:
    rows = [row for alike in shapes.values() for row in alike]
    typical_ns = float(np.median(cost_ns[rows]))
    middle = _middle_sizes(shapes)
    common = set.intersection(*(set(shape) for shape in shapes))
    found = []
    for shape, (first, *others) in shapes.items():
        usual_ns = typical_ns * _growth(shape, middle) if len(others) < MIN_ALIKE else float(np.median(cost_ns[others]))
        if warm[first] and cost_ns[first] >= _cold_from(usual_ns):
            told = ", ".join(f"{name}={value}" for name, value in shape if (name, value) not in common)
            found.append((first, usual_ns, f"first call with {told}"))
    # Where most first calls are not slow, as where each call has a size of its own, being the first is not a reason.
    firsts = sum(bool(warm[first]) for first, *_ in shapes.values())
    return [] if len(found) > MOST_ISOLATED and 2 * len(found) < firsts else found


def _middle_sizes(shapes: dict[Shape, list[int]]) -> dict[str, float]:
    """Return the median of each size over the calls."""
    sizes: dict[str, list[float]] = {}
    for shape, rows in shapes.items():
        for name, size in sizes_in(shape).items():
            sizes.setdefault(name, []).extend([size] * len(rows))
    return {name: float(np.median(values)) for name, values in sizes.items()}


def _growth(shape: Shape, middle: dict[str, float]) -> float:
    """Return how many times the usual a call of this shape may cost: with the square of its sizes, like attention."""
    ratios = [size / middle[name] for name, size in sizes_in(shape).items() if middle[name] > 0]
    return math.prod(max(1.0, ratio) for ratio in ratios) ** 2


def _isolated(rows: NDArray[np.int64], cost_ns: NDArray[np.int64]) -> list[tuple[int, float, str]]:
    """Return the cold calls among calls of one shape: far above the median, rare, and never two in a row."""
    if len(rows) < MIN_CALLS:
        return []
    costs = np.maximum(cost_ns[rows], 1).astype(np.float64)
    median = float(np.median(costs))
    times = np.log(costs / median)
    slow = (times > SCORE * MAD_TO_SIGMA * np.median(np.abs(times))) & (costs >= _cold_from(median))
    alone = slow.copy()
    alone[1:] &= ~slow[:-1]
    alone[:-1] &= ~slow[1:]
    if slow.sum() > max(1.0, MAX_SHARE * len(rows)):
        return []
    return [(row, median, ISOLATED) for row in rows[alone].tolist()]


def _cold_from(usual_ns: float) -> float:
    return max(TIMES * usual_ns, usual_ns + EXCESS_NS)


def _dearest(recording: Recording, calls: Iterable[ColdCall]) -> tuple[ColdCall, ...]:
    """Return one call per request: others in it are slow because of that one, such as a wait for its GPU work."""
    kept: dict[int, ColdCall] = {}
    for call in calls:
        root = int(recording.root[call.row])
        if root not in kept or _excess_ms(call) > _excess_ms(kept[root]):
            kept[root] = call
    return tuple(sorted(kept.values(), key=lambda call: call.start_ns))


def cold_lines(calls: Sequence[ColdCall]) -> Iterator[str]:
    """Yield a few lines on cold calls: one per stage, of the call that cost most, with its trace."""
    by_stage: dict[tuple[str, bool], list[ColdCall]] = {}
    for call in calls:
        by_stage.setdefault((call.name, call.outside), []).append(call)
    ordered = sorted(by_stage.values(), key=lambda some: -max(map(_excess_ms, some)))
    for some in ordered[:MOST_LINES]:
        call = max(some, key=_excess_ms)
        more = f"; and {len(some) - 1:,} more" if len(some) > 1 else ""
        yield f"cold: {call} (trace {call.trace_id}){more}; not judged"
    if rest := sum(map(len, ordered[MOST_LINES:])):
        yield f"cold: {rest:,} more in {len(ordered) - MOST_LINES:,} other stages; not judged"
