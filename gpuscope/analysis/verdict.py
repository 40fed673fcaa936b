"""
What bounds each stage and each kind of request, as far as stages alone can tell: `judge`.

Puts evidence, decision, figures and advice together. Never judges warm-up calls or late cold calls, and knows no stage
by its name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from gpuscope.analysis._verdicts.advice import BETWEEN, LESS_IN_THE_GRAPH, advise, begin_with
from gpuscope.analysis._verdicts.calls import HOST_NOT_READY, Material
from gpuscope.analysis._verdicts.cold import MAD_TO_SIGMA, find_cold
from gpuscope.analysis._verdicts.decide import (
    ENOUGH,
    MIN_CALLS,
    decide,
    doubt_about,
    doubt_about_all,
    doubt_about_replayed,
    rests_on_pace,
)
from gpuscope.analysis._verdicts.evidence import gather
from gpuscope.analysis._verdicts.findings import (
    CPU_BOUND,
    GPU_BOUND,
    PIPELINE_BOUND,
    UNKNOWN,
    Findings,
    IdleCause,
    RequestVerdict,
    StageVerdict,
)
from gpuscope.analysis._verdicts.fit import Fit, fit_cost
from gpuscope.analysis._verdicts.sizes import shape_of, sizes_in

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuscope.analysis._verdicts.calls import CallsOfStage
    from gpuscope.analysis._verdicts.decide import Doubt
    from gpuscope.analysis.recording import Recording

Fields: TypeAlias = dict[str, Any]
"""Some fields of a verdict, by name. `Any`, because each has a type of its own, which the verdict's class states."""

REGULAR = 0.25
"""Up to this robust deviation over median of the gaps between requests, the program makes them, not its clients."""
NO_WAIT_INSIDE = "does not wait for the GPU inside"
WORK_TO_DO = "that the next request could have begun at once"


def judge(recording: Recording) -> Findings:
    """
    Return the verdicts on a recording: one per kind of request, and one per stage within each kind.

    `examples/reading-the-report.md` and `_verdicts.evidence` give the reasoning. An empty recording has no verdicts.
    """
    material = Material(recording, gather(recording), find_cold(recording))
    doubt = doubt_about_all(recording)
    requests, stages = [], []
    for calls in material.calls():
        if calls.replayed and not calls.outermost:
            stages.append(_judge_replayed(calls, doubt))
        elif calls.outermost:
            requests.append(_judge_requests(calls, doubt))
        else:
            stages.append(StageVerdict(**_judge_calls(calls, doubt)))
    return Findings(
        requests=tuple(requests), stages=tuple(stages), cold=material.cold.calls, notes=tuple(_notes(recording))
    )


def _notes(recording: Recording) -> Iterator[str]:
    losses = recording.losses
    for what, counts in (("dropped", losses.dropped), ("lost", losses.lost), ("without GPU times", losses.untimed)):
        if any(counts.values()):
            yield f"Stages {what}: " + ", ".join(f"{count:,} {reason}" for reason, count in counts.items()) + "."
    if losses.orphans:
        yield f"Stages whose outer stage is not in the files, treated as requests: {losses.orphans:,}."
    if len(recording.stage) and (recording.stream < 0).all():
        yield "No GPU times at all: nothing can be said about the GPU."


def _judge_calls(calls: CallsOfStage, doubt: Doubt | None) -> Fields:
    """Return the fields of a `StageVerdict`."""
    evidence = calls.material.evidence
    doubt = doubt or doubt_about(calls)
    verdict = UNKNOWN if doubt else str(decide(calls.share(evidence.wait_ns), calls.share(evidence.idle_ns)))
    cost, no_cost = _cost(calls, verdict)
    gain_ns = None if doubt else _gain_ns(calls, verdict)
    return {
        **_figures(calls),
        "verdict": verdict,
        "because": doubt.because if doubt else _because(calls, verdict),
        "assumes": f"that it {NO_WAIT_INSIDE}" if not doubt and rests_on_pace(calls) else None,
        "gain_ms": None if gain_ns is None else gain_ns / len(calls.requests) / 1e6,
        "gain_share": None if gain_ns is None else gain_ns / calls.requests_ns,
        "cost": cost,
        "no_cost": no_cost,
        "next_steps": doubt.next_steps if doubt else _advice(calls, verdict, cost),
    }


