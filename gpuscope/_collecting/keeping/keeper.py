"""
Decides, trace by trace, which are exported: once a request and all that had ended by its end are resolved.

A rule that is certain earlier, as an error is, decides earlier; then all that waits of the trace goes at once. What
comes after a decision follows it. A trace that is kept stays so; one that was left out is decided anew by each further
request in it. Exports nothing and counts no stage. For the collector's thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuscope._collecting.keeping.groups import Groups
from gpuscope._collecting.keeping.held import KEPT, LEFT_OUT, NO_END, NO_ROOM, UNDECIDED, Chunk, Root, rows_of
from gpuscope._collecting.keeping.judge import SHARE
from gpuscope._collecting.keeping.undecided import COUNTED, MANY, REASONS, Undecided
from gpuscope._data.batch import RowFlag

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from gpuscope._collecting.keeping.groups import Arrived

_OPEN = UNDECIDED, NO_ROOM, NO_END
"""Of such a request an error, or a stage that asks, keeps what comes from then on."""
_WARMUP = int(RowFlag.WARMUP)


class Keeper(Undecided):
    """Decides on what arrives, and holds what cannot be decided yet."""

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
            self._decide_others(arrived, groups, kept, past_ns, breathe if len(groups) > MANY else lambda: None)
        if kept.any():
            self._export(Chunk(batch), np.flatnonzero(kept))
        self.poll(past_ns, breathe)
        return kept

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
        self.counts[COUNTED[LEFT_OUT]] += len(left_out)
        self._settled |= self._held.traces_among([groups.traces[place] for place in left_out])
        self._decided.note([numbers[place] for numbers in (groups.keys, groups.traces) for place in left_out], LEFT_OUT)
        kept[groups.of_rows(decision == KEPT)] = True
        for code, reason in REASONS.items():
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
            if known in _OPEN and place in why:
                self._keep(trace, why[place])
                known = KEPT
            if known == KEPT and trace in self._to_come:
                self.counts[self._to_come.pop(trace)] += 1
            decision[place] = known
        return decision

    def _hold(self, arrived: Arrived, groups: Groups, chosen: NDArray[np.bool_]) -> None:
        if not chosen.any():
            return
        batch = arrived.batch
        mask = np.zeros(len(batch.site), np.bool_)
        mask[groups.of_rows(chosen)] = True
        times_ns = np.stack((arrived.ended_ns[mask], arrived.done_ns[mask]))
        chunk, moved, now_ns = self._held.hold(rows_of(batch, mask), times_ns), np.cumsum(mask) - 1, self._clock()
        places, rows = np.flatnonzero(chosen), moved[groups.all_rows]
        columns = groups.root[places], groups.first[places], groups.size[places], groups.start_ns[places]
        times = groups.end_ns[places], groups.ended_ns[places]
        for place, root, first, size, start_ns, end_ns, ended_ns in zip(
            *(column.tolist() for column in (places, *columns, *times)), strict=True
        ):
            key, trace = groups.keys[place], groups.traces[place]
            waiting = self._held.open(key, trace, now_ns)
            waiting.parts.append((chunk, rows[first : first + size]))
            waiting.came_ns = now_ns
            waiting.start_ns = min(waiting.start_ns, start_ns)
            waiting.end_ns, waiting.ended_ns = max(waiting.end_ns, end_ns), max(waiting.ended_ns, ended_ns)
            if root >= 0:
                kind, warms_up = batch.sites[batch.site[root]].name, bool(batch.flags[root] & _WARMUP)
                waiting.root = Root(kind, int(arrived.start_ns[root]), int(arrived.ended_ns[root]), warms_up)
                self._ended[key] = None
            elif key == trace:
                self._of_no_request[trace] = None
                self._settled.add(trace)


def _among(numbers: list[int], few: set[int]) -> NDArray[np.bool_]:
    """Return which of the numbers are among a few."""
    if not few:
        return np.zeros(len(numbers), np.bool_)
    return np.fromiter(map(few.__contains__, numbers), np.bool_, len(numbers))
