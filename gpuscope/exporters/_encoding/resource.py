"""
The attributes of the process that spans come from, after OpenTelemetry's rules.

OpenTelemetry's SDK reads its variables, so that they mean here what they mean there. Knows no format.
"""

from __future__ import annotations

import os
import socket
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpuscope._data.attributes import (
    HOST_NAME,
    LOCAL_RANK,
    PROCESS_PID,
    RANK,
    SERVICE_INSTANCE_ID,
    SERVICE_NAME,
    WORLD_SIZE,
)
from gpuscope._data.plain.values import clean_mapping
from gpuscope._settings.environment import variables
from gpuscope._version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpuscope._data.plain.values import Clean

DISTRIBUTION = "gpuscope"
_UNKNOWN = "unknown_service"
_RANKS = {"RANK": RANK, "LOCAL_RANK": LOCAL_RANK, "WORLD_SIZE": WORLD_SIZE}
"""The variables by which `torchrun` and its like tell each process its place, and the attributes that they become."""
_HOSTS = ("host.id", "host.ip", HOST_NAME)
_MACHINE_ID_FILES = ("/etc/machine-id", "/var/lib/dbus/machine-id")


def resource_attributes() -> dict[str, Clean]:
    """
    Return the resource of this process, as it is now: after a fork, the child has another.

    Takes milliseconds, and imports OpenTelemetry's SDK. What the user's variables say comes first.
    """
    found = dict(_found_by_opentelemetry())
    # OpenTelemetry's SDK says `unknown_service` where no variable names one. A person looks for the program's name.
    if str(found.get(SERVICE_NAME, _UNKNOWN)).startswith(_UNKNOWN) and (program := _program()):
        found[SERVICE_NAME] = program
    return clean_mapping({**_found_here(), **found})


def basic_attributes() -> dict[str, Clean]:
    """Return what is known of this process without OpenTelemetry's SDK, for a program that has not imported it."""
    service = variables().get("OTEL_SERVICE_NAME", "").strip() or _program() or _UNKNOWN
    return {**_found_here(), SERVICE_NAME: service}


def _program() -> str:
    """Return the name of the program: of its script, its module or its folder; empty where it has none."""
    main = sys.modules.get("__main__")
    module = getattr(getattr(main, "__spec__", None), "name", "") or ""
    if module and module != "__main__":
        return str(module).removesuffix(".__main__")
    # Python forgets the script's file when the script has run, and a program may export what it did only then.
    given = next(iter(getattr(sys, "argv", ())), "")
    started = given if isinstance(given, str) and os.path.isfile(given) else ""  # noqa: PTH113 - it raises nothing
    path = Path(str(getattr(main, "__file__", None) or started))
    return path.parent.name if path.stem == "__main__" else path.stem


def with_host(resource: Any) -> Any:
    """
    Return a resource of OpenTelemetry's SDK, and where it names no host one that names this, too.

    Jaeger takes a GPU span that outlasts its parent for one with a wrong clock, and may move it, unless their resources
    name the same host. The SDK names none by itself.
    """
    from opentelemetry.sdk.resources import Resource

    if resource is None or any(name in resource.attributes for name in _HOSTS):
        return resource
    return Resource({**resource.attributes, HOST_NAME: socket.gethostname()}, resource.schema_url)


def _found_by_opentelemetry() -> Mapping[str, object]:
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.version import __version__ as sdk_version

    try:
        return Resource.create().attributes
    except RuntimeError:
        # It asks detectors in threads, and Python 3.12.0 to 3.12.2 start none once the program has ended, which is when
        # that of a short program is set up. So the one that reads OpenTelemetry's variables is asked here.
        return {
            "telemetry.sdk.language": "python",
            "telemetry.sdk.name": "opentelemetry",
            "telemetry.sdk.version": sdk_version,
            SERVICE_NAME: f"{_UNKNOWN}:{Path(sys.executable or 'python').name}",
            **OTELResourceDetector().detect().attributes,
        }


def _found_here() -> dict[str, Clean]:
    attributes: dict[str, Clean] = {
        HOST_NAME: socket.gethostname(),
        PROCESS_PID: os.getpid(),
        SERVICE_INSTANCE_ID: str(uuid.uuid4()),
        "telemetry.distro.name": DISTRIBUTION,
        "telemetry.distro.version": __version__,
    }
    machine = _machine_id()
    return {**attributes, **_ranks(), **({"host.id": machine} if machine else {})}


def _ranks() -> dict[str, int]:
    given = {name: text for name, text in variables().items() if name in _RANKS and text.isdecimal()}
    return {_RANKS[name]: int(text) for name, text in given.items()} if {"RANK", "WORLD_SIZE"} <= set(given) else {}


def _machine_id() -> str:
    for path in _MACHINE_ID_FILES:
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        if text:
            return text
    return ""
