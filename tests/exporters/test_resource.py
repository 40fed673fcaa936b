"""The resource: OpenTelemetry's variables first, and what gpuscope adds."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
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
    assert found["service.name"] == "program"


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["folder/serve.py"], "serve"),
        (["folder"], "folder"),
        (["-m", "folder.serve"], "folder.serve"),
        (["-m", "folder"], "folder"),
        (["-c", PROGRAM], "unknown_service:python"),
    ],
)
def test_a_service_without_a_name_has_that_of_its_program(tmp_path, command, name):
    """The script's, the module's or the folder's; where there is none, what OpenTelemetry's SDK says."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in ("__init__.py", "__main__.py", "serve.py"):
        (folder / file).write_text("" if file == "__init__.py" else PROGRAM)
    environ = {name: text for name, text in os.environ.items() if not name.startswith(("GPUSCOPE", "OTEL_"))}
    python = Path(sys.executable).with_name("python")
    done = subprocess.run(
        [python, *command], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(done.stdout)[0]["service.name"] == name


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
