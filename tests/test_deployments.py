"""The files of `integrations/` for collectors, storage and Kubernetes, and the page on fleets."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gpuscope._settings.config import Config

from .exporters.receiver import Receiver

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
FILES = ROOT / "integrations"
COLLECTOR, AGENT = "otel-collector/config.yaml", "kubernetes/collector.yaml"
COMPOSED = ("otel-collector/compose.yaml", "jaeger/compose.yaml")
MANIFESTS = ("kubernetes/collector.yaml", "kubernetes/inference.yaml")


def load(name):
    """A file of one document."""
    return yaml.safe_load((FILES / name).read_text())


def manifests(name):
    """A file's resources, by kind and name."""
    resources = yaml.safe_load_all((FILES / name).read_text())
    return {(resource["kind"], resource["metadata"]["name"]): resource for resource in resources}


def collector_config(name):
    """A collector's configuration: a file, or what a ConfigMap holds."""
    if name == COLLECTOR:
        return load(name)
    return yaml.safe_load(manifests(name)["ConfigMap", "collector-agent"]["data"]["config.yaml"])


def container_of(workload):
    """The only container of a Deployment or DaemonSet."""
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    return container


def port_of(endpoint):
    """The port at the end of an address."""
    return int(endpoint.rpartition(":")[2])


def seconds(text):
    """A duration of seconds."""
    return float(re.fullmatch(r"([\d.]+)s", text).group(1))


@pytest.mark.parametrize("name", [COLLECTOR, *COMPOSED, *MANIFESTS, "otel-collector/prometheus.yml"])
def test_yaml_reads_as_it_looks(name):
    """No key twice, no text that YAML takes for something else, no indentation that misleads."""
    linter, settings = pytest.importorskip("yamllint.linter"), pytest.importorskip("yamllint.config")
    rules = {"document-start": "disable", "line-length": "disable", "comments": {"min-spaces-from-content": 1}}
    config = settings.YamlLintConfig(json.dumps({"extends": "default", "rules": rules}))
    assert not [str(problem) for problem in linter.run((FILES / name).read_text(), config)]


class TestCollector:
    """The OpenTelemetry Collector's configurations."""

    @pytest.mark.parametrize("name", [COLLECTOR, AGENT])
    def test_every_component_is_declared_and_used(self, name):
        """What pipelines name is declared, and what is declared is in a pipeline."""
        config = collector_config(name)
        pipelines = config["service"]["pipelines"].values()
        for kind in ("receivers", "processors", "exporters"):
            assert set(config[kind]) == {component for pipeline in pipelines for component in pipeline[kind]}
        assert sorted(config.get("extensions", {})) == sorted(config["service"].get("extensions", []))

    @pytest.mark.parametrize("name", [COLLECTOR, AGENT])
    def test_pipelines_limit_memory_first_and_batch_last(self, name):
        """What is too much is refused before it costs anything; traces are chosen before they are put into batches."""
        for pipeline in collector_config(name)["service"]["pipelines"].values():
            assert pipeline["processors"][0] == "memory_limiter"
            assert pipeline["processors"][-1] == "batch"

    @pytest.mark.parametrize("name", [COLLECTOR, AGENT])
    def test_it_listens_where_gpuscope_sends_by_default(self, name):
        """OTLP over HTTP is taken on the port of the default endpoint, from other hosts too."""
        http = collector_config(name)["receivers"]["otlp"]["protocols"]["http"]["endpoint"]
        assert http == f"0.0.0.0:{port_of(Config().otlp_base_endpoint)}"

    def test_slow_and_failed_requests_are_kept_whole(self):
        """Errors, slow requests and a share of the rest; the wait is longer than the spans of a request are apart."""
        sampling = load(COLLECTOR)["processors"]["tail_sampling"]
        policies = {policy["type"]: policy[policy["type"]] for policy in sampling["policies"]}
        assert set(policies) == {"status_code", "latency", "probabilistic"}
        assert policies["status_code"] == {"status_codes": ["ERROR"]}
        assert 0 < policies["probabilistic"]["sampling_percentage"] < 100
        wait_s = seconds(sampling["decision_wait"])
        assert wait_s > 2 * Config().schedule_delay_s + policies["latency"]["threshold_ms"] / 1000
        assert sampling["num_traces"] > wait_s * sampling["expected_new_traces_per_sec"]


