"""The deep look offline: traces of programs whose bound is known by construction, and what is read from a trace."""

from __future__ import annotations

import gzip
import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuscope._data.plain.durations import duration
from gpuscope._profiling.examine import examine, read_trace
from gpuscope._profiling.unwatched import without_watching

from .kineto import Program, serve


def infer(program, kernels, duration):
    """Launch kernels in a stage."""
    with program.stage("infer"):
        for _ in range(kernels):
            program.launch(duration)


def fetch(program, size=4000):
    """Copy a result into pageable memory."""
    with program.stage("fetch"):
        program.copy("DtoH", size, pageable=True)


def tiny_kernels(program):
    """Launching takes longer than computing."""
    infer(program, 500, 2)
    fetch(program)


def large_gemm(program):
    """One long kernel."""
    infer(program, 1, 5000)
    fetch(program)


def pageable_copy(program):
    """A large batch from pageable memory."""
    with program.stage("h2d"):
        program.copy("HtoD", 64_000_000, pageable=True)
    infer(program, 1, 1500)
    fetch(program)


def pinned_copy(program):
    """The same from pinned memory, with more to compute."""
    with program.stage("h2d"):
        program.copy("HtoD", 64_000_000, pageable=False, blocking=False)
    infer(program, 1, 3500)
    fetch(program)


def item_in_a_loop(program, kernel=50, work=90):
    """A number is read after every few kernels."""
    with program.stage("generate"):
        for _ in range(20):
            for _ in range(3):
                program.launch(kernel)
            program.item()
            program.work(work)


def item_after_each_tiny_kernel(program):
    """Waiting itself costs more than what is waited for."""
    with program.stage("generate"):
        for _ in range(50):
            program.launch(2)
            program.item()


def heavy_preprocess(program):
    """Most of the time is on the host, in nothing of PyTorch."""
    with program.stage("prep"):
        program.work(20_000)
    infer(program, 50, 60)
    fetch(program)


def two_streams(program):
    """Two towers at a time."""
    for stream, name in ((1, "left"), (2, "right")):
        with program.stage(name):
            program.launch(3000, stream=stream)
    with program.stage("fetch"):
        program.synchronize(stream=1)
        program.synchronize(stream=2)


def graph_replay(program):
    """Many kernels by one call."""
    with program.stage("infer"):
        program.replay([20.0] * 100)
    fetch(program)


def compiled_model(program):
    """Few long kernels after the guards."""
    with program.stage("infer"):
        program.work(60)
        for _ in range(30):
            program.launch(90)
    fetch(program)


def small_tensors(program):
    """Tensors of a number each, made on the host."""
    with program.stage("make tensors"):
        for _ in range(60):
            program.copy("HtoD", 8, pageable=True)
            program.work(3)
    infer(program, 20, 8)


def large_result(program):
    """A large result by `.cpu()`."""
    infer(program, 1, 400)
    fetch(program, 24_000_000)


def taking_turns(program):
    """As much host work as GPU work, one after the other."""
    with program.stage("prep"):
        program.work(3000)
    infer(program, 30, 100)
    fetch(program)


TRANSFER, COMPUTE, DISPATCH = "transfer-bound", "compute-bound", "dispatch-bound"
SYNC, HOST, UNKNOWN = "sync-bound", "host-bound", "unknown"
WORKLOADS = {
    tiny_kernels: {"request": DISPATCH, "infer": DISPATCH},
    large_gemm: {"request": COMPUTE, "infer": COMPUTE, "fetch": SYNC},
    pageable_copy: {"request": TRANSFER, "h2d": TRANSFER, "infer": COMPUTE, "fetch": SYNC},
    pinned_copy: {"request": COMPUTE, "h2d": TRANSFER, "infer": COMPUTE},
    item_in_a_loop: {"request": SYNC, "generate": SYNC},
    item_after_each_tiny_kernel: {"request": SYNC, "generate": SYNC},
    heavy_preprocess: {"request": HOST, "prep": HOST, "infer": COMPUTE, "fetch": SYNC},
    two_streams: {"request": COMPUTE, "left": COMPUTE, "right": COMPUTE, "fetch": SYNC},
    graph_replay: {"request": COMPUTE, "infer": COMPUTE, "fetch": SYNC},
    compiled_model: {"request": COMPUTE, "infer": COMPUTE},
    small_tensors: {"request": DISPATCH, "make tensors": DISPATCH},
    large_result: {"request": TRANSFER, "infer": COMPUTE, "fetch": TRANSFER},
    taking_turns: {"request": SYNC, "prep": HOST, "infer": COMPUTE, "fetch": SYNC},
}


