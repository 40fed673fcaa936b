"""Comparing recordings: right about what changed, silent about noise, honest about the whole."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from gpuscope._data.batch import RowFlag
from gpuscope.analysis._comparing.change import slow_ones
from gpuscope.analysis._comparing.median import _independent, change_of, median_change
from gpuscope.analysis.compare import FASTER, FEW, MIN_CALLS, NOISE, NOISY, SLOWER, SMALL, compare

from .recordings import Stage, recording

WARMUP = int(RowFlag.WARMUP)


def requests(count=100, *, seed=0, cold=0, prep=100.0, infer=200.0, gpu=None, noise=0.05, rest=0.0, gone=()):
    """A recording of requests with two stages; times vary by some share, which the seed decides."""
    random = np.random.default_rng(seed)
    stages = []
    for number in range(count + cold):
        flags = WARMUP * (number < cold)
        long = 50.0 if flags else 1.0
        first, second = (long * each * random.normal(1, noise) for each in (prep, infer))
        at = 1e5 * number
        inside = [
            Stage("prep", at, at + first, flags=flags),
            Stage(
                "infer",
                at + first,
                at + first + second,
                flags=flags,
                gpu=gpu and (at + first, at + first + gpu * random.normal(1, noise)),
            ),
        ]
        inside = [stage for stage in inside if stage.name not in gone]
        stages.append(Stage("request", at, at + first + second + rest, inside=inside, flags=flags))
    return recording(*stages)


def two_peaks():
    """A recording of requests of which half take 10 ms and half 36."""
    random = np.random.default_rng(5)
    times = np.where(random.random(60) < 0.5, 10_000, 36_000) * random.normal(1, 0.01, 60)
    return recording(*(Stage("request", 1e6 * n, 1e6 * n + each) for n, each in enumerate(times)))


def milliseconds(text):
    """A duration as it is written."""
    number, unit = text.split()
    return float(number) * {"ms": 1, "µs": 1e-3, "ns": 1e-6}[unit]


def of(comparison, name, lane="host"):
    """The change of one stage."""
    return next(stage for stage in comparison.stages if (stage.name, stage.lane) == (name, lane))


class TestStages:
    """Verdicts and effects."""

    def test_nothing_changed(self):
        """Two runs of the same are within noise, stage by stage and end to end, and nothing is remarked."""
        comparison = compare(requests(seed=1, gpu=150), requests(seed=2, gpu=150))
        assert {stage.change.verdict for stage in comparison.stages} == {NOISE}
        (request,) = comparison.requests
        assert (request.change.verdict, request.remarks) == (NOISE, ())

    @pytest.mark.parametrize(("infer", "verdict"), [(160.0, FASTER), (240.0, SLOWER)])
    def test_a_stage_that_changed(self, infer, verdict):
        """The stage that changed is named, the other is not, and the size of the change is within its interval."""
        comparison = compare(requests(seed=1), requests(seed=2, infer=infer))
        change = of(comparison, "infer").change
        assert change.verdict == comparison.requests[0].change.verdict == verdict
        assert of(comparison, "prep").change.verdict == NOISE
        assert change.low_ms < (infer - 200) / 1000 < change.high_ms
        assert change.relative == pytest.approx(infer / 200 - 1, abs=0.03)
        assert comparison.requests[0].remarks == ()

    @pytest.mark.parametrize(("rest", "remarked"), [(20.0, False), (30.0, True), (45.0, True)])
    def test_a_request_that_gains_less_than_half_of_its_stages_is_remarked(self, rest, remarked):
        """It gains 30, 20 or 5 µs of the 50 that a stage gains: below half, it waits for something else."""
        before, after = requests(seed=1, noise=0.001), requests(seed=2, noise=0.001, prep=50.0, rest=rest)
        remarks = compare(before, after).requests[0].remarks
        assert bool(remarks) is remarked
        if remarked:
            (remark,) = remarks
            most_ms = milliseconds(re.search(r"the whole request gains at most (\S+ \w+)", remark)[1])
            assert most_ms == pytest.approx((50 - rest) / 1000, abs=0.002)

    def test_slower_by_more_than_is_allowed(self):
        """A stage that is a fifth slower fails where a tenth is allowed, and no stage that is faster or unchanged."""
        comparison = compare(requests(seed=1, noise=0.001), requests(seed=2, noise=0.001, infer=240.0))
        slower, same = of(comparison, "infer").change, of(comparison, "prep").change
        assert slower.is_slower(0.1)
        assert slower.is_slower(0.0)
        assert not slower.is_slower(0.3)
        assert not same.is_slower(0.0)
        faster = compare(requests(seed=1, noise=0.001), requests(seed=2, noise=0.001, infer=160.0))
        assert not of(faster, "infer").change.is_slower(-1.0)

    def test_what_is_too_small_to_matter(self):
        """A change that is certain, but less than a hundredth of the request, is no change; a limit sees it."""
        before = requests(seed=1, noise=0.0001, prep=10.0, infer=2000.0)
        after = requests(seed=2, noise=0.0001, prep=15.0, infer=2000.0)
        comparison = compare(before, after)
        assert of(comparison, "prep").change.verdict == SMALL
        (request,) = comparison.requests
        assert request.change.verdict == SMALL
        assert request.answer.startswith("`request` is as fast as before: 2.01 ms before")
        assert "beyond noise, but by too little to matter" in request.answer
        assert request.change.is_slower(0.0)

    def test_what_is_too_noisy_to_tell(self):
        """Of times with two peaks it cannot be told whether half as long or three times as long is usual."""
        comparison = compare(two_peaks(), two_peaks())
        (request,) = comparison.requests
        assert request.change.verdict == NOISY
        assert request.answer.startswith("`request` is too noisy to tell whether it became faster or slower:")
        assert -1 < request.change.low_part < -0.5
        assert request.change.high_part > 2
        assert request.change.may_be_slower(0.05)
        assert not request.change.may_be_slower(5.0)

    def test_what_is_not_too_noisy(self):
        """A few percent to either side tell that nothing changed much, and allow no less than they are."""
        (request,) = compare(requests(seed=1), requests(seed=2)).requests
        assert request.change.verdict == NOISE
        assert not request.change.may_be_slower(0.05)
        assert not request.change.may_be_slower(0.0)
        assert request.change.may_be_slower(0.005)

    @pytest.mark.parametrize(("slow", "told"), [(400_000, True), (10_100, False)])
    def test_slow_requests_that_medians_do_not_show(self, slow, told):
        """Every 50th takes 400 ms after the change; the median is 10 ms before and after."""

        def some(each):
            return recording(
                *(Stage("request", 1e6 * n, 1e6 * n + (each if n % 50 == 25 else 10_000)) for n in range(1000))
            )

        (request,) = compare(some(10_000), some(slow)).requests
        assert request.answer.startswith("`request` is as fast as before: 10.0 ms before, 10.0 ms after")
        assert ("p99 10.0 ms before, 400 ms after." in request.answer) is told
        assert request.slow_ms == ((10.0, 400.0) if told else None)

    def test_few_requests_have_no_slow_ones(self):
        """The slowest of 99 is no percentile."""
        one, other = (
            recording(*(Stage("request", 1e6 * n, 1e6 * n + 1000 * each) for n in range(99))) for each in (1, 2)
        )
        assert compare(one, other).requests[0].slow_ms is None

    def test_nothing_in_common(self):
        """Recordings whose requests have different names have nothing to compare."""
        assert compare(requests(), requests(seed=1)).in_common
        assert not compare(requests(), recording(Stage("other", 0, 10))).in_common

    def test_requests_are_outermost_and_no_warm_up(self):
        """Slow first requests, and calls of the same stage inside a request, are none to compare."""
        walks = [
            Stage("walk", 1e5 * n, 1e5 * n + 500, inside=[Stage("walk", 1e5 * n + 100, 1e5 * n + 200)])
            for n in range(50)
        ]
        cold = Stage("walk", -1e6, -1e5, flags=WARMUP)
        (request,) = compare(recording(cold, *walks), recording(*walks)).requests
        assert request.change.calls == (50, 50)
        assert (request.change.before_ms, request.change.after_ms) == (0.5, 0.5)

    def test_too_few_calls(self):
        """With fewer calls than the minimum the figures are shown and nothing is judged, however large the change."""
        few = compare(requests(MIN_CALLS - 1), requests(infer=900, seed=1))
        assert {stage.change.verdict for stage in few.stages} == {FEW}
        assert few.requests[0].change.verdict == FEW
        assert of(few, "infer").change.after_ms == pytest.approx(0.9, rel=0.05)
        assert of(few, "infer").effect_ms is None
        enough = compare(requests(MIN_CALLS), requests(MIN_CALLS, infer=900, seed=1))
        assert of(enough, "infer").change.verdict == SLOWER
        assert of(enough, "infer").effect_ms == pytest.approx(0.7, rel=0.05)

    @pytest.mark.parametrize(("calls", "known"), [(MIN_CALLS - 1, False), (MIN_CALLS, True)])
    def test_an_effect_needs_enough_calls_of_the_stage(self, calls, known):
        """However many requests there are."""

        def some(each):
            inside = Stage("rare", 1, 1 + each)
            request = Stage("request", 0, 1000)
            return recording(*(replace(request, inside=[inside] * (n < calls)).shifted(2000 * n) for n in range(100)))

        effect_ms = of(compare(some(100), some(300)), "rare").effect_ms
        assert effect_ms == (pytest.approx(0.2 * calls / 100) if known else None)

    def test_warmup_is_left_out(self):
        """Slow first calls change nothing, and do not count as calls."""
        comparison = compare(requests(cold=30, seed=1), requests(seed=2))
        assert {stage.change.verdict for stage in comparison.stages} == {NOISE}
        assert of(comparison, "infer").change.calls == (100, 100)

    def test_stages_that_come_and_go(self):
        """A stage that one recording lacks has an effect, all of it, and no verdict."""
        comparison = compare(requests(gone=("prep",)), requests(seed=1, gone=("infer",)))
        gone, new = of(comparison, "infer"), of(comparison, "prep")
        assert (gone.change.verdict, new.change.verdict) == (FEW, FEW)
        assert gone.effect_ms == pytest.approx(-0.2, rel=0.05)
        assert new.effect_ms == pytest.approx(0.1, rel=0.05)
        assert (new.change.before_ms, new.change.relative) == (None, None)

    def test_only_stages_with_nothing_inside_are_summed(self):
        """The sum of effects is that of the innermost stages: the request itself is not counted on top."""
        comparison = compare(requests(seed=1), requests(seed=2, prep=150, infer=260))
        assert of(comparison, "request").effect_ms is None
        assert comparison.requests[0].effects_ms["host"] == pytest.approx(0.11, rel=0.15)
        assert comparison.requests[0].change.change_ms == pytest.approx(0.11, rel=0.15)

    def test_an_effect_counts_every_call(self):
        """A stage that runs three times per request has three times its median's change for an effect."""

        def thrice(each):
            return recording(
                *(
                    Stage(
                        "request",
                        at,
                        at + 1000,
                        inside=[Stage("step", at + 300 * k, at + 300 * k + each) for k in range(3)],
                    )
                    for at in range(0, 50_000, 1000)
                )
            )

        assert of(compare(thrice(100), thrice(120)), "step").effect_ms == pytest.approx(0.06)

    def test_a_recording_with_itself(self):
        """A recording compared with itself has changed by nothing."""
        same = requests(gpu=100)
        assert {stage.change.change_ms for stage in compare(same, same).stages} == {0.0}

    def test_nothing_to_compare(self):
        """An empty recording on either side is no error, and nothing is judged."""
        for pair in ((recording(), requests()), (requests(), recording())):
            assert {stage.change.verdict for stage in compare(*pair).stages} == {FEW}
        assert compare(recording(), recording()).requests == ()


