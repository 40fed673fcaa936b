"""
Stages that the host has left and the GPU has not done: found by what the collector knows of each stream.

Asks nothing. A stream stalls once, until something is done on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuscope._stalls.found import NOT_DONE, Stall

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpuscope._data.flight import WaitingStage
    from gpuscope._stalls.found import StreamState
    from gpuscope._stalls.limits import Limits

_MOST_STREAMS = 1024


class NotDone:
    """
    The streams of one period of recording.

    Args:
        limits: of each stage.
        warmup: so many first calls of each stage are excused.

    """

    def __init__(self, limits: Limits, warmup: int) -> None:
        self._limits, self._warmup = limits, warmup
        self._said: dict[tuple[int, int], int] = {}
        """By device and stream, the span of the stage that was said last."""
        self._excused_ns = 0

    def excuse(self, now_ns: int) -> None:
        """Count what waits as having waited from now on."""
        self._excused_ns = now_ns

    def _since_ns(self, each: WaitingStage) -> int:
        return max(each.record.end_ns, each.done_ns, self._excused_ns)

    def is_near(self, waiting: Sequence[WaitingStage], now_ns: int) -> bool:
        """Tell whether something waits for half its limit or longer."""
        limits = ((self._limits.of(each.record.site.name), each) for each in waiting)
        return any(limit_ns and now_ns - self._since_ns(each) >= limit_ns / 2 for limit_ns, each in limits)

    def look(
        self, waiting: Sequence[WaitingStage], now_ns: int, states: Callable[[], list[StreamState]]
    ) -> list[Stall]:
        """Return what has waited too long, once."""
        found = []
        for each in waiting:
            place, limit_ns = (each.device, each.stream), self._limits.of(each.record.site.name)
            # Until the GPU last said so. While nobody asks, as during a capture, nothing is known.
            waited_ns = each.asked_ns - self._since_ns(each)
            if not limit_ns or waited_ns <= limit_ns or self._is_warm(each):
                continue
            if self._said.get(place) == each.record.span_id:
                continue
            if len(self._said) >= _MOST_STREAMS:
                self._said.clear()
            self._said[place] = each.record.span_id
            found.append(self._stall(each, waiting, now_ns, states()))
        return found

    def _is_warm(self, each: WaitingStage) -> bool:
        site, root = each.record.site, each.record.trace.root
        return site.calls < (self._warmup if site.warmup is None else site.warmup) or root.warms_up

    def _stall(
        self, each: WaitingStage, waiting: Sequence[WaitingStage], now_ns: int, states: list[StreamState]
    ) -> Stall:
        record = each.record
        done = f"last done there: {each.done}" if each.done else "nothing was done there before"
        when = f", {(now_ns - each.done_ns) / 1e9:.1f} s ago" if each.done else ""
        others = [state for state in states if (state.device, state.stream) != (each.device, each.stream)]
        stuck = {(other.device, other.stream) for other in waiting}
        facts = [f"{_stages_wait(each)} there", done + when]
        facts += [_beside(other, now_ns) for other in waiting if other is not each]
        facts += [f"beside it {state.text(now_ns)}" for state in others if (state.device, state.stream) not in stuck]
        return Stall(
            NOT_DONE,
            *(record.site.name, record.trace.trace_id, record.span_id, self._since_ns(each), now_ns),
            self._limits.of(record.site.name),
            f"GPU {each.device}, stream {each.stream:#x}",
            facts=tuple(facts),
        )

    @staticmethod
    def last_done(waiting: Sequence[WaitingStage]) -> str:
        """Say what was done last on streams with stages that wait."""
        said = [f"on stream {each.stream:#x} of GPU {each.device} {each.done}" for each in waiting if each.done]
        return f"last done: {', '.join(said)}" if said else ""


def _stages_wait(each: WaitingStage) -> str:
    return "1 stage waits" if each.waiting == 1 else f"{each.waiting:,} stages wait"


def _beside(other: WaitingStage, now_ns: int) -> str:
    moves = f"last done {(now_ns - other.done_ns) / 1e9:.1f} s ago ({other.done})" if other.done else "nothing done yet"
    return f"beside it GPU {other.device}, stream {other.stream:#x}: {_stages_wait(other)}, {moves}"
