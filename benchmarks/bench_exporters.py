"""
What the background pays per stage, by the way that spans go.

First with GPU spans, on the loop of `bench_tail.py` (without a GPU on a stand-in, see `_background.py`): by thread, and
with `--parts` by part of the collector's work, which adds some tenths of a microsecond. Then beside a TracerProvider.

Requests of seven stages, through a provider with a batch processor and the OTLP exporter over HTTP, to a receiver of
its own process. Each way is a process of its own; they take turns. A figure is the CPU time of all threads but the
program's, divided by the stages.
"""

from __future__ import annotations

import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from _common import Goal, arguments, child, interleave, median, save, table
from _receiver import PATH, Receiver

WAYS = {"otlp": "otlp", "application": "auto", "processors": "auto", "sdk": "sdk"}
"""By the name that `statistics()` has for it: what `exporters` was."""
INNER = ("decode", "preprocess", "h2d", "infer", "d2h", "postprocess")
PAUSE_S = 0.004
MEMBERS = (1, 32, 256)
"""Of the batches; a member is a span more, and a batch of one has all of a batch's cost on it."""


def measure(way: str, url: str, requests: int, members: int = 0) -> float:
    """Record requests, or batches of so many members; return microseconds of the background's CPU time per stage."""
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    import gpuscope

    class Filtering(BatchSpanProcessor):
        """Would leave spans out by their names."""

        def on_end(self, span):
            if span.name:
                super().on_end(span)

    provider = TracerProvider()
    kind = Filtering if way == "processors" else BatchSpanProcessor
    provider.add_span_processor(kind(OTLPSpanExporter(url)))
    trace.set_tracer_provider(provider)
    gpuscope.enable(exporters=WAYS[way], otlp_endpoint=url, metrics="none")

    tokens = []
    for _ in range(members):
        with gpuscope.stage("member"):
            tokens.append(gpuscope.here())
    said = {"members": tokens} if members else {}

    def run(count: int) -> None:
        for _ in range(count):
            with gpuscope.stage("request", **said):
                for name in INNER:
                    with gpuscope.stage(name):
                        pass
            time.sleep(PAUSE_S)
        gpuscope.flush(30)
        provider.force_flush()

    run(requests // 5)
    process_s, own_s = time.process_time(), time.thread_time()
    run(requests)
    spent_s = (time.process_time() - process_s) - (time.thread_time() - own_s)
    statistics = gpuscope.statistics()
    assert statistics.exporters == (way,), statistics
    assert statistics.exported == statistics.recorded, statistics
    return spent_s / requests / (1 + len(INNER)) * 1e6


def of_a_member(raw: dict[str, list[float]], name: str, members: int) -> float:
    """What a member costs the background, in stages: what a request costs more with them, divided by them."""
    more = [of_batch - plain for of_batch, plain in zip(raw[name], raw["otlp"], strict=True)]
    return median(more) * (1 + len(INNER)) / members / median(raw["otlp"])


def with_gpu_spans(receiver: Receiver, rounds: int, seconds: float, *, by_part: bool) -> dict[str, list[Any]]:
    """Measure rounds of stages with GPU spans, and print them."""
    script = str(Path(__file__).with_name("_background.py"))

    def turn(way: str) -> Any:
        arguments = [script, way, receiver.endpoint, str(seconds), str(int(by_part))]
        return child(arguments, {"GPUSCOPE": "idle", "OTEL_SERVICE_NAME": "background"})

    raw = interleave({way: lambda way=way: turn(way) for way in ("otlp", "application")}, rounds, warmup=0)
    for kind in ("threads", "parts"):
        names = dict.fromkeys(name for results in raw.values() for result in results for name in result[kind])
        rows = [
            [name, *(median([r[kind].get(name, 0.0) for r in results]) for results in raw.values())] for name in names
        ]
        if kind == "threads":
            rows.append(["all", *(median([result["total"] for result in results]) for results in raw.values())])
        if rows:
            print(table([f"µs per stage with a GPU span, by {kind}", *raw], rows) + "\n")
    rates = ", ".join(f"{way} {median([r['stages_a_second'] for r in results]):,.0f}" for way, results in raw.items())
    print(f"stages a second: {rates}\n")
    return raw


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6, help="of each round with GPU spans")
    parser.add_argument("--parts", action="store_true", help="also by part of the collector's work")
    way = "WAY", "URL", "REQUESTS", "MEMBERS"
    parser.add_argument("--way", nargs=4, metavar=way, help="measure one here; print its JSON")
    options = parser.parse_args()
    if options.way:
        way, url, requests, members = options.way
        print(json.dumps(measure(way, url, int(requests), int(members))))
        return
    rounds, requests = (2, 100) if options.quick else (options.rounds, 500)
    seconds = 1.0 if options.quick else options.seconds
    with closing(Receiver()) as receiver:
        timed = with_gpu_spans(receiver, rounds, seconds, by_part=options.parts)
        url = receiver.endpoint + PATH

        def turn(way: str, members: int = 0) -> float:
            arguments = [str(Path(__file__)), "--way", way, url, str(requests), str(members)]
            return float(child(arguments, {"GPUSCOPE": "idle"}))

        ways = {way: lambda way=way: turn(way) for way in WAYS}
        batched = {f"otlp, of {count} members": lambda count=count: turn("otlp", count) for count in MEMBERS}
        raw = interleave(ways | batched, rounds, warmup=0)
    print(
        table(
            ["way", "background, µs per stage", "least", "most"],
            [[w, median(v), min(v), max(v)] for w, v in raw.items()],
        )
    )
    goals = [
        Goal(
            "through the application's exporter, over `otlp`",
            median(raw["application"]) / median(raw["otlp"]),
            1.5,
            "x",
        ),
        *(
            Goal(f"{way}: background CPU per stage with a GPU span", median([r["total"] for r in results]), 5, " µs")
            for way, results in timed.items()
        ),
        *(
            Goal(f"{name}: each over a stage", of_a_member(raw, name, count), 0.2, "x")
            for name, count in zip(batched, MEMBERS, strict=True)
        ),
        Goal("`sdk` over that", median(raw["sdk"]) / median(raw["application"]), 5, "x", at_least=True),
    ]
    save("exporters", options.out, goals=goals, unit="us per stage", rounds=raw, with_gpu_spans=timed)


if __name__ == "__main__":
    main()
