"""
The fields of `Config`: each carries what is known of one setting besides its value.

Knows no setting itself. What may hold a credential, a header, a URL or a key, is left out of the text of a `Config`.
"""

from __future__ import annotations

from dataclasses import MISSING, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

from gpuscope._settings.complaints import CONFIG_FILE, Complaint, merged
from gpuscope._settings.names import unknown_variables
from gpuscope._settings.parsers import A_URL, PartlyError
from gpuscope._settings.shown import shown_variable
from gpuscope._settings.urls import NO_SCHEME, without_a_scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from dataclasses import Field

T = TypeVar("T")

_NO_CONFIG_FILE = (
    "`otlp` does not read OTEL_CONFIG_FILE: its endpoint, resource and sampler come from the other variables. To have "
    "those of the file, run the program under `opentelemetry-instrument` with GPUSCOPE_EXPORTER=auto."
)


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
        text: what it means, for the page of settings.
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


def of_traces(name: str) -> str:
    """Return the variables of OTLP with this end: that of spans, and the general one."""
    return f"OTEL_EXPORTER_OTLP_TRACES_{name} OTEL_EXPORTER_OTLP_{name}"


def for_metrics(spans_setting: T) -> T:
    """Return the field of metrics for one of spans."""
    spans = cast("Field[T]", spans_setting)
    variables = [variable.replace("_TRACES_", "_METRICS_") for variable in spans.metadata["variables"]]
    metadata = {**spans.metadata, "variables": variables, "text": "The same for metrics."}
    if spans.default_factory is not MISSING:
        return field(default_factory=spans.default_factory, repr=False, metadata=metadata)
    return field(default=cast("T", spans.default), repr=spans.repr, metadata=metadata)


def read_all(settings: Sequence[Field[Any]], environ: Mapping[str, str]) -> tuple[dict[str, Any], list[Complaint]]:
    """Return what the variables say, under the settings' names, and what to warn about."""
    values: dict[str, Any] = {}
    said: list[Complaint] = []
    for each in settings:
        found, complaints = _read(each, environ)
        values |= found
        said += [Complaint(text, [each.name]) for text in complaints]
    for name in without_a_scheme(values.get):
        (each,) = (each for each in settings if each.name == name)
        del values[name]
        variable = str(_variable(each, environ))
        said.append(Complaint(_ignoring(each, variable, environ[variable], A_URL.format(NO_SCHEME)), [name]))
    if not str(values.get("sampler")).endswith("traceidratio"):  # Then its argument is not a ratio.
        said = [complaint for complaint in said if complaint.settings != ("sampler_ratio",)]
    if values.get(CONFIG_FILE):
        said.append(Complaint(_NO_CONFIG_FILE, [CONFIG_FILE]))
    known = [variable for each in settings for variable in each.metadata["variables"]]
    return values, [*merged(said), *map(Complaint, unknown_variables(environ, known))]


def _read(setting: Field[Any], environ: Mapping[str, str]) -> tuple[dict[str, object], list[str]]:
    """Return what the first of its variables says, under the setting's name, and what to warn about."""
    variable = _variable(setting, environ)
    if variable is None:
        return {}, []
    text = environ[variable]
    try:
        return {setting.name: setting.metadata["parse"](text)}, []
    except PartlyError as error:
        return {setting.name: error.value}, [f"{variable}: expected {error}; the others are used."]
    except ValueError as error:
        return {}, [_ignoring(setting, variable, text, str(error))]


def _variable(setting: Field[Any], environ: Mapping[str, str]) -> str | None:
    """Return the first of its variables that is set."""
    # OpenTelemetry: an empty value is the same as an unset variable.
    return next((each for each in setting.metadata["variables"] if environ.get(each, "").strip()), None)


def _ignoring(setting: Field[Any], variable: str, text: str, expected: str) -> str:
    default = setting.metadata["shown"]
    return f"ignoring {variable} ({shown_variable(text)}): expected {expected}; using the default, {default}."
