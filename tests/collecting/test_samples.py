"""Answers of the sampler and stages, joined by time."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuscope
from gpuscope import stage
from gpuscope._collecting.joins import samples as joined
from gpuscope._collecting.joins.samples import SampleJoin
from gpuscope._cuda.stream_sampler import ANSWER, NO_ANSWERS
from gpuscope._data.attributes import GPU_HAD_WORK, GPU_SAMPLES
from gpuscope._data.batch import RowFlag
from gpuscope._data.row import ROW
from gpuscope._log import WarnOnce
from gpuscope._settings.config import Config
from gpuscope.testing import FakeDevice, ManualClock, capture

STREAM = 7


@dataclass
class Node:
    """A stage with those inside it; times are even, so that an odd one is on no border."""

    start: int
    end: int
    inside: list[Node] = field(default_factory=list)
    stream: int = STREAM
    device: int = 0
    flags: int = 0

    def all(self):
        """Those inside first, as stages end."""
        return [*(each for child in self.inside for each in child.all()), self]

    def at(self, time):
        """The innermost at a time."""
        if not self.start < time < self.end:
            return None
        return next((found for child in self.inside if (found := child.at(time))), self)


@st.composite
def trees(draw, start=0, end=400, depth=4):
    """A stage and those inside, one after the other; borders may be shared."""
    node = Node(start, end)
    if depth and end - start > 4:
        borders = sorted(draw(st.lists(st.integers(start // 2, end // 2), max_size=6)))
        for first, last in zip(borders[::2], borders[1::2], strict=False):
            if last > first:
                node.inside.append(draw(trees(2 * first, 2 * last, depth - 1)))
    return node


def rows_of(nodes):
    """The nodes as rows of a batch."""
    rows = np.zeros(len(nodes), ROW)
    for row, node in zip(rows, nodes, strict=True):
        row["gpu_start_ns"], row["gpu_end_ns"], row["flags"] = 1000 + node.start, 1000 + node.end, node.flags
        row["stream"], row["device"] = node.stream, node.device
    return rows


def innermost(rows, at_ns):
    """The places of the rows that have these times."""
    in_graph = rows["flags"] & int(RowFlag.IN_GRAPH) != 0
    return joined.innermost(rows["gpu_start_ns"], rows["gpu_end_ns"], in_graph, at_ns)


def answer(time, *, had_work=1, opened=1, stream=STREAM, device=0, number=None):
    """One answer."""
    return 1000 + time, stream, device, opened, 1000 + time if number is None else number, had_work


class Source:
    """Where answers come from."""

    hz, why_off = 200.0, ""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = self.had_work = 0

    def take(self):
        """Return the answers, once."""
        taken, self.answers = np.array(self.answers, ANSWER) if self.answers else NO_ANSWERS, []
        self.asked += taken.size
        self.had_work += int(taken["had_work"].sum())
        return taken

    def counts(self):
        """Return what was taken."""
        return {"asked": self.asked, "had_work": self.had_work, "dropped": 0, "errors": 0}


def account(join):
    """What came of the answers: in stages, between, lost, waiting."""
    found = join.account()
    assert found["asked"] == sum(found[name] for name in ("in_stages", "between", "lost", "waiting"))
    return tuple(found[name] for name in ("in_stages", "between", "lost", "waiting"))


@settings(max_examples=200, deadline=None)
@given(tree=trees(), times=st.lists(st.integers(-20, 220).map(lambda half: 2 * half + 1)))
def test_the_innermost_stage_is_found(tree, times):
    """As a search through the tree finds it, also where stages share both their events."""
    nodes, times = tree.all(), sorted(times)
    found = innermost(rows_of(nodes), 1000 + np.array(times, np.int64))
    for time, place in zip(times, found.tolist(), strict=True):
        assert (None if place < 0 else nodes[place]) is tree.at(time)


@settings(max_examples=100, deadline=None)
@given(
    intervals=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted), max_size=12),
    times=st.lists(st.integers(-2, 62), max_size=20),
)
def test_whatever_overlaps_the_shortest_has_it(intervals, times):
    """As a search through all of them finds; also at their borders, and where none is inside another."""
    nodes, times = [Node(*each) for each in intervals], sorted(times)
    found = innermost(rows_of(nodes), 1000 + np.array(times, np.int64))
    for time, place in zip(times, found.tolist(), strict=True):
        covering = [number for number, node in enumerate(nodes) if node.start <= time <= node.end]
        expected = min(covering, key=lambda number: (nodes[number].end - nodes[number].start, number), default=-1)
        assert place == expected


@settings(max_examples=100, deadline=None)
@given(
    tree=trees(),
    answers=st.lists(st.tuples(st.integers(-20, 220), st.booleans()), max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
)
def test_it_does_not_matter_where_batches_end(tree, answers, cuts):
    """Each answer is one stage's, whichever batch that is in, and none is counted twice."""
    nodes, answers = tree.all(), sorted((2 * half + 1, int(had)) for half, had in answers)
    join = SampleJoin(Source(*(answer(time, had_work=had) for time, had in answers)), WarnOnce())
    bounds = sorted({0, len(nodes), *(cut for cut in cuts if cut < len(nodes))})
    samples, had_work = [], []
    for first, last in pairwise(bounds):
        of_batch = join.join(rows_of(nodes[first:last]), 0)
        samples += of_batch[0].tolist()
        had_work += of_batch[1].tolist()
    expected = {(node.start, node.end): [0, 0] for node in nodes}
    for time, had in answers:
        if (node := tree.at(time)) is not None:
            expected[node.start, node.end][0] += 1
            expected[node.start, node.end][1] += had
    got = {times: [0, 0] for times in expected}
    for node, asked, had in zip(nodes, samples, had_work, strict=True):
        got[node.start, node.end][0] += asked
        got[node.start, node.end][1] += had
    assert got == expected
    inside = sum(asked for asked, _ in expected.values())
    assert account(join) == (inside, 0, 0, len(answers) - inside)


