"""Fixtures for the exporters' tests: a receiver on loopback, an account, and exporters for both."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sysconfig
import threading
from pathlib import Path

import pytest

from gpuscope._settings.config import Config
from gpuscope.exporters.otlp import OtlpExporter

from .batches import Account, Row, make_batch
from .receiver import Receiver


def free_port():
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_it_listens(process, port):
    """Connect until somebody answers."""
    # An event that nobody sets is a wait that a test may have.
    pause = threading.Event()
    for _ in range(1000):
        assert process.poll() is None, process.stdout.read()
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            pause.wait(0.02)
        else:
            return
    pytest.fail("rotel does not listen")


@pytest.fixture
def otlp_receiver():
    """A receiver that answers 200 unless told otherwise; closed, and what hangs in it released, at the end."""
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def account() -> Account:
    """A ledger for deliveries."""
    return Account()


@pytest.fixture
def make_exporter(otlp_receiver):
    """Return a function that makes an exporter for the receiver; shut down at the end."""
    made = []

    def make(limits=None, backoff_s=0.001, **settings):
        # Not `changed`, which checks: an exporter lives with what it is given.
        config = dataclasses.replace(
            Config(), **{"otlp_endpoint": otlp_receiver.url, "schedule_delay_s": 0.001, **settings}
        )
        made.append(OtlpExporter(config, {"service.name": "tests"}, backoff_s=backoff_s, limits=limits))
        return made[-1]

    yield make
    otlp_receiver.release()
    for exporter in made:
        exporter.shutdown(5)


@pytest.fixture
def no_threads(monkeypatch):
    """No thread of gpuscope's can be started, as on CPython 3.12.0 to 3.12.2 once the program has ended."""
    start_anyway = threading.Thread.start

    def start(thread):
        if thread.name.startswith("gpuscope-"):
            raise RuntimeError("can't create new thread at interpreter shutdown")
        start_anyway(thread)

    monkeypatch.setattr("threading.Thread.start", start)


@pytest.fixture
def send(account):
    """Return a function that exports so many stages as one batch."""

    def export(exporter, stages=1):
        batch = make_batch(*(Row(span_id=number + 1) for number in range(stages)))
        list(exporter.export(batch, account.open(batch)))

    return export


@pytest.fixture(scope="session")
def behind_rotel():
    """A receiver for what rotel passes on; for all tests, so each looks at what is new."""
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="session")
def rotel_port(rotel_ports):
    """The port for HTTP of a running rotel."""
    return rotel_ports["http/protobuf"]


@pytest.fixture(scope="session")
def rotel_ports(behind_rotel, tmp_path_factory):
    """The ports, by protocol, of a running rotel that passes on at once to the receiver."""
    rotel = pytest.importorskip("rotel", reason="the collector `rotel` has no wheel for this platform")
    folder = tmp_path_factory.mktemp("rotel")
    http, grpc = free_port(), free_port()
    settings = {
        "otlp-http-endpoint": f"127.0.0.1:{http}",
        "otlp-grpc-endpoint": f"127.0.0.1:{grpc}",
        "batch-timeout": "10ms",
        "exporter": "otlp",
        "otlp-exporter-protocol": "http",
        "otlp-exporter-endpoint": behind_rotel.endpoint,
        "otlp-exporter-compression": "none",
        "pid-file": folder / "pid",
        "log-file": folder / "log",
    }
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    agent = Path(rotel.__file__).parent / "rotel-agent"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ROTEL", "OTEL"))}
    # The agent is linked against libpython, which not every build of Python has.
    environment["LD_LIBRARY_PATH"] = sysconfig.get_config_var("LIBDIR") or ""
    check = subprocess.run([agent, "version"], env=environment, capture_output=True, text=True, check=False)
    if "libpython" in check.stderr:
        pytest.skip(check.stderr.strip())
    with subprocess.Popen(
        [agent, "start", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            for port in (http, grpc):
                wait_until_it_listens(process, port)
            yield {"http/protobuf": http, "grpc": grpc}
        finally:
            process.kill()
