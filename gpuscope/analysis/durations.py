"""
How durations are written in reports: `duration`.

The rule itself is in `gpuscope._data.plain`, because summaries of running programs follow it too.
"""

from __future__ import annotations

from gpuscope._data.plain.durations import duration

__all__ = ["duration"]
