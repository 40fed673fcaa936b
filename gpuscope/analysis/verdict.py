"""
What bounds each stage and each kind of request, as far as stages alone can tell: `judge`.

Puts evidence, decision, figures and advice together. Never judges warm-up calls or late cold calls, and knows no stage
by its name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from gpuscope._data.batch import RowFlag
from gpuscope.analysis._busy import looked, watched
from gpuscope.analysis._structure.sizes import shape_of, sizes_in
from gpuscope.analysis._verdicts import stalled
from gpuscope.analysis._verdicts.advice import BETWEEN, LESS_IN_THE_GRAPH, advise, begin_with
from gpuscope.analysis._verdicts.answers import answer, because_of
from gpuscope.analysis._verdicts.calls import Material
from gpuscope.analysis._verdicts.cold import find_cold
from gpuscope.analysis._verdicts.decide import ENOUGH, doubt_about_all, doubt_about_replayed, rule
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
from gpuscope.analysis._verdicts.rhythm import rhythm_of
from gpuscope.analysis._verdicts.weigh import (
    ANSWERS,
    EVENTS,
    HOST_NOT_READY,
    asked,
    by_answers,
    by_events,
    gain_part,
    hides_work,
    idle_causes,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuscope.analysis._busy.looked import LookedAt
    from gpuscope.analysis._verdicts.calls import CallsOfStage
    from gpuscope.analysis._verdicts.decide import Doubt, Ruling
    from gpuscope.analysis._verdicts.rhythm import Rhythm
    from gpuscope.analysis._verdicts.weigh import Weighed
    from gpuscope.analysis.recording import Recording

Fields: TypeAlias = dict[str, Any]
"""Some fields of a verdict, by name. `Any`, because each has a type of its own, which the verdict's class states."""

NO_WAIT_INSIDE = "does not wait for the GPU inside"
WORK_TO_DO = "that the next request could have begun at once"


def judge(recording: Recording) -> Findings:
    """
    Return the verdicts on a recording: one per kind of request, and one per stage within each kind.

    `examples/reading-the-report.md` and `_verdicts.evidence` give the reasoning. An empty recording has no verdicts.
    """
    material = Material(recording, gather(recording), find_cold(recording), looked.looked_at(recording))
    doubt = doubt_about_all(recording)
    answers, requests, stages, whole = [], [], [], {}
    for calls in material.calls():  # Requests come before the stages in them.
        if calls.replayed and not calls.outermost:
            stages.append(_judge_replayed(calls, doubt))
        elif calls.outermost:
            request, ruling = _judge_requests(calls, doubt)
            requests.append(request)
            answers.append(answer(calls, request))
            whole[calls.kind] = calls, ruling.weighed
        else:
            fields, _ = _judge_calls(calls, doubt)
            stages.append(StageVerdict(**_no_more_than(fields, *whole[calls.kind])))
    return Findings(
        answers=tuple(answers),
        requests=tuple(requests),
        stages=tuple(stages),
        cold=material.cold.calls,
        notes=(*_notes(recording), *looked.sentences(_looks([*requests, *stages]))),
        no_gpu=_no_gpu(recording),
        top=tuple(_top(recording)),
    )


def _no_more_than(fields: Fields, requests: CallsOfStage, weighed: Weighed) -> Fields:
    """Return the fields of a stage, whose gain is not larger than what the requests gain where all stages are so."""
    if fields["gain_ms"] is None:
        return fields
    limit_ms = requests.gain_ms(gain_part(requests, fields["verdict"], weighed))
    gain_ms = min(fields["gain_ms"], limit_ms)
    return fields | {"gain_ms": gain_ms, "gain_share": gain_ms / (requests.material.request_ms(requests.kind) or 1.0)}


def _looks(verdicts: list[StageVerdict]) -> Iterator[tuple[str, str, LookedAt, tuple[float, float] | None]]:
    for each in verdicts:
        if each.looked is not None:
            yield each.root, each.name, each.looked, each.busy_range


