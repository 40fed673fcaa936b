"""
From shares of time to a verdict, or to the reason why there is none.

Two shares decide: the part of the time in which the host waited for the GPU, and the part in which the GPU had nothing
to do. Where the evidence allows two readings that lead to different verdicts, there is none. Measures nothing itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from gpuscope.analysis._busy.known import SEVERAL_DEVICES
from gpuscope.analysis._busy.watched import share_of_others
from gpuscope.analysis._verdicts.advice import (
    ASK_THE_GPU,
    LARGER_STAGE,
    LOOK_INSIDE,
    MORE_CALLS,
    ONE_GPU,
    OWN_GPU,
    RECORD_MORE,
    SPLIT_HOST,
    SPLIT_KINDS,
    SPLIT_TASKS,
    SPLIT_WAIT,
    WITH_GPU,
)
from gpuscope.analysis._verdicts.findings import CPU_BOUND, GPU_BOUND, PIPELINE_BOUND, UNKNOWN
from gpuscope.analysis._verdicts.weigh import ANSWERS, MAX_HIDDEN, by_events, by_slope, hides_work, weigh

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope.analysis._verdicts.calls import CallsOfStage
    from gpuscope.analysis._verdicts.weigh import Weighed
    from gpuscope.analysis.recording import Recording

MIN_CALLS = 10
"""With fewer calls than this, warm-up and cold calls left out, there is no verdict."""
ENOUGH = 0.2
"""From this part of the time on, waiting or having nothing to do matters."""
AGREEMENT = 2 / 3
"""At least this part of the calls must, each alone, give the verdict that all give together."""
NEAR = 0.1
"""An interval no wider than this decides by its estimate, though it holds the boundary: both words are nearly right."""
_ALIKE = -NEAR / 2, 0.0, NEAR / 2
"""One call agrees with all where shares that differ by so little give the same verdict."""
MAX_UNPROVEN = 0.5
"""A verdict that says that the GPU had work needs proof for all of the time but this part."""
MAX_LOST = 0.01
"""A verdict bears this part of all stages missing from the files."""
MAX_OF_OTHERS = 0.05
"""A verdict bears this part of the GPU's time in which other processes worked on it, or may have."""
MIN_NS = 30_000
"""The two events of a stage cost the GPU 3 to 6 µs; of a shorter stage they are too large a part."""
Share: TypeAlias = "float | NDArray[np.float64]"
"""A part of 1, or a column of such parts."""


class Doubt(NamedTuple):
    """Why there is no verdict, as a sentence, and what would help."""

    because: str
    next_steps: tuple[str, ...]
    of_answers: bool = False
    """Whether it is about too few answers, so that there may be another witness."""


def decide(wait_share: Share, idle_share: Share) -> NDArray[np.str_]:
    """
    Return the verdict for two shares, or a column of verdicts for two columns of shares.

    A GPU that always has work sets the pace. A GPU that often has nothing to do, although the host hardly waits for it,
    is kept waiting by the host. If the host waits and the GPU has nothing to do, they take turns.
    """
    without_work = np.where(wait_share < ENOUGH, CPU_BOUND, PIPELINE_BOUND)
    return np.where(idle_share < ENOUGH, GPU_BOUND, without_work)


class Ruling(NamedTuple):
    """A verdict, or why there is none, and what it rests on."""

    verdict: str
    weighed: Weighed
    doubt: Doubt | None = None
    rests_on_pace: bool = False
    """Whether it takes for granted that the host does not wait for the GPU where it seems to set the pace."""


def rule(calls: CallsOfStage, doubt: Doubt | None = None) -> Ruling:
    """
    Return the verdict on some calls.

    Args:
        calls: Of one stage, or the requests of one kind.
        doubt: Why there can be none on anything, if so.

    """
    weighed = weigh(calls)
    doubt = doubt or doubt_about(calls)
    if doubt is not None:
        return _ruled(weighed, doubt)
    uncut, doubt = _doubt_about_segments(calls), _doubt_about_answers(weighed)
    if uncut is not None:
        # Events tell little of them. Answers tell what the GPU did, but not of each call alone, nor what the host did.
        decided = weighed.by == ANSWERS and _ambiguous(weighed) is None
        return _ruled(weighed, doubt if decided else uncut)
    if weighed.by == ANSWERS and doubt is not None and doubt.of_answers:
        # Too few answers do not take away what events tell without them.
        told = by_slope(calls, by_events(calls))
        told = told._replace(unclear=told.unclear + calls.kept_busy()[0])
        if weighed.idle_low <= told.idle <= weighed.idle_high and _ambiguous(told) is None:
            weighed, doubt = told, None
    return _ruled(weighed, doubt or _ambiguous(weighed) or _doubt_about_mixture(calls, weighed))


