"""
What is undecided, and the decisions on it: on requests that have ended, on the oldest for want of room, at the end.

All that waits of a trace goes at once. Each decision is remembered for what comes later. Exports nothing and counts no
stage: `take_kept` and `take_left_out` say what is to be done.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from gpuscope._collecting.keeping.groups import trace_key
from gpuscope._collecting.keeping.held import (
    KEPT,
    LEFT_OUT,
    NO_END,
    NO_ROOM,
    UNDECIDED,
    Chunk,
    Decided,
    Held,
    Waiting,
    rows_of,
)
from gpuscope._collecting.keeping.judge import ASKED, ERROR, SLOWER, Judge
from gpuscope._data.statistics import KEEP_FULL, KEEP_NO_END, NOT_KEPT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from gpuscope._data.batch import StageBatch
    from gpuscope._settings.keeping.rules import Rules

_UNCLAIMED_NS = 600_000_000_000
"""So long a row waits that belongs to no request of this process, such as the light span of a member that is a span of
the application's; and, since its last row came, a request whose outermost stage does not come, perhaps refused."""
_LOOK_NS = 60_000_000_000
"""From one look for such requests to the next."""
REASONS = {LEFT_OUT: NOT_KEPT, NO_ROOM: KEEP_FULL, NO_END: KEEP_NO_END}
"""Of the ledger, by decision."""
COUNTED = {LEFT_OUT: "left_out", NO_ROOM: "no_room", NO_END: "no_end"}
"""Of `Undecided.counts`, by decision."""
MANY = 512
"""From so many requests at once on there are pauses: a thousand take a millisecond."""
_CUT_OFF = "cut_off"
_MOST_TO_COME = 16_384
_WORTH_ROWS, _KEPT_DELAY_NS = 1024, 2_000_000_000
"""Of what is kept: so many rows, or so long."""


