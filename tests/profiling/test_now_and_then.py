"""Deep looks by themselves: when they come, what is kept of them, and whether answers of streams say the same."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuscope
from gpuscope import stage
from gpuscope._collecting.aggregation.metrics import account_points
from gpuscope._cuda.graphs.quiet import Quiet
from gpuscope._data.metrics import LOOK_BUSY, LOOK_KERNELS, LOOK_SQUARES, LOOK_TIME, SPECS
from gpuscope._data.statistics import LookedStage
from gpuscope._profiling.examine import examine
from gpuscope._profiling.now_and_then import NowAndThen, polls, stages_of
from gpuscope._profiling.session import ProfilingSession
from gpuscope._recording.ledger import Ledger
from gpuscope._recording.state import state
from gpuscope._settings.config import Config
from gpuscope.analysis._busy.estimate import Sums, share_of_sums
from gpuscope.analysis._busy.looked import LookedAt, agree, looked_at
from gpuscope.analysis.read import read, read_lines
from gpuscope.analysis.recording import Looked
from gpuscope.analysis.runs import only, runs_of
from gpuscope.analysis.verdict import judge
from gpuscope.testing import FakeDevice, ManualClock, capture

from ..analysis.recordings import Stage, recording, repeat
from .kineto import serve

ONES = torch.ones(8, 8)
NAME = "gpuscope-look"


def on_gpu(program):
    """Two stages: one that keeps the GPU at work, and one that only waits on the host."""
    with program.stage("infer"):
        for _ in range(20):
            program.launch(100)
        program.synchronize()
    with program.stage("wait"):
        program.work(2000)


def report(request=on_gpu, count=5):
    """What the deep look says of some requests."""
    return examine(serve(request, count=count).trace()).as_dict()


def request():
    """One request of the program that is looked at."""
    with gpuscope.stage("request"), gpuscope.stage("infer"):
        return ONES @ ONES


class Bench:
    """A program that serves requests, and looks at it when it is time."""

    def __init__(self, engine, clock, *, every_s=600.0, found=None):
        self.engine, self.clock = engine, clock
        self.traces = []
        self.found = report() if found is None else found
        self.looks = NowAndThen(every_s, read=self.read, clock=lambda: clock.now_ns / 1e9)

    def read(self, trace):
        """Say what was found in the trace, which is there."""
        self.traces.append((trace, json.loads(trace.read_text())["gpuscope"]["requests"]))
        if isinstance(self.found, Exception):
            raise self.found
        return self.found

    def poll(self):
        """As the collector does, once per pass."""
        self.looks.poll(self.engine.recorder)

    def look(self, serve=request):
        """Serve requests until the look that is due is over."""
        self.clock.advance(901)
        self.poll()
        deadline = time.monotonic() + 60
        while self.looks._thread.is_alive():
            assert time.monotonic() < deadline
            serve()


@pytest.fixture
def looking(bench):
    """Looks at the bench's recorder, by the manual clock."""
    return Bench(bench.engine, bench.clock)


class TestWhen:
    """At random moments, so often on average."""

    def test_between_half_and_one_and_a_half_of_the_time(self, bench):
        """The first one too; and not at the same moment in two processes."""
        pauses = []
        for _ in range(200):
            looks = NowAndThen(600.0, clock=lambda: 0.0)
            pauses.append(looks._due_s)
        assert 300 <= min(pauses) < 400
        assert 800 < max(pauses) <= 900
        assert len(set(pauses)) > 190

    def test_not_before_it_is_time(self, looking):
        """A poll before costs a look at the clock."""
        looking.clock.advance(299)
        looking.poll()
        assert looking.looks._thread is None

    def test_one_at_a_time(self, looking):
        """Where no request comes, the look waits for one, and no other begins."""
        looking.clock.advance(901)
        looking.poll()
        thread = looking.looks._thread
        looking.clock.advance(901)
        looking.poll()
        assert looking.looks._thread is thread
        looking.look()
        assert looking.engine.statistics().look_counts == {"done": 1}

    def test_again_after_a_while(self, looking):
        """Each adds to what is known."""
        for _ in range(2):
            looking.look()
        statistics = looking.engine.statistics()
        assert statistics.look_counts == {"done": 2}
        assert {(each.stage, each.requests) for each in statistics.looks} == {
            ("request", 10),
            ("infer", 10),
            ("wait", 10),
        }

    def test_nothing_is_left(self, looking, bench):
        """Neither on the hot path nor on the disk: the trace is the program's, and goes."""
        looking.look()
        ((trace, requests),) = looking.traces
        assert requests == ["request"]
        assert not trace.parent.exists()
        assert bench.engine.recorder.nvtx is bench.nvtx

    def test_off_by_default(self):
        """Nothing is asked per pass."""
        assert Config().profile_every_s == 0
        assert polls(Config()) is None
        assert polls(Config().changed(profile_every_s=600)) is not None

    def test_beside_looks_on_demand(self, bench, tmp_path):
        """Both are asked."""
        wish = tmp_path / "look"
        poll = polls(Config().changed(profile=str(wish), profile_every_s=10_000))
        wish.touch()
        poll(bench.engine.recorder)
        assert not wish.exists()
        while any(thread.name == NAME for thread in threading.enumerate()):
            request()


