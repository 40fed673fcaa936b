"""
Every setting: turns the environment and keyword arguments into one frozen `Config`.

Pure but for `read_environment`: `Config.from_env` takes a mapping and returns what to warn about.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from gpuscope._settings import parsers as parse
from gpuscope._settings.environment import variables
from gpuscope._settings.fields import for_metrics, of_traces, read_all, setting
from gpuscope._settings.flight import FLIGHT, FLIGHT_BYTES, FLIGHT_SLOW, KEEP, NVML, PROFILE_EVERY, STALL, TRACE_HEADER
from gpuscope._settings.host import HostSettings
from gpuscope._settings.keywords import checked
from gpuscope._settings.urls import NO_SCHEME, USUAL_ENDPOINT, signal_url, without_a_scheme

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpuscope._settings.complaints import Complaint


@dataclass(frozen=True, kw_only=True)
class Config(HostSettings):
    """
    All settings. Variables of OpenTelemetry keep their names and meanings; ours begin with `GPUSCOPE`.

    The keyword arguments of `gpuscope.enable` are the fields of this class. Names of quantities end in their unit.
    """

    mode: str = setting(
        "absent",
        "GPUSCOPE",
        parse.mode,
        "`1` records; `idle`, as in a notebook, leaves that to `gpuscope.enable()`; `0` or unset: functions stay bare.",
        "0",
    )
    startup: bool = setting(
        True, "GPUSCOPE_STARTUP", parse.boolean, "`0`: Python's start makes no stages; `import gpuscope` does.", "1"
    )
    quiet: bool = setting(
        False, "GPUSCOPE_QUIET", parse.boolean, "`1`: on a terminal, no line at the start and no table at the end.", "0"
    )
    exporters: tuple[str, ...] = setting(
        ("auto",),
        "GPUSCOPE_EXPORTER",
        parse.exporters,
        "Where spans go: `otlp`, `sdk` (the application's TracerProvider), `file`, several with commas, or `none`. "
        "`auto` is `otlp` or, where the application configured a TracerProvider, its own exporter, else `sdk`.",
        "auto",
    )
    file: str = setting(
        "gpuscope-{pid}.jsonl", "GPUSCOPE_FILE", parse.path, "Path of the `file` exporter; `{pid}` is the process id."
    )
    file_max_bytes: int = setting(
        67_108_864, "GPUSCOPE_FILE_MAX_BYTES", parse.size(4096, 2**40), "Size at which it is rotated to `PATH.1`."
    )
    file_backups: int = setting(
        3, "GPUSCOPE_FILE_BACKUPS", parse.count(0, 1000), "How many rotated files are kept beside the current one."
    )
    nvtx: bool = setting(
        True, "GPUSCOPE_NVTX", parse.boolean, "NVTX ranges in the domain `gpuscope`, for Nsight tools.", "1"
    )
    warmup: int = setting(
        3, "GPUSCOPE_WARMUP", parse.count(0, 1_000_000), "How many first calls of each stage are flagged as warm-up."
    )
    graph_stages: str = setting(
        "beside",
        "GPUSCOPE_GRAPH_STAGES",
        parse.graph_stages,
        "`1` times stages inside CUDA graphs, by nodes beside those of the program; `inline` puts them among those; "
        "`0` does not time them.",
        "1",
    )
    gpu_spans: str = setting(
        "work", "GPUSCOPE_GPU_SPANS", parse.one_of("work", "all"), "`all`: GPU spans also of stages without GPU work."
    )
    sample_hz: float = setting(
        200.0,
        "GPUSCOPE_SAMPLE_HZ",
        parse.between(0.0, 5000.0),
        "How often a second a thread of C asks the streams of stages whether they have work; `0` for never.",
    )
    nvml: bool = NVML
    batch_spans: str = setting(
        "all",
        "GPUSCOPE_BATCH_SPANS",
        parse.one_of("all", "links"),
        "`links`: a batch links to its members' spans, and adds none to their traces.",
    )
    strict: bool = setting(
        False, "GPUSCOPE_STRICT", parse.boolean, "`1`: faults in the members of batches are raised, as in tests.", "0"
    )
    profile: str = setting(
        "",
        "GPUSCOPE_PROFILE",
        parse.profile,
        "Deep looks on demand: `signal` (send SIGUSR2 to the process for one) or a path (create that file for one).",
        "unset",
    )
    profile_every_s: float = PROFILE_EVERY
    flight: str = FLIGHT
    flight_bytes: int = FLIGHT_BYTES
    flight_slow_s: float = FLIGHT_SLOW
    stall: str = STALL
    keep: str = KEEP
    trace_header: str = TRACE_HEADER
    stages: str = setting(
        "", "GPUSCOPE_STAGES", str.strip, "Functions to make stages of, by commas: `infer=app:f{n=len(x)}`.", "none"
    )
    frameworks: str = setting(
        "", "GPUSCOPE_FRAMEWORKS", str.strip, "Frameworks whose functions become stages, by commas, or `all`.", "none"
    )
    stages_file: str = setting(
        "", "GPUSCOPE_STAGES_FILE", str.strip, "A TOML file that names stages and frameworks.", "none"
    )
    queue_size: int = setting(
        8192,
        "GPUSCOPE_QUEUE_SIZE",
        parse.count(16, 1_000_000),
        "How many stages may wait for the collector, and as many for their GPU events; the newest are dropped.",
    )
    queue_bytes: int = setting(
        16_777_216,
        "GPUSCOPE_QUEUE_BYTES",
        parse.size(65_536, 2**40),
        "How many bytes of large attributes may wait, and twice as many encoded; stages beyond that are dropped.",
    )
    interval_s: float = setting(
        1.0, "GPUSCOPE_INTERVAL", parse.between(0.001, 60.0, "seconds"), "Seconds between the collector's passes."
    )
    event_deadline_s: float = setting(
        60.0,
        "GPUSCOPE_EVENT_DEADLINE",
        parse.between(0.01, 86_400.0, "seconds"),
        "Seconds after which a stage whose GPU work has not ended is exported with host times only.",
    )
    shutdown_timeout_s: float = setting(
        5.0, "GPUSCOPE_SHUTDOWN_TIMEOUT", parse.between(0.0, 3600.0, "seconds"), "Seconds that the exit may wait."
    )
    metrics: str = setting(
        "auto",
        "GPUSCOPE_METRICS",
        parse.one_of("auto", "otlp", "sdk", "none"),
        "Where metrics go: `otlp`, `sdk` (the application's MeterProvider) or `none`. `auto` is `sdk` where the "
        "application configured a MeterProvider; else `otlp` where spans go there, unless only spans were given an "
        "endpoint; else `none`.",
    )
    metrics_interval_s: float = setting(
        60.0,
        "OTEL_METRIC_EXPORT_INTERVAL",
        parse.milliseconds(1.0),
        "Milliseconds between two exports of metrics; the GPUs' ratios are those of this interval.",
        "60000",
        keyword=parse.between(0.001, 86_400.0, "seconds"),
    )
    metrics_exporter: str = setting(
        "", "OTEL_METRICS_EXPORTER", str, "With `none`, `auto` exports no metrics. Others are the SDK's.", "unset"
    )
    sdk_disabled: bool = setting(
        False, "OTEL_SDK_DISABLED", parse.otel_boolean, "With `true`, nothing goes to `otlp` or `sdk`.", "false"
    )
    traces_exporter: str = setting(
        "", "OTEL_TRACES_EXPORTER", str, "With `none`, `auto` exports nothing. Others are for the SDK only.", "unset"
    )
    sampler: str = setting(
        "parentbased_always_on",
        "OTEL_TRACES_SAMPLER",
        parse.sampler,
        "Which traces are exported where no TracerProvider samples: one of six names, or that of an installed sampler.",
    )
    sampler_ratio: float = setting(
        1.0,
        "OTEL_TRACES_SAMPLER_ARG",
        parse.between(0.0, 1.0),
        "Share of traces that the `traceidratio` samplers export, from 0 to 1. Installed samplers get the text.",
    )
    schedule_delay_s: float = setting(
        5.0,
        "OTEL_BSP_SCHEDULE_DELAY",
        parse.milliseconds(0.0),
        "Milliseconds between two requests of `otlp`.",
        "5000",
        keyword=parse.between(0.0, 86_400.0, "seconds"),
    )
    otlp_endpoint: str = setting(
        "", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", parse.endpoint_or_none, "Full URL for spans, used as it is.", "unset"
    )
    otlp_base_endpoint: str = setting(
        USUAL_ENDPOINT,
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        parse.endpoint,
        "Base URL; `/v1/traces` or `/v1/metrics` is added.",
    )
    otlp_headers: dict[str, str] = setting(
        {}, of_traces("HEADERS"), parse.headers, "Headers of each request, as `name=value` separated by commas.", "none"
    )
    otlp_timeout_s: float = setting(
        10.0, of_traces("TIMEOUT"), parse.between(0.001, 3600.0, "seconds"), "Seconds for a request and retries.", "10"
    )
    otlp_compression: str = setting(
        "none",
        of_traces("COMPRESSION"),
        parse.one_of("none", "gzip", "deflate"),
        "`gzip`, `deflate` (not over gRPC) or `none`.",
    )
    otlp_certificate: str = setting(
        "",
        of_traces("CERTIFICATE"),
        str,
        "File with the certificates against which the endpoint is checked.",
        "the system's",
    )
    otlp_client_certificate: str = setting(
        "", of_traces("CLIENT_CERTIFICATE"), str, "File with the client's certificate, for mutual TLS.", "none"
    )
    otlp_client_key: str = setting("", of_traces("CLIENT_KEY"), str, "File with the client's private key.", "none")
    otlp_protocol: str = setting(
        "http/protobuf",
        of_traces("PROTOCOL"),
        parse.one_of("http/protobuf", "grpc"),
        "`http/protobuf`, by default on port 4318, or `grpc`, on port 4317; that needs `gpuscope[grpc]`.",
    )
    otlp_insecure: bool = setting(
        False,
        of_traces("INSECURE"),
        parse.otel_boolean,
        "With `true`, gRPC to an endpoint without http:// or https://, `collector:4317` say, goes without TLS.",
        "false",
    )
    config_file: str = setting("", "OTEL_CONFIG_FILE", str, "OpenTelemetry's SDK reads it; `otlp` does not.", "unset")
    otlp_metrics_endpoint: str = setting(
        "",
        "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
        parse.endpoint_or_none,
        "Full URL for metrics, used as it is.",
        "unset",
    )
    otlp_metrics_headers: dict[str, str] = for_metrics(otlp_headers)
    otlp_metrics_timeout_s: float = for_metrics(otlp_timeout_s)
    otlp_metrics_compression: str = for_metrics(otlp_compression)
    otlp_metrics_certificate: str = for_metrics(otlp_certificate)
    otlp_metrics_client_certificate: str = for_metrics(otlp_client_certificate)
    otlp_metrics_client_key: str = for_metrics(otlp_client_key)
    otlp_metrics_protocol: str = for_metrics(otlp_protocol)
    otlp_metrics_insecure: bool = for_metrics(otlp_insecure)

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> tuple[Config, list[Complaint]]:
        """
        Read a mapping of variables.

        Returns:
            The configuration, and one sentence for each malformed value, where the default was taken, and for each
            variable that looks like ours and is not.

        """
        values, complaints = read_all(fields(cls), environ)
        return cls(**values), complaints

    def changed(self, **keywords: object) -> Config:
        """
        Return a copy with some fields replaced, each checked as its variable would be.

        Raises:
            TypeError: for a name that is not a setting.
            ValueError: for a value that is not allowed.

        """
        values = checked(fields(self), keywords)
        config = replace(self, **values)  # type: ignore[arg-type]  # The parsers have checked them.
        for name in without_a_scheme(lambda each: getattr(config, each)):
            raise ValueError(f"`{name}`: expected {parse.A_URL.format(NO_SCHEME)}.")
        return config

    @property
    def traces_url(self) -> str:
        """The URL that spans are posted to; gRPC's has no path."""
        own, base = self.otlp_endpoint, self.otlp_base_endpoint
        return signal_url(own, base, "/v1/traces", protocol=self.otlp_protocol, insecure=self.otlp_insecure)

    @property
    def metrics_url(self) -> str:
        """The URL that metrics are posted to."""
        own, base = self.otlp_metrics_endpoint, self.otlp_base_endpoint
        protocol, insecure = self.otlp_metrics_protocol, self.otlp_metrics_insecure
        return signal_url(own, base, "/v1/metrics", protocol=protocol, insecure=insecure)

    @property
    def only_spans_have_an_endpoint(self) -> bool:
        """Whether an endpoint was given for spans only, so that nobody said where metrics go."""
        return bool(self.otlp_endpoint) and not self.otlp_metrics_endpoint and self.otlp_base_endpoint == USUAL_ENDPOINT


def read_environment() -> tuple[Config, list[Complaint]]:
    """Return the settings of this process's environment as it is now, and what to warn about."""
    return Config.from_env(variables())
