"""
Whether a stage inside a compiled region could be timed without changing the program: the evidence for leaving it out.

A stage would be two marks: calls of an operator that records an event. A mark that reads a tensor and carries an
ordered effect is not removed; a mark that hands on a copy of the tensor also has work before and after it. Each check
compiles the same function with and without marks, and tells whether the marked one is still the same program. Exits
with 1 if any check fails. Uses nothing of gpuscope.
"""

from __future__ import annotations

import contextlib
import re
import sys
from typing import TYPE_CHECKING, Any

import torch
from _common import arguments, save
from torch import Tensor
from torch._dynamo.utils import counters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Function = Callable[..., Tensor]
    Found = tuple[bool | None, str]

TITLE = "stages inside compiled regions"
WORDS = {True: "holds  ", False: "FAILS  ", None: "not run"}
SEEN: list[tuple[int, float]] = []
"""(which mark, sum of the tensor as it was then), in the order of execution."""
CALLS = r"^ +(?:((?:buf\d+ = )?torch\.ops\.stagemark)|\w+_fused_\w+[.(])"
"""Finds marks, which are a group, and kernels in the code that the default backend generates."""
EVENTS: list[torch.cuda.Event] = []


def register() -> None:
    """Define the mark; the registration of effects is private to PyTorch, from 2.10 on."""
    from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

    library = torch.library.Library("stagemark", "DEF")
    library.define("mark(Tensor x, int which) -> ()")
    library.impl("mark", _mark, "CompositeExplicitAutograd")
    library.impl("mark", lambda *_: None, "Meta")
    _register_effectful_op("stagemark::mark", _EffectType.ORDERED)
    library.define("through(Tensor x, int which) -> Tensor")
    library.impl("through", lambda x, which: (_mark(x, which), x.clone())[1], "CompositeExplicitAutograd")
    library.impl("through", lambda x, _: torch.empty_like(x), "Meta")
    register.kept = library  # type: ignore[attr-defined]  # A library that is collected takes its operators with it.


def _mark(x: Tensor, which: int) -> None:
    if not x.is_cuda:
        SEEN.append((which, float(x.sum())))
    else:  # An external event becomes a node of a graph that is captured.
        EVENTS.append(torch.cuda.Event(enable_timing=True, external=torch.cuda.is_current_stream_capturing()))
        EVENTS[-1].record()


def mark(x: Tensor, which: int) -> Tensor:
    """Mark the place at which x is there."""
    torch.ops.stagemark.mark(x, which)
    return x


def plain(x: Tensor) -> Tensor:
    """Return what one kernel computes."""
    return (torch.sin(x) * 2 + 1).relu() * x


def marked(x: Tensor) -> Tensor:
    """Return the same, the middle of it a stage between marks that read."""
    x1 = mark(torch.sin(x), 1)
    x2 = mark(x1 * 2 + 1, 2)
    return x2.relu() * x


def threaded(x: Tensor) -> Tensor:
    """Return the same, the middle of it a stage between marks that hand the tensor on."""
    through = torch.ops.stagemark.through
    return through(through(torch.sin(x), 1) * 2 + 1, 2).relu() * x


@contextlib.contextmanager
def fresh() -> Iterator[None]:
    """Begin with nothing compiled and nothing counted."""
    torch._dynamo.reset()
    counters.clear()
    SEEN.clear()
    EVENTS.clear()
    with torch._inductor.utils.fresh_cache():
        yield


def steps(function: Function, device: str) -> str:
    """Return what the code of the default backend does, in order: `k` a kernel, `|` a mark."""
    from torch._inductor.utils import run_and_get_code

    with fresh():
        _, (code,) = run_and_get_code(torch.compile(function, fullgraph=True), torch.ones(4096, device=device))
    calls = re.findall(CALLS, code, re.MULTILINE)
    return "".join("|" if mark else "k" for mark in calls)


