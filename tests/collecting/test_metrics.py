"""Metrics from batches: what the histograms count, when a GPU is occupied, and how many series there can be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuscope._collecting.aggregation.metrics import MAX_STAGES, StageMetrics, account_points
from gpuscope._collecting.aggregation.summary import OTHER
from gpuscope._data.batch import DeviceInfo, RowFlag
from gpuscope._data.metrics import (
    BOUNDS_S,
    DROPPED,
    DURATION,
    EVENT_COST,
    IDLE,
    LAUNCH_DELAY,
    OCCUPIED,
    RECORDED,
    UNCERTAINTY,
)
from gpuscope._data.record import Site
from gpuscope._data.statistics import Statistics

from ..exporters.batches import NOW_NS, Row, make_batch

SECOND_NS = 1_000_000_000
DEVICES = {index: DeviceInfo(index, "Fake GPU", f"GPU-{index}") for index in (0, 1)}
A, B = Site("a", {}), Site("b", {})


def batch_of(*rows, sampled=True, nested=False):
    """A batch on two devices; `nested`: all rows are inside a stage of another name."""
    batch = make_batch(*rows, devices=DEVICES)
    changes = {"sampled": np.full(len(rows), sampled, np.bool_), "root": batch.site}
    if nested:
        changes |= {"sites": (*batch.sites, Site("root", {})), "root": np.full(len(rows), len(batch.sites), np.int32)}
    return replace(batch, **changes)


def series(points):
    """The values of a metric by their attributes' values."""
    return {tuple(point.attributes.values()): point.value for point in points}


ROWS = st.builds(
    Row,
    site=st.sampled_from([A, B]),
    host_ns=st.integers(0, 20 * SECOND_NS),
    launch_ns=st.integers(0, 20 * SECOND_NS),
    gpu_ns=st.integers(0, 20 * SECOND_NS),
    gpu_span_id=st.sampled_from([0, 9]),
    device=st.sampled_from([0, 1]),
    flags=st.sampled_from([0, 0, int(RowFlag.WARMUP), int(RowFlag.CLAMPED)]),
)


def expected(rows, name, device=None, *, delay=False):
    """Buckets and sum as numpy counts them, which includes lower bounds where ours include upper ones."""
    chosen = [row for row in rows if row.site.name == name and not row.flags & RowFlag.WARMUP]
    if device is None:
        seconds = [row.host_ns / 1e9 for row in chosen]
    else:
        chosen = [row for row in chosen if row.gpu_span_id and row.device == device]
        seconds = [(row.launch_ns if delay else row.gpu_ns) / 1e9 for row in chosen]
    counts, _ = np.histogram(-np.array(seconds), [-np.inf, *(-bound for bound in reversed(BOUNDS_S)), np.inf])
    return tuple(reversed(counts.tolist())), pytest.approx(sum(seconds))


