"""Recording and collecting leave the application's CUDA graph captures alone."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch

import gpuscope
from gpuscope.testing import capture

CAPTURES = 100


class SideThread:
    """A thread that runs stages with a kernel each on a stream of its own, until it is told to end."""

    def __init__(self):
        self.ran = 0
        self.ready, self._stop = threading.Event(), threading.Event()
        self._buffer = torch.zeros(1024, device="cuda")
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        """Run a stage every fifth of a millisecond."""
        with torch.cuda.stream(torch.cuda.Stream()):
            while not self._stop.wait(0.0002):
                with gpuscope.stage("side"):
                    self._buffer.add_(1)
                self.ran += 1
                if self.ran == 10:
                    self.ready.set()

    def __enter__(self):
        self._thread.start()
        assert self.ready.wait(30)
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join(30)


@pytest.fixture
def tensors():
    """An input and an output of a graph, and an operation on them that has run before."""
    x, y = torch.zeros(1024, device="cuda"), torch.zeros(1024, device="cuda")
    torch.mul(x, 2, out=y)
    y.add_(1)
    torch.cuda.synchronize()
    return x, y


def assert_replays(graph, tensors, value):
    """The graph computes 2x + 1."""
    x, y = tensors
    x.fill_(value)
    graph.replay()
    assert y.unique().tolist() == [2 * value + 1]


def test_a_hundred_captures_of_a_hundred_succeed(tensors, gpu_of):
    """
    Global-mode captures with stages inside succeed while another thread runs stages and the collector polls.

    The stages inside are marked as captured, and those of the other thread are timed.
    """
    x, y = tensors
    with capture(interval_s=0.001) as spans, SideThread() as side:
        for number in range(CAPTURES):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph), gpuscope.stage("inside"):
                torch.mul(x, 2, out=y)
                with gpuscope.stage("nested inside"):
                    y.add_(1)
            assert_replays(graph, tensors, number)
    gpu = gpu_of(spans)
    inside = [span for span in spans if span.kind == "host" and "inside" in span.name]
    beside = [span for span in spans if span.kind == "host" and span.name == "side"]
    assert len(inside) == 2 * CAPTURES
    assert all(span.attributes.get("gpuscope.captured") is True and span.span_id not in gpu for span in inside)
    assert len(beside) == side.ran
    assert all(span.span_id in gpu for span in beside)


def test_stages_of_other_streams_are_resolved_during_a_capture(tensors, until):
    """While a capture is open, stages that ran on another stream get their GPU times and are exported."""
    x, y = tensors
    graph = torch.cuda.CUDAGraph()
    with capture(interval_s=0.001) as spans, SideThread() as side:
        with torch.cuda.graph(graph):
            torch.mul(x, 2, out=y)
            begun = side.ran
            until(lambda: gpuscope.statistics().exported > begun + 20, "stages to be exported during the capture")
            exported_inside = gpuscope.statistics().exported
            y.add_(1)
        assert_replays(graph, tensors, 3)
    assert exported_inside > begun
    assert sum(span.kind == "gpu" for span in spans) == side.ran


@pytest.mark.parametrize("enters", ["before", "inside"])
@pytest.mark.parametrize("leaves", ["inside", "after"])
def test_a_stage_across_the_edge_of_a_capture_harms_nothing(tensors, until, gpu_of, enters, leaves):
    """
    A stage entered before or inside a capture and left inside or after it leaves the capture and its replays right.

    It is timed if neither of its ends lay inside.
    """
    x, y = tensors
    graph, stage, stream = torch.cuda.CUDAGraph(), gpuscope.stage, torch.cuda.Stream()
    with capture(interval_s=0.001) as spans:
        with SideThread(), torch.cuda.stream(stream), contextlib.ExitStack() as after:
            torch.cuda.synchronize()
            crossing = contextlib.ExitStack()
            if enters == "before":
                crossing.enter_context(stage("crossing"))
            graph.capture_begin(capture_error_mode="global")
            if enters == "inside":
                crossing.enter_context(stage("crossing"))
            torch.mul(x, 2, out=y)
            y.add_(1)
            if leaves == "inside":
                crossing.close()
            else:
                after.enter_context(crossing)
            exported = gpuscope.statistics().exported
            until(lambda: gpuscope.statistics().exported > exported + 5, "the collector to work during the capture")
            graph.capture_end()
        torch.cuda.synchronize()
        assert_replays(graph, tensors, 5)
    (host,) = [span for span in spans if span.kind == "host" and span.name == "crossing"]
    timed = host.span_id in gpu_of(spans)
    assert timed is (enters == "before" and leaves == "after")
    assert host.attributes.get("gpuscope.captured", False) is not timed


def test_a_stage_around_a_capture_or_a_replay_is_timed(tensors, gpu_of):
    """Stages on ordinary streams around the capture and around the replay have GPU times."""
    x, y = tensors
    graph = torch.cuda.CUDAGraph()
    with capture() as spans:
        with gpuscope.stage("around the capture"), torch.cuda.graph(graph):
            torch.mul(x, 2, out=y)
            y.add_(1)
        with gpuscope.stage("around the replay"):
            graph.replay()
    gpu = gpu_of(spans)
    hosts = {span.name: span for span in spans if span.kind == "host"}
    assert set(hosts) == {"around the capture", "around the replay"}
    assert all(host.span_id in gpu for host in hosts.values())
    assert_replays(graph, tensors, 7)
