"""How busy streams were when asked: as metrics, and in the summary with how far off that may be."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuscope._collecting.aggregation.metrics import StageMetrics
from gpuscope._collecting.aggregation.sampled import RequestSamples
from gpuscope._collecting.aggregation.statistics import StageStatistics
from gpuscope._data.batch import RowFlag
from gpuscope._data.metrics import BUSY, STREAM_BUSY
from gpuscope._data.statistics import LookedStage

from .test_summary import batch_of, row

NOW_NS = 2 * 10**18


def asked(rows, samples, devices=None):
    """A batch of rows; of each, how often it was asked for work and how often it had any."""
    pairs = np.array(samples, np.int32).reshape(-1, 2)
    return replace(batch_of(rows), samples=pairs[:, 0], had_work=pairs[:, 1], device_samples=devices)


def request(number, samples, *, flags=0):
    """A request of two stages, one of which has another inside, in order of their ends."""
    span, common = 10 * number + 1, {"trace": number + 1, "flags": flags, "start": 100.0 * number}
    rows = [
        row("kernel", "request", host=2.0, gpu=2.0, span=span + 3, parent=span + 2, **common),
        row("model", "request", host=5.0, gpu=5.0, span=span + 2, parent=span, **common),
        row("post", "request", host=3.0, gpu=3.0, span=span + 1, parent=span, **common),
        row("request", "request", host=10.0, gpu=10.0, span=span, **common),
    ]
    return asked(rows, samples)


def points(metrics):
    """The points of the ratio: by device, and by device and stage."""
    found = {}
    for point in metrics.points()[BUSY]:
        key = point.attributes["gpuscope.device.index"], point.attributes.get("gpuscope.stage")
        assert ("hw.model" in point.attributes) == (key[1] is None)
        found[key] = point.value
    return found


def test_busy_is_what_was_asked_in_the_interval():
    """Of the device any stream's work, of each stage its own; each interval has its own, and none without samples."""
    metrics = StageMetrics(NOW_NS)
    metrics.add(request(0, [(4, 4), (2, 1), (0, 0), (1, 0)]))
    metrics.add(asked([row("post", "request", gpu=1.0)], [(4, 1)], {0: (10, 7)}))
    assert points(metrics) == {}
    metrics.end_interval()
    expected = {(0, None): 0.7, (0, "kernel"): 1.0, (0, "model"): 0.5, (0, "post"): 0.25, (0, "request"): 0.0}
    assert points(metrics) == expected
    metrics.add(asked([row("post", "request", gpu=1.0)], [(2, 2)], {0: (2, 0), 1: (5, 5)}))
    metrics.end_interval()
    assert points(metrics) == {(0, None): 0.0, (0, "post"): 1.0}
    metrics.add(batch_of([row("post", "request", gpu=1.0)]))
    metrics.end_interval()
    assert points(metrics) == {}


def test_each_stream_has_a_ratio_of_its_own():
    """By its device and its handle; the device's is that of all of them together."""
    metrics = StageMetrics(NOW_NS)
    streams = {(0, 7): (10, 2), (0, 8): (10, 7), (1, 9): (4, 4)}
    batch = asked([row("post", "request", gpu=1.0)], [(0, 0)], {0: (10, 8), 1: (4, 4)})
    metrics.add(replace(batch, stream_samples=streams))
    metrics.end_interval()
    found = {tuple(point.attributes.values()): point.value for point in metrics.points()[STREAM_BUSY]}
    assert found == {(7, 0, "GPU-0"): 0.2, (8, 0, "GPU-0"): 0.7}
    assert points(metrics)[0, None] == 0.8
    metrics.end_interval()
    assert metrics.points()[STREAM_BUSY] == []


def test_warm_up_is_of_the_device_alone():
    """A stage's ratio is of its other calls."""
    metrics = StageMetrics(NOW_NS)
    metrics.add(asked([row("load", "load", gpu=1.0, flags=int(RowFlag.WARMUP))], [(4, 4)], {0: (4, 4)}))
    metrics.end_interval()
    assert points(metrics) == {(0, None): 1.0}


def busy_of(*requests):
    """What is known of requests, each with how often it was asked and how often it had work."""
    samples = RequestSamples()
    for number, (asked_, had_work) in enumerate(requests):
        samples.add(number, asked_, had_work)
    return samples.busy()


def test_without_samples_nothing_is_known_and_of_one_request_no_interval():
    """Neither is a guess."""
    assert RequestSamples().busy() is None
    assert busy_of((200, 150)) == (0.75, None, None, 200, 1)


@settings(max_examples=200)
@given(st.lists(st.integers(1, 50).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=2))
def test_the_share_lies_within_its_interval(requests):
    """Which lies within 0 and 1, and is never a point."""
    busy = busy_of(*requests)
    assert 0 <= busy.low <= busy.share <= busy.high <= 1
    assert busy.low < busy.high
    assert busy.share == sum(had for _, had in requests) / sum(n for n, _ in requests)
    assert (busy.samples, busy.requests) == (sum(n for n, _ in requests), len(requests))


