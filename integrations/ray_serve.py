"""
Ray Serve: each call of a deployment's method is a stage in its replica, in the caller's trace.

A call through a handle carries the trace that it is made in; a request over HTTP has it in its headers. The stage is
named after deployment and method, `ray.Detector.__call__`, and lasts as long as the replica works on the call.
Replicas are separate processes, and must be instrumented too:

    ray.init(runtime_env={"worker_process_setup_hook": "gpuscope.integrations.ray_serve.set_up_worker"})

with `GPUSCOPE=1` in the environment that Ray starts in. If Ray's own tracing is on, Ray makes spans of the requests,
and stages are their children; that was not run.

Run against ray 2.60.0, whose internal classes this relies on.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING

import gpuscope
from gpuscope.instrument import instrument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, TypeAlias

    from ray.serve._private.common import RequestMetadata
    from ray.serve._private.replica import Replica

    from ._wrapping import Function

    Unpacked: TypeAlias = Any
    """Arguments of a method, and keyword arguments. `Any`, because only that of an HTTP request is known: a scope."""

MODULE = "ray.serve"
TARGETS = ()

_CARRIER = "_gpuscope_carrier"
"""The attribute that holds the trace in a call's metadata; it is pickled with them."""


def set_up_worker() -> None:
    """Instrument a process that Ray starts."""
    instrument(frameworks="ray_serve")


def install() -> Callable[[], None]:
    """Make stages of the methods of deployments, and hand traces on; return a function that undoes it."""
    # Not at the top: every process that Ray starts imports this file, and few have replicas.
    from ray.serve._private.common import RequestMetadata  # noqa: PLC0415
    from ray.serve._private.replica import Replica  # noqa: PLC0415

    patched = (
        (RequestMetadata, "__init__", _carrying),
        (Replica, "_unpack_proxy_args", _reading_headers),
        (Replica, "_wrap_request", _staged),
    )
    originals = [(kind, name, getattr(kind, name)) for kind, name, _ in patched]
    for kind, name, wrapper in patched:
        setattr(kind, name, wrapper(getattr(kind, name)))

    def undo() -> None:
        for kind, name, original in originals:
            setattr(kind, name, original)

    return undo


def _carrying(original: Function) -> Function:
    """In the caller: a call's metadata carry the current trace."""

    @functools.wraps(original)
    def __init__(self: RequestMetadata, *args: object, **kwargs: object) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        carrier: dict[str, str] = {}
        with contextlib.suppress(Exception):  # From the program's propagator: the call goes on without its trace.
            gpuscope.inject(carrier)
            if carrier:
                setattr(self, _CARRIER, carrier)

    return __init__


def _reading_headers(original: Callable[..., Unpacked]) -> Function:
    """In the replica: a request over HTTP from another program has the trace in its headers."""

    @functools.wraps(original)
    def _unpack_proxy_args(
        self: Replica, request_metadata: RequestMetadata, *args: object, **kwargs: object
    ) -> Unpacked:
        unpacked = original(self, request_metadata, *args, **kwargs)
        with contextlib.suppress(Exception):  # Another version may keep it elsewhere.
            if request_metadata.is_http_request and not hasattr(request_metadata, _CARRIER):
                headers = unpacked[0][0]["headers"]
                carrier = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}
                setattr(request_metadata, _CARRIER, carrier)
        return unpacked

    return _unpack_proxy_args


def _staged(original: Callable[..., contextlib.AbstractContextManager[object]]) -> Function:
    """In the replica: the work on a call is a stage."""

    @contextlib.contextmanager
    @functools.wraps(original)
    def _wrap_request(
        self: Replica, request_metadata: RequestMetadata, *args: object, **kwargs: object
    ) -> Iterator[object]:
        with original(self, request_metadata, *args, **kwargs) as callback, _stage(self, request_metadata):
            yield callback

    return _wrap_request


def _stage(replica: Replica, request_metadata: RequestMetadata) -> contextlib.ExitStack:
    block = contextlib.ExitStack()
    if gpuscope.is_enabled():
        with contextlib.suppress(Exception):  # Another version may keep it elsewhere: then the call is not a stage.
            deployment = replica._deployment_id
            attributes = {
                "ray.application": deployment.app_name,
                "ray.replica": replica._replica_id.unique_id,
                "ray.request_id": request_metadata.request_id,
            }
            name = f"ray.{deployment.name}.{request_metadata.call_method}"
            block.enter_context(gpuscope.extract(_trace_of(request_metadata)))
            block.enter_context(gpuscope.stage(name, attributes=attributes))
    return block


def _trace_of(request_metadata: RequestMetadata) -> dict[str, str]:
    # Where Ray's own tracing is on, it has put its span into the context by now.
    return {} if request_metadata.tracing_context else getattr(request_metadata, _CARRIER, {})
