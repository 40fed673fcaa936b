"""
Whether asking streams for work tells how busy the GPU is, beside CUPTI; and what asking costs the program.

Each program runs twice. Once under torch.profiler, for the share that CUPTI saw of kernels and copies, while streams
are asked at each rate; and once without, in short blocks at each rate, interleaved, for the latencies. The difference
to CUPTI is the bias: what is queued counts as work. CUPTI slows launches down, and both look at the same, slower run.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _common import Goal, arguments, has_cuda, median, percentile, save, table

import gpuscope
from gpuscope.testing import capture

RATES_HZ = (0.0, 50.0, 200.0, 1000.0)
CHOSEN_HZ = 200.0
WARMUP = 3
BATCHES = (1, 16, 64)
Request = Callable[[], object]


def programs() -> dict[str, Callable[[], tuple[Request, Callable[[], object]]]]:
    """By name: what makes a request, and what happens between two."""
    from _verdict_cases import CASES, WITHOUT_GPU

    cases = CASES if has_cuda() else WITHOUT_GPU
    found: dict[str, Callable[[], tuple[Request, Callable[[], object]]]] = {
        name: lambda case=case: (case.make(), case.between)  # type: ignore[misc]
        for name, case in cases.items()
    }
    if has_cuda():
        for batch in BATCHES:
            found[f"resnet50, batch {batch}"] = lambda batch=batch: (resnet(batch), nothing)  # type: ignore[misc]
            found[f"vit-l, batch {batch}"] = lambda batch=batch: (vit(batch), nothing)  # type: ignore[misc]
            found[f"bert, batch {batch}"] = lambda batch=batch: (bert(batch), nothing)  # type: ignore[misc]
        found["gpt-2 generates"] = lambda: (generate(), nothing)
        found["products with sleep between"] = lambda: (spaced(), nothing)
    return found


def nothing() -> None:
    """Between requests that follow each other at once."""


def image_model(model: Any, batch: int) -> Request:
    import torch

    model, images = model.eval().cuda().half(), torch.randn(batch, 3, 224, 224, device="cuda").half()

    def request() -> None:
        with torch.inference_mode(), gpuscope.stage("infer"):
            model(images)[0, 0].item()

    return request


def resnet(batch: int) -> Request:
    import torchvision

    return image_model(torchvision.models.resnet50(), batch)


def vit(batch: int) -> Request:
    import timm

    return image_model(timm.create_model("vit_large_patch16_224", pretrained=False), batch)


def bert(batch: int) -> Request:
    import torch
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig()).eval().cuda().half()
    tokens = torch.randint(0, 30_000, (batch, 128), device="cuda")

    def request() -> None:
        with torch.inference_mode(), gpuscope.stage("infer"):
            model(tokens).last_hidden_state[0, 0, 0].item()

    return request


def generate() -> Request:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config()).eval().cuda().half()
    tokens = torch.randint(0, 50_000, (4, 16), device="cuda")

    def request() -> None:
        with torch.inference_mode(), gpuscope.stage("generate"):
            model.generate(tokens, max_new_tokens=16, do_sample=False, pad_token_id=0)

    return request


def spaced() -> Request:
    import torch

    a = torch.randn(4096, 4096, device="cuda").half()

    def request() -> None:
        with gpuscope.stage("infer"):
            torch.mm(a, a)
            time.sleep(0.001)
            torch.mm(a, a)[0, 0].item()

    return request


PAGEABLE = "Pageable"
"""In the names that CUPTI gives to copies."""


def serve(request: Request, between: Callable[[], object], seconds: float) -> list[float]:
    """Run requests for a while; return how long each took, in microseconds."""
    took, until = [], time.perf_counter() + seconds
    while not took or time.perf_counter() < until:
        began = time.perf_counter()
        with gpuscope.stage("request"):
            request()
        took.append((time.perf_counter() - began) * 1e6)
        between()
    return took


def cupti_share(trace: dict[str, Any], start_ns: int, end_ns: int, without: str = "\0") -> float:
    """In which part of a stretch of the program some kernel, copy or fill ran: their union."""
    base = trace.get("baseTimeNanoseconds", 0)
    intervals = sorted(
        (base + event["ts"] * 1e3, base + (event["ts"] + event["dur"]) * 1e3)
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
        if without not in event["name"]
    )
    busy, reach = 0.0, float(start_ns)
    for first, last in intervals:
        first, last = max(first, reach), min(last, float(end_ns))  # noqa: PLW2901
        busy += max(0.0, last - first)
        reach = max(reach, last)
    return busy / (end_ns - start_ns)


def watched(request: Request, between: Callable[[], object], hz: float, seconds: float) -> dict[str, float]:
    """Return what CUPTI and the sampler say of the same run."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with capture(sample_hz=hz, warmup=0) as spans, profile(activities=[ProfilerActivity.CUDA]) as profiler:
        serve(request, between, 0.05)
        torch.cuda.synchronize()
        gpuscope.flush(10)
        before, start_ns = len(spans._batches), time.time_ns()
        serve(request, between, seconds)
        end_ns = time.time_ns()
        gpuscope.disable()
        torch.cuda.synchronize()
        gpuscope.flush(10)
        counts = [batch.device_samples or {} for batch in spans._batches[before:]]
    asked, had_work = (sum(each[place] for count in counts for each in count.values()) for place in (0, 1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    found = {"sampled": had_work / max(1, asked), "asked": asked, "cupti": cupti_share(trace, start_ns, end_ns)}
    # CUPTI has a copy of pageable memory from its beginning to its end, of which the host's thread works for the most.
    return found | {"cupti, pageable copies apart": cupti_share(trace, start_ns, end_ns, PAGEABLE)}


def costs(request: Request, between: Callable[[], object], rounds: int, seconds: float) -> dict[float, dict[str, Any]]:
    """Return the percentiles of each rate's latencies, and of each round; rates take turns in random order."""
    took: dict[float, list[list[float]]] = {hz: [] for hz in RATES_HZ}
    order, shuffler = list(RATES_HZ), random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for hz in order:
            gpuscope.enable(exporters="none", metrics="none", sample_hz=hz)
            serve(request, between, 0.02)
            took[hz].append(serve(request, between, seconds))
            gpuscope.flush(10)
    gpuscope.shutdown()
    return {hz: percentiles(blocks) for hz, blocks in took.items()}


def percentiles(blocks: list[list[float]]) -> dict[str, Any]:
    pooled = sorted(each for block in blocks for each in block)
    found: dict[str, Any] = {"requests": len(pooled)}
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        found[name] = percentile(pooled, share)
        found[f"{name} of a round"] = [percentile(sorted(block), share) for block in blocks]
    return found


def ratio(cost: dict[float, dict[str, Any]], hz: float, name: str) -> float:
    """The median over the rounds of a rate's percentile beside that without questions, of the same round."""
    of_round = f"{name} of a round"
    return median([one / off for one, off in zip(cost[hz][of_round], cost[0.0][of_round], strict=True)])


def run(make: Callable[[], tuple[Request, Callable[[], object]]], rounds: int, seconds: float) -> dict[str, Any]:
    request, between = make()
    for _ in range(WARMUP):
        request()
    shares = {}
    if has_cuda():
        shares = {hz: watched(request, between, hz, max(4 * seconds, 0.8)) for hz in RATES_HZ if hz}
    return {"shares": shares, "cost": costs(request, between, rounds, seconds)}


def show(results: dict[str, dict[str, Any]]) -> None:
    lines = []
    for name, result in results.items():
        share = result["shares"].get(CHOSEN_HZ)
        cells = [f"{100 * share['sampled']:.1f}", f"{100 * share['cupti']:.1f}"] if share else ["", ""]
        cells += [f"{ratio(result['cost'], hz, which):.3f}" for hz in RATES_HZ[1:] for which in ("p50", "p99")]
        lines.append([name, *cells])
    rates = [f"{which}, {hz:g} Hz" for hz in RATES_HZ[1:] for which in ("p50", "p99")]
    print(table(["program", "sampled %", "CUPTI %", *rates], lines))


def goals_of(results: dict[str, dict[str, Any]]) -> list[Goal]:
    found = [Goal("programs", len(results), 20, at_least=True)]
    shares = [each["shares"][CHOSEN_HZ] for each in results.values() if each["shares"]]
    if shares:
        bias = [each["sampled"] - each["cupti"] for each in shares]
        under = [each["cupti, pageable copies apart"] - each["sampled"] for each in shares]
        found += [
            Goal("sampled above CUPTI's share, at most", 100 * max(bias), 25, " points"),
            Goal("sampled below CUPTI's share, pageable copies apart, at most", 100 * max([0.0, *under]), 3, " points"),
        ]
    for which, limit in (("p50", 1.005), ("p99", 1.01)):
        ratios = [ratio(each["cost"], CHOSEN_HZ, which) for each in results.values()]
        found.append(
            Goal(f"{which} with {CHOSEN_HZ:g} questions a second, median over the programs", median(ratios), limit, "x")
        )
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--only", default="", help="run only programs with one of these, between commas, in their names"
    )
    parser.add_argument("--rounds", type=int, default=8, help="how often each rate has its turn")
    parser.add_argument("--block", type=float, default=0.3, help="seconds of one turn")
    parser.add_argument("--minutes", type=float, default=60, help="begin no program after so long")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    rounds, seconds = (2, 0.05) if options.quick else (options.rounds, options.block)
    if not has_cuda():
        print("Without a GPU nothing is asked; this runs one program, to see that it works.")
    results, failed = {}, {}
    for name, make in programs().items():
        if not any(part in name for part in options.only.split(",")) or time.monotonic() > until:
            continue
        began = time.monotonic()
        try:
            results[name] = run(make, rounds, seconds)
        except Exception as error:  # one program that cannot run here must not hide the others
            failed[name] = repr(error)
        print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    if results:
        show(results)
    for name, error in failed.items():
        print(f"could not run `{name}`: {error}")
    goals = goals_of(results) if results else []
    save("busy", options.out, goals=goals, rates_hz=RATES_HZ, results=results, failed=failed)
    sys.exit(0 if results and not failed and all(goal.met for goal in goals) else 1)


if __name__ == "__main__":
    main()