class Undecided:
    """
    Holds it, and decides.

    Args:
        rules: by which a trace is kept.
        clock: nanoseconds, monotonic; the clock of the records.

    """

    def __init__(self, rules: Rules, clock: Callable[[], int]) -> None:
        self._judgement, self._clock = Judge(rules), clock
        self._held, self._decided, self._rows = Held(rules.rows), Decided(), rules.rows
        self._look_ns = 0
        """When to look for requests whose outermost stage does not come."""
        self.around_all = ""
        """The name of an outermost stage that ran on while stages inside it took half of the room, if there was one."""
        self._ended: dict[int, None] = {}
        """Requests that wait for others which had ended when they did, oldest first."""
        self._of_no_request: dict[int, None] = {}
        """Traces of which rows wait that belong to no request, oldest first."""
        self._settled: set[int] = set()
        """Traces that were decided, of which something may wait that has to follow."""
        self._to_come: dict[int, str] = {}
        """Traces that are kept by what was said and count once a stage of theirs has come; why, oldest first."""
        self._pieces: dict[Chunk, list[NDArray[np.int64]]] = {}
        self._kept_since_ns = 0
        self._left_out: Counter[tuple[bool, str]] = Counter()
        # All keys are there from the start, because other threads copy it.
        self.counts = dict.fromkeys((*self._judgement.reasons, _CUT_OFF, *COUNTED.values()), 0)
        """Traces that were kept, by the first rule that did so; and requests that were left out."""

    def __len__(self) -> int:
        """The requests that wait."""
        return len(self._held)

    def poll(self, past_ns: int, breathe: Callable[[], None]) -> None:
        """Decide on requests that have ended, once all that had ended by then has arrived; pause now and then."""
        ready: list[int] = []
        for key in self._ended:
            waiting = self._held.get(key)
            if waiting is None or waiting.root is None or waiting.root.ended_ns > past_ns:
                break
            ready.append(key)
        for at in range(0, len(ready), MANY):
            self._judge(ready[at : at + MANY])
            if len(ready) > MANY:
                breathe()
        settled, self._settled = self._settled, set()
        for trace in settled:
            self._follow(trace)
        now_ns = self._clock()
        for trace in list(islice(self._of_no_request, MANY)):
            waiting = self._held.get(trace)
            if waiting is None or now_ns - waiting.born_ns <= _UNCLAIMED_NS:
                break
            self._leave_out(trace, waiting, LEFT_OUT)
        if now_ns >= self._look_ns:
            self._look_ns = now_ns + _LOOK_NS
            self._leave_out_without_end(now_ns, breathe)

    def _leave_out_without_end(self, now_ns: int, breathe: Callable[[], None]) -> None:
        """Decide on requests of which nothing came for long, not even their outermost stage."""
        for number, key in enumerate(list(self._held), 1):
            waiting = self._held.get(key)
            if waiting is None or waiting.root is not None or key == waiting.trace:
                continue
            if now_ns - waiting.born_ns <= _UNCLAIMED_NS:
                break
            if now_ns - waiting.came_ns > _UNCLAIMED_NS:
                self._decide_unended(key, waiting, waiting.end_ns - waiting.start_ns, NO_END)
            if number % MANY == 0:
                breathe()

    def _decide_unended(self, key: int, waiting: Waiting, took_ns: int, decision: int) -> None:
        if self._judgement.is_slow(took_ns):
            self._keep(waiting.trace, SLOWER)
        else:
            self._leave_out(key, waiting, decision)

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
        for number, key in enumerate(list(self._held), 1):
            if self._held.is_roomy(target):
                break
            waiting = self._held.get(key)
            if waiting is None:
                continue
            if waiting.root is not None:
                self._judge([key])
            else:
                if key != waiting.trace and waiting.size >= self._rows // 2:
                    self.around_all = waiting.root_name
                took_ns = max(now_ns - waiting.born_ns, waiting.end_ns - waiting.start_ns)
                self._decide_unended(key, waiting, took_ns, NO_ROOM)
            if number % MANY == 0:
                breathe()
        if is_heavy or self._held.is_crowded:
            self._held.compact(breathe)

    def release(self) -> None:
        """Keep all that waits: nothing will come that could decide on it."""
        for key in list(self._held):
            waiting = self._held.get(key)
            if waiting is None:
                continue
            if waiting.root is not None:
                self._judge([key])
            else:
                self._keep(waiting.trace, _CUT_OFF)

    def forget(self) -> None:
        """Let go of all that waits, because something failed; the caller has counted it."""
        for key in list(self._held):
            self._close(key)
        self._settled.clear()
        self._pieces.clear()
        self._left_out.clear()

    def is_kept(self, trace_id: int) -> bool:
        """Tell whether a trace is known to be kept."""
        return self._judgement.is_in_share(trace_id) or self._decided.get(trace_key(trace_id)) == KEPT

    def keep_trace(self, trace_id: int, *, failed: bool) -> None:
        """Keep what waits of a trace, and what comes of it; because its request failed, if that is a rule."""
        reason = ERROR if failed else ASKED
        trace = trace_key(trace_id)
        if reason not in self._judgement.reasons or self._judgement.is_in_share(trace_id):
            return
        if self._held.has(trace):
            self._keep(trace, reason)
        elif self._decided.get(trace) != KEPT:
            self._decided.note((trace,), KEPT)
            self._to_come[trace] = reason
            if len(self._to_come) > _MOST_TO_COME:
                self._to_come.pop(next(iter(self._to_come)))

    @property
    def is_worth_exporting(self) -> bool:
        """Whether enough is kept, or waits for long enough, to be exported: small batches cost nearly what large do."""
        if not self._pieces:
            return False
        rows = sum(len(rows) for parts in self._pieces.values() for rows in parts)
        return rows >= _WORTH_ROWS or self._clock() >= self._kept_since_ns + _KEPT_DELAY_NS

    def take_left_out(self) -> Mapping[tuple[bool, str], int]:
        """Return how many rows were left out since this was last asked: whether they are light spans, and why."""
        left_out, self._left_out = self._left_out, Counter()
        return left_out

    def take_kept(self) -> list[StageBatch]:
        """Return what is to be exported."""
        pieces, self._pieces = self._pieces, {}
        batches = []
        for chunk, rows in pieces.items():
            mask = np.zeros(len(chunk.batch.site), np.bool_)
            mask[np.concatenate(rows)] = True
            batches.append(rows_of(chunk.batch, mask))
        return batches

    def _export(self, chunk: Chunk, rows: NDArray[np.int64]) -> None:
        if not self._pieces:
            self._kept_since_ns = self._clock()
        self._pieces.setdefault(chunk, []).append(rows)

    def _judge(self, keys: list[int]) -> None:
        """Decide on requests that have ended."""
        ended = [
            (waiting, waiting.root) for key in keys if (waiting := self._held.get(key)) is not None and waiting.root
        ]
        reasons = self._judgement.slow_ones([root for _, root in ended], [waiting.done_ns for waiting, _ in ended])
        for (waiting, _), reason in zip(ended, reasons, strict=True):
            if reason is not None:
                self._keep(waiting.trace, reason)
        for key in keys:
            # It is gone where its trace is kept, by this or another request.
            if (waiting := self._held.get(key)) is not None:
                self._leave_out(key, waiting, LEFT_OUT)

    def _follow(self, trace: int) -> None:
        """Do with rows that belong to no request what was decided of their trace, once nothing else of it waits."""
        waiting, decision = self._held.get(trace), self._decided.get(trace)
        if waiting is not None and decision != UNDECIDED and len(self._held.of_trace(trace)) == 1:
            self._leave_out(trace, waiting, decision)

    def _keep(self, trace: int, reason: str) -> None:
        """Keep a trace, and all that waits of it."""
        if self._decided.get(trace) != KEPT:
            self.counts[reason] += 1
        keys = self._held.of_trace(trace)
        # By the requests' keys too, because a provider that comes late gives the trace another id.
        self._decided.note((trace, *keys), KEPT)
        for key in keys:
            for chunk, rows in self._close(key).parts:
                self._export(chunk, rows)

    def _leave_out(self, key: int, waiting: Waiting, decision: int) -> None:
        self._close(key)
        self._decided.note((key, waiting.trace), decision)
        if self._held.has(waiting.trace):
            self._settled.add(waiting.trace)
        if key != waiting.trace:  # Else these are stages that begin after a request, which counts already.
            self.counts[COUNTED[decision]] += 1
        for chunk, rows in waiting.parts:
            self._left_out[chunk.batch.shared is not None, REASONS[decision]] += len(rows)

    def _close(self, key: int) -> Waiting:
        self._ended.pop(key, None)
        self._of_no_request.pop(key, None)
        return self._held.close(key)
