"""
What the host alone can tell of requests without GPU times: the stage that dominates, and what it costs per item.

Says nothing about a GPU: whether there was none, or none was timed, these times are the host's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuscope._data.attributes import COMPILE_SPAN
from gpuscope._data.plain.durations import duration
from gpuscope.analysis._structure.parts import counted
from gpuscope.analysis._structure.sizes import shape_of, sizes_in
from gpuscope.analysis._verdicts.advice import (
    BATCH,
    BETWEEN_STAGES,
    COMPILE_BEFORE,
    IN_BATCH,
    INNER_STAGES,
    LOOK_INTO,
    QUEUE_FOR_BATCH,
    WAIT_FOR_BATCH,
)
from gpuscope.analysis._verdicts.fit import MIN_SPREAD, Fit, fit_cost
from gpuscope.analysis._verdicts.stalled import collection_advice

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope.analysis._verdicts.calls import CallsOfStage
    from gpuscope.analysis.latency.in_batches import InBatches

MOST = 0.5
MOST_NAMED = 3
UNLIKE = 0.05
"""Where the median request and all requests together differ by this part of the time, both are told."""
SAME_COST = 0.25
"""A cost per item is one where it differs by at most this part of it between calls of different sizes."""


def where_time_goes(calls: CallsOfStage, how_long: str) -> tuple[str, tuple[str, ...], list[str]]:
    """
    Return a sentence, what to try first, and further sentences.

    Args:
        calls: The requests of one kind.
        how_long: What they take, in words.

    """
    start = f"`{calls.name}` takes {how_long}"
    material, requests = calls.material, calls.requests
    recording, total_ns = material.recording, requests.total_ns
    rows = np.flatnonzero(np.isin(recording.root, requests.rows))
    inner = rows[recording.parent[rows] >= 0]
    own_ns = np.bincount(recording.stage[rows], material.own_ns[rows], len(recording.names))
    collected_ns = float(material.collected_ns[rows].sum())
    in_batches = material.in_batches.of(requests.rows)
    if in_batches is not None:
        own_ns[list(material.in_batches.waiting_stages(requests.rows))] = 0
        if sum(in_batches.shares) * total_ns >= max(*own_ns.tolist(), collected_ns):
            return _of_batches(start, in_batches)
    if total_ns and collected_ns >= max(own_ns.max(), total_ns * UNLIKE):
        takes = _takes(calls, material.collected_ns, rows, "none")
        most = _most(collected_ns, total_ns)
        return f"{start}. {most} is garbage collection: {takes}.", (collection_advice(recording, requests.rows),), []
    if not len(inner) or not total_ns:
        return f"{start}, and no stage inside says where.", (INNER_STAGES.format(calls.name),), []
    stage = int(np.argmax(own_ns))
    name, of_stage = recording.names[stage], rows[recording.stage[rows] == stage]
    takes = _takes(calls, material.own_ns, of_stage, f"no `{name}`")
    most = _most(float(own_ns[stage]), total_ns)
    if stage == calls.kind:
        return f"{start}. {most} is in no stage inside: {takes}.", (BETWEEN_STAGES,), []
    cost = _cost(calls, inner[recording.stage[inner] == stage])
    more = [f"`{name}` costs {_in_words(cost)}."] if cost is not None else []
    fixed = isinstance(cost, Fit) and cost.fixed_share >= MOST
    return (
        f"{start}. {most} is `{name}`: {takes}, which is the most that can be gained there.",
        (COMPILE_BEFORE if name == COMPILE_SPAN else BATCH if fixed else LOOK_INTO.format(name),),
        more,
    )


def _most(ns: float, total_ns: int) -> str:
    return "Most of it" if ns >= MOST * total_ns else "The largest part of it"


def _of_batches(start: str, in_batches: InBatches) -> tuple[str, tuple[str, ...], list[str]]:
    """Return the same of requests that spend most of their time in batches or waiting for them."""
    queue, waits, inside = in_batches.shares
    names = " and ".join(f"`{name}`" for name in in_batches.names[:MOST_NAMED])
    batch = f"the batch {names}" if len(in_batches.names) == 1 else f"the batches {names}"
    advice = (QUEUE_FOR_BATCH, WAIT_FOR_BATCH, IN_BATCH.format(names))[int(np.argmax((queue, waits, inside)))]
    said = f"On average, {queue + waits + inside:.0%} of it is spent in or waiting for {batch}"
    parts = f"other batches ran for {queue:.0%} of it, none of them for {waits:.0%}, and its own for {inside:.0%}"
    return f"{start}. {said}: {parts}.", (advice,), []


def _takes(calls: CallsOfStage, value_ns: NDArray[np.int64], rows: NDArray[np.int64], none: str) -> str:
    """Return `12.3 ms (95%)`, with the mean where a few slow requests make the share what it is."""
    recording, requests = calls.material.recording, calls.requests.rows
    mean_ms, share = (float(value_ns[rows].sum()) / (of or 1) for of in (1e6 * len(requests), calls.requests.total_ns))
    counts = np.sort(counted(recording, calls.rows))
    in_them = rows[np.isin(recording.root[rows], counts)]
    place = np.searchsorted(counts, recording.root[in_them])
    each_ns = np.bincount(place, value_ns[in_them], len(counts))
    usual_ms = float(np.median(each_ns)) / 1e6
    if abs(usual_ms / (calls.material.request_ms(calls.kind) or 1.0) - share) <= UNLIKE:
        return f"{duration(usual_ms)} ({share:.0%})"
    usual = f"{duration(usual_ms)} in the median request" if usual_ms else f"most requests have {none}"
    return f"{duration(mean_ms)} on average ({share:.0%}), and {usual}"


def _cost(calls: CallsOfStage, rows: NDArray[np.int64]) -> Fit | tuple[str, float] | None:
    """Return the line of cost over size, or (size, median cost per item), or None where no attribute is a size."""
    recording, rows = calls.material.recording, counted(calls.material.recording, rows)
    sizes = [sizes_in(shape_of(recording, row)) for row in rows.tolist()]
    cost_ms = (recording.host_end_ns - recording.host_start_ns)[rows] / 1e6
    for name in sorted(set().union(*sizes)):
        given = np.array([each.get(name, 0.0) > 0 for each in sizes])
        if not given.all():
            continue
        items = np.array([each[name] for each in sizes])
        fit = fit_cost(name, items, cost_ms)
        if isinstance(fit, Fit):
            return fit
        if items.max() >= MIN_SPREAD * items.min() and _is_one(cost_ms / items, items):
            return name, float(np.median(cost_ms / items))
    return None


def _is_one(each_ms: NDArray[np.float64], items: NDArray[np.float64]) -> bool:
    """Return whether small and large calls cost the same per item, so that it can be said what an item costs."""
    middle = (float(items.min()) * float(items.max())) ** 0.5
    small, large = (float(np.median(some)) for some in (each_ms[items <= middle], each_ms[items > middle]))
    return abs(small - large) <= SAME_COST * min(small, large)


def _in_words(cost: Fit | tuple[str, float]) -> str:
    if isinstance(cost, Fit):
        return f"{duration(cost.fixed_ms)} per call, plus {duration(cost.per_item_ms)} per unit of `{cost.size}`"
    name, each_ms = cost
    return f"{duration(each_ms)} per unit of `{name}`"
