"""
What to try next: one or two sentences for a verdict and the figures behind it, or on how to get to a verdict.

Words only: the figures come from elsewhere, and nothing here computes one. Knows no stage by its name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuscope.analysis._verdicts.findings import CPU_BOUND, GPU_BOUND, PIPELINE_BOUND

if TYPE_CHECKING:
    from gpuscope.analysis._verdicts.fit import Fit

MOST = 0.5
"""The larger part of something."""
OFTEN = 2
"""Waits per request that are more than the one that a request needs."""

# For a verdict.
OVERLAP = "Prepare the next request while the GPU works on this one: double buffering, as `gpuscope.overlap` does."
PINNED = "Copy with `non_blocking=True` from pinned memory that is allocated once: `gpuscope.PinnedPool`."
COPY_BESIDE = "Copy on a stream of its own, beside the compute: `gpuscope.overlap`."
LESS_ON_THE_HOST = (
    "If it computes on the host, do that in a thread, while the GPU works on another request. If it launches "
    'kernels, launch fewer: `torch.compile(mode="reduce-overhead")`, a CUDA graph, or fusing.'
)
BATCH = "Most of its cost is per call: batch, so that fewer calls do the same work."
ONE_WAIT = "Keep values that are read in between (`.item()`, `if tensor:`) on the GPU, and wait once, at the end."
LATER = "Record an event, go on with host work, and wait for the event when the result is needed."
LESS_GPU_WORK = (
    "Give the GPU less work: lower precision, fusing with `torch.compile`, a smaller model. Faster launching gains "
    "nothing."
)
LESS_IN_THE_GRAPH = (
    "Give the GPU less work in it: lower precision, fusing, a smaller model. The host has no part in it."
)
IF_IT_WAITS = (
    "If it waits for the GPU inside (`.cpu()`, `.item()`, `synchronize()`), give that call a stage of its own."
)
BETWEEN = "Do what happens between requests during the next request: `gpuscope.overlap`, or another thread."

# For what a deep look shows.
FEWER_LAUNCHES = 'Launch fewer kernels: `torch.compile(mode="reduce-overhead")`, a CUDA graph, or fusing.'
SMALL_TENSORS = (
    "Make such tensors once and keep them on the GPU, make them there (`torch.full`, `torch.arange` with `device=`), "
    "or copy several as one."
)
FEWER_BYTES = "Copy fewer bytes: a smaller dtype, or only what is needed."
TO_THE_GPU = "Move it to the GPU: create these tensors there, or move the model or the input with `.to(device)`."
HOST_BESIDE = "Do it in another thread, or while the GPU works on another request: `gpuscope.overlap`."
WITH_CUPTI = (
    "If the program uses a GPU, another tool (Nsight, DCGM's profiling) may hold CUPTI, which serves one tool at a "
    "time: end that tool. An earlier profile of this process may also have lost CUPTI: profile a fresh process."
)

# To get to a verdict.
SPLIT_WAIT = (
    "Give the call that waits for the GPU (`.cpu()`, `.item()`, `synchronize()`) a stage of its own, with an attribute "
    "`bytes` if it copies."
)
SPLIT_HOST = "Give the host work before the launches a stage of its own."
SPLIT_KINDS = "If it does different things in different calls, give them stages with different names."
LOOK_INSIDE = "`gpuscope profile` shows the kernels, copies and waits inside."
MORE_CALLS = "Record for longer."
ASK_THE_GPU = (
    "Record with gpuscope's parts in C and `GPUSCOPE_SAMPLE_HZ` above 0: then streams are asked whether they have work."
)
RECORD_MORE = "Raise `GPUSCOPE_QUEUE_SIZE`, or see in `gpuscope.statistics()` what was lost and why."
WITH_GPU = "`gpuscope doctor` says whether GPU times can be recorded here; put graph captures into the warm-up."
SPLIT_TASKS = "Give each task or thread an outermost stage of its own."
LARGER_STAGE = "Put one stage around several such calls."
OWN_GPU = "Record while no other process is on the GPU, or give this one a GPU of its own."
ONE_GPU = "Give the work on each GPU an outermost stage of its own."

# For what the host alone shows.
COMPILE_BEFORE = (
    "Run each shape once before the first request, or compile for shapes that change: "
    "`torch.compile(model, dynamic=True)`."
)
INNER_STAGES = "Put stages on the parts of `{}`."
BETWEEN_STAGES = "Put stages on what runs between the stages."
LOOK_INTO = "Look into `{}`: put stages on its parts, or sample it with a profiler of Python code."
GC_FREEZE = "Call `gc.collect()` and then `gc.freeze()` once it is warm, so that what stays is not looked at again."
GC_FEWER = "Fewer new objects per request, or a higher `gc.set_threshold`, makes them rarer."
QUEUE_FOR_BATCH = "More at a time: a larger batch, if that costs little more, or another replica."
WAIT_FOR_BATCH = "Let it begin sooner: a shorter waiting time, or a smaller batch."
IN_BATCH = (
    "Make {} itself shorter: its own lines here say where its time goes. A smaller batch helps as far as its time "
    "grows with its size."
)


def begin_with(stage: str) -> str:
    """Return the advice to look at an inner stage first."""
    return f"Begin with `{stage}`, which has the largest share in it."


def advise(
    verdict: str,
    *,
    waits: float,
    wait_share: float,
    copy_share: float,
    copies: bool,
    waits_for: str | None,
    cost: Fit | None,
) -> tuple[str, ...]:
    """
    Return what to try for a stage or a kind of request, the most promising first; nothing for `unknown`.

    Args:
        verdict: One of the four.
        waits: Waits for the GPU in it, per request.
        wait_share: The part of its time, from 0 to 1, in which the host waits for the GPU or for a copy.
        copy_share: The part of its time in which the host waits for a copy.
        copies: Whether it says how many `bytes` it moves.
        waits_for: The stage whose GPU work the host waits for in it.
        cost: Its cost per call and per item, if known.

    """
    many = waits >= OFTEN
    if verdict == GPU_BOUND:
        if wait_share >= MOST:
            return begin_with(waits_for) if waits_for else LESS_GPU_WORK, ONE_WAIT if many else LATER
        return (COPY_BESIDE,) if copies else (LESS_GPU_WORK,)
    if verdict == CPU_BOUND:
        fixed = cost is not None and cost.fixed_share >= MOST
        return BATCH if fixed else LESS_ON_THE_HOST, IF_IT_WAITS
    if verdict == PIPELINE_BOUND:
        if copy_share >= wait_share / 2:
            return PINNED, COPY_BESIDE
        return ONE_WAIT if many else OVERLAP, LATER
    return ()
