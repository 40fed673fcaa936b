"""
Two recordings of one program, before and after a change: what became faster or slower, and whether the whole shows it.

Compares medians of calls after the warm-up, by `_comparing`; explains no change. The intervals cover the noise within
the two recordings. How much two runs differ without any change, no single pair of recordings can tell.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from gpuscope._data.plain.durations import duration
from gpuscope._data.plain.markup import html_table
from gpuscope.analysis._comparing.change import (
    FASTER,
    FEW,
    MIN_CALLS,
    NOISE,
    NOISY,
    SLOWER,
    SMALL,
    WORTH,
    Change,
    change_between,
    slow_ones,
)
from gpuscope.analysis._comparing.median import CONFIDENCE
from gpuscope.analysis._structure.kinds import end_to_end_ns, kinds

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from gpuscope.analysis._plain import PlainDict
    from gpuscope.analysis._structure.kinds import StageInRequest
    from gpuscope.analysis.recording import Recording

__all__ = ["FASTER", "FEW", "MIN_CALLS", "NOISE", "NOISY", "SLOWER", "SMALL", "Change", "Comparison", "compare"]

SIDES = {"host": "on the host", "gpu": "on its stream"}


@dataclass(frozen=True, kw_only=True)
class StageChange:
    """One stage within one kind of request, on one side: host or GPU."""

    name: str
    root: str
    depth: int
    lane: str
    """The side: `host` or `gpu`."""
    change: Change
    effect_ms: float | None
    """Change of its time per request (median times calls), of calls with no stage inside; None without such calls."""


@dataclass(frozen=True, kw_only=True)
class RequestChange:
    """One kind of request, from its start until everything in it has ended."""

    name: str
    change: Change
    effects_ms: dict[str, float]
    """The sum of its stages' effects: `host` and `gpu`."""
    remarks: tuple[str, ...]
    """Sentences on gains of stages that the whole request does not show."""
    answer: str = ""
    """In a sentence: whether requests became faster or slower, by how much, and most of it where."""
    slow_ms: tuple[float, float] | None = None
    """The 99th percentiles before and after, where they differ beyond noise and by a tenth at least."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All changes, of the stages of both recordings."""

    requests: tuple[RequestChange, ...]
    stages: tuple[StageChange, ...]
    in_common: bool = True
    """Whether any kind of request is in both recordings."""
    confidence: float = CONFIDENCE

    def as_dict(self) -> PlainDict:
        """Return plain data, as JSON can hold it."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(self._sentences())

    def _repr_html_(self) -> str:
        rows = [
            [
                "  " * stage.depth + (stage.name if stage.lane == "host" else f"{stage.name}, on its stream"),
                duration(stage.change.before_ms),
                duration(stage.change.after_ms),
                "-" if stage.change.relative is None else f"{stage.change.relative:+.1%}",
                stage.change.verdict,
            ]
            for stage in self.stages
        ]
        return html_table(["stage", "before", "after", "change", "verdict"], rows, self._sentences())

    def _sentences(self) -> list[str]:
        return [sentence for request in self.requests for sentence in (request.answer, *request.remarks)]


def compare(before: Recording, after: Recording) -> Comparison:
    """Return what changed between two recordings of one program."""
    both = _Calls(before), _Calls(after)
    # In the order of the first recording; what is new in the second comes last.
    keys = list(dict.fromkeys(key for calls in both for key in calls.kinds))
    stages = [stage for key in keys for side in SIDES if (stage := _stage(*both, key, side))]
    roots = [key for key in keys if key[0] == key[1]]
    return Comparison(
        requests=tuple(_request(*both, key, [stage for stage in stages if stage.root == key[1]]) for key in roots),
        stages=tuple(stages),
        in_common=any(key in both[0].kinds and key in both[1].kinds for key in roots),
    )


Key = tuple[str, str]
"""Names of a stage and of its root."""


class _Calls:
    """The calls of one recording, warm-up left out."""

    def __init__(self, recording: Recording) -> None:
        self.kinds: dict[Key, StageInRequest] = {(kind.name, kind.root): kind for kind in kinds(recording)}
        self._end_to_end_ns = end_to_end_ns(recording)
        self._recording, self._warmup = recording, recording.in_warmup_request
        self._sides = {
            "host": (~recording.in_graph, recording.host_end_ns - recording.host_start_ns),
            "gpu": (recording.stream >= 0, recording.gpu_end_ns - recording.gpu_start_ns),
        }

    def stage(self, key: Key, side: str) -> NDArray[np.float64]:
        """Return the durations of a stage, in milliseconds."""
        on_side, duration_ns = self._sides[side]
        return duration_ns[self._rows(key, on_side & ~self._warmup)] / 1e6

    def requests(self, key: Key) -> NDArray[np.float64]:
        """Return the durations of requests, in milliseconds."""
        return self._end_to_end_ns[self._requests(key)] / 1e6

    def often(self, key: Key) -> float:
        """Return how many calls of a stage a request has."""
        requests = self._requests((key[1], key[1]))
        return len(self._rows(key, ~self._warmup)) / len(requests) if len(requests) else 0.0

    def leaves(self, key: Key, side: str) -> NDArray[np.int64]:
        """Return the rows of a stage's calls with no stage inside, warm-up included."""
        return self._rows(key, self._sides[side][0] & self._recording.leaf)

    def share_ms(self, key: Key, side: str) -> float | None:
        """Return the time per request of a stage's calls with no stage inside; None if there are too few to say."""
        rows, requests = self.leaves(key, side), self._requests((key[1], key[1]))
        counted = rows[~self._warmup[rows]]
        if not len(rows) and len(requests) >= MIN_CALLS:
            return 0.0
        if min(len(counted), len(requests)) < MIN_CALLS:
            return None
        calls = np.isin(self._recording.root[rows], requests).sum()
        return float(np.median(self._sides[side][1][counted]) / 1e6 * calls / len(requests))

    def _requests(self, key: Key) -> NDArray[np.int64]:
        return self._rows(key, (self._recording.parent < 0) & ~self._warmup)

    def _rows(self, key: Key, where: NDArray[np.bool_]) -> NDArray[np.int64]:
        rows = self.kinds[key].rows if key in self.kinds else np.empty(0, np.int64)
        return rows[where[rows]]