class TestHistograms:
    """Durations and launch delays."""

    @settings(max_examples=60, deadline=None)
    @given(rows=st.lists(ROWS, min_size=1, max_size=30), parts=st.integers(1, 5), ask_between=st.booleans())
    def test_counts_are_those_of_numpy_however_stages_are_batched(self, rows, parts, ask_between):
        """Each stage that is no warm-up is in one bucket of its stage, stream and device, whatever came with it."""
        metrics = StageMetrics(0)
        for part in np.array_split(np.arange(len(rows)), parts):
            if part.size:
                metrics.add(batch_of(*(rows[index] for index in part)))
            if ask_between:
                metrics.points()
        points = metrics.points()
        durations, delays = series(points[DURATION]), series(points[LAUNCH_DELAY])
        for name in ("a", "b"):
            wanted = {(name, "host"): expected(rows, name)}
            for index in (0, 1):
                wanted[name, "gpu", index, f"GPU-{index}"] = expected(rows, name, index)
                delay = delays.get((name, index, f"GPU-{index}"))
                assert (delay is None) == (not any(expected(rows, name, index)[0]))
                if delay is not None:
                    assert (delay.counts, delay.sum_s) == expected(rows, name, index, delay=True)
            for key, (counts, sum_s) in wanted.items():
                found = durations.get(key)
                assert (found is None) == (not any(counts))
                if found is not None:
                    assert (found.counts, found.sum_s) == (counts, sum_s)

    @pytest.mark.parametrize("rows", [1, 1023, 1024, 5000])
    def test_many_rows_are_all_counted(self, rows):
        """What is counted in one go has no bearing on what is counted."""
        metrics = StageMetrics(0)
        metrics.add(batch_of(*(Row(A, span_id=number + 1) for number in range(rows))))
        ((_, histogram),) = series(metrics.points()[DURATION]).items()
        assert sum(histogram.counts) == rows

    def test_a_bound_belongs_to_the_bucket_below_it(self):
        """A value equal to a bound is at most that bound, as OpenTelemetry and Prometheus have it."""
        metrics = StageMetrics(0)
        metrics.add(batch_of(Row(A, host_ns=1_000_000), Row(A, host_ns=1_000_001)))
        counts = metrics.points()[DURATION][0].value.counts
        bucket = BOUNDS_S.index(1e-3)
        assert counts[bucket : bucket + 2] == (1, 1)

    def test_the_slowest_sampled_stage_is_the_exemplar_once(self):
        """An exemplar links to a span that is exported: of its stream the slowest since the last were taken."""
        metrics = StageMetrics(0)
        metrics.add(batch_of(Row(A, host_ns=9 * SECOND_NS), sampled=False))
        metrics.add(batch_of(Row(A, span_id=1, host_ns=5), Row(A, span_id=2, host_ns=7), Row(A, span_id=3, host_ns=6)))
        metrics.add(batch_of(Row(A, span_id=4, host_ns=1, gpu_span_id=44, gpu_ns=8_000, launch_ns=1_000)))
        taken = series(metrics.points(exemplars=True)[DURATION])
        host, gpu = taken["a", "host"].exemplar, taken["a", "gpu", 0, "GPU-0"].exemplar
        assert (host.span_id, host.seconds, host.time_ns, host.trace_id) == (2, 7e-9, NOW_NS + 7, Row().trace_id)
        assert (gpu.span_id, gpu.seconds, gpu.time_ns) == (44, 8e-6, NOW_NS + 9_000)
        metrics.add(batch_of(Row(A, span_id=5, host_ns=2)))
        assert series(metrics.points()[DURATION])["a", "host"].exemplar is None
        assert series(metrics.points(exemplars=True)[DURATION])["a", "host"].exemplar.span_id == 5

    def test_a_slower_exemplar_is_kept_over_what_comes_later(self):
        """Also where the two are counted at different times."""
        metrics = StageMetrics(0)
        for span_id, host_ns in ((1, 5), (2, 9), (3, 8)):
            metrics.add(batch_of(Row(A, span_id=span_id, host_ns=host_ns)))
            metrics.points()
        assert series(metrics.points(exemplars=True)[DURATION])["a", "host"].exemplar.span_id == 2

    @pytest.mark.parametrize(
        ("rows", "kept"), [(10, [10, 20, 30, 40, 50, 60, 70, 0, 10]), (512, [512, 0, 512]), (511, [511, 1022, 0])]
    )
    def test_what_is_not_counted_yet_is_bounded(self, rows, kept):
        """Batches wait until there are eight of them, or a thousand rows, and no longer."""
        metrics, batch = StageMetrics(0), batch_of(*(Row(A) for _ in range(rows)))
        for waiting in kept:
            metrics.add(batch)
            assert metrics._uncounted_rows == waiting

    def test_names_beyond_the_limit_share_a_series(self):
        """However many names a program makes, the series are bounded, and no stage is left out."""
        metrics = StageMetrics(0)
        for number in range(3 * MAX_STAGES):
            metrics.add(batch_of(Row(Site(f"s{number}", {}), gpu_span_id=1)))
        found = series(metrics.points()[DURATION])
        assert len(found) == 2 * (MAX_STAGES + 1)
        assert sum(found[OTHER, "host"].counts) > MAX_STAGES
        assert sum(sum(histogram.counts) for histogram in found.values()) == 6 * MAX_STAGES

    def test_a_name_that_is_no_text_is_made_one(self):
        """A lone surrogate in a stage's name would make the whole message impossible to encode."""
        metrics = StageMetrics(0)
        metrics.add(batch_of(Row(Site("\ud800", {}))))
        assert metrics.points()[DURATION][0].attributes["gpuscope.stage"] == "?"


def occupied(*intervals, device=0, **kwargs):
    """Rows on a GPU, each (start, end) in seconds after `NOW_NS`."""
    return [
        Row(
            A,
            span_id=100 + number,
            gpu_span_id=1,
            device=device,
            start_ns=NOW_NS + round(start * SECOND_NS),
            launch_ns=0,
            gpu_ns=round((end - start) * SECOND_NS),
            **kwargs,
        )
        for number, (start, end) in enumerate(intervals)
    ]


