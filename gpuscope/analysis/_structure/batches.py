"""
Batches and their members: which stage worked for which, and what each member was allotted; columns, like a recording's.

Rows are those of the recording; -1 where the files do not have the stage. Nothing here acts, but `kept`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def _none() -> NDArray[np.int64]:
    return np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Links:
    """One line per batch and member that the batch links to. A generation has one per step."""

    batch: NDArray[np.int64] = field(default_factory=_none)
    """Row of the batch's stage."""
    member: NDArray[np.int64] = field(default_factory=_none)
    """Row of the member's stage; -1 for a span of the application's, too."""


@dataclass(frozen=True, slots=True, eq=False)
class Shares:
    """One line per light span. Times are since the epoch; a line without a GPU part has 0 as its times there."""

    member: NDArray[np.int64] = field(default_factory=_none)
    """Row of the stage that the light span is below."""
    batch: NDArray[np.int64] = field(default_factory=_none)
    """Row of the batch's stage; of a generation's first step."""
    start_ns: NDArray[np.int64] = field(default_factory=_none)
    end_ns: NDArray[np.int64] = field(default_factory=_none)
    gpu_start_ns: NDArray[np.int64] = field(default_factory=_none)
    gpu_end_ns: NDArray[np.int64] = field(default_factory=_none)
    wait_ns: NDArray[np.int64] = field(default_factory=_none)
    """From the token to the batch; of a generation, in no step."""
    share_ns: NDArray[np.int64] = field(default_factory=_none)
    """-1 without GPU times."""
    size: NDArray[np.int64] = field(default_factory=_none)
    steps: NDArray[np.int64] = field(default_factory=_none)
    """How many batches a generation joined; 1 for a member of one batch."""


@dataclass(frozen=True, slots=True, eq=False)
class Batches:
    """All that the files say of batches."""

    links: Links = field(default_factory=Links)
    shares: Shares = field(default_factory=Shares)

    def kept(self, place: NDArray[np.int64]) -> Batches:
        """
        Return what is left where only some rows are.

        Args:
            place: the new place of each row, -1 for those that go; one more value at the end, -1.

        """
        return Batches(_kept(self.links, place), _kept(self.shares, place))


def _kept(table: Any, place: NDArray[np.int64]) -> Any:
    columns = {each.name: getattr(table, each.name) for each in fields(table)}
    for name in ("batch", "member"):
        columns[name] = place[columns[name]]
    some = (columns["batch"] >= 0) | (columns["member"] >= 0)
    return type(table)(**{name: column[some] for name, column in columns.items()})