class TestWhole:
    """The end-to-end effect beside the sum of stage effects."""

    def test_a_gain_that_the_whole_does_not_show(self):
        """GPU work that became faster behind a host that is busy anyway is said not to show."""
        comparison = compare(requests(gpu=180, seed=1), requests(gpu=90, seed=2))
        (request,) = comparison.requests
        assert of(comparison, "infer", "gpu").change.verdict == FASTER
        assert request.change.verdict == NOISE
        assert request.effects_ms["gpu"] == pytest.approx(-0.09, rel=0.1)
        (remark,) = request.remarks
        assert "`infer` became faster on its stream" in remark
        assert re.search(r"gain (8|9)\d\.\d µs per request there; the whole request gains at most \S+ µs", remark)
        assert remark.endswith("this is not what it waits for.")

    def test_a_gain_that_shows_in_part(self):
        """A gain of which the whole shows less than half is said to show that much."""
        comparison = compare(requests(infer=400, noise=0.01, seed=1), requests(infer=200, rest=150, noise=0.01, seed=2))
        (remark,) = comparison.requests[0].remarks
        assert "`infer` became faster on the host" in remark
        assert re.search(r"gain 2\d\d µs per request there; the whole request gains at most \S+ µs", remark)

    def test_a_whole_that_varies_too_much(self):
        """Where noise would hide the gain, the whole is not said to lack it."""
        comparison = compare(requests(prep=9000, gpu=260, seed=1), requests(prep=9000, gpu=150, seed=2))
        (remark,) = comparison.requests[0].remarks
        assert remark.endswith("varies too much to tell whether it gains from that.")

    def test_a_gain_that_another_stage_takes_away(self):
        """Where stages together gain nothing, there is nothing that the whole would have to show."""
        comparison = compare(requests(infer=400, seed=1), requests(infer=300, prep=250, seed=2))
        assert of(comparison, "infer").change.verdict == FASTER
        assert comparison.requests[0].remarks == ()

    def test_a_gain_that_shows(self):
        """A gain that the whole shows is not remarked upon."""
        assert compare(requests(infer=400, seed=1), requests(infer=200, seed=2)).requests[0].remarks == ()

    def test_as_dict_is_json(self):
        """A comparison survives JSON under the names that its attributes have."""
        plain = json.loads(json.dumps(compare(requests(), requests(infer=300)).as_dict(), allow_nan=False))
        assert plain["requests"][0]["change"]["verdict"] == SLOWER
        assert {stage["lane"] for stage in plain["stages"]} == {"host"}


