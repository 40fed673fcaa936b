"""Fixtures for tests of endpoints: servers of several kinds, certificates, and no proxies of the machine's."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess

import pytest

from .servers import Raw, web


@pytest.fixture(autouse=True)
def proxies(monkeypatch):
    """No proxy but what the test sets, by the function that this is."""
    for name in ("http", "https", "all", "no", "grpc", "no_grpc"):
        monkeypatch.delenv(f"{name}_proxy", raising=False)
        monkeypatch.delenv(f"{name}_proxy".upper(), raising=False)
    return lambda **values: [monkeypatch.setenv(f"{name}_proxy", value) for name, value in values.items()]


@pytest.fixture
def closed_port():
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def start():
    """Return a function that starts a web server, or a raw one if it is given bytes, and returns it."""
    with contextlib.ExitStack() as stack:

        def begin(what, tls=None, **options):
            if isinstance(what, bytes):
                server = Raw(what, tls)
                stack.callback(server.close)
            else:
                server = web(what, tls, **options)
                stack.callback(server.server_close)
                stack.callback(server.shutdown)
            return server

        yield begin


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A certificate for 127.0.0.1 with its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the program openssl")
    folder = tmp_path_factory.mktemp("tls")
    command = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    files = ["-keyout", folder / "key.pem", "-out", folder / "cert.pem"]
    subprocess.run([openssl, *command.split(), *files], check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture(scope="session")
def server_tls(certificate):
    """The server's side of TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context