def ratios(metrics, spec=OCCUPIED):
    """The ratio of each device."""
    return {point.attributes["gpuscope.device.index"]: point.value for point in metrics.points()[spec]}


INTERVALS = st.lists(
    st.tuples(st.integers(0, 80), st.integers(0, 40)).map(lambda pair: (pair[0], sum(pair))), max_size=20
)


class TestOccupancy:
    """Busy and idle ratios."""

    def test_unknown_until_the_first_interval_ends(self):
        """Before the first interval is over there is no ratio, rather than a wrong one."""
        metrics = StageMetrics(NOW_NS)
        metrics.add(batch_of(*occupied((0, 1))))
        assert ratios(metrics) == {}

    @settings(max_examples=80, deadline=None)
    @given(
        intervals=INTERVALS.filter(bool), order=st.randoms(use_true_random=False), cuts=st.lists(st.integers(0, 120))
    )
    def test_ratio_is_of_the_union(self, intervals, order, cuts):
        """Overlapping intervals count once, in whatever order and pieces they come and however often it is settled."""
        metrics = StageMetrics(NOW_NS)
        rows = occupied(*intervals)
        order.shuffle(rows)
        for row in rows:
            metrics.add(batch_of(row))
        for cut in sorted(cuts):
            metrics.settle(NOW_NS + cut * SECOND_NS, last=True)
        metrics.settle(NOW_NS + 120 * SECOND_NS, last=True)
        metrics.end_interval()
        union = len({second for start, end in intervals for second in range(start, end)})
        assert ratios(metrics) == {0: pytest.approx(union / 120)}
        assert ratios(metrics, IDLE) == {0: pytest.approx(1 - union / 120)}
        for spec in (OCCUPIED, IDLE):
            assert metrics.points()[spec][0].attributes == {
                "gpuscope.device.index": 0,
                "hw.id": "GPU-0",
                "hw.type": "gpu",
                "hw.model": "Fake GPU",
                "hw.vendor": "NVIDIA",
            }

    def test_each_interval_and_device_has_its_own(self):
        """A stage is counted in the intervals that it is in, part by part; a device without stages is idle."""
        metrics = StageMetrics(NOW_NS)
        metrics.add(batch_of(*occupied((5, 15)), *occupied((0, 10), device=1)))
        found = []
        for end in (10, 20, 30):
            metrics.settle(NOW_NS + end * SECOND_NS, last=True)
            metrics.end_interval()
            found.append(ratios(metrics))
        assert found == [{0: 0.5, 1: 1.0}, {0: 0.5, 1: 0.0}, {0: 0.0, 1: 0.0}]

    @pytest.mark.parametrize("together", [True, False])
    def test_only_leaf_stages_count(self, together):
        """A stage's interval covers the stages inside it and the gaps between them, so only the innermost count."""
        metrics = StageMetrics(NOW_NS)
        inner = [replace(row, parent_id=7) for row in occupied((1, 2), (3, 4))]
        (outer,) = (replace(row, span_id=7) for row in occupied((0, 10)))
        outer.site = B
        if together:
            batch = batch_of(*inner, outer)
            metrics.add(replace(batch, root=np.full(3, batch.site[2])))
        else:
            metrics.add(batch_of(*inner, nested=True))
            metrics.points()
            metrics.add(batch_of(outer))
        metrics.settle(NOW_NS + 10 * SECOND_NS, last=True)
        metrics.end_interval()
        assert ratios(metrics) == {0: pytest.approx(0.2)}

    def test_a_replay_counts_as_a_whole(self):
        """Work in a graph outside any stage inside it is work as well: the stage around the replay counts."""
        metrics = StageMetrics(NOW_NS)
        inner = [replace(row, parent_id=7, flags=int(RowFlag.IN_GRAPH)) for row in occupied((1, 2), (3, 4))]
        (outer,) = (replace(row, span_id=7, site=B) for row in occupied((0, 10)))
        batch = batch_of(*inner, outer)
        metrics.add(replace(batch, root=np.full(3, batch.site[2])))
        metrics.settle(NOW_NS + 20 * SECOND_NS, last=True)
        metrics.end_interval()
        assert ratios(metrics) == {0: pytest.approx(0.5)}

    def test_what_may_still_come_is_waited_for(self):
        """The time that is counted ends long enough ago for stages as long as those seen to have ended in it."""
        metrics = StageMetrics(NOW_NS)
        metrics.add(batch_of(*occupied((0, 10))))
        metrics.settle(NOW_NS + 30 * SECOND_NS)
        metrics.add(batch_of(*occupied((13, 23))))
        metrics.settle(NOW_NS + 43 * SECOND_NS)
        metrics.end_interval()
        assert ratios(metrics) == {0: pytest.approx(20 / 26)}

    @pytest.mark.parametrize("intervals", [((0, 10), (4, 5)), ((4, 5), (0, 10))])
    def test_the_longest_stage_of_a_batch_says_how_long(self, intervals):
        """Wherever in the batch it is: two seconds, and one and a half times as long as it took."""
        metrics = StageMetrics(NOW_NS)
        metrics.add(batch_of(*occupied(*intervals)))
        metrics.settle(NOW_NS + 37 * SECOND_NS)
        metrics.end_interval()
        assert ratios(metrics) == {0: pytest.approx(10 / 20)}

    def test_no_stage_is_waited_for_longer_than_a_minute(self):
        """However long those before it took, because the metrics would be as late."""
        metrics = StageMetrics(NOW_NS)
        metrics.add(batch_of(*occupied((0, 100))))
        metrics.settle(NOW_NS + 160 * SECOND_NS)
        metrics.end_interval()
        metrics.add(batch_of(*occupied((90, 110))))
        metrics.settle(NOW_NS + 180 * SECOND_NS)
        metrics.end_interval()
        assert ratios(metrics) == {0: pytest.approx(10 / 20)}

    def test_an_interval_without_any_time_changes_nothing(self):
        """The ratios are those of the last interval that had a length."""
        metrics = StageMetrics(NOW_NS)
        metrics.add(batch_of(*occupied((0, 1))))
        metrics.settle(NOW_NS + 2 * SECOND_NS, last=True)
        for _ in range(2):
            metrics.end_interval()
            assert ratios(metrics) == {0: pytest.approx(0.5)}

    @pytest.mark.parametrize("one", [5, 9])
    def test_stages_that_have_many_inside_do_not_crowd_out_others(self, one):
        """A stage whose row comes late is known as the one around another, whatever else has come meanwhile."""
        metrics = StageMetrics(NOW_NS)
        metrics.add(batch_of(*(replace(row, parent_id=one) for row in occupied((1, 2))), nested=True))
        (many,) = (replace(row, parent_id=7) for row in occupied((3, 4)))
        metrics.add(batch_of(*[many] * 2000, nested=True))
        outer = [replace(row, span_id=span_id, site=B) for span_id in (one, 7) for row in occupied((0, 10))]
        metrics.add(batch_of(*outer))
        metrics.settle(NOW_NS + 10 * SECOND_NS, last=True)
        metrics.end_interval()
        assert ratios(metrics) == {0: pytest.approx(0.2)}

    def test_however_many_batches_come_they_are_one_union(self):
        """Also before they are settled, and with pieces that overlap those of other batches."""
        metrics = StageMetrics(NOW_NS)
        for number in range(300):
            metrics.add(batch_of(*occupied((number / 10, number / 10 + 0.15))))
            metrics.points()
            assert len(metrics._occupancy._devices[0].pieces) <= 128
        metrics.settle(NOW_NS + 60 * SECOND_NS, last=True)
        metrics.end_interval()
        assert ratios(metrics) == {0: pytest.approx(30.05 / 60)}

    def test_memory_is_bounded(self):
        """Whatever the export interval, what is old enough is counted and let go, also with something old beside it."""
        metrics = StageMetrics(NOW_NS)
        for number in range(60):
            starts = [0, *(number * 10 + each / 100 for each in range(1000))]
            metrics.add(batch_of(*occupied(*((start, start + 0.005) for start in starts))))
        assert metrics._occupancy._pending < 20_000
        metrics.settle(NOW_NS + 600 * SECOND_NS, last=True)
        metrics.end_interval()
        assert ratios(metrics) == {0: pytest.approx(0.5)}


class TestAccount:
    """What became of the stages."""

    def test_account_is_that_of_the_ledger(self):
        """Counts go by reason, and what is not known yet is left out."""
        account = Statistics(9, 4, 1, {"queue_full": 2}, {"shutdown": 2}, {}, None, ())
        points = account_points(account)
        assert series(points[RECORDED]) == {(): 9}
        assert series(points[DROPPED]) == {("queue_full",): 2}
        assert not {UNCERTAINTY, EVENT_COST} & points.keys()
        assert series(account_points(replace(account, event_cost_ns=2_900))[EVENT_COST]) == {(): 2.9e-6}
        assert series(account_points(replace(account, clock_uncertainty_ns=3_500))[UNCERTAINTY]) == {(): 3.5e-6}
