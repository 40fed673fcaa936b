"""
What a stage costs the thread that runs it, against bare events, against spans made by hand, and when off.

Each section is a process of its own, because a process has only one state; within it all cases are interleaved.
Sections: `gpu` (needs CUDA) and `host` (no GPU part), both also with an application's TracerProvider; `idle`; `absent`.
"""

from __future__ import annotations

import json
from dataclasses import astuple
from functools import partial
from typing import TYPE_CHECKING, Any

import _hot_cases as hot
from _common import Goal, arguments, child, has_cuda, interleave, median, save, table

if TYPE_CHECKING:
    from collections.abc import Callable

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
SECTIONS: dict[str, dict[str, str | None]] = {
    "gpu": {"GPUSCOPE": "idle"},
    "gpu-provider": {"GPUSCOPE": "idle"},
    "host": {"GPUSCOPE": "idle", **NO_GPU},
    "host-provider": {"GPUSCOPE": "idle", **NO_GPU},
    "idle": {"GPUSCOPE": "idle"},
    "absent": {"GPUSCOPE": None},
}
QUEUE_FULL_NS = 1_000_000
WITH, DECORATOR, NAIVE = "stage, with", "stage, decorator", "naive: new events, SDK span, NVTX"
SPAN = "SDK span as current"
HERE, BATCH, GENERATIONS = "here()", "stage, with, of {} members", "stage, with, of {} generations"
MEMBERS = (1, 32, 256)


SCALE = "for scale: a function returning an empty context manager"


WORK = ("two enqueued", "two enqueued, one by a call", "seven of eight enqueued")
"""What is taken off a lone stage by `with`, one by a decorated call, and a chain."""
CHAIN_GOAL = 0.9


def noop() -> None:
    pass


class NothingAtAll:
    """The least that a `with` block can cost."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def tracer_provider() -> Any:
    """A provider as an application has it: a batch processor, and an exporter that costs nothing."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    class Nowhere(SpanExporter):
        def export(self, spans):  # noqa: ARG002
            return SpanExportResult.SUCCESS

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(Nowhere()))
    return provider


def settle_gpuscope() -> None:
    """Outside the timing: have the collector take all there is, and exit if anything was dropped."""
    import gpuscope

    if not gpuscope.flush(timeout=60):
        raise SystemExit("gpuscope did not settle its stages within a minute")
    statistics = gpuscope.statistics()
    refused = {reason: n for reason, n in statistics.dropped.items() if "queue" in reason}
    if refused or statistics.untimed:
        raise SystemExit(f"stages were refused or not timed, so the figures mean nothing: {statistics}")


def batch_cases(settle: Callable[[], None] = settle_gpuscope) -> dict[str, hot.Case]:
    """A token, and a stage that works for members whose tokens were made in stages of their own."""
    import gpuscope

    tokens = []
    for _ in range(max(MEMBERS)):
        with gpuscope.stage("request"):
            tokens.append(gpuscope.here())
    cases = {HERE: hot.Case(hot.tokens_in(gpuscope.stage, gpuscope.here), settle=settle)}
    for count in MEMBERS:
        cases[BATCH.format(count)] = hot.Case(
            hot.batches(gpuscope.stage, tokens[:count]), hot.BATCH_SHARE, settle=settle
        )
    with gpuscope.stage("request"):
        generations = [gpuscope.Generation() for _ in tokens]
    loop = hot.batches(gpuscope.stage, generations)
    return cases | {GENERATIONS.format(len(tokens)): hot.Case(loop, hot.BATCH_SHARE, settle=settle)}


def stage_cases(settle: Callable[[], None] = settle_gpuscope) -> dict[str, hot.Case]:
    import gpuscope

    return {
        "loop": hot.Case(hot.empty),
        "plain call": hot.Case(hot.calls(noop)),
        WITH: hot.Case(hot.stages(gpuscope.stage), settle=settle),
        DECORATOR: hot.Case(hot.calls(gpuscope.stage("y")(noop)), settle=settle),
    }


