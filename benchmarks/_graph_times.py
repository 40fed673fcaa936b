"""Stages inside CUDA graphs held against CUPTI's timestamps of their kernels, for `bench_graphs`."""

from __future__ import annotations

from typing import Any

import numpy as np
from _common import percentile, table
from _graph_cases import LAYERS, Block, block, block_with_events, paced, recording, unmarked

import gpuscope

CLOSE_NS = 3_000
FIRST = 5
"""Replays in a window that do not count: CUPTI holds up the first, for some 0.4 ms within the graph."""


def kernels_of_parts() -> list[int]:
    """How many kernels each part of a layer has, as CUPTI sees them."""
    import torch
    from _cupti import Window

    found = []
    for part in Block(0, unmarked).layers[0].values():
        part()
        torch.cuda.synchronize()
        with Window() as window:
            part()
        found.append(len(window.kernels("")))
    return found


def of_stages(window: Any, replays: int, parts: list[int], stages: int) -> tuple[np.ndarray, np.ndarray] | str:
    """When CUPTI saw the first kernel of each stage begin and the last end, one row per replay; or what is wrong."""
    kernels = sorted(window.kernels(""), key=lambda kernel: kernel.start_ns)
    sizes = parts * LAYERS if stages > LAYERS else [sum(parts)] * LAYERS
    expected = sum(sizes) * (FIRST + replays)
    if len(kernels) != expected:
        return f"CUPTI saw {len(kernels)} of {expected} kernels"
    kernels = kernels[sum(sizes) * FIRST :]
    ends = np.cumsum(sizes * replays)
    starts = ends - np.array(sizes * replays)
    shape = replays, stages
    return (
        np.array([kernels[i].start_ns for i in starts]).reshape(shape),
        np.array([kernels[i - 1].end_ns for i in ends]).reshape(shape),
    )


def against_kernels(rate: int, replays: int, parts: list[int], stages: int, placed: str = "beside") -> dict[str, Any]:
    """Differences between inner stages and their kernels, by CUPTI's timestamps, in nanoseconds."""
    import torch
    from _cupti import Window

    with recording(placed) as columns:
        graph = block(stages)
        paced(graph, rate, 20)
        torch.cuda.synchronize()
        gpuscope.flush(5)
        columns.batches.clear()
        with Window() as window:
            paced(graph, rate, FIRST + replays)
        gpuscope.flush(5)
        _, found = columns.replays()
    kernels = of_stages(window, replays, parts, stages)
    inner = sorted(found.values(), key=lambda rows: rows[0, 0])[FIRST:]
    what = f"{rate}/s, {stages} stages, {placed}"
    if isinstance(kernels, str) or len(inner) != replays:
        return {"what": what, "problem": f"{len(inner)} of {replays} replays have inner times; {kernels}"[:200]}
    start_ns, end_ns, uncertainty_ns = np.moveaxis(np.array(inner), 2, 0)
    return {
        "what": what,
        "length_ns": (end_ns - start_ns - (kernels[1] - kernels[0])).tolist(),
        "end_ns": (end_ns - kernels[1]).tolist(),
        "start_ns": (start_ns - kernels[0]).tolist(),
        "uncertainty_ns": uncertainty_ns.tolist(),
    }


def events_against_kernels(replays: int, parts: list[int], stages: int) -> dict[str, Any]:
    """The same for pairs of external events, with a wait after each replay so that they can be read."""
    import torch
    from _cupti import Window

    graph, events = block_with_events(stages)
    lengths = []
    with Window() as window:
        for _ in range(FIRST + replays):
            graph.replay()
            torch.cuda.synchronize()
            lengths.append(events.lengths_ns())
    kernels = of_stages(window, replays, parts, stages)
    what = f"{stages} pairs of events"
    if isinstance(kernels, str):
        return {"what": what, "problem": kernels}
    return {"what": what, "length_ns": (np.array(lengths[FIRST:]) - (kernels[1] - kernels[0])).tolist()}


def show_differences(held: list[dict[str, Any]]) -> None:
    rows = []
    for one in held:
        for what in ("length_ns", "start_ns", "end_ns", "uncertainty_ns"):
            values = np.array(one.get(what, [])) / 1000
            if values.size:
                name = f"{one['what']}: {what[:-3]}"
                rows.append([name, *spread(values[:, 1:].ravel())])
                rows.append([f"{name} of the first", *spread(values[:, 0])])
    print(table(["stage minus kernels, µs", "least", "p1", "p50", "p99", "most"], rows))


def spread(values: Any) -> list[float]:
    return [percentile(sorted(values), share) for share in (0, 0.01, 0.5, 0.99, 1)]


def share_close(held: list[dict[str, Any]], what: str, *, first: bool) -> float:
    """The share of stages that differ from their kernels by no more than 3 µs."""
    columns = slice(0, 1) if first else slice(1, None)
    values = np.concatenate([np.array(one[what])[:, columns].ravel() for one in held] or [np.zeros(0)])
    return float((abs(values) <= CLOSE_NS).mean()) if len(values) else float("nan")
