"""
The fields of `Config`: each carries what is known of one setting besides its value.

Knows no setting itself.
"""

from __future__ import annotations

from dataclasses import MISSING, field
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable
    from dataclasses import Field

T = TypeVar("T")


def setting(default: T, variables: str, parser: Callable[[str], T], text: str, shown: str | None = None) -> T:
    """
    Return a field with all that is known of one setting.

    Args:
        default: the value where nothing else is said.
        variables: the names of its variables; the first that is set wins.
        parser: makes a value of a variable's text, or raises `ValueError` with what is allowed.
        text: what it means, for the README's table.
        shown: the default as a variable would say it, where `str` does not.

    """
    metadata = {"variables": variables.split(), "parse": parser, "text": text, "shown": shown or str(default)}
    if isinstance(default, dict):
        return field(default_factory=type(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def for_metrics(spans_setting: T) -> T:
    """Return the field of metrics for one of spans."""
    spans = cast("Field[T]", spans_setting)
    variables = [variable.replace("_TRACES_", "_METRICS_") for variable in spans.metadata["variables"]]
    metadata = {**spans.metadata, "variables": variables, "text": "The same for metrics."}
    if spans.default_factory is not MISSING:
        return field(default_factory=spans.default_factory, metadata=metadata)
    return field(default=cast("T", spans.default), metadata=metadata)
