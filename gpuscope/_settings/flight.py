"""
The settings of the flight recorder, as fields of `Config`.

Pure.
"""

from __future__ import annotations

import re

from gpuscope._settings.environment import FALSE_WORDS, TRUE_WORDS
from gpuscope._settings.fields import setting
from gpuscope._settings.parsers import count

_UNITS = {"ms": 1e-3, "s": 1.0, "": 1.0, "min": 60.0}
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?) *(ms|s|min|)")


def path(text: str) -> str:
    """Return the path of a file; nothing for none."""
    word = text.strip()
    if word.lower() in FALSE_WORDS:
        return ""
    if "\0" in word or word.lower() in TRUE_WORDS:
        raise ValueError("the path of a file, such as /dev/shm/serve.flight, or 0 for none")
    return word


def duration(text: str) -> float:
    """Return a time in seconds: `250ms`, `1.5s`, `2min`; a number alone is of seconds."""
    found = _DURATION.fullmatch(text.strip().lower())
    if found is None:
        raise ValueError("a duration such as 250ms or 1.5s")
    return float(found[1]) * _UNITS[found[2]]


FLIGHT: str = setting(
    "",
    "GPUSCOPE_FLIGHT",
    path,
    "File of the flight recorder, in `/dev/shm` for one: the newest stages, whatever ends the process.",
    "unset",
)
FLIGHT_BYTES: int = setting(
    16_777_216, "GPUSCOPE_FLIGHT_BYTES", count(1 << 20, 1 << 34), "Its size; 64 bytes for each end of a stage."
)
FLIGHT_SLOW: float = setting(
    0.0,
    "GPUSCOPE_FLIGHT_SLOW",
    duration,
    "From how long on (`250ms`) a request has the flight recorder copied beside itself; 0 for none.",
    "0",
)
