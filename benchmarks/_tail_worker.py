"""
A process that runs blocks of requests on command, for `bench_tail.py`: JSON lines in, JSON lines out.

A process has one TracerProvider, and is never quite the same once CUPTI was started in it: hence several kinds.
`bare` runs plain, otlp and naive; `instrumented`, whose TracerProvider is that of `opentelemetry-instrument`, which has
started it, runs plain, auto and sdk; `profiler` runs torch.profiler alone.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
from itertools import count
from typing import TYPE_CHECKING, Any

import _pipeline as pipeline

if TYPE_CHECKING:
    from collections.abc import Callable

WARMUP = 40
PROFILED_WARMUP, PROFILED = 5, 40


def thread_cpu_ns() -> dict[str, int]:
    """CPU time of every Python thread but this one."""
    found: dict[str, int] = {}
    for thread in threading.enumerate():
        if thread is threading.current_thread() or thread.ident is None:
            continue
        try:
            clock = time.pthread_getcpuclockid(thread.ident)
            found[thread.name] = found.get(thread.name, 0) + int(time.clock_gettime(clock) * 1e9)
        except OSError:
            continue
    return found


def provider(service: str, endpoint: str) -> Any:
    """What an application sets up: a batch processor and the OTLP exporter over HTTP."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    made = TracerProvider(resource=Resource.create({"service.name": service}))
    made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{endpoint}/v1/traces")))
    return made


class Worker:
    """The requests, built once, and the ways to run a block of them."""

    def __init__(self, kind: str, endpoint: str, schedule_delay_s: float) -> None:
        functions = pipeline.steps()
        self._endpoint = endpoint
        self._schedule_delay_s = schedule_delay_s
        self._plain = pipeline.plain(functions)
        self._staged = pipeline.staged(functions)
        self._provider = None
        if kind == "instrumented":
            from opentelemetry import trace

            self._provider = trace.get_tracer_provider()
        if kind == "bare":
            self._provider = provider("naive", endpoint)
            self._naive = pipeline.naive(functions, self._provider.get_tracer("naive"))

    def block(self, variant: str, seconds: float) -> dict[str, Any]:
        gc.collect()
        if variant in ("otlp", "auto", "sdk"):
            return self._gpuscope(variant, seconds)
        if variant == "profiler":
            return {"ns": self._profiled(seconds), "background_ns": {}, "stages": 0}
        request = self._naive if variant == "naive" else self._plain
        return self._measure(request, seconds, self._flush_provider if variant == "naive" else lambda: None)

    def _gpuscope(self, exporter: str, seconds: float) -> dict[str, Any]:
        import gpuscope

        gpuscope.enable(exporters=exporter, otlp_base_endpoint=self._endpoint, schedule_delay_s=self._schedule_delay_s)

        def settle() -> None:
            if not gpuscope.flush(timeout=60):
                raise RuntimeError("gpuscope did not settle within a minute")
            self._flush_provider()

        answer = self._measure(self._staged, seconds, settle)
        statistics = gpuscope.statistics()
        answer["route"] = statistics.route
        answer["account"] = {
            name: getattr(statistics, name) for name in ("recorded", "exported", "dropped", "lost", "pending")
        }
        gpuscope.shutdown(timeout=30)
        return answer

    def _measure(self, request: Callable[[], Any], seconds: float, settle: Callable[[], None]) -> dict[str, Any]:
        for _ in range(WARMUP):
            request()
        settle()
        before = thread_cpu_ns()
        times = self._loop(request, seconds)
        own = time.thread_time_ns()
        settle()
        own = time.thread_time_ns() - own
        after = thread_cpu_ns()
        background = {name: spent - before.get(name, 0) for name, spent in after.items()}
        # A batch processor's flush works on the thread that asks for it, which is a cost of watching too.
        background["flush"] = own
        return {"ns": times, "background_ns": background, "stages": len(times) * pipeline.STAGES_A_REQUEST}

    def _loop(self, request: Callable[[], Any], seconds: float) -> list[int]:
        clock, times = time.perf_counter_ns, []
        deadline = clock() + int(seconds * 1e9)
        while (start := clock()) < deadline:
            request()
            times.append(clock() - start)
        return times

    def _profiled(self, seconds: float) -> list[int]:
        """Requests while the profiler records; its own processing, in `step()`, is not counted."""
        from torch.profiler import ProfilerActivity, profile, schedule, supported_activities

        activities = [a for a in (ProfilerActivity.CPU, ProfilerActivity.CUDA) if a in supported_activities()]
        cycle = PROFILED_WARMUP + PROFILED
        times, clock = [], time.perf_counter_ns
        spent = 0
        with profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=PROFILED_WARMUP, active=PROFILED),
            on_trace_ready=lambda _: None,
        ) as profiler:
            for index in count():
                start = clock()
                self._plain()
                took = clock() - start
                if index % cycle >= PROFILED_WARMUP:
                    times.append(took)
                    spent += took
                profiler.step()
                if index % cycle == cycle - 1 and spent > seconds * 1e9:
                    return times
        return times

    def _flush_provider(self) -> None:
        if self._provider is not None:
            self._provider.force_flush(60_000)


def main() -> None:
    # Whatever else prints goes to stderr: stdout carries the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    kind, endpoint, delay = sys.argv[1:]
    worker = Worker(kind, endpoint, float(delay))
    print(json.dumps({"ready": kind}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(worker.block(command["variant"], command["seconds"])), file=answers, flush=True)


if __name__ == "__main__":
    main()
