"""
The way of a finished batch: to the summary, the metrics, past the sampler and what keeps the slow ones, to exporters.

What fails here costs the stages of one batch, or with `GPUSCOPE_KEEP` those that wait as well; they are counted.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpuscope._collecting.keeping.groups import Arrived
from gpuscope._collecting.keeping.joined import join, joined
from gpuscope._collecting.keeping.keeper import Keeper
from gpuscope._collecting.selection import select
from gpuscope._data.plain.values import shown
from gpuscope._settings.keeping.rules import rules_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from gpuscope._collecting.active_exporters import ActiveExporters
    from gpuscope._collecting.aggregation.statistics import StageStatistics
    from gpuscope._collecting.intake import Intake
    from gpuscope._collecting.metrics_pipeline import MetricsPipeline
    from gpuscope._data.batch import FinishedGeneration, StageBatch
    from gpuscope._log import WarnOnce
    from gpuscope._recording.recorder import Recorder
    from gpuscope._settings.config import Config


class _Batch(NamedTuple):
    """What waits for the keeper, with columns of `Arrived`."""

    batch: StageBatch
    keys: NDArray[np.uint64]
    is_root: NDArray[np.bool_]
    offset_ns: NDArray[np.int64]
    finished: list[FinishedGeneration]


_WORTH_ROWS, _DECIDE_DELAY_NS = 16_384, 1_000_000_000
"""Of what arrives: so many rows, or so long, until it is decided on."""
_MOST_TO_KEEP = 65_536
"""Traces that somebody wants kept, which wait for the next decision: within a second or two."""

_AROUND_ALL = (
    "`GPUSCOPE_KEEP` decides on requests when their outermost stage ends. The stage %r ran on while stages inside it "
    "took half of its `rows` or more, so what waited was decided as it was. If it is around all requests, more `rows` "
    "do not help: take it away, or put each request into `with gpuscope.extract(gpuscope.Token()):`."
)


class Onward:
    """
    Hands batches on, and pauses after each part.

    Args:
        config: the settings.
        recorder: has the account of stages, and their clock.
        intake: makes the batches.
        warnings: logs each kind of failure once.
        summary: is given every batch.
        metrics: likewise.
        exporters: are given what is kept.

    """

    def __init__(
        self,
        config: Config,
        recorder: Recorder,
        intake: Intake,
        warnings: WarnOnce,
        *,
        summary: StageStatistics,
        metrics: MetricsPipeline,
        exporters: ActiveExporters,
    ) -> None:
        self._ledger, self._budget, self._intake, self._warnings = recorder.ledger, recorder.budget, intake, warnings
        self._summary, self._metrics, self._exporters = summary, metrics, exporters
        self._rules, self._clock = rules_of(config.keep), recorder.clock
        self._keeper = None if self._rules is None else Keeper(self._rules, self._clock)
        """None where all traces are kept."""
        self._to_keep: deque[tuple[int, bool]] | None = None if self._keeper is None else deque(maxlen=_MOST_TO_KEEP)
        recorder.to_keep = self._to_keep
        self._left = 0
        """Stages of the batch that is on its way through this."""
        self._held = {False: 0, True: 0}
        """Stages, and light spans, that are with the keeper, or wait for it."""
        self._arrived: list[_Batch] = []
        self._light: list[StageBatch] = []
        self._past_ns = self._since_ns = 0
        """All that had ended by the first has arrived; the second is when the first of what waits has."""

    @property
    def kept(self) -> dict[str, int]:
        """What the rules did, for `Statistics.kept`."""
        counts = {} if self._keeper is None else self._keeper.counts.copy()
        return {reason: count for reason, count in counts.items() if count}

    def export(self, breathe: Callable[[], None], *, now: bool, last: bool = False) -> None:
        """
        Finish the batch and hand it on.

        Args:
            breathe: pauses.
            now: whether what the rules have kept goes in any case. Else it may wait for more of it.
            last: whether what is undecided goes as well, because nothing will come that could decide on it.

        """
        try:
            if len(self._intake):
                self._hand_on(breathe)
            if self._keeper is not None and (now or last or self._is_worth_deciding):
                self._decide(self._keeper, breathe)
            if self._keeper is not None:
                self._hand_on_decided(self._keeper, breathe, now=now, last=last)
        except BaseException as error:  # It costs these stages, which are counted as lost; the loop goes on.
            self._ledger.lose("internal_error", self._left + self._held[False])
            if self._held[True]:
                self._ledger.shared.lose("internal_error", self._held[True])
            self._left, self._held, self._arrived, self._light = 0, {False: 0, True: 0}, [], []
            if self._keeper is not None:
                self._keeper.forget()
            self._warnings.warn("batch", "making a batch failed: %s.", shown(error))

    def _hand_on(self, breathe: Callable[[], None]) -> None:
        stages = self._left = len(self._intake)
        requests, past_ns = self._intake.take_requests()
        batch = self._intake.finish()
        breathe()
        light = self._intake.look_at_members(batch, breathe)
        self._summary.add(batch)
        breathe()
        sampled, finished = int(np.count_nonzero(batch.sampled)), self._intake.take_finished()
        if requests is None:
            self._metrics.add(batch, finished)
            breathe()
        if sampled < stages:
            self._ledger.drop("unsampled", stages - sampled)
            self._left -= stages - sampled
        if requests is not None:
            self._since_ns = self._since_ns if self._arrived else self._clock()
            offset_ns = np.broadcast_to(self._intake.offset_ns, batch.sampled.shape)
            self._arrived.append(_Batch(batch, *requests, offset_ns, finished))
            self._light += light
            self._past_ns = past_ns
            self._held[False] += sampled
            self._held[True] += sum(len(each.site) for each in light)
            self._left = 0
            return
        batch = select(batch, batch.sampled) if sampled < stages else batch
        self._left = 0
        for each in [batch, *light] if sampled else light:
            self._exporters.export(each, breathe)

    @property
    def _is_worth_deciding(self) -> bool:
        """Whether enough has arrived, or waits for long enough: the more at once, the fewer requests come in parts."""
        if not self._arrived:
            return not len(self._intake)
        rows = sum(len(each.batch.site) for each in self._arrived)
        return rows >= _WORTH_ROWS or self._clock() >= self._since_ns + _DECIDE_DELAY_NS

    def _decide(self, keeper: Keeper, breathe: Callable[[], None]) -> None:
        """Give the keeper what has arrived, then the metrics: their exemplars lead to traces that are kept by now."""
        while self._to_keep:
            trace_id, failed = self._to_keep.popleft()
            keeper.keep_trace(trace_id, failed=failed)
        if not self._arrived:
            if len(keeper):
                keeper.poll(self._intake.past_ns(), breathe)
            return
        arrived, light, self._arrived, self._light = self._arrived, self._light, [], []
        kept: list[NDArray[np.bool_]] = []
        for alike in _alike(arrived):
            rows = np.concatenate([each.batch.sampled for each in alike])
            found = np.zeros(len(rows), np.bool_)
            if rows.any():
                batch = join([each.batch for each in alike])
                columns = [np.concatenate(column) for column in zip(*(each[1:4] for each in alike), strict=True)]
                if not rows.all():
                    batch, columns = select(batch, rows), [column[rows] for column in columns]
                breathe()
                found[rows] = keeper.decide(Arrived(batch, *columns), self._past_ns, breathe)
            kept += np.split(found, np.cumsum([len(each.batch.site) for each in alike])[:-1])
        for spans in light:
            keeper.decide(Arrived.light(spans), self._past_ns, breathe)
        for each, is_kept in zip(arrived, kept, strict=True):
            finished = [_as_kept(generation, keeper) for generation in each.finished]
            self._metrics.add(replace(each.batch, sampled=is_kept), finished)
            breathe()

    def _hand_on_decided(self, keeper: Keeper, breathe: Callable[[], None], *, now: bool, last: bool) -> None:
        """Export what is kept by now, and count what is left out."""
        keeper.make_room(breathe, is_heavy=self._budget.used > self._budget.limit // 2)
        if keeper.around_all:
            self._warnings.warn("around_all", _AROUND_ALL, keeper.around_all)
        if last:
            keeper.release()
        for (is_light, reason), count in keeper.take_left_out().items():
            self._held[is_light] -= count
            (self._ledger.shared if is_light else self._ledger).drop(reason, count)
        if not (now or last or keeper.is_worth_exporting):
            return
        for each in joined(keeper.take_kept()):
            self._held[each.shared is not None] -= len(each.site)
            self._exporters.export(each, breathe)


def _alike(arrived: list[_Batch]) -> list[list[_Batch]]:
    """Return the batches in their order, those together that can be joined: nearly always all."""
    found: list[list[_Batch]] = []
    for each in arrived:
        kind = each.batch.live is None, each.batch.samples is None
        if not found or kind != (found[-1][0].batch.live is None, found[-1][0].batch.samples is None):
            found.append([])
        found[-1].append(each)
    return found


def _as_kept(finished: FinishedGeneration, keeper: Keeper) -> FinishedGeneration:
    """Return a generation without its link, unless its trace is kept by now."""
    is_kept = finished.link is not None and keeper.is_kept(finished.link[0])
    return finished if is_kept else replace(finished, link=None)
