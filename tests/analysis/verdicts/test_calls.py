"""The calls of a stage in a kind of request: which rows they are, and what is added up over them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gpuscope._data.batch import RowFlag
from gpuscope.analysis._verdicts.calls import Material
from gpuscope.analysis._verdicts.cold import find_cold
from gpuscope.analysis._verdicts.evidence import gather
from gpuscope.analysis._verdicts.weigh import idle_causes, weigh

from ..recordings import Stage, recording, repeat
from .simulate import Machine
from .workloads import WORKLOADS


def calls_in(*stages):
    """Return the calls by kind of request, stage, and whether they are outermost."""
    stored = recording(*stages)
    return {
        (calls.root, calls.name, calls.outermost): calls
        for calls in Material(stored, gather(stored), find_cold(stored)).calls()
    }


def run(name):
    """Return the requests of a workload."""
    machine = Machine()
    WORKLOADS[name].run(machine)
    return machine.roots


def shifted(stages, by):
    """Return the same so many microseconds later."""
    return [stage.shifted(by) for stage in stages]


@pytest.mark.parametrize("name", ["heavy preprocess", "taking turns", "item in a loop", "pageable copy"])
def test_the_causes_of_idleness_add_up_to_it(name):
    """To the nanosecond, over the segments that the judged rows own; those of a request are all in it."""
    for (_, stage, outermost), calls in calls_in(*run(name)).items():
        causes, evidence = idle_causes(calls, weigh(calls)), calls.material.evidence
        assert sum(causes.values()) == int(evidence.segment_idle_ns[calls.segments()].sum())
        owners = {calls.material.name(row) for row in evidence.segments.owner[calls.segments()].tolist()}
        assert owners <= {inner for _, inner in causes}
        assert (owners == {stage}) is not outermost


def test_stages_in_a_graph_are_a_part_of_the_stage_that_launched_it():
    """Whose name is told, also for stages inside others of the graph."""
    found = calls_in(*run("graph with stages"))
    shares = {"attention": 800 / 2200, "mlp": 700 / 2200, "up": 300 / 2200, "down": 300 / 2200}
    for name, share in shares.items():
        calls = found["request", name, False]
        assert calls.replayed
        assert calls.launched_by() == "decode"
        assert calls.share_of_caller() == pytest.approx(share, abs=0.02)
    assert not found["request", "decode", False].replayed


def test_the_kind_of_request_that_took_longest_comes_first():
    """And in it the request, then its stages, in the order in which they run. Warm-up does not count."""
    long = Stage("long", 0, 200, inside=[Stage("a", 10, 180), Stage("b", 185, 190)])
    short = Stage("short", 0, 50, inside=[Stage("a", 1, 9), Stage("b", 10, 30)])
    cold = Stage("short", 10**6, 10**8, flags=RowFlag.WARMUP)
    for first, second in ((long, short), (short, long)):
        roots = [*repeat(first, 12, 1000), *shifted(repeat(second, 12, 1000), 300), cold]
        assert list(calls_in(*roots)) == [
            ("long", "long", True),
            ("long", "a", False),
            ("long", "b", False),
            ("short", "short", True),
            ("short", "a", False),
            ("short", "b", False),
        ]


def test_a_stage_inside_itself_is_two_things():
    """The outermost calls are requests, and the inner ones are stages of theirs."""
    found = calls_in(*repeat(Stage("a", 0, 100, inside=[Stage("a", 10, 40)]), 12, 1000))
    assert {key: len(calls.judged) for key, calls in found.items()} == {("a", "a", True): 12, ("a", "a", False): 12}


def test_a_stage_in_a_graph_and_out_of_it_is_two_things():
    """Also in one kind of request."""
    machine = Machine()
    for _ in range(12):
        with machine.stage("request"):
            machine.replay(("mlp", 100))
            with machine.stage("mlp"):
                machine.launch(100)
    stored = recording(*machine.roots)
    found = [calls for calls in Material(stored, gather(stored), find_cold(stored)).calls() if calls.name == "mlp"]
    assert sorted((calls.replayed, len(calls.rows)) for calls in found) == [(False, 12), (True, 12)]


def test_what_is_waited_for_longest_is_told():
    """Of several stages whose work the host waits for, by the time of all waits together."""
    machine = Machine()
    for _ in range(12):
        with machine.stage("request"):
            for name, duration in (("long", 4000), ("short", 1000), ("short", 1000)):
                with machine.stage(name):
                    machine.launch(duration)
                with machine.stage("fetch"):
                    machine.wait()
    found = calls_in(*machine.roots)
    assert found["request", "fetch", False].waits_for() == "long"
    assert found["request", "request", True].waits_for() == "long"
    assert found["request", "long", False].waits_for() is None


def test_figures_are_of_the_judged_calls():
    """Medians are of neither warm-up nor calls whose GPU times can't be relied on, where those are asked for."""
    stage = Stage("infer", 0, 1000, gpu=(10, 410))
    slow, unsure = replace(stage, end=9000, flags=RowFlag.WARMUP), replace(stage, gpu=(10, 910), flags=RowFlag.CLAMPED)
    roots = [slow.shifted(-(10**6)), *repeat(stage, 10, 2000), *shifted(repeat(unsure, 10, 2000), 10**6)]
    (calls,) = calls_in(*roots).values()
    stored = calls.material.recording
    host_ns, gpu_ns = stored.host_end_ns - stored.host_start_ns, stored.gpu_end_ns - stored.gpu_start_ns
    assert (len(calls.rows), len(calls.judged), len(calls.timed), len(calls.requests.rows)) == (21, 20, 10, 20)
    assert calls.total_ns == calls.requests.total_ns == 20 * 1000 * 1000
    assert calls.median_ms(host_ns) == 1.0
    assert calls.median_ms(gpu_ns, timed=True) == 0.4
    assert calls.share(np.full(21, 250_000)) == 0.25


def test_without_a_judged_call_there_are_no_figures():
    """No shares, and nothing is divided; the median is that of all calls, as in the table."""
    (calls,) = calls_in(*repeat(Stage("infer", 0, 9, flags=RowFlag.WARMUP), 5, 100)).values()
    nothing = np.zeros(5, np.int64)
    assert (calls.share(nothing), calls.median_ms(nothing), calls.waits_for()) == (0.0, 0.0, None)
    assert idle_causes(calls, weigh(calls)) == {}
    assert calls.without_gpu_times().startswith("`infer` has no GPU times")


def test_the_stage_that_is_longest_without_gpu_times_is_named():
    """Of a request whose own times are known; else it is the request itself."""
    inside = [Stage("short", 10, 50), Stage("long", 60, 400), Stage("timed", 410, 900, gpu=(420, 890))]
    found = calls_in(*repeat(Stage("request", 0, 1000, gpu=(3, 990), inside=inside), 12, 2000))
    why = "has no GPU times: recorded without a GPU, or on a device that was not current"
    assert found["request", "request", True].without_gpu_times() == f"`long` {why}"
    assert found["request", "short", False].without_gpu_times() == f"`short` {why}"
