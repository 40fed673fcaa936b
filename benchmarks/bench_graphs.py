"""
What stages inside a CUDA graph cost, and whether each replay has its own times.

A transformer block of four layers, 40 kernels, is captured with 0, 4 and 16 stages inside. Replay times are taken
interleaved; inner times are held against CUPTI's timestamps of the kernels; and at 100, 1,000 and 5,000 replays a
second it is counted which replays have inner times, and whether any interval begins in one replay and ends in another.
"""

from __future__ import annotations

import contextlib
import time
from functools import partial
from typing import Any

import numpy as np
from _common import Goal, arguments, has_cuda, interleave, median, percentile, save, table

LAYERS, SEQUENCE, WIDTH, HEADS = 4, 64, 128, 4
KERNELS = 10 * LAYERS
STAGES = (0, 4, 16)
BLOCK, BLOCKS = 10, 20
"""Replays between two readings, few enough for the launch queue, which record nodes fill as well; and readings."""
RATES = (100, 1_000, 5_000)
REPLAY = "replay"
CLOSE_NS = 3_000
FIRST = 5
"""Replays in a window of CUPTI's that do not count: it holds the first up, for some 0.4 ms within the graph."""


class Layer:
    """Ten operations of a transformer's layer that write to memory of their own, so that each is one kernel."""

    def __init__(self) -> None:
        import torch

        new = partial(torch.randn, device="cuda", dtype=torch.float16)
        self.weights = [new(WIDTH, WIDTH) / WIDTH**0.5 for _ in range(4)]
        self.q, self.k, self.v, self.mixed, self.out = (new(SEQUENCE, WIDTH) for _ in range(5))
        self.scores = new(HEADS, SEQUENCE, SEQUENCE)

    def parts(self, x: Any) -> dict[str, Any]:
        """The layer's stages by name, each a function."""
        import torch

        q, k, v = (each.view(SEQUENCE, HEADS, -1).transpose(0, 1) for each in (self.q, self.k, self.v))
        mixed = self.mixed.view(SEQUENCE, HEADS, -1).transpose(0, 1)

        def norm() -> None:
            torch.mul(x, 0.5, out=self.out)
            self.out.tanh_()

        def project() -> None:
            for weight, to in zip(self.weights, (self.q, self.k, self.v), strict=False):
                torch.mm(self.out, weight, out=to)

        def attend() -> None:
            torch.bmm(q, k.transpose(1, 2), out=self.scores)
            torch.softmax(self.scores, -1, out=self.scores)
            mixed.copy_(torch.bmm(self.scores, v))

        def combine() -> None:
            torch.mm(self.mixed, self.weights[3], out=self.out)
            x.add_(self.out)

        return {"norm": norm, "project": project, "attend": attend, "combine": combine}


class Block:
    """The layers, with so many stages."""

    def __init__(self, stages: int) -> None:
        import torch

        self.x = torch.randn(SEQUENCE, WIDTH, device="cuda", dtype=torch.float16)
        self.layers = [Layer().parts(self.x) for _ in range(LAYERS)]
        self.stages = stages

    def __call__(self) -> None:
        import gpuscope

        nothing = contextlib.nullcontext()
        for layer in self.layers:
            with gpuscope.stage("layer") if self.stages == LAYERS else nothing:
                for name, part in layer.items():
                    with gpuscope.stage(name) if self.stages > LAYERS else nothing:
                        part()


def captured(stages: int) -> Any:
    import torch

    block = Block(stages)
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            block()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        block()
    graph.block = block  # Whose memory it works on.
    return graph


class Columns:
    """An exporter that keeps the columns of batches, and makes no object a span."""

    name = "columns"

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def export(self, batch: Any, delivery: Any) -> None:
        self.batches.append(batch)
        delivery.settle(delivery.stages)

    def flush(self, timeout_s: float) -> bool:  # noqa: ARG002
        return True

    def shutdown(self, timeout_s: float) -> None:
        del timeout_s

    def replays(self) -> tuple[int, dict[int, np.ndarray]]:
        """How many stages `replay` there are; and of each, by its id, the starts, ends and uncertainties inside."""
        from gpuscope._columns import RowFlag

        count, found = 0, {}
        for batch in self.batches:
            names = np.array([site.name for site in batch.sites])[batch.site]
            count += int((names == REPLAY).sum())
            inner = np.flatnonzero(batch.flags & RowFlag.GRAPH)
            columns = np.stack((batch.gpu_start_ns, batch.gpu_end_ns, batch.uncertainty_ns), axis=1)[inner]
            parents = batch.parent_id[inner]
            for rows in np.split(np.arange(len(inner)), np.flatnonzero(np.diff(parents)) + 1):
                if len(rows):
                    found[int(parents[rows[0]])] = columns[rows]
        return count, found


