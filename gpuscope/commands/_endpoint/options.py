"""
The options of commands that speak to an OTLP endpoint, as settings: they come before OpenTelemetry's variables.

Connects to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from gpuscope._errors import CommandError
from gpuscope._settings.config import read_environment

if TYPE_CHECKING:
    import argparse

    from gpuscope._settings.complaints import Complaint
    from gpuscope._settings.config import Config

_TRACES = "/v1/traces"
_OPTIONS = {"otlp_endpoint": "--endpoint", "otlp_base_endpoint": "--endpoint", "otlp_headers": "--header"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    add = parser.add_argument
    add(
        "--endpoint",
        metavar="URL",
        help="the OTLP endpoint (default: OTEL_EXPORTER_OTLP_ENDPOINT, else http://localhost:4318; with grpc: 4317)",
    )
    add("--protocol", choices=("http/protobuf", "grpc"), help="its protocol (default: OTEL_EXPORTER_OTLP_PROTOCOL)")
    add(
        "--header",
        action="append",
        default=[],
        metavar="K=V",
        help="a header of each request, beside those of OTEL_EXPORTER_OTLP_HEADERS; may be given several times",
    )


def settings(options: argparse.Namespace) -> tuple[Config, list[Complaint]]:
    """
    Return the settings that the variables and the options make, and what is wrong with the variables.

    Raises:
        CommandError: for an option that cannot be used.

    """
    config, complaints = read_environment()
    changes: dict[str, object] = {}
    if options.protocol:
        changes["otlp_protocol"] = options.protocol
    if options.endpoint is not None:
        changes |= _endpoint(options.endpoint, options.protocol or config.otlp_protocol)
    if options.header:
        changes["otlp_headers"] = {**config.otlp_headers, **dict(map(_header, options.header))}
    try:
        return config.changed(**changes), complaints
    except ValueError as error:
        said = str(error)
        for name, option in _OPTIONS.items():
            said = said.replace(f"`{name}`", f"`{option}`")
        raise CommandError(said) from None


def _endpoint(url: str, protocol: str) -> dict[str, object]:
    """Return what a URL means: the full one of spans is used as it is, and any other gets the path of spans."""
    try:
        full = protocol != "grpc" and urlsplit(url).path.rstrip("/").endswith(_TRACES)
    except ValueError:
        full = False
    return {"otlp_endpoint": url} if full else {"otlp_endpoint": "", "otlp_base_endpoint": url}


def _header(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise CommandError("`--header`: expected a name and a value, as in `--header authorization='Bearer ...'`.")
    return name.strip().lower(), value.strip()
