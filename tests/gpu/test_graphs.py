"""Stages inside CUDA graphs: each replay has its own times, and the graph is what it would be without them."""

from __future__ import annotations

import gc
import threading
from itertools import pairwise

import pytest
import torch

import gpuscope
from gpuscope.testing import capture

pytestmark = pytest.mark.skipif(
    not hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph_exec"), reason="this PyTorch does not show executable graphs"
)
CYCLES = (100_000, 400_000)  # about 0.05 and 0.2 ms
ROUNDING_NS = 2_000
BRANCH_NS = 5_000
"""Record nodes stand beside the kernels: one may come a little before or after what it marks."""
WARMUP = 5
"""Replays in a window of CUPTI's before those that count: it holds the first up, for some 0.4 ms within the graph."""


def captured(work, **options):
    """Capture what a function launches, and return the graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(**options)
    with torch.cuda.graph(graph):
        work()
    return graph


def spin(names=("short", "long"), cycles=CYCLES):
    """Return work of spinning kernels, each in a stage."""

    def work():
        for name, count in zip(names, cycles, strict=True):
            with gpuscope.stage(name):
                torch.cuda._sleep(count)

    return work


def replay(graph, times=1, around="request"):
    """Replay the graph, each time in a stage of its own."""
    for _ in range(times):
        with gpuscope.stage(around):
            graph.replay()


def by_request(spans):
    """Return the spans inside graphs by the stage around their replay, in the order of the replays."""
    requests = sorted((s.start_ns, s.span_id) for s in spans if s.kind == "host" and s.name == "request")
    found = {span_id: [] for _, span_id in requests}
    for span in spans:
        if span.attributes.get("gpuscope.graph") and span.parent_id in found:
            found[span.parent_id].append(span)
    return [sorted(inner, key=lambda span: span.start_ns) for inner in found.values()]


def assert_whole():
    """Let the GPU and the collector finish: every stage is exported, and none was dropped or lost."""
    torch.cuda.synchronize()
    assert gpuscope.flush(20)
    s = gpuscope.statistics()
    assert (s.dropped, s.lost) == ({}, {})
    assert s.recorded == s.exported


def test_times_agree_with_the_kernels(cupti):
    """
    Of each replay the inner stages last as long as their kernels, and lie where those lie.

    Within 3 µs or 1 %. A kernel comes first: a stage that begins a graph begins with its launch, which CUPTI holds up.
    """
    inside = spin()

    def work():
        torch.cuda._sleep(CYCLES[0])
        inside()

    with capture() as spans:
        graph = captured(work)
        with cupti.Window() as window:
            replay(graph, WARMUP + 30)
        assert_whole()
    replays = by_request(spans)[WARMUP:]
    kernels = sorted(window.kernels("spin"), key=lambda kernel: kernel.start_ns)[3 * WARMUP :]
    assert len(replays) == 30
    assert len(kernels) == 90
    wrong = []
    for inner, pair in zip(replays, zip(kernels[1::3], kernels[2::3], strict=True), strict=True):
        assert [span.name for span in inner] == ["short [gpu]", "long [gpu]"]
        for span, kernel in zip(inner, pair, strict=True):
            length_ns = kernel.end_ns - kernel.start_ns
            longer_ns, later_ns = span.duration_ns - length_ns, span.start_ns - kernel.start_ns
            slack_ns = span.attributes["gpuscope.clock.uncertainty"] * 1e9 + 20_000
            if abs(longer_ns) > max(3_000, length_ns // 100) or abs(later_ns) > slack_ns:
                wrong.append((span.name, longer_ns, later_ns, slack_ns))
    assert len(wrong) <= 2, wrong  # Now and then CUPTI itself is off.


def test_replays_back_to_back_have_their_own_times():
    """Of a thousand replays that follow each other at once none has a time of another's."""
    with capture(interval_s=0.001) as spans:
        graph = captured(spin(cycles=(10_000, 20_000)))
        replay(graph, 1000)
        assert_whole()
    replays = by_request(spans)
    assert [len(inner) for inner in replays] == [2] * 1000
    in_order = [span for inner in replays for span in inner]
    assert all(span.duration_ns > 0 for span in in_order)
    slack_ns = ROUNDING_NS + 2 * max(round(s.attributes["gpuscope.clock.uncertainty"] * 1e9) for s in in_order)
    assert all(a.end_ns <= b.start_ns + slack_ns for a, b in pairwise(in_order))
    longest_ns = max(span.duration_ns for span in in_order)
    assert longest_ns < 200_000  # Some 15 µs, or the two events of it are of different replays.


