"""The summary: percentiles, shares, order and text, from batches made by hand."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuscope._collecting.aggregation.statistics import StageStatistics
from gpuscope._collecting.aggregation.summary import OTHER
from gpuscope._collecting.aggregation.tally import Ring
from gpuscope._data.batch import DeviceInfo, RowFlag, SpanDetails, StageBatch
from gpuscope._data.record import ExceptionInfo, Site, ThreadInfo

EPOCH_NS = 1_700_000_000_000_000_000
MS = 1_000_000
"""Modules of the running totals."""
PIPELINE = (("prep", 2.0, 0.0), ("h2d", 1.0, 3.0), ("infer", 5.0, 20.0), ("post", 4.0, 0.0))


def row(name, root, **facts):
    """One row of a batch: times in milliseconds after `EPOCH_NS`, no GPU part unless `gpu` is given."""
    return {
        "name": name,
        "root": root,
        "start": 0.0,
        "host": 1.0,
        "gpu": None,
        "delay": 0.0,
        "span": 0,
        "parent": 0,
    } | {
        "flags": 0,
        "details": None,
        "trace": 1,
        **facts,
    }


def nanoseconds(rows, of):
    """A column of times."""
    return np.array([of(each) for each in rows], np.float64).__mul__(MS).astype(np.int64)


def batch_of(rows):
    """The columns of some rows."""
    sites = {name: Site(name, {}) for name in dict.fromkeys(n for each in rows for n in (each["root"], each["name"]))}
    names = list(sites)
    gpu = np.array([each["gpu"] is not None for each in rows], np.bool_)
    start = EPOCH_NS + nanoseconds(rows, lambda each: each["start"])
    gpu_start = np.where(gpu, start + nanoseconds(rows, lambda each: each["delay"]), 0)
    zeros = np.zeros(len(rows), np.int64)
    return StageBatch(
        sites=tuple(sites.values()),
        threads=(ThreadInfo(1, "MainThread"),),
        devices={0: DeviceInfo(0, "a GPU", "GPU-0")},
        site=np.array([names.index(each["name"]) for each in rows], np.int32),
        root=np.array([names.index(each["root"]) for each in rows], np.int32),
        thread=zeros.astype(np.int32),
        trace_high=zeros.astype(np.uint64),
        trace_low=np.array([each["trace"] for each in rows], np.uint64),
        span_id=np.array([each["span"] for each in rows], np.uint64),
        parent_id=np.array([each["parent"] for each in rows], np.uint64),
        gpu_span_id=gpu.astype(np.uint64),
        sampled=np.zeros(len(rows), np.bool_),
        host_start_ns=start,
        host_end_ns=start + nanoseconds(rows, lambda each: each["host"]),
        gpu_start_ns=gpu_start,
        gpu_end_ns=gpu_start + nanoseconds(rows, lambda each: each["gpu"] or 0.0),
        uncertainty_ns=zeros,
        device=np.where(gpu, 0, -1).astype(np.int32),
        stream=zeros.astype(np.uint64),
        flags=np.array([each["flags"] for each in rows], np.uint32),
        details={index: each["details"] for index, each in enumerate(rows) if each["details"] is not None},
    )


def request_rows(number, *, flags=0, parent=0):
    """The rows of one request in the order of their ends: four stages one after the other, and the request."""
    rows, at, first_span = [], 100.0 * number, 10 * number + 1
    for index, (name, host, gpu) in enumerate(PIPELINE):
        rows.append(
            row(
                name,
                "request",
                start=at,
                host=host,
                gpu=gpu or None,
                delay=0.5,
                span=first_span + 1 + index,
                parent=first_span,
                flags=flags,
            )
        )
        at += host
    whole = row("request", "request", start=100.0 * number, host=20.0, span=first_span, parent=parent, flags=flags)
    return [*rows, whole]


def summary_of(*batches, **options):
    """The summary of some batches of rows."""
    statistics = StageStatistics(**options)
    for rows in batches:
        statistics.add(batch_of(rows))
    return statistics.summary()


def by_name(summary):
    """The stages of a summary that has one root."""
    return {stage.name: stage for stage in summary.stages}


class TestFigures:
    """Counts, percentiles, shares."""

    def test_percentiles_of_host_and_gpu_times(self):
        """Percentiles of a stage's host and GPU durations are those of its calls, in milliseconds."""
        rows = [row("infer", "infer", host=float(n), gpu=2.0 * n, delay=0.25, span=n) for n in range(1, 101)]
        (stage,) = summary_of(rows).stages
        assert stage.host_ms == pytest.approx((50.5, 90.1, 99.01))
        assert stage.gpu_ms == pytest.approx((101.0, 180.2, 198.02))
        assert stage.launch_to_start_ms == pytest.approx(0.25)
        assert (stage.calls, stage.measured_calls, stage.errors) == (100, 100, 0)

    def test_stage_without_gpu_part_has_no_gpu_figures(self):
        """A stage with no GPU part has None where GPU figures would be, not zero."""
        stages = by_name(summary_of(request_rows(0)))
        assert stages["prep"].gpu_ms is None
        assert stages["prep"].gpu_share is None
        assert stages["prep"].launch_to_start_ms is None
        assert stages["infer"].gpu_ms == pytest.approx((20.0, 20.0, 20.0))

    def test_calls_without_gpu_times_do_not_count_as_zero(self):
        """A stage whose events never completed once keeps the GPU percentiles of its other calls."""
        rows = [row("infer", "infer", gpu=8.0, span=n) for n in range(1, 10)]
        rows.append(row("infer", "infer", flags=RowFlag.GIVEN_UP, span=10))
        (stage,) = summary_of(rows).stages
        assert stage.gpu_ms == pytest.approx((8.0, 8.0, 8.0))
        assert stage.calls == 10

    def test_shares_are_of_the_request(self):
        """The share of a stage is its total time over the total host time of the requests."""
        stages = by_name(summary_of(*[request_rows(n) for n in range(5)]))
        assert stages["request"].host_share == pytest.approx(1.0)
        assert stages["infer"].host_share == pytest.approx(0.25)
        assert stages["infer"].gpu_share == pytest.approx(1.0)
        assert stages["h2d"].gpu_share == pytest.approx(0.15)

    def test_share_of_a_stage_that_runs_in_some_requests(self):
        """A stage that only every second request runs has half the share that it has in those."""
        stages = by_name(summary_of(request_rows(0), request_rows(1)[-1:]))
        assert stages["infer"].host_share == pytest.approx(0.125)

    def test_no_share_before_a_request_has_ended(self):
        """While the first request still runs, the share of its stages is unknown."""
        stages = by_name(summary_of(request_rows(0)[:-1]))
        assert stages["infer"].host_share is None
        assert stages["infer"].gpu_share is None

    def test_warmup_calls_are_counted_and_left_out(self):
        """Warm-up calls appear in the count and in no percentile or share."""
        slow = [each | {"host": each["host"] * 100} for each in request_rows(0, flags=RowFlag.WARMUP)]
        stages = by_name(summary_of(slow, *[request_rows(n) for n in range(1, 4)]))
        assert (stages["infer"].calls, stages["infer"].warmup_calls, stages["infer"].measured_calls) == (4, 1, 3)
        assert stages["infer"].host_ms.p99 == pytest.approx(5.0)
        assert stages["infer"].host_share == pytest.approx(0.25)
        assert stages["infer"].gpu_share == pytest.approx(1.0)
        assert not stages["infer"].only_warmup

    def test_only_warmup_calls(self):
        """A stage that has made nothing but warm-up calls shows those, and says so."""
        summary = summary_of(request_rows(0, flags=RowFlag.WARMUP))
        stages = by_name(summary)
        assert stages["infer"].only_warmup
        assert stages["infer"].host_ms.p50 == pytest.approx(5.0)
        assert stages["infer"].host_share == pytest.approx(0.25)
        assert "infer *" in str(summary)
        assert "* has made warm-up calls only" in str(summary)

    def test_errors_are_counted(self):
        """An exception and an error status set by the application count as errors; a status of OK does not."""
        outcomes = [
            SpanDetails(error=ExceptionInfo("ValueError", "no", ())),
            SpanDetails(status=("ERROR", "bad")),
            SpanDetails(status=("OK", None)),
            SpanDetails(status=("UNSET", None)),
            SpanDetails(attributes={"batch_size": 8}),
            None,
        ]
        rows = [row("infer", "infer", span=n + 1, details=details) for n, details in enumerate(outcomes)]
        (stage,) = summary_of(rows).stages
        assert stage.errors == 2

    def test_unsampled_stages_count(self):
        """Rows of a batch that no exporter will see are in the summary like any others."""
        batch = batch_of(request_rows(0))
        assert not batch.sampled.any()
        statistics = StageStatistics()
        statistics.add(batch)
        assert len(statistics.summary().stages) == 5

    def test_recursion_is_not_another_request(self):
        """A root stage that calls itself under a span of the application is one request, not two."""
        inner = row("request", "request", start=5.0, host=10.0, span=2, parent=1)
        outer = row("request", "request", start=0.0, host=20.0, span=1, parent=77)
        stages = by_name(summary_of([inner, outer, row("infer", "request", host=5.0, span=3, parent=2)]))
        assert stages["infer"].host_share == pytest.approx(0.25)


