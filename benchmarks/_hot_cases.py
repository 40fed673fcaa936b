"""
The loops that `bench_hot_path.py` times, and the crew of threads that runs one of them at a time.

Every loop walks over the same list of pairs, so that subtracting the empty loop is fair to all. Nothing here prints.
"""

from __future__ import annotations

import ctypes
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NAIVE_SHARE = 4  # the naive rival runs a quarter of the iterations: it is slow, and figures are per iteration anyway


BATCH_SHARE = 4
"""As many iterations for batches, whose members fill the queue."""


@dataclass
class Lane:
    """What one thread records with: a stream, and pooled pairs of events by route."""

    size: int
    stream: Any = None
    context: Callable[[], Any] = nullcontext
    handle: Any = None
    driver_stream: Any = None
    pairs: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()


@dataclass
class Case:
    """A loop over a lane's pairs, how many iterations it makes, and what is done after it outside the timing."""

    loop: Callable[[Lane], None]
    share: int = 1
    settle: Callable[[], None] = lambda: None


def host_lane(size: int) -> Lane:
    """A lane for a machine without a GPU."""
    return Lane(size, pairs={"plain": [(None, None)] * size})


class CudaRoutes:
    """The record routes: torch, torch's generic events, and the driver through ctypes and cuda-bindings."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.record = ctypes.PyDLL("libcuda.so.1").cuEventRecord
        try:
            from cuda.bindings import driver
        except ImportError:
            driver = None
        self.driver = driver

    def lanes(self, count: int, size: int) -> list[Lane]:
        """`count` lanes with the events of all routes, each recorded once: events are made lazily."""
        return [self._lane(size) for _ in range(count)]

    def place(self, lane: Lane, stream: Any) -> Lane:
        """The same events on another stream."""
        return Lane(
            lane.size,
            stream,
            lambda: self.torch.cuda.stream(stream),
            ctypes.c_void_p(stream.cuda_stream),
            self.driver and self.driver.CUstream(stream.cuda_stream),
            lane.pairs,
            lane.kept,
        )

    def cases(self) -> dict[str, Case]:
        """The floor, by each route."""
        found = {
            "floor: torch.cuda.Event.record(stream)": Case(_record_torch),
            'floor: torch.Event("cuda").record()': Case(_record_generic),
            "floor: cuEventRecord, ctypes.PyDLL": Case(self._record_ctypes),
        }
        if self.driver is not None:
            found["floor: cuEventRecord, cuda.bindings"] = Case(self._record_bindings)
        return found

    def naive(self, tracer: Any, settle: Callable[[], None]) -> Case:
        """New events, `record()`, an SDK span as current, an NVTX range: what one would write without gpuscope."""
        cuda, nvtx = self.torch.cuda, self.torch.cuda.nvtx

        def loop(lane: Lane) -> None:
            kept = lane.kept
            for _, _ in lane.pairs["few"]:
                with tracer.start_as_current_span("x"):
                    nvtx.range_push("x")
                    start = cuda.Event(enable_timing=True)
                    end = cuda.Event(enable_timing=True)
                    start.record()
                    end.record()
                    nvtx.range_pop()
                    kept.append((start, end))

        return Case(loop, NAIVE_SHARE, settle)

    def work(self) -> dict[str, Callable[[Lane], None]]:
        """What `with_work` does without its stages: two events, the same with one by a call, seven of eight."""
        record = self.record

        def call(event: Any, stream: Any) -> None:
            record(event, stream)

        return {
            "two enqueued": self._record_ctypes,
            "two enqueued, one by a call": self._work_by(call),
            "seven of eight enqueued": self._chain_by(lambda _: nullcontext(), bare=True),
        }

    def with_work(self, stage: Callable[[str], Any]) -> dict[str, Callable[[Lane], None]]:
        """
        Stages with something enqueued in each, and alone or in a chain.

        A lone one has something enqueued before it, too, so that it shares no event; the chain is a stage with seven in
        it, one after the other. What is enqueued is an event of the benchmark's own, the least that there is.
        """
        record = self.record

        def alone(lane: Lane) -> None:
            stream = lane.handle
            for start, end in lane.pairs["ctypes"]:
                record(start, stream)
                with stage("x"):
                    record(end, stream)

        @stage("y")
        def call(event: Any, stream: Any) -> None:
            record(event, stream)

        return {"with": alone, "decorator": self._work_by(call), "chain": self._chain_by(stage, bare=False)}

    def _work_by(self, call: Callable[[Any, Any], None]) -> Callable[[Lane], None]:
        record = self.record

        def loop(lane: Lane) -> None:
            stream = lane.handle
            for start, end in lane.pairs["ctypes"]:
                record(start, stream)
                call(end, stream)

        return loop

    def _chain_by(self, stage: Callable[[str], Any], *, bare: bool) -> Callable[[Lane], None]:
        record = self.record

        def loop(lane: Lane) -> None:
            stream, pairs = lane.handle, lane.pairs["ctypes"]
            for first in range(0, len(pairs) - 7, 8):
                inner = pairs[first + 1 : first + 8]
                with stage("request"):
                    for start, _ in inner:
                        with stage("x"):
                            record(start, stream)

        def without(lane: Lane) -> None:
            stream, pairs = lane.handle, lane.pairs["ctypes"]
            for first in range(0, len(pairs) - 7, 8):
                inner = pairs[first + 1 : first + 8]
                for start, _ in inner:
                    record(start, stream)

        return without if bare else loop

    def _lane(self, size: int) -> Lane:
        cuda = self.torch.cuda
        torch_pairs = [(cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)) for _ in range(size)]
        generic = [
            (self.torch.Event("cuda", enable_timing=True), self.torch.Event("cuda", enable_timing=True))
            for _ in range(size)
        ]
        stream = cuda.current_stream()
        for i in range(size):
            for event in torch_pairs[i]:
                event.record(stream)
            for event in generic[i]:
                event.record()
            if i % 256 == 255:
                cuda.synchronize()
        cuda.synchronize()
        raw = [(a.cuda_event, b.cuda_event) for a, b in torch_pairs]
        lane = Lane(size, pairs={"plain": [(None, None)] * size, "torch": torch_pairs, "generic": generic})
        lane.pairs["ctypes"] = [(ctypes.c_void_p(a), ctypes.c_void_p(b)) for a, b in raw]
        if self.driver is not None:
            lane.pairs["bindings"] = [(self.driver.CUevent(a), self.driver.CUevent(b)) for a, b in raw]
        lane.pairs["few"] = lane.pairs["plain"][: size // NAIVE_SHARE]
        return lane

    def _record_ctypes(self, lane: Lane) -> None:
        record, stream, status = self.record, lane.handle, 0
        for start, end in lane.pairs["ctypes"]:
            record(start, stream)
            status = record(end, stream)
        if status:
            raise RuntimeError(f"cuEventRecord returned {status}, so the figures mean nothing")

    def _record_bindings(self, lane: Lane) -> None:
        record, stream, status = self.driver.cuEventRecord, lane.driver_stream, (0,)
        for start, end in lane.pairs["bindings"]:
            record(start, stream)
            status = record(end, stream)
        if status[0] != 0:
            raise RuntimeError(f"cuEventRecord returned {status}, so the figures mean nothing")


def _record_torch(lane: Lane) -> None:
    stream = lane.stream
    for start, end in lane.pairs["torch"]:
        start.record(stream)
        end.record(stream)


def _record_generic(lane: Lane) -> None:
    for start, end in lane.pairs["generic"]:
        start.record()
        end.record()


def empty(lane: Lane) -> None:
    for _, _ in lane.pairs["plain"]:
        pass


def calls(function: Callable[[], None]) -> Callable[[Lane], None]:
    """A loop that calls a function of no arguments."""

    def loop(lane: Lane) -> None:
        for _, _ in lane.pairs["plain"]:
            function()

    return loop


def stages(stage: Callable[[str], Any]) -> Callable[[Lane], None]:
    """A loop over `with stage("x"):`, written as a user writes it."""

    def loop(lane: Lane) -> None:
        for _, _ in lane.pairs["plain"]:
            with stage("x"):
                pass

    return loop


def batches(stage: Callable[..., Any], tokens: list[Any]) -> Callable[[Lane], None]:
    """A loop over stages that work for members, a quarter as many."""

    def loop(lane: Lane) -> None:
        for _, _ in lane.pairs["plain"][::BATCH_SHARE]:
            with stage("x", members=tokens):
                pass

    return loop


def tokens_in(stage: Callable[[str], Any], here: Callable[[], Any]) -> Callable[[Lane], None]:
    """A loop of tokens in one stage."""

    def loop(lane: Lane) -> None:
        with stage("x"):
            for _, _ in lane.pairs["plain"]:
                here()

    return loop


def spans(tracer: Any) -> Callable[[Lane], None]:
    """A loop over an SDK span as current, a quarter as many."""

    def loop(lane: Lane) -> None:
        for _, _ in lane.pairs["plain"][::NAIVE_SHARE]:
            with tracer.start_as_current_span("x"):
                pass

    return loop


@dataclass
class Sample:
    """One timed block. Nanoseconds per iteration, except for `drain_ns`."""

    thread_ns: float
    """Mean over the threads of each one's own time from its first iteration to its last."""
    wall_ns: float
    """From the first thread's start to the last one's end, over all iterations of all threads."""
    drain_ns: float
    """How long the GPU went on afterwards. Milliseconds here would mean that the launch queue was filling up."""


