"""
Two recordings of one program, before and after a change: what became faster or slower, and whether the whole shows it.

Compares medians of calls after the warm-up. What two runs differ by without any change, no single pair of recordings
can tell: the intervals are of the noise within them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuscope.analysis._median import CONFIDENCE, median_change
from gpuscope.analysis._structure.kinds import end_to_end_ns, kinds

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from gpuscope.analysis._structure.kinds import StageInRequest
    from gpuscope.analysis.recording import Recording

MIN_CALLS = 20
"""Fewer, and the interval of a median is nearly all that was seen."""
FASTER, SLOWER, NOISE, FEW = "faster", "slower", "within noise", "too few"
SIDES = {"host": "on the host", "gpu": "on the GPU"}


@dataclass(frozen=True, kw_only=True)
class Change:
    """Of a median duration; `None` where there were no calls to take it of."""

    calls: tuple[int, int]
    """Before and after, warm-up left out."""
    before_ms: float | None
    after_ms: float | None
    change_ms: float | None
    relative: float | None
    """The change as a part of the median before."""
    low_ms: float | None
    """The ends of the 99 % confidence interval of the change."""
    high_ms: float | None
    verdict: str
    """`faster` or `slower` where the interval leaves out zero, else `within noise`; `too few` below `MIN_CALLS`."""

    def is_slower(self, allowed: float) -> bool:
        """Return whether the median rose, beyond noise, by more than this part of what it was."""
        return self.verdict == SLOWER and (self.relative is None or self.relative > allowed)


@dataclass(frozen=True, kw_only=True)
class StageChange:
    """One stage within one kind of request, in one lane."""

    name: str
    root: str
    depth: int
    lane: str
    """`host` or `gpu`."""
    change: Change
    effect_ms: float | None
    """Change of its time a request, by its median and its calls; only of calls with no stage inside, else None."""


@dataclass(frozen=True, kw_only=True)
class RequestChange:
    """One kind of request, from its start until everything in it has ended."""

    name: str
    change: Change
    effects_ms: dict[str, float]
    """The sum of its stages' effects, by lane."""
    remarks: tuple[str, ...]
    """Sentences on what the whole does not show."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All changes; a stage of either recording is in it."""

    requests: tuple[RequestChange, ...]
    stages: tuple[StageChange, ...]
    confidence: float = CONFIDENCE

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, as JSON can hold it."""
        return asdict(self)


def compare(before: Recording, after: Recording) -> Comparison:
    """Return what changed between two recordings."""
    both = _Calls(before), _Calls(after)
    # In the order of the recording before; what is new, after that.
    keys = list(dict.fromkeys(key for calls in both for key in calls.kinds))
    stages = [stage for key in keys for lane in SIDES if (stage := _stage(*both, key, lane))]
    roots = [key for key in keys if key[0] == key[1]]
    return Comparison(
        requests=tuple(_request(*both, key, [stage for stage in stages if stage.root == key[1]]) for key in roots),
        stages=tuple(stages),
    )


Key = tuple[str, str]
"""Names of a stage and of its root."""


class _Calls:
    """The calls of one recording that count."""

    def __init__(self, recording: Recording) -> None:
        self.kinds: dict[Key, StageInRequest] = {(kind.name, kind.root): kind for kind in kinds(recording)}
        self._end_to_end_ns = end_to_end_ns(recording)
        self._recording, self._warmup = recording, recording.in_warmup_request
        self._lanes = {
            "host": (~recording.in_graph, recording.host_end_ns - recording.host_start_ns),
            "gpu": (recording.stream >= 0, recording.gpu_end_ns - recording.gpu_start_ns),
        }

    def stage(self, key: Key, lane: str) -> NDArray[np.float64]:
        """Return the durations of a stage."""
        has_lane, duration_ns = self._lanes[lane]
        return duration_ns[self._rows(key, has_lane & ~self._warmup)] / 1e6

    def requests(self, key: Key) -> NDArray[np.float64]:
        """Return the durations of requests."""
        return self._end_to_end_ns[self._requests(key)] / 1e6

    def leaves(self, key: Key, lane: str) -> NDArray[np.int64]:
        """Return the rows, warm-up or not, of a stage's calls with no stage inside."""
        return self._rows(key, self._lanes[lane][0] & self._recording.leaf)

    def share_ms(self, key: Key, lane: str) -> float | None:
        """Return the time a request of a stage's calls with no stage inside, None if there are too few to say."""
        rows, requests = self.leaves(key, lane), self._requests((key[1], key[1]))
        counted = rows[~self._warmup[rows]]
        if not len(rows) and len(requests) >= MIN_CALLS:
            return 0.0
        if min(len(counted), len(requests)) < MIN_CALLS:
            return None
        calls = np.isin(self._recording.root[rows], requests).sum()
        return float(np.median(self._lanes[lane][1][counted]) / 1e6 * calls / len(requests))

    def _requests(self, key: Key) -> NDArray[np.int64]:
        return self._rows(key, (self._recording.parent < 0) & ~self._warmup)

    def _rows(self, key: Key, where: NDArray[np.bool_]) -> NDArray[np.int64]:
        rows = self.kinds[key].rows if key in self.kinds else np.empty(0, np.int64)
        return rows[where[rows]]


