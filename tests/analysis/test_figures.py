"""The figures of a recording, from stages whose times are known."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from gpuscope._data.batch import RowFlag
from gpuscope.analysis.figures import SLOWEST, figures
from gpuscope.analysis.recording import Losses

from .recordings import EPOCH_NS, Stage, recording, repeat

WARMUP = int(RowFlag.WARMUP)


def request(host=1000.0, infer=300.0, gpu=600.0, flags=0, at=0.0):
    """One request: preprocessing on the host, then an inference whose GPU work outlasts its host time."""
    inside = [
        Stage("prep", 100, 200, flags=flags),
        Stage("infer", 200, 200 + infer, gpu=(220, 220 + gpu), flags=flags),
    ]
    return Stage("request", 0, host, inside=inside, flags=flags).shifted(at)


def by_name(found):
    """The stages of figures in which no name occurs twice."""
    return {stage.name: stage for stage in found.stages}


class TestStages:
    """Counts, distributions, shares, order."""

    def test_distributions_are_those_of_the_calls(self):
        """Each of a stage's distributions is of its own times, in milliseconds."""
        calls = [
            Stage("infer", 1e6 * n, 1e6 * n + 1000 * n, gpu=(1e6 * n + 250, 1e6 * n + 250 + 2000 * n))
            for n in range(1, 101)
        ]
        (stage,) = figures(recording(*calls)).stages
        host, gpu = stage.host_ms, stage.gpu_ms
        assert (host.count, host.mean, host.p50, host.p90, host.max) == pytest.approx((100, 50.5, 50.5, 90.1, 100))
        assert (gpu.count, gpu.mean, gpu.p50, gpu.p99) == pytest.approx((100, 101, 101, 198.02))
        assert stage.launch_to_start_ms.p50 == pytest.approx(0.25)

    def test_a_stage_without_gpu_times_has_no_gpu_figures(self):
        """What was not measured is None and not zero."""
        stage = by_name(figures(recording(request())))["prep"]
        assert (stage.gpu_ms, stage.launch_to_start_ms, stage.gpu_share) == (None, None, None)

    def test_shares_are_of_the_requests_host_time(self):
        """A stage's share is its time over that of its requests; one that runs in half of them has half of it."""
        stages = by_name(figures(recording(request(), Stage("request", 5000, 6000))))
        assert stages["request"].host_share == pytest.approx(1)
        assert stages["infer"].host_share == pytest.approx(0.15)
        assert stages["infer"].gpu_share == pytest.approx(0.3)

    def test_warmup_is_counted_and_left_out(self):
        """Warm-up calls, and all calls in a warm-up request, are in the counts and in nothing else."""
        cold = Stage("request", 0, 9000, flags=WARMUP, inside=[Stage("infer", 10, 8000)])
        found = figures(recording(cold, *[request(at=1e4 * n) for n in range(1, 5)]))
        stage = by_name(found)["infer"]
        assert (stage.calls, stage.warmup_calls, stage.only_warmup) == (5, 1, False)
        assert stage.host_ms.max == pytest.approx(0.3)
        assert by_name(found)["request"].host_ms.max == found.requests[0].host_ms.max == pytest.approx(1)
        assert stage.host_share == pytest.approx(0.3)

    def test_warmup_calls_of_a_stage_in_requests_that_count(self):
        """A stage still warming up in requests that count is taken to need what its later calls need."""
        late = [
            Stage(
                "request",
                5000 * n,
                5000 * n + 1000,
                inside=[Stage("new", 5000 * n, 5000 * n + 900, flags=WARMUP * (n < 2))],
            )
            for n in range(4)
        ]
        assert by_name(figures(recording(*late)))["new"].host_share == pytest.approx(0.9)

    def test_only_warmup(self):
        """Where there are only warm-up calls the figures are of those, and say so."""
        found = figures(recording(request(flags=WARMUP)))
        assert all(stage.only_warmup for stage in found.stages)
        assert found.requests[0].only_warmup
        assert by_name(found)["infer"].host_share == pytest.approx(0.3)

    def test_errors_and_flags_are_counted(self):
        """Errors, captured stages, given up ones and clamped ones are counted on their own."""
        flags = [RowFlag.CAPTURED, RowFlag.GIVEN_UP, RowFlag.CLAMPED, RowFlag.CLAMPED, 0]
        calls = [Stage("infer", n, n + 1, flags=int(flag), error=not flag) for n, flag in enumerate(flags)]
        (stage,) = figures(recording(*calls)).stages
        assert (stage.captured, stage.given_up, stage.clamped, stage.errors) == (1, 1, 2, 1)

    def test_order_is_the_order_of_the_first_starts(self):
        """Stages come in the order in which they first ran, each below the stage around it."""
        other = Stage("other", 4000, 5000, inside=[Stage("infer", 4100, 4200)])
        deep = Stage(
            "request", 0, 3000, inside=[Stage("b", 10, 900, inside=[Stage("c", 20, 30)]), Stage("a", 1000, 1100)]
        )
        found = figures(recording(other, deep))
        lines = [(stage.name, stage.root, stage.parent, stage.depth) for stage in found.stages]
        assert lines == [
            ("request", "request", None, 0),
            ("b", "request", "request", 1),
            ("c", "request", "b", 2),
            ("a", "request", "request", 1),
            ("other", "other", None, 0),
            ("infer", "other", "other", 1),
        ]

    def test_recursion(self):
        """A stage inside itself is one line and one request, and two stages inside each other are two lines."""
        inner = Stage(
            "request", 10, 500, inside=[Stage("a", 20, 400, inside=[Stage("b", 30, 300, inside=[Stage("a", 40, 50)])])]
        )
        found = figures(recording(Stage("request", 0, 1000, inside=[inner])))
        assert [(stage.name, stage.depth, stage.calls) for stage in found.stages] == [
            ("request", 0, 2),
            ("a", 1, 2),
            ("b", 2, 1),
        ]
        assert [(request.name, request.calls, request.host_ms.p50) for request in found.requests] == [
            ("request", 1, 1.0)
        ]

    def test_leaves_have_no_stage_inside(self):
        """Only rows that no row has for a parent are leaves."""
        assert recording(request(), Stage("alone", 5000, 5001)).leaf.tolist() == [False, True, True, True]