def looks(program):
    """What is said of each stage, by name."""
    return {stage.name: stage for stage in examine(program.trace()).stages}


class TestBounds:
    """What bounds the stages of programs that were made to be bound by it."""

    @pytest.mark.parametrize("request_", WORKLOADS, ids=lambda request_: request_.__name__)
    def test_bound_is_what_the_program_was_made_for(self, request_):
        """Every stage, and the request, is called what it is by construction."""
        found = looks(serve(request_))
        assert {name: found[name].bound for name in WORKLOADS[request_]} == WORKLOADS[request_]

    @pytest.mark.parametrize("request_", WORKLOADS, ids=lambda request_: request_.__name__)
    def test_parts_add_up_to_the_whole(self, request_):
        """What the GPU does, and what keeps it from having work, fill a stage's time exactly."""
        for stage in looks(serve(request_)).values():
            parts = stage.compute_ms + stage.transfer_ms + stage.dispatch_ms + stage.sync_ms + stage.host_only_ms
            assert parts == pytest.approx(stage.ms, abs=1e-6)
            assert min(stage.compute_ms, stage.transfer_ms, stage.dispatch_ms, stage.sync_ms, stage.host_only_ms) >= 0
            assert stage.wait_ms + stage.copy_wait_ms <= stage.ms

    def test_a_staged_copy_is_all_of_its_call(self):
        """Where only parts of a pageable copy show on the GPU, the host is copying in between: it is no idle time."""
        program = serve(pageable_copy)
        for event in program.events:
            if event["cat"] == "gpu_memcpy" and event["args"]["bytes"] > 2**16:
                event["dur"] /= 10
        assert looks(program)["h2d"].bound == looks(program)["request"].bound == TRANSFER

    def test_names_do_not_matter(self):
        """A stage called after something else is judged by what it does."""

        def request(program):
            with program.stage("large_gemm"):
                for _ in range(300):
                    program.launch(2)

        assert looks(serve(request))["large_gemm"].bound == DISPATCH

    def test_without_gpu_work_nothing_is_said(self):
        """A trace of the CPU alone, as when another tool holds CUPTI, is unknown, and the report says what to do."""
        program = Program(has_gpu=False)
        with program.stage("request"):
            program.launch(10)
        found = examine(program.trace())
        assert [stage.bound for stage in found.stages] == [UNKNOWN]
        assert "CUPTI" in str(found)

    def test_without_a_gpu_nobody_hunts_for_cupti(self):
        """A look at a program that used no GPU says so in its trace, and the report sends nobody after other tools."""
        program = Program(has_gpu=False)
        with program.stage("request"):
            program.launch(10)
        trace = program.trace()
        found = examine({**trace, "gpuscope": {**trace.get("gpuscope", {}), "gpu": False}})
        assert "used no GPU" in str(found)
        assert "CUPTI" not in str(found)

    def test_a_wait_for_another_stage_names_it(self):
        """A stage that waits for what an earlier one launched sends the reader there."""
        stage = looks(serve(large_gemm))["fetch"]
        assert stage.waits_for == "infer"
        assert "`infer`" in stage.next_steps[0]

    def test_idle_time_between_requests_is_said(self):
        """A program that does something else between requests is told how much of the time that is."""
        assert "Between requests, the GPU has nothing to do for 8" in str(
            examine(serve(graph_replay, between=10_000).trace())
        )
        assert "Between requests" not in str(examine(serve(graph_replay).trace()))

    def test_pytorch_on_the_cpu_is_work_of_the_host(self):
        """Operators that use no GPU launch nothing, and fewer launches would not help."""

        def request(program):
            with program.stage("embed"):
                for _ in range(20):
                    with program.operator("aten::linear"), program.operator("aten::addmm"):
                        program.work(500)
            infer(program, 3, 100)
            fetch(program)

        stage = looks(serve(request))["embed"]
        assert (stage.bound, stage.launches) == (HOST, 0)
        assert "in operators of PyTorch that use no GPU" in stage.because
        assert "Move it to the GPU" in stage.next_steps[0]
        assert not any("graph" in step for step in stage.next_steps)

    def test_a_cost_is_per_call_where_its_time_is(self):
        """Many tiny kernels beside a few that take nearly all of the time: that is proportional to the data."""

        def request(program):
            with program.stage("infer"):
                for _ in range(30):
                    program.launch(2)
                for _ in range(10):
                    program.launch(900)
            fetch(program)

        stage = looks(serve(request))["infer"]
        assert (stage.bound, stage.overhead, stage.kernel_us) == (COMPUTE, "proportional", 900)