@contextlib.contextmanager
def recording() -> Any:
    """Record into `Columns`."""
    from gpuscope import _runtime

    columns = Columns()
    config = _runtime.state.config.changed(mode="on", exporters="none", metrics="none")
    with _runtime.period(config, exporters=(columns,)):
        yield columns


# ---- what it costs


def timed(graph: Any, recorder: Any) -> tuple[float, float]:
    """Microseconds a replay on the host and on the GPU, in a block of replays in one stage."""
    import torch

    import gpuscope
    from gpuscope import _runtime

    before, _runtime.state.recorder = _runtime.state.recorder, recorder
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    host, gpu = [], []
    for _ in range(BLOCKS):
        torch.cuda.synchronize()
        with gpuscope.stage("block"):
            start.record()
            began = time.perf_counter_ns()
            for _ in range(BLOCK):
                graph.replay()
            host.append((time.perf_counter_ns() - began) / BLOCK / 1000)
            end.record()
        torch.cuda.synchronize()
        gpu.append(start.elapsed_time(end) / BLOCK * 1000)
    _runtime.state.recorder = before
    gpuscope.flush(5)
    return median(host), median(gpu)


def costs(rounds: int) -> dict[str, list[tuple[float, float]]]:
    from gpuscope import _runtime

    with recording():
        recorder, _runtime.state.recorder = _runtime.state.recorder, None
        plain = captured(16)  # While nothing is recorded its stages leave no trace in it.
        _runtime.state.recorder = recorder
        graphs = {stages: captured(stages) for stages in STAGES}
        cases = {"plain": partial(timed, plain, None), "plain again": partial(timed, plain, None)}
        for stages, graph in graphs.items():
            cases[f"{stages} stages, recording off"] = partial(timed, graph, None)
            cases[f"{stages} stages, recording on"] = partial(timed, graph, recorder)
        return interleave(cases, rounds, warmup=2)


