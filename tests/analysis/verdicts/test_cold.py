"""Late cold calls: recognised, listed and left out; what only looks like them stays."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpuscope._data.batch import RowFlag
from gpuscope.analysis._reading.stalls import Stalls
from gpuscope.analysis._structure.sizes import shape_of, sizes_in
from gpuscope.analysis._verdicts.cold import cold_lines, find_cold
from gpuscope.analysis.verdict import judge

from ..recordings import Stage, recording


def calls(durations_ms: list[float], **attributes: list) -> list[Stage]:
    """One call of `infer` a duration, in a request of its own, with each attribute's values in turn."""
    stages = []
    for number, ms in enumerate(durations_ms):
        start, given = number * 1e6, {name: values[number] for name, values in attributes.items()}
        infer = Stage("infer", start + 10, start + 10 + ms * 1000, attributes=given)
        stages.append(Stage("request", start, infer.end + 10, inside=[infer]))
    return stages


def found(stages: list[Stage]) -> list[tuple[int, str, str]]:
    """Number of the request, name and reason of each cold call."""
    return [(round((call.start_ns / 1e3) % 1e9 // 1e6), call.name, call.because) for call in find(stages).calls]


def find(stages: list[Stage]):
    """Return the cold calls."""
    return find_cold(recording(*stages))


def test_an_isolated_slow_call_is_cold_and_leaves_with_its_request():
    """A hundred calls of 5 ms and one of 80: the one is listed once, and the stages around it are left out too."""
    cold = find(calls([5.0] * 60 + [80.0] + [5.0] * 40))
    assert [(call.name, call.ms, call.usual_ms, call.because) for call in cold.calls] == [("infer", 80, 5, "isolated")]
    assert cold.rows.sum() == 2


def test_the_first_call_with_a_new_shape_is_cold_if_slow():
    """Compilation for a new batch size is told by its size."""
    sizes = [8] * 30 + [16] * 30
    (call,) = find(calls([5.0] * 30 + [900.0] + [9.0] * 29, batch_size=sizes)).calls
    assert (call.name, call.because, call.usual_ms) == ("infer", "first call with batch_size=16", 9)


def test_the_only_call_of_a_shape_is_cold_if_it_costs_more_than_its_size_explains():
    """Without others of its kind, a call may cost as the square of its size; more than three times that is cold."""
    sizes = [8] * 30 + [32] + [8] * 30
    assert not find(calls([5.0] * 30 + [79.0] + [5.0] * 30, batch_size=sizes)).calls
    (call,) = find(calls([5.0] * 30 + [900.0] + [5.0] * 30, batch_size=sizes)).calls
    assert call.because == "first call with batch_size=32"


def test_a_shape_that_the_request_has_holds_for_the_stages_inside():
    """What changes is looked for on the stages around, and only that is told."""
    stages = calls([5.0] * 30 + [300.0] + [5.0] * 30)
    given = [{"input_shape": [1, 8 if number < 30 else 9], "height": 4} for number in range(61)]
    cold = find([Stage(s.name, s.start, s.end, inside=s.inside, attributes=given[n]) for n, s in enumerate(stages)])
    assert [call.because for call in cold.calls] == ["first call with input_shape=[1, 9]"]


@pytest.mark.parametrize(
    "durations_ms",
    [
        [5.0] * 5 + [80.0] + [5.0] * 3,
        [5.0, 5.0, 5.0, 80.0] * 25,
        [5.0] * 50 + [80.0] * 2 + [5.0] * 50,
        [5.0] * 50 + [14.0] + [5.0] * 50,
        [0.005] * 50 + [0.09] + [0.005] * 50,
        [2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 13.0] * 10 + [19.0],
    ],
    ids=["too few calls", "often", "in a row", "not by much", "microseconds", "widely spread"],
)
def test_what_the_stage_is_like_is_not_cold(durations_ms):
    """Slow calls that come often or in a row, or that are not far out, stay in the figures."""
    assert not find(calls(durations_ms)).calls


def test_warm_up_calls_are_no_late_cold_ones():
    """They are flagged already, and the shapes that they saw are not new any more."""
    stages = calls([900.0] + [5.0] * 40, batch_size=[16] + [8] * 40)
    first = Stage("infer", 10, 900_010, attributes={"batch_size": 16}, flags=RowFlag.WARMUP)
    assert not find([Stage("request", 0, 900_020, inside=[first], flags=RowFlag.WARMUP), *stages[1:]]).calls


def test_one_cold_call_is_listed_a_request():
    """The wait for a cold call's GPU work is slow as well, and is not a second one; both are left out."""
    stages = []
    for number in range(40):
        start, slow = number * 1e6, 100 if number == 20 else 1
        infer = Stage("infer", start + 10, start + 20, gpu=(start + 13, start + 13 + 5000 * slow))
        fetch = Stage("fetch", start + 30, start + 5020 * slow, gpu=(start + 13 + 5000 * slow, start + 5019 * slow))
        stages.append(Stage("request", start, start + 5030 * slow, inside=[infer, fetch]))
    cold = find(stages)
    assert len(cold.calls) == 1
    assert cold.rows.sum() == 3


def test_sizes_and_shapes_are_told_by_the_last_word_of_a_name():
    """Numbers of something are sizes; shapes are compared as text; other attributes say nothing."""
    inner = Stage("infer", 1, 2, attributes={"gen_ai.usage.input_tokens": 7, "input_shape": [1, 3], "model": "vit"})
    outer = Stage(
        "request", 0, 3, inside=[inner], attributes={"batch_size": 8, "nbytes": 3, "dtype": "half", "bytes": 1e999}
    )
    shape = shape_of(recording(outer), 1)
    assert dict(shape) == {
        "batch_size": 8,
        "bytes": float("inf"),
        "dtype": "half",
        "gen_ai.usage.input_tokens": 7,
        "input_shape": "[1, 3]",
    }
    assert sizes_in(shape) == {"batch_size": 8, "gen_ai.usage.input_tokens": 7}


def test_tokens_of_a_batch_are_no_second_size_beside_those_of_a_sequence():
    """A `generate` says both, and a report is the same as if it said the latter only."""
    sizes = {"batch_size": 2, "input_length": 3, "new_tokens": 4}
    totals = {"gen_ai.usage.input_tokens": 6, "gen_ai.usage.output_tokens": 8}
    both, one, other = (
        shape_of(recording(Stage("generate", 0, 3, attributes=each)), 0)
        for each in (sizes | totals, sizes, totals | {"batch_size": 2})
    )
    assert both == one == tuple(sorted(sizes.items()))
    assert sizes_in(other) == {"batch_size": 2, **totals}


@pytest.mark.parametrize("value", [2.0**60, -(2.0**60), float("inf"), float("nan"), 10**400])
def test_what_no_float_can_count_is_not_a_size(value):
    """A number so large that sums of it overflow says nothing about the work."""
    assert sizes_in((("batch_size", value), ("tokens", 2**53))) == {"tokens": 2**53}


@pytest.mark.parametrize(("others", "usual_ms"), [(2, 20), (3, 9), (4, 9)])
def test_three_other_calls_tell_what_a_shape_costs(others, usual_ms):
    """With fewer, what it costs is guessed from its sizes: twice the size, four times the cost."""
    sizes = [8] * 30 + [16] * (1 + others)
    (call,) = find(calls([5.0] * 30 + [900.0] + [9.0] * others, batch_size=sizes)).calls
    assert call.usual_ms == usual_ms


@pytest.mark.parametrize(
    ("usual_ms", "slow_ms", "cold"),
    [(5.0, 15.0, True), (5.0, 14.9, False), (0.005, 0.105, True), (0.005, 0.104, False)],
)
def test_a_cold_call_takes_three_times_as_long_and_a_tenth_of_a_millisecond_longer(usual_ms, slow_ms, cold):
    """Both, and exactly that is enough."""
    assert bool(find(calls([usual_ms] * 30 + [slow_ms] + [usual_ms] * 30)).calls) is cold
    sizes = {"batch_size": [8] * 30 + [9] + [8] * 15 + [9] * 15}
    assert bool(find(calls([usual_ms] * 30 + [slow_ms] + [usual_ms] * 30, **sizes)).calls) is cold


@pytest.mark.parametrize(("slow_ms", "cold"), [(22.0, True), (12.0, False)])
def test_what_is_far_out_is_told_by_how_much_calls_differ(slow_ms, cold):
    """Six robust standard deviations above the median: of calls that differ by a sixth, some three times of it."""
    usual = [4.3, 4.6, 5.0, 5.4, 5.8] * 12
    assert bool(find(calls([*usual, slow_ms, *usual])).calls) is cold


@pytest.mark.parametrize(
    ("count", "slow", "found"), [(12, 1, 1), (12, 2, 0), (40, 2, 2), (40, 3, 0), (60, 3, 3), (400, 4, 0)]
)
def test_slow_calls_are_isolated_up_to_one_in_twenty_and_up_to_three(count, slow, found):
    """One always may be; those that come again and again are a tail, and what the stage is like."""
    durations = [80.0 if number % 4 == 2 and number // 4 < slow else 5.0 for number in range(count)]
    assert durations.count(80.0) == slow
    assert len(find(calls(durations)).calls) == found


def test_a_tail_is_one_over_all_processes_and_shapes():
    """Two slow calls in each of two workers, or with each of two sizes, are four that come again."""
    slow = [80.0 if number in (10, 30) else 5.0 for number in range(50)]
    workers = [replace(each, process=f"worker {number}") for number in range(2) for each in calls(slow)]
    assert not find(workers).calls
    assert len(find([each for each in workers if each.process == "worker 0"]).calls) == 2
    sizes = [8, 8, 16, 16] * 25
    assert not find(
        calls([80.0 if number in (10, 30, 52, 72) else 5.0 for number in range(100)], batch_size=sizes)
    ).calls


def test_a_recurring_tail_is_judged():
    """Every 50th of 1,000 requests takes 400 ms: the slowest that is judged is one of them, and none is called cold."""
    said = str(judge(recording(*calls([400.0 if number % 50 == 25 else 10.0 for number in range(1000)]))))
    assert "The slowest took 400 ms" in said
    assert "cold:" not in said


def test_first_calls_of_many_shapes_stay_cold():
    """Each compiles once: they do not come again."""
    sizes = [1 + number // 10 for number in range(100)]
    durations = [900.0 if number % 10 == 0 and number else 5.0 for number in range(100)]
    assert len(find(calls(durations, batch_size=sizes)).calls) == 9


def test_where_each_call_has_a_size_of_its_own_a_tail_is_one():
    """Every 50th takes 400 ms; that it is the first with so many tokens, as all others are, is no reason."""
    durations = [400.0 if number % 50 == 25 else 10.0 for number in range(400)]
    assert not find(calls(durations, tokens=[1000 + number for number in range(400)])).calls
    few = [400.0 if number in (25, 75) else 10.0 for number in range(400)]
    assert len(find(calls(few, tokens=[1000 + number for number in range(400)])).calls) == 2


def test_cold_calls_are_told_in_few_lines_with_a_trace():
    """One line per stage, of the call that cost most."""
    durations = [5.0] * 60
    durations[20], durations[40] = 80.0, 90.0
    lines = [line for line in str(judge(recording(*calls(durations)))).splitlines() if line.startswith("cold")]
    trace = f"{2 * 40 + 1:032x}"
    assert lines == [f"cold: `infer` 90.0 ms instead of 5.00 ms, isolated (trace {trace}); and 1 more; not judged"]


def test_many_stages_with_cold_calls_take_few_lines():
    """Five, and how many there are besides."""
    names = [f"stage {number}" for number in range(8)]
    stages = []
    for number in range(40):
        zero = number * 1e6
        inside = [
            Stage(name, zero + 10_000 * place, zero + 10_000 * place + (9000 if number == 15 + place else 1000))
            for place, name in enumerate(names)
        ]
        stages.append(Stage("request", zero, zero + 90_000, inside=inside))
    lines = list(cold_lines(find(stages).calls))
    assert len(lines) == 6
    assert lines[-1] == "cold: 3 more in 3 other stages; not judged"


def test_time_outside_the_stages_inside_is_told_as_such():
    """The request itself took 30 ms instead of 0.1; it is not the request that takes 10 ms."""
    stages = []
    for number in range(40):
        zero, more = number * 1e6, 30_000 if number == 20 else 100
        stages.append(Stage("request", zero, zero + 10_000 + more, inside=[Stage("infer", zero, zero + 10_000)]))
    (line,) = cold_lines(find(stages).calls)
    assert line.startswith("cold: `request` itself, outside its stages, 30.0 ms instead of 100 µs, isolated")


def test_a_call_that_stalled_is_not_cold():
    """It is told as a stall, and is the slowest."""
    whole = recording(*calls([5.0] * 60 + [4990.0] + [5.0] * 40))
    row = 2 * 60 + 1
    object.__setattr__(whole, "stalls", Stalls(stalled={row: "host_never_left"}))
    said = list(judge(whole).summary())
    assert said[0] == f"1 stall: host_never_left in `infer`, 4.99 s, trace {2 * 60 + 1:032x}."
    assert "The slowest took 4.99 s" in " ".join(said)
    assert not find_cold(whole).calls


@pytest.mark.parametrize("count", [9, 10])
def test_ten_calls_tell_what_is_usual(count):
    """Of a stage, and of a shape."""
    assert len(find(calls([5.0] * (count - 2) + [80.0, 5.0])).calls) == (count == 10)


def test_the_only_shape_is_not_a_new_one():
    """A slow first call of a stage whose calls are all alike is an isolated one."""
    (call,) = find(calls([900.0] + [5.0] * 30, batch_size=[8] * 31)).calls
    assert (call.name, call.because) == ("infer", "isolated")


def test_sizes_of_nothing_are_no_measure():
    """Where the median size is 0 a size says nothing about what a call may cost."""
    sizes = [0] * 30 + [8] + [0] * 30
    assert not find(calls([5.0] * 30 + [14.0] + [5.0] * 30, tokens=sizes)).calls
    (call,) = find(calls([5.0] * 30 + [16.0] + [5.0] * 30, tokens=sizes)).calls
    assert (call.because, call.usual_ms) == ("first call with tokens=8", 5)


def test_a_smaller_shape_may_cost_what_is_usual():
    """Half the size is no reason for more; nor for less."""
    sizes = [8] * 30 + [4] + [8] * 30
    assert not find(calls([5.0] * 30 + [14.0] + [5.0] * 30, batch_size=sizes)).calls
    (call,) = find(calls([5.0] * 30 + [16.0] + [5.0] * 30, batch_size=sizes)).calls
    assert (call.because, call.usual_ms) == ("first call with batch_size=4", 5)


def test_a_slow_call_that_is_flagged_as_warm_up_is_none():
    """Wherever it comes; and it does not count among those of its shape."""
    stages = calls([5.0] * 30 + [80.0] + [5.0] * 30)
    (slow,) = stages[30].inside
    stages[30] = replace(stages[30], inside=[replace(slow, flags=RowFlag.WARMUP)])
    assert not find(stages).calls


def test_the_call_of_a_request_that_cost_most_is_listed():
    """By what it took longer than usual, not by what it took."""
    stages = []
    for number in range(40):
        start, slow = number * 1e6, number == 20
        heavy = Stage("heavy", start + 10, start + 10 + (100_000 if slow else 30_000))
        light = Stage("light", heavy.end + 10, heavy.end + 10 + (90_000 if slow else 1_000))
        stages.append(Stage("request", start, light.end + 10, inside=[heavy, light]))
    assert [(call.name, call.ms, call.usual_ms) for call in find(stages).calls] == [("light", 90, 1)]
    assert find(stages).rows.sum() == 3