def test_of_stages_that_share_both_events_the_inner_one_has_it():
    """In order of their ends, and within a replay in order of their starts; a replay is inside the stage around it."""
    graph = int(RowFlag.IN_GRAPH)
    plain, replay = [Node(0, 10), Node(0, 10)], [Node(0, 10, flags=graph), Node(0, 10, flags=graph)]
    at = np.array([1005], np.int64)
    assert innermost(rows_of(plain), at).tolist() == [0]
    assert innermost(rows_of([*plain, *replay]), at).tolist() == [3]


def test_a_rounding_does_not_make_the_outer_stage_the_inner_one():
    """An inner stage that seems to begin before the one around it, by a step of a float, has its answers."""
    inner, outer = Node(98, 200), Node(100, 400)
    assert innermost(rows_of([inner, outer]), np.array([1150, 1300], np.int64)).tolist() == [0, 1]


def test_streams_and_devices_are_apart():
    """The default streams of two devices have one address."""
    nodes = [Node(0, 10, stream=0), Node(0, 10, stream=0, device=1), Node(0, 10)]
    answers = [answer(5, stream=0, device=1, had_work=0), answer(5, stream=0), answer(6, stream=9), answer(7, stream=0)]
    join = SampleJoin(Source(*answers), WarnOnce())
    samples, had_work = join.join(rows_of(nodes), 0)
    assert samples.tolist() == [2, 1, 0]
    assert had_work.tolist() == [2, 0, 0]


def test_a_stage_without_a_place_has_no_answers():
    """Nor has one without GPU times."""
    nodes = [Node(0, 10, flags=int(RowFlag.UNPLACED)), Node(-1000, -1000)]
    join = SampleJoin(Source(answer(5)), WarnOnce())
    assert join.join(rows_of(nodes), 0)[0].tolist() == [0, 0]