class TestWhatIsKept:
    """Sums over requests, of each stage."""

    def test_busy_time_and_kernels(self):
        """As the deep look has them."""
        found = report()
        kept = {each.stage: each for each in stages_of(found)}
        looks = {each["name"]: each for each in found["stages"]}
        for name, each in kept.items():
            look = looks[name]
            assert (each.root, each.requests, each.calls) == ("request", 5, 5)
            assert each.time_s == pytest.approx(5 * look["ms"] / 1e3)
            assert each.busy_s == pytest.approx(5 * (look["compute_ms"] + look["transfer_ms"]) / 1e3, abs=1e-9)
            assert each.busy_s <= each.time_s
            assert each.both_s2**2 <= each.time2_s2 * each.busy2_s2 * (1 + 1e-9)
        assert kept["infer"].kernels == 100
        assert kept["infer"].busy_s / kept["infer"].time_s > 0.9
        assert kept["wait"].busy_s == 0

    def test_without_the_profiler_requests_are_shorter(self):
        """Kernels are held against the length that requests have before the look."""
        slow, quick = serve(on_gpu, launch_cost=60.0), serve(on_gpu)
        trace = slow.trace()
        trace["gpuscope"]["unwatched"] = [
            (root, name, round(1e3 * sum(each) / len(each))) for (root, name), each in quick.lengths.items()
        ]
        kept = {each.stage: each for each in stages_of(examine(trace).as_dict())}
        watched = {each.stage: each for each in stages_of(examine(slow.trace()).as_dict())}
        assert kept["request"].time_s < watched["request"].time_s
        assert kept["request"].busy_s == pytest.approx(watched["request"].busy_s)

    def test_a_stage_inside_itself_counts_once(self):
        """As in answers, the outermost has what is inside."""

        def nested(program):
            with program.stage("infer"):
                program.launch(100)
                with program.stage("infer"):
                    program.launch(100)

        (infer,) = (each for each in stages_of(report(nested)) if each.stage == "infer")
        assert (infer.requests, infer.kernels) == (5, 10)

    def test_of_several_calls_in_a_request_the_unit_is_the_request(self):
        """They resemble each other."""

        def many(program):
            for _ in range(7):
                with program.stage("step"):
                    program.launch(50)
                    program.synchronize()

        (step,) = (each for each in stages_of(report(many)) if each.stage == "step")
        assert (step.requests, step.calls, step.kernels) == (5, 35, 35)

    def test_a_look_without_work_on_a_gpu_says_nothing(self, bench):
        """CUPTI may be another tool's, and then kernels do not show: that is counted, and no share of 0 is kept."""
        looking = Bench(bench.engine, bench.clock, found=report(lambda program: program.work(100)))
        looking.look()
        statistics = looking.engine.statistics()
        assert (statistics.looks, statistics.look_counts) == ((), {"no_gpu_work": 1})

    def test_a_look_that_fails_is_counted_and_said_once(self, bench, caplog):
        """Others follow."""
        looking = Bench(bench.engine, bench.clock, found=ValueError("no report"))
        for _ in range(2):
            looking.look()
        assert looking.engine.statistics().look_counts == {"failed": 2}
        assert sum("a deep look failed" in record.message for record in caplog.records) == 1
        assert "look counts failed 2" in str(looking.engine.statistics())

    def test_another_profiler(self, looking, caplog):
        """There is no look, the program goes on with its own, and it is said once."""
        with torch.profiler.profile():
            for _ in range(2):
                looking.look()
        assert looking.engine.statistics().look_counts == {"failed": 2}
        assert sum("another profiler is on" in record.message for record in caplog.records) == 1

    def test_where_no_request_comes_the_profiler_stays_off(self, looking, monkeypatch):
        """A service that waits for work is not profiled meanwhile."""
        monkeypatch.setattr("gpuscope._profiling.now_and_then.DEADLINE_S", 0.05)
        looking.look(lambda: None)
        assert looking.engine.statistics().look_counts == {"no_request": 1}

    def test_stages_are_bounded(self):
        """A program that names its stages by numbers does not fill the memory."""
        ledger, one = Ledger(), stages_of(report())[0]
        ledger.look("done", [replace(one, stage=str(number)) for number in range(1000)])
        ledger.look("done", [replace(one, stage="0")])
        looks = {each.stage: each for each in ledger.statistics().looks}
        assert len(looks) == 200
        assert looks["0"].requests == 2 * one.requests

    def test_as_metrics(self):
        """By stage and kind of request; squares are for files alone."""
        ledger = Ledger()
        ledger.look("done", stages_of(report()))
        points = account_points(ledger.statistics())
        shares = {}
        for busy, took in zip(points[LOOK_BUSY], points[LOOK_TIME], strict=True):
            assert busy.attributes == took.attributes
            shares[busy.attributes["gpuscope.stage"]] = busy.value / took.value
        assert {point.attributes["gpuscope.request"] for point in points[LOOK_KERNELS]} == {"request"}
        assert shares["infer"] > 0.9
        assert shares["wait"] == 0
        assert LOOK_SQUARES not in points
        assert LOOK_SQUARES not in SPECS
        assert len(account_points(ledger.statistics(), for_file=True)[LOOK_SQUARES]) == 9


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10m", 600), ("90s", 90), ("2h", 7200), ("1.5m", 90), ("600", 600), ("1D", 86400)],
)
def test_the_setting(text, seconds):
    """Seconds, or a number with a unit."""
    assert Config.from_env({"GPUSCOPE_PROFILE_EVERY": text})[0].profile_every_s == seconds
    assert Config().changed(profile_every_s=text).profile_every_s == seconds