def test_nested_stages_enclose_each_other():
    """The GPU span of a stage inside another lies in that one's and is its child."""

    def work():
        with gpuscope.stage("outer"):
            torch.cuda._sleep(20_000)
            with gpuscope.stage("inner"):
                torch.cuda._sleep(20_000)

    with capture() as spans:
        replay(captured(work), 5)
        assert_whole()
    gpu = {span.span_id: span for span in spans if span.attributes.get("gpuscope.graph")}
    inner = [span for span in gpu.values() if span.name == "inner [gpu]"]
    assert len(inner) == 5
    for span in inner:
        around = gpu[span.parent_id]
        assert around.name == "outer [gpu]"
        assert around.start_ns < span.start_ns
        assert span.end_ns <= around.end_ns + ROUNDING_NS


def test_several_graphs_on_several_streams():
    """Each replay's stages are told with the stream that it ran on, whichever graph and stream."""
    streams = [torch.cuda.Stream() for _ in range(3)]
    with capture() as spans:
        graphs = [captured(spin((name,), (20_000,))) for name in ("encoder", "decoder")]
        for _ in range(10):
            for stream in streams:
                with torch.cuda.stream(stream):
                    for graph in graphs:
                        replay(graph)
        assert_whole()
    inner = [span for request in by_request(spans) for span in request]
    assert len(inner) == 60
    assert {span.attributes["gpuscope.cuda.stream"] for span in inner} == {stream.cuda_stream for stream in streams}


def test_a_graph_captured_here_is_replayed_by_threads():
    """Four threads that replay one graph on their own streams yield every replay's stages, each in its own request."""
    with capture() as spans:
        graph = captured(spin(cycles=(10_000, 10_000)))

        def run():
            with torch.cuda.stream(torch.cuda.Stream()):
                replay(graph, 50)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert_whole()
    replays = by_request(spans)
    assert [len(inner) for inner in replays] == [2] * 200
    assert all(0 < span.duration_ns < 200_000 for inner in replays for span in inner)


