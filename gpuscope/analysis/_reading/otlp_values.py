"""
OTLP's attribute values as Python's, and what may go wrong where they come from a file.

Trusts nothing: whoever reads catches `MALFORMED`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpuscope._data.values import as_text, clean

if TYPE_CHECKING:
    from collections.abc import Callable

MALFORMED = (AttributeError, LookupError, TypeError, ValueError, OverflowError, RecursionError)
"""What reading JSON of another shape than OTLP's raises."""


def plain(value: dict[str, Any]) -> Any:
    """
    Return what an `AnyValue` holds; bytes stay base64 text, as JSON has them.

    Raises:
        MALFORMED: where it is no `AnyValue`.

    """
    for kind, held in value.items():
        return _KINDS[kind](held)
    return None


def plain_attributes(attributes: list[dict[str, Any]]) -> dict[str, Any]:
    """
    Return attributes by their keys.

    Raises:
        MALFORMED: where they are no list of attributes.

    """
    return {as_text(each["key"]): plain(each["value"]) for each in attributes}


_KINDS: dict[str, Callable[[Any], Any]] = {
    "stringValue": as_text,
    "intValue": lambda held: clean(int(held)),
    "doubleValue": float,
    "boolValue": bool,
    "bytesValue": as_text,
    "arrayValue": lambda held: [plain(item) for item in held.get("values", ())],
    "kvlistValue": lambda held: plain_attributes(held.get("values", [])),
}