class TestCompose:
    """The compose files, and what their containers say to each other."""

    @pytest.mark.parametrize("name", COMPOSED)
    def test_the_specification_allows_it(self, name):
        """An implementation of the Compose Specification reads the file, and finds what it refers to."""
        compose = pytest.importorskip("compose_spec").PyCompose.from_yaml((FILES / name).read_text())
        compose.validate()
        assert set(compose.service_names()) == set(load(name)["services"])

    @pytest.mark.parametrize("name", COMPOSED)
    def test_ports_are_open_to_this_machine_only(self, name):
        """Nothing that has no password listens to the network."""
        ports = [port for service in load(name)["services"].values() for port in service["ports"]]
        assert ports
        assert all(port.startswith("127.0.0.1:") for port in ports)

    def test_mounted_files_are_there(self):
        """A missing file would be mounted as an empty folder."""
        for service in load("otel-collector/compose.yaml")["services"].values():
            for volume in service.get("volumes", ()):
                source, target, mode = volume.split(":")
                assert (FILES / "otel-collector" / source).is_file()
                assert mode == "ro"
                assert any(target in argument for argument in service["command"])

    def test_containers_find_each_other(self):
        """The collector's exporters and Prometheus' targets name services, and ports that are listened on."""
        services, config = load("otel-collector/compose.yaml")["services"], load(COLLECTOR)
        jaeger = config["exporters"]["otlp_grpc/jaeger"]["endpoint"]
        assert jaeger.partition(":")[0] in services
        (reader,) = config["service"]["telemetry"]["metrics"]["readers"]
        shown = {
            port_of(config["exporters"]["prometheus"]["endpoint"]),
            reader["pull"]["exporter"]["prometheus"]["port"],
        }
        jobs = load("otel-collector/prometheus.yml")["scrape_configs"]
        targets = [target for job in jobs for group in job["static_configs"] for target in group["targets"]]
        assert {target.partition(":")[0] for target in targets} <= set(services)
        assert {port_of(target) for target in targets} == shown
        published = {port_of(port) for port in services["collector"]["ports"]}
        assert published == {port_of(p["endpoint"]) for p in config["receivers"]["otlp"]["protocols"].values()}

    def test_prometheus_takes_its_configuration(self):
        """`promtool` finds no fault; the services' own `job` and `instance`, by which the dashboard selects, stay."""
        assert load("otel-collector/prometheus.yml")["scrape_configs"][0]["honor_labels"] is True
        promtool = shutil.which("promtool")
        if promtool is None:
            pytest.skip("needs promtool")
        command = [promtool, "check", "config", FILES / "otel-collector/prometheus.yml"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


POD = {
    "spec.nodeName": "gpu-node-17",
    "status.hostIP": "127.0.0.1",
    "metadata.namespace": "inference",
    "metadata.name": "detector-6f7c9d8b5-x2x4q",
    "metadata.uid": "0c6a9f0e-3a4c-4c6e-8f5d-2d8f0a6f7b11",
    "metadata.labels['app.kubernetes.io/name']": "detector",
}
"""What the downward API says of a pod."""
SERVER = """
from gpuscope import _runtime
from gpuscope.testing import FakeDevice, ManualClock
from app.vision import Detector

clock = ManualClock()
device = FakeDevice(clock, completes=True)
with _runtime.period(_runtime.state.config.changed(gpu_spans="all"), device=device, clock=clock):
    Detector().forward(Detector().pre_process("photograph"))
"""
DETECTOR = """
class Detector:
    def pre_process(self, image):
        return image

    def forward(self, image):
        return image
"""


def environment_of(container, pod):
    """The container's variables as the kubelet makes them: fields filled in, `$(NAME)` replaced by what came before."""
    variables = {}
    for entry in container["env"]:
        if "valueFrom" in entry:
            variables[entry["name"]] = pod[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        else:
            known = re.compile(r"\$\((\w+)\)")
            variables[entry["name"]] = known.sub(lambda match: variables[match.group(1)], entry["value"])
    return variables


class TestKubernetes:
    """The manifests."""

    @pytest.mark.parametrize("name", MANIFESTS)
    def test_the_schemas_allow_it(self, name):
        """Every resource is what Kubernetes' schemas say, with no key that they do not know."""
        validator = pytest.importorskip("kubernetes_validate")
        for resource in manifests(name).values():
            validator.validate(resource, validator.latest_version(), strict=True)

    def test_resources_fit_each_other(self):
        """Selectors select their pods; ConfigMaps exist or are made by the first lines; the agents' host exists."""
        resources = manifests(AGENT)
        made = {name for kind, name in resources if kind == "ConfigMap"} | {"collector-gateway"}
        for (kind, _), resource in resources.items():
            if kind in ("DaemonSet", "Deployment"):
                template = resource["spec"]["template"]
                assert resource["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
                assert {volume["configMap"]["name"] for volume in template["spec"]["volumes"]} <= made
        service = resources["Service", "collector-gateway"]
        gateway = resources["Deployment", "collector-gateway"]
        assert service["spec"]["selector"] == gateway["spec"]["template"]["metadata"]["labels"]
        host = collector_config(AGENT)["exporters"]["load_balancing"]["resolver"]["dns"]["hostname"]
        assert host.startswith(f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc")
        assert "kubectl -n observability create configmap collector-gateway" in (FILES / AGENT).read_text()

    def test_a_trace_goes_to_one_gateway(self):
        """Which chooses whole traces, so agents route by trace id to every gateway's own address."""
        assert collector_config(AGENT)["exporters"]["load_balancing"]["routing_key"] == "traceID"
        assert manifests(AGENT)["Service", "collector-gateway"]["spec"]["clusterIP"] == "None"

    def test_ports_that_are_listened_on_are_open(self):
        """The agent's container opens what its configuration listens on; pods send to the port of their node."""
        ports = {p["containerPort"]: p for p in container_of(manifests(AGENT)["DaemonSet", "collector-agent"])["ports"]}
        config = collector_config(AGENT)
        listened = [protocol["endpoint"] for protocol in config["receivers"]["otlp"]["protocols"].values()]
        assert set(ports) == set(map(port_of, [*listened, config["exporters"]["prometheus"]["endpoint"]]))
        variables = environment_of(container_of(manifests(MANIFESTS[1])["Deployment", "detector"]), POD)
        assert ports[port_of(variables["OTEL_EXPORTER_OTLP_ENDPOINT"])]["hostPort"] == port_of(
            variables["OTEL_EXPORTER_OTLP_ENDPOINT"]
        )

    def test_spans_say_where_they_come_from(self, run_python, tmp_path):
        """A process with the pod's environment records stages by name, and sends them with node, pod and GPU UUID."""
        variables = environment_of(container_of(manifests(MANIFESTS[1])["Deployment", "detector"]), POD)
        (tmp_path / "app").mkdir()
        (tmp_path / "app" / "vision.py").write_text(DETECTOR)
        receiver = Receiver()
        try:
            assert variables["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://127.0.0.1:4318"
            variables["OTEL_EXPORTER_OTLP_ENDPOINT"] = receiver.endpoint
            # The period before that of the fake GPU has no stage, which would be said.
            variables["GPUSCOPE_QUIET"] = "1"
            done = run_python(SERVER, **variables)
            assert (done.returncode, done.stderr) == (0, "")
            request = next(request for request in receiver.wait_for(1) if request.path == "/v1/traces")
        finally:
            receiver.close()
        assert request.headers["content-encoding"] == "gzip"
        (resource,) = request.message.resource_spans
        said = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
        assert said["service.instance.id"]
        expected = {
            "service.name": "detector",
            "host.name": "gpu-node-17",
            "k8s.node.name": "gpu-node-17",
            "k8s.namespace.name": "inference",
            "k8s.pod.name": POD["metadata.name"],
            "k8s.pod.uid": POD["metadata.uid"],
            "k8s.container.name": "server",
        }
        assert expected.items() <= said.items()
        spans = {span.name: span for span in resource.scope_spans[0].spans}
        assert set(spans) == {"preprocess", "preprocess [gpu]", "infer", "infer [gpu]"}
        gpu = {attribute.key: attribute.value.string_value for attribute in spans["infer [gpu]"].attributes}
        assert gpu["hw.id"].startswith("GPU-")


class TestFleet:
    """The page on fleets."""

    def test_its_figures_are_the_benchmarks(self):
        """Volumes, bytes per span and what a collector costs are what `results/volume.json` says."""
        page = (FILES / "fleet.md").read_text()
        figures = json.loads((ROOT / "benchmarks/results/volume.json").read_text())
        plain, gzip = figures["sent"]["none"], figures["sent"]["gzip"]
        assert f"| {plain['bytes_a_span']:.0f} | {gzip['bytes_a_span']:.0f} |" in page
        assert f"| {plain['sender_cpu_us_a_span']:.1f} | {gzip['sender_cpu_us_a_span']:.1f} |" in page
        for row in figures["rates"]:
            cells = [f"{row['stages_a_second']:,}", f"{row['spans_a_second']:,}"]
            for way in ("none", "gzip"):
                cells += [f"{row[f'{way}_kb_a_second'] / 1000:.2f}", f"{row[f'{way}_gb_a_day']:.1f}"]
            assert f"| {' | '.join(cells)} |" in page
        for way in figures["rotel"].values():
            assert f"takes {way['cpu_s_per_million_spans']:.0f} s of CPU" in page
        assert f"{max(way['peak_mb'] for way in figures['rotel'].values()):.0f} MB of memory at most" in page

    def test_what_servers_cost_is_the_benchmark_s(self):
        """The table of servers is what `results/backends.json` says."""
        page = (FILES / "fleet.md").read_text()
        figures = json.loads((ROOT / "benchmarks/results/backends.json").read_text())["figures"]
        ways = {name.rpartition(",")[0] for name in figures}
        assert len(ways) == 4
        for way in ways:
            both = [figures[f"{way}, {compression}"] for compression in ("none", "gzip")]
            cells = [f"{each['spans_a_second']:,.0f}" for each in both]
            cells += [f"{each['cpu_s_per_million_spans']:.1f}" for each in both]
            cells += [f"{max(each[name] for each in both):,.0f}" for name in ("peak_mb", "bytes_held_a_span")]
            assert f"| {' | '.join(cells)} |" in page, way

    @pytest.mark.parametrize("page", sorted(FILES.rglob("*.md")), ids=lambda page: str(page.relative_to(FILES)))
    def test_links_lead_somewhere(self, page):
        """Every relative link of a page of `integrations/` is to a file that is there."""
        links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text())
        assert [link for link in links if not (page.parent / link).exists()] == []