class TestBounds:
    """Memory, threads, odd batches."""

    def test_percentiles_follow_the_last_calls(self):
        """Percentiles forget calls older than the last 4,096, while counts and totals do not."""
        statistics = StageStatistics()
        for start in range(0, 6000, 100):
            host = 1.0 if start < 1000 else 3.0
            statistics.add(batch_of([row("infer", "infer", host=host, span=n + 1) for n in range(start, start + 100)]))
        (stage,) = statistics.summary().stages
        assert (stage.calls, stage.measured_calls) == (6000, 4096)
        assert stage.host_ms.p50 == pytest.approx(3.0)

    @given(st.lists(st.integers(0, 90), max_size=12), st.integers(1, 80))
    def test_ring_holds_the_last_calls(self, counts, limit):
        """Whatever the sizes of the batches, the calls held are the last ones, as many as the limit allows."""
        ring, calls = Ring(limit), []
        for count in counts:
            numbers = np.arange(len(calls), len(calls) + count, dtype=np.float64)
            calls += numbers.tolist()
            ring.append(np.stack([numbers] * 3))
        assert [sorted(row) for row in ring.copy().tolist()] == [calls[-limit:]] * 3

    def test_a_batch_larger_than_the_memory(self):
        """Of a batch with more calls than are kept, the last are kept."""
        rows = [row("infer", "infer", host=float(n), span=n + 1) for n in range(5000)]
        (stage,) = summary_of(rows).stages
        assert stage.measured_calls == 4096
        assert stage.host_ms.p50 == pytest.approx(np.median(np.arange(5000 - 4096, 5000)))

    def test_stages_beyond_the_limit_share_a_line(self):
        """Stages that come after the limit of names are counted together, so that memory stays bounded."""
        rows = [row(f"stage {n}", f"stage {n}", span=n + 1) for n in range(50)]
        failed = row("stage 49", "stage 49", span=99, details=SpanDetails(error=ExceptionInfo("ValueError", "no", ())))
        summary = summary_of(rows, [failed], max_stages=10)
        other = by_name(summary)[OTHER]
        assert len(summary.stages) == 11
        assert (other.calls, other.errors, other.host_share) == (41, 1, None)

    def test_stages_whose_parents_never_come(self):
        """Stages whose enclosing stages are always missing do not pile up."""
        statistics = StageStatistics()
        for n in range(200):
            start = 1_000_000.0 * n
            statistics.add(batch_of([row("infer", "request", start=start, span=2 * n + 1, parent=2 * n + 2)]))
        assert len(statistics._family._waiting) == 1

    def test_an_empty_batch(self):
        """A batch without rows changes nothing."""
        statistics = StageStatistics()
        statistics.add(batch_of([]))
        assert statistics.summary().stages == ()

    def test_summary_while_batches_come(self):
        """A summary asked for on another thread while batches are added is a consistent one."""
        statistics, batch, failures = StageStatistics(), batch_of(request_rows(0)), []
        done = threading.Event()

        def ask():
            while not done.is_set():
                counts = {stage.calls for stage in statistics.summary().stages}
                if len(counts) > 1:
                    failures.append(counts)

        asking = threading.Thread(target=ask)
        asking.start()
        for _ in range(300):
            statistics.add(batch)
        done.set()
        asking.join()
        assert not failures
        assert by_name(statistics.summary())["infer"].calls == 300


