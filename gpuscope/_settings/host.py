"""
The settings of what stalled the host, as fields that `Config` inherits.

Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpuscope._settings.environment import FALSE_WORDS
from gpuscope._settings.fields import setting
from gpuscope._settings.parsers import boolean, time

_on_s, _every_s = time(1.0, 3600.0), time(1.0, 604_800.0)


def share(text: str) -> str:
    """Return `SECONDS/SECONDS`: how long something is on, and every how many; nothing for never."""
    word = text.strip().lower()
    if word in FALSE_WORDS:
        return ""
    parts = word.split("/")
    try:
        on_s, every_s = _on_s(parts[0]), _every_s(parts[1])
    except (IndexError, ValueError):
        on_s = every_s = 0.0
    if len(parts) != 2 or not 0 < on_s <= every_s:  # noqa: PLR2004 - it is a fraction
        raise ValueError("how long and every how long, from 1 s on, as in 1s/60s or 5s/10m; 0 for never")
    return f"{on_s:g}/{every_s:g}"


def seconds_of(given: str) -> tuple[float, float]:
    """Return both numbers of what `share` returned, which is not empty."""
    on_s, _, every_s = given.partition("/")
    return float(on_s), float(every_s)


@dataclass(frozen=True, kw_only=True)
class HostSettings:
    """What stalled the host."""

    syncs: str = setting(
        "",
        "GPUSCOPE_SYNCS",
        share,
        "A watch for hidden synchronisations and pageable copies: how long and every how long, as `1s/60s`.",
        "unset",
    )
    memory: bool = setting(
        False,
        "GPUSCOPE_MEMORY",
        boolean,
        "`1`: outermost stages have the begin, end and peak of the memory that PyTorch's CUDA allocator gave out.",
        "0",
    )
