"""What the tests of model libraries share: record with a framework's file in use, and look at the spans."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from gpuscope.instrument import instrument, uninstrument
from gpuscope.testing import CapturedSpan, capture


@contextlib.contextmanager
def recorded(frameworks: str = "") -> Iterator[list[CapturedSpan]]:
    """Record with frameworks' functions as stages; the list has the host spans once the block is left."""
    with capture() as spans:
        instrument(frameworks=frameworks)
        try:
            yield spans
        finally:
            uninstrument()
    spans[:] = [span for span in spans if span.kind == "host"]


def paths(spans: list[CapturedSpan]) -> list[str]:
    """Return each span's name after those that it is in, as `pipeline/forward`, in order of their start."""
    by_id = {span.span_id: span for span in spans}

    def path(span: CapturedSpan) -> str:
        outer = by_id.get(span.parent_id)
        return span.name if outer is None else f"{path(outer)}/{span.name}"

    return [path(span) for span in spans]


def without_compilations(found: list[str]) -> list[str]:
    """Return the paths but for those of compilations."""
    return [path for path in found if "torch.compile" not in path]


def attributes(spans: list[CapturedSpan], name: str) -> list[dict]:
    """Return the attributes of the spans of one name that a file in `integrations` has given them."""
    prefixes = ("gpuscope.", "thread.", "code.")
    return [
        {key: value for key, value in span.attributes.items() if not key.startswith(prefixes)}
        for span in spans
        if span.name == name
    ]