class TestOrder:
    """Which stage comes where."""

    def test_reads_like_the_pipeline(self):
        """The request comes first and its stages follow, inside it, in the order of their starts."""
        summary = summary_of(request_rows(0), request_rows(1))
        assert [stage.name for stage in summary.stages] == ["request", "prep", "h2d", "infer", "post"]
        assert [stage.depth for stage in summary.stages] == [0, 1, 1, 1, 1]
        assert {stage.parent for stage in summary.stages[1:]} == {"request"}

    def test_places_are_learnt_from_one_request(self):
        """A batch that ends amid the first request after the warm-up, a slow one, does not turn the order round."""
        slow = request_rows(1)
        slow[1]["start"] += 50.0
        summary = summary_of([*request_rows(0, flags=int(RowFlag.WARMUP)), *slow[:2]], slow[2:])
        assert [stage.name for stage in summary.stages] == ["request", "prep", "h2d", "infer", "post"]

    def test_nested_stages_over_several_batches(self):
        """Stages find the stages around them although those end, and come, in later batches."""
        kernel = row("kernel", "request", start=3.0, span=3, parent=2)
        infer = row("infer", "request", start=2.0, host=5.0, span=2, parent=1)
        request = row("request", "request", start=0.0, host=9.0, span=1)
        prep = row("prep", "request", start=1.0, span=4, parent=1)
        summary = summary_of([kernel], [prep, infer], [request])
        assert [(stage.name, stage.depth) for stage in summary.stages] == [
            ("request", 0),
            ("prep", 1),
            ("infer", 1),
            ("kernel", 2),
        ]

    def test_roots_in_order_of_their_first_start(self):
        """Kinds of requests follow one another in the order in which they were first seen to start."""
        late = row("embed", "embed", start=50.0, span=1)
        early = row("chat", "chat", start=10.0, span=2)
        assert [stage.name for stage in summary_of([late, early]).stages] == ["chat", "embed"]

    def test_same_stage_in_two_kinds_of_request(self):
        """A stage that two kinds of request run has a line in each, with its share of each."""
        summary = summary_of(
            [row("infer", "chat", host=5.0, span=2, parent=1), row("chat", "chat", host=10.0, span=1)],
            [row("infer", "embed", host=2.0, span=4, parent=3), row("embed", "embed", host=8.0, span=3)],
        )
        shares = {stage.root: stage.host_share for stage in summary.stages if stage.name == "infer"}
        assert shares == pytest.approx({"chat": 0.5, "embed": 0.25})

    def test_recursive_stages_keep_their_lines(self):
        """Stages that call themselves or each other are all in the summary, once."""
        summary = summary_of(
            [
                row("a", "request", start=4.0, span=5, parent=4),
                row("b", "request", start=3.0, span=4, parent=3),
                row("b", "request", start=2.5, span=3, parent=2),
                row("a", "request", start=2.0, span=2, parent=1),
            ],
            [row("request", "request", start=1.0, host=9.0, span=1)],
            [row("b", "request", start=12.0, span=8, parent=7), row("a", "request", start=11.0, span=7, parent=6)],
        )
        assert sorted(stage.name for stage in summary.stages) == ["a", "b", "request"]

    @pytest.mark.parametrize("cut", [1, 2, 3, 4])
    def test_a_recursive_stage_has_the_place_of_its_outermost_call(self, cut):
        """However its calls and the stage around them are spread over batches."""
        rows = [
            row("walk", "request", start=4.0, span=5, parent=4),
            row("walk", "request", start=3.0, span=4, parent=3),
            row("tree", "request", start=2.0, host=4.0, span=3, parent=1),
            row("before", "request", start=1.0, span=2, parent=1),
            row("request", "request", start=0.0, host=9.0, span=1),
        ]
        summary = summary_of(rows[:cut], rows[cut:])
        assert [(stage.name, stage.parent, stage.depth) for stage in summary.stages] == [
            ("request", None, 0),
            ("before", "request", 1),
            ("tree", "request", 1),
            ("walk", "tree", 2),
        ]

    def test_order_is_that_of_the_distance_from_the_stage_around(self):
        """A stage that only a later request runs stands where it stands there."""
        second = [
            row("cache", "request", start=102.5, span=12, parent=11),
            row("request", "request", start=100.0, host=20.0, span=11),
        ]
        assert [stage.name for stage in summary_of(request_rows(0), second).stages] == [
            "request",
            "prep",
            "h2d",
            "cache",
            "infer",
            "post",
        ]

    @pytest.mark.parametrize(("later_s", "learnt"), [(59.0, False), (61.0, True)])
    def test_a_stage_around_it_that_never_comes_is_awaited_for_a_minute(self, later_s, learnt):
        """Then a later call is tried in place of the first one."""
        later = later_s * 1000
        summary = summary_of(
            [row("infer", "request", start=0.0, span=3, parent=2)],
            [
                row("infer", "request", start=later, span=6, parent=5),
                row("model", "request", start=later, span=5, parent=4),
                row("request", "request", start=later, span=4),
            ],
        )
        assert by_name(summary)["infer"].parent == ("model" if learnt else "request")

    def test_a_circle_does_not_keep_a_stage_from_its_place(self):
        """Of two stages that call each other the one that is called by a third has its place from the next call."""
        summary = summary_of(
            [row("b", "request", start=4.0, span=5, parent=4)],
            [row("a", "request", start=3.0, span=4, parent=3)],
            [row("b", "request", start=2.0, span=3, parent=1)],
            [
                row("a", "request", start=13.0, span=9, parent=8),
                row("middle", "request", start=12.0, span=8, parent=7),
                row("request", "request", start=11.0, span=7),
            ],
        )
        assert {stage.name: stage.parent for stage in summary.stages} == {
            "request": None,
            "middle": "request",
            "a": "middle",
            "b": "a",
        }

    def test_a_span_that_is_its_own_parent(self):
        """A nonsensical parent, such as the span itself, neither hangs nor loses the stage."""
        summary = summary_of([row("odd", "request", span=5, parent=5)], [row("request", "request", span=1)])
        assert sorted(stage.name for stage in summary.stages) == ["odd", "request"]


