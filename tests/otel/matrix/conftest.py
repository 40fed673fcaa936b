"""One small service in a process of its own, with one tool's tracing or another's, and receivers for what it sends."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ...exporters.receiver import Receiver
from ...exporters.receiver_of_grpc import GrpcReceiver

pytest.register_assert_rewrite(f"{__package__}.whole")
COMMAND = Path(sys.executable).with_name("opentelemetry-instrument")
NAME = "named by the service"
BEGINNING = """
import json, logging, sys

heard = []


class Ears(logging.Handler):
    def emit(self, record):
        heard.append([record.levelname, record.getMessage()])


logging.getLogger("gpuscope").setLevel(logging.INFO)
logging.getLogger("gpuscope").addHandler(Ears())
from opentelemetry import trace
urls = sys.argv[1:]
"""
SERVICE = """
import gpuscope

tracer = trace.get_tracer("app")
with tracer.start_as_current_span("request"):
    with gpuscope.stage("infer", attributes={"batch_size": 8}), gpuscope.stage("attention"):
        with tracer.start_as_current_span("look up"):
            pass
flushed = gpuscope.flush(20)
provider = trace.get_tracer_provider()
getattr(provider, "force_flush", lambda: None)()
account = gpuscope.statistics()
print(json.dumps({
    "flushed": flushed,
    "route": account.route,
    "exporters": account.exporters,
    "recorded": account.recorded,
    "exported": account.exported,
    "lost": {**account.lost, **account.dropped},
    "heard": heard,
}))
"""
QUIET = {"DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false", "DD_REMOTE_CONFIGURATION_ENABLED": "false"}


@pytest.fixture
def play(tmp_path):
    """
    Return a function that runs the service, whose tracing `program` sets up, and returns what it printed.

    `complains`: stderr may have lines, which are returned after the others; but no traceback.
    """

    def run(program, *urls, instrumented=False, command=("service.py",), complains=False, status=0, **environment):
        (tmp_path / "service.py").write_text(BEGINNING + program + SERVICE)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("GPUSCOPE", "OTEL_", "DD_"))}
        done = subprocess.run(
            [*([str(COMMAND)] if instrumented else []), sys.executable, *command, *urls],
            env={**kept, **QUIET, "GPUSCOPE": "1", "GPUSCOPE_METRICS": "none", **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert "Traceback" not in done.stderr
        assert (done.returncode, "" if complains else done.stderr) == (status, "")
        return done.stdout + done.stderr

    return run


@pytest.fixture
def told(play):
    """Return a function that does so and returns the service's own account, the last line that it prints."""
    return lambda *given, **how: json.loads(play(*given, **how).splitlines()[-1])


@pytest.fixture
def http():
    """A receiver of OTLP over HTTP."""
    with contextlib.closing(Receiver()) as receiver:
        yield receiver


@pytest.fixture
def other_http():
    """Another."""
    with contextlib.closing(Receiver()) as receiver:
        yield receiver


@pytest.fixture
def grpc():
    """A receiver of OTLP over gRPC."""
    with contextlib.closing(GrpcReceiver()) as receiver:
        yield receiver
