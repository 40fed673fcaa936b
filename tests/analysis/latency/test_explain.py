"""Where the time of one request went: parts that add up, and that are right where they are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuscope._data.batch import RowFlag
from gpuscope.analysis.latency._sweep import Claim, given_out
from gpuscope.analysis.latency.choice import slower_apart
from gpuscope.analysis.latency.explain import Explainer
from gpuscope.analysis.latency.parts import (
    AFTER,
    BATCH,
    BEFORE,
    BETWEEN,
    COMPILE,
    COPIES,
    GARBAGE,
    GPU,
    HOST,
    OTHERS,
    OWN,
    PARTS,
    QUEUE,
    UNEXPLAINED,
)
from gpuscope.analysis.recording import Recording

from ..generated import recordings
from ..recordings import Stage, batched, handed_over, paused, recording, repeat

POINTS = st.integers(-20, 120)
CLAIMS = st.lists(st.tuples(POINTS, POINTS, st.integers(0, 3), st.sampled_from("abc")), max_size=12)


@given(start=st.integers(0, 40), end=st.integers(0, 100), claims=CLAIMS)
def test_what_is_given_out_is_what_covers_each_instant(start, end, claims):
    """Instant by instant: the least rank of what is open, the first of equals, and the rest where nothing is."""
    expected: dict[str, int] = {}
    for now in range(start, end):
        there = [(rank, place) for place, (first, last, rank, _) in enumerate(claims) if first <= now < last]
        part = claims[min(there)[1]][3] if there else "rest"
        expected[part] = expected.get(part, 0) + 1
    found = given_out(start, end, [Claim(first, last, (rank,), part) for first, last, rank, part in claims], "rest")
    assert found == expected


@st.composite
def with_batches(draw):
    """Draw a recording in which some stages have worked for some others, as a damaged file may say."""
    whole = draw(recordings())
    count = len(whole.stage)
    if not count:
        return whole
    rows = st.integers(0, count - 1)
    numbers = st.tuples(st.integers(0, 10**6), st.integers(-1, 10**6))
    whole = batched(whole, *draw(st.lists(st.tuples(rows, st.dictionaries(rows, numbers, min_size=1)), max_size=4)))
    times = st.tuples(st.integers(-1000, 10**6), st.integers(0, 10**5))
    pauses = [(start, start + lasts) for start, lasts in draw(st.lists(times, max_size=3))]
    whole = paused(whole, *pauses, process=draw(st.integers(0, 1)))
    return handed_over(whole, draw(st.sampled_from(["one", "nobody"])))


@settings(max_examples=150, deadline=None)
@given(whole=with_batches())
def test_parts_add_up_to_the_request(whole):
    """Whatever a file says: no part is negative, and together they are the request, to the nanosecond."""
    explainer = Explainer(whole)
    for row in np.flatnonzero(whole.parent < 0).tolist():
        latency = explainer.explain(row)
        assert min(latency.parts.values()) >= 0
        assert sum(latency.parts.values()) == latency.whole_ns == explainer.duration_ns(np.array([row]))[0]
        assert sum(latency.stages.values()) == latency.parts[HOST]
        assert sum(latency.unclear.values()) <= latency.parts[UNEXPLAINED]
    for kind in explainer.by_kind():
        assert sum(kind.parts_ms.values()) == pytest.approx(kind.whole_ms)


def parts(whole: Recording, name="request") -> dict[str, float]:
    """The parts of the only request of a name that are not 0, in microseconds."""
    explainer = Explainer(whole)
    (row,) = (row for row in explainer.requests().tolist() if whole.names[whole.stage[row]] == name)
    return {part: ns / 1e3 for part, ns in explainer.explain(row).parts.items() if ns}


def request(*inside, end=1000, name="request", **more):
    """A request of a millisecond, from 0."""
    return Stage(name, 0, end, inside=inside, **more)


def batch(start, end, gpu=None, inside=(), **more):
    """A batch on a thread of its own."""
    return Stage("predict", start, end, gpu=gpu, thread="batcher", inside=inside, **more)


def worker(name, start, end):
    """A stage on a thread that `handed_over` puts into another process."""
    return Stage(name, start, end, thread="worker")


KNOWN = {
    "a stage on the host": (
        recording(request(Stage("parse", 0, 400), Stage("answer", 400, 990))),
        {HOST: 990, UNEXPLAINED: 10},
    ),
    "a request that is one stage": (recording(Stage("request", 0, 700)), {HOST: 700}),
    "the host launches, and waits": (
        recording(request(Stage("infer", 0, 100, gpu=(10, 900)), Stage("wait", 100, 910, gpu=(900, 905)), end=910)),
        {OWN: 890, HOST: 15, GPU: 5},
    ),
    "work that ends after the host": (
        recording(request(Stage("infer", 0, 100, gpu=(5, 800)), end=100)),
        {OWN: 795, HOST: 5},
    ),
    "a copy": (
        recording(
            request(
                Stage("parse", 0, 100),
                Stage("copy", 100, 600, gpu=(105, 595), attributes={"bytes": 2_000_000}),
                Stage("answer", 600, 1000),
            )
        ),
        {HOST: 500, COPIES: 500},
    ),
    "a batch without a GPU": (
        batched(
            recording(request(Stage("parse", 0, 200), Stage("answer", 900, 1000)), batch(500, 900)), (2, {0: (300, -1)})
        ),
        {HOST: 700, BATCH: 300},
    ),
    "a batch on the GPU": (
        batched(
            recording(request(Stage("parse", 0, 200), Stage("answer", 905, 1000)), batch(500, 905, gpu=(505, 900))),
            (2, {0: (300, 100)}),
        ),
        {HOST: 305, BATCH: 300, OWN: 100, OTHERS: 295},
    ),
    "a batch that waits for the GPU": (
        batched(recording(request(end=900), batch(100, 900, gpu=(600, 900))), (1, {0: (100, 300)})),
        {BATCH: 100, GPU: 500, OWN: 300},
    ),
    "a queue before the batch": (
        batched(
            recording(request(), batch(-300, 400), batch(500, 1000), Stage("other", -400, 450)),
            (1, {0: (100, -1)}),
            (3, {2: (500, -1)}),
        ),
        {QUEUE: 400, BATCH: 100, HOST: 500},
    ),
    "a copy in a batch": (
        batched(
            recording(
                request(),
                batch(
                    0,
                    1000,
                    gpu=(2, 1000),
                    inside=[
                        Stage("copy", 0, 250, gpu=(2, 250), thread="batcher", attributes={"bytes": 10**6}),
                        Stage("forward", 250, 300, gpu=(252, 1000), thread="batcher"),
                    ],
                ),
            ),
            (1, {0: (0, 499)}),
        ),
        {HOST: 2, COPIES: 248, OWN: 375, OTHERS: 375},
    ),
    "a request is read before it has a token, and answered after its batch": (
        batched(recording(request(Stage("parse", 0, 200)), batch(500, 900)), (2, {0: (200, -1)})),
        {HOST: 600, BEFORE: 100, BATCH: 200, AFTER: 100},
    ),
    "a request that another process works on, and the way back": (
        handed_over(
            recording(request(Stage("parse", 0, 100), worker("predict", 300, 800), Stage("answer", 900, 1000))),
            "worker",
        ),
        {HOST: 700, BETWEEN: 300},
    ),
    "a request that waits for another process, which is at others": (
        handed_over(
            recording(
                request(worker("decode", 500, 600), worker("predict", 610, 900)),
                Stage("other", 0, 900, inside=[worker("predict", 200, 450)]),
            ),
            "worker",
        ),
        {QUEUE: 250, BETWEEN: 350, HOST: 390, UNEXPLAINED: 10},
    ),
    "garbage": (
        paused(recording(request(Stage("parse", 0, 600), Stage("answer", 650, 1000))), (100, 400), (600, 650)),
        {HOST: 650, GARBAGE: 350},
    ),
    "garbage while the GPU works": (
        paused(
            recording(request(Stage("infer", 0, 100, gpu=(10, 900)), Stage("wait", 100, 910, gpu=(900, 905)), end=910)),
            (50, 80),
            (300, 400),
        ),
        {OWN: 890, HOST: 15, GPU: 5},
    ),
    "garbage while it waits for a batch, and in the batch": (
        paused(batched(recording(request(), batch(500, 1000)), (1, {0: (500, -1)})), (100, 200), (600, 700)),
        {BATCH: 500, HOST: 400, GARBAGE: 100},
    ),
    "garbage in a batch while the GPU has no work": (
        paused(
            batched(
                recording(
                    request(),
                    batch(
                        0,
                        1000,
                        gpu=(2, 998),
                        inside=[
                            Stage("read", 0, 400, gpu=(2, 402), thread="batcher"),
                            Stage("forward", 400, 450, gpu=(402, 990), thread="batcher"),
                            Stage("wait", 450, 1000, gpu=(991, 995), thread="batcher"),
                        ],
                    ),
                ),
                (1, {0: (0, 498)}),
            ),
            (100, 300),
            (500, 600),
        ),
        {OWN: 398, OTHERS: 398, GARBAGE: 200, HOST: 4},
    ),
    "a compilation": (
        recording(
            request(
                Stage("infer", 0, 850, gpu=(5, 980), inside=[Stage("torch.compile", 10, 800)]),
                Stage("wait", 850, 990, gpu=(981, 985)),
            )
        ),
        {COMPILE: 790, HOST: 60, OWN: 134, GPU: 6, UNEXPLAINED: 10},
    ),
    "a compilation in a batch": (
        batched(
            recording(
                request(),
                batch(0, 1000, gpu=(2, 1000), inside=[Stage("torch.compile", 100, 600, thread="batcher")]),
            ),
            (1, {0: (0, 499)}),
        ),
        {COMPILE: 500, OWN: 249, OTHERS: 249, HOST: 2},
    ),
    "stages at the same time": (
        recording(request(Stage("a", 0, 600), Stage("b", 300, 980), end=980)),
        {HOST: 980},
    ),
    "a stage of which streams were asked": (
        recording(request(Stage("infer", 0, 1000, gpu=(2, 999), samples=100, had_work=75))),
        {OWN: 750, HOST: 250},
    ),
}


@pytest.mark.parametrize("program", KNOWN)
def test_programs_whose_parts_are_known(program):
    """Each part is as it is known, to a few microseconds, and at most 2 % are unexplained."""
    whole, expected = KNOWN[program]
    found = parts(whole)
    assert found == pytest.approx(expected, abs=6)
    assert found.get(UNEXPLAINED, 0) <= 0.02 * sum(found.values())


class TestChoice:
    """Which request is explained."""

    def whole(self):
        """A hundred requests, each 1 µs longer than the one before, and batches, which are none."""
        many = [Stage("request", 1000 * n, 1000 * n + 100 + n) for n in range(100)]
        others = repeat(Stage("other", 500, 510), 3, 1000)
        return batched(recording(*many, *others, Stage("predict", 150, 9999, thread="x")), (1, {0: (1, -1)}))

    def test_percentiles(self):
        """The slowest, the median, and the one that 99 of 100 are not slower than; of a kind or of all."""
        explainer = Explainer(self.whole())
        took = lambda row: int(explainer.duration_ns(np.array([row]))[0]) // 1000  # noqa: E731
        assert [took(explainer.at(percentile, "request")) for percentile in (100, 99, 50)] == [199, 198, 149]
        assert took(explainer.at(1)) == 10
        assert explainer.at(50, "nothing") is None

    def test_what_is_not_judged_is_not_chosen(self):
        """Neither warm-up nor a late cold call nor what has not ended; what of it took longer can be told."""
        cold = Stage("request", 0, 90_000, inside=[Stage("infer", 10, 89_990)])
        many = [Stage("request", 0, 100 + n, inside=[Stage("infer", 10, 90 + n)]) for n in range(60)]
        many[0] = replace(many[0], end=60_000, flags=RowFlag.WARMUP)
        many[5] = replace(many[5], end=70_000, flags=RowFlag.NOT_ENDED)
        many[30] = cold
        whole = recording(*(each.shifted(n * 200_000) for n, each in enumerate(many)))
        explainer = Explainer(whole)
        slowest = explainer.at(100)
        assert int(explainer.duration_ns(np.array([slowest]))[0]) == 159_000
        assert [
            ns
            for _, ns in slower_apart(whole, explainer.requests(), explainer.duration_ns(explainer.requests()), slowest)
        ] == [90_000_000, 60_000_000]
        for flag in (RowFlag.WARMUP, RowFlag.NOT_ENDED):
            some = Explainer(recording(*(Stage("a", 9 * n, 9 * n + n, flags=flag) for n in (1, 2))))
            assert int(some.duration_ns(np.array([some.at(100)]))[0]) == 2000

    def test_a_batch_is_no_request(self):
        """What links to members is not a request, unless there is nothing else."""
        whole = self.whole()
        names = [whole.names[whole.stage[row]] for row in Explainer(whole).requests().tolist()]
        assert set(names) == {"request", "other"}
        assert len(Explainer(batched(recording(Stage("predict", 0, 10)), (0, {}))).requests()) == 1

    def test_by_trace(self):
        """The beginning of a trace id, in either case; the longest request first."""
        whole = self.whole()
        explainer = Explainer(whole)
        assert explainer.of_trace(whole.trace_id[4].upper()) == [4]
        assert explainer.of_trace("f" * 32) == []
        found = explainer.of_trace("0000")
        took = explainer.duration_ns(np.array(found))
        assert len(found) == 103
        assert (np.diff(took) <= 0).all()


def test_a_kind_is_a_mean_without_warmup():
    """Means are over the requests after the warm-up, evenly over the recording where there are many."""
    many = repeat(Stage("request", 0, 100, inside=[Stage("parse", 0, 60)]), 500, 1000)
    (found,) = Explainer(recording(*many)).by_kind()
    assert (found.name, found.requests, found.whole_ms) == ("request", 200, pytest.approx(0.1))
    assert {part: ms for part, ms in found.parts_ms.items() if ms} == pytest.approx({HOST: 0.06, UNEXPLAINED: 0.04})
    assert list(found.parts_ms) == list(PARTS)


def test_nothing_at_all():
    """An empty recording has no request."""
    explainer = Explainer(recording())
    assert explainer.at(50) is None
    assert explainer.by_kind() == []


def test_a_mean_does_not_miss_what_comes_back():
    """Every 50th request takes 400 ms, and the others 10: 17.8 ms on average, which every 5th alone would not show."""
    many = [Stage("request", 1e6 * n, 1e6 * n + (400_000 if n % 50 == 25 else 10_000)) for n in range(1000)]
    (found,) = Explainer(recording(*many)).by_kind()
    assert found.whole_ms == pytest.approx(17.8, abs=6)