class Crew:
    """Threads that start each block together and wait for the GPU only when all have stopped their clocks."""

    def __init__(self, count: int) -> None:
        self.count = count
        # With a timeout: where one thread fails the others must not wait for it for ever.
        self._barrier = threading.Barrier(count, timeout=60)
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="bench")

    def run(self, case: Case, lanes: Sequence[Lane]) -> Sample:
        futures = [self._pool.submit(self._block, case, lane) for lane in lanes[: self.count]]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error  # the cause, rather than what it did to the other threads
        times = [future.result() for future in futures]
        case.settle()
        done = lanes[0].size // case.share
        own = sum(end - start for start, end, _ in times) / self.count
        wall = max(end for _, end, _ in times) - min(start for start, _, _ in times)
        return Sample(own / done, wall / done / self.count, max(drain for _, _, drain in times))

    def close(self) -> None:
        self._pool.shutdown()

    def _block(self, case: Case, lane: Lane) -> tuple[int, int, int]:
        try:
            return self._timed(case, lane)
        except Exception:
            self._barrier.abort()
            raise

    def _timed(self, case: Case, lane: Lane) -> tuple[int, int, int]:
        with lane.context():
            lane.synchronize()  # a thread has no CUDA context before its first call
            self._barrier.wait()
            start = time.perf_counter_ns()
            case.loop(lane)
            end = time.perf_counter_ns()
            self._barrier.wait()
            before = time.perf_counter_ns()
            lane.synchronize()
            drain = time.perf_counter_ns() - before
        lane.kept.clear()
        return start, end, drain
