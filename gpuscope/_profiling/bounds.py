"""
Decides what bounds a stage, from where its time goes, and what to try. Sees averages of a stage, never a trace.

It asks the two questions of the verdicts: does the GPU have work, and does the host wait? If the GPU has work, the
longer of computing and copying bounds the stage. If it has none, and the host does not wait either, the stage is bound
by what the host does meanwhile. If each waits for the other, the waiting bounds it.
"""

from __future__ import annotations

from typing import NamedTuple

from gpuscope._data.plain.durations import duration
from gpuscope._data.plain.numbers import number
from gpuscope._profiling.findings import (
    COMPUTE_BOUND,
    DISPATCH_BOUND,
    HOST_BOUND,
    PER_CALL,
    PROPORTIONAL,
    SYNC_BOUND,
    TRANSFER_BOUND,
    UNKNOWN,
    Copies,
    size,
)
from gpuscope.analysis._verdicts import advice

ENOUGH = 0.2
"""The share of the time from which idleness or waiting matters; the same as for the verdicts."""
MOST = 0.5
"""The larger part of something."""
PER_LAUNCH_US = 10.0
"""About what PyTorch takes to launch one kernel; shorter work costs per call, however much it does."""


class Content(NamedTuple):
    """What is in a call of a stage, on average; times are milliseconds, as `findings.StageLook` describes them."""

    ms: float
    compute: float
    transfer: float
    dispatch: float
    sync: float
    host_only: float
    computing: float
    wait: float
    copy_wait: float
    waits_for: str | None
    waits_for_others: float
    """Time in which the host waits for kernels of other stages."""
    kernel_us: float | None
    """Half of the time of its kernels is in longer ones."""
    copy_us: float | None
    """The same of its copies."""
    launches: float
    copies: tuple[Copies, ...]
    small_copies: float
    waits: float
    """Number of calls that wait."""
    has_gpu: bool
    """Whether the trace has any GPU work."""


class Bound(NamedTuple):
    """What bounds a stage, why, and what to try."""

    bound: str
    because: str
    overhead: str | None = None
    next_steps: tuple[str, ...] = ()


def decide(of: Content) -> Bound:
    """Return what bounds a stage."""
    if not of.has_gpu:
        return Bound(UNKNOWN, "The trace has no GPU work in it.")
    idle = of.dispatch + of.sync + of.host_only
    if of.waits_for_others >= MOST * of.ms:
        return _waits_for_another(of)
    if idle < ENOUGH * of.ms:
        return _copies(of) if of.transfer > of.compute else _computes(of)
    if of.wait + of.copy_wait >= ENOUGH * of.ms:
        return _copies(of) if of.copy_wait >= of.wait else _takes_turns(of, idle)
    cause = max(of.dispatch, of.sync, of.host_only)
    if cause == of.host_only:
        return _works_on_the_host(of, idle)
    return _launches(of, idle) if cause == of.dispatch else _synchronises(of, idle)


def _waits_for_another(of: Content) -> Bound:
    whose = f"the work of `{of.waits_for}`" if of.waits_for else "earlier work"
    steps = (advice.begin_with(of.waits_for),) if of.waits_for else ()
    because = f"For {_part(of.waits_for_others, of)} of the time the host waits for {whose}."
    return Bound(SYNC_BOUND, because, None, (*steps, advice.LATER))


def _copies(of: Content) -> Bound:
    moved, took_ms = sum(each.bytes for each in of.copies), sum(each.ms for each in of.copies)
    pageable_ms = sum(each.ms for each in of.copies if each.pageable)
    because = (
        f"For {_part(of.transfer, of)} of the time the GPU only copies, and for {_part(of.copy_wait, of)} the host "
        f"waits for that{f': {size(moved)} at {number(moved / took_ms / 1e6)} GB/s' if took_ms else ''}."
    )
    short = of.copy_us is not None and of.copy_us < PER_LAUNCH_US
    first, second = (advice.PINNED, advice.COPY_BESIDE), (advice.COPY_BESIDE, advice.FEWER_BYTES)
    steps = first if pageable_ms >= MOST * took_ms else second
    return Bound(TRANSFER_BOUND, because, PER_CALL if short else PROPORTIONAL, steps)


def _computes(of: Content) -> Bound:
    because = f"The GPU computes for {_part(of.compute, of)} of the time, and the host keeps it supplied."
    short = of.kernel_us is not None and of.kernel_us < PER_LAUNCH_US
    return Bound(COMPUTE_BOUND, because, PER_CALL if short else PROPORTIONAL, (advice.LESS_GPU_WORK,))


def _takes_turns(of: Content, idle: float) -> Bound:
    because = (
        f"Host and GPU take turns: for {_part(of.wait, of)} of the time the host waits for kernels, and for "
        f"{_part(idle, of)} the GPU has nothing to do."
    )
    many = of.waits >= advice.OFTEN
    return Bound(
        SYNC_BOUND, because, PER_CALL if many else None, (advice.ONE_WAIT if many else advice.OVERLAP, advice.LATER)
    )


def _works_on_the_host(of: Content, idle: float) -> Bound:
    in_pytorch = of.computing >= MOST * of.host_only
    because = f"The GPU has nothing to do for {_part(idle, of)} of the time; for " + (
        f"{_part(of.computing, of)} the host meanwhile computes itself, in operators of PyTorch that use no GPU."
        if in_pytorch
        else f"{_part(of.host_only, of)} the host is meanwhile in neither PyTorch nor CUDA."
    )
    if in_pytorch:
        return Bound(HOST_BOUND, because, None, (advice.TO_THE_GPU, advice.HOST_BESIDE))
    return Bound(HOST_BOUND, because, None, (advice.HOST_BESIDE,))


def _launches(of: Content, idle: float) -> Bound:
    because = f"The GPU has nothing to do for {_part(idle, of)} of the time, while the host launches"
    if of.launches:
        each = f", and a kernel takes {duration(of.kernel_us / 1e3)}" if of.kernel_us is not None else ""
        because += f": {duration(of.dispatch / of.launches)} for each of {number(of.launches)} launches{each}"
    if of.small_copies >= max(1.0, MOST * of.launches):
        return Bound(
            DISPATCH_BOUND,
            f"{because}; it makes {number(of.small_copies)} tiny tensors.",
            PER_CALL,
            (advice.SMALL_TENSORS,),
        )
    return Bound(DISPATCH_BOUND, f"{because}.", PER_CALL, (advice.FEWER_LAUNCHES, advice.BATCH))


def _synchronises(of: Content, idle: float) -> Bound:
    because = (
        f"The GPU has nothing to do for {_part(idle, of)} of the time; for {_part(of.sync, of)} the host is meanwhile "
        f"in calls that wait for it: {number(of.waits)} of them."
    )
    return Bound(
        SYNC_BOUND, because, PER_CALL, ((advice.ONE_WAIT,) if of.waits >= advice.OFTEN else ()) + (advice.LATER,)
    )


def _part(ms: float, of: Content) -> str:
    return f"{ms / of.ms:.0%}" if of.ms else "0%"