def _no_gpu(recording: Recording) -> str:
    if not len(recording.stage) or (recording.stream >= 0).any():
        return ""
    if any(recording.losses.untimed.values()) or (recording.flags & (RowFlag.CAPTURED | RowFlag.GIVEN_UP)).any():
        return "No GPU times in this recording, although a GPU was in use: all times are the host's."
    return "No GPU in this recording: all times are the host's."


def _top(recording: Recording) -> Iterator[str]:
    """Yield what has to be known before any figure is read."""
    if recording.losses.not_kept:
        yield (
            "These are the requests that `keep` has kept, most of them slow; the service's usual ones, of "
            f"{recording.losses.not_kept:,} stages, are not here."
        )
    yield from stalled.stalls(recording)


def _notes(recording: Recording) -> Iterator[str]:
    losses = recording.losses.missing()
    for what, counts in (("dropped", losses.dropped), ("lost", losses.lost), ("without GPU times", losses.untimed)):
        if any(counts.values()):
            yield f"Stages {what}: " + ", ".join(f"{count:,} {reason}" for reason, count in counts.items()) + "."
    if losses.orphans:
        yield f"Stages whose outer stage is not in the files, treated as requests: {losses.orphans:,}."
    yield from watched.sentences(recording)
    yield from stalled.sentences(recording)


def _judge_calls(calls: CallsOfStage, doubt: Doubt | None) -> tuple[Fields, Ruling]:
    """Return the fields of a `StageVerdict`, and what they rest on."""
    ruling = rule(calls, doubt)
    verdict, doubt = ruling.verdict, ruling.doubt
    cost, no_cost = _cost(calls, verdict)
    gain_ms = None if doubt else calls.gain_ms(gain_part(calls, verdict, ruling.weighed))
    return {
        **_figures(calls),
        **_shares(calls, ruling.weighed),
        "verdict": verdict,
        "because": doubt.because if doubt else because_of(calls, ruling),
        "assumes": f"that it {NO_WAIT_INSIDE}" if ruling.rests_on_pace else None,
        "gain_ms": gain_ms,
        "gain_share": None if gain_ms is None else gain_ms / (calls.material.request_ms(calls.kind) or 1.0),
        "cost": cost,
        "no_cost": no_cost,
        "next_steps": doubt.next_steps if doubt else _advice(calls, ruling, cost),
    }, ruling


def _shares(calls: CallsOfStage, weighed: Weighed) -> Fields:
    """Return how the time divides, as far as it is known that the GPU was used at all."""
    busy, fields = asked(calls), dict.fromkeys(("busy_share", "busy_range"))
    if busy is not None:  # It is shown even where it is too wide to decide.
        answered = by_answers(calls, by_events(calls), busy)
        fields = {"busy_share": 1 - answered.idle, "busy_range": (1 - answered.idle_high, 1 - answered.idle_low)}
    fields |= {"answers": busy.answers if busy else 0, "answered_requests": busy.requests if busy else 0}
    if (seen := calls.material.looked.get((calls.root, calls.name))) is not None:
        copies = calls.share(calls.material.evidence.copy_ns)
        seen = replace(seen, agrees=looked.agree(seen, fields["busy_range"], copies))
    fields["looked"] = seen
    if not len(calls.timed):
        return {**fields, **dict.fromkeys(("wait_share", "idle_share")), "witness": EVENTS}
    return {
        "wait_share": weighed.wait,
        "idle_share": weighed.idle,
        **fields,
        "witness": weighed.by,
    }


