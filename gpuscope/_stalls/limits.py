"""
From when on a stage stalls: the time that was given, a multiple of its own 99th percentile, or the shorter of both.

Pure but for the numbers that it keeps, by the stage's name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gpuscope._collecting.aggregation.summary import StageSummary
    from gpuscope._settings.flight import StallLimits

LEAST_CALLS = 100
"""Of so many calls after warm-up, at least, a 99th percentile is taken."""
LEAST_NS = 1_000_000_000
"""A multiple of it is not less: a pause of the machine is not a stall."""


class Limits:
    """
    The limits of each stage in nanoseconds; 0 for none.

    Args:
        given: what the setting says.

    """

    def __init__(self, given: StallLimits) -> None:
        self.general_ns = round(given.seconds * 1e9)
        self._multiple = given.multiple
        self._own_ns: dict[str, int] = {}

    @property
    def follows_percentiles(self) -> bool:
        """Whether percentiles matter."""
        return self._multiple > 0

    def learn(self, stages: Iterable[StageSummary]) -> None:
        """Take the percentiles of now."""
        found: dict[str, int] = {}
        for each in stages:
            if each.only_warmup or each.measured_calls < LEAST_CALLS:
                continue
            p99_ms = max(times.p99 for times in (each.host_ms, each.gpu_ms) if times is not None)
            found[each.name] = max(found.get(each.name, LEAST_NS), round(p99_ms * 1e6 * self._multiple))
        self._own_ns = {
            name: min(own_ns, self.general_ns) if self.general_ns else own_ns for name, own_ns in found.items()
        }

    def of(self, name: str) -> int:
        """Return the limit of a stage."""
        return self._own_ns.get(name, self.general_ns)
