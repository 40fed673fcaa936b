"""
How durations are written, wherever somebody reads them: three significant digits and a unit, as in `23.2 ms`.

Words only. The timeline's `format.js` has the same rule.
"""

from __future__ import annotations

import math

_UNITS = ((1e3, "s"), (1.0, "ms"), (1e-3, "µs"), (1e-6, "ns"))
_ROUNDS_UP = 0.9995
"""From this part of a unit on, three digits of the smaller unit would read 1,000."""


def duration(ms: float | None, sign: str = "") -> str:
    """Return milliseconds as text; `-` for None. With the sign `+`, a duration that is not negative begins with it."""
    if ms is None or math.isnan(ms):
        return "-"
    size = abs(ms)
    unit, name = next((each for each in _UNITS if size >= each[0] * _ROUNDS_UP), _UNITS[-1])
    value = ms / unit
    if name == "ns":
        # A clock has no smaller ones.
        return f"{round(value) or 0:{sign if round(value) else ''},d} ns"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0  # noqa: PLR2004 - where rounding adds a digit
    # Halves go away from 0, as in a browser, so that one time is written the same in the report and in its page.
    from decimal import ROUND_HALF_UP, Decimal

    rounded = Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    return f"{rounded:{sign},} {name}"
