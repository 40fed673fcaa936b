"""
Programs whose bottleneck is known by construction, with the verdicts expected of their requests and stages.

Each does real PyTorch work, far from any boundary. Names of stages are there for people: no verdict may depend on
them. Nothing here measures or prints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from gpuscope import stage

GPU, CPU, PIPELINE, UNKNOWN = "gpu-bound", "cpu-bound", "pipeline-bound", "unknown"
TRANSFER, COMPUTE, DISPATCH = "transfer-bound", "compute-bound", "dispatch-bound"
SYNC, HOST = "sync-bound", "host-bound"
MEGABYTES_64 = 16 * 2**20
"""Floats in 64 MB."""
Request = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A program: `make` prepares it and returns what runs a request, within a stage `request`."""

    make: Callable[[], Request]
    verdicts: dict[str, str]
    """What `judge` should say, by stage."""
    looks: dict[str, str]
    """What the deep look should say, by stage."""
    between: Callable[[], object] = lambda: None
    asked: Mapping[str, str] = field(default_factory=dict)
    """What `judge` should say instead where streams were asked whether they have work."""
    why_unknown: str = ""
    """Why events alone cannot tell, where `unknown` is the right verdict."""
    idle_between: bool = False
    """Whether the deep look should say that the GPU is idle between requests."""


def spin(milliseconds: float) -> None:
    """Work on the host, outside PyTorch."""
    end = time.perf_counter() + milliseconds / 1e3
    while time.perf_counter() < end:
        pass


def matrix(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, device="cuda")


def fetch(result: torch.Tensor) -> None:
    """Wait for the result: a few bytes of it."""
    with stage("fetch"):
        result.flatten()[:4].cpu()


def tiny_kernels() -> Request:
    x = matrix(32)

    def request() -> None:
        with stage("infer"):
            for _ in range(400):
                x.add_(1)
        fetch(x)

    return request


def multiply(size: int, *, wait_inside: bool = False) -> Request:
    a, out = matrix(size, size), matrix(size, size)

    def request() -> None:
        with stage("infer"):
            torch.mm(a, a, out=out)
            if wait_inside:
                out.flatten()[:4].cpu()
        if not wait_inside:
            fetch(out)

    return request


def send(size: int, *, pinned: bool) -> Request:
    """Copy 64 MB to the GPU and multiply matrices there."""
    host = torch.ones(MEGABYTES_64, pin_memory=pinned)
    a, out = matrix(size, size), matrix(size, size)

    def request() -> None:
        with stage("h2d", attributes={"bytes": 4 * MEGABYTES_64}):
            sent = host.to("cuda", non_blocking=pinned)
        with stage("infer"):
            torch.mm(a, a, out=out)
        fetch(out)
        del sent

    return request


def item_in_a_loop() -> Request:
    a, out = matrix(2048, 2048), matrix(2048, 2048)

    def request() -> None:
        for _ in range(8):
            with stage("step"):
                for _ in range(4):
                    torch.mm(a, a, out=out)
                value = out[0, 0]
            with stage("item"):
                value.item()
            spin(1)

    return request


def heavy_preprocess() -> Request:
    numbers, a, out = np.random.default_rng(0).random(1_500_000), matrix(1280, 1280), matrix(1280, 1280)

    def request() -> None:
        with stage("prep"):
            np.sort(numbers)
        with stage("infer"):
            for _ in range(20):
                torch.mm(a, a, out=out)
        fetch(out)

    return request


def two_streams() -> Request:
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    x = matrix(4)

    def request() -> None:
        for stream, name in zip(streams, ("left", "right"), strict=True):
            with torch.cuda.stream(stream), stage(name):
                torch.cuda._sleep(6_000_000)
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
        fetch(x)

    return request


