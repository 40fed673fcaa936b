"""
The setting of stalls, as a field of `Config`: a time, a multiple of a stage's own 99th percentile, or both.

Pure.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from gpuscope._settings.environment import FALSE_WORDS
from gpuscope._settings.fields import setting
from gpuscope._settings.parsers import time

_MULTIPLE = re.compile(r"(\d+(?:\.\d+)?)x")
_LEAST_MULTIPLE, _MOST_MULTIPLE = 2.0, 1e6
_time = time(0.05, 86_400.0)


class StallLimits(NamedTuple):
    """From when on a stage without progress stalls; 0 for never."""

    seconds: float
    multiple: float
    """Of the stage's own 99th percentile."""


def limits(text: str) -> StallLimits:
    """
    Return what a text says.

    Raises:
        ValueError: with what is allowed.

    """
    seconds = multiple = 0.0
    parts = [part.strip().lower() for part in text.split(",")]
    for part in parts:
        found = _MULTIPLE.fullmatch(part)
        if found and not multiple:
            multiple = float(found[1])
        elif not found and not seconds and (len(parts) == 1 or part not in FALSE_WORDS):
            seconds = _seconds(part)
        else:
            raise ValueError(_EXPECTED)
    if multiple and not _LEAST_MULTIPLE <= multiple <= _MOST_MULTIPLE:
        raise ValueError(_EXPECTED)
    return StallLimits(seconds, multiple)


_EXPECTED = "a time such as 10s, a multiple of a stage's p99 such as 20x, or both: 10s, 20x; 0 for none"


def _seconds(part: str) -> float:
    try:
        return _time(part)
    except ValueError:
        raise ValueError(_EXPECTED) from None


def stall(text: str) -> str:
    """Return the text if it can be used; nothing for none."""
    return text.strip().lower() if any(limits(text)) else ""


STALL: str = setting(
    "",
    "GPUSCOPE_STALL",
    stall,
    "From when on a stage without progress stalls: `10s`, `20x` (its own p99), or both: `10s, 20x`.",
    "unset",
)
