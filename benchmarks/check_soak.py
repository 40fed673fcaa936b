"""
Whether gpuscope can be left on: 10 million stages in threads and in asyncio, with metrics, to a receiver of its own.

The memory of the process stays flat, every stage is exported or counted by reason, the receiver has what was exported,
and metrics arrive on time. The flight recorder is on, and stalls are looked for: none is said where there is none. On a
GPU each request launches work, so its stages have GPU times.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

from _common import Goal, arguments, has_cuda, save, table
from _receiver import Receiver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STAGES_A_REQUEST = 5
"""Those of `Program.request` and of `Program.request_async`."""
THREADS, TASKS = 4, 32
METRICS_EVERY_S = 5.0
STALL = "2s, 20x"
FLAT_MB = 10.0
BEHIND_S = 0.05
"""A thread that is further behind its schedule than this does not catch up, so that no burst follows a pause."""


class Program:
    """Requests as a service makes them: nested stages, attributes, a generator left early, an error now and then."""

    def __init__(self, work: Callable[[], object]) -> None:
        from gpuscope import stage

        self._stage, self._work = stage, work
        self.infer = stage("infer")(self._infer)
        self.tokens = stage("tokens")(self._tokens)

    def _infer(self) -> None:
        self._work()

    def _tokens(self) -> Iterator[int]:
        yield 1
        yield 2

    def request(self, number: int) -> None:
        """Five stages."""
        with self._stage("request", attributes={"model": "vit"}) as outer:
            outer.set_attribute("batch_size", number % 8)
            try:
                with self._stage("decode"):
                    int("a picture that cannot be read" if number % 1000 == 0 else "1")
            except ValueError:
                outer.set_attribute("failed", True)
            self.infer()
            for _ in self.tokens():
                break
            with self._stage("postprocess"):
                pass

    async def request_async(self, number: int) -> None:
        """Five stages that other requests come between."""
        with self._stage("request", attributes={"model": "vit"}) as outer:
            outer.set_attribute("prompt", "x" * (number % 512))
            with self._stage("decode"):
                await asyncio.sleep(0)
            self.infer()
            with self._stage("wait"):
                await asyncio.sleep(0)
            with self._stage("postprocess"):
                pass


class Pace:
    """Lets one request through at a time, so many per second; who is late goes at once, but catches up little."""

    def __init__(self, a_second: float) -> None:
        self._period_s, self._next_s = 1 / a_second, time.monotonic()

    def wait_s(self) -> float:
        """Return how long to wait, and count that request."""
        now = time.monotonic()
        self._next_s = max(self._next_s, now - BEHIND_S) + self._period_s
        return max(0.0, self._next_s - self._period_s - now)


def in_thread(program: Program, requests: int, pace: Pace) -> None:
    for number in range(requests):
        wait_s = pace.wait_s()
        if wait_s > 1e-3:  # Waits of less are saved up: none is as short as it is meant to be.
            time.sleep(wait_s)
        program.request(number)


def in_tasks(program: Program, requests: int, pace: Pace) -> None:
    async def task(share: int) -> None:
        for number in range(share):
            wait_s = pace.wait_s()
            if wait_s > 1e-3:
                await asyncio.sleep(wait_s)
            await program.request_async(number)

    async def every_task() -> None:
        await asyncio.gather(*(task(requests // TASKS) for _ in range(TASKS)))

    asyncio.run(every_task())


def work_on_gpu() -> Callable[[], object]:
    """A small kernel on the current stream, or nothing without a GPU."""
    if not has_cuda():
        return lambda: None
    import torch

    x = torch.ones(1024, device="cuda")
    return lambda: x.add_(1)


def rss_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def soak(stages: int, a_second: float) -> list[tuple[float, float]]:
    """Run it; return the memory of the process over time, as seconds and MB."""
    requests = stages // STAGES_A_REQUEST // 2  # Half in threads, half in asyncio.
    program, pace = Program(work_on_gpu()), a_second / STAGES_A_REQUEST / 2
    workers = [
        threading.Thread(target=in_thread, args=(program, requests // THREADS, Pace(pace / THREADS)))
        for _ in range(THREADS)
    ]
    workers.append(threading.Thread(target=in_tasks, args=(program, requests, Pace(pace))))
    began, memory = time.monotonic(), []
    for worker in workers:
        worker.start()
    for worker in workers:
        while worker.is_alive():
            worker.join(1)
            memory.append((round(time.monotonic() - began, 1), round(rss_mb(), 2)))
    return memory


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--stages", type=int, default=10_000_000)
    parser.add_argument(
        "--rate", type=float, default=20_000, help="stages per second, of all threads and tasks together"
    )
    options = parser.parse_args()
    if options.quick:
        options.stages = 300_000
    with ExitStack() as stack:
        receiver = stack.enter_context(closing(Receiver()))
        os.environ.update(
            GPUSCOPE="idle",
            OTEL_SERVICE_NAME="soak",
            OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint,
            OTEL_METRIC_EXPORT_INTERVAL=str(int(METRICS_EVERY_S * 1e3)),
        )
        import gpuscope

        flight = str(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "soak.flight")
        gpuscope.enable(exporters="otlp", flight=flight, stall=STALL)
        began = time.monotonic()
        memory = soak(options.stages, options.rate)
        ended = time.monotonic()
        complete = gpuscope.shutdown(30)
        received, metric_times = receiver.counts().get("soak", 0), receiver.metric_times()
    statistics = gpuscope.statistics()
    late = [mb for at, mb in memory if at >= memory[-1][0] / 2]
    moments = [began, *(at for at in metric_times if at < ended)]
    gap_s = max(b - a for a, b in zip(moments, [*moments[1:], ended], strict=True))
    print(statistics)
    rows = [[f"{at:.0f} s", mb] for at, mb in memory[:: max(1, len(memory) // 20)]]
    print(table(["at", "RSS, MB"], rows))
    accounted = statistics.exported + sum(statistics.dropped.values()) + sum(statistics.lost.values())
    goals = [
        Goal("stages recorded", statistics.recorded, options.stages * 0.999, at_least=True),
        Goal("memory over the last half, most less least", max(late) - min(late), FLAT_MB, " MB"),
        Goal("stages that are neither exported nor counted", statistics.recorded - accounted, 0),
        Goal("stages lost", sum(statistics.lost.values()), 0),
        Goal("host spans exported that did not arrive", max(0, statistics.exported - received), 0),
        Goal("false alarms of stalls", sum(statistics.stalls.values()), 0),
        Goal("longest time without metrics", gap_s, 1.5 * METRICS_EVERY_S, " s"),
    ]
    save(
        "soak", options.out, goals=goals, took_s=round(ended - began, 1), complete=complete, spans_received=received,
        recorded=statistics.recorded, exported=statistics.exported, dropped=statistics.dropped, lost=statistics.lost,
        untimed=statistics.untimed, stalls=statistics.stalls, metrics_received=len(metric_times),
        memory_mb=[[at, mb] for at, mb in memory],
    )  # fmt: skip
    sys.exit(0 if all(goal.met for goal in goals) else 1)


if __name__ == "__main__":
    main()