class TestRequests:
    """Whole requests."""

    def test_end_to_end_lasts_until_the_gpu_is_done(self):
        """A request whose GPU work outlasts it on the host ends with that work."""
        (found,) = figures(recording(request(host=1000, gpu=5000))).requests
        assert found.host_ms.p50 == pytest.approx(1)
        assert found.end_to_end_ms.p50 == pytest.approx(5.22)

    def test_the_slowest_are_named(self):
        """The slowest requests that count can be found by their traces, the slowest first."""
        order = list(range(1, 21))
        random.Random(0).shuffle(order)
        stages = [Stage("request", 1e5 * at, 1e5 * at + 1000 * ms) for at, ms in enumerate(order)]
        cold = Stage("request", 1e7, 1e7 + 9e5, flags=WARMUP)
        whole = recording(*stages, cold)
        slowest = figures(whole).requests[0].slowest
        assert [each.end_to_end_ms for each in slowest] == pytest.approx([20, 19, 18, 17, 16])
        assert len(slowest) == SLOWEST
        assert slowest[0].trace_id == whole.trace_id[order.index(20)]
        assert slowest[0].start_ns == EPOCH_NS + order.index(20) * 100_000_000


class TestWhole:
    """What is not of a stage."""

    def test_facts_of_the_recording(self):
        """Processes, extent, clock uncertainty and losses are of all rows."""
        losses = Losses(orphans=2, dropped={"queue_full": 7})
        stages = [Stage("a", 0, 10, gpu=(1, 2_000_000), uncertainty=4), Stage("b", 5, 8, process="other")]
        found = figures(recording(*stages, losses=losses))
        assert found.processes == ("server", "other")
        assert (found.start_ns, found.seconds) == (EPOCH_NS, pytest.approx(2))
        assert (found.uncertainty_us.count, found.uncertainty_us.max) == (1, 4)
        assert found.losses is losses

    def test_nothing(self):
        """A recording without stages has no figures, and that is no error."""
        found = figures(recording())
        assert (found.stages, found.requests, found.uncertainty_us, found.seconds) == ((), (), None, 0)

    def test_as_dict_is_json(self):
        """All figures survive JSON, under the names that the attributes have."""
        whole = figures(recording(*repeat(request(), 3, 5000), losses=Losses(lost={"disk": 1})))
        plain = json.loads(json.dumps(whole.as_dict(), allow_nan=False))
        assert plain["stages"][1]["host_ms"]["p50"] == whole.stages[1].host_ms.p50
        assert plain["requests"][0]["slowest"][0]["trace_id"] == whole.requests[0].slowest[0].trace_id
        assert plain["losses"]["lost"] == {"disk": 1}
        assert plain["uncertainty_us"]["max"] == 3

    def test_thousands_of_kinds(self):
        """Many kinds of requests are told apart by stage and root, whatever their numbers."""
        stages = [
            Stage(f"root {n}", 10 * n, 10 * n + 5, inside=[Stage("inner", 10 * n + 1, 10 * n + 2)]) for n in range(300)
        ]
        found = figures(recording(*stages))
        assert [stage.name for stage in found.stages] == [name for n in range(300) for name in (f"root {n}", "inner")]
        assert np.all([stage.calls == 1 for stage in found.stages])
