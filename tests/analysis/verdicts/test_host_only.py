"""The answer on top where only the host's times are known: batches, garbage collections, what an item costs."""

from __future__ import annotations

import pytest

from gpuscope._data.batch import RowFlag
from gpuscope.analysis._reading.stalls import Collected, Stalls
from gpuscope.analysis.verdict import judge

from ..recordings import Stage, batched, paused, recording, repeat


def on_top(whole, name: str = "request") -> str:
    """Return the lines of the answer for a kind of request, as one."""
    return " ".join(str(next(each for each in judge(whole).answers if each.name == name)).split())


def in_batches(wait: float, runs: float, *, at_once: int = 1):
    """
    Thirty times: requests of 1 ms before their batches, which run one after the other, and 1 ms after them.

    Args:
        wait: milliseconds from the requests' tokens to the first batch.
        runs: milliseconds of a batch.
        at_once: how many requests begin at the same time, each with a batch of its own.

    """
    stages = []
    for number in range(30):
        zero, first = number * 1e6, 1000
        for turn in range(at_once):
            begins = zero + first + 1000 * (wait + turn * runs)
            ends = begins + 1000 * runs
            inside = [Stage("read", zero, zero + first), Stage("answer", ends, ends + 1000)]
            stages.append(Stage("request", zero, ends + 1000, inside=inside, thread=f"{turn}"))
            stages.append(Stage("predict", begins, ends, thread="batcher"))
    whole = recording(*stages)
    rows = {name: [row for row, at in enumerate(whole.stage) if whole.names[at] == name] for name in whole.names}
    tokens = [(whole.host_start_ns[row] - whole.host_start_ns[0]) / 1e3 % 1e6 - first for row in rows["predict"]]
    pairs = zip(rows["predict"], rows["request"], tokens, strict=True)
    return batched(whole, *[(batch, {request: (token, -1.0)}) for batch, request, token in pairs])


class TestBatches:
    """Requests that are members of batches."""

    def test_what_is_spent_there_is_the_answer(self):
        """Of 20 ms, 12 in the batch and 6 waiting for it are 90%; it is not said to be in no stage."""
        said = on_top(in_batches(6, 12))
        assert "`request` takes 20.0 ms (median of 30 requests)." in said
        assert "On average, 90% of it is spent in or waiting for the batch `predict`" in said
        assert "none of them for 30%, and its own for 60%" in said
        assert "no stage" not in said

    @pytest.mark.parametrize(
        ("wait", "runs", "advice"), [(12, 6, "a shorter waiting time"), (6, 12, "Make `predict` itself shorter")]
    )
    def test_the_advice_is_for_the_largest_part(self, wait, runs, advice):
        """Waiting wants another setting of the batcher than long batches do."""
        assert advice in on_top(in_batches(wait, runs))

    def test_others_batches_are_a_queue(self):
        """Of four that come at once, with batches of 10 ms, the last three wait 30 ms at most: more at a time helps."""
        said = on_top(in_batches(0, 10, at_once=4))
        assert "other batches ran for 56% of it, none of them for 0%, and its own for 37%" in said
        assert "Try first: More at a time" in said

    def test_where_the_request_itself_takes_long_that_is_the_answer(self):
        """A stage of 1 ms of a request of 2.2 is more than a batch of 0.2, and waiting is not in no stage."""
        said = on_top(in_batches(0, 0.2))
        assert "The largest part of it is `read`: 1.00 ms (45%)" in said

    def test_the_slowest_is_told_by_what_its_batch_did(self):
        """Not by time in no stage."""
        whole = in_batches(6, 12)
        last = len(whole.stage) - 1
        predict = max(row for row in range(last + 1) if whole.names[whole.stage[row]] == "predict")
        request = int(whole.batches.links.member[-1])
        answer = max(row for row in range(last + 1) if whole.names[whole.stage[row]] == "answer")
        for column in (whole.host_end_ns,):
            column[[predict, request, answer]] += 20_000_000
        whole.host_start_ns[answer] += 20_000_000
        assert "it was 20.0 ms longer than usual in its batch." in on_top(whole)

    def test_few_members_are_not_what_the_kind_is(self):
        """One batched request of thirty."""
        whole = recording(
            *repeat(Stage("request", 0, 1000, inside=[Stage("db", 0, 900)]), 30, 5000),
            Stage("predict", 200_000, 200_100),
        )
        assert "Most of it is `db`" in on_top(batched(whole, (len(whole.stage) - 1, {0: (1.0, -1.0)})))


