"""`warm_up` and `measure`."""

from __future__ import annotations

import functools
import threading

import pytest

import gpuscope
from gpuscope import stage


@stage("inner")
def inner():
    """Do nothing, as a stage."""


class TestWarmUp:
    """Running something before it counts."""

    def test_calls_with_the_arguments(self):
        """The function is called so often, with what was given."""
        seen = []
        gpuscope.warm_up(lambda *args, **kwargs: seen.append((args, kwargs)), 1, 2, iterations=3, key=4)
        assert seen == [((1, 2), {"key": 4})] * 3

    def test_everything_inside_is_warmup(self, bench):
        """However many stages run inside, each is flagged; those after it are not."""
        gpuscope.warm_up(lambda: stage("infer").__enter__().__exit__(None, None, None), iterations=20)
        with stage("infer"):
            pass
        flags = [span.attributes.get("gpuscope.warmup", False) for span in bench.named("infer")]
        assert flags == [True] * 20 + [False]
        (around,) = bench.named("warm-up")
        assert around.attributes["gpuscope.warmup"]

    def test_statistics_leave_it_out(self, bench):
        """The summary's figures are of the calls that count."""
        gpuscope.warm_up(inner_block, iterations=5)
        inner_block()
        bench.collect()
        (line,) = (each for each in bench.engine.summary.summary().stages if each.name == each.root == "block")
        assert (line.calls, line.warmup_calls) == (1, 0)

    def test_exception_passes_through(self, bench):
        """What the function raises is the caller's, and the stage around it has ended with that error."""
        with pytest.raises(ZeroDivisionError):
            gpuscope.warm_up(lambda: 1 // 0)
        (around,) = bench.named("warm-up")
        assert around.attributes["error.type"] == "ZeroDivisionError"

    def test_records_nothing_where_recording_is_off(self):
        """Without recording it only calls."""
        seen = []
        gpuscope.warm_up(seen.append, 1, iterations=2)
        assert seen == [1, 1]


def inner_block():
    """Run a stage."""
    with stage("block"):
        pass


class TestStageWarmup:
    """The number of warm-up calls of one stage."""

    def warmups(self, bench, name):
        """Return the flag of each call."""
        return [span.attributes.get("gpuscope.warmup", False) for span in bench.named(name)]

    def test_block(self, bench):
        """`with stage(name, warmup=2)`."""
        for _ in range(4):
            with stage("warmed twice", warmup=2):
                pass
        assert self.warmups(bench, "warmed twice") == [True, True, False, False]

    def test_decorated(self, bench):
        """`@stage(name, warmup=1)`, and without a name."""

        @stage("named", warmup=1)
        def named():
            pass

        @stage(warmup=1)
        def unnamed():
            pass

        for _ in range(2):
            named()
            unnamed()
        assert self.warmups(bench, "named") == [True, False]
        assert self.warmups(bench, "unnamed") == [True, False]

    def test_others_keep_the_configured_number(self, make_bench):
        """A stage's own number is its own, also 0."""
        bench = make_bench(warmup=2)
        for _ in range(3):
            with stage("never warmed", warmup=0):
                pass
            with stage("warmed as configured"):
                pass
        assert self.warmups(bench, "never warmed") == [False] * 3
        assert self.warmups(bench, "warmed as configured") == [True, True, False]

    @pytest.mark.parametrize(
        ("warmup", "error"), [(1.5, TypeError), (True, TypeError), ("3", TypeError), (-1, ValueError)]
    )
    def test_what_is_no_number_of_calls_is_refused(self, warmup, error):
        """Said at once, whether recording is on or not."""
        with pytest.raises(error, match="`warmup` of a `stage`"):
            stage("a", warmup=warmup)


class TestMeasure:
    """The quick comparison."""

    def test_slower_function_is_slower(self):
        """Figures belong to their functions, in the order given, and add up."""

        def quick():
            pass

        def slow():
            sum(range(20_000))

        measured = gpuscope.measure(quick, slow, iterations=20, warmup=1)
        assert [each.name for each in measured] == ["quick", "slow"]
        assert measured[0].host_ms.median < measured[1].host_ms.median
        for each in measured:
            assert each.iterations == 20
            assert 0 <= each.host_ms.p25 <= each.host_ms.median <= each.host_ms.p75

    def test_functions_alternate(self):
        """Each round runs every function once; warm-up rounds come first and are not counted."""
        order = []
        gpuscope.measure(lambda: order.append("a"), lambda: order.append("b"), iterations=4, warmup=2)
        assert [sorted(order[at : at + 2]) for at in range(0, 12, 2)] == [["a", "b"]] * 6
        assert len(order) == 12

    def test_prints_as_a_table(self):
        """A line a function under a heading, with the ratio to the first."""
        lines = str(gpuscope.measure(threading.active_count, functools.partial(sum, [1]), iterations=2)).splitlines()
        assert len(lines) == 3
        assert "ratio" in lines[0]
        assert lines[1].split()[0] == "active_count"
        assert lines[1].split()[-1] == "1.00"
        assert lines[2].split()[0] == "sum"

    @pytest.mark.parametrize(
        ("functions", "settings", "error"),
        [
            ((), {}, TypeError),
            ((1,), {}, TypeError),
            ((int,), {"iterations": 0}, ValueError),
            ((int,), {"warmup": -1}, ValueError),
            ((int,), {"iterations": "3"}, TypeError),
            ((int,), {"iterations": 1.5}, TypeError),
            ((int,), {"warmup": None}, TypeError),
        ],
    )
    def test_nonsense_is_refused(self, functions, settings, error):
        """With what was seen and what is allowed."""
        with pytest.raises(error, match=r"`measure` needs|can't be called|expected"):
            gpuscope.measure(*functions, **settings)
