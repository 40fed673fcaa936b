"""
Triton Inference Server, the Python backend: each `execute` of a model is a stage, in the trace of its first request.

In `model.py`, which the server loads by its path:

    from gpuscope.integrations.triton_backend import staged

    class TritonPythonModel:
        @staged
        def execute(self, requests): ...

with `GPUSCOPE=1` in the server's environment. The trace is the server's own, where it runs with
`--trace-config mode=opentelemetry`, and else a new one.

Not run: the backend is part of the server's image. Written against the sources of the backend, the server's own tests
and PyTriton, as of 2024: `request.trace().get_context()` is a JSON object with `traceparent`, or None.
"""

from __future__ import annotations

import functools
import inspect
import json
from contextlib import ExitStack, suppress
from typing import Any

import gpuscope

MODULE = "triton_python_backend_utils"
TARGETS = ()
"""None: the server imports `model.py` by the folder of its version, `1.model`, and each model has one."""


def staged(function: Any) -> Any:
    """
    Make `TritonPythonModel.execute`, a function or a coroutine function, a stage.

    Its attributes are the number of requests, and the id of the first.

    Args:
        function: takes the model and the list of requests.

    """
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def wrapper(model: Any, requests: Any) -> Any:
            with _stage(requests):
                return await function(model, requests)
    else:

        @functools.wraps(function)
        def wrapper(model: Any, requests: Any) -> Any:
            with _stage(requests):
                return function(model, requests)

    return wrapper


def _stage(requests: Any) -> ExitStack:
    """Return a block that is a stage in the trace of the first request."""
    stack = ExitStack()
    if gpuscope.is_enabled():
        attributes: dict[str, Any] = {}
        with suppress(Exception):  # Of another version, perhaps: the stage has less to say.
            attributes["batch_size"] = len(requests)
            if requests:
                attributes["triton.request_id"] = requests[0].request_id()
                stack.enter_context(gpuscope.extract(_carrier(requests[0])))
        stack.enter_context(gpuscope.stage("triton.execute", attributes=attributes))
    return stack


def _carrier(request: Any) -> dict[str, str]:
    """Return what the server says of the request's trace; nothing where it is an older one, or does not trace."""
    try:
        found = json.loads(request.trace().get_context())
    except (AttributeError, TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
