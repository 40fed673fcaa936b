"""
What watching a launch-bound service does to its latency: blocks of requests, one way after another, many rounds.

The loop is ResNet-50 at batch 1 in six stages (see `_pipeline.py`); spans go to a real receiver in another process.
Only one process works at a time, in a new random order each round. Two of them run under `opentelemetry-instrument`,
and need what the extra `bench` brings.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from _common import Goal, arguments, environment, has_cuda, median, percentile, save, table
from _receiver import Receiver

PROTOCOLS = {"HTTP": "http/protobuf", "gRPC": "grpc"}
"""Of the processes under `opentelemetry-instrument`."""
INSTRUMENT = "from opentelemetry.instrumentation.auto_instrumentation import run; run()"
"""The script `opentelemetry-instrument`, wherever pip put it."""
SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
# variant: (process, what it runs, the variants it is compared with)
VARIANTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "plain": ("bare", "plain", ()),
    "plain again": ("bare", "plain", ("plain",)),
    "gpuscope otlp": ("bare", "otlp", ("plain", "plain again")),
    "naive": ("bare", "naive", ("plain", "plain again")),
    "instrumented, HTTP": ("HTTP", "plain", ("plain", "plain again")),
    "gpuscope auto, HTTP": ("HTTP", "auto", ("instrumented, HTTP",)),
    "gpuscope sdk, HTTP": ("HTTP", "sdk", ("instrumented, HTTP",)),
    "instrumented, gRPC": ("gRPC", "plain", ("plain", "plain again")),
    "gpuscope auto, gRPC": ("gRPC", "auto", ("instrumented, gRPC",)),
    "torch.profiler": ("profiler", "profiler", ("plain", "plain again")),
}


class Process:
    """A worker: given a block to run, it answers with the times."""

    def __init__(self, kind: str, receiver: Receiver, delay_s: float) -> None:
        worker = str(Path(__file__).with_name("_tail_worker.py"))
        command, environ = [sys.executable, worker], {"GPUSCOPE": "idle", "OTEL_SERVICE_NAME": kind}
        if kind in PROTOCOLS:
            # As somebody would start a service: the provider, its processor and its exporter are the distribution's.
            endpoint = receiver.grpc_endpoint if kind == "gRPC" else receiver.endpoint
            command = [sys.executable, "-c", INSTRUMENT, *command]
            environ |= {
                "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
                "OTEL_EXPORTER_OTLP_PROTOCOL": PROTOCOLS[kind],
                "OTEL_METRICS_EXPORTER": "none",
                "OTEL_LOGS_EXPORTER": "none",
            }
        self._process = subprocess.Popen(
            [*command, "instrumented" if kind in PROTOCOLS else kind, receiver.endpoint, str(delay_s)],
            env=environment(environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.answer()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker exited with {self._process.wait()}")
        return dict(json.loads(line))

    def block(self, variant: str, seconds: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps({"variant": variant, "seconds": seconds}), file=self._process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def collect(options: Any) -> tuple[dict[str, list[Any]], dict[str, int]]:
    """Rounds until the time is up; at least two."""
    shuffler, order = random.Random(0), list(VARIANTS)
    blocks: dict[str, list[Any]] = {name: [] for name in order}
    with closing(Receiver()) as receiver:
        kinds = dict.fromkeys(kind for kind, _, _ in VARIANTS.values())
        processes = {kind: Process(kind, receiver, options.schedule_delay) for kind in kinds}
        for name, (kind, what, _) in VARIANTS.items():
            processes[kind].block(what, min(1.0, options.block))
            print(f"warmed up: {name}", file=sys.stderr)
        start, done = time.monotonic(), 0
        while done < 2 or time.monotonic() - start < options.seconds:
            shuffler.shuffle(order)
            for name in order:
                kind, what, _ = VARIANTS[name]
                blocks[name].append(processes[kind].block(what, options.block))
            done += 1
        for process in processes.values():
            process.close()
        received = receiver.counts()
    return blocks, received


def pooled(blocks: list[Any]) -> list[float]:
    return sorted(ns / 1000 for block in blocks for ns in block["ns"])


def ratio(blocks: dict[str, list[Any]], name: str, share: float, rounds: list[int]) -> float:
    """A variant's percentile divided by that of what it is compared with, in the given rounds."""
    own = percentile(pooled([blocks[name][i] for i in rounds]), share)
    others = percentile(pooled([blocks[base][i] for base in VARIANTS[name][2] for i in rounds]), share)
    return own / others


def interval(blocks: dict[str, list[Any]], name: str, share: float, draws: int) -> tuple[float, float]:
    """Where the ratio lies in nine of ten redraws of the rounds: what the number of rounds lets one say."""
    drawer, rounds = random.Random(1), range(len(blocks[name]))
    ratios = sorted(ratio(blocks, name, share, drawer.choices(rounds, k=len(rounds))) for _ in range(draws))
    return percentile(ratios, 0.05), percentile(ratios, 0.95)


