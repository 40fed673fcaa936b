"""
Parsers of settings: each takes a text and returns the value, or raises `ValueError` with what is allowed.

The text of the error completes "expected ...". Functions of one string, which know no variable's name; only `sampler`
asks for more, which is what is installed.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import unquote

from gpuscope._settings.environment import FALSE_WORDS, TRUE_WORDS
from gpuscope._settings.names import perhaps
from gpuscope._settings.urls import is_target, split_url

if TYPE_CHECKING:
    from collections.abc import Callable

EXPORTERS = ("auto", "otlp", "sdk", "file", "none")
_UNITS_S = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
_SIZES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_BARE_NUMBER = re.compile(r"\d{1,9}(\.\d{1,9})?")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\xa0-\xff]*")
SAMPLERS = (
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
)


A_URL = "a URL such as http://localhost:4318 (this one {})"
SAMPLER_GROUP = "opentelemetry_traces_sampler"
"""OpenTelemetry's group of entry points for others."""


def mode(text: str) -> str:
    word = text.strip().lower()
    if word in TRUE_WORDS:
        return "on"
    if word in FALSE_WORDS:
        return "absent"
    if word == "idle":
        return "idle"
    raise ValueError(f"1/true/yes/on, 0/false/no/off or idle{perhaps(word, (*TRUE_WORDS, *FALSE_WORDS, 'idle'))}")


def boolean(text: str) -> bool:
    word = text.strip().lower()
    if word in TRUE_WORDS or word in FALSE_WORDS:
        return word in TRUE_WORDS
    raise ValueError("1/true/yes/on or 0/false/no/off")


def otel_boolean(text: str) -> bool:
    # OpenTelemetry: "any value that represents a Boolean MUST be set to true only by the string 'true'".
    word = text.strip().lower()
    if word in ("true", "false", ""):
        return word == "true"
    raise ValueError("true or false")


def graph_stages(text: str) -> str:
    word = text.strip().lower()
    if word in FALSE_WORDS or not word:
        return ""
    if word in TRUE_WORDS or word in ("beside", "inline"):
        return "inline" if word == "inline" else "beside"
    raise ValueError(f"1/true/yes/on, inline or 0/false/no/off{perhaps(word, ('beside', 'inline'))}")


def exporters(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))
    bad = [name for name in names if name not in EXPORTERS]
    if bad or not names or ("none" in names and len(names) > 1):
        hint = f", unlike number {names.index(bad[0]) + 1}" if bad and len(names) > 1 else ""
        hint += perhaps(bad[0], EXPORTERS) if bad else ""
        raise ValueError(f"auto, none, or any of otlp, sdk and file, separated by commas{hint}")
    return names


def between(low: float, high: float, unit: str = "") -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise ValueError(f"a number{unit and f' of {unit}'} from {low:g} to {high:g}")
        return value

    return parse


def time(low_s: float, high_s: float, *, needs_unit: bool = False) -> Callable[[str], float]:
    """Return a parser of times, in seconds where they need no unit and have none; 0 and words for no are 0."""

    def parse(text: str) -> float:
        word = text.strip().lower()
        if word in FALSE_WORDS:
            return 0.0
        number = word.rstrip("".join(_UNITS_S) + " ")
        unit = word[len(number) :].strip()
        try:
            seconds = float(number) * _UNITS_S[unit or "s"]
        except (ValueError, KeyError):
            seconds = float("nan")
        if seconds != 0 and (not low_s <= seconds <= high_s or (needs_unit and not unit)):
            hint = ""
            if needs_unit:
                hint = without_unit(word) and f" ({without_unit(word)})"
                allowed = f"a time from {_shown_s(low_s)} to {_shown_s(high_s)}, with a unit as in 250ms, 90s, 10m, 2h"
            else:
                allowed = f"seconds from {low_s:g} to {high_s:g}, or with a unit as in 250ms, 90s, 10m, 2h"
            raise ValueError(f"{allowed}{hint}; 0 for never")
        return seconds

    return parse


def without_unit(text: str) -> str:
    """Return what is wrong with a time that is a number alone; nothing for any other text, and for 0."""
    word = text.strip()
    if not _BARE_NUMBER.fullmatch(word) or not float(word):
        return ""
    return f"{word} has no unit: {word}ms or {word}s"


def _shown_s(seconds: float) -> str:
    return f"{seconds * 1e3:g}ms" if seconds < 1 else f"{seconds:g}s"


def size(low: int, high: int) -> Callable[[str], int]:
    """Return a parser of sizes: bytes, or with a unit."""

    def parse(text: str) -> int:
        found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?) *([a-z]*)", text.strip().lower())
        scale = _SIZES.get(found[2] or "b", 0) if found else 0
        number = float(found[1]) * scale if found and "." in found[1] else int(found[1]) * scale if found else 0
        if not scale or not low <= number <= high or number != int(number):
            raise ValueError(f"bytes from {low} to {high}, or with a unit as in 64KiB, 16MiB, 1GiB, 100MB")
        return int(number)

    return parse


def count(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        digits = text.strip()
        if not re.fullmatch(r"\d{1,18}", digits) or not low <= int(digits) <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return int(digits)

    return parse


def milliseconds(low: float) -> Callable[[str], float]:
    parse = between(low, 86_400_000.0, "milliseconds")
    return lambda text: parse(text) / 1e3


def path(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise ValueError("the path of a file")
    return text


def endpoint(text: str) -> str:
    url = text.strip()
    if is_target(url):  # Whether that will do depends on the protocol.
        return url
    try:
        split_url(url)
    except ValueError as error:
        raise ValueError(A_URL.format(error)) from None
    return url


def endpoint_or_none(text: str) -> str:
    return endpoint(text) if text.strip() else ""


def profile(text: str) -> str:
    word = text.strip()
    if word.lower() in FALSE_WORDS:
        return ""
    if word.lower() == "signal":
        return "signal"
    if "/" not in word:
        raise ValueError("signal, or the path of a file, with a / in it")
    return word


class PartlyError(ValueError):
    """
    What of a text cannot be used, without quoting it: it may be a credential.

    Args:
        value: of the rest.
        parts: the numbers of the parts that are left out, from 1.
        expected: what is allowed.

    """

    def __init__(self, value: dict[str, str], parts: list[int], expected: str) -> None:
        super().__init__(f"{expected}, unlike number {', '.join(map(str, parts))}")
        self.value = value


def is_header(name: str, value: str) -> bool:
    """Tell whether HTTP allows this as a header."""
    return bool(_HEADER_NAME.fullmatch(name.lower()) and _HEADER_VALUE.fullmatch(value))


def headers(text: str) -> dict[str, str]:
    pairs, bad = {}, []
    for number, part in enumerate(text.split(","), 1):
        name, sign, value = part.partition("=")
        name, value = name.strip().lower(), unquote(value.strip())
        if sign and is_header(name, value):
            pairs[name] = value
        elif part.strip():
            bad.append(number)
    if bad:
        raise PartlyError(pairs, bad, "name=value pairs, separated by commas, with percent-encoded values")
    return pairs


def one_of(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        word = text.strip().lower()
        if word not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}{perhaps(word, allowed)}" if len(allowed) > 1 else allowed[0])
        return word

    return parse


def sampler(text: str) -> str:
    name = text.strip()
    if name.lower() in SAMPLERS:
        return name.lower()
    from importlib.metadata import entry_points

    if not entry_points(group=SAMPLER_GROUP, name=name):
        hint = perhaps(name.lower(), SAMPLERS)
        raise ValueError(f"one of {', '.join(SAMPLERS)}{hint}, or a sampler that is installed")
    return name