def section_gpu(size: int, rounds: int, threads: list[int], *, provider_global: bool) -> dict[str, Any]:
    """Stage, floors and rival with each number of threads: each on its own stream, and all on the default stream."""
    import sys

    import torch

    import gpuscope

    provider = tracer_provider()
    if provider_global:
        from opentelemetry import trace

        trace.set_tracer_provider(provider)
    gpuscope.enable(exporters="none", queue_size=65_536)
    routes = hot.CudaRoutes()
    cases = stage_cases() | routes.cases() | {NAIVE: routes.naive(provider.get_tracer("bench"), provider.force_flush)}
    cases |= {name: hot.Case(loop) for name, loop in routes.work().items()}
    cases |= {
        f"{form}, with work": hot.Case(loop, settle=settle_gpuscope)
        for form, loop in routes.with_work(gpuscope.stage).items()
    }
    lanes = routes.lanes(max(threads), size)
    default = torch.cuda.default_stream()
    placed = {
        "own": [routes.place(lane, torch.cuda.Stream()) for lane in lanes],
        "default": [routes.place(lane, default) for lane in lanes],
    }
    raw: dict[str, Any] = {}
    for count in threads:
        crew = hot.Crew(count)
        runs = {
            (name, where): partial(crew.run, case, placed[where]) for name, case in cases.items() for where in placed
        }
        for (name, where), samples in interleave(runs, rounds).items():
            raw.setdefault(f"{count} {where}", {})[name] = [astuple(sample) for sample in samples]
        crew.close()
    guarded = "cuda.bindings.runtime" in sys.modules  # then gpuscope also guards the default stream
    return {"cases": raw, "statistics": str(gpuscope.statistics()), "default_stream_guarded": guarded}


def section_host(size: int, rounds: int, *, provider_global: bool) -> dict[str, Any]:
    """A stage without a GPU part against an SDK span as current."""
    import torch

    assert not torch.cuda.is_available()
    import gpuscope

    provider = tracer_provider()
    if provider_global:
        from opentelemetry import trace

        trace.set_tracer_provider(provider)
    gpuscope.enable(exporters="none", queue_size=65_536)
    cases = stage_cases() | batch_cases()
    cases[SPAN] = hot.Case(hot.spans(provider.get_tracer("bench")), hot.NAIVE_SHARE, provider.force_flush)
    return {"cases": {"1 host": single_thread(cases, size, rounds)}}


def section_off(size: int, rounds: int) -> dict[str, Any]:
    """Absent or idle, by the environment of this process."""
    import gpuscope

    same = gpuscope.stage("y")(noop) is noop
    nothing = NothingAtAll()
    cases = stage_cases(lambda: None) | {SCALE: hot.Case(hot.stages(lambda _: nothing))}
    return {"same": same, "cases": {"1 host": single_thread(cases, size, rounds)}}


def single_thread(cases: dict[str, hot.Case], size: int, rounds: int) -> dict[str, list[Any]]:
    crew, lanes = hot.Crew(1), [hot.host_lane(size)]
    raw = interleave({name: partial(crew.run, case, lanes) for name, case in cases.items()}, rounds)
    return {name: [astuple(sample) for sample in samples] for name, samples in raw.items()}


def run_section(name: str, rounds: int, size: int) -> dict[str, Any]:
    provider_global = name.endswith("-provider")
    if name.startswith("gpu"):
        threads = [1] if provider_global else [1, 2, 4]
        return section_gpu(size, rounds, threads, provider_global=provider_global)
    if name.startswith("host"):
        return section_host(size, rounds, provider_global=provider_global)
    return section_off(size * 10, rounds)


def net(cases: dict[str, list[Any]], column: int) -> dict[str, float]:
    """Median nanoseconds per iteration, with the empty loop subtracted from all alike."""
    medians = {name: median([sample[column] for sample in samples]) for name, samples in cases.items()}
    loop = medians.pop("loop")
    return {name: value - loop for name, value in medians.items()}


def of_stages(figures: dict[str, float]) -> dict[str, float]:
    """What stages with work in them cost, per stage, less the work."""
    pairs = zip(("with", "decorator", "chain"), WORK, strict=True)
    return {form: figures[f"{form}, with work"] - figures[work] for form, work in pairs}


def cheapest_floor(figures: dict[str, float]) -> float:
    return min(value for name, value in figures.items() if name.startswith("floor"))


def gpu_goals(sections: dict[str, Any]) -> list[Goal]:
    """Goals of the `gpu` section; each form is judged where it did worse, on its own or on the default stream."""
    cases = sections["gpu"]["cases"]
    goals = []
    for form in ("with", "decorator", "chain"):
        for count, text, column in (
            (1, "1 thread", 0),
            (4, "4 threads, each one's time", 0),
            (4, "4 threads, wall", 1),
        ):
            ratios = []
            for where in ("own", "default"):
                figures = net(cases[f"{count} {where}"], column)
                ratios.append(of_stages(figures)[form] / cheapest_floor(figures))
            name = "a chain of 8 stages, each" if form == "chain" else f"lone stage, {form}"
            goal = CHAIN_GOAL if form == "chain" else 1.5
            goals.append(Goal(f"{name}, over the cheapest pair of events, {text}", max(ratios), goal, "x"))
        rivals = []
        for where in ("own", "default"):
            figures = net(cases[f"1 {where}"], 0)
            rivals.append(figures[NAIVE] / of_stages(figures)[form])
        goals.append(Goal(f"{name}: cheaper than the naive rival", min(rivals), 8, "x", at_least=True))
    return goals


