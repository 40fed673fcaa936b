"""
Plain data: the types of what reports hand over as JSON.

Types alone; nothing here acts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Plain: TypeAlias = "bool | int | float | str | Sequence[Plain] | Mapping[str, Plain] | None"
"""A value that JSON can hold. Tuples become lists there."""
PlainDict: TypeAlias = dict[str, Any]
"""A whole report as plain data. `Any`, because whoever reads it knows its keys, and would have to cast at each step."""


class HasPlainData(Protocol):
    """A report, as `Findings` and `Figures` are."""

    def as_dict(self) -> PlainDict:
        """Return plain data, as JSON can hold it."""