@pytest.mark.parametrize("text", ["0", "off", "no", "0m"])
def test_switched_off(text):
    """As other settings."""
    assert Config.from_env({"GPUSCOPE_PROFILE_EVERY": text})[0].profile_every_s == 0


@pytest.mark.parametrize("text", ["m", "often", "10 minutes", "-5m", "1s", "9d", "nan", "10x", "infd"])
def test_what_is_no_such_time(text):
    """A variable is said and left out; a keyword raises."""
    config, complaints = Config.from_env({"GPUSCOPE_PROFILE_EVERY": text})
    assert (config.profile_every_s, len(complaints)) == (0, 1)
    with pytest.raises(ValueError, match=r"profile_every_s.*as in 250ms, 90s"):
        Config().changed(profile_every_s=text)


REQUEST = Stage("request", 0, 1895, gpu=(3, 1897), inside=[Stage("infer", 10, 1880, gpu=(15, 1882))])
"""A stage that launches all along, so that events leave open whether the GPU works or waits."""


def looks_of(busy, *, requests=20, stage="infer", took_s=2e-3, kernels=20.0):
    """What looks saw of a stage that is as busy in each request."""
    return LookedStage(
        *("request", stage, requests, requests),
        time_s=requests * took_s,
        busy_s=requests * took_s * busy,
        kernels=requests * kernels,
        time2_s2=requests * took_s**2,
        busy2_s2=requests * (took_s * busy) ** 2,
        both_s2=requests * took_s**2 * busy,
    )


def recorded(*looks, had_work=38):
    """A recording of 50 requests with 40 answers each, and what looks saw."""
    infer = replace(REQUEST.inside[0], samples=40, had_work=had_work)
    found = recording(*repeat(replace(REQUEST, inside=[infer]), 50, 2000))
    return replace(found, looks=tuple(Looked(0, each) for each in looks))