class TestInterval:
    """The confidence interval of a change of medians."""

    def test_agrees_with_drawing_samples(self):
        """Of calls that do not resemble their neighbours the interval is the one of samples drawn with replacement."""
        random = np.random.default_rng(0)
        # High and low in turn.
        before, after = (np.sort(random.lognormal(mean, 0.5, 100)).reshape(2, 50).T.ravel() for mean in (0, 0.3))
        drawn = [
            np.median(random.choice(after, len(after))) - np.median(random.choice(before, len(before)))
            for _ in range(4000)
        ]
        change, low, high = median_change(before, after)
        assert change == np.median(after) - np.median(before)
        assert (low, high) == pytest.approx(np.percentile(drawn, (0.5, 99.5)), abs=0.04)

    def test_a_ratio_is_never_below_nothing(self):
        """However wide: durations that vary by a thousand are 100 % shorter at most."""
        random = np.random.default_rng(6)
        found = change_of(random.lognormal(0, 4, 30), random.lognormal(0, 4, 30))
        assert -1 <= found.low_part < 0 < found.high_part
        nothing = change_of(np.zeros(30), np.ones(30))
        assert (nothing.low_part, nothing.high_part, nothing.low) == (None, None, 1.0)

    def test_slow_ones_are_seldom_said_to_differ(self):
        """Of many comparisons of the same with the same."""
        random = np.random.default_rng(8)
        found = [slow_ones(*random.lognormal(0, 0.5, (2, 1000))) is not None for _ in range(200)]
        assert np.mean(found) <= 0.02

    def test_slow_ones_in_a_row_are_one(self):
        """A hold-up of thirty requests is one; thirty hold-ups are a tail."""
        usual, row, tail = np.full((3, 1000), 10.0)
        row[300:330] = tail[5::33] = 400.0
        assert slow_ones(usual, row) is None
        assert slow_ones(usual, tail) == (10.0, 400.0)

    @pytest.mark.parametrize("memory", [0.0, 0.9], ids=["independent calls", "calls like the one before"])
    def test_is_seldom_wrong_about_nothing(self, memory):
        """Of many comparisons of the same with the same, hardly any finds a change, also where times drift slowly."""
        random = np.random.default_rng(1)

        def series():
            values = random.normal(0, 1, 400)
            for n in range(1, len(values)):
                values[n] += memory * values[n - 1]
            return 10 + values

        found = [low > 0 or high < 0 for _, low, high in (median_change(series(), series()) for _ in range(150))]
        assert np.mean(found) <= 0.06

    def test_finds_what_is_there(self):
        """A change of a fifth of the spread is found in nearly all of many comparisons of a thousand calls."""
        random = np.random.default_rng(2)
        found = [median_change(random.normal(0, 1, 1000), random.normal(0.4, 1, 1000))[1] > 0 for _ in range(50)]
        assert np.mean(found) > 0.95

    def test_equal_seeds_give_equal_intervals(self):
        """The same recordings get the same answer each time, and another seed hardly another."""
        values = np.random.default_rng(3).normal(5, 1, (2, 200))
        assert median_change(*values) == median_change(*values)
        assert median_change(*values, seed=1)[1:] == pytest.approx(median_change(*values)[1:], abs=0.1)

    @pytest.mark.parametrize("values", [[3.0], [3.0] * 50, [1.0, 2.0], [1.0] * 49 + [9.0]])
    def test_degenerate_values(self, values):
        """One call, or calls that are all alike, have an interval within what was seen."""
        change, low, high = median_change(np.array(values), np.array(values))
        assert change == 0
        assert min(values) - max(values) <= low <= 0 <= high <= max(values) - min(values)

    def test_neighbours_that_are_alike_count_less(self):
        """Values in long runs count for about as many as there are runs; shuffled, for nearly all of them."""
        random = np.random.default_rng(4)
        runs = np.repeat(random.normal(0, 1, 40), 25)
        assert _independent(runs) < 150
        assert _independent(random.permutation(runs)) > 500
