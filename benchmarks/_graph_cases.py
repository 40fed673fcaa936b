"""
CUDA graphs with stages inside, for `bench_graphs`: a transformer block, and spinning kernels.

The rival is what PyTorch offers: external events, one pair per stage, which each replay overwrites.
"""

from __future__ import annotations

import contextlib
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

import gpuscope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Mark = Callable[[str], Any]

LAYERS, SEQUENCE, WIDTH, HEADS = 4, 64, 128, 4
KERNELS = 10 * LAYERS
REPLAY = "replay"


def unmarked(_: str) -> Any:
    """Return a context that does nothing."""
    return contextlib.nullcontext()


class Events:
    """Marks stages by pairs of external events, in the order of their entries."""

    def __init__(self) -> None:
        self.pairs: list[Any] = []

    @contextlib.contextmanager
    def __call__(self, _: str) -> Iterator[None]:
        import torch

        start, end = (torch.cuda.Event(enable_timing=True, external=True) for _ in range(2))
        self.pairs.append((start, end))
        start.record()
        yield
        end.record()

    def lengths_ns(self) -> list[float]:
        """The stages' times in the last replay, which is done."""
        return [start.elapsed_time(end) * 1e6 for start, end in self.pairs]


class Layer:
    """Ten operations of a transformer's layer that write to memory of their own, so that each is one kernel."""

    def __init__(self) -> None:
        import torch

        new = partial(torch.randn, device="cuda", dtype=torch.float16)
        self.weights = [new(WIDTH, WIDTH) / WIDTH**0.5 for _ in range(4)]
        self.q, self.k, self.v, self.mixed, self.out = (new(SEQUENCE, WIDTH) for _ in range(5))
        self.scores = new(HEADS, SEQUENCE, SEQUENCE)

    def parts(self, x: Any) -> dict[str, Any]:
        """The layer's stages by name, each a function."""
        import torch

        q, k, v = (each.view(SEQUENCE, HEADS, -1).transpose(0, 1) for each in (self.q, self.k, self.v))
        mixed = self.mixed.view(SEQUENCE, HEADS, -1).transpose(0, 1)

        def norm() -> None:
            torch.tanh(x, out=self.out)

        def project() -> None:
            for weight, to in zip(self.weights, (self.q, self.k, self.v), strict=False):
                torch.mm(self.out, weight, out=to)

        def attend() -> None:
            torch.bmm(q, k.transpose(1, 2), out=self.scores)
            torch.softmax(self.scores, -1, out=self.scores)
            mixed.copy_(torch.bmm(self.scores, v))

        def combine() -> None:
            torch.mm(self.mixed, self.weights[3], out=self.out)
            x.add_(self.out)

        return {"norm": norm, "project": project, "attend": attend, "combine": combine}


class Block:
    """Four layers: with one stage per layer, one for each of its four parts, or none."""

    def __init__(self, stages: int, mark: Mark) -> None:
        import torch

        self.x = torch.randn(SEQUENCE, WIDTH, device="cuda", dtype=torch.float16)
        self.layers = [Layer().parts(self.x) for _ in range(LAYERS)]
        self.mark_layer = mark if stages == LAYERS else unmarked
        self.mark_part = mark if stages > LAYERS else unmarked

    def __call__(self) -> None:
        for layer in self.layers:
            with self.mark_layer("layer"):
                for name, part in layer.items():
                    with self.mark_part(name):
                        part()


class Spinning:
    """Stages of kernels that take the same time whatever else the GPU does; one kernel before them."""

    STAGES, KERNELS, CYCLES = 8, 4, 30_000

    def __init__(self, mark: Mark) -> None:
        self.mark = mark

    def __call__(self) -> None:
        from torch.cuda import _sleep

        _sleep(self.CYCLES)
        for _ in range(self.STAGES):
            with self.mark("spin"):
                for _ in range(self.KERNELS):
                    _sleep(self.CYCLES)


def graph_of(work: Callable[[], None]) -> Any:
    """Capture what a function launches."""
    import torch

    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.work = work  # Whose memory it works on.
    return graph


def block(stages: int) -> Any:
    """Return the block as a graph with this many stages."""
    return graph_of(Block(stages, gpuscope.stage))


def block_with_events(stages: int) -> tuple[Any, Events]:
    """Return the block as a graph with this many pairs of events; each run of the block makes new ones."""
    events = Events()
    graph = graph_of(Block(stages, events))
    events.pairs = events.pairs[-stages:]
    return graph, events


class Columns:
    """An exporter that keeps the columns of batches, and makes no objects per span."""

    name = "columns"

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def export(self, batch: Any, delivery: Any) -> None:
        self.batches.append(batch)
        delivery.settle(delivery.stages)

    def flush(self, timeout_s: float) -> bool:  # noqa: ARG002
        return True

    def shutdown(self, timeout_s: float) -> None:
        del timeout_s

    def replays(self) -> tuple[int, dict[int, np.ndarray]]:
        """How many stages `replay` there are; and for each, by its id, the starts, ends and uncertainties inside."""
        from gpuscope._data.batch import RowFlag

        count, found = 0, {}
        for batch in self.batches:
            names = np.array([site.name for site in batch.sites])[batch.site]
            count += int((names == REPLAY).sum())
            inner = np.flatnonzero(batch.flags & RowFlag.IN_GRAPH)
            columns = np.stack((batch.gpu_start_ns, batch.gpu_end_ns, batch.uncertainty_ns), axis=1)[inner]
            parents = batch.parent_id[inner]
            for rows in np.split(np.arange(len(inner)), np.flatnonzero(np.diff(parents)) + 1):
                if len(rows):
                    found[int(parents[rows[0]])] = columns[rows]
        return count, found


@contextlib.contextmanager
def recording(placed: str = "beside") -> Iterator[Columns]:
    """Record into `Columns`; `placed` is where the nodes of graphs captured meanwhile stand."""
    from gpuscope import _runtime

    columns = Columns()
    config = _runtime.state.config.changed(mode="on", exporters="none", metrics="none", graph_stages=placed)
    with _runtime.period(config, exporters=(columns,)):
        yield columns


@contextlib.contextmanager
def recorder(wanted: Any) -> Iterator[None]:
    """Have another recorder for a while, or none."""
    from gpuscope import _runtime

    before, _runtime.state.recorder = _runtime.state.recorder, wanted
    try:
        yield
    finally:
        _runtime.state.recorder = before


def paced(graph: Any, rate: int, replays: int) -> float:
    """Replay `rate` times per second, each in a stage; return the rate that was reached."""
    began = time.perf_counter()
    for number in range(replays):
        while time.perf_counter() - began < number / rate:
            time.sleep(0)  # Lets other threads have the GIL.
        with gpuscope.stage(REPLAY):
            graph.replay()
    return replays / (time.perf_counter() - began)
