"""
Makes the page of figures, and the README's table, of `results/`: none of them is typed by hand.

`python benchmarks/figures.py` writes `figures.md` and prints the README's table; a test compares both with what is
there.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
FLOOR = "floor: "


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def us(cases: dict[str, list[Any]], name: str) -> float:
    """Median microseconds per iteration of a case, with the empty loop subtracted."""
    loop = median(sample[0] for sample in cases["loop"])
    return (median(sample[0] for sample in cases[name]) - loop) / 1000


def device(result: Any) -> str:
    name = result["machine"]["device"]["devices"][0].split(",")[0]
    return f"{name}, Python {result['machine']['python']}, PyTorch {result['machine']['packages']['torch']}"


def cost(hot: Any) -> list[str]:
    gpu, host = hot["sections"]["gpu"]["cases"]["1 default"], hot["sections"]["host"]["cases"]["1 host"]
    idle, absent = hot["sections"]["idle"]["cases"]["1 host"], hot["sections"]["absent"]["cases"]["1 host"]
    floor = min(us(gpu, name) for name in gpu if name.startswith(FLOOR))
    alone = us(gpu, "stage, decorator"), us(gpu, "stage, with")
    if "chain, with work" in gpu:  # What is enqueued in them is taken off.
        alone = (
            us(gpu, "decorator, with work") - us(gpu, "two enqueued, one by a call"),
            us(gpu, "with, with work") - us(gpu, "two enqueued"),
        )
    plain = us(idle, "plain call")
    rows = [
        ("`GPUSCOPE` unset: a decorated function / a `with` block", 0.0, us(absent, "stage, with")),
        ("`GPUSCOPE=idle`", us(idle, "stage, decorator") - plain, us(idle, "stage, with")),
        ("on, with GPU events", *alone),
        ("on, host only", us(host, "stage, decorator"), us(host, "stage, with")),
    ]
    lines = [f"| calling thread, µs per stage ({device(hot)}) | decorator | `with` |", "|---|---:|---:|"]
    lines += [f"| {text} | {first:.2f} | {second:.2f} |" for text, first, second in rows]
    naive = us(gpu, "naive: new events, SDK span, NVTX")
    lines += [
        f"| for comparison: a bare pair of CUDA events, nothing else, by the cheapest route | {floor:.2f} | |",
        f"| new events, an OpenTelemetry SDK span as current and NVTX by hand | | {naive:.2f} |",
        f"| an OpenTelemetry SDK span as current | | {us(host, 'SDK span as current'):.2f} |",
    ]
    return lines


def tail(result: Any) -> list[str]:
    service = f"a launch-bound ResNet-50 service, batch 1, 7 stages per request ({device(result)})"
    lines = [
        f"| {service} | p50 µs | p90 µs | p99 µs | p99 change | background µs per stage |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in result["summary"].items():
        change = f"{(row['p99 ratio'] - 1) * 100:+.0f} %" if "p99 ratio" in row else ""
        figures = " | ".join(f"{row[share]:,.0f}" for share in ("p50", "p90", "p99"))
        lines.append(f"| {name} | {figures} | {change} | {row['background_us']:.1f} |")
    return lines


def clock(result: Any) -> list[str]:
    goals = {goal["text"]: goal["value"] for goal in result["goals"]}
    durations = goals["share of durations within 5 µs or 1 %"]
    places = goals["share of placements within the uncertainty + 20 µs"]
    names = ("one stream", "three at once")
    close = {name: goals[f"share of durations within 2 µs or 1 %, {name}"] for name in names}
    longer = sorted(result["differences"]["duration_ns"])
    middle, most = longer[len(longer) // 2] / 1000, longer[int(len(longer) * 0.99)] / 1000
    text = (
        f"GPU times against CUPTI's over {goals['minutes covered']:.1f} minutes and {len(longer):,} stages "
        f"({device(result)}): {places:.1%} of the placements within the exported uncertainty plus 20 µs; a stage is "
        f"longer than the kernel in it by {middle:.1f} µs (median; p99 {most:.1f} µs), after what its two events were "
        f"measured to take, {result['event_cost_ns'] / 1000:.1f} µs, was taken off; {durations:.1%} of the durations "
        f"agree within 5 µs or 1 %, and within 2 µs or 1 % {close['one stream']:.1%} on one stream and "
        f"{close['three at once']:.1%} with three streams at work."
    )
    return [text]


def busy(*results: Any) -> list[str]:
    """Where the stream was asked 200 times a second; the median over the programs of what that costs."""
    lines = [
        f"| program ({device(results[0])}) | streams had work, % of the times asked | CUPTI saw kernels or copies, % |",
        "|---|---:|---:|",
    ]
    programs = {name: each for result in results for name, each in result["results"].items() if each["shares"]}
    for name, each in programs.items():
        share = each["shares"]["200.0"]
        lines.append(f"| {name} | {100 * share['sampled']:.1f} | {100 * share['cupti']:.1f} |")
    cost = {goal["text"]: goal["value"] for goal in results[0]["goals"]}
    p50, p99 = (next(value for text, value in cost.items() if text.startswith(name)) for name in ("p50", "p99"))
    text = (
        f"A request with 200 questions a second over one without: p50 {p50:.4f}, p99 {p99:.3f}, medians over the first "
        f"{len(results[0]['results'])} programs. During copies from and to pageable memory a stream has "
        "no work for most of the time, because the host's thread fills buffers; CUPTI has them from beginning to end."
    )
    return [*lines, "", text]


def verdicts(result: Any) -> list[str]:
    rows = result["rows"]
    programs, wrong = len({row["case"] for row in rows}), sum(row["said"] != row["expected"] for row in rows)
    text = (
        f"{programs} programs whose bottleneck is known by construction, judged from records and by the deep look "
        f"({device(result)}): {wrong} of {len(rows)} answers wrong."
    )
    return [text]


def overlapped(result: Any) -> list[str]:
    ways = ["sequential", "deque", "overlap", "overlap, graph"]
    lines = [
        f"| ViT-B/16, ms per step ({device(result)}) | GPU | host work | {' | '.join(ways)} |",
        f"|---|---:|---:{'|---:' * len(ways)}|",
    ]
    for name, case in result["cases"].items():
        steps = [f"{median(sample['step_ms'] for sample in case['raw'][way]):.2f}" for way in ways]
        batch, times = name.partition(",")[0], f"{case['gpu_ms']:.2f} | {case['post_ms']:.2f}"
        lines.append(f"| {batch} | {times} | {' | '.join(steps)} |")
    return lines


def copies(result: Any) -> list[str]:
    def rate(direction: str, way: str) -> str:
        return f"{median(result['raw'][direction]['6 MB'][way]):.1f}"

    pageable = next(name for name in result["raw"]["H2D"]["6 MB"] if "pageable" in name)
    text = (
        f"Copies of 6 MB ({device(result)}), GB/s: to the GPU {rate('H2D', 'PinnedBuffer')} through `PinnedBuffer`, "
        f"{rate('H2D', 'pinned copy_')} by a bare `copy_` from pinned memory, {rate('H2D', pageable)} by `.to()`; back "
        f"{rate('D2H', 'PinnedBuffer')}, {rate('D2H', 'pinned copy_')}, and {rate('D2H', '.cpu()')} by `.cpu()`."
    )
    return [text]


def service(result: Any) -> list[str]:
    model = f"FastAPI, ViT-B/16, 7 stages per request ({device(result)})"
    lines = [
        f"| {model} | requests per second | change | p50 ms at six tenths of that | p99 ms | change |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for way, measured in result["ways"].items():
        processes = measured["processes"]
        kind = way if processes == 1 else f"{processes} {way}"
        for name, row in measured["summary"].items():
            figures = ("requests a second", "p50 ms", "p99 ms")
            rate, p50, p99 = (f"{row[figure]:,.1f}" for figure in figures)
            more, longer = (
                f"{(row[f'{figure}, ratio'] - 1) * 100:+.1f} %" if f"{figure}, ratio" in row else ""
                for figure in ("requests a second", "p99 ms")
            )
            lines.append(f"| {kind}, {name} | {rate} | {more} | {p50} | {p99} | {longer} |")
    return lines


def graphs(result: Any) -> list[str]:
    def replay(name: str) -> list[float]:
        return [median(one[i] for one in result["costs"][name]) for i in (0, 1)]

    host, gpu = replay("plain")
    lines = [
        f"| a graph of 40 kernels, µs per replay ({device(result)}) | GPU | more | launch | more |",
        "|---|---:|---:|---:|---:|",
        f"| as it is | {gpu:.1f} | | {host:.1f} | |",
    ]
    rows = {
        "recorded, no stage inside": "0 stages, recording on",
        "4 stages inside": "4 stages, recording on",
        "16 stages inside": "16 stages, recording on",
        "16, while nothing is recorded": "16 stages, recording off",
        "16, `GPUSCOPE_GRAPH_STAGES=inline`": "16 stages inline, recording on",
        "16 pairs of PyTorch's external events, unread": "16 pairs of events",
    }
    for text, name in rows.items():
        own = replay(name)
        lines.append(f"| {text} | {own[1]:.1f} | {own[1] - gpu:+.1f} | {own[0]:.1f} | {own[0] - host:+.1f} |")
    kinds = {"stages": "beside", "with `inline`": "inline", "pairs of external events": "pairs of events"}
    longer = {text: _longer(result, kind) for text, kind in kinds.items()}
    told = ", ".join(f"{text} {middle:.1f} (p99 {most:.1f})" for text, (middle, most) in longer.items())
    right, replays, mixed = (sum(rate[what] for rate in result["rates"]) for what in ("right", "replays", "mixed"))
    first = sorted(rate["first_longer_us"] for rate in result["rates"])
    crowd = {one["graphs"]: one["lengths_ns"] for one in result["at_once"]}
    errors = ", ".join(f"{count}: {_error(crowd, count, 'beside')}" for count in crowd)
    inline = ", ".join(f"{count}: {_error(crowd, count, 'inline')}" for count in crowd)
    text = (
        "Excess over the length of the kernels inside, by CUPTI's timestamps, median in µs: "
        f"{told}. A stage that begins a graph begins with its launch, here {first[0]:.0f} to {first[-1]:.0f} µs early. "
        f"At 100, 1,000 and 5,000 replays per second {right:,} of {replays:,} replays have the times of their stages; "
        f"{mixed} intervals are of two replays. With several graphs at once, 99 of 100 stages differ from their usual "
        f"length by at most this many µs, by the number of graphs: {errors}; with `inline` {inline}."
    )
    return [*lines, "", text]


def _longer(result: Any, kind: str) -> tuple[float, float]:
    rows = [row for one in result["differences"] if kind in one["what"] for row in one["length_ns"]]
    values = sorted(value / 1000 for row in rows for value in row[1:])
    return median(values), values[int(len(values) * 0.99)]


def _error(crowd: dict[int, Any], count: int, kind: str) -> str:
    alone = median(crowd[1][kind])
    values = sorted(abs(length - alone) / 1000 for length in crowd[count][kind])
    return f"{values[int(len(values) * 0.99)]:.1f}"


def unmet(results: list[Any]) -> list[str]:
    """Every goal that a run did not meet: what was measured, and what the goal is."""
    lines = ["Goals that these runs did not meet:", ""]
    for result in results:
        for goal in result["goals"]:
            if not goal["met"]:
                word = "at least" if goal["at_least"] else "at most"
                lines.append(
                    f"* {goal['text']}: {goal['value']:.4g}{goal['unit']} ({word} {goal['limit']:g}{goal['unit']})"
                )
    return lines


HEAD = """# What it costs, and what it gains