def _judge_replayed(calls: CallsOfStage, doubt: Doubt | None) -> StageVerdict:
    """Return the verdict on a stage inside a graph. The host has no part in it: gpu-bound or unknown."""
    recording, doubt = calls.material.recording, doubt or doubt_about_replayed(calls)
    gpu_ms = calls.median_ms(recording.gpu_end_ns - recording.gpu_start_ns, timed=True)
    nothing = dict.fromkeys(("host_ms", "launch_to_start_ms", "lag_ms", "request_share"))
    nothing |= dict.fromkeys(("wait_share", "idle_share", "busy_share", "busy_range", "looked"))
    share, around = calls.share_of_caller(), calls.launched_by()
    because = f"It takes {share:.0%} of the time on the GPU of `{around}`, whose CUDA graph contains it."
    return StageVerdict(
        **(_figures(calls) | nothing | {"duration_ms": gpu_ms, "waits_for": None}),
        answers=0,
        answered_requests=0,
        witness=EVENTS,
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
    material, recording = calls.material, calls.material.recording
    host_ns = recording.host_end_ns - recording.host_start_ns
    return {
        "name": calls.name,
        "root": calls.root,
        "calls": len(calls.judged),
        "warmup_calls": int(calls.warmup.sum()),
        "cold_calls": len(calls.rows) - len(calls.judged) - int(calls.warmup.sum()),
        "duration_ms": calls.median_ms(material.duration_ns),
        "host_ms": calls.median_ms(host_ns),
        "gpu_ms": calls.median_ms(recording.gpu_end_ns - recording.gpu_start_ns, timed=True),
        "launch_to_start_ms": calls.median_ms(recording.gpu_start_ns - recording.host_start_ns, timed=True),
        "lag_ms": calls.median_ms(recording.gpu_end_ns - recording.host_end_ns, timed=True),
        "request_share": calls.requests.part(calls.rows, recording.host_start_ns, recording.host_end_ns),
        "waits_for": calls.waits_for(),
    }


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


def _advice(calls: CallsOfStage, ruling: Ruling, cost: Fit | None) -> tuple[str, ...]:
    evidence, attributes = calls.material.evidence, calls.material.recording.attributes
    return advise(
        ruling.verdict,
        waits=float(evidence.waits[calls.judged].sum()) / max(1, len(calls.requests.rows)),
        wait_share=ruling.weighed.wait,
        copy_share=calls.share(evidence.copy_ns),
        copies="bytes" in attributes.get(int(calls.judged[0]), {}),
        waits_for=calls.waits_for(),
        cost=cost,
    )


def _judge_requests(calls: CallsOfStage, doubt: Doubt | None) -> tuple[RequestVerdict, Ruling]:
    (fields, ruling), rhythm = _judge_calls(calls, doubt), rhythm_of(calls)
    idle = _idle(calls, ruling.weighed, fields["duration_ms"])
    slowest = next((cause.stage for cause in idle if cause.cause == HOST_NOT_READY), None)
    if fields["verdict"] == CPU_BOUND and slowest not in (None, calls.name):
        # Not where the GPU has nothing to do: where it has work that the host may wait for.
        waits = calls.kept_busy()[1] if ruling.weighed.by == ANSWERS else slowest
        fields["assumes"] = fields["assumes"] and f"that `{waits}` {NO_WAIT_INSIDE}"
        fields["next_steps"] = begin_with(str(slowest)), *fields["next_steps"][:1]
    if rhythm is not None and len(calls.timed):
        idle = sorted([*idle, rhythm.between], key=lambda cause: -cause.ms)
        if fields["verdict"] != UNKNOWN and rhythm.regular and rhythm.between.share >= ENOUGH:
            fields |= _bound_between(fields, rhythm)
    return RequestVerdict(**fields, idle=tuple(idle), period_ms=rhythm.period_ms if rhythm else None), ruling


def _idle(calls: CallsOfStage, weighed: Weighed, duration_ms: float) -> list[IdleCause]:
    """Return where inside a request the GPU has nothing to do, longest first; parts under 0.1 % are left out."""
    if not len(calls.timed) or hides_work(calls):
        return []  # Without GPU times, it is not known that the GPU had nothing to do.
    takes_ms = min(calls.material.request_ms(calls.kind), duration_ms)  # They differ where times run backwards.
    found = [
        IdleCause(cause=cause, stage=stage, ms=ns / calls.total_ns * takes_ms, share=ns / calls.total_ns)
        for (cause, stage), ns in idle_causes(calls, weighed).items()
    ]
    return sorted((cause for cause in found if cause.share >= 1 / 1000), key=lambda cause: -cause.ms)


def _bound_between(fields: Fields, rhythm: Rhythm) -> Fields:
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
        "gain_of": "period",
        "next_steps": (BETWEEN, *fields["next_steps"][:1]),
    }
