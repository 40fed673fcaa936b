"""
Sentences on what stalled the host: stalls, garbage collections, compilations, waits that no one sees in the code.

Judges nothing: each says how much of which requests it took, and what to do about it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuscope._data.attributes import COMPILE_SPAN, MEMORY_PEAK, SYNC_BYTES, SYNC_COUNT, SYNCS
from gpuscope._data.plain.durations import duration
from gpuscope.analysis._verdicts.advice import GC_FEWER, GC_FREEZE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from gpuscope.analysis.recording import Recording

_SLOW = 10
"""Slow requests: one of so many of a kind."""
_WORTH_SAYING = 0.01
"""The least part of the time of slow requests of which something is said."""
_FULL = 2
_MOST_NAMED = 3


def sentences(recording: Recording) -> Iterator[str]:
    """Yield them, the most general first."""
    for kind in np.unique(recording.stage[recording.parent < 0]).tolist():
        rows = np.flatnonzero((recording.stage == kind) & (recording.parent < 0) & ~recording.in_warmup_request)
        if rows.size:
            yield from _collected(recording, rows)
            yield from _compiled(recording, rows)
    yield from _synchronised(recording)
    yield from _out_of_memory(recording)


def stalls(recording: Recording) -> Iterator[str]:
    """Yield a sentence if stalls were found: how many, and the longest ones."""
    found = recording.stalls.stalled
    if not found:
        return
    rows = np.array(list(found), np.int64)
    took_ns = np.maximum(recording.host_end_ns, recording.gpu_end_ns)[rows] - recording.host_start_ns[rows]
    rows, took_ns = (column[np.argsort(-took_ns, kind="stable")] for column in (rows, took_ns))
    told = [
        f"{found[row]} in `{_name(recording, row)}`, {duration(ns / 1e6)}, trace {recording.trace_id[row]}"
        for row, ns in zip(rows.tolist()[:_MOST_NAMED], took_ns.tolist(), strict=False)
    ]
    more = f"; and {len(found) - len(told):,} more" if len(found) > len(told) else ""
    yield f"{len(found):,} stall{'s' * (len(found) > 1)}: {'; '.join(told)}{more}."


def _took_ns(recording: Recording, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    took: NDArray[np.int64] = recording.host_end_ns[rows] - recording.host_start_ns[rows]
    return took


def _name(recording: Recording, row: int) -> str:
    return recording.names[int(recording.stage[row])]


def _collected(recording: Recording, rows: NDArray[np.int64]) -> Iterator[str]:
    """Yield a sentence if garbage collections took a part of the slow requests worth saying."""
    took_ns = _took_ns(recording, rows)
    slow = np.argsort(took_ns, kind="stable")[-max(1, len(rows) // _SLOW) :]
    lost_ns = np.array([_inside_ns(recording, row) for row in rows.tolist()])
    share = lost_ns[slow].sum() / max(1, took_ns[slow].sum())
    if share < _WORTH_SAYING:
        return
    advice = collection_advice(recording, rows[slow])
    advice = advice[:1].lower() + advice[1:]
    yield (
        f"Garbage collection took {share:.0%} of the slow requests `{_name(recording, rows[0])}` (the slowest tenth; "
        f"{lost_ns.sum() / max(1, took_ns.sum()):.1%} of all, {duration(lost_ns.max() / 1e6)} at most): {advice}"
    )


def collection_advice(recording: Recording, rows: NDArray[np.int64]) -> str:
    """Return what to do about the garbage collections in some requests."""
    met = recording.stalls.collections
    full = any(each.generation >= _FULL for row in rows.tolist() for each in met.get(row, ()))
    return GC_FREEZE if full else GC_FEWER


def _inside_ns(recording: Recording, row: int) -> int:
    """Return the time of collections within a request."""
    start_ns, end_ns = int(recording.host_start_ns[row]), int(recording.host_end_ns[row])
    return sum(
        max(0, min(end_ns, each.start_ns + each.took_ns) - max(start_ns, each.start_ns))
        for each in recording.stalls.collections.get(row, ())
    )


def _compiled(recording: Recording, rows: NDArray[np.int64]) -> Iterator[str]:
    """Yield a sentence if requests after the warm-up waited for a compilation or for the recording of a graph."""
    if COMPILE_SPAN not in recording.names:
        return
    compiles = np.flatnonzero(recording.stage == recording.names.index(COMPILE_SPAN))
    compiles = compiles[np.isin(recording.root[compiles], rows) & (recording.parent[compiles] >= 0)]
    # One within another, as a graph that is recorded in a compilation, is the same time.
    compiles = compiles[recording.stage[recording.parent[compiles]] != recording.names.index(COMPILE_SPAN)]
    if not compiles.size:
        return
    took_ns, paid = _took_ns(recording, compiles), np.unique(recording.root[compiles])
    yield (
        f"{len(paid):,} of {len(rows):,} requests `{_name(recording, rows[0])}` waited for `torch.compile` after the "
        f"warm-up, {duration(took_ns.max() / 1e6)} at most: run each shape once before the first request, or compile "
        "with `dynamic=True`."
    )


def _synchronised(recording: Recording) -> Iterator[str]:
    """Yield a sentence per stage in which a watch found lines that wait for the GPU, the most frequent first."""
    found: dict[str, list[Mapping[str, object]]] = {}
    for row, told in recording.attributes.items():
        if SYNCS in told:
            found.setdefault(_name(recording, row), []).append(told)
    counts = {name: sum(_number(each, SYNC_COUNT) for each in calls) for name, calls in found.items()}
    for name in sorted(found, key=lambda each: -counts[each])[:_MOST_NAMED]:
        texts = dict.fromkeys(str(text) for each in found[name] for text in _texts(each[SYNCS]))
        shown = "; ".join(list(texts)[:_MOST_NAMED]) + (
            f"; and {len(texts) - _MOST_NAMED} more" * (len(texts) > _MOST_NAMED)
        )
        moved = sum(_number(each, SYNC_BYTES) for each in found[name])
        copied = f" and copied {moved:,} bytes" if moved else ""
        yield (
            f"In `{name}` the host waited for the GPU, or copied pageable memory, {counts[name]:,} times{copied} in "
            f"{len(found[name]):,} watched calls: {shown}."
        )


def _texts(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _number(told: Mapping[str, object], name: str) -> int:
    value = told.get(name)
    return value if isinstance(value, int) else 0


def _out_of_memory(recording: Recording) -> Iterator[str]:
    """Yield a sentence if GPU memory ran out: in which stages of which requests, and which stages have most."""
    rows = recording.stalls.out_of_memory
    if not rows:
        return
    around = {int(recording.parent[row]) for row in rows}
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        if row not in around:  # The innermost.
            key = (_name(recording, row), _name(recording, int(recording.root[row])))
            counts[key] = counts.get(key, 0) + 1
    where = "; ".join(
        f"`{stage}`" + ("" if stage == root else f" of request `{root}`") + (f" ({count:,} times)" if count > 1 else "")
        for (stage, root), count in sorted(counts.items(), key=lambda item: -item[1])[:_MOST_NAMED]
    )
    peaks: dict[str, int] = {}
    for row, told in recording.attributes.items():
        if MEMORY_PEAK in told:
            name = _name(recording, row)
            peaks[name] = max(peaks.get(name, 0), _number(told, MEMORY_PEAK))
    largest = sorted(peaks, key=lambda name: -peaks[name])[:_MOST_NAMED]
    most = ", ".join(f"`{name}` {peaks[name] / 1e9:.2f} GB" for name in largest)
    yield f"GPU memory ran out in {where}. " + (
        f"Largest peaks: {most}." if most else "GPUSCOPE_MEMORY=1 tells which stages have how much."
    )
