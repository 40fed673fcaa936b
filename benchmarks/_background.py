"""
A process that records stages with GPU spans on the loop of `bench_tail.py`, for `bench_exporters.py`.

Prints as JSON what all threads but the program's cost per stage, by thread and, if asked for, by part. Without a GPU
the driver is `_fake_gpu`, and the loop is paced: its work goes through as much memory as an inference does.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import _fake_gpu
import _pipeline as pipeline
from _common import has_cuda
from _tail_worker import thread_cpu_ns

if TYPE_CHECKING:
    from collections.abc import Callable

WAYS = {"otlp": "otlp", "application": "auto"}
REQUESTS_A_SECOND = 400
"""Of the paced loop: 2,800 stages a second."""

_spent_ns: dict[str, int] = {}
_inside_ns: list[int] = []


def watch(owner: Any, name: str, part: str) -> None:
    """Count the CPU time of a method, without that of other parts inside."""
    inner = getattr(owner, name)

    def watched(*arguments: Any, **keywords: Any) -> Any:
        began_ns = time.thread_time_ns()
        _inside_ns.append(0)
        try:
            return inner(*arguments, **keywords)
        finally:
            took_ns = time.thread_time_ns() - began_ns
            _spent_ns[part] = _spent_ns.get(part, 0) + took_ns - _inside_ns.pop()
            if _inside_ns:
                _inside_ns[-1] += took_ns

    setattr(owner, name, watched)


def watch_all() -> None:
    """Watch the parts of the collector's work."""
    from gpuscope._collecting import batch_builder, collector, intake, resolve
    from gpuscope._collecting.aggregation import metrics, statistics
    from gpuscope.exporters._encoding import otlp_bytes

    for owner, name, part in (
        (collector.Collector, "_pass", "waking up"),
        (collector.Collector, "_breathe", "waking up"),
        (collector.Collector, "_prepare", "following the program"),
        (collector.Collector, "_export", "handing on"),
        (intake.Intake, "slice", "draining"),
        (resolve.Resolver, "accept", "draining"),
        (resolve.Resolver, "collect", "asking the GPU"),
        (intake.Intake, "_add_rows", "packing"),
        (batch_builder.BatchBuilder, "finish", "making columns"),
        (statistics.StageStatistics, "add", "summary"),
        (metrics.StageMetrics, "add", "metrics"),
        (otlp_bytes.SpanEncoder, "prepare", "encoding"),
        (otlp_bytes.SpanEncoder, "join", "encoding"),
    ):
        watch(owner, name, part)


def request() -> Callable[[], Any]:
    """Return what runs a request of seven stages."""
    if has_cuda():
        return pipeline.staged(pipeline.steps())
    import numpy as np

    _fake_gpu.install()
    source, target, small = np.ones(400_000), np.ones(400_000), np.ones((64, 64), np.float32)

    def work(_: Any) -> None:
        for _ in range(3):
            np.add(source, 1.0, out=target)

    functions = {name: work if name == "inference" else lambda _: small @ small for name in pipeline.NAMES}
    return pipeline.staged(functions)


def loop(run: Callable[[], Any], seconds: float, *, paced: bool) -> int:
    clock, requests = time.perf_counter, 0
    now_s = next_s = clock()
    deadline_s = now_s + seconds
    while now_s < deadline_s:
        run()
        requests += 1
        now_s = clock()
        next_s = max(next_s + 1 / REQUESTS_A_SECOND, now_s)
        if paced:
            time.sleep(next_s - now_s)
    return requests


def measure(way: str, endpoint: str, seconds: float, *, by_part: bool) -> dict[str, Any]:
    from _tail_worker import provider as provider_of

    import gpuscope

    run, provider = request(), None
    if way == "application":
        from opentelemetry import trace

        provider = provider_of("background", endpoint)
        trace.set_tracer_provider(provider)
    gpuscope.enable(exporters=WAYS[way], otlp_base_endpoint=endpoint, schedule_delay_s=1.0)
    if by_part:
        watch_all()
    paced = not has_cuda()
    loop(run, 2.0, paced=paced)
    assert gpuscope.flush(60)
    _spent_ns.clear()
    before = thread_cpu_ns()
    stages = loop(run, seconds, paced=paced) * pipeline.STAGES_A_REQUEST
    assert gpuscope.flush(60)
    spent = {name: ns - before.get(name, 0) for name, ns in thread_cpu_ns().items()}
    statistics = gpuscope.statistics()
    assert statistics.exported == statistics.recorded, statistics
    assert not statistics.untimed, statistics
    assert statistics.exporters == (way,), statistics
    return {
        "stages_a_second": stages / seconds,
        "total": sum(spent.values()) / 1000 / stages,
        "threads": {name: ns / 1000 / stages for name, ns in spent.items()},
        "parts": {name: ns / 1000 / stages for name, ns in _spent_ns.items()},
    }


def main() -> None:
    way, endpoint, seconds, by_part = sys.argv[1:]
    print(json.dumps(measure(way, endpoint, float(seconds), by_part=by_part == "1")))


if __name__ == "__main__":
    main()
