"""
Names that somebody mistyped: the closest that there is, and variables that look like ours and are not.

Knows no setting. Never shows the value of a variable.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_PREFIX = "GPUSCOPE"
_NOT_SETTINGS = ("GPUSCOPE_NATIVE",)
"""Ours as well, and read by whoever needs them."""
_OF_KUBERNETES = re.compile(r".*(_SERVICE_HOST|(_SERVICE)?_PORT(_.+)?)")
"""What it sets in every container where a Service has a name that begins with `gpuscope`."""


_OFTEN_TRIED = {
    "ENABLED": "GPUSCOPE",
    "MODE": "GPUSCOPE",
    "SAMPLER": "OTEL_TRACES_SAMPLER",
    "FRAMEWORK": "GPUSCOPE_FRAMEWORKS",
    "SERVICE_NAME": "OTEL_SERVICE_NAME",
}
_LONGEST = 80


def closest(name: str, names: Iterable[str]) -> str:
    """Return the end of a sentence, with the closest of the names if one is close."""
    found = _closest(name, names)
    return f"; did you mean `{found}`?" if found else "."


def listed(names: Iterable[str]) -> str:
    """Return names as they stand in a sentence: `a`, `a and b`, `a, b and c`."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def perhaps(word: str, words: Iterable[str]) -> str:
    """Return the same in brackets, for the middle of a sentence, or nothing."""
    found = _closest(word, words)
    return f" (did you mean {found}?)" if found else ""


def _closest(name: str, names: Iterable[str]) -> str:
    import difflib  # Where all is well it is not needed.

    return next(iter(difflib.get_close_matches(name[:_LONGEST], list(names), 1)), "")


def unknown_variables(environ: Mapping[str, str], known: Iterable[str]) -> list[str]:
    """Return a sentence for each variable that begins as ours do, in any case, and is not one."""
    ours = [*known, *_NOT_SETTINGS]
    return [
        f"{_shown(name)} is not a variable of gpuscope{_meant(name, ours)}"
        for name in environ
        if name.upper().startswith(_PREFIX) and name not in ours and not _OF_KUBERNETES.fullmatch(name)
    ]


def _meant(name: str, ours: Iterable[str]) -> str:
    """Return the end of the sentence. Names are compared without what all have in common."""
    rest = name.upper().removeprefix(_PREFIX).strip("_")
    by_rest = _OFTEN_TRIED | {each.removeprefix(f"{_PREFIX}_"): each for each in ours if each.startswith(f"{_PREFIX}_")}
    of_opentelemetry = [each for each in ours if each.endswith(f"_{rest}")]
    found = by_rest.get(_closest(rest, by_rest)) or min(of_opentelemetry, key=len, default="")
    found = found if len(rest) > 1 else _PREFIX  # As `GPUSCOPES`.
    return f"; did you mean {found}?" if found else ", and has no effect; docs/settings.md lists those that are."


def _shown(name: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in name[:_LONGEST])


def is_blank(name: str) -> bool:
    """Tell whether a name has nothing in it that can be seen: empty, spaces, or letters without a width."""
    return not any(letter.isprintable() and not letter.isspace() for letter in name)
