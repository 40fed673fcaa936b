"""
OTLP's attribute values as Python values, and what may go wrong where they come from a file.

Trusts nothing, and mends nothing: whoever reads catches `MALFORMED`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from gpuscope._data.plain.values import as_text, clean

if TYPE_CHECKING:
    from collections.abc import Callable

Json: TypeAlias = Any
"""What `json.loads` returned. `Any`, because its shape has not been checked: whoever reads it catches `MALFORMED`."""
JsonObject: TypeAlias = dict[str, Json]

MALFORMED = (AttributeError, LookupError, TypeError, ValueError, OverflowError, RecursionError)
"""What reading JSON raises if it does not have OTLP's shape."""


def plain(value: JsonObject) -> Json:
    """
    Return what an `AnyValue` holds; bytes stay base64 text, as in JSON.

    Raises:
        MALFORMED: It is not an `AnyValue`.

    """
    for kind, held in value.items():
        return _KINDS[kind](held)
    return None


def plain_attributes(attributes: list[JsonObject]) -> dict[str, object]:
    """
    Return attributes by their keys.

    Raises:
        MALFORMED: They are not a list of attributes.

    """
    return {as_text(each["key"]): plain(each["value"]) for each in attributes}


def hex_id(text: str, digits: int) -> str:
    """
    Return an id as it is: so many hexadecimal digits.

    Raises:
        MALFORMED: It is none.

    """
    if len(text) != digits or 2 * len(bytes.fromhex(text)) != digits:
        raise ValueError(text)
    return text


_KINDS: dict[str, Callable[[Json], Json]] = {
    "stringValue": as_text,
    "intValue": lambda held: clean(int(held)),
    "doubleValue": float,
    "boolValue": bool,
    "bytesValue": as_text,
    "arrayValue": lambda held: [plain(item) for item in held.get("values", ())],
    "kvlistValue": lambda held: plain_attributes(held.get("values", [])),
}
