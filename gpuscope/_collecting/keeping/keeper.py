"""
Decides, trace by trace, which are exported: once a request and all that had ended by its end are resolved.

A rule that is certain earlier, as an error is, decides earlier; then all that waits of the trace goes at once. What
comes after a decision follows it. A trace that is kept stays so; one that was left out is decided anew by each further
request in it. Exports nothing and counts no stage: `take` says what is to be done. For the collector's thread.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from gpuscope._collecting.keeping.groups import Groups, trace_key
from gpuscope._collecting.keeping.held import (
    KEPT,
    LEFT_OUT,
    NO_ROOM,
    UNDECIDED,
    Chunk,
    Decided,
    Held,
    Root,
    Waiting,
    rows_of,
)
from gpuscope._collecting.keeping.judge import SHARE, SLOWER, Judge
from gpuscope._data.batch import RowFlag
from gpuscope._data.statistics import KEEP_FULL, NOT_KEPT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from gpuscope._collecting.keeping.groups import Arrived
    from gpuscope._data.batch import StageBatch
    from gpuscope._settings.keeping.rules import Rules

_UNCLAIMED_NS = 600_000_000_000
"""So long a row waits that belongs to no request of this process, such as the light span of a member that is a span of
the application's."""
_REASONS = {LEFT_OUT: NOT_KEPT, NO_ROOM: KEEP_FULL}
_MANY = 512
"""From so many requests in one batch on there are pauses: a thousand take a millisecond."""
_COUNTED = {LEFT_OUT: "left_out", NO_ROOM: "no_room"}
CUT_OFF = "cut_off"
_WARMUP = int(RowFlag.WARMUP)