Made of the files in [`results/`](results) by `figures.py`; [how each was measured](README.md). Read `plain again` and
`off again` first: each is the same program a second time, so its difference is this machine's noise. Machines differ:
on that of the first table, a function that returns an empty context manager takes 0.2 µs. Since these runs the
collector has become several times cheaper, and neighbouring stages share events. The newer runs, from a slower host,
are in `results/*_slow_host.json`."""


def readme() -> str:
    """The README's table, in Markdown."""
    return "\n".join(cost(load("hot_path")))


def page() -> str:
    """The page of figures, in Markdown."""
    hot, latency, times, judged = load("hot_path"), load("tail"), load("clock"), load("verdicts")
    loops, moved, served, inside = load("overlap"), load("copies"), load("service"), load("graphs")
    sections = {
        "The calling thread": cost(hot),
        "The latency of a service": tail(latency),
        "A web service": service(served),
        "GPU times": clock(times),
        "Verdicts": verdicts(judged),
        "Busy": busy(load("busy")),
        "CUDA graphs": graphs(inside),
        "Overlap": overlapped(loops),
        "Pinned memory": copies(moved),
        "Missed goals": unmet([hot, latency, served, times, judged, inside, loops, moved]),
    }
    parts = [f"## {title}\n\n" + "\n".join(lines) for title, lines in sections.items()]
    return "\n\n".join([HEAD, *parts]) + "\n"


if __name__ == "__main__":
    (RESULTS.parent / "figures.md").write_text(page(), encoding="utf-8")
    print(readme())
