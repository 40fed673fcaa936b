"""Was the GPU busy: estimates from answers with honest intervals, and slopes of GPU intervals over host times."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuscope._data.attributes import GPU_HAD_WORK, GPU_SAMPLES
from gpuscope.analysis._busy.estimate import share_of
from gpuscope.analysis._busy.sampled import Sampled
from gpuscope.analysis._busy.slope import slope_of
from gpuscope.analysis.jaeger import traces
from gpuscope.analysis.read import read_lines
from gpuscope.analysis.runs import only, runs_of
from gpuscope.analysis.verdict import judge

from .recordings import Stage, recording, repeat

ANSWERS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)).map(sorted), max_size=60)


def estimate(pairs):
    """Return the estimate from pairs of (hits, answers), one per request."""
    hits, answers = np.array(pairs, np.int64).reshape(-1, 2).T
    return share_of(hits, answers)


@settings(deadline=None)
@given(ANSWERS)
def test_an_interval_lies_between_nothing_and_all_and_holds_the_estimate(pairs):
    """Whatever was answered; and it is the same each time."""
    share = estimate(pairs)
    if share is not None:
        assert 0 <= share.low <= share.share <= share.high <= 1
        assert share.share == pytest.approx(sum(hits for hits, _ in pairs) / sum(answers for _, answers in pairs))
    assert estimate(pairs) == share


@pytest.mark.parametrize(
    ("requests", "answers", "mean", "alike"),
    [(10, 5, 0.8, 10), (20, 200, 0.99, 100), (57, 3, 0.26, 4), (57, 3, 0.99, 20), (200, 1, 0.3, 2), (20, 10, 0.5, 1)],
)
def test_an_interval_of_95_percent_holds_the_truth_so_often(requests, answers, mean, alike):
    """Requests differ from each other, each by its own share, and the interval allows for that."""
    random, right, made = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        own = random.beta(mean * alike, (1 - mean) * alike, requests)
        asked = random.poisson(answers, requests)
        share = share_of(random.binomial(asked, own), asked)
        if share is not None:
            made, right = made + 1, right + (share.low <= mean <= share.high)
    assert made > 900
    assert right / made >= 0.94


def test_many_answers_in_few_requests_say_little():
    """Two hundred answers from twenty requests that are all busy or all idle are twenty, and not two hundred."""
    unlike = estimate([(10, 10)] * 10 + [(0, 10)] * 10)
    alike = estimate([(5, 10)] * 20)
    assert unlike.share == alike.share == 0.5
    assert unlike.high - unlike.low > 0.45
    assert alike.high - alike.low < 0.16


def test_answers_that_are_all_alike_leave_room_for_others():
    """The fewer the requests, the more."""
    few, many = estimate([(100, 100)] * 12), estimate([(1, 1)] * 500)
    assert few.share == many.share == few.high == many.high == 1
    assert 0.7 < few.low < 0.8
    assert many.low > 0.99


@pytest.mark.parametrize(("requests", "known"), [(9, False), (10, True)])
def test_answers_from_fewer_than_ten_requests_are_no_estimate(requests, known):
    """Requests without an answer do not count."""
    assert (estimate([(3, 5)] * requests + [(0, 0)] * 50) is not None) is known


def requests(*, samples, had_work, inner=(0, 0), count=40):
    """Return requests of 1 ms with a stage of 600 µs in them, and what was answered in each."""
    stage = Stage("infer", 100, 700, gpu=(103, 703), samples=inner[0], had_work=inner[1])
    whole = Stage("request", 0, 1000, gpu=(3, 1003), inside=[stage], samples=samples, had_work=had_work)
    return recording(*repeat(whole, count, 2000))


def busy(whole, rows=None, **known):
    """Return what the answers say of some rows and of all the time that they took."""
    rows = np.arange(len(whole.stage)) if rows is None else rows
    outermost = rows[whole.parent[rows] < 0]
    took_ns = int((whole.host_end_ns - whole.host_start_ns)[outermost if len(outermost) else rows].sum())
    known = {"idle_ns": 0, "known_ns": 0} | known
    return Sampled(whole, np.zeros(len(whole.stage), np.bool_)).busy(rows, took_ns, **known)


def test_answers_of_a_stage_and_of_those_inside_it_count_together():
    """Each instant has one answer: that of the innermost stage."""
    whole = requests(samples=4, had_work=1, inner=(6, 5))
    share = busy(whole)
    assert share.share == pytest.approx(0.6, abs=0.005)
    assert (share.answers, share.requests) == (400, 40)
    inner = np.flatnonzero(whole.parent >= 0)
    assert busy(whole, inner).share == pytest.approx(5 / 6, abs=0.01)


def test_without_answers_there_is_no_estimate():
    """Nor with some in a few requests."""
    assert busy(requests(samples=0, had_work=0)) is None
    assert busy(requests(samples=5, had_work=5, count=9)) is None


def test_of_stages_without_length_there_is_no_estimate():
    """Not that the GPU had no work, which their answers contradict."""
    whole = recording(*repeat(Stage("request", 0, 0, gpu=(3, 3), samples=5, had_work=5), 40, 2000))
    assert Sampled(whole, np.zeros(40, np.bool_)).busy(np.arange(40), 120_000, idle_ns=0, known_ns=0) is None


def test_of_two_streams_it_is_between_the_busiest_and_both_in_turn():
    """They may work at one time or one after the other: the answers do not say."""
    aside = Stage("aside", 10, 20, gpu=(203, 1003), stream=1, samples=8, had_work=4)
    whole = recording(
        *repeat(Stage("request", 0, 1000, gpu=(3, 1003), inside=[aside], samples=10, had_work=3), 400, 2000)
    )
    share = busy(whole)
    assert share.share == pytest.approx(0.4, abs=0.01)
    assert share.low == pytest.approx(0.4, abs=0.02)
    assert share.high == pytest.approx(0.7, abs=0.02)


def test_the_slope_tells_who_sets_the_pace():
    """About 0 where the GPU's time does not move with the host's, about 1 where it does."""
    random = np.random.default_rng(0)
    host_ns = random.normal(9e6, 5e5, 200).astype(np.int64)
    fixed = slope_of(host_ns, (10e6 + random.normal(0, 5e4, 200)).astype(np.int64))
    assert fixed.gpu_sets_the_pace
    assert not fixed.launches_set_the_pace
    assert fixed.slope == pytest.approx(0, abs=0.05)
    paced = slope_of(host_ns, host_ns + random.normal(3e5, 5e4, 200).astype(np.int64))
    assert paced.launches_set_the_pace
    assert not paced.gpu_sets_the_pace
    assert paced.low <= 1 <= paced.high


@pytest.mark.parametrize("times", [1.0, 3.0], ids=["half and half", "work of many sizes"])
def test_a_slope_that_excludes_neither_decides_nothing(times):
    """An interval that holds one half, or a GPU whose work grows with the host's by more than the host's time."""
    random = np.random.default_rng(0)
    host_ns = random.normal(9e6, 5e5, 200)
    gpu_ns = 3 * host_ns if times > 1 else np.where(np.arange(200) % 2, host_ns, 9e6)
    slope = slope_of(host_ns.astype(np.int64), gpu_ns.astype(np.int64))
    assert not slope.gpu_sets_the_pace
    assert not slope.launches_set_the_pace


def test_a_few_odd_calls_do_not_bend_the_slope():
    """One call in ten that waited ten times as long for something else."""
    host_ns = np.linspace(8e6, 10e6, 100).astype(np.int64)
    gpu_ns = np.full(100, 12_000_000)
    gpu_ns[::10] *= 10
    assert slope_of(host_ns, gpu_ns).gpu_sets_the_pace


def test_host_times_that_hardly_vary_have_no_slope():
    """Nor have few calls, nor calls that are all alike."""
    host_ns = np.linspace(10e6, 10.4e6, 100).astype(np.int64)
    assert slope_of(host_ns, host_ns) is None
    varied = np.linspace(8e6, 12e6, 100).astype(np.int64)
    assert slope_of(varied[:19], varied[:19]) is None
    assert slope_of(varied, varied) is not None


def test_without_scipy_there_is_no_slope(monkeypatch):
    """The rest of a report needs only numpy, and goes on."""
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    varied = np.linspace(8e6, 12e6, 100).astype(np.int64)
    assert slope_of(varied, varied) is None


def lines(**values):
    """Return the line of a file with one stage, whose GPU span has these attributes as well."""

    def attribute(key, kind, value):
        return {"key": key, "value": {f"{kind}Value": value}}

    common = {"traceId": "1" * 32, "startTimeUnixNano": "1000000", "endTimeUnixNano": "2000000"}
    host = {**common, "spanId": "2" * 16, "attributes": [attribute("gpuscope.host.duration", "double", 0.001)]}
    host["attributes"] += [attribute("gpuscope.stage", "string", "infer"), attribute("thread.id", "int", "1")]
    gpu = {**common, "spanId": "3" * 16, "parentSpanId": "2" * 16}
    gpu["attributes"] = [attribute("gpuscope.clock.uncertainty", "double", 3e-6)]
    gpu["attributes"] += [attribute("gpuscope.cuda.stream", "int", "7"), attribute("gpuscope.device.index", "int", "0")]
    gpu["attributes"] += [attribute(key, kind, value) for key, (kind, value) in values.items()]
    scope = {"scope": {"name": "gpuscope"}, "spans": [host, gpu]}
    return [json.dumps({"resourceSpans": [{"resource": {"attributes": []}, "scopeSpans": [scope]}]})]


def test_answers_are_read_from_files():
    """As a number of answers, and the part of them that found work."""
    whole = read_lines(lines(**{GPU_SAMPLES: ("int", "200"), GPU_HAD_WORK: ("double", 0.99)}))
    assert (whole.samples.tolist(), whole.had_work.tolist()) == ([200], [198])
    whole = read_lines(lines())
    assert (whole.samples.tolist(), whole.had_work.tolist()) == ([0], [0])


@pytest.mark.parametrize(("share", "had_work"), [(1.0000001, 200), (-1e-9, 0)])
def test_a_share_that_was_rounded_on_its_way_is_read(share, had_work):
    """A stage does not lose its GPU times for a last digit."""
    whole = read_lines(lines(**{GPU_SAMPLES: ("int", "200"), GPU_HAD_WORK: ("double", share)}))
    assert (whole.samples.tolist(), whole.had_work.tolist()) == ([200], [had_work])
    assert not any(whole.losses.skipped_lines.values())


@pytest.mark.parametrize(
    "values",
    [
        {GPU_SAMPLES: ("int", "-1"), GPU_HAD_WORK: ("double", 0.5)},
        {GPU_SAMPLES: ("int", "9"), GPU_HAD_WORK: ("double", 1.5)},
        {GPU_SAMPLES: ("int", "9"), GPU_HAD_WORK: ("double", "NaN")},
        {GPU_SAMPLES: ("int", "9")},
    ],
)
def test_answers_that_cannot_be_are_a_malformed_span(values):
    """It is counted, and the stage keeps its times on the host."""
    whole = read_lines(lines(**values))
    assert whole.losses.skipped_lines == {"malformed spans": 1}
    assert (len(whole.stage), whole.samples.tolist()) == (1, [0])


def test_answers_stay_with_their_stages():
    """In a part of a recording, and in files for other viewers."""
    first = Stage("infer", 0, 10, gpu=(1, 11), samples=8, had_work=6, process="one")
    later = Stage("infer", 10**6, 10**6 + 10, gpu=(10**6, 10**6 + 11), samples=4, had_work=1, process="two")
    whole = recording(first, later)
    part = only(whole, runs_of(whole)[1])
    assert (part.samples.tolist(), part.had_work.tolist()) == ([4], [1])
    assert {"gpuscope.gpu.had_work": 0.75, "gpuscope.gpu.samples": 8}.items() <= tags_of(whole)[0].items()


def tags_of(whole):
    """Return the tags of each GPU span in a file for Jaeger."""
    found = []
    for trace in json.loads(json.dumps(list(traces(whole)))):
        for span in trace["spans"]:
            tags = {tag["key"]: tag["value"] for tag in span["tags"]}
            if "gpuscope.gpu.duration" in tags:
                found.append(tags)
    return found


@pytest.mark.parametrize(("had_work", "expected"), [(0, 0.4), (30, 0.7), (60, 1.0)])
def test_the_time_between_a_requests_stages_has_its_share(had_work, expected):
    """Answers of moments in no stage of the request but itself are its own: 40 of 100 are in the two stages inside."""
    inside = [
        Stage("a", 0, 100, gpu=(2, 200), samples=20, had_work=20),
        Stage("b", 800, 900, gpu=(802, 990), samples=20, had_work=20),
    ]
    request = Stage("request", 0, 1000, gpu=(1, 999), samples=60, had_work=had_work, inside=inside)
    (found,) = judge(recording(*repeat(request, 60, 1200))).requests
    low, high = found.busy_range
    assert found.busy_share == pytest.approx(expected, abs=0.01)
    assert low <= expected <= high