def _ruled(weighed: Weighed, doubt: Doubt | None) -> Ruling:
    if doubt is not None:
        return Ruling(UNKNOWN, weighed, doubt)
    return Ruling(str(decide(weighed.wait, weighed.idle)), weighed, None, rests_on_pace(weighed))


def rests_on_pace(weighed: Weighed) -> bool:
    """Return whether the verdict would change if the host waited for the GPU wherever it seems to set the pace."""
    wait, idle, paced = weighed.wait, weighed.idle, weighed.paced
    # By answers it is known what the GPU did then, and what the host did is not.
    asked = weighed.by == ANSWERS
    waiting = decide(wait + paced + weighed.unclear, idle) if asked else decide(wait + paced, idle - paced)
    return bool(decide(wait, idle) != waiting)


def doubt_about_all(recording: Recording) -> Doubt | None:
    """Return the doubt if so many stages are missing that no verdict can be relied on."""
    losses = recording.losses
    lost = sum(losses.dropped.values()) + sum(losses.lost.values()) + losses.orphans
    share = lost / max(1, lost + len(recording.stage))
    if share <= MAX_LOST:
        return None
    because = f"{lost:,} stages ({share:.1%}) are missing from the files, and their work would not show."
    return Doubt(because, (RECORD_MORE,))


def doubt_about(calls: CallsOfStage) -> Doubt | None:
    """Return why there can be no verdict on these calls, the strongest reason first."""
    count = len(calls.judged)
    if count and hides_work(calls):
        return Doubt(f"GPU work may be hidden: {calls.without_gpu_times()}.", (WITH_GPU,))
    if count < MIN_CALLS:
        return _too_few(count)
    if (others := _doubt_about_others(calls)) is not None:
        return others
    return _TOO_SHORT if np.median(calls.material.duration_ns[calls.judged]) < MIN_NS else None


def _doubt_about_others(calls: CallsOfStage) -> Doubt | None:
    """Return the doubt if other processes worked on the same GPU: their work is in these times, and does not show."""
    worked, unknown = share_of_others(calls.material.recording, calls.timed)
    if worked + unknown <= MAX_OF_OTHERS:
        return None
    if worked >= unknown:
        because = f"Another process worked on the same GPU for {worked:.0%} of the time, and what that did to these"
        return Doubt(f"{because} times does not show.", (OWN_GPU,))
    because = f"Another process was on the same GPU for {unknown:.0%} of the time; NVML cannot tell whether it worked."
    return Doubt(because, (OWN_GPU,))


def _doubt_about_segments(calls: CallsOfStage) -> Doubt | None:
    """Return why events do not tell what host and GPU did in these calls: their requests are not cut into segments."""
    evidence = calls.material.evidence
    if evidence.tangled[calls.judged].mean() > MAX_HIDDEN:
        because = (
            "Stages of a request run at the same time, as tasks or threads do, so it cannot be told which one the host "
            "is in."
        )
        return Doubt(because, (SPLIT_TASKS,))
    if (evidence.device[calls.judged] == SEVERAL_DEVICES).any():
        return Doubt("A request uses several GPUs, which are not judged together.", (ONE_GPU,))
    return None


def doubt_about_replayed(calls: CallsOfStage) -> Doubt | None:
    """Return why there can be no verdict on calls inside replays, of which there are GPU times alone."""
    count, timed = len(calls.judged), calls.timed
    if count < MIN_CALLS:
        return _too_few(count)
    if (others := _doubt_about_others(calls)) is not None:
        return others
    if len(timed) < (1 - MAX_HIDDEN) * count:
        return Doubt("Its GPU times cannot be placed.", (WITH_GPU,))
    recording = calls.material.recording
    if np.median(recording.gpu_end_ns[timed] - recording.gpu_start_ns[timed]) < MIN_NS:
        return _TOO_SHORT
    return None


