"""
The rules of `GPUSCOPE_KEEP`, applied: to traces by their ids, to rows by what was said, to requests by their time.

Holds nothing but the quantiles.
"""

from __future__ import annotations

from itertools import compress
from typing import TYPE_CHECKING

import numpy as np

from gpuscope._collecting.keeping.quantiles import Quantiles
from gpuscope._data.attributes import ERROR_TYPE, KEEP
from gpuscope._data.batch import RowFlag
from gpuscope._settings.environment import FALSE_WORDS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from gpuscope._collecting.keeping.held import Root
    from gpuscope._data.batch import SpanDetails, StageBatch
    from gpuscope._settings.keeping.rules import Rules

_IDS = 1 << 64
"""So many values the lower half of a trace's id has; of these the share is, as for `TraceIdRatioBased`."""
_WARMUP = int(RowFlag.WARMUP)
SLOWER, ERROR, ASKED, SHARE = "slower", "error", "asked", "share"


class Judge:
    """
    Says which rule keeps something.

    Args:
        rules: the settings.

    """

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._least_left_out = min(round(rules.share * _IDS), _IDS)
        self._quantiles = Quantiles(rules.quantile) if rules.quantile else None
        self._quantile_name = f"p{100 * rules.quantile:g}"
        wanted = {SLOWER: rules.slower_ns, self._quantile_name: rules.quantile, ERROR: rules.error, SHARE: rules.share}
        self.reasons = [ASKED, *(name for name, value in wanted.items() if value)]
        """What may be the answer."""

    def by_share(self, batch: StageBatch) -> NDArray[np.bool_]:
        """Return which rows are kept by the ids of their traces."""
        if self._least_left_out >= _IDS:
            return np.ones(len(batch.site), np.bool_)
        found: NDArray[np.bool_] = batch.trace_low < np.uint64(self._least_left_out)
        return found

    def is_in_share(self, trace_id: int) -> bool:
        """Tell whether a trace is kept by its id."""
        return trace_id % _IDS < self._least_left_out

    def certain(self, batch: StageBatch) -> dict[int, str]:
        """Return the rows by which their traces are kept whatever comes, and why."""
        found: dict[int, str] = {}
        for place, site in enumerate(batch.sites):
            if _is_asked(site.attributes):
                found.update(dict.fromkeys(np.flatnonzero(batch.site == place).tolist(), ASKED))
        for row, details in batch.details.items():
            if details.attributes is not None and _is_asked(details.attributes):
                found[row] = ASKED
            elif self._rules.error and _has_failed(details):
                found[row] = ERROR
        return found

    def slow(self, batch: StageBatch, rows: NDArray[np.int64], took_ns: NDArray[np.int64]) -> dict[int, str]:
        """
        Return which requests took too long, by their places in `rows`, and by which rule.

        All count for the quantiles, but for warm-up, to which quantiles do not apply.

        Args:
            batch: resolved stages.
            rows: of the outermost stages.
            took_ns: from the beginning of each request until all of it was done.

        """
        found: dict[int, str] = {}
        if not len(rows):
            return found
        if self._quantiles is not None:
            kinds = np.where(batch.flags[rows] & _WARMUP, -1, batch.site[rows])
            for kind in set(kinds.tolist()) - {-1}:
                places = np.flatnonzero(kinds == kind)
                beyond = self._quantiles.beyond(batch.sites[kind].name, took_ns[places])
                found.update(dict.fromkeys(places[beyond].tolist(), self._quantile_name))
        if self._rules.slower_ns:
            found.update(dict.fromkeys(np.flatnonzero(took_ns >= self._rules.slower_ns).tolist(), SLOWER))
        return found

    def slow_ones(self, roots: list[Root], end_ns: list[int]) -> list[str | None]:
        """Return the rule by which each request took too long, if one did, as `slow` does."""
        took_ns = [end - root.start_ns for root, end in zip(roots, end_ns, strict=True)]
        found: list[str | None] = [SLOWER if self.is_slow(took) else None for took in took_ns]
        if self._quantiles is None:
            return found
        kinds: dict[str, list[int]] = {}
        for place, root in enumerate(roots):
            if not root.warms_up:
                kinds.setdefault(root.kind, []).append(place)
        for kind, places in kinds.items():
            beyond = self._quantiles.beyond(kind, np.array([took_ns[place] for place in places]))
            for place in compress(places, beyond.tolist()):
                found[place] = found[place] or self._quantile_name
        return found

    def is_slow(self, took_ns: int) -> bool:
        """Tell whether a request that takes so long, or longer, is kept."""
        return bool(self._rules.slower_ns) and took_ns >= self._rules.slower_ns


def _is_asked(attributes: Mapping[str, object]) -> bool:
    """Tell whether a stage says that its trace is to be kept, with the words of settings and of the header for no."""
    value = attributes.get(KEEP)
    return value.strip().lower() not in FALSE_WORDS if isinstance(value, str) else bool(value)


def _has_failed(details: SpanDetails) -> bool:
    """Tell whether an exception left the stage, or it was said to have failed."""
    if details.error is not None or (details.status is not None and details.status[0] == "ERROR"):
        return True
    return details.attributes is not None and ERROR_TYPE in details.attributes
