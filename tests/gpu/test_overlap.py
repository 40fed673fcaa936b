"""`overlap` on a GPU: the same results, copies beside work, nothing waited for but what is needed, no races."""

from __future__ import annotations

import gc

import pytest
import torch

import gpuscope

SIZE = 1 << 16
"""Floats in 256 KB."""


def numbered(count, size=SIZE):
    """Batches that tell which they are."""
    return [torch.full((size,), float(i)) for i in range(count)]


def model(x):
    """Something that takes the GPU a while, in several kernels."""
    for _ in range(4):
        x = torch.sin(x) * 2 + x
    return {"y": x, "sum": x.double().sum()}


def sequential(batches, infer=model):
    """The results of the plain loop."""
    return [{name: value.cpu() for name, value in infer(batch.to("cuda")).items()} for batch in batches]


def same(left, right):
    """Whether results are equal, bit for bit."""
    return len(left) == len(right) and all(
        torch.equal(a[name], b[name]) for a, b in zip(left, right, strict=True) for name in a
    )


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_same_results_as_in_sequence(graph, depth, workers):
    """In order and bit for bit, with batches of three sizes."""
    batches = [torch.randn(SIZE - 7 * (i % 3)) for i in range(20)]
    loop = gpuscope.overlap(batches, model, depth=depth, workers=workers, graph=graph)
    assert same(list(loop), sequential(batches))
    assert loop.report().graph == ("on" if graph else "off")


def test_copies_run_beside_the_gpus_work():
    """While the GPU works on one batch the next is uploaded: its copy ends before that work does."""
    size = 16 * 2**20
    ended = []

    def infer(x):
        torch.cuda._sleep(40_000_000)
        return x[:4]

    with gpuscope.testing.capture() as spans:
        list(gpuscope.overlap(numbered(6, size), infer, lambda y: ended.append(y.tolist()), depth=2))
    gpu = [span for span in spans if span.kind == "gpu"]
    works = sorted((span.start_ns, span.end_ns) for span in gpu if span.name == "infer [gpu]")
    uploads = sorted((span.start_ns, span.end_ns) for span in gpu if span.name == "upload [gpu]")
    beside = sum(
        start < upload_end < end for (start, end), (_, upload_end) in zip(works[1:-1], uploads[2:], strict=True)
    )
    assert beside >= 3
    assert ended == [[i] * 4 for i in range(6)]


def test_nothing_is_synchronised_in_steady_state():
    """After the first batches no call waits for the device or a stream; only single copies are waited for."""
    batches = iter(numbered(12))
    loop = gpuscope.overlap(batches, model)
    for _ in range(4):
        next(loop)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(loop)) == 8
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_memory_is_allocated_in_steady_state():
    """On the GPU at most `depth` times a batch's inputs and outputs is held, and no step adds to it."""
    batches = numbered(30)
    loop = gpuscope.overlap(batches, lambda x: x * 2, depth=2)
    for _ in range(6):
        next(loop)
    before = torch.cuda.memory_allocated()
    peaks = []
    for _ in range(10):
        next(loop)
        peaks.append(torch.cuda.memory_allocated())
    assert max(peaks) <= before + SIZE * 4
    del loop
    gc.collect()