def off_goals(sections: dict[str, Any]) -> list[Goal]:
    host = net(sections["host"]["cases"]["1 host"], 0)
    idle, absent = (net(sections[name]["cases"]["1 host"], 0) for name in ("idle", "absent"))
    goals = [
        Goal(f"{form}, host only: cheaper than an SDK span", host[SPAN] / host[form], 8, "x", at_least=True)
        for form in (WITH, DECORATOR)
    ]
    same = float(sections["absent"]["same"])
    for count in MEMBERS:
        more = host[BATCH.format(count)] - host[WITH]
        goals.append(Goal(f"a batch of {count}, over a stage", more / 1000, 20, " µs"))
    more = host[GENERATIONS.format(max(MEMBERS))] - host[WITH]
    goals.append(Goal(f"a batch of {max(MEMBERS)} generations, over a stage", more / 1000, 20, " µs"))
    goals.append(Goal("a token of a stage", host[HERE], 300, " ns"))
    goals.append(Goal("absent: the decorated function is the function", same, 1, at_least=True))
    goals.append(Goal("absent, decorator, over a plain call", absent[DECORATOR] - absent["plain call"], 5, " ns"))
    goals.append(Goal("idle, decorator, over a plain call", idle[DECORATOR] - idle["plain call"], 150, " ns"))
    goals.append(Goal("idle, with", idle[WITH], 150, " ns"))
    for name, figures in (("idle", idle), ("absent", absent)):
        goals.append(Goal(f"{name}, with, over an empty context manager", figures[WITH] / figures[SCALE], 0.25, "x"))
    decorator = (idle[DECORATOR] - idle["plain call"]) / idle[SCALE]
    goals.append(Goal("idle, decorator, over a plain call, over an empty context manager", decorator, 0.5, "x"))
    return goals


def show(name: str, section: dict[str, Any]) -> None:
    """One row per case; one column per number of threads, stream and clock: the threads' own time, or wall time."""
    cases = section["cases"]
    columns = [(key, column, unit) for key in cases for column, unit in ((0, "thread"), (1, "wall"))]
    columns = [c for c in columns if c[1] == 0 or not c[0].startswith("1 ")]
    figures = {key: (net(cases[key], 0), net(cases[key], 1)) for key in cases}
    rows = [
        [case, *(figures[key][column][case] / 1000 for key, column, _ in columns)] for case in figures[columns[0][0]][0]
    ]
    print(f"\n{name}: median µs per iteration, empty loop subtracted (threads, stream, clock)")
    print(table(["case", *(f"{key} {unit}" for key, _, unit in columns)], rows))
    if name.startswith("gpu"):
        floors = [samples for case in cases.values() for row, samples in case.items() if row.startswith("floor")]
        lags = [median([sample[2] for sample in samples]) for samples in floors]
        print(f"GPU work left after a block of the floors, median: {min(lags) / 1e6:.2f} to {max(lags) / 1e6:.2f} ms")
        if max(lags) > QUEUE_FULL_NS:
            print("The launch queue was full at times, so the floors measure the GPU and not the host: lower `--size`.")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--section", choices=SECTIONS, help="run one section here and print its JSON")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", type=int, default=400, help="iterations per block; the launch queue must hold them")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.size = 3, 400
    if options.section:
        print(json.dumps(run_section(options.section, options.rounds, options.size)))
        return
    names = [name for name in SECTIONS if has_cuda() or not name.startswith("gpu")]
    extra = ["--rounds", str(options.rounds), "--size", str(options.size)]
    sections = {name: child([__file__, "--section", name, *extra], SECTIONS[name]) for name in names}
    for name, section in sections.items():
        show(name, section)
    print()
    goals = (gpu_goals(sections) if "gpu" in sections else []) + off_goals(sections)
    save("hot_path", options.out, goals=goals, unit="ns: each thread's own, wall, drain", sections=sections)


if __name__ == "__main__":
    main()
