"""
Every setting: environment and keyword arguments into one frozen `Config`.

Pure: `Config.from_env` takes the mapping and returns what to warn about.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from gpuscope._settings import parsers as parse
from gpuscope._settings.environment import variables
from gpuscope._settings.shown import shown_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_GIVEN_IN_SECONDS = ("schedule_delay_s", "metrics_interval_s")
"""Settings of which the variable is in milliseconds and the keyword is not."""


def _setting(default: Any, variables: str, parser: Callable[[str], Any], text: str, shown: str | None = None) -> Any:
    """One place for a setting's variables (the first that is set wins), parser, default and sentence."""
    metadata = {"variables": variables.split(), "parse": parser, "text": text, "shown": shown or str(default)}
    if isinstance(default, dict):
        return field(default_factory=dict, repr=False, metadata=metadata)
    return field(default=default, repr=not variables.endswith("ENDPOINT"), metadata=metadata)


def _for_metrics(spans: Any) -> Any:
    """Return the setting of spans as one of metrics."""
    variables = [variable.replace("_TRACES_", "_METRICS_") for variable in spans.metadata["variables"]]
    metadata = {**spans.metadata, "variables": variables, "text": "The same for metrics."}
    if spans.default is MISSING:
        return field(default_factory=spans.default_factory, repr=False, metadata=metadata)
    return field(default=spans.default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Config:
    """
    All settings. Names and meanings of OpenTelemetry's variables are theirs; ours begin with `GPUSCOPE_`.

    Keyword arguments of `gpuscope.enable` are the fields of this class.
    """

    mode: str = _setting(
        "absent",
        "GPUSCOPE",
        parse.mode,
        "`1` records; `idle` records nothing until `gpuscope.enable()`; `0` or unset: a decorated function is the "
        "function itself.",
        "0",
    )
    exporters: tuple[str, ...] = _setting(
        ("auto",),
        "GPUSCOPE_EXPORTER",
        parse.exporters,
        "Where spans go: `otlp`, `sdk` (the application's TracerProvider), `file`, several with commas, or `none`. "
        "`auto` is `sdk` where the application configured a TracerProvider, else `otlp`.",
        "auto",
    )
    file: str = _setting(
        "gpuscope-{pid}.jsonl", "GPUSCOPE_FILE", str, "Path of the `file` exporter; `{pid}` becomes the process id."
    )
    file_max_bytes: int = _setting(
        67_108_864,
        "GPUSCOPE_FILE_MAX_BYTES",
        parse.count(4096, 2**40),
        "Size at which the file is rotated, to `PATH.1`.",
    )
    file_backups: int = _setting(
        3, "GPUSCOPE_FILE_BACKUPS", parse.count(0, 1000), "Rotated files kept beside the current."
    )
    nvtx: bool = _setting(
        True, "GPUSCOPE_NVTX", parse.boolean, "NVTX ranges in the domain `gpuscope`, for Nsight tools.", "1"
    )
    warmup: int = _setting(
        3, "GPUSCOPE_WARMUP", parse.count(0, 1_000_000), "How many first calls of each stage are flagged as warm-up."
    )
    graph_stages: str = _setting(
        "beside",
        "GPUSCOPE_GRAPH_STAGES",
        parse.graph_stages,
        "Stages in CUDA graphs are timed, by nodes beside those of the program; `inline`: among them; `0`: not.",
        "1",
    )
    profile: str = _setting(
        "",
        "GPUSCOPE_PROFILE",
        parse.profile,
        "Deep looks on demand: `signal` (SIGUSR2 to the process asks for one) or the path of a file (making it does).",
        "unset",
    )
    stages: str = _setting(
        "", "GPUSCOPE_STAGES", str.strip, "Functions that are stages: `infer=app:f{n=len(x)}`, with commas.", "none"
    )
    frameworks: str = _setting(
        "", "GPUSCOPE_FRAMEWORKS", str.strip, "Frameworks whose functions are stages, with commas; or `all`.", "none"
    )
    stages_file: str = _setting("", "GPUSCOPE_STAGES_FILE", str.strip, "A TOML file that names both.", "none")
    queue_size: int = _setting(
        8192,
        "GPUSCOPE_QUEUE_SIZE",
        parse.count(16, 1_000_000),
        "Stages that may wait for the collector, and again for their GPU events; beyond it the newest are dropped.",
    )
    interval_s: float = _setting(
        0.2, "GPUSCOPE_INTERVAL", parse.between(0.001, 60.0, "seconds"), "Seconds between the collector's passes."
    )
    event_deadline_s: float = _setting(
        60.0,
        "GPUSCOPE_EVENT_DEADLINE",
        parse.between(0.01, 86_400.0, "seconds"),
        "Seconds after which a stage whose GPU work has not ended is exported with host times only.",
    )
    shutdown_timeout_s: float = _setting(
        5.0,
        "GPUSCOPE_SHUTDOWN_TIMEOUT",
        parse.between(0.0, 3600.0, "seconds"),
        "Seconds that the exit of the process may wait for the last spans.",
    )
    metrics: str = _setting(
        "auto",
        "GPUSCOPE_METRICS",
        parse.one_of("auto", "otlp", "sdk", "none"),
        "Where metrics go: `otlp`, `sdk` (the application's MeterProvider) or `none`. `auto` is `sdk` where the "
        "application configured a MeterProvider, else `otlp` where spans go there, unless only they were given an "
        "endpoint, else `none`.",
    )
    metrics_interval_s: float = _setting(
        60.0,
        "OTEL_METRIC_EXPORT_INTERVAL",
        parse.milliseconds(1.0),
        "Milliseconds between two exports of metrics, and the interval that the GPUs' busy ratio is of.",
        "60000",
    )
    metrics_exporter: str = _setting(
        "",
        "OTEL_METRICS_EXPORTER",
        str,
        "`none`: `auto` exports no metrics. Other values are the application's.",
        "unset",
    )
    sdk_disabled: bool = _setting(
        False, "OTEL_SDK_DISABLED", parse.otel_boolean, "`true`: nothing goes to `otlp` or `sdk`.", "false"
    )
    traces_exporter: str = _setting(
        "", "OTEL_TRACES_EXPORTER", str, "`none`: `auto` exports nothing. Other values are the application's.", "unset"
    )
    sampler: str = _setting(
        "parentbased_always_on",
        "OTEL_TRACES_SAMPLER",
        parse.one_of(*parse.SAMPLERS),
        "Which traces are exported, where the application has no TracerProvider with a sampler of its own.",
    )
    sampler_ratio: float = _setting(
        1.0, "OTEL_TRACES_SAMPLER_ARG", parse.between(0.0, 1.0, "parts"), "Share for the `traceidratio` samplers."
    )
    schedule_delay_s: float = _setting(
        5.0, "OTEL_BSP_SCHEDULE_DELAY", parse.milliseconds(0.0), "Milliseconds between two requests of `otlp`.", "5000"
    )
    otlp_endpoint: str = _setting(
        "", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", str.strip, "Full URL for spans, used as it is.", "unset"
    )
    otlp_base_endpoint: str = _setting(
        "http://localhost:4318",
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        str.strip,
        "Base URL; `/v1/traces` or `/v1/metrics` is added.",
    )
    otlp_headers: dict[str, str] = _setting(
        {},
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS OTEL_EXPORTER_OTLP_HEADERS",
        parse.headers,
        "Headers of each request, `name=value` between commas.",
        "none",
    )
    otlp_timeout_s: float = _setting(
        10.0,
        "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT OTEL_EXPORTER_OTLP_TIMEOUT",
        parse.between(0.001, 3600.0, "seconds"),
        "Seconds for a request, its retries included.",
        "10",
    )
    otlp_compression: str = _setting(
        "none",
        "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION OTEL_EXPORTER_OTLP_COMPRESSION",
        parse.one_of("none", "gzip"),
        "`gzip` or `none`.",
    )
    otlp_certificate: str = _setting(
        "",
        "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE OTEL_EXPORTER_OTLP_CERTIFICATE",
        str,
        "File with the certificates that the endpoint is checked against.",
        "the system's",
    )
    otlp_client_certificate: str = _setting(
        "",
        "OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE",
        str,
        "File with the client's certificate, for mutual TLS.",
        "none",
    )
    otlp_client_key: str = _setting(
        "",
        "OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY OTEL_EXPORTER_OTLP_CLIENT_KEY",
        str,
        "File with the client's private key.",
        "none",
    )
    otlp_protocol: str = _setting(
        "http/protobuf",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL OTEL_EXPORTER_OTLP_PROTOCOL",
        parse.one_of("http/protobuf"),
        "Only `http/protobuf`; an OpenTelemetry Collector takes it on port 4318.",
    )
    otlp_metrics_endpoint: str = _setting(
        "", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", str.strip, "Full URL for metrics, used as it is.", "unset"
    )
    otlp_metrics_headers: dict[str, str] = _for_metrics(otlp_headers)
    otlp_metrics_timeout_s: float = _for_metrics(otlp_timeout_s)
    otlp_metrics_compression: str = _for_metrics(otlp_compression)
    otlp_metrics_certificate: str = _for_metrics(otlp_certificate)
    otlp_metrics_client_certificate: str = _for_metrics(otlp_client_certificate)
    otlp_metrics_client_key: str = _for_metrics(otlp_client_key)
    otlp_metrics_protocol: str = _for_metrics(otlp_protocol)

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> tuple[Config, list[str]]:
        """
        Read a mapping of variables.

        Returns:
            The configuration, and one sentence for each malformed value, for which the default was taken.

        """
        values, complaints = {}, []
        for setting in fields(cls):
            for variable in setting.metadata["variables"]:
                # OpenTelemetry: an empty value is the same as an unset variable.
                text = environ.get(variable, "")
                if not text.strip():
                    continue
                try:
                    values[setting.name] = setting.metadata["parse"](text)
                except parse.PartlyError as error:
                    values[setting.name] = error.value
                    complaints.append(f"{variable}: expected {error}; the others are used.")
                except ValueError as error:
                    shown = setting.metadata["shown"]
                    complaints.append(f"ignoring {variable}={shown_text(text)}: expected {error}; using {shown}.")
                break
        # A variable of spans and metrics alike is read for both, and complained of once.
        return cls(**values), list(dict.fromkeys(complaints))

    def changed(self, **keywords: Any) -> Config:
        """
        Return a copy with some fields replaced, each checked as its variable would be.

        Raises:
            TypeError: for a name that is not a setting.
            ValueError: for a value out of range.

        """
        known = {setting.name: setting for setting in fields(self)}
        for name, value in keywords.items():
            if name not in known:
                raise TypeError(f"`{name}` is not a setting of gpuscope; the settings are {', '.join(sorted(known))}.")
            if isinstance(value, str | bool | int | float) and name not in _GIVEN_IN_SECONDS:
                text = str(value)
                try:
                    keywords[name] = known[name].metadata["parse"](text)
                except ValueError as error:
                    partly = isinstance(error, parse.PartlyError)
                    raise ValueError(f"`{name}`{'' if partly else f' is {value!r}'}: expected {error}.") from None
        return replace(self, **keywords)

    @property
    def traces_url(self) -> str:
        """The URL that spans are posted to."""
        return self.otlp_endpoint or self.otlp_base_endpoint.rstrip("/") + "/v1/traces"

    @property
    def metrics_url(self) -> str:
        """The URL that metrics are posted to."""
        return self.otlp_metrics_endpoint or self.otlp_base_endpoint.rstrip("/") + "/v1/metrics"

    @property
    def only_spans_have_an_endpoint(self) -> bool:
        """Whether somebody said where spans go, and nobody where metrics do."""
        general = type(self)().otlp_base_endpoint
        return bool(self.otlp_endpoint) and not self.otlp_metrics_endpoint and self.otlp_base_endpoint == general


def read_environment() -> tuple[Config, list[str]]:
    """Return the settings of this process's environment as it is now, and what is to be said of them."""
    return Config.from_env(variables())