def _stage(before: _Calls, after: _Calls, key: Key, side: str) -> StageChange | None:
    """Return the change of a stage on one side; None for the GPU's side if the stage has no calls there."""
    change = change_between(before.stage(key, side), after.stage(key, side), _worth_ms(before, after, key))
    if side != "host" and not any(change.calls):
        return None
    depth = (before.kinds.get(key) or after.kinds[key]).depth
    effect_ms = _effect(before, after, key, side)
    return StageChange(name=key[0], root=key[1], depth=depth, lane=side, change=change, effect_ms=effect_ms)


def _worth_ms(before: _Calls, after: _Calls, key: Key) -> float:
    """Return from which change of a call on a request of this kind takes notice: a call may come many times in it."""
    root = (key[1], key[1])
    took = before.requests(root) if len(before.requests(root)) else after.requests(root)
    often = max(calls.often(key) for calls in (before, after))
    return WORTH * float(np.median(took)) / max(often, 1.0) if len(took) else 0.0


def _effect(before: _Calls, after: _Calls, key: Key, side: str) -> float | None:
    share_before, share_after = before.share_ms(key, side), after.share_ms(key, side)
    is_leaf = len(before.leaves(key, side)) or len(after.leaves(key, side))
    return share_after - share_before if is_leaf and share_before is not None and share_after is not None else None


def _request(before: _Calls, after: _Calls, key: Key, stages: list[StageChange]) -> RequestChange:
    change = change_between(before.requests(key), after.requests(key), _worth_ms(before, after, key))
    sides = {side: [stage for stage in stages if stage.lane == side] for side in SIDES}
    slow_ms = slow_ones(before.requests(key), after.requests(key))
    return RequestChange(
        name=key[0],
        change=change,
        effects_ms={side: _sum(inside) for side, inside in sides.items()},
        remarks=tuple(remark for side, inside in sides.items() if (remark := _remark(SIDES[side], change, inside))),
        answer=_answer(key[0], change, slow_ms, sides["host"]),
        slow_ms=slow_ms,
    )


def _answer(name: str, change: Change, slow_ms: tuple[float, float] | None, stages: list[StageChange]) -> str:
    """Return the comparison of one kind of request in a sentence."""
    if change.before_ms is None or change.after_ms is None:
        return f"`{name}` is in {'B' if change.before_ms is None else 'A'} only."
    times = f"{duration(change.before_ms)} before, {duration(change.after_ms)} after"
    if change.verdict == FEW or change.relative is None or change.low_ms is None or change.high_ms is None:
        return f"`{name}` has too few requests to compare: {times}."
    between = change.interval
    slow = (
        f" The slow ones are not alike: p99 {duration(slow_ms[0])} before, {duration(slow_ms[1])} after."
        if slow_ms
        else ""
    )
    if change.verdict == NOISY:
        return f"`{name}` is too noisy to tell whether it became faster or slower: {times} ({between}).{slow}"
    if change.verdict in (NOISE, SMALL):
        why = "beyond noise, but by too little to matter" if change.verdict == SMALL else "within noise"
        return f"`{name}` is as fast as before: {times} ({between}, {why}).{slow}"
    told = f"`{name}` is {abs(change.relative):.1%} {change.verdict}: {times} ({between})."
    sign = 1 if change.verdict == SLOWER else -1
    most = max(stages, key=lambda stage: sign * (stage.effect_ms or 0.0), default=None)
    if most is None or not most.effect_ms or sign * most.effect_ms <= 0:
        return told
    return f"{told} The largest change is in `{most.name}`: {duration(most.effect_ms, '+')} per request on the host."


def _sum(stages: Iterable[StageChange]) -> float:
    return sum(stage.effect_ms or 0.0 for stage in stages)


def _remark(where: str, whole: Change, stages: list[StageChange]) -> str:
    """Return a sentence if the whole request does not show, or cannot show, half of what the stages gain."""
    gained_ms = -_sum(stages)
    names = ", ".join(f"`{stage.name}`" for stage in stages if stage.effect_ms and stage.change.verdict == FASTER)
    if not names or gained_ms <= 0 or whole.verdict == FEW or whole.low_ms is None:
        return ""
    start = f"{names} became faster {where}, and all stages together gain {duration(gained_ms)} per request there"
    if -whole.low_ms < gained_ms / 2:
        shown = f"at most {duration(-whole.low_ms)}" if whole.low_ms < 0 else "nothing"
        return f"{start}; the whole request gains {shown}: this is not what it waits for."
    if whole.verdict != FASTER:
        return f"{start}; the whole request varies too much to tell whether it gains from that."
    return ""