class TestText:
    """What a person reads."""

    def test_table(self):
        """The table is aligned, with the units in its header and the stages indented inside their request."""
        text = str(summary_of(*[request_rows(n) for n in range(1200)]))
        assert text.splitlines()[:8] == [
            "                ------host------  ---------stream---------",
            "stage    calls      p50      p99      p50      p99  starts      %",
            "-------  -----  -------  -------  -------  -------  ------  -----",
            "request  1,200  20.0 ms  20.0 ms        -        -       -  100.0",
            "  prep   1,200  2.00 ms  2.00 ms        -        -       -   10.0",
            "  h2d    1,200  1.00 ms  1.00 ms  3.00 ms  3.00 ms  500 µs    5.0",
            "  infer  1,200  5.00 ms  5.00 ms  20.0 ms  20.0 ms  500 µs   25.0",
            "  post   1,200  4.00 ms  4.00 ms        -        -       -   20.0",
        ]

    def test_states_what_percentiles_are_of(self):
        """The text below the table says how many calls the percentiles look back on and what was left out."""
        text = str(summary_of(request_rows(0, flags=RowFlag.WARMUP), request_rows(1)))
        assert "at most the last 4,096 calls of each stage,\nwarm-up left out (up to 1 call of each)" in text

    def test_a_share_that_is_cut_is_said(self):
        """What outlasts its request, as a generation does, is no part of it; a report counts what is inside."""
        long = [row("generate", "request", start=0, host=9.0, span=2, parent=1), row("request", "request", span=1)]
        assert "%: 100.0 of an inner stage is of calls that overlap or outlast their requests;" in str(summary_of(long))
        assert "outlast" not in str(summary_of(request_rows(1)))

    def test_without_gpu(self):
        """Without any GPU times there are no columns for them, and a line says why."""
        text = str(summary_of([row("infer", "infer", span=1)]))
        assert "stream" not in text
        assert "No GPU times" in text

    def test_table_without_gpu(self):
        """A title that is wider than its column makes room for itself."""
        assert str(summary_of([row("infer", "infer", span=1)])).splitlines()[:4] == [
            "              -----------host----------",
            "stage  calls      p50      p90      p99      %",
            "-----  -----  -------  -------  -------  -----",
            "infer      1  1.00 ms  1.00 ms  1.00 ms  100.0",
        ]

    def test_notes_below_the_table(self):
        """Each sentence stands there where it has something to say, and nowhere else."""
        inside = row("up", "decode", gpu=0.1, span=2, parent=1, flags=RowFlag.IN_GRAPH)
        on_gpu = row("decode", "decode", gpu=0.6, delay=0.1, span=1)

        def notes(*rows):
            return str(summary_of(list(rows))).rpartition("\n\n")[2].splitlines()

        recent = [
            "Percentiles cover at most the last 4,096 calls of each stage,",
            "warm-up left out (there was none). %: of the requests' time.",
        ]
        stream = [
            "stream: between the stage's two events on it, waiting for the host included.",
            "starts: so long after its start on the host, median.",
        ]
        dash = "- under host: runs only inside replays of CUDA graphs, which take no host time."
        assert notes(on_gpu, row("other", "other", span=3)) == [*recent, *stream]
        assert notes(inside, on_gpu) == [*recent, *stream, dash]
        assert notes(row("other", "other", span=3)) == [*recent, "No GPU times: all times are the host's."]

    def test_no_share_is_more_than_the_whole(self):
        """Calls at one time, as tasks make them, take no more of a request than all of it."""
        rows = [row("request", "request", span=1, host=10.0)]
        rows += [row("task", "request", span=2 + n, parent=1, host=9.0, gpu=9.0) for n in range(4)]
        task = by_name(summary_of(rows))["task"]
        assert (task.host_share, task.gpu_share) == (1.0, 1.0)

    def test_a_notebook_draws_it(self):
        """As a table whose names are text, with the same figures as the printed one."""
        html = summary_of([row("<b>", "<b>", span=1)])._repr_html_()
        assert html.startswith("<table>")
        assert "&lt;b&gt;" in html
        assert "1.00 ms" in html
        assert "<b>" not in html
        assert "No stages recorded yet." in StageStatistics().summary()._repr_html_()

    @pytest.mark.parametrize(("length", "shown"), [(39, "x" * 39), (40, "x" * 13 + "…" + "x" * 25)])
    def test_long_names_are_cut(self, length, shown):
        """A table that wraps is not a table."""
        text = str(summary_of([row("x" * length, "x" * length, span=1)]))
        assert text.splitlines()[3].split()[0] == shown

    def test_nothing_recorded(self):
        """A summary of nothing says that there is nothing."""
        assert str(StageStatistics().summary()) == "No stages recorded yet."

    def test_errors_have_a_column_only_when_there_are_any(self):
        """The column of errors appears with the first error."""
        failed = row("infer", "infer", span=2, details=SpanDetails(error=ExceptionInfo("ValueError", "no", ())))
        assert "errors" not in str(summary_of([row("infer", "infer", span=1)]))
        assert "errors" in str(summary_of([failed]))

    def test_odd_names_do_not_break_the_table(self):
        """Names with line breaks or of great length leave the table one line a stage."""
        text = str(summary_of([row("a\nb" + "x" * 500, "a\nb" + "x" * 500, span=1)]))
        assert max(map(len, text.splitlines())) <= 80
        assert sum("xxx" in line for line in text.splitlines()) == 1

    def test_as_dict_is_plain(self):
        """`as_dict` can be written as JSON, and holds what the summary holds."""
        summary = summary_of(request_rows(0))
        plain = json.loads(json.dumps(summary.as_dict()))
        assert plain["recent_calls"] == 4096
        assert plain["stages"][3]["name"] == "infer"
        assert plain["stages"][3]["gpu_ms"] == {"p50": 20.0, "p90": 20.0, "p99": 20.0}
        assert plain["stages"][1]["gpu_ms"] is None


