"""
The order in which stages are shown: each kind of request from its outermost stage inwards, by when stages start.

Sorts places and nothing else. It does not find them out, and it does not know what is kept of a stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@dataclass(slots=True, eq=False)
class Place:
    """Where one stage stands within one kind of request."""

    name: str
    root: str
    """Name of the outermost stage: the kind of request."""
    offset_ns: int
    """Start within `parent`, once that is known; until then, the time of the first start."""
    parent: Place | None = None

    @property
    def is_root(self) -> bool:
        """Whether this is the outermost stage of its kind of request."""
        return self.name == self.root


P = TypeVar("P", bound=Place)


def in_order(places: Iterable[P]) -> Iterator[tuple[P, P | None, int]]:
    """Yield (stage, stage around it, depth): each kind of request from its root, in the order of their starts."""
    places = list(places)
    roots = {place.root: place for place in places if place.is_root}
    inside: dict[Place | None, list[tuple[int, P]]] = {}
    for place in places:
        around, offset_ns = place.parent, place.offset_ns
        if around is None and not place.is_root and place.root in roots:
            around = roots[place.root]
            offset_ns -= around.offset_ns
        inside.setdefault(around, []).append((offset_ns, place))
    for same_parent in inside.values():
        same_parent.sort(key=lambda pair: pair[0], reverse=True)
    # A stack of our own: stages may be nested deeper than Python recurses.
    stack: list[tuple[P, P | None, int]] = [(place, None, 0) for _, place in inside.get(None, [])]
    while stack:
        place, parent, depth = stack.pop()
        yield place, parent, depth
        stack.extend((child, place, depth + 1) for _, child in inside.get(place, []))
