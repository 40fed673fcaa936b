"""
TensorRT: each launch of an execution context is a stage, `tensorrt.execute`, on the stream that it is given.

`IExecutionContext` is a class of the bindings (pybind11), whose methods can be replaced like those of any class. For
one context alone, `context = gpuscope.integrations.tensorrt.wrap(context)`. GPU spans need PyTorch, whose streams
stages take.

No engine was run: TensorRT's libraries have some gigabytes. Written against TensorRT 11.4.0, with whose bindings
(`tensorrt-cu12-bindings` over empty libraries) it was seen that the methods can be replaced and put back.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import gpuscope

if TYPE_CHECKING:
    from collections.abc import Callable

MODULE = "tensorrt"
TARGETS = ()

_METHODS = ("execute_async_v3", "execute_v2")


def install() -> Callable[[], None]:
    """Make stages of the launches of every execution context; return what undoes it."""
    from tensorrt import IExecutionContext  # noqa: PLC0415 - `wrap` needs no more than the context

    originals = {name: getattr(IExecutionContext, name) for name in _METHODS if hasattr(IExecutionContext, name)}
    for name, method in originals.items():
        setattr(IExecutionContext, name, _staged(method))

    def undo() -> None:
        for name, method in originals.items():
            setattr(IExecutionContext, name, method)

    return undo


def wrap(context: Any) -> StagedContext:
    """
    Return an execution context whose launches are stages, and which is the one given in everything else.

    Args:
        context: a `tensorrt.IExecutionContext`.

    """
    return StagedContext(context)


class StagedContext:
    """A proxy of an execution context."""

    def __init__(self, context: Any) -> None:
        vars(self)["_context"] = context

    def __getattr__(self, name: str) -> Any:
        """Take everything from the context; its launches as stages."""
        context = vars(self)["_context"]
        if name in _METHODS:
            return functools.partial(_staged(getattr(type(context), name)), context)
        return getattr(context, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set the context's attribute."""
        setattr(vars(self)["_context"], name, value)


def _staged(method: Any) -> Any:
    @functools.wraps(method)
    def wrapper(context: Any, *args: Any, **kwargs: Any) -> Any:
        if not gpuscope.is_enabled():
            return method(context, *args, **kwargs)
        # `execute_v2` has none: it waits for a stream of its own.
        handle = args[0] if args and method.__name__ == "execute_async_v3" else kwargs.get("stream_handle")
        with _stage(context, handle):
            return method(context, *args, **kwargs)

    return wrapper


def _stage(context: Any, handle: Any) -> Any:
    try:
        attributes = {
            "tensorrt.engine": context.engine.name,
            "tensorrt.context": context.name,
            "tensorrt.profile": context.active_optimization_profile,
        }
        return gpuscope.stage("tensorrt.execute", attributes=attributes, stream=_stream(handle))
    except Exception:  # Of another version, perhaps, or the GPU has failed; the launch goes on.
        return gpuscope.stage("tensorrt.execute")


def _stream(handle: Any) -> Any:
    torch = sys.modules.get("torch")
    if handle is None or torch is None or not torch.cuda.is_initialized():
        return None
    return torch.cuda.ExternalStream(int(handle)) if handle else torch.cuda.default_stream()
