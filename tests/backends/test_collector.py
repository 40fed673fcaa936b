"""The OpenTelemetry Collector with the configurations of `integrations/`, as they are but for ports and waits."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.error
import urllib.request
from collections import Counter
from contextlib import ExitStack

import pytest

from ..exporters.receiver_of_grpc import GrpcReceiver
from ..spans_of_files import wait_for
from .servers import FILES, Collector, Jaeger, answers, needed, yaml

CONFIG = FILES / "otel-collector/config.yaml"
MANIFEST = FILES / "kubernetes/collector.yaml"
SENDING = """
import json, sys, time
import gpuscope
from gpuscope import _runtime, stage
from gpuscope.testing import FakeDevice, ManualClock

clock = ManualClock()
before_ns = time.time_ns() - 1_200_000_000_000
device = FakeDevice(clock, completes=True)

def recording():
    config = _runtime.state.config.changed(gpu_spans="all", warmup=0)
    parts = {"device": device, "clock": clock, "epoch_clock": lambda: before_ns + clock.now_ns}
    return _runtime.period(config, **parts)

def request(host_ms, gpu_ms=0, fails=False):
    # `gpu_ms`: when the GPU is done, from the request's start. Requests do not overlap.
    clock.advance(1)
    device.delay_ns, carrier = 0, {}
    try:
        with stage("request"):
            gpuscope.inject(carrier)
            with stage("infer"):
                clock.advance(host_ms / 1e3)
                device.delay_ns = max(0, round((gpu_ms - host_ms) * 1e6))
                if fails:
                    raise ValueError("no such picture")
            device.delay_ns = 0
    except ValueError:
        pass
    return carrier["traceparent"]

def late(header):
    clock.advance(1)
    with gpuscope.extract({"traceparent": header}), stage("late"):
        clock.advance(0.001)
"""
"""What sends requests of known lengths; all of them were some minutes ago."""
THOUSAND = f"""{SENDING}
special = {{
    0: ("failed", 5, 5, True),
    1: ("slow", 251),
    2: ("slow on the GPU", 10, 251),
    3: ("nearly slow", 249),
    4: ("nearly slow on the GPU", 10, 249),
}}
sent = {{}}
with recording() as engine:
    for number in range(1000):
        kind, *times = special.get(number % 50, ("ordinary", number % 19 + 1, number % 90))
        sent[request(*times)] = kind
        if number % 8 == 7:
            engine.flush(60, send=False)
    assert gpuscope.flush(60), gpuscope.statistics()
print(json.dumps(sent))
"""
SOME = """
with recording():
    answer = {}
    assert gpuscope.flush(60), gpuscope.statistics()
print(json.dumps(answer))
"""


def trace_of(header):
    """The trace id in a `traceparent`."""
    return header.split("-")[1]


class Stored:
    """What came out of the Collector over gRPC. By trace id: names of spans, and the microseconds that each took."""

    def __init__(self, receiver):
        self.receiver, self.grpc = receiver, receiver.port

    def traces(self, service):
        """Those of one service."""
        found = {}
        for request in list(self.receiver.requests):
            for group in request.resource_spans:
                if any(each.value.string_value == service for each in group.resource.attributes):
                    for span in (span for scope in group.scope_spans for span in scope.spans):
                        length = (span.end_time_unix_nano - span.start_time_unix_nano) // 1000
                        found.setdefault(span.trace_id.hex(), []).append((span.name, length))
        return found


class Shown:
    """What Jaeger answers, in the same form."""

    def __init__(self, jaeger):
        self.jaeger, self.grpc = jaeger, jaeger.grpc

    def traces(self, service):
        """Those of one service."""
        traces = self.jaeger.traces(service).items()
        return {name: [(span["operationName"], span["duration"]) for span in spans] for name, spans in traces}


@pytest.fixture(scope="module", params=["receiver", "jaeger"])
def storage(request, tmp_path_factory):
    """Where the Collector sends what it keeps."""
    with ExitStack() as stack:
        if request.param == "jaeger":
            yield Shown(stack.enter_context(Jaeger(tmp_path_factory.mktemp("jaeger"))))
        else:
            receiver = GrpcReceiver()
            stack.callback(receiver.close)
            yield Stored(receiver)


@pytest.fixture(scope="module")
def collector(storage, tmp_path_factory):
    """The shipped configuration, with less of a wait for decisions."""
    to = f"exporters::otlp_grpc/jaeger::endpoint: 127.0.0.1:{storage.grpc}"
    wait = "processors::tail_sampling::decision_wait: 2s"
    with Collector(CONFIG, tmp_path_factory.mktemp("collector"), to, wait) as started:
        yield started


@pytest.fixture
def send(run_python):
    """Return a function that runs a program whose spans and metrics go there, and returns what it printed."""

    def run(program, endpoint, service, *arguments, **variables):
        ours = {"GPUSCOPE": "1", "OTEL_SERVICE_NAME": service, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
        done = run_python(program, *arguments, **{**ours, **variables})
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def from_manifest(kind, name):
    """A resource of the manifest."""
    resources = yaml.safe_load_all(MANIFEST.read_text())
    return next(each for each in resources if (each["kind"], each["metadata"]["name"]) == (kind, name))


def agent_config(folder):
    """The agent's configuration, as a file."""
    path = folder / "agent.yaml"
    path.write_text(from_manifest("ConfigMap", "collector-agent")["data"]["config.yaml"])
    return path