def test_memory_is_given_back():
    """After the loop the GPU's memory is as before."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    loop = gpuscope.overlap(numbered(8), model, graph=True)
    assert len(list(loop)) == 8
    del loop
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 1024


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_no_race(graph):
    """10,000 steps whose inputs and outputs are poisoned once they were used: no result ever shows the poison."""
    steps, poison = 10_000, float("nan")

    def batches():
        for i in range(steps):
            yield torch.full((512 + i % 3,), float(i))

    def post(y):
        right = bool((y == y[0]).all())
        value = float(y[0])
        y.fill_(poison)
        return right, value

    def infer(x):
        y = x + 1
        x.fill_(poison)
        return y

    results = list(gpuscope.overlap(batches(), infer, post, depth=3, graph=graph))
    assert results == [(True, float(i + 1)) for i in range(steps)]


def test_a_function_that_works_in_place_is_captured_with_its_inputs_as_they_are():
    """The calls before a capture leave no trace in the first results."""
    results = list(gpuscope.overlap(numbered(6), lambda x: x.add_(1), lambda y: float(y[0]), graph=True))
    assert results == [i + 1.0 for i in range(6)]


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("phase", ["prepare", "infer", "post"])
def test_an_exception_comes_at_its_batch(phase, graph):
    """Results before it come first, and the GPU can be used afterwards."""

    def failing(name, at):
        calls = iter(range(100))

        def run(value):
            if name == phase and next(calls) == at:
                raise ValueError(name)
            return value

        return run

    prepare, post = failing("prepare", 3), failing("post", 3)
    # With a graph `infer` itself is called for the first batches only.
    at = 1 if graph and phase == "infer" else 3
    fail = failing("infer", at)
    results = []
    loop = gpuscope.overlap(numbered(8), lambda x: fail(x) + 1, post, prepare=prepare, graph=graph)
    with pytest.raises(ValueError, match=phase):
        results.extend(loop)
    assert [float(result[0]) for result in results] == [i + 1.0 for i in range(at)]
    assert float(torch.ones(1, device="cuda").sum()) == 1.0


def test_what_cannot_be_captured_runs_as_before():
    """A wait inside `infer` makes a capture impossible; results are right and the report says why."""
    loop = gpuscope.overlap(numbered(6), lambda x: x * float(x[0].item() + 1), lambda y: float(y[0]), graph=True)
    assert list(loop) == [i * (i + 1.0) for i in range(6)]
    assert "capture failed" in loop.report().graph


def test_a_failed_capture_leaves_no_trace_in_the_program():
    """Random numbers, the current stream and the memory of several streams are as if it had never been tried."""
    current, other = torch.cuda.current_stream(), torch.cuda.Stream()
    list(gpuscope.overlap(numbered(5), lambda x: x * float(x[0].item()), graph=True))
    assert torch.cuda.current_stream() == current
    assert torch.randn(3, device="cuda").isfinite().all()
    before = torch.cuda.memory_allocated()
    for _ in range(4):
        used = torch.ones(1 << 22, device="cuda")
        used.record_stream(other)
        del used
        torch.cuda.synchronize()
        torch.ones(1, device="cuda")
    assert torch.cuda.memory_allocated() <= before + 1024


def test_loops_with_graphs_do_not_add_up_memory():
    """Each captures on the same stream, so PyTorch's workspaces of that stream are had once."""
    weight = torch.ones(256, 256, device="cuda")

    def loop():
        list(gpuscope.overlap([torch.ones(256, 256)] * 8, lambda x: x @ weight, graph=True))
        gc.collect()
        return torch.cuda.memory_allocated()

    first = loop()
    assert max(loop() for _ in range(3)) <= first + 1024


def test_autocast_and_inference_mode_hold():
    """Of the caller, with and without a graph."""
    weight = torch.randn(64, 64, device="cuda", requires_grad=True)
    batches = [torch.randn(8, 64) for _ in range(9)]
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        eager = list(gpuscope.overlap(batches, lambda x: x @ weight))
        graphs = list(gpuscope.overlap(batches, lambda x: x @ weight, graph=True))
    assert eager[0].dtype is torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(eager, graphs, strict=True))


def test_report_of_a_gpu_bound_loop():
    """With little to do for the host most of it is hidden, and the GPU is what bounds."""

    def infer(x):
        torch.cuda._sleep(4_000_000)
        return x

    loop = gpuscope.overlap(numbered(20), infer, lambda y: float(y[0]))
    list(loop)
    report = loop.report()
    assert report.bound == "gpu-bound"
    assert report.overlap_ratio > 0.5
    assert report.wall_ms < 1.5 * report.compute_ms


def test_leaving_early_leaves_nothing_under_way():
    """After `break` no event of ours is pending, and what the loop held is free."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in gpuscope.overlap(numbered(10), model):
        break
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 1024
