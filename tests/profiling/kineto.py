"""
A host that calls operators and CUDA, and GPU streams that do what they are given: traces in Kineto's shape.

Times are microseconds; costs are about those of PyTorch under the profiler on an H200.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

PID, TID = 4242, 4242
LAUNCH_COST, LAUNCH_LATENCY, WAKE_UP, SYNC_COST, OPERATOR_COST = 6.0, 4.0, 4.0, 3.0, 4.0
BANDWIDTH = {True: 20_000.0, False: 50_000.0}
"""Bytes a microsecond, of pageable and of pinned memory."""


@dataclass
class Program:
    """One process with one GPU. `thread` may be changed between stages."""

    now: float = 1_000_000.0
    thread: int = TID
    events: list[dict[str, Any]] = field(default_factory=list)
    busy_until: dict[int, float] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    has_gpu: bool = True
    launch_cost: float = LAUNCH_COST
    lengths: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    """How long each stage took, by outermost stage and stage."""

    def __post_init__(self) -> None:
        self._correlation = 0
        self._depth = 0
        self._root = ""

    @contextlib.contextmanager
    def stage(self, name: str, **arguments: Any) -> Iterator[None]:
        """Annotate what is done in the block."""
        if name not in self.names:
            self.names.append(name)
        if not self._depth and name not in self.requests:
            self.requests.append(name)
        self._depth += 1
        self._root, start = name if self._depth == 1 else self._root, self.now
        with self._range("user_annotation", name, **arguments):
            yield
        self.lengths.setdefault((self._root, name), []).append(self.now - start)
        self._depth -= 1

    @contextlib.contextmanager
    def operator(self, name: str) -> Iterator[None]:
        """Be in an operator of PyTorch."""
        with self._range("cpu_op", name):
            self.now += OPERATOR_COST / 2
            yield
            self.now += OPERATOR_COST / 2

    @contextlib.contextmanager
    def _range(self, category: str, name: str, **arguments: Any) -> Iterator[None]:
        start = self.now
        yield
        self._add(category, name, start, self.now, **{"External id": len(self.events) + 1, **arguments})
        self.now += 0.5

    def work(self, duration: float) -> None:
        """Let the host do something that PyTorch knows nothing of."""
        self.now += duration

    def launch(self, duration: float, *, stream: int = 7, operator: str = "aten::mul") -> None:
        """Run a kernel."""
        with self.operator(operator):
            self._launch("cudaLaunchKernel", "kernel", [("void a_kernel(float*)", duration, {})], stream)

    def replay(self, durations: list[float], *, stream: int = 7) -> None:
        """Replay a CUDA graph: many kernels by one call."""
        kernels = [
            ("void a_kernel(float*)", each, {"graph id": 2, "graph node id": i}) for i, each in enumerate(durations)
        ]
        self._launch("cudaGraphLaunch", "kernel", kernels, stream)

    def copy(self, direction: str, size: int, *, pageable: bool, blocking: bool = True, stream: int = 7) -> None:
        """Copy between host and GPU, as `aten::to` does; a blocking copy waits for the stream as well."""
        memory = "Pageable" if pageable else "Pinned"
        ends = (memory, "Device") if direction == "HtoD" else ("Device", memory)
        name, duration = f"Memcpy {direction} ({ends[0]} -> {ends[1]})", 1.0 + size / BANDWIDTH[pageable]
        with self.operator("aten::to"), self.operator("aten::_to_copy"), self.operator("aten::copy_"):
            start = self._launch("cudaMemcpyAsync", "gpu_memcpy", [(name, duration, {"bytes": size})], stream)
            if pageable:
                self.now = max(self.now, self.busy_until[stream])
                self.events[start]["dur"] = self.now - self.events[start]["ts"]
            if blocking:
                self.synchronize(stream=stream)

    def item(self, *, stream: int = 7) -> None:
        """Read one number."""
        with self.operator("aten::item"), self.operator("aten::_local_scalar_dense"):
            self._launch(
                "cudaMemcpyAsync", "gpu_memcpy", [("Memcpy DtoH (Device -> Pinned)", 1.0, {"bytes": 4})], stream
            )
            self.synchronize(stream=stream)

    def synchronize(self, *, stream: int = 7, call: str = "cudaStreamSynchronize") -> None:
        """Wait for a stream."""
        start = self.now
        until = self.busy_until.get(stream, 0.0)
        self.now = max(self.now + SYNC_COST, until + WAKE_UP if until > self.now else 0.0)
        self._call(call, start)

    def trace(self, note: bool = True) -> dict[str, Any]:
        """Return what Kineto would have written."""
        noted = {"gpuscope": {"stages": self.names, "requests": self.requests}} if note else {}
        return {"schemaVersion": 1, "baseTimeNanoseconds": 0, "traceEvents": self.events, **noted}

    def _launch(self, call: str, category: str, work: list[tuple[str, float, dict[str, Any]]], stream: int) -> int:
        start = self.now
        self.now += self.launch_cost
        index = len(self.events)
        correlation = self._call(call, start)
        begins = max(self.now + LAUNCH_LATENCY, self.busy_until.get(stream, 0.0))
        for name, duration, arguments in work if self.has_gpu else ():
            self._add(category, name, begins, begins + duration, pid=0, tid=stream, stream=stream, device=0,
                      correlation=correlation, **arguments)  # fmt: skip
            begins += duration
        self.busy_until[stream] = begins if self.has_gpu else 0.0
        return index

    def _call(self, name: str, start: float) -> int:
        self._correlation += 1
        self._add("cuda_runtime", name, start, self.now, cbid=211, correlation=self._correlation)
        return self._correlation

    def _add(self, category: str, name: str, start: float, end: float, **arguments: Any) -> None:
        place = {"pid": arguments.pop("pid", PID), "tid": arguments.pop("tid", self.thread)}
        event = {"ph": "X", "cat": category, "name": name, **place, "ts": start, "dur": end - start}
        self.events.append({**event, "args": arguments})


def serve(
    request: Callable[[Program], None], *, count: int = 5, between: float = 20.0, launch_cost: float = LAUNCH_COST
) -> Program:
    """Run so many requests, one after the other."""
    program = Program(launch_cost=launch_cost)
    for _ in range(count):
        with program.stage("request"):
            request(program)
        program.work(between)
    return program
