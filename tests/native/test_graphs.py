"""Stages inside captured CUDA graphs, on a driver that is made of C and a class that behaves as PyTorch's does."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import signal
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

import gpuscope
from gpuscope import _runtime, stage
from gpuscope._cuda.graphs import launch
from gpuscope._cuda.graphs.hooks import GraphHooks
from gpuscope._recording.state import site_of
from gpuscope._settings.config import Config
from gpuscope.exporters.memory import MemoryExporter

KERNEL_US = 50
"""A kernel of the driver's graphs takes so long."""


@pytest.fixture
def new_graph(machine):
    """Return a function that captures a graph with stages of these names one after another, a kernel in each."""

    def new(*names, keep_graph=False, **options):
        graph = sys.modules["torch.cuda.graphs"].CUDAGraph(keep_graph)
        graph.capture_begin()
        for name in names:
            with stage(name, **options):
                machine.library.fake_kernel()
        graph.capture_end()
        return graph

    return new


def microseconds(span):
    """Return how long a span is."""
    return round(span.duration_ns / 1000)


def kernels_in(span):
    """Return how many kernels a span is long."""
    return round(span.duration_ns / 1000 / KERNEL_US, 2)


def replay(graph, around="request"):
    """Launch the graph in a stage."""
    with stage(around):
        graph.replay()


def inner(spans):
    """Return the spans of stages inside graphs, by name, in order of their starts."""
    found = {}
    for span in spans:
        if span.attributes.get("gpuscope.graph"):
            found.setdefault(span.name, []).append(span)
    return found


def account(machine):
    """Return what became of every stage."""
    s = machine.engine.statistics()
    assert s.recorded == s.exported + sum(s.dropped.values()) + sum(s.lost.values()) + s.pending
    return s


def test_every_replay_yields_its_own_spans(machine, new_graph):
    """Each replay has a GPU span for each stage inside, child of the stage around the replay, and no host span."""
    graph = new_graph("attention", "mlp")
    for _ in range(3):
        replay(graph)
    spans = machine.collect()
    requests = {span.span_id: span for span in spans if span.name == "request"}
    found = inner(spans)
    assert set(found) == {"attention [gpu]", "mlp [gpu]"}
    for name in found:
        assert [span.kind for span in found[name]] == ["gpu"] * 3
        assert {span.parent_id for span in found[name]} == set(requests)
        assert [microseconds(span) for span in found[name]] == [KERNEL_US] * 3
    for attention, mlp in zip(found["attention [gpu]"], found["mlp [gpu]"], strict=True):
        assert attention.parent_id == mlp.parent_id
        assert attention.trace_id == requests[attention.parent_id].trace_id
        assert attention.end_ns == mlp.start_ns
        assert requests[attention.parent_id].start_ns <= attention.start_ns
    ids = [span.span_id for span in spans]
    assert len(ids) == len(set(ids))
    assert account(machine).recorded == 2 + 3 + 3 * 2  # The capture's own runs, the requests, and those inside.
    assert machine.engine.statistics().graph_stages == {"timed": 2}


def test_the_run_that_captured_is_marked_as_such(machine, new_graph):
    """The stage of the capture itself is exported as before, without GPU times."""
    new_graph("attention")
    (host,) = machine.collect()
    assert (host.name, host.attributes["gpuscope.captured"]) == ("attention", True)


def test_replays_that_overtake_the_collector_keep_their_own_times(machine, new_graph):
    """Launches that follow each other unread are told apart: none has the start of one and the end of another."""
    graph = new_graph("attention")
    replay(graph)
    machine.collect()
    machine.library.fake_hold()
    for _ in range(5):
        replay(graph)
    machine.library.fake_work(1 + 2)  # The request's event, and the first stage's start and kernel.
    assert len(inner(machine.collect())["attention [gpu]"]) == 1
    machine.library.fake_work(1000)
    found = inner(machine.collect())["attention [gpu]"]
    assert [microseconds(span) for span in found] == [KERNEL_US] * 6
    assert all(first.end_ns <= second.start_ns for first, second in pairwise(found))
    assert account(machine).dropped == {}


def test_a_slice_takes_as_many_replays_as_it_may(machine, new_graph):
    """The others stay for the next, and none is lost."""
    graph, intake = new_graph("attention", "mlp"), machine.engine.collector._intake
    replay(graph)
    machine.collect()
    for _ in range(5):
        replay(graph)
    taken = []
    while intake._replays.pending:
        found = intake._replays.collect(4, intake._resolver.clock_of, may_ask=True, give_up=False)
        taken.append(sum(len(placed.replays) for placed in found))
    assert taken == [2, 2, 1]
    assert account(machine).lost == {}


