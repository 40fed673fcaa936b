"""
The deep look, offline: takes a trace of torch.profiler and says what bounds each stage.

Needs neither torch nor a GPU. Stages are the annotations that gpuscope's note in the trace names; without a note, all.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpuscope._data.plain.durations import duration
from gpuscope._profiling.bounds import ENOUGH, Content, decide
from gpuscope._profiling.findings import Copies, Counted, DeepFindings, StageLook
from gpuscope._profiling.kineto import COPY, KERNEL, parse
from gpuscope._profiling.measures import Measures
from gpuscope._profiling.unwatched import without_watching
from gpuscope.analysis._verdicts.advice import WITH_CUPTI

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from os import PathLike

    from gpuscope._profiling.attribution import LinkedCall
    from gpuscope._profiling.kineto import Call, JsonObject, Range, Work
    from gpuscope._profiling.measures import StageInRequest

SMALL_BYTES = 256
"""A copy to the GPU of at most this many bytes carries numbers, not data."""
PARTS = ("compute", "transfer", "dispatch", "sync", "host_only", "computing")
SLOWED = 0.005
"""From this part on, watching is said to have made a request slower: it is written in whole percent."""
LISTED = 3
"""How many operators are listed of each sort."""


def read_trace(path: str | PathLike[str]) -> JsonObject:
    """
    Read a trace from a file, which may be compressed by gzip, or a pipe.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not JSON.

    """
    content = Path(path).read_bytes()
    try:
        # Not by the name: a pipe has none, and a file may have the wrong one.
        trace: JsonObject = json.loads(gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content)
    except EOFError:
        raise ValueError("it is compressed by gzip, and was cut short.") from None
    except (gzip.BadGzipFile, zlib.error):
        raise ValueError("it is compressed by gzip, and damaged.") from None
    except (ValueError, RecursionError) as error:
        why = f", in line {error.lineno}" if isinstance(error, json.JSONDecodeError) and content.strip() else ""
        raise ValueError(f"it is {f'not JSON{why}' if content.strip() else 'empty'}.") from None
    return trace


def examine(trace: JsonObject) -> DeepFindings:
    """
    Say for each stage in a trace what is in it and what bounds it.

    Raises:
        ValueError: if this is not a Chrome trace.

    """
    measures = Measures(parse(trace))
    order = sorted(measures.kinds, key=lambda kind: measures.runs[measures.kinds[kind][0]].stage.start_ns)
    looks = [_look(measures, kind) for kind in order]
    time_of = {look.root: look.ms * look.calls for look in looks if look.depth == 0}
    looks.sort(key=lambda look: -time_of.get(look.root, 0.0))
    return DeepFindings(stages=tuple(looks), notes=tuple(_notes(measures, looks)))


def _look(measures: Measures, kind: StageInRequest) -> StageLook:
    calls, count = measures.calls[kind], len(measures.kinds[kind])
    work = [each for call in calls for each in call.work]
    kernels = [each for each in work if each.kind == KERNEL]
    times = measures.times(kind)
    figures = {name: ns / count / 1e6 for name, ns in times._asdict().items()}
    watched_ms, watched_wait = figures["window"], figures["wait"]
    unwatched_ns = measures.trace.unwatched_ns.get((kind.root, kind.name))
    if unwatched_ns is not None:
        figures = without_watching(figures, unwatched_ns / 1e6)
    waits_for, others_ns = measures.waits_for(kind)
    kernel_us, copy_us = _typical_us(kernels), _typical_us([each for each in work if each.kind == COPY])
    launches = sum(call.launches for call in calls) / count
    copies, small, waits = _copies(work, count), _small_copies(calls, count), _waits(calls, count)
    bound = decide(
        Content(
            ms=figures["window"],
            **{name: figures[name] for name in (*PARTS, "wait", "copy_wait")},
            waits_for=waits_for,
            waits_for_others=others_ns / count / 1e6 * (figures["wait"] / watched_wait if watched_wait else 1.0),
            kernel_us=kernel_us,
            copy_us=copy_us,
            launches=launches,
            copies=copies,
            small_copies=sum(each.count for each in small),
            waits=sum(each.count for each in waits),
            has_gpu=bool(measures.trace.work),
        )
    )
    return StageLook(
        **bound._asdict(),
        name=kind.name,
        root=kind.root,
        depth=kind.depth,
        calls=count,
        ms=figures["window"],
        watched_ms=watched_ms if unwatched_ns is not None else None,
        by_request=tuple(
            (max(window * figures["window"] / max(watched_ms, 1e-9), busy) / 1e6, busy / 1e6)
            for window, busy in measures.by_request(kind)
        ),
        host_ms=figures["host"],
        kernels=len(kernels) / count,
        kernel_ms=measures.kernel_ns(kind) / count / 1e6,
        kernel_us=kernel_us,
        launches=launches,
        graph_launches=sum("GraphLaunch" in call.call.name for call in calls) / count,
        copies=copies,
        small_copies=small[:LISTED],
        waits=waits[:LISTED],
        **{f"{name}_ms": figures[name] for name in PARTS},
        wait_ms=figures["wait"],
        copy_wait_ms=figures["copy_wait"],
        gaps=measures.gaps(kind) / count,
        waits_for=waits_for,
    )


def _typical_us(work: Sequence[Work]) -> float | None:
    """Return the length of which half of all time is in longer pieces: a few long ones outweigh many short ones."""
    if not work:
        return None
    lengths = np.sort([each.end_ns - each.start_ns for each in work])
    passed = np.cumsum(lengths)
    return float(lengths[np.searchsorted(passed, passed[-1] / 2)]) / 1e3


def _copies(work: Sequence[Work], count: int) -> tuple[Copies, ...]:
    by_sort: dict[tuple[str, bool], list[Work]] = defaultdict(list)
    for each in work:
        if each.kind == COPY:
            by_sort[each.direction, each.pageable].append(each)
    return tuple(
        Copies(
            direction=direction,
            pageable=pageable,
            count=len(copies) / count,
            bytes=sum(each.bytes for each in copies) / count,
            ms=_ms(copies) / count,
        )
        for (direction, pageable), copies in sorted(by_sort.items())
    )


def _small_copies(calls: Sequence[LinkedCall], count: int) -> tuple[Counted, ...]:
    found: dict[str, int] = defaultdict(int)
    for call in calls:
        found[call.outermost] += sum(each.direction == "HtoD" and each.bytes <= SMALL_BYTES for each in call.work)
    ordered = sorted(((number, name) for name, number in found.items() if number), reverse=True)
    return tuple(Counted(name=name, count=number / count) for number, name in ordered)


def _waits(calls: Sequence[LinkedCall], count: int) -> tuple[Counted, ...]:
    # By operator, because a `.cpu()` waits in its copy and again after it.
    found: dict[str, dict[Range | Call, int]] = defaultdict(lambda: defaultdict(int))
    for call in calls:
        if call.waits:
            found[call.outermost][call.operator or call.call] += call.call.end_ns - call.call.start_ns
    counted = [
        Counted(name=name, count=len(ns) / count, ms=sum(ns.values()) / count / 1e6) for name, ns in found.items()
    ]
    return tuple(sorted(counted, key=lambda each: -each.ms))


def _ms(work: Sequence[Work]) -> float:
    return sum(each.end_ns - each.start_ns for each in work) / 1e6


def _slowed(looks: Sequence[StageLook]) -> Iterator[str]:
    """Yield by how much watching slowed each kind of request, or that this is not known."""
    requests = [look for look in looks if not look.depth]
    for look in requests:
        if look.watched_ms is not None and look.ms:
            if look.watched_ms < (1 + SLOWED) * look.ms:
                yield f"Watching did not make `{look.name}` slower."
                continue
            slower = f"by {look.watched_ms / look.ms - 1:.0%}, from {duration(look.ms)} to {duration(look.watched_ms)}"
            yield (
                f"Watching made `{look.name}` slower {slower}. What is said is of its length before that, and of the "
                "kernels within it."
            )
    if any(look.watched_ms is None for look in requests):
        yield "The profiler makes launches slower: near a boundary, trust the verdicts of `gpuscope report` more."


NO_GPU = (
    "The program used no GPU in these requests. What the host does, stage by stage, is in `gpuscope.summary()` and in "
    "`gpuscope report`."
)


def _notes(measures: Measures, looks: Sequence[StageLook]) -> Iterator[str]:
    if not measures.kinds:
        yield "No stage ran from its start to its end in the trace."
    if not measures.trace.work:
        why = NO_GPU if measures.trace.of_the_host else WITH_CUPTI
        yield f"The trace has no GPU work in it, so nothing can be said. {why}"
        return
    for root in dict.fromkeys(kind.root for kind in measures.kinds if not kind.depth):
        idle_ns, total_ns = measures.between(root)
        if total_ns and idle_ns >= ENOUGH * total_ns:
            part = f"{idle_ns / total_ns:.0%}"
            yield f"Between requests, the GPU has nothing to do for {part} of the time from one `{root}` to the next."
    cut = sum(not run.whole for run in measures.runs)
    if cut:
        yield f"{cut} stages that were not wholly in the trace are left out."
    if measures.attribution.unlaunched:
        yield f"{measures.attribution.unlaunched} pieces of GPU work were launched before the trace began."
    if measures.trace.malformed:
        yield f"{measures.trace.malformed} events of the trace could not be read."
    yield from _slowed(looks)