def _judge_replayed(calls: CallsOfStage, doubt: Doubt | None) -> StageVerdict:
    """Return the verdict on a stage inside a graph. The host has no part in it: gpu-bound or unknown."""
    recording, doubt = calls.material.recording, doubt or doubt_about_replayed(calls)
    gpu_ms = calls.median_ms(recording.gpu_end_ns - recording.gpu_start_ns, timed=True)
    nothing = dict.fromkeys(("host_ms", "launch_to_start_ms", "lag_ms", "wait_share", "idle_share", "request_share"))
    share, around = calls.share_of_caller(), calls.launched_by()
    because = f"It takes {share:.0%} of the time on the GPU of `{around}`, whose CUDA graph contains it."
    return StageVerdict(
        **(_figures(calls) | nothing | {"duration_ms": gpu_ms, "waits_for": None}),
        verdict=UNKNOWN if doubt else GPU_BOUND,
        because=doubt.because if doubt else because,
        assumes=None,
        gain_ms=None,
        gain_share=None,
        cost=None,
        no_cost="it runs inside a CUDA graph, where every call is given the same amount of work",
        next_steps=doubt.next_steps if doubt else (LESS_IN_THE_GRAPH,),
    )


def _figures(calls: CallsOfStage) -> Fields:
    material, recording, evidence = calls.material, calls.material.recording, calls.material.evidence
    host_ns = recording.host_end_ns - recording.host_start_ns
    return {
        "name": calls.name,
        "root": calls.root,
        "calls": len(calls.judged),
        "warmup_calls": int(recording.around_warmup[calls.rows].sum()),
        "cold_calls": int((material.cold.rows & ~recording.around_warmup)[calls.rows].sum()),
        "duration_ms": calls.median_ms(material.duration_ns),
        "host_ms": calls.median_ms(host_ns),
        "gpu_ms": calls.median_ms(recording.gpu_end_ns - recording.gpu_start_ns, timed=True),
        "launch_to_start_ms": calls.median_ms(recording.gpu_start_ns - recording.host_start_ns, timed=True),
        "lag_ms": calls.median_ms(recording.gpu_end_ns - recording.host_end_ns, timed=True),
        "wait_share": calls.share(evidence.wait_ns) if len(calls.timed) else None,
        "idle_share": calls.share(evidence.idle_ns) if len(calls.timed) else None,
        "request_share": float(host_ns[calls.judged].sum()) / calls.requests_ns if len(calls.judged) else None,
        "waits_for": calls.waits_for(),
    }


def _gain_ns(calls: CallsOfStage, verdict: str) -> float:
    evidence, recording, rows = calls.material.evidence, calls.material.recording, calls.judged
    wait_ns, idle_ns = evidence.wait_ns[rows], evidence.idle_ns[rows]
    if verdict == GPU_BOUND:
        # The time that the host waited inside, and the work that the GPU still had when the host had gone on.
        own_ns = np.where(recording.measured, recording.gpu_end_ns - recording.gpu_start_ns, 0)[rows]
        gain_ns = wait_ns + np.minimum(np.maximum(evidence.end_ns - recording.host_end_ns, 0)[rows], own_ns)
    else:
        gain_ns = idle_ns if verdict == CPU_BOUND else np.minimum(wait_ns, idle_ns)
    return float(np.minimum(gain_ns, calls.material.duration_ns[rows]).sum())


def _because(calls: CallsOfStage, verdict: str) -> str:
    evidence = calls.material.evidence
    wait, idle, copy, unproven = (
        calls.share(each) for each in (evidence.wait_ns, evidence.idle_ns, evidence.copy_ns, evidence.unproven_ns)
    )
    waits_for = calls.waits_for()
    work = f"the work of `{waits_for}`" if waits_for else "earlier work"
    if verdict == CPU_BOUND:
        return (
            f"The GPU keeps up with the host: for {idle:.0%} of the time it has nothing to do, or waits for launches."
        )
    if verdict == PIPELINE_BOUND:
        what = "a copy" if copy >= wait / 2 else work
        return (
            f"Host and GPU take turns: for {wait:.0%} of the time the host waits for {what}, and for {idle:.0%} "
            "the GPU has nothing else to do."
        )
    least, most = f"{100 * (1 - idle - unproven):.0f}", f"{1 - idle:.0%}"
    busy = f"The GPU has work for {most if f'{least}%' == most else f'{least} to {most}'} of the time"
    return (
        f"{busy}; for {wait:.0%} the host waits for {work}." if wait >= ENOUGH else f"{busy}, and is behind the host."
    )


def _cost(calls: CallsOfStage, verdict: str) -> tuple[Fit | None, str]:
    """Return (cost per call and per item, why there is none): of the GPU if that is the bottleneck, else the host."""
    recording, rows = calls.material.recording, calls.timed if verdict == GPU_BOUND else calls.judged
    sizes = [sizes_in(shape_of(recording, row)) for row in rows.tolist()]
    names = sorted(set().union(*sizes))
    if verdict == GPU_BOUND:
        cost_ms = (recording.gpu_end_ns - recording.gpu_start_ns)[rows] / 1e6
    else:
        cost_ms = (recording.host_end_ns - recording.host_start_ns)[rows] / 1e6
    refused = []
    for name in names:
        given = np.array([name in each for each in sizes])
        fit = fit_cost(name, np.array([each[name] for each in sizes if name in each]), cost_ms[given])
        if isinstance(fit, Fit):
            return fit, ""
        refused.append(fit)
    return None, "; ".join(refused) or "no attribute says how much work it is given (`batch_size`, `tokens`, `bytes`)"


