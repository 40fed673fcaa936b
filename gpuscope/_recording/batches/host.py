"""
Which host this is, as far as its monotonic clock goes: times of two processes of one host can be compared.

On Linux a boot of the kernel and a namespace of clocks have one monotonic clock. Elsewhere each process counts as a
host of its own, and times are compared by the clock of the world.
"""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path

_BOOT, _CLOCKS = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/time")


@lru_cache(maxsize=1)
def host_id() -> str:
    """Return the same text in all processes that share this one's monotonic clock, and in no other."""
    try:
        boot = _BOOT.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return f"{random.SystemRandom().getrandbits(128):032x}"
    try:
        return f"{boot}/{_CLOCKS.stat().st_ino}"
    except OSError:  # A kernel before 5.6, which has one clock.
        return boot