def show_costs(raw: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """Print the medians; return what each case adds to the GPU's time of a replay, in microseconds."""
    plain_host, plain_gpu = (median([one[i] for one in raw["plain"]]) for i in (0, 1))
    rows, added = [], {}
    for name, rounds in raw.items():
        host, gpu = (median([one[i] for one in rounds]) for i in (0, 1))
        added[name] = median([one[1] - plain[1] for one, plain in zip(rounds, raw["plain"], strict=True)])
        rows.append([name, host, host - plain_host, gpu, gpu - plain_gpu])
    print(table(["µs a replay", "host", "more", "GPU", "more"], rows))
    return added


# ---- whether the times are right


def paced(graph: Any, rate: int, replays: int) -> float:
    """Replay so many times a second, each in a stage; return how many a second it were."""
    import gpuscope

    began = time.perf_counter()
    for number in range(replays):
        while time.perf_counter() - began < number / rate:
            time.sleep(0)  # Lets other threads have the GIL.
        with gpuscope.stage(REPLAY):
            graph.replay()
    return replays / (time.perf_counter() - began)


def kernels_of_parts() -> list[int]:
    """How many kernels each part of a layer has, as CUPTI sees them."""
    import torch
    from _cupti import Window

    found = []
    for part in Block(0).layers[0].values():
        part()
        torch.cuda.synchronize()
        with Window() as window:
            part()
        found.append(len(window.kernels("")))
    return found


def against_kernels(rate: int, replays: int, parts: list[int], stages: int) -> dict[str, Any]:
    """Differences of inner stages to their kernels, by CUPTI's time stamps, in nanoseconds."""
    import torch
    from _cupti import Window

    import gpuscope

    with recording() as columns:
        graph = captured(stages)
        paced(graph, rate, 20)
        torch.cuda.synchronize()
        gpuscope.flush(5)
        columns.batches.clear()
        with Window() as window:
            paced(graph, rate, FIRST + replays)
        gpuscope.flush(5)
        _, found = columns.replays()
    kernels = sorted(window.kernels(""), key=lambda kernel: kernel.start_ns)
    sizes = parts * LAYERS if stages > LAYERS else [sum(parts)] * LAYERS
    if len(kernels) != sum(sizes) * (FIRST + replays):
        return {"problem": f"CUPTI saw {len(kernels)} kernels of {sum(sizes) * (FIRST + replays)}"}
    kernels = kernels[sum(sizes) * FIRST :]
    ends = np.cumsum(sizes * replays)
    starts = ends - np.array(sizes * replays)
    kernel_start = np.array([kernels[i].start_ns for i in starts]).reshape(replays, -1)
    kernel_end = np.array([kernels[i - 1].end_ns for i in ends]).reshape(replays, -1)
    inner = np.array(sorted(found.values(), key=lambda rows: rows[0, 0])[FIRST:])
    if len(inner) != replays:
        return {"problem": f"{len(inner)} of {replays} replays have inner times", "rate": rate, "stages": stages}
    return {
        "rate": rate,
        "stages": stages,
        "length_ns": ((inner[..., 1] - inner[..., 0]) - (kernel_end - kernel_start)).ravel().tolist(),
        "end_ns": (inner[..., 1] - kernel_end).ravel().tolist(),
        "start_ns": (inner[..., 0] - kernel_start).ravel().tolist(),
        "uncertainty_ns": inner[..., 2].ravel().tolist(),
    }


def at_rate(rate: int, seconds: float, stages: int) -> dict[str, Any]:
    """Of a second's replays, how many have inner times, and how many intervals are of two replays."""
    import torch

    import gpuscope

    replays = int(rate * seconds)
    with recording() as columns:
        graph = captured(stages)
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
    # An interval of two replays is negative, or longer by the time from one replay to the next.
    mixed = (lengths <= 0) | (lengths > usual + 0.4e9 / rate)
    mixed[1:] |= whole[1:, :, 0] < whole[:-1, -1:, 1] - 2 * whole[1:, :, 2]
    print(
        f"{rate:6d}/s, {stages} stages: reached {reached:,.0f}/s; {len(whole)} of {replays} replays have inner times,"
    )
    print(f"        {int(mixed.sum())} mixed; dropped {account['dropped']}, lost {account['lost']}")
    return {
        "rate": rate,
        "stages": stages,
        "reached": reached,
        "replays": replays,
        "replay_stages": count,
        "with_inner": len(whole),
        "right": int((~mixed.any(axis=1)).sum()),
        "mixed": int(mixed.sum()),
        "usual_length_ns": usual.tolist(),
        "longest_ns": lengths.max(axis=0).tolist(),
        "account": account,
    }


def show_differences(held: list[dict[str, Any]]) -> list[list[Any]]:
    rows = []
    for one in held:
        for what in ("length_ns", "start_ns", "end_ns", "uncertainty_ns"):
            ordered = sorted(value / 1000 for value in one[what])
            shown = [percentile(ordered, share) for share in (0, 0.01, 0.5, 0.99, 1)]
            rows.append([f"{one['rate']}/s, {one['stages']} stages: {what[:-3]}", *shown])
    return rows


def share_close(held: list[dict[str, Any]], *, beyond_usual: bool) -> float:
    """The share of inner times that differ from their kernels' by no more than 3 µs."""
    close = []
    for one in held:
        usual = median(one["length_ns"]) if beyond_usual else 0.0
        close += [abs(value - usual) <= CLOSE_NS for value in one["length_ns"]]
    return sum(close) / max(1, len(close))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=4, help="how long at each rate")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.rounds = 0.5, 4
    if not has_cuda():
        print("bench_graphs needs a CUDA device: nothing to measure here.")
        return
    raw = costs(options.rounds)
    added = show_costs(raw)
    for stages in STAGES[1:]:
        print(f"each of {stages} stages adds {added[f'{stages} stages, recording on'] / stages:.2f} µs on the GPU")
    parts = kernels_of_parts()
    print(f"kernels: {sum(parts) * LAYERS} in the block, {parts} in the parts of a layer")
    held = [against_kernels(rate, 60, parts, stages) for rate in RATES[:2] for stages in STAGES[1:]]
    problems = [one["problem"] for one in held if "problem" in one]
    held = [one for one in held if "problem" not in one]
    print(table(["stage minus kernels, µs", "least", "p1", "p50", "p99", "most"], show_differences(held)))
    for problem in problems:
        print("a window that can't be used:", problem)
    rates = [at_rate(rate, options.seconds, stages) for rate in RATES for stages in STAGES[1:]]
    of_four = [one for one in rates if one["stages"] == LAYERS]
    least = {"at_least": True}
    goals = [
        Goal(
            "share of inner times within 3 µs of their kernels'", share_close(held, beyond_usual=False), 0.99, **least
        ),
        Goal("the same, less what the nodes usually add", share_close(held, beyond_usual=True), 0.99, **least),
    ]
    for one in of_four:
        share, reached = one["right"] / one["replays"], one["reached"] / one["rate"]
        goals.append(Goal(f"share of replays with right inner times at {one['rate']}/s", share, 1.0, **least))
        goals.append(Goal(f"share of {one['rate']}/s that was reached", reached, 0.98, **least))
    goals += [
        Goal("mixed intervals", sum(one["mixed"] for one in rates), 0),
        Goal("GPU time that recording adds to a graph without stages", added["0 stages, recording on"], 1, " µs"),
    ]
    save("graphs", options.out, goals=goals, unit="µs", costs=raw, added=added, kernels=parts, rates=rates,
         problems=problems, differences=held)  # fmt: skip


if __name__ == "__main__":
    main()