def test_graphed_callables_are_seen_inside():
    """A stage in the `forward` of a module is timed when `make_graphed_callables` has made a graph of it."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(64, 64)

        def forward(self, x):
            with gpuscope.stage("linear"):
                return self.linear(x).relu()

    block = Block().cuda().eval()
    x = torch.randn(8, 64, device="cuda")
    with torch.no_grad():  # Gradients of another stream would break the capture of the backward pass.
        expected = block(x)
    with capture() as spans:
        graphed = torch.cuda.make_graphed_callables(block, (torch.randn_like(x),))
        for _ in range(5):
            with gpuscope.stage("request"):
                assert torch.allclose(graphed(x), expected)
    assert [len(inner) for inner in by_request(spans)] == [1] * 5


def test_results_and_the_account_of_a_graph_are_as_without_stages():
    """A graph with stages computes the same, replays do not synchronise, and no stage of the program is lost."""
    x, y = torch.zeros(1024, device="cuda"), torch.zeros(1024, device="cuda")

    def work():
        with gpuscope.stage("double"):
            torch.mul(x, 2, out=y)
        with gpuscope.stage("add"):
            y.add_(1)

    with capture(interval_s=0.001):
        graph = captured(work)
        for value in range(50):
            x.fill_(value)
            torch.cuda.set_sync_debug_mode("error")
            try:
                replay(graph)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert y.unique().tolist() == [2 * value + 1]
        assert_whole()


def test_recording_may_be_toggled_between_replays():
    """Replays while recording is off yield nothing; those before and after have their own times."""
    with capture() as spans:
        graph = captured(spin())
        replay(graph, 3)
        recorder = gpuscope._runtime.state.recorder
        gpuscope.disable()
        replay(graph, 5)
        gpuscope._runtime.state.recorder = recorder
        replay(graph, 3)
        assert_whole()
    assert [[span.name for span in inner] for inner in by_request(spans)] == [["short [gpu]", "long [gpu]"]] * 6


def test_a_graph_destroyed_while_it_runs_is_read():
    """A graph that the program lets go of right after its replays is destroyed; their times come, its events stay."""

    def come_and_go(graphs):
        for _ in range(graphs):
            graph = captured(spin())
            replay(graph, 3)
            del graph
            gc.collect()
        assert_whole()

    with capture() as spans:
        come_and_go(10)
        (pool,) = gpuscope._runtime.state.graphs._pools.values()
        held = len(pool._spare), len(pool._unread)
        come_and_go(10)
        spare, unread = len(pool._spare), len(pool._unread)
    assert [len(inner) for inner in by_request(spans)] == [2] * 60
    # Four events per replay, of which all 30 may be on their way at once; three of each graph, one after the other.
    assert spare - held[0] <= 30 * 4
    assert unread - held[1] <= 3


def test_a_graph_that_the_program_keeps():
    """With `keep_graph=True`, instantiated by its first replay and again later, replays have their times."""
    with capture() as spans:
        graph = captured(spin(), keep_graph=True)
        replay(graph, 2)
        torch.cuda.synchronize()
        graph.instantiate()
        replay(graph, 2)
        assert_whole()
    assert [len(inner) for inner in by_request(spans)] == [2] * 4


def test_a_graph_inside_a_graph_is_left_alone():
    """A replay that is captured into another graph is no replay: nothing is broken and nothing invented."""
    x = torch.zeros(1024, device="cuda")

    def work():
        with gpuscope.stage("add"):
            x.add_(1)

    with capture() as spans:
        inside = captured(work)
        x.zero_()
        outside = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(outside):
                inside.replay()
        except RuntimeError as error:
            pytest.skip(f"this PyTorch takes no graph into a graph: {error}")
        replay(outside, 3)
        torch.cuda.synchronize()
        assert x.unique().tolist() == [3]
        replay(inside)
    assert [len(inner) for inner in by_request(spans)][-1:] == [1]


def test_side_streams_of_a_capture_are_seen():
    """A stage on a stream that was forked into the capture is timed there."""
    side = torch.cuda.Stream()

    def work():
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side), gpuscope.stage("beside"):
            torch.cuda._sleep(200_000)
        with gpuscope.stage("here"):
            torch.cuda._sleep(200_000)
        main.wait_stream(side)
        with gpuscope.stage("after"):
            torch.cuda._sleep(200_000)

    with capture() as spans:
        replay(captured(work), 5)
        assert_whole()
    for inner in by_request(spans):
        lengths = {span.name: span.duration_ns for span in inner}
        assert set(lengths) == {"beside [gpu]", "here [gpu]", "after [gpu]"}
        assert lengths["after [gpu]"] == pytest.approx(lengths["beside [gpu]"], rel=0.2)
        first, second, after = inner
        assert second.start_ns < first.end_ns  # At the same time.
        assert after.name == "after [gpu]"
        assert after.start_ns >= max(first.end_ns, second.end_ns) - BRANCH_NS


@pytest.mark.parametrize("connections", ["1", "8"])
@pytest.mark.parametrize(("placed", "graphs"), [("1", 2), ("inline", 8)])
def test_graphs_that_run_at_once_keep_their_own_times(run_program, connections, placed, graphs):
    """Stages of graphs on as many streams last as long as alone, also where all streams share one queue to the GPU."""
    variables = {"CUDA_DEVICE_MAX_CONNECTIONS": connections, "GPUSCOPE_GRAPH_STAGES": placed}
    alone, together = run_program(AT_ONCE.replace("GRAPHS", str(graphs)), **variables)
    assert len(together) == graphs * len(alone)
    usual = sorted(alone)[len(alone) // 2]
    wrong = [length for length in together if abs(length - usual) > 0.2 * usual]
    assert len(wrong) <= len(together) // 50, (usual, wrong)


@pytest.mark.parametrize(("placed", "warnings"), [("beside", 1), ("inline", 0)])
def test_graphs_that_run_at_once_are_warned_of(caplog, placed, warnings):
    """Four on as many streams, also when they were done before anybody looked; with `inline` all is well."""
    streams = [torch.cuda.Stream() for _ in range(4)]
    with capture(interval_s=60, graph_stages=placed):
        graphs = [captured(spin(cycles=(5_000_000, 5_000_000))) for _ in streams]
        torch.cuda.synchronize()
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                replay(graph)
        assert_whole()
    assert sum("ran on one GPU at once" in record.getMessage() for record in caplog.records) == warnings


AT_ONCE = """
import json, torch, gpuscope
from gpuscope.testing import capture
def captured():
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            with gpuscope.stage("inside"):
                for _ in range(3):
                    torch.cuda._sleep(100_000)
    return graph
torch.zeros(1, device="cuda")
found = []
for graphs in (1, GRAPHS):
    with capture() as spans:
        made = [(captured(), torch.cuda.Stream()) for _ in range(graphs)]
        torch.cuda.synchronize()
        for _ in range(20):
            for graph, stream in made:
                with torch.cuda.stream(stream), gpuscope.stage("request"):
                    graph.replay()
            torch.cuda.synchronize()
        assert gpuscope.flush(20)
    found.append([span.duration_ns for span in spans if span.attributes.get("gpuscope.graph")])
