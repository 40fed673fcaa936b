"""
The fields of `Config`: each carries what is known of one setting besides its value.

Knows no setting itself. What may hold a credential, a header, a URL or a key, is left out of the text of a `Config`.
"""

from __future__ import annotations

from dataclasses import MISSING, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

from gpuscope._settings.parsers import PartlyError
from gpuscope._settings.shown import shown_variable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from dataclasses import Field

T = TypeVar("T")


def setting(
    default: T,
    variables: str,
    parser: Callable[[str], T],
    text: str,
    shown: str | None = None,
    *,
    keyword: Callable[[str], T] | None = None,
) -> T:
    """
    Return a field with all that is known of one setting.

    Args:
        default: the value where nothing else is said.
        variables: the names of its variables; the first that is set wins.
        parser: makes a value of a variable's text, or raises `ValueError` with what is allowed.
        text: what it means, for the README's table.
        shown: the default as a variable would say it, where `str` does not.
        keyword: makes a value of what `enable` is given, where that has another unit than the variable.

    """
    metadata = {
        "variables": variables.split(),
        "parse": parser,
        "keyword": keyword or parser,
        "text": text,
        "shown": shown or str(default),
    }
    if isinstance(default, dict):
        return field(default_factory=type(default), repr=False, metadata=metadata)
    return field(default=default, repr=not variables.endswith(("ENDPOINT", "CLIENT_KEY")), metadata=metadata)


def for_metrics(spans_setting: T) -> T:
    """Return the field of metrics for one of spans."""
    spans = cast("Field[T]", spans_setting)
    variables = [variable.replace("_TRACES_", "_METRICS_") for variable in spans.metadata["variables"]]
    metadata = {**spans.metadata, "variables": variables, "text": "The same for metrics."}
    if spans.default_factory is not MISSING:
        return field(default_factory=spans.default_factory, repr=False, metadata=metadata)
    return field(default=cast("T", spans.default), repr=spans.repr, metadata=metadata)


def read(setting: Field[Any], environ: Mapping[str, str]) -> tuple[dict[str, object], list[str]]:
    """Return what the first of its variables says, under the setting's name, and what to warn about."""
    # OpenTelemetry: an empty value is the same as an unset variable.
    variable = next((each for each in setting.metadata["variables"] if environ.get(each, "").strip()), None)
    if variable is None:
        return {}, []
    text = environ[variable]
    try:
        return {setting.name: setting.metadata["parse"](text)}, []
    except PartlyError as error:
        return {setting.name: error.value}, [f"{variable}: expected {error}; the others are used."]
    except ValueError as error:
        default = setting.metadata["shown"]
        return {}, [f"ignoring {variable} ({shown_variable(text)}): expected {error}; using the default, {default}."]
