"""
Triton Inference Server, the Python backend: each `execute` of a model is a stage, in the trace of its first request.

In `model.py`, which the server loads by its path:

    from gpuscope.integrations.triton_backend import staged

    class TritonPythonModel:
        @staged
        def execute(self, requests): ...

with `GPUSCOPE=1` in the server's environment. The trace is the server's own if it runs with
`--trace-config mode=opentelemetry`; otherwise it is a new one.

Not run, because the backend is part of the server's image. Written against the sources of the backend, the server's
own tests and PyTriton, as of 2024: `request.trace().get_context()` is a JSON object with `traceparent`, or None.
"""

from __future__ import annotations

import functools
import inspect
import json
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Protocol, TypeVar

import gpuscope

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    class Request(Protocol):
        """What is used of `pb_utils.InferenceRequest`."""

        def request_id(self) -> str:
            """Return the id that the client gave, or an empty string."""

        def trace(self) -> Trace:
            """Return the request's trace."""

    class Trace(Protocol):
        """What is used of `pb_utils.InferenceTrace`."""

        def get_context(self) -> str | None:
            """Return a JSON object, or None."""


F = TypeVar("F", bound="Callable[..., object]")

MODULE = "triton_python_backend_utils"
TARGETS = ()
"""None, because the server imports each `model.py` under the name of its version's folder, such as `1.model`."""


def staged(function: F) -> F:
    """
    Make `TritonPythonModel.execute` a stage, whether it is a function or a coroutine function.

    The stage's attributes are the number of requests and the id of the first one.

    Args:
        function: takes the model and the list of requests.

    Returns:
        A function of the same kind.

    """
    wrapper: Callable[..., object]
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def wrapper(model: object, requests: Sequence[Request]) -> object:
            with _stage(requests):
                return await function(model, requests)

    else:

        @functools.wraps(function)
        def wrapper(model: object, requests: Sequence[Request]) -> object:
            with _stage(requests):
                return function(model, requests)

    return wrapper  # type: ignore[return-value]  # It takes and returns what `function` does.


def _stage(requests: Sequence[Request]) -> ExitStack:
    """Return a block that is a stage in the first request's trace."""
    stack = ExitStack()
    if gpuscope.is_enabled():
        attributes: dict[str, object] = {}
        with suppress(Exception):  # Perhaps it is another version; then the stage has fewer attributes.
            attributes["batch_size"] = len(requests)
            if requests:
                attributes["triton.request_id"] = requests[0].request_id()
                stack.enter_context(gpuscope.extract(_carrier(requests[0])))
        stack.enter_context(gpuscope.stage("triton.execute", attributes=attributes))
    return stack


def _carrier(request: Request) -> dict[str, str]:
    """Return the request's trace as the server gives it; empty if the server is older or does not trace."""
    try:
        found = json.loads(request.trace().get_context())  # type: ignore[arg-type]  # None is a `TypeError`.
    except (AttributeError, TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
