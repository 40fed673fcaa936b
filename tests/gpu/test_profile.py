"""The deep look on a GPU: what Kineto shows of kernels, copies and waits, and to which stage they belong."""

from __future__ import annotations

import pytest
import torch

import gpuscope

MEGABYTES_16 = 4 * 2**20
"""Floats in 16 MB."""


def look_at(request, *, requests=3, warmup=2):
    """The deep look at some requests, by stage."""
    request()
    torch.cuda.synchronize()
    with gpuscope.profile(requests=requests, warmup=warmup) as look:
        for _ in range(requests + warmup):
            with gpuscope.stage("request"):
                request()
    assert look.report is not None, str(look)
    return {stage.name: stage for stage in look.report.stages}


def test_kernels_belong_to_the_stage_that_launched_them():
    """A kernel that runs when the host is in a later stage counts for the one that launched it."""
    x = torch.ones(1024, device="cuda")

    def request():
        with gpuscope.stage("first"):
            torch.cuda._sleep(20_000_000)
            x.add_(1)
        with gpuscope.stage("second"):
            x.mul_(2)
        with gpuscope.stage("wait"):
            torch.cuda.synchronize()

    found = look_at(request)
    assert [found[name].kernels for name in ("request", "first", "second", "wait")] == [3, 2, 1, 0]
    assert found["first"].kernel_ms > 3
    assert found["wait"].bound == "sync-bound"
    assert found["wait"].waits_for == "first"
    assert [wait.name for wait in found["wait"].waits] == ["cudaDeviceSynchronize"]
    assert found["request"].bound == "compute-bound"


def test_copies_by_direction_bytes_and_memory():
    """Copies from pinned and pageable memory are told apart, with their bytes, and those that block bound the stage."""
    pinned, pageable = torch.ones(MEGABYTES_16, pin_memory=True), torch.ones(MEGABYTES_16)
    on_gpu = torch.empty(MEGABYTES_16, device="cuda")

    def request():
        with gpuscope.stage("pinned"):
            on_gpu.copy_(pinned, non_blocking=True)
        torch.cuda.synchronize()
        with gpuscope.stage("pageable"):
            on_gpu.copy_(pageable)
        with gpuscope.stage("back"):
            on_gpu.cpu()

    found = look_at(request)
    seen = {name: [(c.direction, c.pageable, c.count, c.bytes) for c in found[name].copies] for name in found}
    size = 4 * MEGABYTES_16
    assert seen["pinned"] == [("HtoD", False, 1, size)]
    assert seen["pageable"] == [("HtoD", True, 1, size)]
    assert seen["back"] == [("DtoH", True, 1, size)]
    assert {found[name].bound for name in seen} == {"transfer-bound"}
    assert found["pinned"].copy_wait_ms < 0.5 * found["pinned"].ms
    assert found["pageable"].copy_wait_ms > 0.5 * found["pageable"].ms


def test_waits_go_by_the_operator_that_waits():
    """`.item()` is found as one wait a call, and a loop of them as what bounds it."""
    x = torch.ones(1, device="cuda")

    def request():
        for _ in range(10):
            torch.cuda._sleep(200_000)
            x.item()

    found = look_at(request)["request"]
    assert [(wait.name, wait.count) for wait in found.waits] == [("aten::item", 10)]
    assert found.wait_ms > 0


def test_launch_bound_and_tiny_tensors():
    """Many tiny kernels are bound by their dispatch; tiny tensors made on the host are counted."""
    x = torch.ones(16, device="cuda")

    def request():
        with gpuscope.stage("kernels"):
            for _ in range(200):
                x.add_(1)
        with gpuscope.stage("tensors"):
            for number in range(50):
                torch.tensor(float(number), device="cuda")

    found = look_at(request)
    assert (found["kernels"].kernels, found["kernels"].launches) == (200, 200)
    assert found["kernels"].bound == found["tensors"].bound == "dispatch-bound"
    assert sum(small.count for small in found["tensors"].small_copies) == 50


def test_a_graph_is_one_launch():
    """The kernels of a replayed CUDA graph belong to the stage that replays it."""
    x = torch.ones(16, device="cuda")
    x.add_(1)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(20):
            x.add_(1)
    found = look_at(graph.replay)["request"]
    assert (found.graph_launches, found.kernels) == (1, 20)


def test_nothing_is_left_afterwards():
    """After a look no profiler is on, the hot path is as before, and stages have their GPU times as ever."""
    x = torch.ones(16, device="cuda")
    with gpuscope.testing.capture() as spans:
        recorder = gpuscope._runtime.state.recorder
        door = recorder.nvtx
        with gpuscope.profile(requests=2, warmup=1) as look:
            for _ in range(6):
                with gpuscope.stage("request"):
                    x.add_(1)
        assert look.report is not None, str(look)
        assert recorder.nvtx is door
        assert not torch.autograd.profiler._is_profiler_enabled
    assert sum(span.kind == "gpu" for span in spans) == 6


ON_DEMAND = """
import json, pathlib, sys, time, torch, gpuscope
wish = pathlib.Path(sys.argv[1])
x, deadline = torch.ones(16, device="cuda"), time.monotonic() + 60
wish.touch()
while not (reports := list(wish.parent.glob("look-*/report.json"))) and time.monotonic() < deadline:
    for _ in range(20):
        with gpuscope.stage("request"):
            x.add_(1)
    torch.cuda.synchronize()
print(json.dumps([json.loads(report.read_text())["stages"] for report in reports]))
"""


def test_on_demand_sees_the_gpu(tmp_path, run_program):
    """A look asked for by a file, started on a thread of its own, has the kernels of the requests of other threads."""
    # In a process of its own: PyTorch may lose CUPTI when it takes it up again while another thread uses the GPU.
    wish = str(tmp_path / "look")
    ((stage,),) = run_program(
        ON_DEMAND.replace("sys.argv[1]", repr(wish)), GPUSCOPE="1", GPUSCOPE_EXPORTER="none", GPUSCOPE_PROFILE=wish
    )
    assert stage["kernels"] == pytest.approx(1, abs=0.01)


NOW_AND_THEN = """
import json, time, torch, gpuscope
gpuscope.enable(exporters="file", file=FILE, profile_every_s=10, sample_hz=1000, interval_s=0.1)
a = torch.randn(4096, 4096, device="cuda").half()
out, deadline = torch.mm(a, a), time.monotonic() + 110
while gpuscope.statistics().look_counts.get("done", 0) < 3 and time.monotonic() < deadline:
    for _ in range(20):
        with gpuscope.stage("request"), gpuscope.stage("infer"):
            for _ in range(8):
                torch.mm(a, a, out=out)
            out[0, 0].item()
counts = gpuscope.statistics().look_counts
gpuscope.shutdown()
print(json.dumps(counts))
"""


def test_now_and_then_it_says_what_answers_say(tmp_path, run_program):
    """Of a GPU-bound loop: kernels run nearly all the time, as many as there are, and both measurements agree."""
    from gpuscope.analysis.read import read
    from gpuscope.analysis.verdict import judge

    path = tmp_path / "spans.jsonl"
    counts = run_program(NOW_AND_THEN.replace("FILE", repr(str(path))), timeout_s=170)
    assert counts["done"] >= 1, counts
    (infer,) = (each for each in judge(read([path])).stages if each.name == "infer")
    assert infer.looked.share > 0.8
    assert infer.looked.kernels == pytest.approx(9, abs=1.5)
    assert infer.looked.agrees is not False
