"""
What the application tells the current span of a stage, attributes aside: as much as the SDK keeps by default.

Data and nothing else.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

T = TypeVar("T")

_LIMIT = 128
"""How many events a stage keeps, and how many links: the latest ones. These are the SDK's default limits."""

Event: TypeAlias = "tuple[str, int, Mapping[str, object]]"
Link: TypeAlias = "tuple[int, int, Mapping[str, object]]"


class Newest(deque[T]):
    """The newest of what came, and how many others there were."""

    def __init__(self) -> None:
        super().__init__(maxlen=_LIMIT)
        self.dropped = 0

    def append(self, item: T) -> None:
        """Add one, in the place of the oldest if need be."""
        self.dropped += len(self) == _LIMIT
        super().append(item)


@dataclass(slots=True, eq=False)
class Notes:
    """What one span was told."""

    name: str | None = None
    status: tuple[str, str | None] | None = None
    events: Newest[Event] = field(default_factory=Newest)
    links: Newest[Link] = field(default_factory=Newest)