def test_nothing_is_read_before_the_fence(machine, new_graph):
    """A node's event tells of an older record until it is recorded; the replay's spans wait for the event after it."""
    graph = new_graph("attention")
    for _ in range(2):
        replay(graph)
        machine.collect()
    machine.library.fake_hold()
    replay(graph)
    machine.library.fake_work(3)
    assert len(inner(machine.collect())["attention [gpu]"]) == 2
    assert account(machine).pending > 0
    machine.library.fake_work(1000)
    assert len(inner(machine.collect())["attention [gpu]"]) == 3
    assert account(machine).pending == 0


def test_nested_stages_are_children_of_each_other(machine):
    """A stage inside another one of the same graph is the child of that one's GPU span."""
    graph = sys.modules["torch.cuda.graphs"].CUDAGraph()
    graph.capture_begin()
    work = machine.library.fake_kernel
    with stage("block"):
        work()
        with stage("attention"):
            with stage("softmax"):
                work()
            work()
        with stage("mlp"):
            work()
        work()
    graph.capture_end()
    replay(graph)
    spans = {span.name: span for span in machine.collect() if span.kind == "gpu"}
    assert spans["softmax [gpu]"].parent_id == spans["attention [gpu]"].span_id
    assert spans["attention [gpu]"].parent_id == spans["mlp [gpu]"].parent_id == spans["block [gpu]"].span_id
    hosts = {span.name: span for span in machine.collect() if span.kind == "host" and span.name == "request"}
    assert spans["block [gpu]"].parent_id == hosts["request"].span_id
    names = ("block", "attention", "softmax", "mlp")
    assert [kernels_in(spans[f"{name} [gpu]"]) for name in names] == [5, 2, 1, 1]
    assert spans["block [gpu]"].start_ns < spans["softmax [gpu]"].start_ns
    assert spans["mlp [gpu]"].end_ns < spans["block [gpu]"].end_ns


def waits(machine, graph):
    """Return how many edges of a graph there are, by what waits and for what."""
    return {
        (node, other): machine.library.fake_waits(graph.template, records, for_records)
        for records, node in enumerate(("kernel", "record"))
        for for_records, other in enumerate(("kernel", "record"))
    }


def test_nothing_of_the_program_waits_for_a_stage(machine, new_graph):
    """Kernels follow kernels; records wait for them, and for the record before."""
    assert waits(machine, new_graph("first", "second", "third", keep_graph=True)) == {
        ("kernel", "kernel"): 2,
        ("kernel", "record"): 0,
        ("record", "kernel"): 3,
        ("record", "record"): 3,
    }


def test_nodes_may_stand_in_line(machine, new_graph, monkeypatch):
    """With `inline` all nodes follow each other; stages that meet share one, and have the times that they have."""
    monkeypatch.setattr(machine.engine.recorder.captures, "inline", True)
    graph = new_graph("first", "second", "third", keep_graph=True)
    assert waits(machine, graph) == {
        ("kernel", "kernel"): 0,
        ("kernel", "record"): 3,
        ("record", "kernel"): 3,
        ("record", "record"): 0,
    }
    replay(graph)
    assert [kernels_in(span) for spans in inner(machine.collect()).values() for span in spans] == [1, 1, 1]


def test_graphs_at_once_are_warned_of(machine, new_graph, caplog, monkeypatch):
    """Said once, where more of them than may ran at once; those of this driver run one after another."""
    graph = new_graph("attention")

    def said_of_two_streams():
        for stream in (0x70, 0x80):
            machine.streams[0] = stream
            replay(graph)
        machine.collect()
        return [record.getMessage() for record in caplog.records if "at once" in record.getMessage()]

    assert said_of_two_streams() == []
    monkeypatch.setattr("gpuscope._cuda.graphs.resolve._CROWD", 0)
    (said,) = said_of_two_streams()
    assert said.startswith("1 CUDA graphs with stages inside ran on one GPU at once.")
    assert "`GPUSCOPE_GRAPH_STAGES=inline`" in said
    assert said_of_two_streams() == [said]


def test_stages_that_meet_share_a_node(machine, new_graph):
    """Three stages in a row take four nodes, and stages around each other no more than one; an empty one takes none."""
    graph = sys.modules["torch.cuda.graphs"].CUDAGraph()
    graph.capture_begin()
    with stage("around"), stage("within"):
        for name in ("first", "second", "third"):
            with stage(name):
                machine.library.fake_kernel()
        with stage("empty"):
            pass
    graph.capture_end()
    before = machine.library.fake_exchanges()
    replay(graph)
    assert machine.library.fake_exchanges() - before == 4
    kernels = {name: kernels_in(span) for name, (span,) in inner(machine.collect()).items()}
    expected = {"around": 3, "within": 3, "first": 1, "second": 1, "third": 1, "empty": 0}
    assert kernels == {f"{name} [gpu]": count for name, count in expected.items()}