def blocks(program, kernels=12, duration=30):
    """A model in 24 stages, and a wait for its result."""
    with program.stage("model"):
        for _ in range(24):
            with program.stage("block"):
                for _ in range(kernels):
                    program.launch(duration)
    fetch(program)


class TestWatching:
    """The profiler makes each launch slower, and a look allows for that."""

    @staticmethod
    def look(request_, cost=20):
        """Return what is said of a program while launches take 18 µs longer, and what is true of it without."""
        alone, watched = serve(request_, launch_cost=cost), serve(request_, launch_cost=cost + 18)
        lengths = [[*key, round(1e3 * sum(each) / len(each))] for key, each in alone.lengths.items()]
        trace = watched.trace()
        noted = {**trace, "gpuscope": {**trace["gpuscope"], "unwatched": lengths}}
        return looks(watched), examine(noted), looks(alone)

    @pytest.mark.parametrize("cost", [20, 23])
    def test_a_busy_gpu_is_not_called_idle_because_it_is_watched(self, cost):
        """Launches that keep up without the profiler do not with it: the kernels fill the length without."""
        naive, found, true = self.look(blocks, cost)
        said = {stage.name: stage for stage in found.stages}
        assert (naive["request"].bound, true["request"].bound) == (DISPATCH, COMPUTE)
        for name in ("request", "model"):
            assert said[name].bound == COMPUTE
            assert said[name].idle_ms / said[name].ms == pytest.approx(true[name].idle_ms / true[name].ms, abs=0.06)

    def test_what_is_idle_without_watching_stays_idle(self):
        """Not more of it than is true, and not less."""
        naive, found, true = self.look(lambda program: blocks(program, duration=12))
        (request,) = (stage for stage in found.stages if stage.name == "request")
        share = request.idle_ms / request.ms
        assert request.bound == true["request"].bound == DISPATCH
        assert share == pytest.approx(true["request"].idle_ms / true["request"].ms, abs=0.05)
        assert share < naive["request"].idle_ms / naive["request"].ms - 0.15

    @pytest.mark.parametrize("request_", WORKLOADS, ids=lambda request_: request_.__name__)
    def test_parts_add_up_to_the_length_without_watching(self, request_):
        """For each stage, and none is negative; waits are no longer than the stage."""
        _, found, _ = self.look(request_)
        for stage in found.stages:
            parts = [stage.compute_ms, stage.transfer_ms, stage.dispatch_ms, stage.sync_ms, stage.host_only_ms]
            assert sum(parts) == pytest.approx(stage.ms, abs=1e-6)
            assert min(parts) >= 0
            assert stage.computing_ms <= stage.host_only_ms + 1e-9
            assert stage.wait_ms + stage.copy_wait_ms <= stage.ms + 1e-9
            assert stage.ms <= stage.watched_ms + 1e-9

    @pytest.mark.parametrize("request_", [*WORKLOADS, blocks], ids=lambda request_: request_.__name__)
    def test_no_part_is_more_than_the_whole_where_stages_were_far_shorter(self, request_):
        """A stage that waits for another's work waits for no more of it than of its own length."""
        program = serve(request_)
        lengths = [[*key, round(1e3 * sum(each) / len(each) / 3)] for key, each in program.lengths.items()]
        trace = program.trace()
        found = examine({**trace, "gpuscope": {**trace["gpuscope"], "unwatched": lengths}})
        for stage in found.stages:
            assert all(int(part) <= 100 for part in re.findall(r"(\d+)%", stage.because))
            for part in re.findall(r"^For (\d+)% of the time the host waits for", stage.because):
                assert int(part) <= 100 * (stage.wait_ms + stage.copy_wait_ms) / stage.ms + 0.5

    def test_a_request_that_watching_did_not_slow_is_not_said_to_be_slower(self):
        """By 0 %, from a length to the same."""
        program = serve(blocks)
        lengths = [[*key, round(2e3 * sum(each) / len(each))] for key, each in program.lengths.items()]
        trace = program.trace()
        notes = examine({**trace, "gpuscope": {**trace["gpuscope"], "unwatched": lengths}}).notes
        assert "Watching did not make `request` slower." in notes

    @settings(deadline=None)
    @given(
        parts=st.lists(st.floats(0, 1e3), min_size=5, max_size=5),
        computing=st.floats(0, 1),
        waiting=st.floats(0, 1),
        inside=st.floats(0, 1),
        unwatched=st.floats(0.001, 3e3),
    )
    def test_parts_of_any_window_fill_what_is_left_of_it(self, parts, computing, waiting, inside, unwatched):
        """The GPU's work stays, the window is no longer than it was, and nothing is negative."""
        compute, transfer, dispatch, sync, host_only = parts
        before = {"window": sum(parts), "host": inside * sum(parts), "compute": compute, "transfer": transfer}
        before |= {"dispatch": dispatch, "sync": sync, "host_only": host_only, "computing": computing * host_only}
        before |= {"wait": waiting * compute, "copy_wait": waiting * transfer}
        after = without_watching(before, unwatched)
        found = [after[name] for name in ("compute", "transfer", "dispatch", "sync", "host_only")]
        assert sum(found) == pytest.approx(after["window"], abs=1e-6)
        assert min(after.values()) >= 0
        assert after["window"] <= before["window"] + 1e-9
        assert (after["compute"], after["transfer"]) == (compute, transfer)
        assert after["wait"] + after["copy_wait"] <= unwatched + 1e-6
        assert after["host"] <= after["window"]

    def test_how_much_watching_slowed_it_is_said(self):
        """By how much, from what to what; without lengths from before, that launches are slower."""
        _, found, true = self.look(blocks)
        (note,) = (note for note in found.notes if note.startswith("Watching made"))
        request = next(stage for stage in found.stages if stage.name == "request")
        assert request.ms == pytest.approx(true["request"].ms, rel=0.01)
        assert f"slower by {request.watched_ms / request.ms - 1:.0%}, from {duration(request.ms)} to " in note
        assert "The profiler makes launches slower" in str(examine(serve(blocks).trace()))

    @pytest.mark.parametrize("lengths", [None, 5, [["request"]], [["request", "request", "long"]], {"a": 1}])
    def test_lengths_that_are_none_are_left_out(self, lengths):
        """A trace may hold anything."""
        trace = serve(blocks).trace()
        found = examine({**trace, "gpuscope": {**trace["gpuscope"], "unwatched": lengths}})
        assert all(stage.watched_ms is None for stage in found.stages)


