"""
How much work a stage was given: the sizes and shapes among the application's attributes.

Reads names and values, and compares nothing. What a request says also holds for the stages inside it.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

from gpuscope._data.attributes import INPUT_LENGTH, INPUT_TOKENS, NEW_TOKENS, OUTPUT_TOKENS

if TYPE_CHECKING:
    from gpuscope.analysis.recording import Recording

SIZE_WORDS = frozenset({"size", "batch", "tokens", "bytes", "items", "length", "len", "count"})
"""A number whose name ends in one of these is a size: `batch_size`, `gen_ai.usage.input_tokens`."""
_MAX_SIZE = 2.0**53
"""A larger number is not a size: a float no longer holds it exactly, and what is computed from it may overflow."""
_SAID_BY = {INPUT_TOKENS: INPUT_LENGTH, OUTPUT_TOKENS: NEW_TOKENS}
"""Totals over a batch, which say nothing more where a stage also has the size of one sequence: see `cold._growth`."""
SHAPE_WORDS = SIZE_WORDS | {"shape", "height", "width", "resolution", "dtype"}

Shape: TypeAlias = "tuple[tuple[str, float | str], ...]"
"""(name, value) of each shape-like attribute."""


def shape_of(recording: Recording, row: int) -> Shape:
    """Return the shape-like attributes of a stage and of those around it; the innermost value of a name counts."""
    found: dict[str, float | str] = {}
    while row >= 0:
        attributes = recording.attributes.get(row, {})
        for name, value in attributes.items():
            if _last_word(name) in SHAPE_WORDS and _SAID_BY.get(name) not in attributes:
                found.setdefault(name, _plain(value))
        row = int(recording.parent[row])
    return tuple(sorted(found.items()))


def sizes_in(shape: Shape) -> dict[str, float]:
    """Return the attributes of a shape that are sizes."""
    return {
        name: float(value)
        for name, value in shape
        if isinstance(value, (int, float)) and abs(value) <= _MAX_SIZE and _last_word(name) in SIZE_WORDS
    }


def _plain(value: object) -> float | str:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


@lru_cache(maxsize=1024)
def _last_word(name: str) -> str:
    return re.split(r"[._\-\s]", name.lower())[-1]
