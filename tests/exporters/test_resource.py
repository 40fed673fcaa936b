"""The resource: OpenTelemetry's variables first, and what gpuscope adds."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path

import pytest
from opentelemetry.sdk.resources import Resource

from gpuscope.exporters._encoding.resource import resource_attributes, with_host

PROGRAM = """
import json
from gpuscope.exporters._encoding.resource import resource_attributes
print(json.dumps([resource_attributes(), resource_attributes()]))
"""


def resources(run_python, **environment):
    """What a fresh process says of itself, twice."""
    result = run_python(PROGRAM, PYTHONPATH=str(Path.cwd()), **environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_resource_names_host_process_and_distribution(run_python):
    """Without any variable the resource tells the host, which Jaeger needs to place GPU spans, and the process."""
    found, _ = resources(run_python)
    assert found["host.name"] == socket.gethostname()
    assert found["process.pid"] != os.getpid()
    assert found["telemetry.distro.name"] == "gpuscope"
    assert found["telemetry.distro.version"]
    assert len(found["service.instance.id"]) == 36
    assert found["service.name"].startswith("unknown_service")


def test_the_users_variables_come_first(run_python):
    """`OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` replace what was found."""
    given = "host.name=pod-7,service.instance.id=me,deployment.environment.name=prod%20eu"
    found, _ = resources(run_python, OTEL_SERVICE_NAME="vision", OTEL_RESOURCE_ATTRIBUTES=given)
    assert (found["service.name"], found["host.name"], found["service.instance.id"]) == ("vision", "pod-7", "me")
    assert found["deployment.environment.name"] == "prod eu"


@pytest.mark.parametrize("named", ["", "a service"])
def test_is_found_where_no_thread_can_be_had(monkeypatch, named):
    """OpenTelemetry asks detectors in threads; an interpreter that ends may start none, and stages are exported."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", named)
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    usual = resource_attributes()

    def start(thread):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", start)
    found = resource_attributes()
    assert found.pop("service.instance.id") != usual.pop("service.instance.id")
    assert found == usual


def test_an_applications_resource_that_names_no_host_gets_this_ones():
    """With all that it says of itself, and its schema."""
    named = with_host(Resource({"service.name": "shop"}, "https://example.com/schema"))
    assert named.attributes == {"service.name": "shop", "host.name": socket.gethostname()}
    assert named.schema_url == "https://example.com/schema"


@pytest.mark.parametrize("host", [{"host.name": "pod-7"}, {"host.id": "7"}, {"host.ip": ("10.0.0.7",)}])
def test_an_applications_resource_that_names_its_host_stays_as_it_is(host):
    """By whichever attribute Jaeger tells hosts apart."""
    resource = Resource({"service.name": "shop", **host})
    assert with_host(resource) is resource