def test_an_answer_waits_for_the_stages_of_its_time():
    """Until all that were open then have been left, and are in a batch; what is left then was between stages."""
    source = Source(answer(5), answer(15, opened=0), answer(25), answer(35, opened=0))
    join = SampleJoin(source, WarnOnce())
    empty = rows_of([])
    join.join(empty, 1010)
    assert account(join) == (0, 0, 0, 4)
    join.join(empty, 1015)
    assert account(join) == (0, 1, 1, 2)
    assert join.join(rows_of([Node(20, 30)]), 1034)[0].tolist() == [1]
    assert account(join) == (1, 1, 1, 1)
    join.join(empty, 1035)
    assert account(join) == (1, 2, 1, 0)


def test_a_later_answer_tells_that_all_stages_had_been_left():
    """While a stage stays open its answers wait, whatever is resolved meanwhile."""
    source = Source(answer(5), answer(7))
    join = SampleJoin(source, WarnOnce())
    join.join(rows_of([Node(40, 50)]), 1_000_000)
    assert account(join) == (0, 0, 0, 2)
    source.answers = [answer(60), answer(61, opened=0)]
    join.join(rows_of([]), 1060)
    assert account(join) == (0, 0, 0, 4)
    join.join(rows_of([Node(6, 60)]), 1061)
    assert account(join) == (2, 1, 1, 0)


def test_what_waits_is_bounded(monkeypatch):
    """The oldest go, and are counted."""
    monkeypatch.setattr("gpuscope._collecting.joins.samples._MOST_WAITING", 10)
    join = SampleJoin(Source(*(answer(2 * time + 1) for time in range(25))), WarnOnce())
    join.gather()
    assert account(join) == (0, 0, 15, 10)
    assert join.join(rows_of([Node(0, 100)]), 0)[0].tolist() == [10]


def test_a_device_has_work_if_any_of_its_streams_has():
    """Each moment counts once per device."""
    answers = [
        answer(1, number=1, had_work=0),
        answer(1, number=1, had_work=1, stream=8),
        answer(1, number=1, had_work=0, device=1),
        answer(3, number=2, had_work=1),
        answer(3, number=2, had_work=1, stream=8),
        answer(5, number=3, had_work=0),
    ]
    join = SampleJoin(Source(*answers), WarnOnce())
    join.gather()
    devices, streams = join.take_counts()
    assert devices == {0: (3, 2), 1: (1, 0)}
    assert streams == {(0, STREAM): (3, 1), (0, 8): (2, 2), (1, STREAM): (1, 0)}
    assert join.take_counts() == ({}, {})


@settings(max_examples=100, deadline=None)
@given(
    rounds=st.lists(st.dictionaries(st.integers(0, 3), st.booleans(), min_size=1), max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=3),
)
def test_a_device_is_as_busy_as_the_union_of_its_streams(rounds, cuts):
    """At least as busy as the busiest, at most as all in turn, and counted once per moment however answers come."""
    source = Source()
    join = SampleJoin(source, WarnOnce())
    bounds = sorted({0, len(rounds), *(cut for cut in cuts if cut < len(rounds))})
    for first, last in pairwise(bounds):
        source.answers = [
            answer(2 * number + 1, number=number, stream=2**63 + stream, had_work=int(had))
            for number in range(first, last)
            for stream, had in rounds[number].items()
        ]
        join.gather()
    devices, streams = join.take_counts()
    assert devices.get(0, (0, 0)) == (len(rounds), sum(any(each.values()) for each in rounds))
    for stream in range(4):
        said = [each[stream] for each in rounds if stream in each]
        assert streams.get((0, 2**63 + stream), (0, 0)) == (len(said), sum(said))
    busy = [had_work for _, had_work in streams.values()]
    assert max(busy, default=0) <= devices.get(0, (0, 0))[1] <= sum(busy)