def test_a_replay_in_no_stage_is_one(machine, new_graph):
    """Where nothing encloses the replay it is a stage itself, so that those inside have a parent."""
    new_graph("attention").replay()
    spans = machine.collect()
    (around,) = [span for span in spans if span.name == "graph replay"]
    (attention,) = inner(spans)["attention [gpu]"]
    assert (attention.parent_id, attention.trace_id) == (around.span_id, around.trace_id)


def test_a_replay_may_be_the_first_of_a_recording(machine, new_graph):
    """A graph of an earlier recording is replayed in no stage; where nothing has begun, the driver is found then."""
    graph = new_graph("attention")
    spans = []
    config = Config().changed(mode="on", exporters="none", warmup=0, queue_size=16)
    with _runtime.period(config, exporters=(MemoryExporter(spans),), clock=time.perf_counter_ns) as engine:
        engine.recorder.accept(engine.queue)
        graph.replay()
        while engine.collector.step():
            pass
    assert [span.name for span in spans] == ["graph replay", "graph replay [gpu]", "attention [gpu]"]


def test_a_replay_whose_stream_is_unknown_is_counted(machine, new_graph, monkeypatch):
    """The graph is launched, and its stages are counted, for they were not timed."""
    graph = new_graph("attention")

    def fails(index):
        raise RuntimeError("no stream")

    monkeypatch.setattr(machine.engine.recorder.device.open_streams, "current_stream", fails)
    graph.replay()
    assert inner(machine.collect()) == {}
    assert account(machine).dropped == {"overwritten": 1}


def test_several_graphs_on_several_streams(machine, new_graph):
    """Graphs share nothing, and the same graph may be replayed on any stream."""
    graphs = {name: new_graph(name) for name in ("encoder", "decoder")}
    for stream in (0x70, 0x80, 0x90):
        machine.streams[0] = stream
        for graph in graphs.values():
            replay(graph)
    found = inner(machine.collect())
    for name in graphs:
        assert [span.attributes["gpuscope.cuda.stream"] for span in found[f"{name} [gpu]"]] == [0x70, 0x80, 0x90]


def test_a_replay_on_a_stream_that_is_gone_before_it_is_read(machine, new_graph):
    """It has its times: nothing is asked about the stream of another library, only the events."""
    graph = new_graph("attention")
    stream = machine.new_external()
    machine.streams[0] = stream.cuda_stream
    replay(graph)
    machine.streams[0] = 0x70
    machine.library.fake_destroy_stream(stream.cuda_stream, 0)
    assert len(inner(machine.collect())["attention [gpu]"]) == 1


def test_a_replay_that_another_library_captures_is_none(machine, new_graph):
    """On a stream that may be gone it is asked at the replay whether that is captured, by whomever."""
    graph = new_graph("attention")
    stream = machine.new_external()
    machine.streams[0] = stream.cuda_stream
    machine.library.fake_capture(ctypes.c_void_p(stream.cuda_stream))
    replay(graph)
    assert inner(machine.collect()) == {}
    assert account(machine).pending == 0


def test_a_replay_on_a_gpu_whose_clock_can_not_be_read(machine, new_graph, monkeypatch):
    """Its stages have their durations and begin at the launch, and say so."""
    monkeypatch.setattr(machine.engine.recorder.device, "calibrate", lambda *_: None)
    graph = new_graph("attention", "mlp")
    replay(graph)
    while not inner(machine.collect()):
        pass
    found = inner(machine.spans)
    for name in ("attention [gpu]", "mlp [gpu]"):
        (span,) = found[name]
        assert microseconds(span) == KERNEL_US
        assert span.attributes["gpuscope.unplaced"]
    assert found["attention [gpu]"][0].end_ns == found["mlp [gpu]"][0].start_ns
    assert account(machine).dropped == {}


