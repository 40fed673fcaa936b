"""
Light spans and links of batches: what a member's trace says of the batch that worked for it, and whom a batch names.

Knows neither files nor rows. Raises `MALFORMED` for what is not as gpuscope writes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from gpuscope._data.attributes import BATCH_SIZE, BATCH_STEPS, BATCH_WAIT, GPU_SHARE, HOST_DURATION
from gpuscope.analysis._reading.otlp_values import hex_id, plain

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpuscope.analysis._reading.otlp_values import Json, JsonObject

    SpanKey = tuple[str, str]

_END_OF_TIME = 2**63
_MOST = 2**31


class Light(NamedTuple):
    """A light span."""

    member: SpanKey
    batch: SpanKey
    """Of the first step, for a generation."""
    start_ns: int
    end_ns: int
    wait_ns: int
    share_ns: int
    size: int
    steps: int


class LightSpans:
    """All of them, and the links of batches."""

    def __init__(self) -> None:
        self._spans: dict[SpanKey, Light] = {}
        self._gpu: dict[SpanKey, tuple[int, int]] = {}
        self._links: dict[SpanKey, list[SpanKey]] = {}

    def add(self, span: JsonObject, values: JsonObject) -> None:
        """
        Take a light span, or its GPU span.

        Raises:
            MALFORMED: It is not as it should be.

        """
        start_ns, end_ns = int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"])
        if not 0 < start_ns <= end_ns < _END_OF_TIME:
            raise ValueError(start_ns, end_ns)
        trace, parent = _key(span["traceId"], span["parentSpanId"])
        if HOST_DURATION not in values:
            self._gpu[trace, parent] = start_ns, end_ns
            return
        (link,) = span["links"]
        self._spans[_key(trace, span["spanId"])] = Light(
            (trace, parent),
            _key(link["traceId"], link["spanId"]),
            start_ns,
            end_ns,
            round(_number(values[BATCH_WAIT], _END_OF_TIME / 1e9) * 1e9),
            int(_number(values[GPU_SHARE], _END_OF_TIME)) if GPU_SHARE in values else -1,
            int(_number(values[BATCH_SIZE], _MOST)),
            int(_number(values[BATCH_STEPS], _MOST)) if BATCH_STEPS in values else 1,
        )

    def link(self, batch: SpanKey, span: JsonObject, values: JsonObject) -> None:
        """Take the links of a host span, if it is a batch's."""
        if BATCH_SIZE in values:
            self._links[batch] = [_key(link["traceId"], link["spanId"]) for link in span.get("links", ())]

    def links(self, place: Mapping[SpanKey, int]) -> list[tuple[int, int]]:
        """
        Return (batch, member) for each link, both by their rows; -1 for none.

        Args:
            place: the row of each stage.

        """
        return [
            (place.get(batch, -1), place.get(member, -1))
            for batch, members in self._links.items()
            for member in members
        ]

    def shares(self, place: Mapping[SpanKey, int]) -> list[tuple[int, ...]]:
        """Return each light span as a line of `Shares`; the argument is that of `links`."""
        return [
            (
                *(place.get(light.member, -1), place.get(light.batch, -1), light.start_ns, light.end_ns),
                *self._gpu.get(key, (0, 0)),
                *(light.wait_ns, light.share_ns, light.size, light.steps),
            )
            for key, light in self._spans.items()
        ]


def _key(trace: str, span: str) -> SpanKey:
    return hex_id(trace, 32), hex_id(span, 16)


def _number(value: JsonObject, most: float) -> Json:
    number = plain(value)
    if not 0 <= number < most:
        raise ValueError(number)
    return number