class TestPlace:
    """Where the modules stand in the house."""

    def test_imports_numpy_and_facts_alone(self):
        """The running totals import neither torch nor OpenTelemetry nor the recording side."""
        script = (
            "import sys, gpuscope._data.batch, gpuscope._data.record; before = set(sys.modules);"
            "import gpuscope._collecting.aggregation.statistics;"
            "print(sorted(m for m in set(sys.modules) - before if m.startswith(('gpuscope', 'torch', 'opentel'))))"
        )
        done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
        assert all(
            name.startswith(("gpuscope._collecting", "gpuscope._data.")) for name in ast.literal_eval(done.stdout)
        )


class TestReplays:
    """Stages inside replays of CUDA graphs."""

    @pytest.fixture
    def summary(self):
        """Four calls of a stage whose replays have two stages inside, one of them around a third."""
        statistics = StageStatistics()
        for call in range(4):
            inside = {"flags": RowFlag.IN_GRAPH, "host": 0.0, "root": "decode", "start": call + 0.1}
            rows = [
                row("decode", "decode", start=float(call), host=0.2, gpu=0.6, delay=0.1, span=10 * call + 1),
                row("mlp", gpu=0.2, delay=0.3, span=10 * call + 3, parent=10 * call + 1, **inside),
                row("up", gpu=0.1, delay=0.3, span=10 * call + 4, parent=10 * call + 3, **inside),
                row("attention", gpu=0.1, delay=0.1, span=10 * call + 2, parent=10 * call + 1, **inside),
            ]
            statistics.add(batch_of(rows))
        return statistics.summary()

    def test_inner_stages_have_gpu_times_alone(self, summary):
        """They have no percentiles, no delay and no share of the host; the launcher keeps its own."""
        mlp = by_name(summary)["mlp"]
        assert (mlp.calls, mlp.host_ms, mlp.launch_to_start_ms, mlp.host_share) == (4, None, None, None)
        assert mlp.gpu_ms.p50 == pytest.approx(0.2)
        assert mlp.gpu_share == pytest.approx(1.0)
        assert by_name(summary)["decode"].host_ms.p50 == pytest.approx(0.2)
        assert summary.as_dict()["stages"][1]["host_ms"] is None

    def test_inner_stages_stand_in_the_order_of_the_gpu(self, summary):
        """All were launched at once, so the GPU tells which came first."""
        assert [(stage.name, stage.depth) for stage in summary.stages] == [
            ("decode", 0),
            ("attention", 1),
            ("mlp", 1),
            ("up", 2),
        ]

    def test_table_says_why_the_host_is_missing(self, summary):
        """The text has a dash, and a sentence for it."""
        assert "runs only inside replays of CUDA graphs" in str(summary)