class TestAgreement:
    """Kernels that looks see and answers of streams are two measurements of one thing."""

    def infer(self, found):
        """The verdict on the stage, and the notes about looks."""
        (verdict,) = (each for each in found.stages if each.name == "infer")
        return verdict, [note for note in found.notes if "eep looks" in note]

    @pytest.mark.parametrize(
        ("busy", "agrees"), [(0.96, True), (0.9, True), (0.8, True), (0.75, True), (0.5, False), (0.1, False)]
    )
    def test_answers_lie_above_kernels_and_by_no_more_than_known(self, busy, agrees):
        """By 3 to 20 points, which is what was measured beside CUPTI, and both are uncertain."""
        verdict, notes = self.infer(judge(recorded(looks_of(busy))))
        assert verdict.busy_share > 0.9
        assert verdict.looked.share == pytest.approx(busy)
        assert verdict.looked.range[0] < busy < verdict.looked.range[1]
        assert verdict.looked.kernels == 20
        assert verdict.looked.agrees is agrees
        assert len(notes) == 1
        if agrees:
            assert notes == ["Deep looks at 20 requests agree with what streams answered."]
        else:
            assert notes[0].startswith("Deep looks and answers do not agree on `infer` in `request`: in looks at 20")

    def test_kernels_cannot_run_for_longer_than_there_is_work(self):
        """Looks that see more than answers tell of contradict them, too."""
        verdict, notes = self.infer(judge(recorded(looks_of(0.95), had_work=10)))
        assert verdict.looked.agrees is False
        assert "and streams said that they had work for" in notes[0]

    @pytest.mark.parametrize("requests", [1, 5, 9])
    def test_too_few_requests(self, requests):
        """The share is shown without an interval, and nothing is compared."""
        verdict, notes = self.infer(judge(recorded(looks_of(0.1, requests=requests))))
        assert verdict.looked == LookedAt(share=pytest.approx(0.1), range=None, kernels=20.0, requests=requests)
        assert notes == []

    def test_without_answers(self):
        """Nothing to compare with."""
        found = replace(recording(*repeat(REQUEST, 50, 2000)), looks=(Looked(0, looks_of(0.5)),))
        verdict, notes = self.infer(judge(found))
        assert (verdict.looked.agrees, notes) == (None, [])

    def test_without_looks(self):
        """There is none, and no note."""
        verdict, notes = self.infer(judge(recorded()))
        assert (verdict.looked, notes) == (None, [])

    def test_processes_are_added_up(self):
        """Workers of one service."""
        found = replace(recorded(), looks=(Looked(0, looks_of(0.4)), Looked(1, looks_of(0.6))))
        looked = looked_at(found)["request", "infer"]
        assert (looked.share, looked.requests) == (pytest.approx(0.5), 40)

    def test_a_run_has_its_own(self):
        """`--run` leaves out those of other runs."""
        later = [replace(each.shifted(1e7), process="later") for each in repeat(REQUEST, 12, 2000)]
        found = recording(*repeat(REQUEST, 12, 2000), *later)
        found = replace(found, looks=(Looked(0, looks_of(0.4)), Looked(1, looks_of(0.6))))
        assert [each.process for run in runs_of(found) for each in only(found, run).looks] == [0, 1]

    def test_copies_that_the_host_waits_for_are_no_contradiction(self):
        """Looks count them, and answers do not."""
        looked = LookedAt(share=0.5, range=(0.48, 0.52), kernels=1.0, requests=20)
        assert agree(looked, (0.2, 0.3), 0.0) is False
        assert agree(looked, (0.2, 0.3), 0.2) is True
        assert agree(looked, None, 0.0) is None


@settings(max_examples=200)
@given(st.lists(st.tuples(st.floats(1e-6, 10), st.floats(0, 1)), min_size=10, max_size=60))
def test_the_interval_has_its_share_in_it(requests):
    """Whatever requests look like."""
    rows = [(took, took * part) for took, part in requests]
    share = share_of_sums(
        Sums(
            len(rows),
            *(sum(busy for _, busy in rows), sum(took for took, _ in rows)),
            *(sum(busy * busy for _, busy in rows), sum(took * took for took, _ in rows)),
            sum(busy * took for took, busy in rows),
        )
    )
    assert 0 <= share.low <= share.share <= share.high <= 1
    assert share.low < share.high


