"""
What the host alone can tell of requests without GPU times: the stage that dominates, and what it costs per item.

Says nothing about a GPU: whether there was none, or none was timed, these times are the host's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuscope._data.plain.durations import duration
from gpuscope.analysis._structure.parts import counted
from gpuscope.analysis._structure.sizes import shape_of, sizes_in
from gpuscope.analysis._verdicts.advice import BATCH, BETWEEN_STAGES, INNER_STAGES, LOOK_INTO
from gpuscope.analysis._verdicts.fit import Fit, fit_cost

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope.analysis._verdicts.calls import CallsOfStage

MOST = 0.5
UNLIKE = 0.2
"""Where the median request and all requests together differ by this part of the time, both are told."""


def where_time_goes(calls: CallsOfStage, how_long: str) -> tuple[str, tuple[str, ...], list[str]]:
    """
    Return a sentence, what to try first, and further sentences.

    Args:
        calls: The requests of one kind.
        how_long: What they take, in words.

    """
    start = f"`{calls.name}` takes {how_long}"
    recording, requests = calls.material.recording, calls.requests
    rows = np.flatnonzero(np.isin(recording.root, requests.rows))
    inner = rows[recording.parent[rows] >= 0]
    if not len(inner) or not requests.total_ns:
        return f"{start}, and no stage inside says where.", (INNER_STAGES.format(calls.name),), []
    own_ns = np.bincount(recording.stage[rows], calls.material.own_ns[rows], len(recording.names))
    stage = int(np.argmax(own_ns))
    share = float(own_ns[stage]) / requests.total_ns
    takes = _takes(calls, _usual_ms(calls, stage), float(own_ns[stage]) / 1e6 / len(requests.rows), share)
    most = "Most of it" if share >= MOST else "The largest part of it"
    if stage == calls.kind:
        return f"{start}. {most} is in no stage inside: {takes}.", (BETWEEN_STAGES,), []
    name = recording.names[stage]
    cost = _cost(calls, inner[recording.stage[inner] == stage])
    more = [f"`{name}` costs {_in_words(cost)}."] if cost is not None else []
    fixed = isinstance(cost, Fit) and cost.fixed_share >= MOST
    return (
        f"{start}. {most} is `{name}`: {takes}, which is the most that can be gained there.",
        (BATCH if fixed else LOOK_INTO.format(name),),
        more,
    )


def _takes(calls: CallsOfStage, usual_ms: float, mean_ms: float, share: float) -> str:
    """Return `12.3 ms (95%)`, with the mean where a few slow requests make the share what it is."""
    if abs(usual_ms / (calls.material.request_ms(calls.kind) or 1.0) - share) <= UNLIKE:
        return f"{duration(usual_ms)} ({share:.0%})"
    return f"{duration(mean_ms)} on average ({share:.0%}), and {duration(usual_ms)} in the median request"


def _usual_ms(calls: CallsOfStage, stage: int) -> float:
    """Return the median over the requests of what a stage itself takes in each: for one call, its median."""
    recording = calls.material.recording
    requests = np.sort(counted(recording, calls.rows))
    rows = np.flatnonzero((recording.stage == stage) & np.isin(recording.root, requests))
    place = np.searchsorted(requests, recording.root[rows])
    return float(np.median(np.bincount(place, calls.material.own_ns[rows], len(requests)))) / 1e6


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
        return fit if isinstance(fit, Fit) else (name, float(np.median(cost_ms / items)))
    return None


def _in_words(cost: Fit | tuple[str, float]) -> str:
    if isinstance(cost, Fit):
        return f"{duration(cost.fixed_ms)} per call, plus {duration(cost.per_item_ms)} per unit of `{cost.size}`"
    name, each_ms = cost
    return f"{duration(each_ms)} per unit of `{name}`"
