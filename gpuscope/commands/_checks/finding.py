"""One line of the doctor's list. Holds, and does nothing."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's list: `verdict` is `ok`, `warning` or `problem`."""

    subject: str
    verdict: str
    seen: str
    advice: str = ""
