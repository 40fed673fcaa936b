"""
The settings of the flight recorder, stalls, kept traces, NVML and deep looks now and then, as fields of `Config`.

Pure.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from gpuscope._settings.environment import FALSE_WORDS, TRUE_WORDS
from gpuscope._settings.fields import setting
from gpuscope._settings.keeping.rules import header_name, keep
from gpuscope._settings.parsers import boolean, size, time, without_unit


def path(text: str) -> str:
    """Return the path of a file; nothing for none."""
    word = text.strip()
    if word.lower() in FALSE_WORDS:
        return ""
    if "\0" in word or word.lower() in TRUE_WORDS:
        raise ValueError("the path of a file, such as /dev/shm/serve.flight, or 0 for none")
    return word


FLIGHT: str = setting(
    "",
    "GPUSCOPE_FLIGHT",
    path,
    "File of the flight recorder, in `/dev/shm` for one: the newest stages, whatever ends the process.",
    "unset",
)
FLIGHT_BYTES: int = setting(
    16_777_216,
    "GPUSCOPE_FLIGHT_BYTES",
    size(1 << 20, 1 << 34),
    "Its size, also as `16MiB`; 64 bytes for each end of a stage.",
    "16MiB",
)
FLIGHT_SLOW: float = setting(
    0.0,
    "GPUSCOPE_FLIGHT_SLOW",
    time(0.001, 86_400.0, needs_unit=True),
    "From how long on (`250ms`) a request has the flight recorder copied beside itself; 0 for none.",
    "0",
    keyword=time(0.001, 86_400.0),
)
KEEP: str = setting(
    "",
    "GPUSCOPE_KEEP",
    keep,
    "Which traces are exported, decided when a request has ended: `slower=250ms, p99, error, header=x-force-trace, "
    "share=0.01`; see [production](production.md#keep-the-slow-ones).",
    "all",
)
TRACE_HEADER: str = setting(
    "",
    "GPUSCOPE_TRACE_HEADER",
    header_name,
    "Header of responses, `x-trace-id` for one, in which `gpuscope.integrations.asgi` gives the trace's id.",
    "none",
)
NVML: bool = setting(False, "GPUSCOPE_NVML", boolean, "`1`: NVML is asked how much GPUs are used, at what power.", "0")
PROFILE_EVERY: float = setting(
    0.0,
    "GPUSCOPE_PROFILE_EVERY",
    time(10.0, 604_800.0),
    "Seconds from one short deep look to the next, on average, or with a unit: `90s`, `10m`, `2h`.",
    "unset",
)

_MULTIPLE = re.compile(r"(\d+(?:\.\d+)?)x")
_LEAST_MULTIPLE, _MOST_MULTIPLE = 2.0, 1e6
_LEAST_S = 0.05
_time = time(0.0, 86_400.0, needs_unit=True)


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
        seconds = _time(part)
    except ValueError:
        hint = without_unit(part)
        raise ValueError(f"{_EXPECTED}{hint and f' ({hint})'}") from None
    if 0 < seconds < _LEAST_S:
        raise ValueError(f"{_EXPECTED} (a time of 50 ms at least)")
    return seconds


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
