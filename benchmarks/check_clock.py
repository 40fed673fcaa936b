"""
Whether GPU times stay right while a service runs: stages against CUPTI's timestamps of their kernels.

Runs stages with known kernels for seven minutes, on one stream and on three at once in turns, with recording on
throughout and CUPTI on for one second in every ten. Exits with 1 if too many durations or placements are off by more
than is allowed.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from _common import Goal, arguments, has_cuda, median, percentile, save, table

BURST, BURSTS = 48, 8  # stages, and how often in a window
CYCLES = (150_000, 600_000, 2_000_000)  # about 0.08, 0.3 and 1 ms
LENGTHS = (("below 0.2 ms", 0, 200_000), ("below 0.7 ms", 200_000, 700_000), ("longer", 700_000, 10**12))
TITLE = "gpuscope's GPU times against CUPTI's"


def windows(minutes: float, period_s: float, window_s: float) -> tuple[Any, list[dict[str, Any]], int | None]:
    """Run; return the captured spans, for each window its kernels by stage number, and what events take."""
    import torch
    from _cupti import Spins, Window, pairs

    import gpuscope.testing

    devices = range(torch.cuda.device_count())
    all_streams = [torch.cuda.Stream(device) for device in devices for _ in range(3)]
    spins, found = Spins(), []
    start = time.monotonic()
    with gpuscope.testing.capture(interval_s=0.1) as spans:
        while time.monotonic() - start < minutes * 60:
            began, indices = time.monotonic(), []
            streams = all_streams[: 1 if len(found) % 2 else None]
            window = Window()
            with window:
                for _ in range(BURSTS):
                    indices += [spins.launch(streams[i % len(streams)], CYCLES[i % 7 % 3]) for i in range(BURST)]
                    for stream in streams:
                        stream.synchronize()
                    time.sleep(window_s / BURSTS)
            try:
                kernels, late = pairs(window, indices)
                found.append(
                    {"at_s": began - start, "streams": len(streams), "kernels": kernels, "late": late, "problem": None}
                )
            except ValueError as problem:
                found.append(
                    {"at_s": began - start, "streams": len(streams), "kernels": {}, "late": 0, "problem": str(problem)}
                )
            print(f"{(began - start) / 60:5.2f} min: {len(found[-1]['kernels'])} stages", file=sys.stderr, flush=True)
            while time.monotonic() - began < period_s:
                spins.launch(all_streams[spins.launched % len(all_streams)], CYCLES[0])
                time.sleep(0.05)
        for stream in all_streams:
            stream.synchronize()
        event_cost_ns = gpuscope.statistics().event_cost_ns
    return spans, found, event_cost_ns


def compare(spans: Any, found: list[dict[str, Any]]) -> tuple[list[tuple[float, Any]], int]:
    """(minutes since the start, difference) for all stages of all windows; and how many the host was late for."""
    from _cupti import differences

    kernels = {index: kernel for window in found for index, kernel in window["kernels"].items()}
    if not kernels:
        raise SystemExit(f"no window could be used: {[window['problem'] for window in found]}")
    times = {index: window["at_s"] / 60 for window in found for index in window["kernels"]}
    held, left_late = differences(list(spans), kernels)
    missing = len(kernels) - len(held) - left_late
    if missing:
        raise SystemExit(f"{missing} of {len(kernels)} stages have no GPU span")
    late = left_late + sum(window["late"] for window in found)
    return [(times[difference.index], difference) for difference in held], late


def plot(held: list[tuple[float, Any]], minutes: float) -> str:
    from _plot import Panel, svg

    by_window: dict[float, list[Any]] = {}
    for at, difference in held:
        by_window.setdefault(at, []).append(difference)
    shown = [(at, d) for at, ds in by_window.items() for d in ds[:: max(1, len(ds) // 40)]]
    allowed = [(at, median([d.uncertainty_ns for d in ds]) / 1000 + 20) for at, ds in by_window.items()]
    placement = Panel(
        "placement: stage minus kernel",
        "µs",
        {
            name: [(at, getattr(d, key) / 1000) for at, d in shown]
            for name, key in (("start", "start_ns"), ("end", "end_ns"))
        },
        {"uncertainty + 20 µs": allowed, "": [(at, -value) for at, value in allowed]},
    )
    duration = Panel(
        "duration: stage minus kernel",
        "µs",
        {
            f"kernels {label}": [(at, d.duration_ns / 1000) for at, d in shown if low <= d.kernel_ns < high]
            for label, low, high in LENGTHS
        },
        {"5 µs": [(0, 5), (minutes, 5)], "-5 µs": [(0, -5), (minutes, -5)]},
    )
    return svg(TITLE, [placement, duration], minutes)


def show(held: list[tuple[float, Any]]) -> None:
    columns = {
        "start: stage minus kernel": [d.start_ns for _, d in held],
        "end: stage minus kernel": [d.end_ns for _, d in held],
        "exported uncertainty": [d.uncertainty_ns for _, d in held],
        "duration: stage minus kernel": [d.duration_ns for _, d in held],
    }
    for label, low, high in LENGTHS:
        columns[f"duration, kernels {label}"] = [d.duration_ns for _, d in held if low <= d.kernel_ns < high]
    rows = []
    for text, values in columns.items():
        ordered = sorted(value / 1000 for value in values)
        rows.append([text, *(percentile(ordered, share) for share in (0, 0.01, 0.5, 0.99, 1))])
    print(table(["µs", "least", "p1", "p50", "p99", "most"], rows))


def share(some: list[Any]) -> float:
    return sum(d.is_close_duration() for d in some) / max(1, len(some))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=7)
    parser.add_argument("--period", type=float, default=10, help="seconds from one window to the next")
    parser.add_argument(
        "--share", type=float, default=0.999, help="share of stages that must be right; the rest is for CUPTI's errors"
    )
    options = parser.parse_args()
    if options.quick:
        options.minutes, options.period = 0.25, 4
    if not has_cuda():
        print("check_clock needs a CUDA device: nothing to check here.")
        return
    spans, found, event_cost_ns = windows(options.minutes, options.period, 1.0)
    held, late = compare(spans, found)
    show(held)
    problems = [window["problem"] for window in found if window["problem"]]
    print(
        f"{len(held)} stages in {len(found)} windows; {late} left out because the host was late; "
        f"problems: {problems or 'none'}"
    )
    print(f"a pair of events takes {event_cost_ns} ns of a busy GPU's time")
    streams = {index: window["streams"] for window in found for index in window["kernels"]}
    alone = [d for _, d in held if streams[d.index] == 1]
    together = [d for _, d in held if streams[d.index] > 1]
    durations = sum(d.is_right_duration() for _, d in held) / len(held)
    places = sum(d.is_right_place() for _, d in held) / len(held)
    goals = [
        Goal("share of durations within 5 µs or 1 %", durations, options.share, at_least=True),
        *(
            Goal(f"share of durations within 2 µs or 1 %, {name}", share(some), options.share, at_least=True)
            for name, some in (("one stream", alone), ("three at once", together))
        ),
        Goal("share of placements within the uncertainty + 20 µs", places, options.share, at_least=True),
        Goal("minutes covered", held[-1][0] - held[0][0], options.minutes - 2 * options.period / 60, at_least=True),
    ]
    columns = {key: [d.as_dict()[key] for _, d in held] for key in held[0][1].as_dict()}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "clock.svg").write_text(plot(held, options.minutes))
    save("clock", options.out, goals=goals, unit="ns", windows=len(found), late=late, problems=problems,
         event_cost_ns=event_cost_ns, streams=[streams[d.index] for _, d in held],
         minutes=[round(at, 3) for at, _ in held], differences=columns)  # fmt: skip
    sys.exit(0 if all(goal.met for goal in goals) else 1)


if __name__ == "__main__":
    main()
