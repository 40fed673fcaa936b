"""`torch.compile(mode="reduce-overhead")` with stages: cudagraph trees work as without, and whole calls are timed."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._dynamo.utils import counters

import gpuscope
from gpuscope.testing import capture

CALLS = 12


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """Compile anew in each test, and let no graph tree of it live on."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def x():
    """A batch."""
    torch.manual_seed(0)
    return torch.randn(512, 512, device="cuda")


def plain(x):
    """Return something that takes several kernels."""
    for _ in range(4):
        x = torch.relu(x @ x) / 512
    return x


def staged(x):
    """Return the same, in stages of both forms."""
    with gpuscope.stage("block"):
        for _ in range(4):
            x = layer(x)
    return x


def layer(x):
    """Return the result of a layer."""
    return torch.relu(x @ x) / 512


with capture():  # Without recording a decorator would hand the function back as it is.
    layer = gpuscope.stage("layer")(layer)


def called(function, x, calls=CALLS):
    """Compile and call, as a server does; return the last result and what PyTorch counted of CUDA graphs."""
    torch._dynamo.reset()
    counters.clear()
    run = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    for _ in range(calls):
        torch.compiler.cudagraph_mark_step_begin()
        with gpuscope.stage("around"):
            result = run(x)
    told = {name: count for name, count in counters["inductor"].items() if "cudagraph" in name}
    return result.clone(), told, dict(counters["graph_break"])


def graphs():
    """Return how many CUDA graphs the trees of this device hold."""
    from torch._inductor.cudagraph_trees import get_manager

    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    roots = [node for nodes in manager.roots.values() for node in nodes] if manager is not None else []
    count = 0
    while roots:
        node = roots.pop()
        count += 1
        roots += [child for children in node.children.values() for child in children]
    return count


def test_no_cuda_graph_is_skipped_for_a_stage(x):
    """Counters of skipped graphs, graph breaks and the number of graphs are those of the function without stages."""
    with torch.no_grad():
        expected, told, breaks = called(plain, x)
        made = graphs()
        with capture(interval_s=0.001):
            got, told_with, breaks_with = called(staged, x)
            made_with = graphs()
    torch.testing.assert_close(got, expected)
    assert (told_with, breaks_with) == (told, breaks)
    assert breaks == {}
    assert made_with == made >= 1


def test_whole_calls_are_timed(x, gpu_of):
    """The stage around each call has a GPU span, and what is inside the compiled region is counted as left out."""
    with capture(interval_s=0.001, warmup=0) as spans, torch.no_grad():
        before = sum(gpuscope.statistics().elided.values())
        called(staged, x)
        torch.cuda.synchronize()
        gpuscope.flush()
        assert sum(gpuscope.statistics().elided.values()) - before >= 5
    gpu = gpu_of(spans)
    around = [span for span in spans if span.kind == "host" and span.name == "around"]
    assert len(around) == CALLS
    assert all(gpu[span.span_id].duration_ns > 0 for span in around)
    assert not [span for span in spans if span.name.startswith(("block", "layer"))]


def test_recording_may_begin_when_graphs_exist(x):
    """Trees that were recorded while gpuscope was off replay with it on, and new ones are recorded beside them."""
    with torch.no_grad():
        run = torch.compile(staged, fullgraph=True, mode="reduce-overhead")
        for recording in (False, True, False, True):
            with capture(interval_s=0.001) if recording else contextlib.nullcontext():
                for size in (512, 256) if recording else (512,):
                    batch = x[:size, :size].contiguous()
                    for _ in range(3):
                        torch.compiler.cudagraph_mark_step_begin()
                        with gpuscope.stage("around"):
                            result = run(batch)
                    torch.testing.assert_close(result.clone(), plain(batch))


def test_gradients_through_cuda_graphs(x):
    """Training in graph trees gives the gradients that it gives without stages."""
    gradients = []
    with capture(interval_s=0.001):
        for function in (plain, staged):
            torch._dynamo.reset()
            run = torch.compile(function, fullgraph=True, mode="reduce-overhead")
            for _ in range(4):
                leaf = x.clone().requires_grad_()
                torch.compiler.cudagraph_mark_step_begin()
                with gpuscope.stage("around"):
                    run(leaf).sum().backward()
            gradients.append(leaf.grad.clone())
    torch.testing.assert_close(*gradients)


def test_two_regions_in_one_step_share_a_tree(x):
    """Two compiled regions called one after the other, each in a stage, replay as without stages."""
    with capture(interval_s=0.001, warmup=0) as spans, torch.no_grad():
        first = torch.compile(staged, fullgraph=True, mode="reduce-overhead")
        second = torch.compile(lambda x: layer(x) + 1, fullgraph=True, mode="reduce-overhead")
        for _ in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            with gpuscope.stage("first"):
                between = first(x)
            with gpuscope.stage("second"):
                result = second(between)
        torch.testing.assert_close(result.clone(), layer(plain(x)) + 1)
        assert counters["inductor"]["cudagraph_skips"] == 0
    assert {sum(span.name == f"{name} [gpu]" for span in spans) for name in ("first", "second")} == {6}