def background_us(blocks: list[Any]) -> float:
    """Background CPU time per stage, in microseconds."""
    stages = sum(block["stages"] for block in blocks)
    return sum(sum(block["background_ns"].values()) for block in blocks) / 1000 / max(1, stages)


def summarise(blocks: dict[str, list[Any]], draws: int) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for name, (_, _, bases) in VARIANTS.items():
        times = pooled(blocks[name])
        entry: dict[str, Any] = {"requests": len(times), "max": times[-1], "background_us": background_us(blocks[name])}
        for label, share in SHARES.items():
            per_round = [percentile(pooled([block]), share) for block in blocks[name]]
            entry[label] = percentile(times, share)
            entry[f"{label} of a round"] = [min(per_round), median(per_round), max(per_round)]
            if bases and label in ("p50", "p99"):
                entry[f"{label} ratio"] = ratio(blocks, name, share, list(range(len(blocks[name]))))
                entry[f"{label} ratio, 90 %"] = interval(blocks, name, share, draws)
        summary[name] = entry
    return summary


def show(summary: dict[str, Any]) -> None:
    def change(entry: dict[str, Any], label: str) -> str:
        if f"{label} ratio" not in entry:
            return "-"
        low, high = entry[f"{label} ratio, 90 %"]
        return f"{100 * entry[f'{label} ratio'] - 100:+.1f} ({100 * low - 100:+.1f} to {100 * high - 100:+.1f})"

    rows = []
    for name, entry in summary.items():
        figures = [f"{entry[label]:,.0f}" for label in (*SHARES, "max")]
        changes = [change(entry, "p50"), change(entry, "p99")]
        rows.append([name, str(entry["requests"]), *figures, *changes, f"{entry['background_us']:.1f}"])
    headers = [
        "µs per request",
        "requests",
        *SHARES,
        "max",
        "p50 change, %",
        "p99 change, %",
        "background µs per stage",
    ]
    print(table(headers, rows))
    print("Changes are against plain requests of the same process (torch.profiler: of the first process), pooled over")
    print("rounds, with 90 % intervals; `plain again` against `plain` is the noise of this machine.")


def goals_of(summary: dict[str, Any]) -> list[Goal]:
    otlp, sdk = summary["gpuscope otlp"], summary["gpuscope sdk, HTTP"]
    auto = {protocol: summary[f"gpuscope auto, {protocol}"] for protocol in PROTOCOLS}
    return [
        Goal("otlp: p50 against uninstrumented", otlp["p50 ratio"], 1.01, "x"),
        Goal("otlp: p99 against uninstrumented", otlp["p99 ratio"], 1.05, "x"),
        Goal("otlp: background CPU per stage", otlp["background_us"], 5, " µs"),
        *(Goal(f"auto, {name}: p50 against uninstrumented", of["p50 ratio"], 1.01, "x") for name, of in auto.items()),
        *(Goal(f"auto, {name}: p99 against uninstrumented", of["p99 ratio"], 1.05, "x") for name, of in auto.items()),
        *(Goal(f"auto, {name}: background CPU per stage", of["background_us"], 5, " µs") for name, of in auto.items()),
        Goal("sdk: p99 against uninstrumented", sdk["p99 ratio"], 1.25, "x"),
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=200, help="seconds of rounds in all")
    parser.add_argument("--block", type=float, default=3, help="seconds of requests in a block")
    parser.add_argument(
        "--schedule-delay", type=float, default=1, help="seconds between two payloads of the `otlp` exporter"
    )
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.block = 5, 0.5
    blocks, received = collect(options)
    summary = summarise(blocks, 50 if options.quick else 400)
    show(summary)
    accounts = {name: [b["account"] for b in blocks[name]] for name in blocks if "account" in blocks[name][0]}
    routes = {name: sorted({b["route"] for b in blocks[name]}) for name in accounts}
    for name, account in accounts.items():
        print(f"{name}: spans go {', '.join(routes[name])}")
        total = {key: sum(a[key] for a in account) for key in ("recorded", "exported", "pending")}
        losses = [loss for a in account for loss in (a["dropped"], a["lost"]) if loss]
        print(f"{name}, stages: {total}, dropped or lost: {losses or 'none'}")
    print(f"spans received, warm-up included: {received}\n")
    save(
        "tail" if has_cuda() else "tail_cpu",
        options.out,
        goals=goals_of(summary),
        options={"seconds": options.seconds, "block_s": options.block, "schedule_delay_s": options.schedule_delay},
        summary=summary,
        received=received,
        routes=routes,
        blocks=blocks,
    )


if __name__ == "__main__":
    main()
