"""
TensorRT: each launch of an execution context is a stage, `tensorrt.execute`, on the stream that it is given.

`IExecutionContext` is a class of the bindings (pybind11), whose methods can be replaced like those of any class. To
instrument a single context, use `context = gpuscope.integrations.tensorrt.wrap(context)`. GPU spans need PyTorch,
because stages take its streams.

No engine was run, because TensorRT's libraries take up gigabytes. Written against TensorRT 11.4.0; with its bindings
alone (`tensorrt-cu12-bindings` over empty libraries) the methods were replaced and put back.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING

import gpuscope

if TYPE_CHECKING:
    from collections.abc import Callable

    from tensorrt import IExecutionContext

    from ._wrapping import Block, Function

MODULE = "tensorrt"
TARGETS = ()

_METHODS = ("execute_async_v3", "execute_v2")


def install() -> Callable[[], None]:
    """Make stages of the launches of every execution context; return a function that undoes it."""
    from tensorrt import IExecutionContext  # noqa: PLC0415 - `wrap` works without it

    originals = {name: getattr(IExecutionContext, name) for name in _METHODS if hasattr(IExecutionContext, name)}
    for name, method in originals.items():
        setattr(IExecutionContext, name, _staged(method))

    def undo() -> None:
        for name, method in originals.items():
            setattr(IExecutionContext, name, method)

    return undo


def wrap(context: IExecutionContext) -> StagedContext:
    """
    Return a proxy of an execution context whose launches are stages; everything else goes to the context itself.

    Args:
        context: a `tensorrt.IExecutionContext`.

    """
    return StagedContext(context)


class StagedContext:
    """A proxy of an execution context."""

    def __init__(self, context: IExecutionContext) -> None:
        vars(self)["_context"] = context

    def __getattr__(self, name: str) -> object:
        """Return the context's attribute; a method that launches is wrapped."""
        context = vars(self)["_context"]
        if name in _METHODS:
            return functools.partial(_staged(getattr(type(context), name)), context)
        return getattr(context, name)

    def __setattr__(self, name: str, value: object) -> None:
        """Set the context's attribute."""
        setattr(vars(self)["_context"], name, value)


def _staged(method: Function) -> Function:
    @functools.wraps(method)
    def wrapper(context: IExecutionContext, *args: object, **kwargs: object) -> object:
        if not gpuscope.is_enabled():
            return method(context, *args, **kwargs)
        # `execute_v2` takes no stream: it waits for one of its own.
        handle = args[0] if args and method.__name__ == "execute_async_v3" else kwargs.get("stream_handle")
        with _stage(context, handle):
            return method(context, *args, **kwargs)

    return wrapper


def _stage(context: IExecutionContext, handle: object) -> Block:
    try:
        attributes = {
            "tensorrt.engine": context.engine.name,
            "tensorrt.context": context.name,
            "tensorrt.profile": context.active_optimization_profile,
        }
        return gpuscope.stage("tensorrt.execute", attributes=attributes, stream=_stream(handle))
    except Exception:  # Perhaps it is another version, or the GPU has failed; the launch goes on.
        return gpuscope.stage("tensorrt.execute")


def _stream(handle: object) -> object:
    torch = sys.modules.get("torch")
    if handle is None or torch is None or not torch.cuda.is_initialized():
        return None
    if not handle:
        return torch.cuda.default_stream()
    return torch.cuda.ExternalStream(int(handle))  # type: ignore[call-overload]  # An address, as TensorRT takes it.