def _stage(before: _Calls, after: _Calls, key: Key, lane: str) -> StageChange | None:
    """Return the change of a stage in a lane, None for a GPU lane in which it has no calls."""
    change = _change(before.stage(key, lane), after.stage(key, lane))
    if lane != "host" and not any(change.calls):
        return None
    depth = (before.kinds.get(key) or after.kinds[key]).depth
    effect_ms = _effect(before, after, key, lane)
    return StageChange(name=key[0], root=key[1], depth=depth, lane=lane, change=change, effect_ms=effect_ms)


def _effect(before: _Calls, after: _Calls, key: Key, lane: str) -> float | None:
    share_before, share_after = before.share_ms(key, lane), after.share_ms(key, lane)
    is_leaf = len(before.leaves(key, lane)) or len(after.leaves(key, lane))
    return share_after - share_before if is_leaf and share_before is not None and share_after is not None else None


def _request(before: _Calls, after: _Calls, key: Key, stages: list[StageChange]) -> RequestChange:
    change = _change(before.requests(key), after.requests(key))
    lanes = {lane: [stage for stage in stages if stage.lane == lane] for lane in SIDES}
    return RequestChange(
        name=key[0],
        change=change,
        effects_ms={lane: _sum(inside) for lane, inside in lanes.items()},
        remarks=tuple(remark for lane, inside in lanes.items() if (remark := _remark(SIDES[lane], change, inside))),
    )


def _sum(stages: Iterable[StageChange]) -> float:
    return sum(stage.effect_ms or 0.0 for stage in stages)


def _remark(where: str, whole: Change, stages: list[StageChange]) -> str:
    """Return a sentence where the whole does not show, or cannot show, half of what the stages gain."""
    gained_ms = -_sum(stages)
    names = ", ".join(f"`{stage.name}`" for stage in stages if stage.effect_ms and stage.change.verdict == FASTER)
    if not names or gained_ms <= 0 or whole.verdict == FEW or whole.low_ms is None:
        return ""
    start = f"{names} became faster {where}, and all stages together gain {gained_ms:.3f} ms a request there"
    if -whole.low_ms < gained_ms / 2:
        shown = f"at most {-whole.low_ms:.3f} ms" if whole.low_ms < 0 else "nothing"
        return f"{start}; the whole request gains {shown}: this is not what it waits for."
    if whole.verdict != FASTER:
        return f"{start}; the whole request varies too much to tell whether it gains from that."
    return ""


def _change(before: NDArray[np.float64], after: NDArray[np.float64]) -> Change:
    before_ms, after_ms = (float(np.median(values)) if len(values) else None for values in (before, after))
    change_ms, low_ms, high_ms = median_change(before, after) if len(before) and len(after) else (None, None, None)
    few = min(len(before), len(after)) < MIN_CALLS
    return Change(
        calls=(len(before), len(after)),
        before_ms=before_ms,
        after_ms=after_ms,
        change_ms=change_ms,
        relative=change_ms / before_ms if before_ms and change_ms is not None else None,
        low_ms=low_ms,
        high_ms=high_ms,
        verdict=FEW if few or low_ms is None or high_ms is None else _verdict(low_ms, high_ms),
    )


def _verdict(low_ms: float, high_ms: float) -> str:
    if low_ms > 0:
        return SLOWER
    return FASTER if high_ms < 0 else NOISE
