"""The rules of a verdict, each at its threshold: which shares mean what, and what makes an answer unknown."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from gpuscope.analysis._verdicts.decide import (
    decide,
    doubt_about,
    doubt_about_all,
    doubt_about_replayed,
    rests_on_pace,
)
from gpuscope.analysis._verdicts.evidence import SEVERAL_DEVICES
from gpuscope.analysis.recording import Losses

from ..recordings import Stage, recording


class Calls:
    """Calls of one stage that are all alike, with each kind of time as a part of their duration."""

    def __init__(self, count=20, *, timed=None, tangled=0, several=0, ns=100_000, gpu_ns=100_000, **parts):
        """Make the columns; `parts` has a number for all calls, or one for each."""
        duration_ns = np.full(count, ns)
        names = ("wait", "idle", "unclear", "unproven", "untimed", "paced")
        columns = {f"{name}_ns": np.broadcast_to(parts.get(name, 0.0), count) * duration_ns for name in names}
        device = np.zeros(count, np.int64)
        device[:several] = SEVERAL_DEVICES
        evidence = SimpleNamespace(**columns, tangled=np.arange(count) < tangled, device=device)
        times = SimpleNamespace(gpu_start_ns=np.full(count, 10**9), gpu_end_ns=np.full(count, 10**9 + gpu_ns))
        self.material = SimpleNamespace(evidence=evidence, duration_ns=duration_ns, recording=times)
        self.judged = np.arange(count)
        self.timed = self.judged[: count if timed is None else timed]

    def share(self, value_ns):
        """Return a column of times as a part of the durations."""
        total_ns = self.material.duration_ns.sum()
        return float(value_ns.sum() / total_ns) if total_ns else 0.0

    def without_gpu_times(self):
        """Say why."""
        return "for a reason"


def because(calls):
    """The doubt about some calls, as text."""
    doubt = doubt_about(calls)
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
    assert rests_on_pace(Calls(wait=wait, idle=idle, paced=paced)) is rests


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