def test_requests_that_all_say_the_same_are_as_many_answers_as_requests():
    """Ten requests of a hundred answers each, all busy, say less than a thousand answers would."""
    assert busy_of(*[(100, 100)] * 10).low < 0.8
    assert busy_of(*[(1, 1)] * 1000).low > 0.99


def test_answers_of_one_request_count_together_however_many_batches_it_is_in():
    """The same answers in one request, or one request each, have different intervals."""
    together, apart = RequestSamples(), RequestSamples()
    for number in range(100):
        together.add(number // 25, 1, number // 25 % 2)
        apart.add(number, 1, number // 25 % 2)
    assert together.busy().requests == 4
    assert apart.busy().requests == 100
    assert together.busy().high - together.busy().low > 2 * (apart.busy().high - apart.busy().low)


@pytest.mark.parametrize("requests", [10, 60, 300])
@pytest.mark.parametrize("mean", [0.3, 0.9])
def test_the_interval_has_the_truth_in_it_nearly_as_often_as_it_says(requests, mean):
    """Where requests differ in how busy they are, and in how often they were asked: nine times of ten and more."""
    draw = random.Random(requests)
    hits, turns = 0, 300
    for _ in range(turns):
        rows = []
        for _ in range(requests):
            share, number = draw.betavariate(4 * mean, 4 * (1 - mean)), draw.randint(1, 20)
            rows.append((number, sum(draw.random() < share for _ in range(number))))
        busy = busy_of(*rows)
        hits += busy.low <= mean <= busy.high
    assert hits >= 0.9 * turns


def test_the_summary_has_stages_with_those_inside():
    """The request has all answers of its stages; warm-up is left out. Stages that were not asked say so."""
    statistics = StageStatistics()
    statistics.add(request(0, [(50, 0)] * 4, flags=int(RowFlag.WARMUP)))
    for number in range(1, 41):
        statistics.add(request(number, [(4, 4), (1, 0), (0, 0), (1, number % 2)]))
    stages = {stage.name: stage for stage in statistics.summary().stages}
    assert stages["kernel"].busy[::4] == (1.0, 40)
    assert stages["model"].busy.share == 0.8
    assert stages["model"].busy.samples == 200
    assert stages["post"].busy is None
    assert stages["request"].busy.samples == 240
    assert stages["request"].busy.share == pytest.approx(180 / 240)
    assert stages["request"].busy.low < 0.75 < stages["request"].busy.high
    plain = {stage["name"]: stage["busy"] for stage in statistics.summary().as_dict()["stages"]}
    assert plain["post"] is None
    assert plain["kernel"]["share"] == 1.0


def test_the_table_shows_it_where_anything_was_asked():
    """With how far off it may be, within 80 columns, and a sentence that says what it is."""
    statistics = StageStatistics()
    for number in range(1, 41):
        statistics.add(request(number, [(4, 4), (1, 0), (0, 0), (1, number % 2)]))
    text = str(statistics.summary())
    assert max(map(len, text.splitlines())) <= 80
    assert " busy " in text
    assert "busy: % of the times" in text
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert re.search(r"\b75±\d+\b", lines["request"])
    assert re.search(r" - +\d", lines["post"])
    statistics.add(asked([row("a" * 60, "a" * 60, host=1234.0, gpu=1234.5)] * 1000, [(9, 8)] * 1000))
    assert max(map(len, str(statistics.summary()).splitlines())) <= 80
    unasked = StageStatistics()
    unasked.add(batch_of([row("post", "request", gpu=1.0)]))
    assert "busy" not in str(unasked.summary())


def look(stage, *, root="request", calls=10, time_s=0.1, busy_s=0.062, kernels=3120):
    """What deep looks saw of a stage in five requests."""
    return LookedStage(root, stage, 5, calls, time_s, busy_s, kernels, 0.0, 0.0, 0.0)


def test_the_summary_has_what_deep_looks_saw():
    """Beside the stage of that name in that kind of request: per call, and as a part of its time."""
    statistics = StageStatistics()
    statistics.add(request(1, [(4, 4), (1, 0), (0, 0), (1, 1)]))
    looks = [look("kernel"), look("model", root="other"), look("post", calls=0), look("request", busy_s=0.2)]
    found = statistics.summary(looks)
    stages = {stage.name: stage.looked for stage in found.stages}
    assert stages["kernel"] == (pytest.approx(0.62), 312.0, 10, 5)
    assert stages["request"].busy == 1.0
    assert stages["model"] is stages["post"] is None
    assert {stage["name"]: stage["looked"] for stage in found.as_dict()["stages"]}["kernel"]["kernels"] == 312
    text = str(found)
    assert "  kernel: 62 %, 312 kernels per call (10 calls)" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "kernels" in found._repr_html_()
    assert "Deep looks" not in str(statistics.summary([look("post", calls=0)]))
    names = [f"{number:02}" * 40 for number in range(12)]
    statistics.add(batch_of([row(name, "request", gpu=1.0) for name in names]))
    text = str(statistics.summary(map(look, names)))
    assert "and 4 more stages" in text
    assert max(map(len, text.splitlines())) <= 80