class Keeper:
    """
    Holds what is undecided, and decides.

    Args:
        rules: by which a trace is kept.
        clock: nanoseconds, monotonic; the clock of the records.

    """

    def __init__(self, rules: Rules, clock: Callable[[], int]) -> None:
        self._judgement, self._clock = Judge(rules), clock
        self._held, self._decided = Held(rules.rows), Decided()
        self._ended: dict[int, None] = {}
        """Requests that wait for others which had ended when they did, oldest first."""
        self._of_no_request: dict[int, None] = {}
        """Traces of which rows wait that belong to no request."""
        self._pieces: dict[Chunk, list[NDArray[np.int64]]] = {}
        self._left_out: Counter[tuple[bool, str]] = Counter()
        # All keys are there from the start, because other threads copy it.
        self.counts = dict.fromkeys((*self._judgement.reasons, CUT_OFF, *_COUNTED.values()), 0)
        """Traces that were kept, by the first rule that did so; and requests that were left out."""

    def __len__(self) -> int:
        """The requests that wait."""
        return len(self._held)

    def decide(self, arrived: Arrived, past_ns: int, breathe: Callable[[], None]) -> NDArray[np.bool_]:
        """
        Decide what can be decided, and hold the rest; return which of the rows are kept by now.

        Args:
            arrived: the rows.
            past_ns: all stages that had ended by then, on the records' clock, have arrived.
            breathe: pauses, where there are many requests.

        """
        batch = arrived.batch
        kept = self._judgement.by_share(batch)
        if kept.any():
            roots = np.flatnonzero(kept & arrived.is_root)
            self.counts[SHARE] += len(roots)
            self._judgement.slow(batch, roots, (arrived.done_ns - arrived.start_ns)[roots])
        rest = np.flatnonzero(~kept)
        if len(rest):
            groups = Groups(arrived, rest)
            self._decide_others(arrived, groups, kept, past_ns, breathe if len(groups) > _MANY else lambda: None)
        if kept.any():
            chunk = Chunk(batch)
            self._pieces[chunk] = [np.flatnonzero(kept)]
        self.poll(past_ns)
        return kept

    def poll(self, past_ns: int) -> None:
        """Decide on requests that have ended, once all that had ended by then has arrived."""
        for key in list(self._ended):
            waiting = self._held.get(key)
            if waiting is not None and waiting.root is not None:
                if waiting.root.ended_ns > past_ns:
                    break
                self._judge(key, waiting, waiting.root)
            self._ended.pop(key, None)
        for trace in list(self._of_no_request):
            self._follow(trace)

    def make_room(self, breathe: Callable[[], None], *, is_heavy: bool = False) -> None:
        """
        Where more waits than may, decide on the oldest requests as they are; pause now and then.

        Args:
            breathe: pauses.
            is_heavy: whether what stages were told takes so much memory that half of those that wait have to go.

        """
        if not (self._held.is_crowded or (is_heavy and len(self._held))):
            return
        now_ns, target = self._clock(), self._held.waiting_rows // 2 if is_heavy else None
        while len(self._held) and not self._held.is_roomy(target):
            key, waiting = self._held.oldest()
            if waiting.root is not None:
                self._judge(key, waiting, waiting.root)
            elif self._judgement.is_slow(max(now_ns - waiting.born_ns, waiting.end_ns - waiting.start_ns)):
                self._keep(waiting.trace, SLOWER)
            else:
                self._leave_out(key, waiting, NO_ROOM)
        if is_heavy or self._held.is_crowded:
            self._held.compact(breathe)

    def release(self) -> None:
        """Keep all that waits: nothing will come that could decide on it."""
        for key in list(self._held):
            waiting = self._held.get(key)
            if waiting is None:
                continue
            if waiting.root is not None:
                self._judge(key, waiting, waiting.root)
            else:
                self._keep(waiting.trace, CUT_OFF)

    def forget(self) -> None:
        """Let go of all that waits, because something failed; the caller has counted it."""
        for key in list(self._held):
            self._held.close(key)
        self.take()

    def is_kept(self, trace_id: int) -> bool:
        """Tell whether a trace is known to be kept."""
        return self._judgement.is_in_share(trace_id) or self._decided.get(trace_key(trace_id)) == KEPT

    def take(self) -> tuple[list[StageBatch], Mapping[tuple[bool, str], int]]:
        """Return what is to be exported now, and how many were left out: whether they are light spans, and why."""
        pieces, left_out = self._pieces, self._left_out
        self._pieces, self._left_out = {}, Counter()
        batches = []
        for chunk, rows in pieces.items():
            mask = np.zeros(len(chunk.batch.site), np.bool_)
            mask[np.concatenate(rows)] = True
            batches.append(rows_of(chunk.batch, mask))
        return batches, left_out

    def _decide_others(
        self, arrived: Arrived, groups: Groups, kept: NDArray[np.bool_], past_ns: int, breathe: Callable[[], None]
    ) -> None:
        """Decide on the rows that the share does not keep; an item of each column here is a request."""
        batch, has_root = arrived.batch, groups.root >= 0
        certain = {row: why for row, why in self._judgement.certain(batch).items() if not kept[row]}
        why = dict(zip(groups.place_of(np.array(list(certain), np.int64)).tolist(), certain.values(), strict=True))
        breathe()
        decision = self._known(groups, why)
        breathe()
        ready = (decision == UNDECIDED) & has_root & (arrived.ended_ns[groups.root] <= past_ns)
        ready &= ~_among(groups.traces, self._held.traces_among(groups.traces))
        timed = np.flatnonzero(ready | (has_root & (decision == KEPT)))
        roots = groups.root[timed]
        slow = self._judgement.slow(batch, roots, groups.end_ns[timed] - arrived.start_ns[roots])
        slow = {place: reason for at, reason in slow.items() if ready[place := int(timed[at])]}
        for place, reason in slow.items():
            self._keep(groups.traces[place], reason)
        if slow or why:  # Others of the same traces in this batch are kept with them.
            now = {groups.traces[place] for place in (*slow, *why)}
            also = _among(groups.traces, {trace for trace in now if self._decided.get(trace) == KEPT})
            decision[also & (decision == UNDECIDED)] = KEPT
        breathe()
        left_out = np.flatnonzero(ready & (decision == UNDECIDED)).tolist()
        decision[left_out] = LEFT_OUT
        self.counts[_COUNTED[LEFT_OUT]] += len(left_out)
        self._decided.note([numbers[place] for numbers in (groups.keys, groups.traces) for place in left_out], LEFT_OUT)
        kept[groups.of_rows(decision == KEPT)] = True
        for code, reason in _REASONS.items():
            if count := int(groups.size[decision == code].sum()):
                self._left_out[batch.shared is not None, reason] += count
        self._hold(arrived, groups, decision == UNDECIDED)

    def _known(self, groups: Groups, why: Mapping[int, str]) -> NDArray[np.int8]:
        """Return what was decided of each request before, or is by what is certain."""
        decision = np.full(len(groups), UNDECIDED, np.int8)
        # Hardly any: most requests are new and come in one batch.
        before = self._decided.among(groups.traces) | self._decided.among(groups.keys)
        places = set(why) | set(np.flatnonzero(_among(groups.traces, before) | _among(groups.keys, before)).tolist())
        for place in sorted(places):
            key, trace = groups.keys[place], groups.traces[place]
            known = self._decided.get(trace)
            if known != KEPT and key != trace:
                known = self._decided.get(key)
            elif known != KEPT and self._held.has(trace):
                known = UNDECIDED  # A request of the trace is still to decide.
            if known == UNDECIDED and place in why:
                self._keep(trace, why[place])
                known = KEPT
            decision[place] = known
        return decision

    def _hold(self, arrived: Arrived, groups: Groups, chosen: NDArray[np.bool_]) -> None:
        if not chosen.any():
            return
        batch = arrived.batch
        mask = np.zeros(len(batch.site), np.bool_)
        mask[groups.of_rows(chosen)] = True
        chunk, moved, now_ns = self._held.hold(rows_of(batch, mask)), np.cumsum(mask) - 1, self._clock()
        for place in np.flatnonzero(chosen).tolist():
            key, trace, root = groups.keys[place], groups.traces[place], int(groups.root[place])
            waiting = self._held.open(key, trace, now_ns)
            waiting.parts.append((chunk, moved[groups.rows(place)]))
            waiting.start_ns = min(waiting.start_ns, int(groups.start_ns[place]))
            waiting.end_ns = max(waiting.end_ns, int(groups.end_ns[place]))
            if root >= 0:
                kind, warms_up = batch.sites[batch.site[root]].name, bool(batch.flags[root] & _WARMUP)
                waiting.root = Root(kind, int(arrived.start_ns[root]), int(arrived.ended_ns[root]), warms_up)
                self._ended[key] = None
            elif key == trace:
                self._of_no_request[trace] = None

    def _judge(self, key: int, waiting: Waiting, root: Root) -> None:
        """Decide on a request that has ended."""
        reason = self._judgement.slow_one(root, waiting.end_ns)
        if reason is None:
            self._leave_out(key, waiting, LEFT_OUT)
        else:
            self._keep(waiting.trace, reason)

    def _follow(self, trace: int) -> None:
        """Do with rows that belong to no request what was decided of their trace, or leave them out after a while."""
        waiting = self._held.get(trace)
        if waiting is None:
            del self._of_no_request[trace]
        elif len(self._held.of_trace(trace)) == 1:
            known = self._decided.get(trace)
            if known == UNDECIDED and self._clock() - waiting.born_ns > _UNCLAIMED_NS:
                known = LEFT_OUT
            if known != UNDECIDED:
                self._leave_out(trace, waiting, known)

    def _keep(self, trace: int, reason: str) -> None:
        """Keep a trace, and all that waits of it."""
        if self._decided.get(trace) != KEPT:
            self.counts[reason] += 1
        keys = self._held.of_trace(trace)
        # By the requests' keys too, because a provider that comes late gives the trace another id.
        self._decided.note((trace, *keys), KEPT)
        for key in keys:
            for chunk, rows in self._held.close(key).parts:
                self._pieces.setdefault(chunk, []).append(rows)

    def _leave_out(self, key: int, waiting: Waiting, decision: int) -> None:
        self._held.close(key)
        self._decided.note((key, waiting.trace), decision)
        self.counts[_COUNTED[decision]] += 1
        for chunk, rows in waiting.parts:
            self._left_out[chunk.batch.shared is not None, _REASONS[decision]] += len(rows)


def _among(numbers: list[int], few: set[int]) -> NDArray[np.bool_]:
    """Return which of the numbers are among a few."""
    if not few:
        return np.zeros(len(numbers), np.bool_)
    return np.fromiter(map(few.__contains__, numbers), np.bool_, len(numbers))
