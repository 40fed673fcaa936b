"""`GpuUse`: what NVML said of a GPU, and that in words. Nothing here acts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

THROTTLED = {
    "power_brake": "power brake",
    "hardware_thermal": "too hot, by the hardware",
    "hardware_slowdown": "slowdown by the hardware",
    "software_thermal": "too hot, by the driver",
    "power_cap": "power cap",
    "sync_boost": "clocks as those of another GPU",
}
"""What holds clocks down, in words."""


def throttled(by_s: Mapping[str, float], watched_s: float) -> str:
    """Return for which part of the time clocks were held down, and by what: `12 %: power cap`; empty if for none."""
    share = sum(by_s.values()) / watched_s if watched_s else 0.0
    if not share:
        return ""
    causes = sorted((name for name, seconds in by_s.items() if seconds), key=lambda name: -by_s[name])
    part = f"{share:.0%}" if share >= 0.005 else "less than 1%"  # noqa: PLR2004 - what is written as 0 %
    return f"{part}: {', '.join(THROTTLED.get(name, name) for name in causes)}"


def in_words(use: GpuUse) -> str:
    """Return what NVML said of a GPU, in a few words."""
    watched_s, said = use.watched_s or 1.0, [f"GPU {use.index}"]
    if use.active_s is not None:
        said.append(f"at work {use.active_s / watched_s:.0%}")
    if use.energy_j is not None:
        said.append(f"{use.energy_j / watched_s:.0f} W")
    if use.throttled_s is not None and (held := throttled(use.throttled_s, watched_s)):
        said.append(f"throttled {held}")
    if use.others:
        said.append(f"{use.others} other process{'' if use.others == 1 else 'es'}")
    return ", ".join(said)


@dataclass(frozen=True, slots=True)
class GpuUse:
    """
    What NVML said of one GPU while this process recorded, added up: each reading stands for the time since the last.

    All processes on the GPU are in it. What NVML does not tell is None, or empty.
    """

    index: int
    uuid: str
    model: str
    vendor: str
    watched_s: float
    """For how long it was read."""
    active_s: float | None
    """Time in which a kernel of any process ran."""
    energy_j: float | None
    """Of the whole GPU, from its power."""
    cycles: float | None
    """Of its multiprocessors' clock; a mean clock is this by `watched_s`."""
    throttled_s: dict[str, float] | None
    """Time in which something held its clocks down, by what says most of it: these add up."""
    others_s: dict[str, float]
    """Time by what other processes did: `alone` (there were none), `idle` (they did not work), `worked` (they had the
    GPU), `unknown` (they were there), `hidden` (NVML does not show whether there were any)."""
    others: int | None
    """How many of them there are at least, at the last look; None where that is hidden."""
    is_part: bool = False
    """Whether this process has a part of it (MIG): power, clock and what holds that down are the whole GPU's."""