def order(device: str) -> Found:
    """The work of the stage is between its marks, and no other work is."""
    found = {function.__name__: steps(function, device) for function in (plain, marked, threaded)}
    told = ", ".join(f"{name} {taken}" for name, taken in found.items())
    return found["marked"] == "k|k|k", f"{told} (k: a kernel, |: a mark)"


def values(device: str) -> Found:
    """Marks run in order, and see the right tensors."""
    x = torch.linspace(0, 1, 64, device=device)
    with fresh():
        run = torch.compile(marked, fullgraph=True)
        run(x)
        SEEN.clear()
        run(x)
    if device == "cuda":
        return len(EVENTS) == 4, f"{len(EVENTS)} of 4 events recorded"
    expected = [(1, float(torch.sin(x).sum())), (2, float((torch.sin(x) * 2 + 1).sum()))]
    right = [which for which, _ in SEEN] == [1, 2] and all(
        abs(a - b) < 1e-3 for (_, a), (_, b) in zip(SEEN, expected, strict=True)
    )
    return right, "in order, and the right tensors" if right else f"saw {SEEN}"


def results(device: str) -> Found:
    """Outputs and gradients are the same as without marks."""
    found = []
    for function in (plain, marked):
        x = torch.linspace(-1, 1, 64, device=device, requires_grad=True)
        with fresh():
            out = torch.compile(function, fullgraph=True)(x)
            out.sum().backward()
        found.append((out.detach(), x.grad))
    equal = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    return equal, "equal" if equal else "differ"


def fusion(device: str) -> Found:
    """There are as many kernels as without marks."""
    found = [steps(function, device).count("k") for function in (plain, marked, threaded)]
    return len(set(found)) == 1, "{} without, {} with marks that read, {} with marks that hand on".format(*found)


def shapes(device: str) -> Found:
    """Dynamic shapes do not compile more often."""
    often = []
    for function in (plain, marked):
        with fresh():
            run = torch.compile(function, fullgraph=True)
            for size in (16, 32, 48, 64):
                run(torch.ones(size, device=device))
            often.append(counters["stats"]["unique_graphs"])
    return often[0] == often[1], f"{often[0]} graphs without, {often[1]} with"


def caching(device: str) -> Found:
    """The caches of compiled programs still work."""
    found = []
    for function in (plain, marked):
        with fresh():
            for _ in range(2):
                torch._dynamo.reset()
                torch.compile(function, fullgraph=True)(torch.ones(64, device=device))
            hits = counters["aot_autograd"]["autograd_cache_hit"], counters["inductor"]["fxgraph_cache_hit"]
            bypasses = counters["aot_autograd"]["autograd_cache_bypass"], counters["inductor"]["fxgraph_cache_bypass"]
            found.append((hits, bypasses))
    told = "; ".join(f"hits {hits}, bypasses {bypasses}" for hits, bypasses in found)
    return found[0] == found[1], f"without and with: {told} (AOTAutograd, inductor)"


def transforms(device: str) -> Found:
    """`vmap` and `grad` go through it."""
    x, problems = torch.linspace(-1, 1, 12, device=device).reshape(3, 4), []
    for name, transform in (
        ("vmap", torch.func.vmap),
        ("grad", lambda function: torch.func.grad(lambda x: function(x).sum())),
    ):
        with fresh():
            torch.compile(transform(plain), fullgraph=True)(x)
            try:
                torch.compile(transform(marked), fullgraph=True)(x)
            except Exception as error:
                problems.append(f"{name}: {type(error).__name__}: {first_line(error)}")
    return not problems, "; ".join(problems) or "both compile"


def checkpointing(device: str) -> Found:
    """Activation checkpointing inside the region goes through it."""
    from torch.utils.checkpoint import checkpoint

    for function in (plain, marked):
        x = torch.linspace(-1, 1, 64, device=device, requires_grad=True)
        with fresh():
            run = torch.compile(lambda x, function=function: checkpoint(function, x, use_reentrant=False).sum())
            run(x).backward()
    marks = [which for which, _ in SEEN] or [1] * len(EVENTS)
    return len(marks) == 2, f"works; {len(marks)} marks of 2 run"


