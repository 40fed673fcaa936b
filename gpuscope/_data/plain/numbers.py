"""
How counts per call are written, wherever somebody reads them: `34,050`, `12.5`, and never `3.405e+04`.

Words only.
"""

from __future__ import annotations

WHOLE = 100
"""From here on a count is rounded to a whole number."""


def number(count: float) -> str:
    """Return a count, which may be an average, as text."""
    return f"{count:,.0f}" if abs(count) >= WHOLE or count == int(count) else f"{count:,.3g}"