_TOO_SHORT = Doubt(
    f"It is shorter than {MIN_NS / 1e6} ms, so its own two events are too much of what is measured.", (LARGER_STAGE,)
)


def _too_few(count: int) -> Doubt:
    calls = "call" if count == 1 else "calls"
    return Doubt(f"{count} {calls} besides warm-up and cold ones; a verdict needs at least {MIN_CALLS}.", (MORE_CALLS,))


def _doubt_about_answers(weighed: Weighed) -> Doubt | None:
    low, high = weighed.idle_low, weighed.idle_high
    if weighed.by != ANSWERS or high - low <= NEAR or decide(weighed.wait, low) == decide(weighed.wait, high):
        return None
    because = (
        f"The GPU had work for {1 - high:.0%} to {1 - low:.0%} of the time, as far as its answers tell: they are too "
        "few, too unlike from request to request, or of several streams, which may work together or in turn."
    )
    return Doubt(because, (MORE_CALLS, LOOK_INSIDE), of_answers=True)


def _ambiguous(weighed: Weighed) -> Doubt | None:
    wait, idle, unclear, unproven = weighed.wait, weighed.idle, weighed.unclear, weighed.unproven
    verdict = decide(wait, idle)
    if weighed.by == ANSWERS:
        # What the GPU did then is known, and what the host did is not.
        if verdict == decide(wait + unclear, idle):
            return None
        busy, may_wait = f"{1 - idle:.0%}", f"{unclear:.0%}"
        meanwhile = "meanwhile" if busy == may_wait else f"for {may_wait} of the time"
        return Doubt(
            f"The GPU had work for {busy} of the time; {meanwhile} the host either works or waits for that, and the "
            "stages do not show which.",
            (SPLIT_WAIT, LOOK_INSIDE),
        )
    if verdict != decide(wait + unclear, idle - unclear):
        return Doubt(
            f"For {unclear:.0%} of the time the host either works or waits for the GPU; the stages do not show which.",
            (SPLIT_WAIT, LOOK_INSIDE),
        )
    if verdict != decide(wait, idle - weighed.lags):
        return Doubt(
            f"For {weighed.lags:.0%} of the time the GPU, a little behind the launches, either has work all along or "
            "waits for each of them; the stages do not show which.",
            (ASK_THE_GPU, LOOK_INSIDE),
        )
    if verdict == GPU_BOUND and idle + unproven > MAX_UNPROVEN:
        return Doubt(
            f"The GPU has work for at least {1 - idle - unproven:.0%} of the time; for another {unproven:.0%} that "
            "depends on whether the host launches all along, or only after other work.",
            (ASK_THE_GPU, SPLIT_HOST),
        )
    return None


def _doubt_about_mixture(calls: CallsOfStage, weighed: Weighed) -> Doubt | None:
    """Return the doubt if the calls, each alone, do not give the verdict that all give together."""
    evidence, verdict = calls.material.evidence, decide(weighed.wait, weighed.idle)
    duration_ns = calls.material.duration_ns[calls.judged]
    open_ns = sum(each[calls.judged] for each in (evidence.paced_ns, evidence.unclear_ns, evidence.lags_ns))
    sure_ns = np.maximum(evidence.idle_ns[calls.judged] - open_ns, 0)
    open_ns = open_ns + evidence.unproven_ns[calls.judged]
    # What one call alone does not show is taken to be as it is in all of them.
    part = (weighed.idle * float(duration_ns.sum()) - float(sure_ns.sum())) / max(1.0, float(open_ns.sum()))
    idle_ns = sure_ns + min(1.0, max(0.0, part)) * open_ns
    wait, idle = evidence.wait_ns[calls.judged] / duration_ns, idle_ns / duration_ns
    agrees = [decide(wait + by, idle + at) == verdict for by in _ALIKE for at in _ALIKE]
    agreeing = float(np.any(agrees, axis=0).mean())
    if agreeing >= AGREEMENT:
        return None
    because = f"Its calls differ: taken together they are {verdict}, but only {agreeing:.0%} of them are on their own."
    return Doubt(because, (SPLIT_KINDS,))