class TestCollections:
    """Garbage collections that take most of the time."""

    def pausing(self, generation: int = 2):
        """Requests of 2 ms, of which every fourth takes 200 ms more, in a garbage collection."""
        stages, pauses = [], []
        for number in range(40):
            zero, more = number * 1e6, 200_000 * (number % 4 == 0)
            stages.append(Stage("request", zero, zero + 2000 + more, inside=[Stage("build", zero, zero + 1700 + more)]))
            pauses += [(zero + 100, zero + 100 + more)] if more else []
        whole = paused(recording(*stages), *pauses)
        found = {
            row: tuple(c._replace(generation=generation) for c in each)
            for row, each in whole.stalls.collections.items()
        }
        object.__setattr__(whole, "stalls", Stalls(found))
        return whole

    def test_they_are_the_answer_and_no_stage_is(self):
        """50 ms on average are 96% of all time; the stage that they happened in took 1.7 ms itself."""
        said = on_top(self.pausing())
        assert "Most of it is garbage collection: 50.0 ms on average (96%), and most requests have none." in said
        assert "Try first: Call `gc.collect()` and then `gc.freeze()`" in said
        assert "it had 200 ms more of garbage collection" in said

    def test_young_objects_want_another_advice(self):
        """What stays is not what takes the time."""
        assert "gc.set_threshold" in on_top(self.pausing(generation=1))

    def test_own_time_is_without_them(self):
        """A stage of 4 ms, 1 of it a collection, is 3 of 5 ms; so for stages that run at the same time."""
        one = paused(recording(Stage("request", 0, 5000, inside=[Stage("a", 0, 4000)])), (1000, 2000))
        assert "Most of it is `a`: 3.00 ms (60%)" in on_top(one)
        tasks = [Stage("a", 0, 4000), Stage("b", 500, 4500)]
        both = paused(recording(Stage("request", 0, 5000, inside=tasks)), (1000, 3000))
        assert "The largest part of it is garbage collection: 2.00 ms (40%)" in on_top(both)

    def test_collections_of_another_process_take_nothing(self):
        """Each process has its own."""
        whole = recording(
            Stage("request", 0, 5000, inside=[Stage("a", 0, 4000)]), Stage("other", 0, 5000, process="worker")
        )
        other = whole.names.index("other")
        row = whole.stage.tolist().index(other)
        start = int(whole.host_start_ns[row])
        object.__setattr__(whole, "stalls", Stalls({row: (Collected(start, 3_000_000, 2),)}))
        assert "Most of it is `a`: 4.00 ms (80%)" in on_top(whole)
        assert "garbage collection: 3.00 ms (60%)" in on_top(whole, "other")


class TestFigures:
    """Figures in one sentence agree."""

    def test_a_share_that_the_median_does_not_have_is_told_with_its_mean(self):
        """1.7 of 2 ms is 85%, and not the 99% of all requests together."""
        quick = Stage("request", 0, 2000, inside=[Stage("build", 0, 1700)])
        slow = Stage("request", 0, 202_000, inside=[Stage("build", 0, 201_700)])
        requests = [(slow if number % 4 == 0 else quick).shifted(400_000 * number) for number in range(40)]
        said = on_top(recording(*requests))
        assert "`build`: 51.7 ms on average (99%), and 1.70 ms in the median request" in said

    def test_a_stage_that_most_requests_do_not_have(self):
        """No 0 ns in the median request."""
        quick = Stage("request", 0, 2000, inside=[Stage("build", 0, 1700)])
        slow = Stage("request", 0, 202_000, inside=[Stage("infer", 0, 201_700)])
        requests = [(slow if number % 4 == 0 else quick).shifted(400_000 * number) for number in range(40)]
        said = on_top(recording(*requests))
        assert "`infer`: 50.4 ms on average (97%), and most requests have no `infer`" in said


def sized(*calls: tuple[int, float]):
    """Return requests of one stage with a batch size each, and milliseconds."""
    stages = []
    for number, (size, ms) in enumerate(calls):
        zero = number * 1e6
        inside = [Stage("infer", zero, zero + 1000 * ms, attributes={"batch_size": size})]
        stages.append(Stage("request", zero, zero + 1000 * ms + 100, inside=inside))
    return recording(*stages)


class TestCost:
    """What an item costs."""

    def test_one_size_does_not_tell(self):
        """Nor do sizes that are nearly the same."""
        assert "per unit of" not in on_top(sized(*[(4, 10.0)] * 50))
        assert "per unit of" not in on_top(sized(*[(4, 10.0), (5, 12.5)] * 25))

    def test_sizes_that_differ_do_where_an_item_costs_the_same(self):
        """Too few calls for a line, and each costs 2.5 ms per item."""
        assert "`infer` costs 2.50 ms per unit of `batch_size`." in on_top(sized((2, 5.0), (4, 10.0), (8, 20.0)))

    def test_a_cost_that_does_not_grow_is_not_one_per_item(self):
        """Each call takes 10 ms, however large."""
        assert "per unit of" not in on_top(sized((2, 10.0), (4, 10.0), (8, 10.0)))


def test_warm_up_requests_alone_are_told_of():
    """With nothing else, the answer is of them; nothing divides by zero."""
    whole = recording(
        Stage("request", 0, 1000, flags=RowFlag.WARMUP, inside=[Stage("a", 0, 900, flags=RowFlag.WARMUP)])
    )
    assert "`a`: 900 µs (90%)" in on_top(whole)