def graph_replay() -> Request:
    a, out = matrix(1280, 1280), matrix(1280, 1280)
    torch.mm(a, a, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(30):
            torch.mm(a, a, out=out)

    def request() -> None:
        with stage("infer"):
            graph.replay()
        fetch(out)

    return request


def compiled_model() -> Request:
    weights = [matrix(2048, 2048) / 2048 for _ in range(4)]

    @torch.compile
    def model(x: torch.Tensor) -> torch.Tensor:
        for weight in weights:
            x = torch.sin(torch.relu(x @ weight) + 1) * 2
        return x

    batch = matrix(8192, 2048)

    def request() -> None:
        with stage("infer"):
            result = model(batch)
        fetch(result)

    return request


def small_tensors() -> Request:
    x = matrix(32)

    def request() -> None:
        with stage("make tensors"):
            made = [torch.tensor(float(i), device="cuda") for i in range(80)]
        with stage("infer"):
            x.add_(made[0])
        fetch(x)

    return request


def large_result(**attributes: int) -> Request:
    """A result of 64 MB by `.cpu()`, into new pageable memory."""
    a, out = matrix(4096, 4096), matrix(4096, 4096)

    def request() -> None:
        with stage("infer"):
            torch.mm(a, a, out=out)
        with stage("d2h", attributes=attributes or None):
            out.cpu()

    return request


def taking_turns() -> Request:
    multiplies, a, out = 30, matrix(1280, 1280), matrix(1280, 1280)

    def request() -> None:
        with stage("prep"):
            spin(3)
        with stage("infer"):
            for _ in range(multiplies):
                torch.mm(a, a, out=out)
        fetch(out)

    return request


def large_model_in_stages() -> Request:
    """Many large kernels in many stages, whose launches take much less time than the kernels."""
    a, out = matrix(2560, 2560), matrix(2560, 2560)

    def request() -> None:
        with stage("model"):
            for _ in range(12):
                with stage("block"):
                    for _ in range(8):
                        torch.mm(a, a, out=out)
        fetch(out)

    return request


def streams_that_the_host_waits_for() -> Request:
    streams = torch.cuda.Stream(), torch.cuda.Stream()

    def request() -> None:
        for stream, name in zip(streams, ("left", "right"), strict=True):
            with torch.cuda.stream(stream), stage(name):
                torch.cuda._sleep(6_000_000)
        with stage("synchronize"):
            torch.cuda.synchronize()

    return request


def pytorch_on_the_cpu() -> Request:
    table, x = torch.rand(1024, 1024), matrix(512, 512)

    def request() -> None:
        with stage("embed"):
            for _ in range(8):
                table @ table
        with stage("infer"):
            torch.mm(x, x)
        fetch(x)

    return request


def host_only() -> Request:
    def request() -> None:
        with stage("prep"):
            spin(1)

    return request


WITHOUT_GPU = {
    "host only": Case(
        host_only,
        {"request": UNKNOWN, "prep": UNKNOWN},
        {"request": UNKNOWN, "prep": UNKNOWN},
        why_unknown="there are no GPU times",
    )
}
GPU_WORK = {"infer": GPU, "fetch": GPU}
COMPUTES = {"infer": COMPUTE, "fetch": SYNC}
CASES = {
    "many tiny kernels": Case(tiny_kernels, {"request": CPU, "infer": CPU}, {"request": DISPATCH, "infer": DISPATCH}),
    "one large gemm": Case(lambda: multiply(6144), {"request": GPU, **GPU_WORK}, {"request": COMPUTE, **COMPUTES}),
    "gemm and wait in one stage": Case(
        lambda: multiply(6144, wait_inside=True),
        {"request": UNKNOWN, "infer": UNKNOWN},
        {"request": COMPUTE, "infer": COMPUTE},
        asked={"request": GPU, "infer": GPU},
        why_unknown="a wait for work of the same stage looks like host work",
    ),
    "pageable h2d": Case(
        lambda: send(3072, pinned=False),
        {"request": PIPELINE, "h2d": PIPELINE, **GPU_WORK},
        {"request": TRANSFER, "h2d": TRANSFER, **COMPUTES},
    ),
    "pinned h2d": Case(
        lambda: send(5120, pinned=True),
        {"request": GPU, "h2d": GPU, **GPU_WORK},
        {"request": COMPUTE, "h2d": TRANSFER, **COMPUTES},
    ),
    ".item() in a loop": Case(
        item_in_a_loop,
        {"request": PIPELINE, "step": GPU, "item": GPU},
        {"request": SYNC, "step": COMPUTE, "item": SYNC},
    ),
    "heavy cpu preprocess": Case(
        heavy_preprocess, {"request": CPU, "prep": CPU, "infer": GPU}, {"request": HOST, "prep": HOST, "infer": COMPUTE}
    ),
    "slow consumer between": Case(
        lambda: multiply(4096),
        {"request": PIPELINE, **GPU_WORK},
        {"request": COMPUTE, **COMPUTES},
        between=lambda: spin(10),
        idle_between=True,
    ),
    "two streams": Case(
        two_streams,
        {"request": GPU, "left": GPU, "right": GPU, "fetch": GPU},
        {"request": COMPUTE, "left": COMPUTE, "right": COMPUTE, "fetch": SYNC},
    ),
    "two streams, the host waits": Case(
        streams_that_the_host_waits_for,
        {"request": GPU, "left": GPU, "right": GPU, "synchronize": GPU},
        {"request": COMPUTE, "left": COMPUTE, "right": COMPUTE, "synchronize": SYNC},
    ),
    "large model in stages": Case(
        large_model_in_stages,
        {"request": GPU, "model": GPU, "block": GPU, "fetch": GPU},
        {"request": COMPUTE, "model": COMPUTE, "block": COMPUTE, "fetch": SYNC},
    ),
    "pytorch on the cpu": Case(pytorch_on_the_cpu, {"request": CPU, "embed": CPU}, {"request": HOST, "embed": HOST}),
    "cuda graph replay": Case(graph_replay, {"request": GPU, **GPU_WORK}, {"request": COMPUTE, **COMPUTES}),
    "compiled model": Case(compiled_model, {"request": GPU, **GPU_WORK}, {"request": COMPUTE, **COMPUTES}),
    "small tensors a call": Case(
        small_tensors, {"request": CPU, "make tensors": CPU}, {"request": DISPATCH, "make tensors": DISPATCH}
    ),
    "d2h by .cpu()": Case(
        large_result,
        {"request": UNKNOWN, "infer": GPU, "d2h": UNKNOWN},
        {"request": TRANSFER, "infer": COMPUTE, "d2h": TRANSFER},
        asked={"request": CPU, "d2h": CPU},  # The host makes new pages and fills them.
        why_unknown="a copy that does not say its bytes looks like host work",
    ),
    "d2h by .cpu(), bytes given": Case(
        lambda: large_result(bytes=4 * MEGABYTES_64),
        {"request": PIPELINE, "infer": GPU, "d2h": PIPELINE},
        {"request": TRANSFER, "infer": COMPUTE, "d2h": TRANSFER},
    ),
    "taking turns": Case(
        taking_turns,
        {"request": PIPELINE, "prep": CPU, "infer": GPU, "fetch": GPU},
        {"request": SYNC, "prep": HOST, "infer": COMPUTE, "fetch": SYNC},
    ),
}
