"""
What `GPUSCOPE_KEEP` says: by which rules a trace is kept once it is known how it went.

Pure. Shows of what it cannot read only short words, because a text may hold a credential.
"""

from __future__ import annotations

import functools
import math
import re
from typing import TYPE_CHECKING, NamedTuple

from gpuscope._settings.environment import FALSE_WORDS, TRUE_WORDS
from gpuscope._settings.names import perhaps
from gpuscope._settings.parsers import count, is_header, time, without_unit

if TYPE_CHECKING:
    from collections.abc import Callable

_LEAST_QUANTILE, _MOST_QUANTILE = 50.0, 99.9
_SLOWEST = 86_400.0
_ROWS = 65_536
_WORDS = ("slower", "p99", "error", "header", "share", "rows")
_EXPECTED = "rules separated by commas, such as slower=250ms, p99, error, header=x-force-trace, share=0.01"


class Rules(NamedTuple):
    """By which a trace is kept; one that holds is enough."""

    slower_ns: int = 0
    """From how long on, in nanoseconds, a request is kept; 0 for no such rule."""
    quantile: float = 0.0
    """Of requests of one kind, those slower than this quantile, between 0 and 1, are kept; 0 for no such rule."""
    error: bool = False
    header: str = ""
    """In lower case: requests that have it are kept. Empty for none."""
    share: float = 0.0
    """Of traces, by their ids."""
    rows: int = _ROWS
    """So many stages may wait until it is known whether they are kept."""


@functools.lru_cache(8)
def rules_of(text: str) -> Rules | None:
    """
    Return the rules in a text; None where it says that all traces are kept.

    Raises:
        ValueError: with what is allowed, for what is none.

    """
    if text.strip().lower() in FALSE_WORDS:
        return None
    if text.strip().lower() in TRUE_WORDS:
        raise ValueError(f"{_EXPECTED}, or 0 to export every trace")
    found: dict[str, object] = {}
    for number, part in enumerate(text.split(","), 1):
        word, sign, value = (each.strip() for each in part.partition("="))
        name, parse = _rule(word.lower(), number)
        if name in found:
            raise ValueError(f"{_EXPECTED}; number {number} is the second one for `{word.lower()}`: leave one out")
        if bool(sign) != (parse is not None):
            example = "a value, as in slower=250ms" if parse is not None else "no value"
            raise ValueError(f"{_EXPECTED}; number {number}, `{word.lower()}`, takes {example}")
        try:
            found[name] = _quantile(word) if name == "quantile" else True if parse is None else parse(value)
        except ValueError as error:
            raise ValueError(f"{error.args[0]} for `{word.lower()}`, number {number}") from None
    rules = Rules(**found)  # type: ignore[arg-type]  # The parsers have checked them.
    if not (rules.slower_ns or rules.quantile or rules.error or rules.header or rules.share):
        raise ValueError(f"{_EXPECTED}; these keep nothing: add a rule, or say 0 to export every trace")
    return rules


def keep(text: str) -> str:
    """Return the text if its rules can be read; nothing where all traces are kept."""
    return "" if rules_of(text) is None else text.strip()


def header_name(text: str) -> str:
    """Return the name of a header in lower case; nothing for none."""
    name = text.strip().lower()
    if name in FALSE_WORDS:
        return ""
    if name in TRUE_WORDS or not is_header(name, ""):
        raise ValueError("the name of a header, such as x-trace-id, or 0 for none")
    return name


def _rule(word: str, number: int) -> tuple[str, Callable[[str], object] | None]:
    """Return the field that a word is about, and what reads its value, if it takes one."""
    if re.fullmatch(r"p\d{1,3}(\.\d{1,3})?", word):
        return "quantile", None
    if word == "error":
        return "error", None
    if word in _READERS:
        return _READERS[word]
    seen = f", `{word}`" if re.fullmatch(r"[a-z_]{1,20}", word) else "" if word else ", which is empty"
    raise ValueError(f"{_EXPECTED}; number {number}{seen} is none of {', '.join(_WORDS)}{perhaps(word, _WORDS)}")


def _quantile(word: str) -> float:
    percent = float(word[1:])
    if not _LEAST_QUANTILE <= percent <= _MOST_QUANTILE:
        raise ValueError(f"a quantile from p{_LEAST_QUANTILE:g} to p{_MOST_QUANTILE:g}")
    return round(percent / 100, 9)


def _slower(text: str) -> int:
    try:
        seconds = time(1e-6, _SLOWEST, needs_unit=True)(text)
    except ValueError:
        seconds = 0.0
    if not seconds:
        hint = without_unit(text)
        raise ValueError(f"a time such as 250ms, 2s or 1m, up to a day{hint and f' ({hint})'}")
    return round(seconds * 1e9)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise ValueError("a number from 0 to 1, such as 0.01 for one trace in a hundred")
    return share


def _header(text: str) -> str:
    name = text.strip().lower()
    if not is_header(name, ""):
        raise ValueError("the name of a header, such as x-force-trace")
    return name


_READERS: dict[str, tuple[str, Callable[[str], object]]] = {
    "slower": ("slower_ns", _slower),
    "header": ("header", _header),
    "share": ("share", _share),
    "rows": ("rows", count(1024, 1 << 24)),
}
