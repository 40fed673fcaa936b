"""
Turns attribute values of any type into the few types that OTLP can carry.

Never raises and never reads a GPU. Printing a tensor would copy it to the host and wait for it. So whatever has a shape
and a dtype, and is not numpy's, is described and not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Clean: TypeAlias = "bool | int | float | str | bytes | list[Clean] | dict[str, Clean] | None"
"""What OTLP can carry; an `int` has 64 bits."""

_INT64 = range(-(2**63), 2**63)
UNPRINTABLE = "<unprintable>"
_ITEMS = 1024
"""Items that one value may have, all levels together. It bounds the collector's time, and ends cycles."""
_DEPTH = 16
_TEXT = 4096
"""Characters kept of a value that becomes text for want of a better type; a string is kept whole."""


def clean(value: Any) -> Any:
    """
    Return the value as one of `Clean`.

    The signature does not say so, because type checkers can't follow the comparisons of `kind`, which are the fastest.
    """
    kind = type(value)
    if value is None or kind is bool or kind is float:
        return value
    if kind is str and value.isascii():
        return value
    if kind is int and value in _INT64:
        return value
    try:
        return _clean(value, [_ITEMS], _DEPTH)
    except Exception:  # An application's `__str__`, `__iter__` or property may raise anything.
        return UNPRINTABLE


def clean_mapping(values: Mapping[Any, object]) -> dict[str, Clean]:
    """Return a dict with text keys, whatever the keys are, and clean values; an empty one if nothing can be listed."""
    try:
        return {as_text(key): clean(values[key]) for key in values}
    except Exception:  # A mapping of the application's own making may raise anything.
        return {}


def as_text(value: object) -> str:
    """Return a name or a key, which should be text but may be anything, as text that OTLP can carry."""
    if type(value) is str and value.isascii():
        return value
    text = clean(value)
    return text if isinstance(text, str) else str(text)


def _clean(value: object, budget: list[int], depth: int) -> Clean:
    budget[0] -= 1
    if budget[0] < 0 or depth < 0:
        return "…"
    if isinstance(value, np.generic | np.ndarray):
        value = _from_numpy(value)
    if value is None or isinstance(value, bool | float):
        # Subclasses become the plain type, so that no encoder calls what they override.
        return float.__float__(value) if isinstance(value, float) else value
    if isinstance(value, int):
        plain = int.__index__(value)
        return plain if plain in _INT64 else str(plain)
    if isinstance(value, str):
        return _text(str.__str__(value))
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    return _clean_container(value, budget, depth - 1)


def _clean_container(value: object, budget: list[int], depth: int) -> Clean:
    if isinstance(value, Mapping):
        # Counted first, so that a mapping that is too large costs a call of `len` and no more.
        return (
            _summary(value)
            if len(value) > _ITEMS
            else {as_text(key): _clean(value[key], budget, depth) for key in value}
        )
    if isinstance(value, Sequence | AbstractSet) and not isinstance(value, range):
        return _summary(value) if len(value) > _ITEMS else [_clean(item, budget, depth) for item in value]
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return _description(value)
    if is_dataclass(value) and not isinstance(value, type):
        # Field by field, because its generated `repr` would print the tensors in it.
        return {item.name: _clean(getattr(value, item.name), budget, depth) for item in fields(value)}
    return _text(str(value)[:_TEXT])


def _from_numpy(value: np.generic | NDArray[np.generic]) -> object:
    if value.size > _ITEMS:
        return f"<ndarray shape={value.shape} dtype={value.dtype}>"
    plain = value.tolist()
    # `longdouble`, `void` and dates return themselves, or something that has no OTLP type.
    return str(value) if isinstance(plain, np.generic) else plain


def _description(value: Any) -> str:  # Of any type with a shape and a dtype.
    device = getattr(value, "device", None)
    where = "" if device is None or callable(device) else f" device={device}"
    return _text(f"<{type(value).__name__} shape={tuple(value.shape)} dtype={value.dtype}{where}>"[:_TEXT])


def _summary(value: Sized) -> str:
    return f"<{type(value).__name__} of {len(value)} items>"


def _text(value: str) -> str:
    # Lone surrogates are not Unicode text; protobuf would refuse the whole message.
    return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
