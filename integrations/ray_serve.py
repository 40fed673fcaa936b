"""
Ray Serve: each call of a deployment's method is a stage in its replica, in the caller's trace.

A call through a handle carries the trace that it is made in; a request over HTTP has it in its headers. The stage is
named after deployment and method, `ray.Detector.__call__`, and lasts as long as the replica works on the call.

What `@serve.batch` decorates works for several calls at once: its stage `ray.Detector.infer.batch` has them as its
members, and each one's wait began when it was put into the batch's queue.

Replicas are separate processes, and must be instrumented too:

    ray.init(runtime_env={"worker_process_setup_hook": "gpuscope.integrations.ray_serve.set_up_worker"})

with `GPUSCOPE=1` in the environment that Ray starts in. If Ray's own tracing is on, Ray makes spans of the requests,
and stages are their children; that was not run.

Run against ray 2.60.0, whose internal classes this relies on.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import gpuscope
from gpuscope.instrument import instrument

from ._wrapping import replace

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from typing import Any, TypeAlias

    from ray.serve._private.common import RequestMetadata
    from ray.serve._private.replica import Replica
    from ray.serve.batching import _BatchQueue, _SingleRequest

    from ._wrapping import Function

    Unpacked: TypeAlias = Any
    """Arguments of a method, and keyword arguments. `Any`, because only that of an HTTP request is known: a scope."""

MODULE = "ray.serve"
TARGETS = ()

_CARRIER = "_gpuscope_carrier"
"""The attribute that holds the trace in a call's metadata; it is pickled with them."""
_WAITS = "_gpuscope_token"
"""The attribute that holds the token of a call that waits for its batch."""


def set_up_worker() -> None:
    """Instrument a process that Ray starts."""
    instrument(frameworks="ray_serve")


def install() -> Callable[[], None]:
    """Make stages of the methods of deployments, and hand traces on; return a function that undoes it."""
    # Not at the top: every process that Ray starts imports this file, and few have replicas.
    from ray.serve._private.common import RequestMetadata  # noqa: PLC0415
    from ray.serve._private.replica import Replica  # noqa: PLC0415
    from ray.serve.batching import _BatchQueue  # noqa: PLC0415

    undo = contextlib.ExitStack()
    replace(undo, RequestMetadata, "__init__", _carrying)
    replace(undo, Replica, "_unpack_proxy_args", _reading_headers)
    replace(undo, Replica, "_wrap_request", _staged)
    replace(undo, _BatchQueue, "put", _waiting)
    replace(undo, _BatchQueue, "_process_batch_inner", _batched)
    return undo.close


def _carrying(original: Function) -> Function:
    """In the caller: a call's metadata carry the current trace."""

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


def _waiting(original: Function) -> Function:
    """In the replica: a call that is put into a batch's queue waits from now on."""

    def put(self: _BatchQueue, request: _SingleRequest, *args: object, **kwargs: object) -> object:
        with contextlib.suppress(Exception):  # Another version may keep it elsewhere.
            setattr(request, _WAITS, gpuscope.here())
        return original(self, request, *args, **kwargs)

    return put


def _batched(original: Callable[..., Awaitable[object]]) -> Function:
    """In the replica: the work on a batch is a stage of all its calls, and in no one's trace."""

    async def _process_batch_inner(
        self: _BatchQueue, func: Function, batch: list[_SingleRequest], *args: object, **kwargs: object
    ) -> object:
        with _batch(func, batch):
            return await original(self, func, batch, *args, **kwargs)

    return _process_batch_inner


def _batch(func: Function, batch: list[_SingleRequest]) -> contextlib.ExitStack:
    block = contextlib.ExitStack()
    if gpuscope.is_enabled():
        with contextlib.suppress(Exception):  # Another version may keep it elsewhere: then the batch is not a stage.
            tokens = [getattr(request, _WAITS, None) or gpuscope.Token() for request in batch]
            # The task that waits for batches was started within the call that came first.
            block.enter_context(gpuscope.extract(gpuscope.Token()))
            block.enter_context(gpuscope.stage(f"ray.{_deployment()}.{func.__name__}.batch", members=tokens))
    return block


def _deployment() -> str:
    from ray import serve  # noqa: PLC0415 - see `install`

    return str(serve.get_replica_context().deployment)
