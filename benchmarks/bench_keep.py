"""
What keeping the slow ones costs the background, beside exporting all; and whether it keeps what it says.

Requests of seven stages with GPU spans, on the driver in C of `_fake_gpu`, to a receiver of OTLP of its own process.
One request in a hundred takes longer than the rule allows, by construction. Each way is a process of its own; they take
turns. A figure is the CPU time of all threads but the program's, divided by the stages. The last process keeps all
batches that it exports in memory, and looks whether each slow request is there, whole, with its GPU spans. Exits with 1
if a goal is missed.
"""

from __future__ import annotations

import contextvars
import json
import math
import random
import time
from collections import Counter, deque
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _fake_gpu
from _common import Goal, arguments, child, interleave, median, save, table
from _receiver import Receiver
from _tail_worker import thread_cpu_ns

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

SLOW_S, SHARE, SLOW_SHARE = 0.3, 0.01, 0.01
WAYS = {"all": "", "keep": f"slower=250ms, p99, error, share={SHARE}", "none": "slower=1h"}
"""By name, what `keep` is; `none` keeps nothing, and shows what deciding costs alone."""
CHECKED = f"slower=250ms, share={SHARE}"
AT_ONCE = 64
"""Requests that run at the same time: about 20 ms each, so that some are in two batches of the collector."""
INNER = ("decode", "preprocess", "h2d", "infer", "d2h", "postprocess")
STAGES = 1 + len(INNER)
REQUESTS_A_SECOND = 3_000


class Keeps:
    """An exporter that keeps what it is given."""

    name = "keeps"

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def export(self, batch: Any, delivery: Any) -> None:
        self.batches.append(batch)
        delivery.settle(delivery.stages)

    def flush(self, timeout_s: float) -> bool:
        return timeout_s >= 0

    def shutdown(self, timeout_s: float) -> None:
        pass

    def column(self, name: str) -> NDArray[np.uint64]:
        import numpy as np

        return np.concatenate([getattr(batch, name) for batch in self.batches])


def request(is_slow: bool, slow: list[int]) -> Iterator[None]:
    """Run a request of seven stages; a slow one waits in between, by turns."""
    import gpuscope

    with gpuscope.stage("request"):
        if is_slow:
            slow.append(gpuscope.here().trace_id & (1 << 64) - 1)
        until_s = time.perf_counter() + SLOW_S
        for name in INNER:
            with gpuscope.stage(name):
                pass
            yield
        while is_slow and time.perf_counter() < until_s:
            yield


def serve(requests: int, at_once: int) -> list[int]:
    """
    Run requests at an even pace, in turns of a stage if there are several at once.

    Returns the lower halves of the trace ids of those that are slow by construction.
    """
    draw, clock = random.Random(7), time.perf_counter
    slow: list[int] = []
    running: deque[tuple[contextvars.Context, Iterator[None]]] = deque()
    next_s, begun, turns = clock(), 0, 0
    while running or begun < requests:
        while len(running) < at_once and begun < requests:
            running.append((contextvars.Context(), request(draw.random() < SLOW_SHARE, slow)))
            begun += 1
        context, steps = running.popleft()
        if context.run(next, steps, True) is None:
            running.append((context, steps))
        turns += 1
        if turns % STAGES == 0:
            now_s = clock()
            next_s = max(next_s + 1 / REQUESTS_A_SECOND, now_s - 0.05)
            if next_s > now_s:
                time.sleep(next_s - now_s)
    return slow


