"""
How the time of some calls divides: how much the host waits, how much the GPU has no work, and who says so.

There are three witnesses. The *answers* of streams that were asked at random times are used where there are enough of
them, within what events prove. Without them, the *slope* of GPU intervals over host times tells, where host times vary,
whether the GPU had work all along while the host launched. Else it is *events* alone. Decides nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpuscope.analysis._busy.known import SEVERAL_DEVICES
from gpuscope.analysis._verdicts.evidence import Activity
from gpuscope.analysis._verdicts.findings import CPU_BOUND, GPU_BOUND

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from gpuscope.analysis._busy.estimate import Share
    from gpuscope.analysis._busy.slope import Slope
    from gpuscope.analysis._verdicts.calls import CallsOfStage

EVENTS, SLOPE, ANSWERS = "events", "slope", "answers"
WORTH_A_SLOPE = 0.05
"""A slope is asked where events leave at least this part of the time open."""
MAX_HIDDEN = 0.1
"""A verdict bears this part of the time without GPU times, and this part of the calls without segments."""
HOST_NOT_READY = "host not ready"
_CAUSES = {
    Activity.UNTIMED: "unclear",
    Activity.AHEAD: HOST_NOT_READY,
    Activity.WAITS: "waiting at a synchronisation",
    Activity.COPIES: "waiting for a copy",
    Activity.PACED: HOST_NOT_READY,
    Activity.UNCLEAR: "unclear",
    Activity.LAGS: "unclear",
}
"""Why the GPU has nothing to do in a segment of each kind, as far as events tell."""


class Weighed(NamedTuple):
    """Parts of the time of some calls, from 0 to 1."""

    by: str
    """The witness."""
    wait: float
    """The host is known to wait for the GPU or for a copy."""
    idle: float
    """The GPU has no work, as far as is known."""
    idle_low: float
    idle_high: float
    paced: float
    """The part of `idle` in which the host may wait for GPU work that does not show, though it seems to set the pace;
    by answers, time in which the GPU had work that the host may have waited for."""
    unclear: float = 0.0
    """The same where nothing tells whether it does."""
    lags: float = 0.0
    """The part of `idle` in which the GPU may have had work all along."""
    unproven: float = 0.0
    """Time not in `idle` in which the GPU may have had no work."""
    slope: Slope | None = None
    """That of the stage with most of the time that a slope told of."""


def weigh(calls: CallsOfStage) -> Weighed:
    """Return how the time of the judged calls divides, by the best witness there is."""
    events = by_events(calls)
    busy = asked(calls)
    return by_slope(calls, events) if busy is None else by_answers(calls, events, busy)


def hides_work(calls: CallsOfStage) -> bool:
    """Return whether too much of the calls has no GPU times."""
    timed = len(calls.timed) >= (1 - MAX_HIDDEN) * len(calls.judged)
    return not timed or calls.share(calls.material.evidence.untimed_ns) > MAX_HIDDEN


def asked(calls: CallsOfStage) -> Share | None:
    """Return how busy the GPU was, as its streams answered; None where work may be hidden, of which none was asked."""
    return None if hides_work(calls) else calls.busy


def by_events(calls: CallsOfStage) -> Weighed:
    """Return what events alone tell."""
    evidence = calls.material.evidence
    wait, idle, paced, unclear, lags, unproven = (
        calls.share(each)
        for each in (
            evidence.wait_ns,
            evidence.idle_ns,
            evidence.paced_ns,
            evidence.unclear_ns,
            evidence.lags_ns,
            evidence.unproven_ns,
        )
    )
    return Weighed(EVENTS, wait, idle, idle, idle, paced, unclear, lags, unproven)


def by_answers(calls: CallsOfStage, events: Weighed, busy: Share) -> Weighed:
    """Return what answers tell, within what events prove: the GPU has work while it is behind."""
    least = max(0.0, 1 - events.idle - events.unproven)
    low, high = max(busy.low, least), max(busy.high, least)
    share = min(max(busy.share, low), high)
    # The host can only have waited while the GPU had work. Of requests without segments nothing is known of it.
    evidence = calls.material.evidence
    blind = evidence.tangled | (evidence.device == SEVERAL_DEVICES)
    unclear_ns = np.where(blind, calls.material.duration_ns, evidence.open_unclear_ns)
    open_ns = np.where(blind, calls.material.duration_ns, evidence.open_ns)
    working = max(0.0, share - events.wait)
    unclear = min(calls.share(unclear_ns) + calls.kept_busy()[0], working)
    paced = min(calls.share(open_ns), working) - unclear
    return Weighed(ANSWERS, events.wait, 1 - share, 1 - high, 1 - low, max(0.0, paced), unclear)


def by_slope(calls: CallsOfStage, events: Weighed) -> Weighed:
    """Return what the slopes add to what events tell; that itself where they add nothing."""
    if events.lags + events.unproven < WORTH_A_SLOPE:
        return events
    weighed, most = events, 0.0
    evidence, total_ns = calls.material.evidence, max(1, calls.total_ns)
    for slope, segments in _slopes(calls):
        lags_ns = evidence.segment_idle_ns[segments] * (evidence.kind[segments] == Activity.LAGS)
        lags = float(lags_ns.sum()) / total_ns
        unproven = float(evidence.segment_unproven_ns[segments].sum()) / total_ns
        idle = weighed.idle - lags if slope.gpu_sets_the_pace else weighed.idle + unproven
        weighed = weighed._replace(
            by=SLOPE,
            idle=min(1.0, max(0.0, idle)),
            lags=max(0.0, weighed.lags - lags),
            unproven=max(0.0, weighed.unproven - unproven),
            slope=slope if lags + unproven > most else weighed.slope,
        )
        most = max(most, lags + unproven)
    return weighed._replace(idle_low=weighed.idle, idle_high=weighed.idle)


def _slopes(calls: CallsOfStage) -> Iterator[tuple[Slope, NDArray[np.int64]]]:
    """Yield the slope of each innermost stage in the calls that has one, and the segments of which it tells."""
    material, evidence = calls.material, calls.material.evidence
    recording, segments = material.recording, evidence.segments
    told = (evidence.kind == Activity.LAGS) | ((evidence.kind == Activity.AHEAD) & (evidence.segment_unproven_ns > 0))
    inside = np.zeros(len(recording.stage), np.bool_)
    inside[calls.within] = True
    chosen = np.flatnonzero(told & inside[segments.owner] & recording.leaf[segments.owner] & segments.one_stream)
    stages, usable = recording.stage[segments.owner[chosen]], recording.leaf & recording.measured
    for stage in np.unique(stages).tolist():
        # All calls, also those in which the GPU kept up: to choose by the outcome would bend the slope.
        rows = calls.within[(recording.stage[calls.within] == stage) & usable[calls.within]]
        slope = material.slope(rows)
        if slope is not None and (slope.gpu_sets_the_pace or slope.launches_set_the_pace):
            yield slope, chosen[stages == stage]


def gain_part(calls: CallsOfStage, verdict: str, weighed: Weighed) -> float:
    """Return the part of their time that calls which are bounded so could gain at most."""
    evidence, recording = calls.material.evidence, calls.material.recording
    if verdict == CPU_BOUND:
        return weighed.idle
    if verdict == GPU_BOUND:
        # The time that the host waited inside, and the work that the GPU still had when the host had gone on.
        own_ns = np.where(recording.measured, recording.gpu_end_ns - recording.gpu_start_ns, 0).clip(0)
        gain_ns = evidence.wait_ns + np.minimum(np.maximum(evidence.end_ns - recording.host_end_ns, 0), own_ns)
        hidden = weighed.paced + weighed.unclear if weighed.by == ANSWERS else 0.0
        return min(1.0, calls.share(np.minimum(gain_ns, calls.material.duration_ns)) + hidden)
    if weighed.by == EVENTS:
        return calls.share(np.minimum(evidence.wait_ns, evidence.idle_ns))
    return min(weighed.wait, weighed.idle)


def idle_causes(calls: CallsOfStage, weighed: Weighed) -> dict[tuple[str, str], int]:
    """Return the nanoseconds without GPU work in these requests, by cause and innermost stage."""
    if weighed.by == ANSWERS:
        return _by_answers(calls, weighed)
    evidence, chosen = calls.material.evidence, calls.segments()
    kind, idle_ns = evidence.kind.copy(), evidence.segment_idle_ns.copy()
    if weighed.by == SLOPE:
        for slope, segments in _slopes(calls):
            lags = kind[segments] == Activity.LAGS
            if slope.gpu_sets_the_pace:
                idle_ns[segments[lags]] = 0
            else:
                idle_ns[segments] += evidence.segment_unproven_ns[segments]
                kind[segments[lags]] = Activity.PACED
    return _added(calls, kind[chosen], evidence.segments.owner[chosen], idle_ns[chosen])


def _by_answers(calls: CallsOfStage, weighed: Weighed) -> dict[tuple[str, str], int]:
    """Divide the time without work by the answers that found none; a copy that the host waits for has its own."""
    recording, evidence, segments = calls.material.recording, calls.material.evidence, calls.segments()
    copies = segments[evidence.kind[segments] == Activity.COPIES]
    copies_ns = evidence.segment_idle_ns[copies]
    rows = calls.material.sampled.usable(calls.within)
    without = recording.samples[rows] - recording.had_work[rows]
    left_ns = max(0.0, weighed.idle * calls.total_ns - float(copies_ns.sum()))
    ns = without * (left_ns / max(1, int(without.sum())))
    kind = _longest_kind(calls)[rows]
    # Why is known now: the GPU had nothing to do, so the host was not waiting for it.
    kind[(kind == Activity.UNCLEAR) | (kind == Activity.LAGS) | (kind == Activity.UNTIMED)] = Activity.PACED
    return _added(
        calls,
        np.concatenate([kind, evidence.kind[copies]]),
        np.concatenate([rows, evidence.segments.owner[copies]]),
        np.concatenate([ns.astype(np.int64), copies_ns]),
    )


def _longest_kind(calls: CallsOfStage) -> NDArray[np.int8]:
    """Return for each row the kind of the longest segment that it owns."""
    evidence = calls.material.evidence
    order = np.argsort(evidence.segments.host_end_ns - evidence.segments.host_start_ns, kind="stable")
    longest = np.full(len(calls.material.recording.stage), Activity.PACED, np.int8)
    longest[evidence.segments.owner[order]] = evidence.kind[order]
    return longest


def _added(
    calls: CallsOfStage, kind: NDArray[np.int8], owner: NDArray[np.int64], ns: NDArray[np.int64]
) -> dict[tuple[str, str], int]:
    recording = calls.material.recording
    found: dict[tuple[str, str], int] = {}
    codes, place = np.unique(kind.astype(np.int64) * len(recording.names) + recording.stage[owner], return_inverse=True)
    total_ns = np.zeros(len(codes), np.int64)
    np.add.at(total_ns, place.ravel(), ns)
    for code, idle_ns in zip(codes.tolist(), total_ns.tolist(), strict=True):
        each, stage = divmod(code, len(recording.names))
        key = _CAUSES[Activity(each)], recording.names[stage]
        found[key] = found.get(key, 0) + idle_ns
    return found