class TestContents:
    """Counts and times of what is in a stage."""

    def test_counts_are_a_call(self):
        """Kernels, launches and gaps are given for a call of the stage, not for all of them."""
        stage = looks(serve(tiny_kernels, count=4))["infer"]
        assert (stage.calls, stage.kernels, stage.launches, stage.gaps) == (4, 500, 500, 499)
        assert stage.kernel_us == pytest.approx(2.0)
        assert stage.overhead == "per call"

    def test_a_full_queue_does_not_run_out(self):
        """Between two kernels there is always a gap; only one before late work counts."""

        def request(program):
            with program.stage("infer"):
                for _ in range(20):
                    program.launch(100)
            fetch(program)
            with program.stage("slow"):
                for _ in range(20):
                    program.work(50)
                    program.launch(5)

        program = serve(request)
        work = sorted((event for event in program.events if event["cat"] == "kernel"), key=lambda event: event["ts"])
        for event in work:
            event["dur"] -= 1
        found = looks(program)
        assert found["infer"].gaps == 0
        assert found["slow"].gaps == pytest.approx(20, abs=1)

    def test_counts_are_written_out(self):
        """Thousands of kernels are a number, and no power of ten."""

        def request(program):
            with program.stage("infer"):
                program.replay([3.0] * 34_050)

        text = str(examine(serve(request, count=2).trace()))
        assert "34,050 kernels from 1 launches" in text
        assert "e+0" not in text

    def test_advice_is_given_once(self):
        """The same sentences under each stage hide what is different."""
        steps = [line.strip() for line in str(examine(serve(tiny_kernels).trace())).splitlines() if "- " in line[:12]]
        assert steps
        assert len(steps) == len(set(steps))

    def test_a_graph_is_one_launch_of_many_kernels(self):
        """The kernels of a replayed graph belong to the stage that replayed it."""
        stage = looks(serve(graph_replay))["infer"]
        assert (stage.graph_launches, stage.launches, stage.kernels) == (1, 1, 100)

    def test_copies_by_direction_and_memory(self):
        """Copies are told apart by direction and by whether the host's memory is pinned, with their bytes."""

        def request(program):
            program.copy("HtoD", 1000, pageable=True)
            program.copy("HtoD", 3000, pageable=False)
            program.copy("DtoH", 500, pageable=True)

        (stage,) = looks(serve(request)).values()
        found = {(copies.direction, copies.pageable): copies.bytes for copies in stage.copies}
        assert found == {("HtoD", True): 1000, ("HtoD", False): 3000, ("DtoH", True): 500}

    def test_tiny_tensors_are_named_by_their_operator(self):
        """Numbers copied to the GPU one by one are counted, with the operator that the program called."""
        stage = looks(serve(small_tensors))["make tensors"]
        assert [(small.name, small.count) for small in stage.small_copies] == [("aten::to", 60)]
        assert "once" in stage.next_steps[0]

    def test_waits_are_named_by_their_operator(self):
        """`.item()` is one wait, whatever CUDA calls it makes; a bare synchronisation goes by its own name."""

        def request(program):
            program.launch(100)
            program.item()
            program.synchronize(call="cudaDeviceSynchronize")

        (stage,) = looks(serve(request)).values()
        assert {wait.name: wait.count for wait in stage.waits} == {"aten::item": 1, "cudaDeviceSynchronize": 1}

    def test_a_wait_between_streams_is_none(self):
        """`cudaStreamWaitEvent` lets a stream wait, not the host."""

        def request(program):
            program.launch(100)
            program.synchronize(stream=3, call="cudaStreamWaitEvent")

        (stage,) = looks(serve(request)).values()
        assert stage.waits == ()

    def test_as_plain_data(self):
        """The findings can be written as JSON."""
        found = json.loads(json.dumps(examine(serve(pageable_copy).trace()).as_dict()))
        assert [stage["name"] for stage in found["stages"]] == ["request", "h2d", "infer", "fetch"]