print(json.dumps(found))
"""


def test_nodes_may_stand_in_line():
    """With `GPUSCOPE_GRAPH_STAGES=inline` each replay has its own times as well, and results are the same."""
    x = torch.zeros(1024, device="cuda")

    def work():
        with gpuscope.stage("add"):
            x.add_(1)
        with gpuscope.stage("double"):
            x.mul_(2)

    with capture(graph_stages="inline") as spans:
        graph = captured(work)
        x.zero_()
        replay(graph, 4)
        assert_whole()
    assert x.unique().tolist() == [30]
    assert [[span.name for span in inner] for inner in by_request(spans)] == [["add [gpu]", "double [gpu]"]] * 4


def test_without_graph_stages_nothing_is_added():
    """`GPUSCOPE_GRAPH_STAGES=0` leaves graphs alone; stages in them stay captured and untimed."""
    with capture(graph_stages=False) as spans:
        graph = captured(spin())
        replay(graph, 3)
        with pytest.raises(RuntimeError):
            graph.raw_cuda_graph()
        assert_whole()
        assert gpuscope.statistics().untimed == {"captured": 2}
    assert by_request(spans) == [[]] * 3


PROGRAM = """
import json, os, torch, gpuscope
torch.zeros(1, device="cuda")  # A stage entered before the program uses CUDA has no GPU span.
def work():
    with gpuscope.stage("inside"):
        torch.cuda._sleep(1_000_000)
work()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    work()
for _ in range(100):
    with gpuscope.stage("request"):
        graph.replay()
child = None
if FORK:
    pid = os.fork()
    if pid == 0:
        with gpuscope.stage("child"):
            pass
        ok = gpuscope.flush(20)
        os._exit(0 if ok else 1)
    child = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
if FLUSH:
    assert gpuscope.flush(20)
s = gpuscope.statistics()
print(json.dumps([child, s.recorded, s.exported, s.dropped, s.lost, s.graph_stages]))
"""


@pytest.mark.parametrize("fork", [False, True])
def test_a_program_ends_while_replays_are_on_their_way(run_program, tmp_path, fork):
    """The exit is clean with replays that nobody has read, also after a fork, whose child touches no graph."""
    variables = {
        "GPUSCOPE": "1",
        "GPUSCOPE_EXPORTER": "file",
        "GPUSCOPE_FILE": str(tmp_path / "spans-{pid}.jsonl"),
    }
    child, *_ = run_program(PROGRAM.replace("FORK", str(fork)).replace("FLUSH", "False"), **variables)
    assert child == (0 if fork else None)
    texts = [path.read_text() for path in tmp_path.glob("spans-*")]
    assert sum(text.count('"name":"inside [gpu]"') for text in texts) == 100 + 1  # And the run before the capture.


def test_the_account_of_a_program_is_exact(run_program, tmp_path):
    """Each inner stage of each replay counts once: 100 requests, 100 inside, and the two runs outside replays."""
    variables = {"GPUSCOPE": "1", "GPUSCOPE_EXPORTER": "file", "GPUSCOPE_FILE": str(tmp_path / "spans.jsonl")}
    program = PROGRAM.replace("FORK", "False").replace("FLUSH", "True")
    _, recorded, exported, dropped, lost, graph_stages = run_program(program, **variables)
    assert (recorded, exported, dropped, lost) == (202, 202, {}, {})
    assert graph_stages == {"timed": 1}


IN_MANY_THREADS = """
import gc, json, threading, time
import torch
import gpuscope

gpuscope.enable(exporters="none")
x = torch.ones(1 << 16, device="cuda")


def make():
    graph, y = torch.cuda.CUDAGraph(), torch.ones(1 << 16, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for name in "abc":
            with gpuscope.stage(name):
                y.add_(1)
    return graph


shared, stop, replays = make(), time.perf_counter() + 4, [0] * 4


def replay(number):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        while time.perf_counter() < stop:
            with gpuscope.stage("request"):
                shared.replay()
            replays[number] += 1
            if replays[number] % 50 == 0:
                stream.synchronize()


def toggle():
    pause = threading.Event()
    while time.perf_counter() < stop:
        pause.wait(0.05)
        gpuscope.disable()
        pause.wait(0.01)
        gpuscope.enable()


threads = [threading.Thread(target=replay, args=(number,)) for number in range(4)]
threads.append(threading.Thread(target=toggle))
for thread in threads:
    thread.start()
while time.perf_counter() < stop:
    graph = make()
    for _ in range(5):
        with gpuscope.stage("own"):
            graph.replay()
    graph.reset()
    del graph
    gc.collect()
for thread in threads:
    thread.join()
torch.cuda.synchronize()
flushed, s = gpuscope.flush(10), gpuscope.statistics()
balanced = s.recorded == s.exported + sum(s.dropped.values()) + sum(s.lost.values()) + s.pending
print(json.dumps({"replays": min(replays), "flushed": flushed, "balanced": balanced, "pending": s.pending}))
"""


def test_one_graph_in_many_threads_while_recording_is_switched(run_program):
    """Replays of one graph beside captures and the switch: the program ends in time, and the account is balanced."""
    result = run_program(IN_MANY_THREADS, timeout_s=60)
    assert result.pop("replays") > 0
    assert result == {"flushed": True, "balanced": True, "pending": 0}
