"""
One or two things to try next, for a verdict and what led to it, or to come to a verdict.

Words only: every condition is a figure that was found elsewhere. Knows no stage by its name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuscope.analysis._verdicts.findings import CPU_BOUND, GPU_BOUND, PIPELINE_BOUND

if TYPE_CHECKING:
    from gpuscope.analysis._verdicts.fit import Fit

MOST = 0.5
"""The larger part of something."""
OFTEN = 2
"""Waits a request that are more than the one that it needs."""

# For a verdict.
OVERLAP = "Prepare the next request while the GPU works on this one: double buffering, as `gpuscope.overlap` does."
PINNED = "Copy with `non_blocking=True` from pinned memory that is allocated once: `gpuscope.PinnedPool`."
COPY_BESIDE = "Copy on a stream of its own, beside the compute: `gpuscope.overlap`."
LESS_ON_THE_HOST = (
    "If it works on the host: do that beside the GPU's work on another request, in a thread. If it launches "
    'kernels: fewer, by `torch.compile(mode="reduce-overhead")`, a CUDA graph or fusing.'
)
BATCH = "Most of its cost is per call: batch, so that fewer calls do the same."
ONE_WAIT = "Keep on the GPU what is read in between (`.item()`, `if tensor:`), and wait once, at the end."
LATER = "Record an event and wait for it when the result is needed, with host work in between."
LESS_GPU_WORK = (
    "Less GPU work: lower precision, fusing by `torch.compile`, a smaller model. Faster launching gains nothing."
)
LESS_IN_THE_GRAPH = "Less GPU work in it: lower precision, fusing, a smaller model. The host is not in it."
IF_IT_WAITS = (
    "If it waits for the GPU inside (`.cpu()`, `.item()`, `synchronize()`): give that call a stage of its own."
)
BETWEEN = "Do what happens between requests beside the next request: `gpuscope.overlap`, or another thread."

# Of the deep look.
FEWER_LAUNCHES = 'Fewer kernels: `torch.compile(mode="reduce-overhead")`, a CUDA graph or fusing.'
SMALL_TENSORS = (
    "Make such tensors once and keep them on the GPU, make them there (`torch.full`, `torch.arange` with `device=`), "
    "or several as one."
)
FEWER_BYTES = "Fewer bytes: a smaller type on the way, or only what is needed."
HOST_BESIDE = "Do it in another thread, or beside the GPU's work on another request: `gpuscope.overlap`."
WITH_CUPTI = (
    "If it uses a GPU, another tool (Nsight, DCGM's profiling) may hold CUPTI, which serves one; end that tool. After "
    "another profile of the same process CUPTI may have been lost, too: look at a fresh one."
)

# For want of one.
SPLIT_WAIT = (
    "Give the call that waits for the GPU (`.cpu()`, `.item()`, `synchronize()`) a stage of its own; if it copies, "
    "with an attribute `bytes`."
)
SPLIT_HOST = "Give the host work before the launches a stage of its own."
SPLIT_KINDS = "If it does different things in different calls, give them stages of different names."
LOOK_INSIDE = "`gpuscope profile` shows the kernels, copies and waits inside."
MORE_CALLS = "Record for longer."
RECORD_MORE = "Raise `GPUSCOPE_QUEUE_SIZE`, or look at `gpuscope.statistics()` for what was lost and why."
WITH_GPU = "`gpuscope doctor` says whether GPU times can be recorded here; put graph captures into the warm-up."
SPLIT_TASKS = "Give each task or thread an outermost stage of its own."
LARGER_STAGE = "Put one stage around several of such calls."
ONE_GPU = "Give the work on each GPU an outermost stage of its own."


def begin_with(stage: str) -> str:
    """Return the advice to look at an inner stage first."""
    return f"Begin with `{stage}`, which has the largest part in it."


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
    Return what to try, the most promising first; nothing for `unknown`.

    Args:
        verdict: One of the four.
        waits: How often a request waits for the GPU in it.
        wait_share: The part of its time in which the host waits for the GPU or for a copy.
        copy_share: The part of its time in which the host waits for a copy.
        copies: Whether it says how many `bytes` it moves.
        waits_for: The stage whose GPU work it waits for.
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