@pytest.mark.parametrize("which", ["collector", "gateway", "agent"])
def test_the_collector_accepts_what_is_shipped(which, tmp_path):
    """No key that it does not know, no value that it refuses, in files and in the manifest's arguments."""
    gateway = from_manifest("Deployment", "collector-gateway")["spec"]["template"]["spec"]["containers"][0]["args"]
    arguments = {
        "collector": [f"--config={CONFIG}"],
        "gateway": [argument.replace("/etc/otelcol/config.yaml", str(CONFIG)) for argument in gateway],
        "agent": [f"--config={agent_config(tmp_path)}"],
    }[which]
    done = subprocess.run([needed("otelcol"), "validate", *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def warnings_in(log):
    """What a Collector said of its configuration that is no mere information; connections aside."""
    return [line for line in log.splitlines() if re.search(r"\t(warn|error)\t(?!grpc)", line)]


class TestSampling:
    """Which traces are kept."""

    @staticmethod
    def decided(collector, kept):
        """How many traces have been kept, or left out."""
        name = "otelcol_processor_tail_sampling_global_count_traces_sampled"
        return collector.count(name, sampled=str(kept).lower())

    def test_the_slow_and_the_failed_are_kept(self, collector, storage, send):
        """Of 1,000 requests: all that failed, all whose host or GPU took too long, and of the others about 1 in 20."""
        assert warnings_in(collector.output()) == []
        before = {kept: self.decided(collector, kept) for kept in (True, False)}
        sent = send(THOUSAND, collector.endpoint, "thousand")
        kinds = {trace_of(header): kind for header, kind in sent.items()}
        surely = {name for name, kind in kinds.items() if kind.startswith("slow") or kind == "failed"}
        assert (len(kinds), len(surely)) == (1000, 60)
        wait_for(lambda: sum(self.decided(collector, kept) - before[kept] for kept in before) == 1000)
        count = self.decided(collector, kept=True) - before[True]

        def whole():
            traces = storage.traces("thousand")
            return len(traces) == count and {len(spans) for spans in traces.values()} == {4} and traces

        found = wait_for(whole)
        assert surely <= set(found)
        by_chance = Counter(kinds[name] for name in set(found) - surely)
        # 47 of 940; farther away than five standard deviations is no chance.
        assert 13 < sum(by_chance.values()) < 82, by_chance
        for name, spans in found.items():
            lengths = dict(spans)
            assert set(lengths) == {"request", "request [gpu]", "infer", "infer [gpu]"}
            host_us, gpu_us = {"slow on the GPU": (10_000, 251_000), "slow": (251_000, 251_000)}.get(
                kinds[name], (lengths["infer"], lengths["infer [gpu]"])
            )
            assert (lengths["infer"], lengths["infer [gpu]"]) == pytest.approx((host_us, gpu_us), abs=1)

    def test_late_spans_go_where_their_trace_went(self, collector, storage, send):
        """A span that comes after the decision is kept if its trace was, and left out if not."""
        # The last of each is kept for sure, so the others have been decided when it is there.
        program = SENDING + SOME.format("[*(request(3) for _ in range(40)), request(300)]")
        early = send(program, collector.endpoint, "late")
        wait_for(lambda: len(storage.traces("late").get(trace_of(early[-1]), ())) == 4)
        chosen = set(storage.traces("late"))
        assert len(chosen) < len(early)
        program = SENDING + SOME.format("[*(late(each) for each in sys.argv[1:]), request(300)]")
        last = send(program, collector.endpoint, "late", *early)[-1]
        wait_for(lambda: len(storage.traces("late").get(trace_of(last), ())) == 4)
        found = storage.traces("late")
        assert {name for name, spans in found.items() if "late" in dict(spans)} == chosen
        assert set(found) == {*chosen, trace_of(last)}


class TestShortOfMemory:
    """The memory limiter refuses."""

    @pytest.fixture
    def full(self, tmp_path):
        """A Collector that may have less memory than it needs for itself."""
        with Collector(CONFIG, tmp_path, "processors::memory_limiter::limit_mib: 2") as started:
            yield started

    def test_it_says_so_and_the_program_goes_on(self, full, send):
        """The answer is 503, as the configuration says; the program ends as always, and knows what was lost."""
        wait_for(lambda: status_of_a_span(full.endpoint) == 503)
        program = SENDING + "\nwith recording() as engine:\n    request(3)\nprint(json.dumps(engine.statistics().lost))"
        lost = send(program, full.endpoint, "full", GPUSCOPE_SHUTDOWN_TIMEOUT="2")
        assert sum(lost.values()) == 2


def status_of_a_span(endpoint):
    """The status of the answer to a request with one span."""
    body = {"resourceSpans": [{"scopeSpans": [{"spans": [{"name": "a", "traceId": "1" * 32, "spanId": "2" * 16}]}]}]}
    request = urllib.request.Request(
        f"{endpoint}/v1/traces", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


class TestAgents:
    """Those on the nodes of a cluster, before two gateways."""

    @pytest.fixture
    def gateways(self):
        """Where agents send traces."""
        started = [GrpcReceiver(), GrpcReceiver()]
        yield [Stored(each) for each in started]
        for each in started:
            each.close()

    @pytest.fixture
    def agents(self, gateways, tmp_path):
        """Two of them; the gateways are named, because there is no DNS of a cluster."""
        hosts = ", ".join(f'"127.0.0.1:{gateway.grpc}"' for gateway in gateways)
        resolver = (
            "exporters::load_balancing::resolver::dns: null",
            f"exporters::load_balancing::resolver::static: {{hostnames: [{hosts}]}}",
        )
        with ExitStack() as stack:
            config = agent_config(tmp_path)
            yield [stack.enter_context(Collector(config, tmp_path, *resolver)) for _ in range(2)]

    def test_all_spans_of_a_trace_go_to_one_gateway(self, agents, gateways, send):
        """Those of two processes on two nodes, too; and each gateway has its share."""
        assert all(answers(f"http://127.0.0.1:{agent.health}/") for agent in agents)
        assert [warnings_in(agent.output()) for agent in agents] == [[], []]
        first = send(SENDING + SOME.format("[request(3) for _ in range(60)]"), agents[0].endpoint, "node")
        program = SENDING + SOME.format("[late(each) for each in sys.argv[1:]]")
        send(program, agents[1].endpoint, "node", *first)

        def parts():
            found = [gateway.traces("node") for gateway in gateways]
            return sum(map(len, (spans for each in found for spans in each.values()))) == 60 * 6 and found

        one, other = wait_for(parts)
        assert not set(one) & set(other)
        assert set(one) | set(other) == set(map(trace_of, first))
        assert min(len(one), len(other)) > 10
        assert {len(spans) for spans in [*one.values(), *other.values()]} == {6}
