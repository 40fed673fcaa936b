"""Parts never add up to more than the whole, and the same figure is the same wherever it is shown."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from gpuscope.analysis._structure.kinds import end_to_end_ns
from gpuscope.analysis._structure.own_time import own_ns
from gpuscope.analysis.figures import figures
from gpuscope.analysis.verdict import judge

from .generated import recordings
from .recordings import Stage, recording, repeat

SURE = 1 + 1e-9


@settings(max_examples=60, deadline=None)
@given(whole=recordings())
def test_what_stages_take_themselves_adds_up_to_no_more_than_the_request(whole):
    """Whatever overlaps: a request's own times are not negative, and their sum is at most its length."""
    own, took = own_ns(whole), end_to_end_ns(whole)
    assert (own >= 0).all()
    for root in np.flatnonzero(whole.parent < 0):
        assert own[whole.root == root].sum() <= took[root]


@settings(max_examples=60, deadline=None)
@given(whole=recordings())
def test_no_share_is_more_than_the_whole(whole):
    """Neither of a stage inside itself nor of stages at one time."""
    for stage in figures(whole).stages:
        for share in (stage.host_share, stage.gpu_share, stage.outside_share):
            assert share is None or 0 <= share <= SURE


@settings(max_examples=60, deadline=None)
@given(whole=recordings())
def test_no_gain_is_larger_than_what_it_is_a_gain_of(whole):
    """In milliseconds and as a share, of a request and of a stage; and what is idle is a part too."""
    findings = judge(whole)
    takes = {request.name: request.duration_ms for request in findings.requests}
    for verdict in (*findings.requests, *findings.stages):
        assert verdict.request_share is None or 0 <= verdict.request_share <= SURE
        if verdict.busy_share is not None:
            low, high = verdict.busy_range
            assert 0 <= low <= verdict.busy_share + 1e-9
            assert verdict.busy_share - 1e-9 <= high <= SURE
        for share in (verdict.wait_share, verdict.idle_share):
            assert share is None or 0 <= share <= SURE
        if verdict.gain_ms is not None:
            limit = verdict.period_ms if getattr(verdict, "gain_of", "") == "period" else takes[verdict.root]
            assert 0 <= verdict.gain_ms <= limit * SURE
            assert 0 <= verdict.gain_share <= SURE
    gains = {request.root: request for request in findings.requests if request.gain_of == "request"}
    for stage in findings.stages:
        whole = gains.get(stage.root)
        if whole is not None and stage.gain_ms is not None and stage.verdict == whole.verdict:
            assert stage.gain_ms <= whole.gain_ms * SURE
    for request in findings.requests:
        inside = [cause for cause in request.idle if cause.cause != "between requests"]
        assert sum(cause.ms for cause in inside) <= request.duration_ms * SURE


@settings(max_examples=60, deadline=None)
@given(whole=recordings())
def test_medians_of_the_table_are_those_of_the_verdicts(whole):
    """One median per stage, from one set of calls. A stage inside itself is one line and two verdicts."""
    table = {(stage.root, stage.name): stage for stage in figures(whole).stages}
    findings = judge(whole)
    verdicts = [(verdict.root, verdict.name) for verdict in (*findings.requests, *findings.stages)]
    for verdict in (*findings.requests, *findings.stages):
        if verdicts.count((verdict.root, verdict.name)) > 1 or verdict.host_ms is None:
            continue
        line = table[verdict.root, verdict.name]
        assert verdict.host_ms == pytest.approx(line.host_ms.p50, abs=1e-6)
        assert verdict.duration_ms == pytest.approx(line.end_to_end_ms.p50, abs=1e-6)
        assert verdict.gpu_ms == (line.gpu_ms and pytest.approx(line.gpu_ms.p50, abs=1e-6))
        assert verdict.request_share == line.host_share


def test_own_times_of_a_request():
    """The host is in the innermost stage; what is left is the request's own; stages at one time share it equally."""
    tree = Stage("request", 0, 100, inside=[Stage("a", 10, 60, inside=[Stage("b", 20, 30)]), Stage("c", 60, 90)])
    assert (own_ns(recording(tree)) / 1e3).tolist() == [20, 40, 10, 30]
    tasks = Stage("request", 0, 100, inside=[Stage("a", 10, 60), Stage("b", 20, 90)])
    assert (own_ns(recording(tasks)) / 1e3).tolist() == [20, 30, 50]


def test_twenty_requests_below_each_other_are_not_eight_times_the_first():
    """As a context that was kept by mistake makes them: what lies outside the first does not count in it."""
    inner = [Stage("request", 1000 * n, 1000 * n + 800) for n in range(1, 20)]
    found = figures(recording(Stage("request", 0, 900, inside=inner)))
    assert [stage.host_share for stage in found.stages] == [pytest.approx(1.0, abs=0.2)]
    assert found.stages[0].host_share <= 1


def test_the_order_is_that_of_most_requests():
    """Not that of the first, in which a stage ran late because something was loaded."""
    usual = Stage("request", 0, 100, inside=[Stage("decode", 5, 20), Stage("infer", 20, 80)])
    first = Stage("request", -1000, -1, inside=[Stage("infer", -990, -500), Stage("decode", -400, -300)])
    found = figures(recording(first, *repeat(usual, 5, 1000)))
    assert [stage.name for stage in found.stages] == ["request", "decode", "infer"]
