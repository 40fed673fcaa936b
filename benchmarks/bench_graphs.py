"""
What stages inside a CUDA graph cost, and whether each replay has its own times.

A transformer block of 40 kernels is captured with 0, 4 and 16 stages inside, and with as many pairs of PyTorch's
external events. Replays of all are timed interleaved. Stages are held against CUPTI's timestamps of their kernels. At
100, 1,000 and 5,000 replays per second it counts which replays have inner times, and which intervals begin in one
replay and end in another. Last, several graphs are replayed at once.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
from _common import Goal, arguments, has_cuda, interleave, median, save, table
from _graph_cases import (
    KERNELS,
    LAYERS,
    REPLAY,
    Events,
    Spinning,
    block,
    block_with_events,
    graph_of,
    paced,
    recorder,
    recording,
    unmarked,
)
from _graph_times import (
    against_kernels,
    events_against_kernels,
    kernels_of_parts,
    share_close,
    show_differences,
    spread,
)

import gpuscope

STAGES = (4, 16)
PLACED = ("beside", "inline")
"""Where nodes stand, as `GPUSCOPE_GRAPH_STAGES` says."""
IN_A_ROW, BLOCKS = 10, 20
"""Replays between two readings: few enough for the launch queue, which record nodes fill as well. And readings."""
RATES = (100, 1_000, 5_000)
AT_ONCE = (1, 2, 4, 8)


# ---- what it costs


def timed(graph: Any, wanted: Any) -> tuple[float, float]:
    """Microseconds per replay on the host and on the GPU, for replays in a row in one stage."""
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    host, gpu = [], []
    with recorder(wanted):
        for _ in range(BLOCKS):
            torch.cuda.synchronize()
            with gpuscope.stage("row"):
                start.record()
                began = time.perf_counter_ns()
                for _ in range(IN_A_ROW):
                    graph.replay()
                host.append((time.perf_counter_ns() - began) / IN_A_ROW / 1000)
                end.record()
            torch.cuda.synchronize()
            gpu.append(start.elapsed_time(end) / IN_A_ROW * 1000)
    gpuscope.flush(5)
    return median(host), median(gpu)


def costs(rounds: int) -> dict[str, list[tuple[float, float]]]:
    from gpuscope import _runtime

    plain = block(16)  # While nothing is recorded a stage leaves no trace in a graph.
    events = {stages: block_with_events(stages)[0] for stages in STAGES}
    with recording("inline"):
        inline = {stages: block(stages) for stages in STAGES}
    with recording():
        wanted = _runtime.state.recorder
        cases = {"plain": partial(timed, plain, None), "plain again": partial(timed, plain, None)}
        for stages in (0, *STAGES):
            graph = block(stages)
            cases[f"{stages} stages, recording off"] = partial(timed, graph, None)
            cases[f"{stages} stages, recording on"] = partial(timed, graph, wanted)
        for stages in STAGES:
            cases[f"{stages} stages inline, recording on"] = partial(timed, inline[stages], wanted)
            cases[f"{stages} pairs of events"] = partial(timed, events[stages], None)
        return interleave(cases, rounds, warmup=2)


def show_costs(raw: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """Print the medians; return what each case adds to the GPU's time of a replay, in microseconds."""
    plain_host, plain_gpu = (median([one[i] for one in raw["plain"]]) for i in (0, 1))
    rows, added = [], {}
    for name, rounds in raw.items():
        host, gpu = (median([one[i] for one in rounds]) for i in (0, 1))
        added[name] = median([one[1] - plain[1] for one, plain in zip(rounds, raw["plain"], strict=True)])
        rows.append([name, host, host - plain_host, gpu, gpu - plain_gpu])
    print(table(["µs per replay", "host", "more", "GPU", "more"], rows))
    return added


# ---- whether each replay has its own times


