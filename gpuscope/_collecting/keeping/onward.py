"""
The way of a finished batch: to the summary, the metrics, past the sampler and what keeps the slow ones, to exporters.

What fails here costs the stages of one batch, or with `GPUSCOPE_KEEP` those that wait as well; they are counted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from gpuscope._collecting.batch_builder import select
from gpuscope._collecting.keeping.groups import Arrived
from gpuscope._collecting.keeping.joined import joined
from gpuscope._collecting.keeping.keeper import Keeper
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
        self._left = 0
        """Stages of the batch that is on its way through this."""
        self._held = {False: 0, True: 0}
        """Stages, and light spans, that are with the keeper."""

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
            elif self._keeper is not None and len(self._keeper):
                self._keeper.poll(self._intake.past_ns(), breathe)
            if self._keeper is not None:
                self._hand_on_decided(self._keeper, breathe, now=now, last=last)
        except BaseException as error:  # It costs these stages, which are counted as lost; the loop goes on.
            self._ledger.lose("internal_error", self._left + self._held[False])
            if self._held[True]:
                self._ledger.shared.lose("internal_error", self._held[True])
            self._left, self._held = 0, {False: 0, True: 0}
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
        sampled, finished, seen = int(np.count_nonzero(batch.sampled)), self._intake.take_finished(), batch
        if self._keeper is not None and requests is not None:
            # Exemplars of metrics lead to traces, so none is of one that is not kept by now.
            seen = replace(batch, sampled=self._decide(self._keeper, (batch, *requests), past_ns, light, breathe))
            finished = [_as_kept(each, self._keeper) for each in finished]
            breathe()
        self._metrics.add(seen, finished)
        breathe()
        if sampled < stages:
            self._ledger.drop("unsampled", stages - sampled)
            self._left -= stages - sampled
        if self._keeper is None:
            batch = select(batch, batch.sampled) if sampled < stages else batch
            self._left = 0
            for each in [batch, *light] if sampled else light:
                self._exporters.export(each, breathe)

    def _decide(
        self,
        keeper: Keeper,
        arrived: tuple[StageBatch, NDArray[np.uint64], NDArray[np.bool_]],
        past_ns: int,
        light: list[StageBatch],
        breathe: Callable[[], None],
    ) -> NDArray[np.bool_]:
        """Give the sampled stages, and light spans, to the keeper; return which stages are kept by now."""
        batch, keys, is_root = arrived
        sampled = batch.sampled
        offset_ns = np.broadcast_to(self._intake.offset_ns, sampled.shape)
        kept = np.zeros(len(sampled), np.bool_)
        if sampled.any():
            rows = batch if sampled.all() else select(batch, sampled)
            self._left -= len(rows.site)
            self._held[False] += len(rows.site)
            kept[sampled] = keeper.decide(
                Arrived(rows, keys[sampled], is_root[sampled], offset_ns[sampled]), past_ns, breathe
            )
        for each in light:
            self._held[True] += len(each.site)
            keeper.decide(Arrived.light(each), past_ns, breathe)
        return kept

    def _hand_on_decided(self, keeper: Keeper, breathe: Callable[[], None], *, now: bool, last: bool) -> None:
        """Export what is kept by now, and count what is left out."""
        keeper.make_room(breathe, is_heavy=self._budget.used > self._budget.limit // 2)
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


def _as_kept(finished: FinishedGeneration, keeper: Keeper) -> FinishedGeneration:
    """Return a generation without its link, unless its trace is kept by now."""
    is_kept = finished.link is not None and keeper.is_kept(finished.link[0])
    return finished if is_kept else replace(finished, link=None)
