"""
What metrics cost the background: the collector's work on a request of seven stages, with metrics and without.

On a fake GPU, with one collector per case, stepped by hand, interleaved. In thread time: the least and the median of
the rounds.
"""

from __future__ import annotations

import time

from _common import Goal, arguments, interleave, median, save, table

import gpuscope
from gpuscope import _runtime
from gpuscope._settings.config import Config
from gpuscope.testing import FakeDevice, ManualClock

REQUESTS = 200
STAGES = ("load", "decode", "resize", "copy", "infer", "answer")


def worker(metrics: str):
    """Return a function that records requests and returns what they cost the collector, in µs per stage."""

    def work() -> float:
        clock = ManualClock()
        config = Config(mode="on", exporters=("none",), metrics=metrics, queue_size=100_000)
        with _runtime.period(config, device=FakeDevice(clock, completes=True), clock=clock) as engine:
            engine.recorder.accept(engine.queue)
            collector = engine.collector
            collector._breathe = lambda: None
            collector.step()
            best = []
            for _ in range(5):
                for _ in range(REQUESTS):
                    with gpuscope.stage("request"):
                        for name in STAGES:
                            with gpuscope.stage(name):
                                pass
                before = time.thread_time_ns()
                collector._drain()
                best.append((time.thread_time_ns() - before) / 1e3 / REQUESTS / (1 + len(STAGES)))
                collector.step()
        return min(best)

    return work


def main() -> None:
    options = arguments(__doc__).parse_args()
    raw = interleave({name: worker(name) for name in ("none", "sdk")}, 3 if options.quick else 15)
    rows = [[f"metrics {name}", min(values), median(values)] for name, values in raw.items()]
    print(table(["collector, µs per stage", "least", "median"], rows))
    cost = median([after - before for before, after in zip(raw["none"], raw["sdk"], strict=True)])
    save("metrics", options.out, goals=[Goal("metrics, µs per stage", cost, 0.5, " µs")], cost_us=cost, raw=raw)


if __name__ == "__main__":
    main()
