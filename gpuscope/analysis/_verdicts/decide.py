"""
From shares of time to a verdict, or to the reason why there is none.

Two shares decide: how much of the time the host waited for the GPU, and how much of it the GPU had nothing to do. Where
the evidence bears two readings that lead to different verdicts, there is none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpuscope.analysis._verdicts.advice import (
    LARGER_STAGE,
    LOOK_INSIDE,
    MORE_CALLS,
    ONE_GPU,
    RECORD_MORE,
    SPLIT_HOST,
    SPLIT_KINDS,
    SPLIT_TASKS,
    SPLIT_WAIT,
    WITH_GPU,
)
from gpuscope.analysis._verdicts.evidence import SEVERAL_DEVICES
from gpuscope.analysis._verdicts.findings import CPU_BOUND, GPU_BOUND, PIPELINE_BOUND

if TYPE_CHECKING:
    from gpuscope.analysis._verdicts.calls import CallsOfStage
    from gpuscope.analysis.recording import Recording

MIN_CALLS = 10
"""Calls, without warm-up and cold ones, below which there is no verdict."""
ENOUGH = 0.2
"""The part of the time from which on waiting, or having nothing to do, matters."""
AGREEMENT = 2 / 3
"""The part of the calls that must each give the verdict that they give together."""
MAX_UNPROVEN = 0.5
"""The part of the time for which it may be open whether the GPU had work, in a verdict that says it had."""
MAX_HIDDEN = 0.1
"""The part of the time without GPU times, or of the calls without segments, that a verdict bears."""
MAX_LOST = 0.01
"""The part of all stages that may be missing from the files."""
MIN_NS = 30_000
"""The two events of a stage cost the GPU 3 to 6 µs: a shorter stage measures those."""


class Doubt(NamedTuple):
    """Why there is no verdict, in a sentence, and what would help."""

    because: str
    next_steps: tuple[str, ...]


def decide(wait_share: Any, idle_share: Any) -> Any:
    """
    Return the verdict of two shares, or of two columns of them.

    A GPU that always has work sets the pace. One that has not, while the host hardly waits for it, is kept waiting by
    the host. Where the host waits and the GPU has nothing to do, they take turns.
    """
    verdict = np.where(wait_share < ENOUGH, CPU_BOUND, PIPELINE_BOUND)
    return np.where(idle_share < ENOUGH, GPU_BOUND, verdict)


def rests_on_pace(calls: CallsOfStage) -> bool:
    """Return whether the verdict would be another if the host waited for the GPU wherever it seems to set the pace."""
    evidence = calls.material.evidence
    wait, idle, paced = (calls.share(each) for each in (evidence.wait_ns, evidence.idle_ns, evidence.paced_ns))
    return bool(decide(wait, idle) != decide(wait + paced, idle - paced))


def doubt_about_all(recording: Recording) -> Doubt | None:
    """Return the doubt where so many stages are missing that no verdict can be relied on."""
    losses = recording.losses
    lost = sum(losses.dropped.values()) + sum(losses.lost.values()) + losses.orphans
    share = lost / max(1, lost + len(recording.stage))
    if share <= MAX_LOST:
        return None
    return Doubt(f"{lost:,} stages ({share:.1%}) are missing from the files, and may hide work.", (RECORD_MORE,))


def doubt_about(calls: CallsOfStage) -> Doubt | None:
    """Return why there can be no verdict on these calls, the strongest reason first."""
    evidence, count = calls.material.evidence, len(calls.judged)
    timed = len(calls.timed) >= (1 - MAX_HIDDEN) * count and calls.share(evidence.untimed_ns) <= MAX_HIDDEN
    if count and not timed:
        return Doubt(f"GPU work may be hidden: {calls.without_gpu_times()}.", (WITH_GPU,))
    if count < MIN_CALLS:
        return Doubt(f"{count} calls besides warm-up and cold ones, of at least {MIN_CALLS}.", (MORE_CALLS,))
    if evidence.tangled[calls.judged].mean() > MAX_HIDDEN:
        because = "Stages of a request run at the same time, as tasks or threads: where the host is cannot be told."
        return Doubt(because, (SPLIT_TASKS,))
    if (evidence.device[calls.judged] == SEVERAL_DEVICES).any():
        return Doubt("A request uses several GPUs, which are not judged together.", (ONE_GPU,))
    if np.median(calls.material.duration_ns[calls.judged]) < MIN_NS:
        return Doubt(f"It is shorter than {MIN_NS / 1e6} ms, so that its events are what is measured.", (LARGER_STAGE,))
    return _ambiguous(calls)


def doubt_about_replayed(calls: CallsOfStage) -> Doubt | None:
    """Return why nothing can be said about calls inside replays, of which the GPU's own times are all there is."""
    count, timed = len(calls.judged), calls.timed
    if count < MIN_CALLS:
        return Doubt(f"{count} calls besides warm-up and cold ones, of at least {MIN_CALLS}.", (MORE_CALLS,))
    if len(timed) < (1 - MAX_HIDDEN) * count:
        return Doubt("Its GPU times cannot be placed.", (WITH_GPU,))
    recording = calls.material.recording
    if np.median(recording.gpu_end_ns[timed] - recording.gpu_start_ns[timed]) < MIN_NS:
        return Doubt(f"It is shorter than {MIN_NS / 1e6} ms, so that its events are what is measured.", (LARGER_STAGE,))
    return None


def _ambiguous(calls: CallsOfStage) -> Doubt | None:
    evidence = calls.material.evidence
    wait, idle, unclear, unproven = (
        calls.share(each) for each in (evidence.wait_ns, evidence.idle_ns, evidence.unclear_ns, evidence.unproven_ns)
    )
    verdict = decide(wait, idle)
    if verdict != decide(wait + unclear, idle - unclear):
        return Doubt(
            f"For {unclear:.0%} of the time the host either works or waits for the GPU; the stages do not show which.",
            (SPLIT_WAIT, LOOK_INSIDE),
        )
    if verdict == GPU_BOUND and idle + unproven > MAX_UNPROVEN:
        return Doubt(
            f"The GPU has work for {1 - idle - unproven:.0%} of the time at least; for {unproven:.0%} it depends on "
            "when the host launches: all along, or after other work.",
            (SPLIT_HOST, LOOK_INSIDE),
        )
    duration_ns = calls.material.duration_ns[calls.judged]
    each = decide(evidence.wait_ns[calls.judged] / duration_ns, evidence.idle_ns[calls.judged] / duration_ns)
    agreeing = float((each == verdict).mean())
    if agreeing < AGREEMENT:
        return Doubt(f"Its calls differ: {verdict} together, but only {agreeing:.0%} of them alone.", (SPLIT_KINDS,))
    return None