def control_flow(device: str) -> Found:
    """`torch.cond` and other higher-order operators take it in a branch."""
    x = torch.linspace(-1, 1, 64, device=device)
    for function in (plain, marked):
        with fresh():
            run = torch.compile(lambda x, function=function: torch.cond(x.sum() > 0, function, torch.sin, (x,)))
            run(x)
    return True, "works"


def export(device: str) -> Found:
    """An exported program has no marks in it."""

    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return marked(x)

    with fresh():
        program = torch.export.export(Net(), (torch.ones(8, device=device),))
        targets = {str(node.target) for node in program.run_decompositions().graph.nodes}
    inside = sorted(target for target in targets if "mark" in target or "effects" in target)
    return not inside, f"in the program: {inside}" if inside else "not in it"


def cuda_graphs(device: str) -> Found:
    """`mode="reduce-overhead"` still makes CUDA graphs, and what is between the marks takes its time in a replay."""
    if device != "cuda":
        return None, "needs a GPU"
    x, skips = torch.ones(1 << 24, device=device), []
    for function in (plain, marked):
        with fresh():
            run = torch.compile(function, fullgraph=True, mode="reduce-overhead")
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(6):
                torch.compiler.cudagraph_mark_step_begin()
                start.record()
                run(x)
                end.record()
            torch.cuda.synchronize()
            skips.append(counters["inductor"]["cudagraph_skips"])
            whole_us = start.elapsed_time(end) * 1000
    first, second = EVENTS[-2:]  # Those of the graph, which is captured last.
    between_us = first.elapsed_time(second) * 1000
    told = f"{skips[0]} graphs skipped without, {skips[1]} with; {between_us:.1f} us between marks, of {whole_us:.1f}"
    return skips[0] == skips[1] and between_us > 0.1 * whole_us, told


def launches(device: str) -> Found:
    """The GPU runs as many kernels for as long, to within a tenth."""
    if device != "cuda":
        return None, "needs a GPU"
    from torch.profiler import ProfilerActivity, profile

    x, calls, found = torch.ones(1 << 22, device=device), 30, []
    for function in (plain, marked, threaded):
        with fresh():
            run = torch.compile(function, fullgraph=True)
            with profile(activities=[ProfilerActivity.CUDA]):  # The first profile of a process is slow to begin.
                run(x)
                torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                for _ in range(calls):
                    run(x)
                torch.cuda.synchronize()
            ran = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
            found.append((len(ran) / calls, sum(event.device_time for event in ran) / calls))
    (before, before_us), (after, after_us), _ = found
    told = "; ".join(f"{kernels:g} in {us:.1f} us" for kernels, us in found)
    return before == after and after_us < 1.1 * before_us, f"without, with marks that read, that hand on: {told}"


CHECKS = (
    order,
    values,
    results,
    fusion,
    launches,
    shapes,
    caching,
    transforms,
    checkpointing,
    control_flow,
    export,
    cuda_graphs,
)


def first_line(error: BaseException) -> str:
    """Return the first line of an error that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:160]


def run_check(check: Callable[[str], Found], device: str) -> dict[str, Any]:
    """Return what a check found; an exception is an answer."""
    try:
        holds, told = check(device)
    except Exception as error:
        holds, told = False, f"{type(error).__name__}: {first_line(error)}"
    return {"check": check.__name__, "asked": (check.__doc__ or "").strip(), "holds": holds, "found": told}


def main() -> int:
    """Run all checks on the GPU, if there is one, else on the CPU."""
    options = arguments(__doc__ or "").parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    register()
    found = [run_check(check, device) for check in CHECKS]
    print(f"{TITLE}, PyTorch {torch.__version__}, on {device}")
    print(*(f"{WORDS[each['holds']]}  {each['check']}: {each['found']}" for each in found), sep="\n")
    save("check_compiled_stages", options.out, device=device, checks=found)
    return 1 if any(each["holds"] is False for each in found) else 0


if __name__ == "__main__":
    sys.exit(main())
