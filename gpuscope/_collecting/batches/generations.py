"""
What a generation that runs by itself was on the GPU: its prefill, its decode, and when its first token was there.

A generation is a stage that says `gen_ai.operation.name` and has a stage `prefill` directly in it. It gets attributes
of its own, if its prefill came in the same batch or in one before, as it does on one stream. Visits the rows of
prefills and decodes in Python; programs that generate nothing pay for a look at the names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuscope._data.attributes import (
    DECODE_SHARE,
    GPU_FIRST_TOKEN,
    GPU_PER_TOKEN,
    NEW_TOKENS,
    OPERATION,
    OUTPUT_TOKENS,
    PREFILL_SHARE,
)
from gpuscope._data.batch import RowFlag

if TYPE_CHECKING:
    from gpuscope._data.batch import StageBatch

_PREFILL, _DECODE = "prefill", "decode"
_UNPLACED = int(RowFlag.UNPLACED)
_MAX_WAITING = 1024
"""Generations that have not ended: the oldest are forgotten."""


class _Steps:
    """The steps of one generation so far; 0 for what is not known. Ends are since the epoch."""

    __slots__ = ("decode_ns", "first_ns", "last_ns", "prefill_ns")

    def __init__(self) -> None:
        self.prefill_ns = self.decode_ns = self.first_ns = self.last_ns = 0


class GenerationTimes:
    """Takes every batch before it is exported."""

    def __init__(self) -> None:
        self._has_prefills = False
        self._open: dict[int, _Steps] = {}
        """By the generation's span id."""

    def look(self, batch: StageBatch) -> None:
        """Add what is known of the generations in a batch to their attributes."""
        steps = [number for number, site in enumerate(batch.sites) if site.name in (_PREFILL, _DECODE)]
        self._has_prefills = self._has_prefills or any(batch.sites[number].name == _PREFILL for number in steps)
        if not self._has_prefills:
            return
        on_gpu = np.isin(batch.site, steps) & (batch.gpu_end_ns != 0)
        for row in np.flatnonzero(on_gpu).tolist():
            self._add(batch, row)
        for row, details in batch.details.items():
            said = details.attributes
            if said and OPERATION in said and (found := self._open.pop(int(batch.span_id[row]), None)) is not None:
                counts = [count for name in (NEW_TOKENS, OUTPUT_TOKENS) if type(count := said.get(name)) is int]
                known = _known(found, int(batch.host_start_ns[row]), counts[0] if counts else 0)
                details.attributes = {**said, **known}

    def _add(self, batch: StageBatch, row: int) -> None:
        parent = int(batch.parent_id[row])
        steps = self._open.get(parent)
        if steps is None:
            steps = self._open[parent] = _Steps()
            if len(self._open) > _MAX_WAITING:
                del self._open[next(iter(self._open))]
        start_ns, end_ns = int(batch.gpu_start_ns[row]), int(batch.gpu_end_ns[row])
        is_prefill = batch.sites[batch.site[row]].name == _PREFILL
        if is_prefill:
            steps.prefill_ns += end_ns - start_ns
        else:
            steps.decode_ns += end_ns - start_ns
        if not int(batch.flags[row]) & _UNPLACED:
            steps.last_ns = max(steps.last_ns, end_ns)
            if is_prefill:
                steps.first_ns = max(steps.first_ns, end_ns)


def _known(steps: _Steps, start_ns: int, tokens: int) -> dict[str, object]:
    if not steps.prefill_ns:
        return {}
    known: dict[str, object] = {PREFILL_SHARE: steps.prefill_ns, DECODE_SHARE: steps.decode_ns}
    if steps.first_ns:
        known[GPU_FIRST_TOKEN] = max(0, steps.first_ns - start_ns) / 1e9
        if tokens > 1:
            known[GPU_PER_TOKEN] = (steps.last_ns - steps.first_ns) / 1e9 / (tokens - 1)
    return known