def test_a_stage_on_a_side_stream_has_the_answers_of_that_stream():
    """Inside one on the main stream, at the same time: each has its own, and the outer one loses none."""
    side = Node(10, 30, stream=8)
    outer = Node(0, 40)
    answers = [
        answer(time, number=time, stream=stream, had_work=int(stream == 8))
        for time in range(1, 40, 2)
        for stream in (STREAM, 8)
    ]
    join = SampleJoin(Source(*answers), WarnOnce())
    samples, had_work = join.join(rows_of([side, outer]), 0)
    assert samples.tolist() == [10, 20]
    assert had_work.tolist() == [10, 0]
    # Of the side stream before and after its stage: it is none of the outer stage's.
    assert account(join)[0] == 30
    assert join.take_counts() == ({0: (20, 20)}, {(0, STREAM): (20, 0), (0, 8): (20, 20)})


class Sampled(FakeDevice):
    """A GPU whose streams are said to have been asked."""

    def __init__(self, clock):
        super().__init__(clock)
        self.sampling = Source()

    def ask(self, *, had_work):
        """Answer of its stream, now."""
        self.sampling.answers.append((self.clock(), 7, 0, 1, len(self.sampling.answers), had_work))


def test_answers_reach_the_spans_and_the_account():
    """From the device to what is exported: on the GPU span of the innermost stage, and where there are any."""
    clock = ManualClock()
    device = Sampled(clock)
    with capture(device=device, clock=clock, warmup=0) as spans:
        with stage("outer"):
            device.ask(had_work=1)
            with stage("inner"):
                for had_work in (1, 0, 1, 1):
                    device.ask(had_work=had_work)
            with stage("short"):
                pass
        device.complete()
        assert gpuscope.flush(10)
        statistics = gpuscope.statistics()
    said = {
        span.name: (span.attributes.get(GPU_SAMPLES), span.attributes.get(GPU_HAD_WORK))
        for span in spans
        if GPU_SAMPLES in span.attributes or span.kind == "gpu"
    }
    assert said == {"outer [gpu]": (1, 1.0), "inner [gpu]": (4, 0.75), "short [gpu]": (None, None)}
    assert statistics.sampler == "200 times a second"
    assert statistics.samples["asked"] == statistics.samples["in_stages"] == 5
    assert "streams asked for work 200 times a second (asked 5, had work 4" in str(statistics)


def test_why_nothing_is_asked_is_said_once(caplog):
    """Where somebody has asked for it; else it is in the account alone."""
    source = Source()
    source.why_off = "there is no reason"
    with caplog.at_level(logging.WARNING, "gpuscope"):
        for wanted in (False, True, True):
            join = SampleJoin(source, WarnOnce(), says_why_off=wanted)
            join.gather()
            join.gather()
            assert join.state == "off: there is no reason"
    assert [record.message for record in caplog.records] == ["streams are not asked for work: there is no reason."] * 2


def test_a_sampler_that_fails_costs_samples_alone(caplog):
    """It is said once, and the stages go out as ever."""

    class Failing(Source):
        def take(self):
            raise ValueError("no answers")

    clock = ManualClock()
    device = FakeDevice(clock, completes=True)
    device.sampling = Failing()
    with caplog.at_level(logging.WARNING, "gpuscope"), capture(device=device, clock=clock) as spans:
        for _ in range(3):
            with stage("infer"):
                pass
        assert gpuscope.flush(10)
    assert [span.kind for span in spans] == ["host", "gpu"] * 3
    assert len([record for record in caplog.records if "samples" in record.message]) == 1


@pytest.mark.parametrize("text", ["0", "0.5", "200", "5000"])
def test_the_setting_is_a_number(text):
    """From 0 to 5,000."""
    assert Config.from_env({"GPUSCOPE_SAMPLE_HZ": text})[0].sample_hz == float(text)


@pytest.mark.parametrize("text", ["-1", "5001", "often", "nan"])
def test_the_setting_is_nothing_else(text):
    """What is not such a number is said, and the default holds."""
    config, complaints = Config.from_env({"GPUSCOPE_SAMPLE_HZ": text})
    assert config.sample_hz == Config.sample_hz
    assert len(complaints) == 1
