"""Servers of other projects, started as their users start them: on free ports of loopback, waited for, and stopped."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ..spans_of_files import wait_for

yaml = pytest.importorskip("yaml")

FILES = Path(__file__).parents[2] / "integrations"
BINARIES = {"jaeger": "GPUSCOPE_JAEGER", "otelcol": "GPUSCOPE_OTELCOL", "prometheus": "GPUSCOPE_PROMETHEUS"}
"""Names on PATH, and the variables that may name a file instead."""


def found(name):
    """Where this program is, or None."""
    return os.environ.get(BINARIES[name]) or shutil.which(name)


def needed(name):
    """Where this program is; without it the test is skipped."""
    if path := found(name):
        return path
    return pytest.skip(f"needs `{name}` on PATH or in {BINARIES[name]}: see tests/backends/build.sh")


def free_ports(count):
    """
    Return so many ports that were free a moment ago.

    They lie below those that the system gives to outgoing connections, one of which might come before the server.
    """
    found = set()
    while len(found) < count:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.add(port)
    return list(found)


def get(url, **parameters):
    """Return the body of an answer; an exception where there is none, or none that is well."""
    query = urllib.parse.urlencode(parameters, doseq=True)
    with urllib.request.urlopen(f"{url}?{query}" if query else url, timeout=30) as answer:
        return answer.read().decode()


def answers(url):
    """Tell whether somebody says yes there."""
    with contextlib.suppress(OSError):
        get(url)
        return True
    return False


class Server:
    """A running program, its output in a file; used as a context, at whose end it is stopped."""

    def __init__(self, command, folder, ready):
        self.name = f"{Path(command[0]).name}-{free_ports(1)[0]}"
        self.log = Path(folder) / f"{self.name}.log"
        self.command, self.folder, self.ready = [str(part) for part in command], folder, ready

    def __enter__(self):
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL", "GPUSCOPE"))}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            wait_for(self._is_up)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)

    def _is_up(self):
        assert self.process.poll() is None, self.output()
        return self.ready()

    def output(self):
        """What it has said so far."""
        return self.log.read_text(errors="replace")


class Collector(Server):
    """
    The OpenTelemetry Collector with a configuration of ours, moved to free ports.

    Args:
        config: the file.
        folder: for its output.
        changes: more of its configuration, each as `path::to::key: value`.

    """

    def __init__(self, config, folder, *changes):
        self.grpc, self.http, self.metrics, self.own, self.health = free_ports(5)
        own = f"{{pull: {{exporter: {{prometheus: {{host: 127.0.0.1, port: {self.own}}}}}}}}}"
        # An extension that the file does not name is declared by this, and not started.
        places = (
            f"receivers::otlp::protocols::grpc::endpoint: 127.0.0.1:{self.grpc}",
            f"receivers::otlp::protocols::http::endpoint: 127.0.0.1:{self.http}",
            f"exporters::prometheus::endpoint: 127.0.0.1:{self.metrics}",
            f"extensions::health_check::endpoint: 127.0.0.1:{self.health}",
            f"service::telemetry::metrics::readers: [{own}]",
        )
        self.endpoint = f"http://127.0.0.1:{self.http}"
        arguments = [f"--config={config}", *(f"--config=yaml:{change}" for change in (*places, *changes))]
        super().__init__([needed("otelcol"), *arguments], folder, self._takes_spans)

    def _takes_spans(self):
        # Well answered: an empty request is a request.
        request = urllib.request.Request(
            f"{self.endpoint}/v1/traces", data=b"", headers={"Content-Type": "application/x-protobuf"}
        )
        try:
            with urllib.request.urlopen(request, timeout=5):
                return True
        except urllib.error.HTTPError as error:
            return error.code == 503  # There, and short of memory.
        except OSError:
            return False

    def exposed(self):
        """What Prometheus would scrape of the metrics that were sent."""
        accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.metrics}/metrics", headers=accept)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()

    def count(self, name, **labels):
        """The sum of one of its own counters, or of its series with these labels."""
        families = text_string_to_metric_families(get(f"http://127.0.0.1:{self.own}/metrics"))
        # The parser adds `_total` to names of counters that do not have it.
        samples = [sample for family in families for sample in family.samples if sample.name == f"{name}_total"]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


class Jaeger(Server):
    """Jaeger with its storage in memory, on free ports."""

    def __init__(self, folder):
        self.grpc, self.http, self.query, self.query_grpc = free_ports(4)
        config = {
            "extensions": {
                "jaeger_storage": {"backends": {"some": {"memory": {"max_traces": 100_000}}}},
                "jaeger_query": {
                    "storage": {"traces": "some"},
                    "http": {"endpoint": f"127.0.0.1:{self.query}"},
                    "grpc": {"endpoint": f"127.0.0.1:{self.query_grpc}"},
                },
            },
            "receivers": {
                "otlp": {
                    "protocols": {
                        "grpc": {"endpoint": f"127.0.0.1:{self.grpc}"},
                        "http": {"endpoint": f"127.0.0.1:{self.http}"},
                    }
                }
            },
            "exporters": {"jaeger_storage_exporter": {"trace_storage": "some"}},
            "service": {
                "extensions": ["jaeger_storage", "jaeger_query"],
                "pipelines": {"traces": {"receivers": ["otlp"], "exporters": ["jaeger_storage_exporter"]}},
                "telemetry": {"metrics": {"level": "none"}},
            },
        }
        self.endpoint = f"http://127.0.0.1:{self.http}"
        path = Path(folder) / f"jaeger-{self.query}.yaml"
        path.write_text(yaml.safe_dump(config))
        self.api = f"http://127.0.0.1:{self.query}/api"
        super().__init__(
            [needed("jaeger"), f"--config={path}"], folder, lambda: answers(f"{self.api}/services") and self._takes()
        )

    def _takes(self):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.grpc), 1).close()
            return True
        return False

    def traces(self, service):
        """By trace id: the spans as Jaeger gives them."""
        answer = json.loads(get(f"{self.api}/traces", service=service, limit=100_000))
        return {trace["traceID"]: trace["spans"] for trace in answer["data"] or ()}


class Prometheus(Server):
    """Prometheus with this configuration, on a free port; asked by `query`."""

    def __init__(self, folder, config, *flags):
        (self.port,) = free_ports(1)
        path = Path(folder) / f"prometheus-{self.port}.yml"
        path.write_text(config)
        self.url = f"http://127.0.0.1:{self.port}"
        command = [
            needed("prometheus"),
            f"--config.file={path}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            f"--storage.tsdb.path={folder}/prometheus-{self.port}",
            *flags,
        ]
        super().__init__(command, folder, lambda: answers(f"{self.url}/-/ready"))

    def query(self, expression):
        """What it answers, as labels and a number."""
        answer = json.loads(get(f"{self.url}/api/v1/query", query=expression))
        return [(result["metric"], float(result["value"][1])) for result in answer["data"]["result"]]

    def exemplars(self, series):
        """The labels of what leads from a figure to a trace, for the last minutes."""
        now = time.time()
        answer = json.loads(get(f"{self.url}/api/v1/query_exemplars", query=series, start=now - 600, end=now + 60))
        return [exemplar["labels"] for found in answer["data"] for exemplar in found["exemplars"]]
