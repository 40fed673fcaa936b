"""
What a report costs: reading a recording of 100,000 stages, its figures and verdicts, and each file for viewers.

Records the stages with the real exporter and a fake GPU, then times each step of `gpuscope report` on its own. In CPU
time, because every step is one thread, and others may use the machine.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from _common import Goal, arguments, interleave, median, save, table

if TYPE_CHECKING:
    from collections.abc import Callable

INNER = ("prep", "h2d", "preprocess", "infer", "d2h", "post")


def main() -> None:
    options = arguments(__doc__).parse_args()
    stages, rounds = (7_000, 2) if options.quick else (100_000, 3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl"
        stages = record(path, stages)
        size_mb = path.stat().st_size / 1e6
        print(f"{stages:,} stages, {size_mb:,.0f} MB")
        raw = interleave(steps(path), rounds)
    rows = [[name, median(seconds), min(seconds), max(seconds)] for name, seconds in raw.items()]
    print(table(["step", "median s", "least", "most"], rows))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"peak memory of this process: {peak_mb:,.0f} MB")
    goals = [
        Goal("reading, seconds for 100,000 stages", median(raw["read"]) / stages * 1e5, 5, " s"),
        Goal("figures, seconds for 100,000 stages", median(raw["figures"]) / stages * 1e5, 1, " s"),
    ]
    save("report", options.out, goals=goals, stages=stages, size_mb=size_mb, peak_mb=peak_mb, raw=raw)


def record(path: Path, stages: int) -> int:
    """Record requests of seven stages each, six with GPU times, and return how many stages there are."""
    import gpuscope
    from gpuscope.testing import FakeDevice, ManualClock, capture

    clock = ManualClock()
    device = FakeDevice(clock, completes=True, delay_ns=20_000)
    settings = {"exporters": "file", "file": str(path), "file_max_bytes": 2**40, "nvtx": None}
    with capture(device=device, clock=clock, **settings) as spans:
        for number in range(stages // 7):
            with gpuscope.stage("request", attributes={"model": "vit"}) as request:
                request.set_attribute("batch_size", 1 + number % 8)
                for name in INNER:
                    with gpuscope.stage(name):
                        clock.advance(0.0005)
            if number % 500 == 0:
                gpuscope.flush(30)
                spans.clear()
        gpuscope.flush(30)
    return stages // 7 * 7


def steps(path: Path) -> dict[str, Callable[[], float]]:
    """Return what is timed; each returns its seconds."""
    from gpuscope.analysis.compare import compare
    from gpuscope.analysis.figures import figures
    from gpuscope.analysis.jaeger import write_jaeger
    from gpuscope.analysis.perfetto import write_perfetto
    from gpuscope.analysis.read import read
    from gpuscope.analysis.timeline import write_html
    from gpuscope.analysis.verdict import judge

    recording = read([path])
    findings = judge(recording)
    actions = {
        "read": partial(read, [path]),
        "figures": partial(figures, recording),
        "verdicts": partial(judge, recording),
        "compare": partial(compare, recording, recording),
        "html": partial(write_html, recording, path.with_suffix(".html"), findings),
        "perfetto": partial(write_perfetto, recording, path.with_suffix(".perfetto.json")),
        "jaeger": partial(write_jaeger, recording, path.with_suffix(".jaeger.json")),
    }
    return {name: partial(seconds, action) for name, action in actions.items()}


def seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


if __name__ == "__main__":
    sys.exit(main())