def test_a_graph_captured_on_one_thread_is_replayed_on_others(machine, new_graph):
    """Eight threads that replay one graph at once yield as many spans as replays, each in its own request."""
    graph = new_graph("attention")
    threads = [threading.Thread(target=lambda: [replay(graph) for _ in range(20)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = inner(machine.collect())["attention [gpu]"]
    statistics = account(machine)
    overwritten = statistics.dropped.get("overwritten", 0)
    # The queue of this machine is short, so its records are refused; the events of replays are enough for some.
    assert len(found) + overwritten == 160
    assert len({span.parent_id for span in found}) == len(found)
    assert all(microseconds(span) == KERNEL_US for span in found)


def run_at_once(*works):
    """Run functions in threads of their own until all have ended, and raise what one of them raised."""
    with ThreadPoolExecutor(len(works)) as executor:
        for done in [executor.submit(work) for work in works]:
            done.result()


def test_a_launch_and_an_exchange_of_one_graph_never_meet(machine, new_graph, monkeypatch):
    """Recorded and unrecorded replays of one graph in many threads: the driver has one thread at a time in it."""
    graph, recorder = new_graph("attention"), machine.engine.recorder
    answers = itertools.cycle([recorder, None, None])  # As if recording were switched on and off all the time.
    monkeypatch.setattr(_runtime.state.graphs, "_get_recorder", lambda: next(answers))
    run_at_once(*[lambda: [replay(graph) for _ in range(100)]] * 4)
    assert machine.library.fake_overlaps() == 0
    machine.collect()
    assert account(machine).pending == 0


@pytest.mark.parametrize("anew", [True, False])
def test_a_replay_that_waited_finds_what_the_graph_is_now(machine, new_graph, monkeypatch, anew):
    """Another thread resets the graph before a replay has its lock: that is one of what was captured, or an error."""
    graph, original = new_graph("attention"), launch.Launcher._stream_of

    def reset_meanwhile(self, recorder, watched):
        monkeypatch.undo()
        timed_stream = original(self, recorder, watched)
        graph.reset()
        if anew:
            capture_again(machine, graph, "mlp")
        return timed_stream

    monkeypatch.setattr(launch.Launcher, "_stream_of", reset_meanwhile)
    with contextlib.nullcontext() if anew else pytest.raises(RuntimeError, match="capture"):
        replay(graph)
    assert set(inner(machine.collect())) == ({"mlp [gpu]"} if anew else set())


def test_a_replay_that_waited_while_the_graph_went_to_another_gpu(machine, new_graph, monkeypatch):
    """It is launched where it is captured now, and counted, because its events would be those of the first GPU."""
    graph, original = new_graph("attention"), launch.Launcher._stream_of

    def captured_elsewhere_meanwhile(self, recorder, watched):
        monkeypatch.undo()
        timed_stream = original(self, recorder, watched)
        graph.reset()
        machine.device = 1
        capture_again(machine, graph, "mlp")
        machine.device = 0
        return timed_stream

    monkeypatch.setattr(launch.Launcher, "_stream_of", captured_elsewhere_meanwhile)
    replay(graph)
    assert machine.launches == 1
    assert inner(machine.collect()) == {}
    assert account(machine).dropped == {"overwritten": 1}


def test_launches_and_the_end_of_a_graph_never_meet(machine, new_graph):
    """A graph that is reset and captured anew beside replays in other threads: the driver has one of them in it."""
    graph, overlaps = new_graph("attention"), machine.library.fake_overlaps()

    def launch_often():
        for _ in range(100):
            with contextlib.suppress(RuntimeError):
                replay(graph)

    def make_anew():
        for _ in range(20):
            graph.reset()
            capture_again(machine, graph, "attention")

    run_at_once(launch_often, make_anew)
    assert machine.library.fake_overlaps() == overlaps


def capture_again(machine, graph, name):
    """Capture a stage with a kernel in it into a graph that was reset."""
    graph.capture_begin()
    with stage(name):
        machine.library.fake_kernel()
    graph.capture_end()


def test_a_graph_that_is_captured_over_and_over_keeps_no_old_stages(machine, new_graph):
    """The stages of each capture go with it, though the object of the graph stays."""
    graph = new_graph("attention")
    old = weakref.ref(graph._gpuscope.stages)
    for _ in range(3):
        graph.reset()
        capture_again(machine, graph, "mlp")
    assert old() is None
    replay(graph)
    assert set(inner(machine.collect())) == {"mlp [gpu]"}


@pytest.mark.parametrize("what", ["launch", "exchange", "fence"])
def test_an_interrupted_replay_lets_go_of_the_graph(machine, new_graph, monkeypatch, what):
    """After an interrupt another thread can replay, no event is missing, and the stages are counted."""
    graph = new_graph("attention")
    replay(graph)
    stages = graph._gpuscope.stages
    if what == "launch":
        graph.error = KeyboardInterrupt()
    elif what == "exchange":
        monkeypatch.setattr(type(stages), "exchange", interrupt)
    else:
        monkeypatch.setattr(launch, "_record_fence", interrupt)
    with pytest.raises(KeyboardInterrupt):
        replay(graph)
    monkeypatch.undo() if what != "launch" else setattr(graph, "error", None)
    assert len(stages._free) == 1
    run_at_once(lambda: replay(graph))
    assert len(inner(machine.collect())["attention [gpu]"]) == 2


@pytest.fixture
def deadline():
    """Return a function that stands for any in which a signal comes whose handler raises `TimeoutError`."""

    def handler(_signal, _frame):
        raise TimeoutError("the program's own")

    before = signal.signal(signal.SIGUSR1, handler)
    yield lambda *_: signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("what", ["stream", "events", "exchange", "fence"])
def test_what_a_signal_handler_raises_in_a_replay_reaches_the_program(machine, new_graph, monkeypatch, deadline, what):
    """It is not taken for a failure of ours: the next replay is timed."""
    graph = new_graph("attention")
    stages, device = graph._gpuscope.stages, machine.engine.recorder.captures.device
    owner, name = {
        "stream": (type(device), "stream_of"),
        "events": (type(stages), "take"),
        "exchange": (type(stages), "exchange"),
        "fence": (launch, "_record_fence"),
    }[what]
    with monkeypatch.context() as patches:
        patches.setattr(owner, name, deadline)
        with pytest.raises(TimeoutError):
            replay(graph)
    replay(graph)
    assert len(inner(machine.collect())["attention [gpu]"]) == 1
    account(machine)


@pytest.mark.parametrize("what", ["_begin_capture", "_end_capture"])
def test_what_a_signal_handler_raises_in_a_capture_reaches_the_program(machine, new_graph, monkeypatch, deadline, what):
    """It is not taken for a failure of ours."""
    with monkeypatch.context() as patches:
        patches.setattr(GraphHooks, what, deadline)
        with pytest.raises(TimeoutError):
            new_graph("attention")
    machine.library.fake_capture(None)


@pytest.mark.parametrize("what", ["open", "close"])
def test_a_finalizer_may_end_a_capture_within_ours(machine, what):
    """Whatever is opened or closed within, the hot path afterwards asks for captures if one is open."""
    captures = machine.engine.recorder.captures
    swap, device = captures.device.swap, captures.device

    def swap_and_collect(*functions):
        device.swap = swap
        swap(*functions)
        captures.open(2, "inside") if what == "close" else captures.close(1)

    captures.open(1, "outside") if what == "close" else None
    device.swap = swap_and_collect
    captures.close(1) if what == "close" else captures.open(1, "outside")
    assert device._stands_in is (what == "close")
    captures.close(2)
    assert not device._stands_in


def interrupt(*_):
    """Stand for anything in which the user's interrupt arrives."""
    raise KeyboardInterrupt


def test_a_replay_without_events_left_is_counted(machine, new_graph):
    """When all events wait to be read, replays go on, have no inner spans, and are counted as overwritten."""
    graph = new_graph("attention")
    machine.library.fake_hold()
    for _ in range(30):
        graph.replay()
    machine.library.fake_work(10_000)
    read = len(inner(machine.collect())["attention [gpu]"])
    assert read == 4 * 16 // 3  # Four events for each place in the queue, and three a replay.
    assert account(machine).dropped["overwritten"] == 30 - read
    replay(graph)
    assert len(inner(machine.collect())["attention [gpu]"]) == read + 1


def test_recording_may_be_toggled_between_replays(machine, new_graph):
    """Replays while recording is off are launched, yield nothing, and disturb neither those before nor those after."""
    graph = new_graph("attention")
    machine.library.fake_hold()
    replay(graph)
    gpuscope.disable()
    graph.replay()
    exchanges = machine.library.fake_exchanges()
    graph.replay()
    assert machine.library.fake_exchanges() == exchanges  # Nothing is exchanged twice.
    machine.library.fake_work(1000)
    _runtime.state.recorder = machine.engine.recorder
    replay(graph)
    found = inner(machine.collect())["attention [gpu]"]
    assert [microseconds(span) for span in found] == [KERNEL_US] * 2
    assert account(machine).recorded == 1 + 2 + 2
    assert machine.launches == 4


def test_events_of_a_graph_that_is_gone_are_used_again(machine, new_graph):
    """However many graphs come and go, there are no more events than they needed at once; what they ran is read."""
    for _ in range(20):
        graph = new_graph("attention")
        replay(graph)
        del graph
        gc.collect()
        machine.collect()
    (pool,) = _runtime.state.graphs._pools.values()
    assert len(pool._spare) == 3
    assert len(pool._unread) == 2
    assert len(inner(machine.collect())["attention [gpu]"]) == 20


def test_a_graph_destroyed_before_it_was_read_is_read(machine, new_graph):
    """The events outlive the graph."""
    graph = new_graph("attention")
    machine.library.fake_hold()
    replay(graph)
    graph.reset()
    del graph
    gc.collect()
    machine.library.fake_work(1000)
    assert len(inner(machine.collect())["attention [gpu]"]) == 1
    (pool,) = _runtime.state.graphs._pools.values()
    assert len(pool._spare) == 3


def test_events_that_can_not_be_made_cost_their_replays_alone(machine, new_graph):
    """However often the driver fails to make events for a replay, the next one is timed once it can again."""
    graph = new_graph("attention")
    (pool,) = _runtime.state.graphs._pools.values()
    left = pool._left
    machine.library.fake_make_events(0)
    for _ in range(3):
        replay(graph)
    assert pool._left == left
    machine.library.fake_make_events(-1)
    replay(graph)
    assert len(inner(machine.collect())["attention [gpu]"]) == 1
    assert account(machine).dropped == {"overwritten": 3}


def test_a_forked_child_waits_for_no_lock_of_its_parent(machine, new_graph):
    """A graph that a thread of the parent was launching is replayed in the child as without us."""
    graph = new_graph("attention")
    held, done = threading.Event(), threading.Event()

    def hold():
        with graph._gpuscope.lock:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    _runtime.state.graphs._forget()  # What happens in a forked child.
    replay(graph)
    graph.reset()
    done.set()
    thread.join()
    assert inner(machine.collect()) == {}


def test_a_stage_may_opt_out(machine, new_graph):
    """A stage with `graph=False` adds no node, as block and as decorator, and says why it is not timed."""

    @stage("decorated", graph=False)
    def decorated():
        pass

    graph = sys.modules["torch.cuda.graphs"].CUDAGraph()
    graph.capture_begin()
    with stage("kept"), stage("left out", graph=False):
        decorated()
    graph.capture_end()
    replay(graph)
    assert set(inner(machine.collect())) == {"kept [gpu]"}
    assert machine.engine.statistics().graph_stages == {"timed": 1, "opted_out": 2}


def test_a_graph_made_before_recording_is_left_alone(machine):
    """PyTorch has not kept such a graph, so that its nodes have no names; stages in it say so."""
    gpuscope.disable()
    graph = sys.modules["torch.cuda.graphs"].CUDAGraph()
    _runtime.state.recorder = machine.engine.recorder
    graph.capture_begin()
    with stage("attention"):
        pass
    graph.capture_end()
    replay(graph)
    assert inner(machine.collect()) == {}
    assert machine.engine.statistics().graph_stages == {"made_before_recording": 1}
    assert machine.untimed == {"captured": 1}


def test_a_graph_that_the_program_keeps_is_instantiated_when_the_program_says(machine, new_graph):
    """With `keep_graph=True` it is not instantiated before its first replay, and may be again; replays are timed."""
    graph = new_graph("attention", keep_graph=True)
    assert graph.executable is None
    replay(graph)
    graph.instantiate()
    replay(graph)
    assert len(inner(machine.collect())["attention [gpu]"]) == 2


def test_a_graph_that_nobody_keeps_is_instantiated_when_its_capture_ends(machine, new_graph):
    """As it would be without us, stages inside or none."""
    assert new_graph("attention").executable is not None
    assert new_graph().executable is not None


def test_a_stage_across_the_end_of_a_capture_is_left_out(machine, new_graph):
    """A stage that is left after the capture has no second node; those in it are timed all the same."""
    graph = sys.modules["torch.cuda.graphs"].CUDAGraph()
    graph.capture_begin()
    crossing = stage("crossing")
    with crossing:
        with stage("inside"):
            pass
        graph.capture_end()
    replay(graph)
    assert set(inner(machine.collect())) == {"inside [gpu]"}
    assert machine.engine.statistics().graph_stages == {"timed": 1, "left_after_capture": 1}


def test_a_driver_that_refuses_the_exchange_costs_the_inner_spans_alone(machine, new_graph):
    """The graph is replayed, and its stages are counted, since nobody knows which events are whose."""
    graph = new_graph("attention")
    machine.library.fake_refuse_exchanges(999)
    replay(graph)
    machine.library.fake_refuse_exchanges(0)
    replay(graph)
    assert inner(machine.collect()) == {}
    assert account(machine).dropped == {"overwritten": 2}


@pytest.mark.parametrize(
    "call", ["cuStreamGetCaptureInfo_v2", "cuStreamUpdateCaptureDependencies", "cuEventRecordWithFlags"]
)
@pytest.mark.parametrize("refused", ["entry", "exit"])
def test_a_driver_that_refuses_a_node_leaves_the_graph_as_it_is(machine, call, refused):
    """The stage is counted once and not timed; those beside it are, and nothing of the program waits for a record."""
    library = machine.library
    graph = sys.modules["torch.cuda.graphs"].CUDAGraph(keep_graph=True)
    graph.capture_begin()
    with stage("before"):
        library.fake_kernel()
    library.fake_kernel()
    library.fake_refuse(call.encode() if refused == "entry" else None)
    with stage("refused"):
        library.fake_refuse(None)
        library.fake_kernel()
        library.fake_refuse(call.encode() if refused == "exit" else None)
    library.fake_refuse(None)
    library.fake_kernel()
    with stage("after"):
        library.fake_kernel()
    graph.capture_end()
    replay(graph)
    assert machine.engine.statistics().graph_stages == {"timed": 2, "driver_refused": 1}
    assert {name: kernels_in(span) for name, (span,) in inner(machine.collect()).items()} == {
        "before [gpu]": 1,
        "after [gpu]": 1,
    }
    assert waits(machine, graph)["kernel", "record"] == 0


def test_a_driver_without_what_it_takes_is_told_of(machine, new_graph, monkeypatch):
    """Stages in a capture are recorded as ever, untimed, and the reason is in the account."""
    with stage("first"):
        pass
    monkeypatch.setattr(machine.engine.recorder.device.driver, "can_time_graphs", False)
    graph = new_graph("attention")
    replay(graph)
    assert inner(machine.collect()) == {}
    assert machine.engine.statistics().graph_stages == {"driver_too_old": 1}
    assert machine.untimed == {"captured": 1}


def test_a_pytorch_without_what_it_takes_is_told_of(machine, new_graph, monkeypatch):
    """Before 2.8 its graphs do not show what the driver calls them."""
    kind = sys.modules["torch.cuda.graphs"].CUDAGraph
    _runtime.state.graphs.remove()
    monkeypatch.delattr(kind, "raw_cuda_graph_exec")
    monkeypatch.setattr(_runtime.state, "graphs", GraphHooks(lambda: _runtime.state.recorder))
    _runtime.state.graphs.install(16)
    graph = new_graph("attention")
    replay(graph)
    assert inner(machine.collect()) == {}
    assert machine.engine.statistics().graph_stages == {"pytorch_too_old": 1}
    assert machine.untimed == {"captured": 1}


def test_a_capture_that_fails_leaves_nothing_behind(machine):
    """The exception of `capture_end` passes, and stages afterwards are timed as ever."""
    kind = sys.modules["torch.cuda.graphs"].CUDAGraph
    graph = kind()
    graph.capture_begin()
    with stage("attention"):
        pass
    graph.error = RuntimeError("invalidated")
    with pytest.raises(RuntimeError, match="invalidated"):
        graph.capture_end()
    with stage("after"):
        pass
    spans = machine.collect()
    assert [span.name for span in spans if span.kind == "gpu"] == ["after [gpu]"]


def test_the_stages_of_a_launch_that_fails_are_counted(machine, new_graph):
    """The exception is the program's; the next launch is timed again."""
    graph = new_graph("attention")
    graph.error = RuntimeError("no memory")
    with pytest.raises(RuntimeError, match="no memory"):
        replay(graph)
    graph.error = None
    replay(graph)
    assert len(inner(machine.collect())["attention [gpu]"]) == 1
    assert account(machine).dropped == {"replay_failed": 1}


def test_inner_stages_belong_to_the_applications_trace(machine, new_graph):
    """With OpenTelemetry in use a replay's stages have the trace and the parent that its stage has there."""
    machine.engine.recorder.open_bridge()
    graph = new_graph("attention")
    replay(graph)
    spans = machine.collect()
    (request,) = [span for span in spans if span.name == "request"]
    (attention,) = inner(spans)["attention [gpu]"]
    assert (attention.trace_id, attention.parent_id) == (request.trace_id, request.span_id)


def test_a_replay_that_is_captured_is_none(machine, new_graph):
    """A graph that is launched into a capture becomes part of another graph: nothing is recorded and nothing asked."""
    inside = new_graph("attention")
    outside = sys.modules["torch.cuda.graphs"].CUDAGraph()
    outside.capture_begin()
    records = machine.library.fake_records()
    inside.replay()
    assert machine.library.fake_records() == records
    outside.capture_end()
    assert inner(machine.collect()) == {}


def test_events_of_an_unread_replay_are_not_lost_with_the_recording(machine, new_graph):
    """Another period of recording finds all events again."""
    graph = new_graph("attention")
    replay(graph)
    machine.engine.ledger.close("shutdown", machine.engine.queue, machine.engine.replays)
    assert account(machine).lost == {"shutdown": 3}
    del graph
    gc.collect()
    (pool,) = _runtime.state.graphs._pools.values()
    replay(new_graph("attention"))
    assert pool._left == 4 * 16 - 3


def test_events_of_a_launch_that_is_not_over_are_nobody_elses(machine, new_graph):
    """Those of a replay that was given up, of a graph that is gone, are used again once the launch is over."""
    graph, other = new_graph("attention"), new_graph("mlp")
    machine.library.fake_hold()
    replay(graph)
    while machine.engine.collector.step(give_up=True):
        pass
    (pool,) = _runtime.state.graphs._pools.values()
    (used,) = graph._gpuscope.stages._free
    graph.reset()
    replay(other)
    assert not addresses_of(other._gpuscope.stages._current) & addresses_of(used)
    assert pool._left == 4 * 16 - 6
    machine.library.fake_work(1_000_000)
    while pool.driver.event_query(used.fence):
        pass
    third = new_graph("third")
    replay(third)
    assert addresses_of(third._gpuscope.stages._current) == addresses_of(used)
    assert pool._left == 4 * 16 - 6


def addresses_of(events):
    """The addresses of a set of events."""
    return {event.value for event in events.events}


def test_events_of_a_launch_whose_end_nobody_can_tell_become_scratch(machine, new_graph, monkeypatch):
    """A launch without a fence may record for as long as it likes: its events are not read again."""
    graph = new_graph("attention")
    (pool,) = _runtime.state.graphs._pools.values()
    monkeypatch.setattr(launch, "_record_fence", interrupt)
    with pytest.raises(KeyboardInterrupt):
        replay(graph)
    monkeypatch.undo()
    (used,) = graph._gpuscope.stages._free
    graph.reset()
    assert addresses_of(used) <= {event.value for event in pool._unread}
    assert pool._left == 4 * 16


def test_a_graph_that_is_instantiated_anew_takes_no_events_of_launches_before(machine, new_graph):
    """Launches of the executable graph before and after are not in turn with each other."""
    graph = new_graph("attention", keep_graph=True)
    graph.instantiate()
    machine.library.fake_hold()
    replay(graph)
    while machine.engine.collector.step(give_up=True):
        pass
    (used,) = graph._gpuscope.stages._free
    graph.instantiate()
    replay(graph)
    assert not addresses_of(graph._gpuscope.stages._current) & addresses_of(used)


def test_a_graph_whose_exchange_failed_leaves_its_events_to_nobody(machine, new_graph):
    """Any launch of it may have recorded into any of them."""
    graph = new_graph("attention")
    replay(graph)
    machine.collect()
    (used,) = graph._gpuscope.stages._free
    graph._gpuscope.stages.is_broken = True
    graph.reset()
    (pool,) = _runtime.state.graphs._pools.values()
    assert not addresses_of(used) & {event.value for event in pool._spare}


def test_a_shutdown_gives_up_what_the_gpu_has_not_done(machine, new_graph):
    """At the end stages of replays that were never read are lost, and said to be."""
    graph = new_graph("attention", "mlp")
    replay(graph)
    machine.collect()
    machine.library.fake_hold()
    replay(graph)
    while machine.engine.collector.step(give_up=True):
        pass
    assert account(machine).lost == {"given_up": 2}


def test_the_class_has_its_own_methods_again(machine, new_graph):
    """`remove` puts back what was there."""
    kind = sys.modules["torch.cuda.graphs"].CUDAGraph
    assert hasattr(kind.replay, "__wrapped__")
    _runtime.state.graphs.remove()
    assert not hasattr(kind.replay, "__wrapped__")
    graph = new_graph("attention")
    replay(graph)
    assert inner(machine.collect()) == {}


def test_replays_are_counted_by_stage(machine, new_graph):
    """Of a graph with stages inside and of one without; outside of any stage they are nobody's."""
    timed, plain = new_graph("attention"), new_graph()
    timed.replay()
    site = site_of("with graphs")
    before = site.replays
    for _ in range(3):
        replay(timed, "with graphs")
        replay(plain, "with graphs")
    assert site.replays - before == 6