def measure(way: str, endpoint: str, requests: int) -> dict[str, Any]:
    """Return what the background spends per stage."""
    import gpuscope

    _fake_gpu.install()
    gpuscope.enable(
        exporters="otlp",
        keep=WAYS[way],
        otlp_base_endpoint=endpoint,
        gpu_spans="all",
        queue_size=65_536,
        warmup=0,
        nvtx=False,
    )
    serve(requests // 10, AT_ONCE)
    assert gpuscope.flush(60)
    recorded, before = gpuscope.statistics().recorded, thread_cpu_ns()
    serve(requests, AT_ONCE)
    assert gpuscope.flush(60)
    spent = {name: ns - before.get(name, 0) for name, ns in thread_cpu_ns().items()}
    account = gpuscope.statistics()
    stages = account.recorded - recorded
    assert stages == requests * STAGES, account
    assert not any((account.missing, account.pending, account.untimed)), account
    return {
        "total": sum(spent.values()) / 1000 / stages,
        "threads": {name: ns / 1000 / stages for name, ns in spent.items()},
        "exported": account.exported / account.recorded,
        "kept": account.kept,
    }


def check(requests: int) -> dict[str, Any]:
    """Return what became of slow requests and of others."""
    from gpuscope import _runtime
    from gpuscope._settings.config import Config

    _fake_gpu.install()
    keeps = Keeps()
    settings = {
        "exporters": "none",
        "keep": CHECKED,
        "gpu_spans": "all",
        "queue_size": 65_536,
        "warmup": 0,
        "nvtx": False,
    }
    with _runtime.period(Config().changed(mode="on", **settings), exporters=(keeps,)) as engine:
        slow = set(serve(requests, AT_ONCE))
        assert engine.flush(60)
        account = engine.statistics()
    assert not any((account.missing, account.pending, account.untimed)), account
    traces, has_gpu = keeps.column("trace_low").tolist(), (keeps.column("gpu_span_id") != 0).tolist()
    rows = Counter(traces)
    with_gpu = Counter(trace for trace, has in zip(traces, has_gpu, strict=True) if has)
    whole = {trace for trace, count in rows.items() if count == STAGES == with_gpu[trace]}
    least = round(SHARE * 2**64)
    by_share = sum(trace < least for trace in rows)
    return {
        "requests": requests,
        "slow": len(slow),
        "slow_and_whole": len(slow & whole),
        "kept": len(rows),
        "not_whole": len(rows) - len(whole),
        "by_share": by_share,
        "neither": sum(trace >= least and trace not in slow for trace in rows),
        "deviations": abs(by_share - SHARE * requests) / math.sqrt(requests * SHARE * (1 - SHARE)),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=40_000, help="of each round")
    parser.add_argument("--checked", type=int, default=100_000, help="requests of which it is looked what is kept")
    parser.add_argument("--way", nargs=3, metavar=("WAY", "URL", "REQUESTS"), help="measure one here; print its JSON")
    options = parser.parse_args()
    if options.way:
        way, url, requests = options.way
        print(json.dumps(check(int(requests)) if way == "check" else measure(way, url, int(requests))))
        return
    if options.quick:
        options.rounds, options.requests, options.checked = 1, 2_000, 4_000
    variables = {"GPUSCOPE": "idle", "OTEL_SERVICE_NAME": "keep", "CUDA_VISIBLE_DEVICES": ""}
    with closing(Receiver()) as receiver:

        def turn(way: str, requests: int = options.requests) -> Any:
            return child([str(Path(__file__)), "--way", way, receiver.endpoint, str(requests)], variables)

        raw = interleave({way: lambda way=way: turn(way) for way in WAYS}, options.rounds, warmup=0)
        checked = turn("check", options.checked)
    rows = [
        [way, *(median([each[key] for each in results]) for key in ("total", "exported"))]
        for way, results in raw.items()
    ]
    print(table(["keep", "background, µs per stage", "share of stages exported"], rows))
    print(json.dumps(checked))
    ratio = median([kept["total"] / whole["total"] for kept, whole in zip(raw["keep"], raw["all"], strict=True)])
    goals = [
        Goal("background CPU per stage, of keeping over exporting all", ratio, 1.0, "x"),
        Goal("slow requests that were kept whole", checked["slow_and_whole"], checked["slow"], at_least=True),
        Goal("requests that were kept in part", checked["not_whole"], 0),
        Goal("standard deviations that the share is off", checked["deviations"], 4.0),
    ]
    save("keep", options.out, goals=goals, unit="us per stage", device="CPU, fake driver", rounds=raw, checked=checked)
    if not all(goal.met for goal in goals) and not options.quick:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