def at_rate(rate: int, seconds: float, stages: int) -> dict[str, Any]:
    """How many of some seconds' replays have inner times, and how many intervals are of two replays."""
    import torch

    replays = int(rate * seconds)
    with recording() as columns:
        graph = block(stages)
        for _ in range(50):
            graph.replay()
        torch.cuda.synchronize()
        gpuscope.flush(5)
        columns.batches.clear()
        reached = paced(graph, rate, replays)
        torch.cuda.synchronize()
        gpuscope.flush(20)
        count, found = columns.replays()
        account = gpuscope.statistics().as_dict()
    inner = sorted(found.values(), key=lambda rows: rows[0, 0])
    whole = np.array([rows for rows in inner if len(rows) == stages])
    lengths = whole[..., 1] - whole[..., 0]
    usual = np.median(lengths, axis=0)
    # Stages follow each other without a gap, and replays do not overlap. So a time of another replay makes the stage
    # before or after it negative or, at either end of the graph, makes two replays overlap.
    mixed = lengths <= 0
    mixed[1:] |= whole[1:, :, 0] < whole[:-1, -1:, 1] - 2 * whole[1:, :, 2]
    longer = float(usual[0] - np.median(usual[stages // LAYERS :: stages // LAYERS])) / 1000
    right, lost = int((~mixed.any(axis=1)).sum()), {**account["dropped"], **account["lost"]}
    print(
        f"{rate:6d}/s, {stages} stages: reached {reached:,.0f}/s; {right} of {replays} replays have right inner times;"
    )
    print(f"        {int(mixed.sum())} mixed; lost {lost}; first stage {longer:+.1f} µs longer than those like it")
    return {
        "rate": rate,
        "stages": stages,
        "reached": reached,
        "replays": replays,
        "replay_stages": count,
        "with_inner": len(whole),
        "right": right,
        "mixed": int(mixed.sum()),
        "first_longer_us": longer,
        "usual_length_ns": usual.tolist(),
        "longest_ns": lengths.max(axis=0).tolist(),
        "account": account,
    }


# ---- several graphs at once


def wall_us(graphs: list[Any], streams: list[Any], wanted: Any) -> float:
    """Microseconds until graphs on as many streams are done."""
    import torch

    with recorder(wanted):
        torch.cuda.synchronize()
        began = time.perf_counter_ns()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream), gpuscope.stage(REPLAY):
                graph.replay()
        torch.cuda.synchronize()
        return (time.perf_counter_ns() - began) / 1000


def at_once(count: int, rounds: int) -> dict[str, Any]:
    """Graphs replayed at once: how long they take together, and the lengths of their stages."""
    import torch

    from gpuscope import _runtime

    streams = [torch.cuda.Stream() for _ in range(count)]
    pairs = [Events() for _ in range(count)]
    kinds = {
        "plain": [graph_of(Spinning(unmarked)) for _ in range(count)],
        "events": [graph_of(Spinning(events)) for events in pairs],
    }
    for events in pairs:
        events.pairs = events.pairs[-Spinning.STAGES :]
    for placed in PLACED:
        with recording(placed):
            kinds[placed] = [graph_of(Spinning(gpuscope.stage)) for _ in range(count)]
    lengths: dict[str, list[float]] = {kind: [] for kind in kinds}
    with recording() as columns:
        wanted = _runtime.state.recorder

        def run(kind: str) -> float:
            columns.batches.clear()
            took = wall_us(kinds[kind], streams, wanted if kind in PLACED else None)
            gpuscope.flush(5)
            if kind == "events":
                lengths[kind] += [length for events in pairs for length in events.lengths_ns()]
            for rows in columns.replays()[1].values():
                lengths[kind] += (rows[:, 1] - rows[:, 0]).tolist()
            return took

        raw = interleave({kind: partial(run, kind) for kind in kinds}, rounds, warmup=2)
    return {"graphs": count, "us": raw, "lengths_ns": lengths}


def show_at_once(crowds: list[dict[str, Any]]) -> None:
    rows = []
    for one in crowds:
        plain = median(one["us"]["plain"])
        for kind in ("events", *PLACED):
            lengths = np.array(one["lengths_ns"][kind]) / 1000
            row = [f"{one['graphs']} at once, {kind}", median(one["us"][kind]) / plain, *spread(lengths)]
            rows.append(row)
    print(table(["graphs", "time over plain", "stage, µs: least", "p1", "p50", "p99", "most"], rows))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=4, help="how long to replay at each rate")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.rounds = 0.5, 4
    if not has_cuda():
        print("bench_graphs needs a CUDA device: nothing to measure here.")
        return
    parts = kernels_of_parts()
    print(f"kernels: {sum(parts) * LAYERS} in the block (of {KERNELS}), {parts} in the parts of a layer")
    raw = costs(options.rounds)
    added = show_costs(raw)
    each = {
        kind: added[f"16 {kind}"] / 16
        for kind in ("stages, recording off", "stages, recording on", "stages inline, recording on", "pairs of events")
    }
    print("µs that each of 16 adds on the GPU:", {kind: round(value, 2) for kind, value in each.items()})
    held = [against_kernels(rate, 60, parts, stages) for rate in RATES[:2] for stages in STAGES]
    rivals = [against_kernels(RATES[0], 60, parts, stages, "inline") for stages in STAGES]
    rivals += [events_against_kernels(60, parts, stages) for stages in STAGES]
    problems = [f"{one['what']}: {one['problem']}" for one in held + rivals if "problem" in one]
    held = [one for one in held if "problem" not in one]
    rivals = [one for one in rivals if "problem" not in one]
    show_differences(held + rivals)
    for problem in problems:
        print("a window that cannot be used:", problem)
    rates = [at_rate(rate, options.seconds, stages) for rate in RATES for stages in STAGES]
    crowds = [at_once(count, options.rounds) for count in AT_ONCE]
    show_at_once(crowds)
    least = {"at_least": True}
    goals = []
    for what, first in {"stages": False, "stages that begin a graph": True}.items():
        text = f"share of {what} as long as their kernels, within 3 µs"
        goals.append(Goal(text, share_close(held, "length_ns", first=first), 0.99, **least))
    goals.append(Goal("GPU time that each of 16 stages adds", each["stages, recording on"], 1, " µs"))
    for one in rates:
        share, reached = one["right"] / one["replays"], one["reached"] / one["rate"]
        what = f"{one['stages']} stages, {one['rate']}/s"
        goals.append(Goal(f"{what}: share of replays with right inner times", share, 1.0, **least))
        goals.append(Goal(f"{what}: share of the rate that was reached", reached, 0.98, **least))
    goals += [
        Goal("mixed intervals", sum(one["mixed"] for one in rates), 0),
        Goal("GPU time that recording adds to a graph without stages", added["0 stages, recording on"], 1, " µs"),
    ]
    save("graphs", options.out, goals=goals, unit="µs", costs=raw, added=added, kernels=parts, rates=rates,
         at_once=crowds, problems=problems, differences=held + rivals)  # fmt: skip


if __name__ == "__main__":
    main()
