"""
LitServe: the steps of a `LitAPI` are stages, in the trace of the request that they work on.

The server hands requests to its worker processes through a queue; the trace travels with the request's id, whose text
stays the same. Best used with `asgi`, which makes the request itself a stage: `GPUSCOPE_FRAMEWORKS=asgi,litserve`. The
stages of a batch are in the trace of its first request. A worker is ended by a signal, so it loses what it recorded in
its last `GPUSCOPE_INTERVAL`. Continuous batching was not run.

Run against litserve 0.2.19.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from litserve.loops import BatchedLoop, BatchedStreamingLoop, LitLoop
from litserve.server import LitServer
from litserve.utils import LitAPIStatus

import gpuscope
from gpuscope.instrument import Target

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing import Queue

    from ._wrapping import Block, Function

MODULE = "litserve"
TARGETS = tuple(
    Target(f"litserve.{step}", f"litserve.api:LitAPI.{step}", attributes, subclasses=True)
    for step, attributes in (
        ("decode_request", {}),
        ("batch", {"batch_size": "len(inputs)"}),
        ("predict", {}),
        ("unbatch", {}),
        ("encode_response", {}),
    )
)


class RequestId(str):
    """A request's id, and the trace that it belongs to."""

    __slots__ = ("carrier",)
    carrier: dict[str, str]

    def __reduce__(self) -> tuple[Function, tuple[str, dict[str, str]]]:
        """Pickle the trace with the text."""
        return _request_id, (str(self), self.carrier)


def _request_id(text: object, carrier: dict[str, str]) -> RequestId:
    made = RequestId(text)
    made.carrier = carrier
    return made


class _Outgoing:
    """The queue of requests, for the server, which puts requests into it. Pickled, it is the queue itself."""

    def __init__(self, queue: Queue[tuple[object, ...]]) -> None:
        self._queue = queue

    def put(self, item: tuple[object, ...]) -> None:
        """Put a request into the queue, and with it the current trace."""
        with contextlib.suppress(Exception):  # In another version, requests may look different.
            carrier: dict[str, str] = {}
            gpuscope.inject(carrier)
            where, request_id, *rest = item
            if carrier and request_id is not None:  # The item that tells a worker to stop has no id.
                item = (where, _request_id(request_id, carrier), *rest)
        self._queue.put(item)

    def __getattr__(self, name: str) -> object:
        return getattr(self._queue, name)

    def __reduce__(self) -> str | tuple[object, ...]:
        return self._queue.__reduce__()


class _Work:
    """The trace that a worker's loop works in: that of its request, or of the first request in its batch."""

    def __init__(self) -> None:
        self._trace: Block | None = None
        self._answered = True

    def begin(self, request_id: str, *, collects: bool) -> None:
        """Continue the request's trace, unless the request joins a batch that is being collected."""
        if collects and not self._answered:
            return
        if self._trace is not None:
            self._trace.__exit__(None, None, None)
        self._trace, self._answered = gpuscope.extract(getattr(request_id, "carrier", {})), False
        self._trace.__enter__()

    def answer(self) -> None:
        """Note that the batch is complete, because an answer was given."""
        self._answered = True


def install() -> Callable[[], None]:
    """Carry traces from the server to its workers; return a function that undoes it."""
    get_queue, put_response = LitServer._get_request_queue, LitLoop.put_response

    @functools.wraps(get_queue)
    def _get_request_queue(self: LitServer, *args: object, **kwargs: object) -> object:
        queue = get_queue(self, *args, **kwargs)
        return _Outgoing(queue) if gpuscope.is_enabled() else queue

    LitServer._get_request_queue = _get_request_queue
    LitLoop.put_response = _noticing(put_response)

    def undo() -> None:
        LitServer._get_request_queue, LitLoop.put_response = get_queue, put_response

    return undo


def _noticing(respond: Function) -> Function:
    """Wrap `put_response`, which loops call both when they have taken a request and when they answer it."""
    work: WeakKeyDictionary[LitLoop, _Work] = WeakKeyDictionary()
    signature = inspect.signature(respond)

    @functools.wraps(respond)
    def put_response(self: LitLoop, *args: object, **kwargs: object) -> object:
        with contextlib.suppress(Exception):  # In another version, the arguments may be different.
            call = signature.bind(self, *args, **kwargs)
            current, uid = work.setdefault(self, _Work()), call.arguments["uid"]
            if call.arguments["status"] == LitAPIStatus.START:
                current.begin(uid, collects=isinstance(self, BatchedLoop | BatchedStreamingLoop))
            else:
                current.answer()
            call.arguments["uid"] = str(uid)
            args, kwargs = call.args[1:], call.kwargs
        return respond(self, *args, **kwargs)

    return put_response