class TestAttribution:
    """GPU work belongs to the stage that launched it."""

    def test_work_belongs_to_its_launch_and_not_to_its_time(self):
        """A kernel that runs during a later stage counts for the one that launched it."""
        program = Program()
        with program.stage("request"):
            with program.stage("first"):
                program.launch(5000)
            with program.stage("second"):
                program.work(2000)
        found = looks(program)
        assert (found["first"].kernels, found["second"].kernels, found["request"].kernels) == (1, 0, 1)

    def test_threads_are_kept_apart(self):
        """A launch on another thread at the same time is not the stage's."""
        program = Program()
        with program.stage("request"):
            program.launch(10)
            program.thread += 1
            program.launch(10)
            program.thread -= 1
        assert looks(program)["request"].kernels == 1

    def test_what_is_not_whole_is_left_out_and_said(self):
        """A request cut off by the end of the trace does not count, nor do the stages in it."""
        program = serve(large_gemm)
        with program.stage("request", finished=False), program.stage("infer"):
            program.launch(1)
        found = examine(program.trace())
        assert {stage.name: stage.calls for stage in found.stages} == {"request": 5, "infer": 5, "fetch": 5}
        assert "2 stages that were not wholly in the trace" in str(found)

    def test_a_stage_that_lost_its_request_is_left_out(self):
        """A stage whose request began before the trace is not taken for a request."""
        program = serve(large_gemm)
        with program.stage("infer"):
            program.launch(1)
        program.requests.remove("infer")
        assert looks(program)["infer"].calls == 5

    def test_a_trace_without_our_note_is_read_too(self):
        """In a trace that gpuscope did not make, every annotation but the profiler's own steps is a stage."""
        program = Program()
        with program.stage("ProfilerStep#3"), program.stage("forward"):
            program.launch(10)
        (stage,) = examine(program.trace(note=False)).stages
        assert (stage.name, stage.root, stage.kernels) == ("forward", "forward", 1)

    def test_the_order_of_events_does_not_matter(self):
        """Kineto writes events in no useful order."""
        program = serve(pageable_copy)
        before = examine(program.trace())
        random.Random(0).shuffle(program.events)
        assert examine(program.trace()) == before


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**62, 2**64, -(2**64), 10**400])
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["\ud800", "X", "kernel", "cpu_op", "user_annotation", "request", "Memcpy HtoD (a -> b)"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


COMPRESSED = gzip.compress(b'{"traceEvents": []}', mtime=0)


class TestReading:
    """Files, and what is wrong with them."""

    def test_compressed_or_not(self, tmp_path):
        """A trace is read as it is, and compressed by gzip."""
        trace = serve(large_gemm).trace()
        (tmp_path / "t.json").write_text(json.dumps(trace))
        (tmp_path / "t.json.gz").write_bytes(gzip.compress(json.dumps(trace).encode()))
        assert read_trace(tmp_path / "t.json") == read_trace(tmp_path / "t.json.gz") == trace

    @pytest.mark.parametrize("trace", [{}, [], {"traceEvents": 3}])
    def test_what_is_no_trace_is_refused(self, trace):
        """The message says what was expected."""
        with pytest.raises(ValueError, match="traceEvents"):
            examine(trace)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"", "it is empty"),
            (b" \n", "it is empty"),
            (b'{"traceEvents": [\n{"ph": "X"', "it is not JSON, in line 2"),
            (b"\x80\x02torch", "it is not JSON"),
            (b"[" * 200_000, "it is not JSON"),
            (COMPRESSED[:-4], "compressed by gzip, and was cut short"),
            (COMPRESSED[:-6], "compressed by gzip, and was cut short"),
            (COMPRESSED[:5], "compressed by gzip, and was cut short"),
            (COMPRESSED[:-8] + b"damaged!", "compressed by gzip, and damaged"),
            (COMPRESSED[:10] + b"damaged!", "compressed by gzip, and damaged"),
        ],
    )
    def test_what_cannot_be_read_is_said(self, tmp_path, content, said):
        """What is empty, cut short, damaged or something else is one kind of error, whatever it is called."""
        for name in ("t.json", "t.json.gz"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=said):
                read_trace(tmp_path / name)

    def test_the_name_does_not_matter(self, tmp_path):
        """What is compressed is known by its content."""
        (tmp_path / "t.json").write_bytes(gzip.compress(b'{"traceEvents": []}'))
        (tmp_path / "t.json.gz").write_text('{"traceEvents": []}')
        assert read_trace(tmp_path / "t.json") == read_trace(tmp_path / "t.json.gz") == {"traceEvents": []}

    @settings(max_examples=150, deadline=None)
    @given(data=st.data())
    def test_any_json_is_survived(self, data):
        """Whatever stands where a value is expected, there is a report."""
        trace = json.loads(json.dumps(serve(large_gemm, count=2).trace()))
        for _ in range(data.draw(st.integers(1, 4))):
            node, key = trace, data.draw(st.sampled_from(["traceEvents", "traceEvents", "traceEvents", "gpuscope"]))
            while isinstance(node[key], dict | list) and node[key] and data.draw(st.integers(0, 9)):
                node = node[key]
                key = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
            node[key] = data.draw(ANYTHING)
        if not isinstance(trace["traceEvents"], list):
            trace["traceEvents"] = [trace["traceEvents"]]
        found = examine(trace)
        assert str(found)
        json.dumps(found.as_dict())

    def test_malformed_events_are_counted(self):
        """An event that cannot be read is left out, and said."""
        program = serve(large_gemm)
        program.events += [{"ph": "X", "cat": "kernel", "name": "k"}, 7, {"ph": "X", "cat": "kernel", "ts": "soon"}]
        found = examine(program.trace())
        assert len(found.stages) == 3
        assert "3 events of the trace could not be read" in str(found)
