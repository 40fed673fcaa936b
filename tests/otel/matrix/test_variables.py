"""OpenTelemetry's variables where gpuscope sends by itself, and beside a provider, for which most are not meant."""

from __future__ import annotations

import json

import pytest

from gpuscope._settings.config import Config

from .conftest import NAME
from .test_by_hand import BY_HAND, HTTP
from .whole import assert_nothing_lost, assert_whole

SAMPLER = '''
"""A sampler as somebody else's package has it."""
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult


class Sparing(Sampler):
    def __init__(self, name):
        self.name = name

    def should_sample(self, parent_context, trace_id, name, kind=None, attributes=None, links=None, trace_state=None):
        keep = name != self.name and attributes.get("batch_size") != 0
        return SamplingResult(Decision.RECORD_AND_SAMPLE if keep else Decision.DROP)

    def get_description(self):
        return "sparing"


def broken(argument):
    raise RuntimeError("no network")
'''
ENTRY_POINTS = "[opentelemetry_traces_sampler]\nsparing = somebody:Sparing\nBroken = somebody:broken\n"
TRACES = """
import gpuscope

for name in ("wanted", "unwanted"):
    with gpuscope.stage(name), gpuscope.stage("inside " + name):
        pass
with gpuscope.stage("empty", attributes={"batch_size": 0}):
    pass
gpuscope.flush(20)
account = gpuscope.statistics()
print(json.dumps([account.exporters, account.recorded, account.lost, account.dropped]))
gpuscope.shutdown()
for level, text in heard:
    if level != "INFO":
        print(text, file=sys.stderr)
raise SystemExit
"""
ALL = ["empty", "inside unwanted", "inside wanted", "unwanted", "wanted"]
FILE = "`otlp` does not read OTEL_CONFIG_FILE"


@pytest.fixture
def somebody(tmp_path):
    """Somebody's package is installed where the service lies."""
    (tmp_path / "somebody.py").write_text(SAMPLER)
    (tmp_path / "somebody-1.0.dist-info").mkdir()
    (tmp_path / "somebody-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: somebody\nVersion: 1.0\n"
    )
    (tmp_path / "somebody-1.0.dist-info" / "entry_points.txt").write_text(ENTRY_POINTS)


def names(receiver):
    """The names of all spans, in order."""
    return sorted(span.name for span in receiver.spans)


def to(receiver, **variables):
    """Variables by which gpuscope sends to the receiver."""
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, **variables}


@pytest.mark.usefixtures("somebody")
def test_a_sampler_that_is_installed_decides(play, http):
    """As with the SDK: it is made of the argument's text, sees names and attributes, and keeps traces whole."""
    how = {"OTEL_TRACES_SAMPLER": "sparing", "OTEL_TRACES_SAMPLER_ARG": "unwanted"}
    assert json.loads(play(TRACES, **to(http, **how))) == [["otlp"], 5, {}, {"unsampled": 3}]
    assert names(http) == ["inside wanted", "wanted"]


@pytest.mark.usefixtures("somebody")
def test_a_sampler_that_cannot_be_made_is_said_once(play, http):
    """By its name and the kind of the error, and everything is kept, as the SDK does."""
    said = play(TRACES, complains=True, **to(http, OTEL_TRACES_SAMPLER="Broken")).splitlines()
    (line,) = [line for line in said if "sampler" in line.lower()]
    assert line == (
        "the sampler 'Broken' of OTEL_TRACES_SAMPLER cannot be used (RuntimeError('no network')); "
        "using parentbased_always_on. Further warnings of this kind are suppressed."
    )
    assert names(http) == ALL


def test_a_sampler_that_is_not_installed_is_said_once(play, http):
    """With what is allowed, and what is done instead."""
    said = play(TRACES, complains=True, **to(http, OTEL_TRACES_SAMPLER="xray")).splitlines()
    (line,) = [line for line in said if "OTEL_TRACES_SAMPLER" in line]
    assert "or a sampler that is installed; using the default, parentbased_always_on" in line
    assert names(http) == ALL


