"""
How busy the GPU was in deep looks that were taken now and then, and whether answers of streams say the same.

Deep looks see kernels and copies; answers tell of work that is queued or runs, which is more. Decides nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpuscope.analysis._busy.estimate import Sums, share_of_sums

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gpuscope.analysis.recording import Recording

MOST_ABOVE = 0.2
"""
By so much answers lie above the time that kernels run, at most: 3 to 20 points on an H100, beside CUPTI.
"""


@dataclass(frozen=True, kw_only=True)
class LookedAt:
    """What deep looks saw of a stage."""

    share: float
    """The part of its time in which the GPU computed or copied."""
    range: tuple[float, float] | None
    """The 95 % interval of that, over requests; None with fewer than 10."""
    kernels: float
    """Per call."""
    requests: int
    """How many it rests on."""
    agrees: bool | None = None
    """Whether answers of streams say the same, within both intervals; None where either has none."""


def looked_at(recording: Recording) -> dict[tuple[str, str], LookedAt]:
    """Return what looks saw of each stage, by kind of request and stage, over all processes."""
    sums: dict[tuple[str, str], list[float]] = {}
    for _, each in recording.looks:
        found = sums.setdefault((each.root, each.stage), [0.0] * 8)
        values = (each.requests, each.busy_s, each.time_s, each.busy2_s2, each.time2_s2, each.both_s2)
        for place, value in enumerate((*values, each.kernels, each.calls)):
            found[place] += value
    return {key: _looked(*found) for key, found in sums.items() if found[2] > 0}


def _looked(requests: float, busy: float, time: float, *more: float) -> LookedAt:
    *squares, kernels, calls = more
    share = share_of_sums(Sums(int(requests), busy, time, *squares))
    return LookedAt(
        share=min(1.0, busy / time),
        range=None if share is None else (share.low, share.high),
        kernels=kernels / max(1.0, calls),
        requests=int(requests),
    )


def agree(looked: LookedAt, answered: tuple[float, float] | None, copies: float) -> bool | None:
    """
    Tell whether looks and answers can both be right; None where either has no interval.

    Args:
        looked: What looks saw.
        answered: The interval of the answers.
        copies: The part of the time in copies that the host waits for, which answers leave out.

    """
    if looked.range is None or answered is None:
        return None
    low, high = looked.range
    return low - copies <= answered[1] and answered[0] - MOST_ABOVE <= high


def sentences(found: Iterable[tuple[str, str, LookedAt, tuple[float, float] | None]]) -> list[str]:
    """Return where looks and answers do not agree, or that they do; of (request, stage, looks, answers)."""
    compared = [each for each in found if each[2].agrees is not None]
    apart = [_apart(*each) for each in compared if each[2].agrees is False]
    if apart or not compared:
        return apart
    requests = max(looked.requests for _, _, looked, _ in compared)
    return [f"Deep looks at {requests} requests agree with what streams answered."]


def _apart(root: str, stage: str, looked: LookedAt, answered: tuple[float, float] | None) -> str:
    where = f"`{stage}`" if stage == root else f"`{stage}` in `{root}`"
    return (
        f"Deep looks and answers do not agree on {where}: in looks at {looked.requests} requests the GPU worked for "
        f"{_within(looked.range)} of the time, and streams said that they had work for {_within(answered)}."
    )


def _within(ends: tuple[float, float] | None) -> str:
    return "-" if ends is None else f"{100 * ends[0]:.0f} to {100 * ends[1]:.0f}%"
