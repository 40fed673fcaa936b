"""
The limits of OpenTelemetry's `SpanLimits`, kept as the SDK keeps them: the newest stay, and what goes is counted.

One difference: what gpuscope itself says of a span never goes, however low a limit is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gpuscope._data.plain.values import Clean
    from gpuscope.exporters._encoding.details import CleanDetails


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanLimits:
    """How much a span may hold; None is without a limit."""

    attributes: int | None = None
    events: int | None = None
    links: int | None = None
    event_attributes: int | None = None
    link_attributes: int | None = None
    length: int | None = None
    """Characters of a span's attribute."""
    other_length: int | None = None
    """Of the attribute of an event or of a link."""

    @classmethod
    def of(cls, given: object) -> SpanLimits:
        """Return the limits of the SDK's object, as far as it has them."""
        names = {
            "attributes": "max_span_attributes",
            "events": "max_events",
            "links": "max_links",
            "event_attributes": "max_event_attributes",
            "link_attributes": "max_link_attributes",
            "length": "max_span_attribute_length",
            "other_length": "max_attribute_length",
        }
        found = {ours: getattr(given, name, None) for ours, name in names.items()}
        return cls(**{name: limit for name, limit in found.items() if type(limit) is int and limit >= 0})

    def cut(self, attributes: dict[str, Clean]) -> dict[str, Clean]:
        """Return a span's attributes, with texts no longer than a span's may be."""
        if self.length is None:
            return attributes
        return {key: cut(value, self.length) for key, value in attributes.items()}

    def fit_of_site(self, attributes: Mapping[str, Clean], ours: int) -> tuple[dict[str, Clean], int]:
        """
        Return those attributes of a stage, the oldest first, that a span has room for, and how many it has not.

        Args:
            attributes: of the stage.
            ours: how many others the span has.

        """
        kept = dict(attributes)
        return kept, _drop_oldest(kept, None if self.attributes is None else self.attributes - ours)

    def fit(self, details: CleanDetails, of_site: Iterable[str], ours: int) -> list[str]:
        """
        Fit what only one span has, and return the names of its stage's attributes that it has no room for.

        Args:
            details: of the span; changed.
            of_site: names of the attributes of its stage, the oldest first.
            ours: how many others the span has.

        """
        own = {key: cut(value, self.length) for key, value in details.attributes.items()}
        both = dict.fromkeys(name for name in of_site if name not in own) | own
        names = list(both)
        details.dropped.attributes += _drop_oldest(both, None if self.attributes is None else self.attributes - ours)
        details.attributes = {key: value for key, value in own.items() if key in both}
        details.dropped.events += _drop_first(details.events, self.events)
        details.dropped.links += _drop_first(details.links, self.links)
        for items, limit in ((details.events, self.event_attributes), (details.links, self.link_attributes)):
            for *_, attributes in items:
                if dropped := _fit_inner(attributes, limit, self.other_length):
                    details.dropped_inside[id(attributes)] = dropped
        return [name for name in names if name not in both and name not in own]


NO_LIMITS = SpanLimits()


def cut(value: Clean, length: int | None) -> Clean:
    """Cut texts, also in lists, to a length."""
    if length is None:
        return value
    if isinstance(value, str):
        return value[:length]
    return [cut(item, length) for item in value] if isinstance(value, list) else value


def _fit_inner(attributes: dict[str, Clean], count: int | None, length: int | None) -> int:
    dropped = _drop_oldest(attributes, count)
    for key, value in attributes.items():
        attributes[key] = cut(value, length)
    return dropped


def _drop_oldest(attributes: dict[str, Any], room: int | None) -> int:
    excess = 0 if room is None else max(0, len(attributes) - max(0, room))
    for name in list(attributes)[:excess]:
        del attributes[name]
    return excess


def _drop_first(items: list[Any], room: int | None) -> int:
    excess = 0 if room is None else max(0, len(items) - room)
    del items[:excess]
    return excess
