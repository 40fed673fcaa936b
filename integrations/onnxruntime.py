"""
ONNX Runtime: each run of a session is a stage, `onnxruntime.run`, with its provider and the shapes of its inputs.

Its GPU span is on the session's stream if the program gave it one (`user_compute_stream` among the options of the CUDA
or TensorRT provider). For a session with a stream of its own, the GPU span is on PyTorch's current stream and as long
as the call, because the call waits for the GPU. Without PyTorch there are only host spans.

Run against onnxruntime 1.31.1 on a CPU; `user_compute_stream` was not run.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from onnxruntime import InferenceSession

import gpuscope

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from ._wrapping import Block

    Options: TypeAlias = dict[str, dict[str, str]]
    """The options of a session's providers, by provider."""

P = ParamSpec("P")
R = TypeVar("R")

MODULE = "onnxruntime"
TARGETS = ()

_ON_STREAMS = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")
_streams: WeakKeyDictionary[InferenceSession, tuple[Options | None, object]]
_streams = WeakKeyDictionary()
"""By session: the options that its stream was looked up in, and that stream, or None."""


def install() -> Callable[[], None]:
    """Make stages of `InferenceSession.run` and `run_with_iobinding`; return a function that undoes it."""
    # Both are inherited; what is set here hides them, and is deleted again.
    for name in ("run", "run_with_iobinding"):
        setattr(InferenceSession, name, _staged(getattr(InferenceSession, name)))

    def undo() -> None:
        for name in ("run", "run_with_iobinding"):
            delattr(InferenceSession, name)

    return undo


def _staged(method: Callable[Concatenate[InferenceSession, P], R]) -> Callable[Concatenate[InferenceSession, P], R]:
    @functools.wraps(method)
    def wrapper(session: InferenceSession, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if not gpuscope.is_enabled():
            return method(session, *args, **kwargs)
        with _stage(session, kwargs.get("input_feed", args[1] if len(args) > 1 else None)):
            return method(session, *args, **kwargs)

    return wrapper


def _stage(session: InferenceSession, feed: object) -> Block:
    try:
        return gpuscope.stage("onnxruntime.run", attributes=_attributes(session, feed), stream=_stream_of(session))
    except Exception:  # Inputs may be of any type, and other versions may answer differently; the run goes on.
        return gpuscope.stage("onnxruntime.run")


def _attributes(session: InferenceSession, feed: object) -> dict[str, object]:
    attributes: dict[str, object] = {"onnxruntime.provider": session.get_providers()[0]}
    for name, value in feed.items() if isinstance(feed, dict) else ():
        shape = getattr(value, "shape", None)  # Of an array; an `OrtValue` has a method.
        shape = shape() if callable(shape) else shape
        if shape is not None:
            attributes[f"onnxruntime.input.{name}.shape"] = list(shape)
    return attributes


def _stream_of(session: InferenceSession) -> object:
    options = session.get_provider_options()
    seen, stream = _streams.get(session, (None, None))
    if seen is not options:
        stream = _find_stream(options)
        _streams[session] = options, stream
    return stream


def _find_stream(options: Options) -> object:
    torch = sys.modules.get("torch")
    for provider in _ON_STREAMS:
        given = options.get(provider, {})
        address = int(given.get("user_compute_stream") or 0)
        if address and torch is not None:
            return torch.cuda.ExternalStream(address, device=int(given.get("device_id", 0)))
    return None
