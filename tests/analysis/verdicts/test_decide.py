"""The rules of a verdict, each at its threshold: which shares mean what, and what makes an answer unknown."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from gpuscope.analysis._busy.estimate import Share
from gpuscope.analysis._busy.known import SEVERAL_DEVICES
from gpuscope.analysis._verdicts.decide import (
    decide,
    doubt_about_all,
    doubt_about_replayed,
    rests_on_pace,
    rule,
)
from gpuscope.analysis._verdicts.weigh import ANSWERS, EVENTS, Weighed
from gpuscope.analysis.recording import Losses

from ..recordings import Stage, recording


class Calls:
    """Calls of one stage that are all alike, with each kind of time as a part of their duration."""

    def __init__(
        self,
        count=20,
        *,
        timed=None,
        tangled=0,
        several=0,
        ns=100_000,
        gpu_ns=100_000,
        busy=None,
        kept_busy=0.0,
        **parts,
    ):
        """Make the columns; `parts` has a number for all calls, or one for each."""
        duration_ns = np.full(count, ns)
        names = ("wait", "idle", "unclear", "unproven", "untimed", "paced", "lags", "open", "open_unclear", "copy_idle")
        columns = {f"{name}_ns": np.broadcast_to(parts.get(name, 0.0), count) * duration_ns for name in names}
        device = np.zeros(count, np.int64)
        device[:several] = SEVERAL_DEVICES
        nothing = np.zeros(0, np.int64)
        segments = SimpleNamespace(owner=nothing, one_stream=nothing.astype(bool))
        columns |= {"kind": nothing, "segments": segments, "segment_unproven_ns": nothing}
        evidence = SimpleNamespace(**columns, tangled=np.arange(count) < tangled, device=device)
        times = SimpleNamespace(
            gpu_start_ns=np.full(count, 10**9),
            gpu_end_ns=np.full(count, 10**9 + gpu_ns),
            stage=np.zeros(count, np.int64),
            leaf=np.ones(count, bool),
            measured=np.ones(count, bool),
            gpus=(),
        )
        self.total_ns, self.within, self.busy = count * ns, np.arange(count), busy
        self.material = SimpleNamespace(evidence=evidence, duration_ns=duration_ns, recording=times)
        self.judged = np.arange(count)
        self.timed = self.judged[: count if timed is None else timed]
        self.kept_busy = lambda: (kept_busy, None)

    def share(self, value_ns):
        """Return a column of times as a part of the durations."""
        total_ns = self.material.duration_ns.sum()
        return float(value_ns.sum() / total_ns) if total_ns else 0.0

    def without_gpu_times(self):
        """Say why."""
        return "for a reason"


def because(calls):
    """The doubt about some calls, as text."""
    doubt = rule(calls).doubt
    return "" if doubt is None else doubt.because


@pytest.mark.parametrize(
    ("wait", "idle", "verdict"),
    [
        (0.0, 0.0, "gpu-bound"),
        (0.9, 0.19, "gpu-bound"),
        (0.19, 0.2, "cpu-bound"),
        (0.2, 0.2, "pipeline-bound"),
    ],
)
def test_a_fifth_of_the_time_matters(wait, idle, verdict):
    """A GPU with work, or else a host that does not wait, or else both in turn."""
    assert decide(wait, idle) == verdict
    assert decide(np.array([wait]), np.array([idle])).tolist() == [verdict]


@pytest.mark.parametrize(
    ("wait", "idle", "paced", "rests"),
    [
        (0.0, 0.5, 0.1, False),
        (0.1, 0.5, 0.15, True),  # The host would wait for a quarter of the time.
        (0.0, 0.3, 0.15, True),  # The GPU would have work for all but an eighth.
        (0.1, 0.1, 0.1, False),
        (0.3, 0.5, 0.2, False),
    ],
)
def test_a_verdict_rests_on_the_pace_where_it_would_be_another_one(wait, idle, paced, rests):
    """If the host waited wherever it seems to set the pace: more waiting, and less time without work."""
    assert rests_on_pace(Weighed(EVENTS, wait, idle, idle, idle, paced)) is rests
    # By answers, the GPU is known to have had no work in all of that.
    by_answers = Weighed(ANSWERS, wait, idle, idle, idle, paced)
    assert rests_on_pace(by_answers) is (idle >= 0.2 and wait < 0.2 <= wait + paced)


@pytest.mark.parametrize(
    ("wait", "idle", "unclear", "known"),
    [
        (0.0, 0.5, 0.19, True),
        (0.0, 0.5, 0.21, False),  # It may be waiting for more than a fifth: they would take turns.
        (0.05, 0.3, 0.12, False),  # The GPU may have work for more than four fifths.
        (0.05, 0.3, 0.09, True),
        (0.0, 0.15, 0.15, True),
        (0.5, 0.5, 0.29, True),
        (0.5, 0.5, 0.35, False),
    ],
)
def test_time_that_may_be_waiting_is_a_doubt_where_it_decides(wait, idle, unclear, known):
    """Both as waiting of the host and as work of the GPU."""
    doubt = because(Calls(wait=wait, idle=idle, unclear=unclear))
    assert doubt.startswith("" if known else f"For {unclear:.0%} of the time the host either works or waits")
    assert bool(doubt) is not known


@pytest.mark.parametrize(("idle", "unproven", "known"), [(0.1, 0.39, True), (0.1, 0.41, False), (0.3, 0.6, True)])
def test_that_the_gpu_has_work_needs_proof_for_half_of_the_time(idle, unproven, known):
    """A verdict that says something else does not rest on it."""
    doubt = because(Calls(idle=idle, unproven=unproven))
    assert bool(doubt) is not known
    if not known:
        assert doubt.startswith("The GPU has work for at least 49% of the time; for another 41% that depends")


@pytest.mark.parametrize(("lags", "known"), [(0.29, True), (0.31, False), (0.0, True)])
def test_a_gpu_that_lags_behind_launches_is_a_doubt_where_it_decides(lags, known):
    """It may have had work all along, or have waited for each launch."""
    doubt = because(Calls(idle=0.5, lags=lags))
    assert bool(doubt) is not known
    assert doubt.startswith("" if known else "For 31% of the time the GPU, a little behind the launches, either")


@pytest.mark.parametrize(
    ("share", "low", "high", "verdict", "by"),
    [
        (0.99, 0.97, 1.0, "gpu-bound", ANSWERS),
        (0.26, 0.23, 0.29, "cpu-bound", ANSWERS),
        (0.85, 0.81, 1.0, "gpu-bound", ANSWERS),
        (0.85, 0.76, 0.86, "gpu-bound", ANSWERS),  # No wider than a tenth: what is likely.
        (0.79, 0.76, 0.86, "cpu-bound", ANSWERS),
        (0.85, 0.75, 0.9, "unknown", ANSWERS),  # Too wide, and the events alone do not tell either.
        (0.5, 0.1, 0.79, "cpu-bound", ANSWERS),
    ],
)
def test_answers_decide_where_their_interval_is_on_one_side(share, low, high, verdict, by):
    """Of time that may be waiting, and of a GPU that lags behind; else the verdict is left to other witnesses."""
    ruling = rule(Calls(idle=0.9, unclear=0.5, lags=0.3, busy=Share(share, low, high, 400, 40)))
    assert (ruling.verdict, ruling.weighed.by) == (verdict, by)
    if verdict == "unknown":
        assert ruling.doubt.because.startswith("The GPU had work for 75% to 90% of the time, as far as its answers")


def test_too_few_answers_leave_what_events_tell():
    """A recording is judged no worse for a handful of answers."""
    ruling = rule(Calls(idle=0.9, busy=Share(0.5, 0.1, 0.9, 12, 10)))
    assert (ruling.verdict, ruling.weighed.by) == ("cpu-bound", EVENTS)


def test_what_events_tell_is_not_taken_where_even_few_answers_exclude_it():
    """Else one page says that the GPU has nothing to do for 90 %, and that it had work for 30 % at least."""
    ruling = rule(Calls(idle=0.9, busy=Share(0.6, 0.3, 0.9, 12, 10)))
    assert (ruling.verdict, ruling.weighed.by) == ("unknown", ANSWERS)
    assert ruling.doubt.because.startswith("The GPU had work for 30% to 90% of the time")


def test_what_events_tell_is_not_taken_of_stages_that_kept_the_gpu_busy():
    """The host seems to set the pace in them, and may have waited."""
    busy = Share(0.7, 0.5, 1.0, 400, 40)
    assert rule(Calls(idle=0.4, paced=0.4, busy=busy)).verdict == "cpu-bound"
    ruling = rule(Calls(idle=0.4, paced=0.4, kept_busy=0.3, busy=busy))
    assert (ruling.verdict, ruling.weighed.by) == ("unknown", ANSWERS)


@pytest.mark.parametrize(
    ("busy", "parts", "verdict"),
    [
        (0.35, {"open": 1.0, "open_unclear": 1.0}, "unknown"),  # It may have waited for all of that work.
        (0.35, {"open": 0.3, "open_unclear": 0.19}, "cpu-bound"),
        (0.15, {"open": 1.0, "open_unclear": 1.0}, "cpu-bound"),  # It cannot have waited for a fifth of the time.
        (0.95, {"open": 1.0, "open_unclear": 1.0}, "gpu-bound"),
        (0.5, {"open": 1.0, "open_unclear": 1.0, "wait": 0.3}, "pipeline-bound"),
        (0.7, {"open": 1.0, "kept_busy": 0.7}, "unknown"),
        (0.35, {"tangled": 20}, "unknown"),
        (0.35, {"several": 20}, "unknown"),
        (0.15, {"tangled": 20}, "cpu-bound"),
        (0.95, {"several": 20}, "gpu-bound"),
    ],
)
def test_answers_do_not_say_what_the_host_did_while_the_gpu_had_work(busy, parts, verdict):
    """Where nothing shows whether it waited, there is a verdict only if it is the same either way."""
    ruling = rule(Calls(busy=Share(busy, busy - 0.02, busy + 0.02, 4000, 400), **({"idle": 1.0, "paced": 1.0} | parts)))
    assert ruling.verdict == verdict
    if "open" in parts and verdict == "unknown":
        words = f"The GPU had work for {busy:.0%} of the time; meanwhile the host either works or waits for that"
        assert ruling.doubt.because.startswith(words)


def test_answers_do_not_contradict_what_events_prove():
    """While the GPU is behind it has work, whatever a few answers say."""
    ruling = rule(Calls(wait=0.9, idle=0.05, busy=Share(0.7, 0.5, 0.8, 30, 20)))
    assert (ruling.verdict, ruling.weighed.by) == ("gpu-bound", ANSWERS)
    assert ruling.weighed.idle == pytest.approx(0.05)


@pytest.mark.parametrize(("slow", "known"), [(10, True), (11, False)])
def test_two_thirds_of_the_calls_agree(slow, known):
    """Otherwise they are of different kinds, and the sum is true of none."""
    idle = np.where(np.arange(30) < slow, 0.0, 0.9)
    doubt = because(Calls(30, idle=idle))
    assert bool(doubt) is not known
    if not known:
        assert doubt == "Its calls differ: taken together they are cpu-bound, but only 63% of them are on their own."


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        (Calls(10), None),
        (Calls(9), "9 calls besides warm-up and cold ones; a verdict needs at least 10."),
        (Calls(1), "1 call besides warm-up and cold ones; a verdict needs at least 10."),
        (Calls(0), "0 calls besides warm-up and cold ones; a verdict needs at least 10."),
        (Calls(timed=18), None),
        (Calls(timed=17), "GPU work may be hidden: for a reason."),
        (Calls(untimed=0.1), None),
        (Calls(untimed=0.11), "GPU work may be hidden: for a reason."),
        (Calls(9, timed=0), "GPU work may be hidden: for a reason."),
        (Calls(tangled=2), None),
        (Calls(tangled=3), "Stages of a request run at the same time"),
        (Calls(several=1), "A request uses several GPUs"),
        (Calls(ns=30_000), None),
        (Calls(ns=29_999), "It is shorter than 0.03 ms"),
    ],
)
def test_what_keeps_a_verdict_from_being_given(calls, reason):
    """Each of them at the last value that does and the first that does not."""
    doubt = because(calls)
    assert doubt.startswith(reason or "")
    assert bool(doubt) is bool(reason)


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        (Calls(10), None),
        (Calls(9), "9 calls besides"),
        (Calls(timed=18), None),
        (Calls(timed=17), "Its GPU times cannot be placed."),
        (Calls(timed=10), "Its GPU times cannot be placed."),
        (Calls(gpu_ns=30_000), None),
        (Calls(gpu_ns=29_999), "It is shorter than 0.03 ms"),
    ],
)
def test_what_keeps_a_verdict_on_a_stage_in_a_graph_from_being_given(calls, reason):
    """There are GPU times alone: most calls must have them, and they must be long enough."""
    doubt = doubt_about_replayed(calls)
    assert (doubt is None) is (reason is None)
    if reason is not None:
        assert doubt.because.startswith(reason)


@pytest.mark.parametrize(
    ("losses", "doubtful"),
    [
        (Losses(dropped={"a": 1}), False),
        (Losses(dropped={"a": 1, "b": 1}), True),
        (Losses(dropped={"a": 1}, lost={"b": 1}), True),
        (Losses(lost={"b": 1}, orphans=1), True),
    ],
)
def test_one_stage_in_a_hundred_may_be_missing(losses, doubtful):
    """Whether it was dropped, lost, or is known only as a parent."""
    stored = recording(*(Stage("s", number, number + 1) for number in range(99)), losses=losses)
    assert (doubt_about_all(stored) is not None) is doubtful


def test_of_an_empty_recording_all_is_missing_or_nothing():
    """Nothing is divided by nothing."""
    assert doubt_about_all(recording()) is None
    assert doubt_about_all(recording(losses=Losses(orphans=1))).because.startswith("1 stages (100.0%) are missing")