def _advice(calls: CallsOfStage, verdict: str, cost: Fit | None) -> tuple[str, ...]:
    evidence, attributes = calls.material.evidence, calls.material.recording.attributes
    return advise(
        verdict,
        waits=float(evidence.waits[calls.judged].sum()) / len(calls.requests),
        wait_share=calls.share(evidence.wait_ns),
        copy_share=calls.share(evidence.copy_ns),
        copies="bytes" in attributes.get(int(calls.judged[0]), {}),
        waits_for=calls.waits_for(),
        cost=cost,
    )


def _judge_requests(calls: CallsOfStage, doubt: Doubt | None) -> RequestVerdict:
    fields, idle, rhythm = _judge_calls(calls, doubt), _idle(calls), _rhythm(calls)
    slowest = next((cause.stage for cause in idle if cause.cause == HOST_NOT_READY), None)
    if fields["verdict"] == CPU_BOUND and slowest not in (None, calls.name):
        fields["assumes"] = f"that `{slowest}` {NO_WAIT_INSIDE}"
        fields["next_steps"] = begin_with(str(slowest)), *fields["next_steps"][:1]
    if rhythm is not None and len(calls.timed):
        idle = sorted([*idle, rhythm.between], key=lambda cause: -cause.ms)
        if fields["verdict"] != UNKNOWN and rhythm.regular and rhythm.between.share >= ENOUGH:
            fields |= _bound_between(fields, rhythm)
    return RequestVerdict(**fields, idle=tuple(idle), period_ms=rhythm.period_ms if rhythm else None)


def _idle(calls: CallsOfStage) -> list[IdleCause]:
    """Return where inside a request the GPU has nothing to do, longest first; parts under 0.1 % are left out."""
    if not len(calls.timed):
        return []  # Without GPU times, it is not known that the GPU had nothing to do.
    found = [
        IdleCause(cause=cause, stage=stage, ms=ns / len(calls.judged) / 1e6, share=ns / calls.total_ns)
        for (cause, stage), ns in calls.idle_causes().items()
    ]
    return sorted((cause for cause in found if cause.share >= 1 / 1000), key=lambda cause: -cause.ms)


class _Rhythm(NamedTuple):
    """Requests of one kind that follow each other on a thread, and what is between them."""

    between: IdleCause
    regular: bool
    """Whether the gaps are so alike that the program must make them."""
    period_ms: float
    """Median."""
    gain_ms: float
    """What would be saved at most if the gap's work went on during the request."""
    gain_share: float


def _rhythm(calls: CallsOfStage) -> _Rhythm | None:
    """Return the rhythm of the requests that are followed by another; None without any."""
    evidence, recording = calls.material.evidence, calls.material.recording
    rows = calls.judged[evidence.gap_ns[calls.judged] >= 0]
    if not len(rows):
        return None
    host_ns = recording.host_end_ns[rows] - recording.host_start_ns[rows]
    gap_ns, idle_ns = evidence.gap_ns[rows], evidence.gap_idle_ns[rows]
    period_ns = np.maximum(host_ns + gap_ns, 1)
    gap, mean_ns = float(np.median(gap_ns)), float(period_ns.mean())
    deviation = MAD_TO_SIGMA * float(np.median(np.abs(gap_ns - gap)))
    idle_share = float(idle_ns.mean()) / mean_ns
    gain_ns = float(np.minimum(idle_ns, host_ns).mean())
    return _Rhythm(
        between=IdleCause(cause="between requests", stage=None, ms=float(idle_ns.mean()) / 1e6, share=idle_share),
        regular=len(rows) >= MIN_CALLS and deviation <= REGULAR * gap,
        period_ms=float(np.median(period_ns)) / 1e6,
        gain_ms=gain_ns / 1e6,
        gain_share=gain_ns / mean_ns,
    )


def _bound_between(fields: Fields, rhythm: _Rhythm) -> Fields:
    """Return the fields that change in the verdict on requests if the time between them is the bottleneck."""
    return {
        "verdict": PIPELINE_BOUND,
        "because": (
            "Between requests, in gaps of much the same length, the GPU has nothing to do for "
            f"{rhythm.between.share:.0%} of the time from one to the next. Within a request: {fields['verdict']}. "
            f"{fields['because']}"
        ),
        "assumes": WORK_TO_DO,
        "gain_ms": rhythm.gain_ms,
        "gain_share": rhythm.gain_share,
        "next_steps": (BETWEEN, *fields["next_steps"][:1]),
    }