def test_beside_a_provider_nothing_is_said_of_what_is_not_used(told, http):
    """The provider samples and sends; what its variables mean is between it and the user."""
    provider = """
from opentelemetry.exporter.otlp.proto.http import Compression
exporter = OTLPSpanExporter(urls[0], compression=Compression.NoCompression, timeout=10)
provider.add_span_processor(BatchSpanProcessor(exporter))
"""
    unused = {
        "OTEL_TRACES_SAMPLER": "xray",
        "OTEL_TRACES_SAMPLER_ARG": "endpoint=http://127.0.0.1:2000",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json",
        "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION": "zstd",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4317",
        "OTEL_CONFIG_FILE": "otel.yaml",
    }
    by_hand = BY_HAND.replace("TracerProvider(", "TracerProvider(sampler=ALWAYS_ON, ")
    account = told(
        "from opentelemetry.sdk.trace.sampling import ALWAYS_ON" + by_hand + HTTP + provider, http.url, **unused
    )
    assert_nothing_lost(account, way="application", said=http.url)
    assert_whole(http, service=NAME)


def test_what_is_used_is_still_said_once(play, http):
    """Where gpuscope sends by itself."""
    how = {"OTEL_EXPORTER_OTLP_COMPRESSION": "zstd", "OTEL_TRACES_SAMPLER_ARG": "not used by this sampler"}
    said = play(TRACES, complains=True, **to(http, **how)).splitlines()
    assert [line.partition(":")[0] for line in said if "OTEL_" in line] == [
        "ignoring OTEL_EXPORTER_OTLP_COMPRESSION (a text of 4 characters)"
    ]
    assert names(http) == ALL


def test_what_a_keyword_overrules_is_not_said(play, http):
    """The program has a value of its own."""
    program = "import gpuscope; gpuscope.enable(otlp_compression='gzip')\n" + TRACES
    how = {"OTEL_EXPORTER_OTLP_TRACES_COMPRESSION": "zstd", "GPUSCOPE": "idle"}
    assert json.loads(play(program, **to(http, **how)))[0] == ["otlp"]
    assert http.requests[0].headers["content-encoding"] == "gzip"


def test_a_configuration_file_is_said_not_to_be_read(play, http):
    """Once, with what to do to have it."""
    said = play(TRACES, complains=True, **to(http, OTEL_CONFIG_FILE="otel.yaml"))
    assert said.count(FILE) == 1
    assert "run the program under `opentelemetry-instrument` with GPUSCOPE_EXPORTER=auto" in said
    assert names(http) == ALL


def test_the_doctor_says_so_too(play, http):
    """As one of the settings' findings."""
    command = ("-m", "gpuscope", "doctor", "--json")
    printed = play("", complains=True, command=command, status=1, **to(http, OTEL_CONFIG_FILE="otel.yaml"))
    (found,) = [finding for finding in json.loads(printed)["findings"] if FILE in finding["seen"]]
    assert (found["subject"], found["advice"]) == ("settings", "")


def test_grpc_to_a_host_and_a_port(play, grpc):
    """Without a scheme and without TLS, as OpenTelemetry's variables have it."""
    how = {
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"127.0.0.1:{grpc.port}",
        "OTEL_EXPORTER_OTLP_INSECURE": "true",
    }
    assert json.loads(play(TRACES, **how))[:3] == [["otlp"], 5, {}]
    assert sorted(grpc.names) == ALL


@pytest.mark.parametrize(
    ("variables", "traces", "metrics"),
    [
        ({}, "https://c:4317", "https://c:4317"),
        ({"OTEL_EXPORTER_OTLP_INSECURE": "true"}, "http://c:4317", "http://c:4317"),
        ({"OTEL_EXPORTER_OTLP_TRACES_INSECURE": "true"}, "http://c:4317", "https://c:4317"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "[::1]:4317"}, "https://[::1]:4317", "https://c:4317"),
    ],
)
def test_an_endpoint_of_grpc_without_a_scheme_has_tls_unless_told_otherwise(variables, traces, metrics):
    """It is the rule of OpenTelemetry's specification, and what its SDK does."""
    base = {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_ENDPOINT": "c:4317"}
    config, complaints = Config.from_env(base | variables)
    assert (config.traces_url, config.metrics_url, complaints) == (traces, metrics, [])


def test_an_endpoint_of_http_needs_a_scheme():
    """As with the SDK."""
    config, (complaint,) = Config.from_env({"OTEL_EXPORTER_OTLP_ENDPOINT": "c:4318"})
    assert config.traces_url == "http://localhost:4318/v1/traces"
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" in complaint
    assert "does not begin with http:// or https://" in complaint
    with pytest.raises(ValueError, match=r"`otlp_endpoint`.* does not begin with http:// or https://"):
        Config().changed(otlp_endpoint="c:4318")
    assert Config().changed(otlp_endpoint="c:4317", otlp_protocol="grpc").traces_url == "https://c:4317"