class TestFiles:
    """Files have the sums, and reports read them."""

    @pytest.fixture
    def file(self, tmp_path):
        """A recording on the fake GPU, in which looks were taken."""
        path, clock = tmp_path / "spans.jsonl", ManualClock()
        device = FakeDevice(clock, completes=True)
        with capture(device=device, clock=clock, exporters="file", file=str(path), warmup=0, nvml=False):
            with stage("request"), stage("infer"):
                pass
            assert gpuscope.flush(10)
            ledger = gpuscope._runtime.state.engine.ledger
            for _ in range(3):
                ledger.look("done", stages_of(report()))
        return path, ledger.statistics().looks

    def test_what_is_written_is_read(self, file):
        """Of each stage."""
        path, looks = file
        found = {each.stage.stage: each.stage for each in read([path]).looks}
        assert found.keys() == {"request", "infer", "wait"}
        for each in looks:
            for name in ("time_s", "busy_s", "kernels", "time2_s2", "busy2_s2", "both_s2", "requests", "calls"):
                assert getattr(found[each.stage], name) == pytest.approx(getattr(each, name)), name

    def test_sums_that_are_not_all_there_are_left_out(self, file):
        """A line may be damaged."""
        path, _ = file
        lines = [line.replace("gpuscope.look.squares", "gpuscope.look.other") for line in path.read_text().splitlines()]
        assert read_lines(lines).looks == ()

    def test_in_the_printed_report(self, file, capsys):
        """Beside what was asked, with a sentence on what it is."""
        from gpuscope.__main__ import main

        path, _ = file
        assert main(["report", str(path)]) == 0
        out = capsys.readouterr().out
        assert "in looks" in out
        assert "In looks: the part of the time" in " ".join(out.split())
        line = next(line for line in out.splitlines() if line.strip().startswith("infer") and " to " in line)
        assert line.rstrip().endswith(" 20")
        assert max(map(len, out.splitlines())) <= 100


PROGRAM = """
import json, torch, gpuscope

ones = torch.ones(8, 8)
gpuscope.enable(exporters="none", profile_every_s=10, interval_s=0.01)
while not gpuscope.statistics().look_counts:
    with gpuscope.stage("request"):
        ones @ ones
print(json.dumps(gpuscope.statistics().look_counts))
"""


def test_in_a_program_of_its_own(run_python):
    """It comes by itself, is read in another process, and is at nothing on a GPU here."""
    done = run_python(PROGRAM)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"no_gpu_work": 1}


class Graph:
    """Stands for a CUDA graph: it can be referred to weakly."""


class TestCaptures:
    """The end of a look waits for the GPU, which breaks a capture."""

    @pytest.fixture(params=["native", "twins"])
    def quiet(self, request, monkeypatch):
        """What takes notice of captures."""
        if request.param == "twins":
            monkeypatch.setattr("gpuscope._cuda.graphs.quiet.native", None)
        quiet = Quiet()
        monkeypatch.setattr(state, "graphs", SimpleNamespace(quiet=quiet))
        return quiet

    def test_no_look_begins_while_one_goes_on_or_right_after(self, looking, quiet):
        """It comes when there was none for half a minute."""
        graph = Graph()
        quiet.begin(graph)
        looking.clock.advance(901)
        for _ in range(3):
            looking.poll()
            assert looking.looks._thread is None
            looking.clock.advance(31)
        quiet.end(graph)
        quiet.begin(graph)
        quiet.end(graph)
        looking.poll()
        assert looking.looks._thread is None
        looking.clock.advance(29)
        looking.poll()
        assert looking.looks._thread is None
        looking.look()
        assert looking.engine.statistics().look_counts == {"done": 1}

    def test_a_look_ends_after_the_capture(self, looking, quiet):
        """One that begins while the profiler is on is waited for."""
        graph, ended = Graph(), []
        finish = ProfilingSession.finish

        def noted(session):
            ended.append(quiet.is_capturing)
            finish(session)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ProfilingSession, "finish", noted)
            served = 0

            def serve():
                nonlocal served
                served += 1
                if served == 7:
                    quiet.begin(graph)
                if served == 200:
                    quiet.end(graph)
                request()

            looking.look(serve)
        assert served >= 200
        assert ended == [False]

    def test_a_graph_that_goes_away_is_captured_no_more(self, quiet):
        """And a capture that fails to begin was none."""
        graph = Graph()
        quiet.begin(graph)
        assert quiet.is_capturing
        del graph
        assert not quiet.is_capturing

        def fail():
            raise ValueError("no capture")

        with pytest.raises(ValueError, match="no capture"):
            quiet.around(fail, Graph())
        assert not quiet.is_capturing
        assert quiet.begun == 2
