"""
LitServe: the steps of a `LitAPI` are stages, in the trace of the request that they work on.

The server hands requests to its worker processes through a queue; the trace travels with the request's id, whose text
stays the same. Best used with `asgi`, which makes the request itself a stage: `GPUSCOPE_FRAMEWORKS=asgi,litserve`. A
worker is ended by a signal, so it loses what it recorded in its last `GPUSCOPE_INTERVAL`.

Where LitServe batches, `litserve.run_batch` is the stage of the batch: it has `batch`, `predict` and `unbatch` inside,
and its members are the requests that the loop took; each one's wait began when the server took it. With streaming it
lasts until the last answer, and the steps that make the answers are inside, too. `decode_request` and, without
streaming, `encode_response` and `litserve.put_response`, which hands the answer to the server, work for one request
each, and are in its trace. Continuous batching was not run.

Run against litserve 0.2.19.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import threading
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from litserve.loops import BatchedLoop, BatchedStreamingLoop, LitLoop, simple_loops, streaming_loops
from litserve.server import LitServer
from litserve.utils import LitAPIStatus, LoopResponseType

import gpuscope
from gpuscope.instrument import Target

from ._wrapping import replace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
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
    """A request's id, the trace that it belongs to, and where and when in that the server took it."""

    __slots__ = ("carrier", "token")
    carrier: dict[str, str]
    token: gpuscope.Token

    def __reduce__(self) -> tuple[Function, tuple[str, dict[str, str], gpuscope.Token]]:
        """Pickle the trace with the text."""
        return _request_id, (str(self), self.carrier, self.token)


def _request_id(text: object, carrier: dict[str, str], token: gpuscope.Token) -> RequestId:
    made = RequestId(text)
    made.carrier, made.token = carrier, token
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
                item = (where, _request_id(request_id, carrier, gpuscope.here()), *rest)
        self._queue.put(item)

    def __getattr__(self, name: str) -> object:
        return getattr(self._queue, name)

    def __reduce__(self) -> str | tuple[object, ...]:
        return self._queue.__reduce__()


class _Single:
    """The trace that a loop works in which takes one request after the other: that of the last one."""

    def __init__(self) -> None:
        self._trace: Block | None = None

    def take(self, request_id: str) -> None:
        """Continue the request's trace."""
        if self._trace is not None:
            self._trace.__exit__(None, None, None)
        self._trace = gpuscope.extract(getattr(request_id, "carrier", {}))
        self._trace.__enter__()

    def answer(self, request_id: str) -> None:
        """Do nothing: what comes before the next request is part of this one."""


class _Batched:
    """The requests that a batched loop has taken and not answered, and their batch while it runs."""

    def __init__(self) -> None:
        self._requests: dict[str, str] = {}
        self._calls: dict[str, int] = {}
        """How often each step of single requests ran for this batch: their order is that of the requests."""
        self._batch: contextlib.ExitStack | None = None

    def take(self, request_id: str) -> None:
        """Note a request, which is going to be in the next batch unless it has waited too long."""
        self._requests[str(request_id)] = request_id

    def answer(self, request_id: str) -> None:
        """Forget a request whose last answer was given, and with the last one end the batch."""
        self._requests.pop(str(request_id), None)
        if not self._requests:
            self._leave(None)
            self._calls.clear()

    @contextlib.contextmanager
    def one(self, step: str) -> Iterator[None]:
        """Be in the trace of the request that this step of single requests is for."""
        place = self._calls[step] = self._calls.get(step, -1) + 1
        request_id = next(itertools.islice(self._requests.values(), place, None), "")
        with gpuscope.extract(getattr(request_id, "carrier", {})):
            yield

    @contextlib.contextmanager
    def all(self, step: str, *, streams: bool) -> Iterator[None]:
        """Be in the batch; it begins with the first step for all, and ends with the last, or with their failure."""
        if self._batch is None and self._requests:
            tokens = [getattr(request_id, "token", None) or gpuscope.Token() for request_id in self._requests.values()]
            self._batch = contextlib.ExitStack()
            self._batch.enter_context(gpuscope.extract(gpuscope.Token()))
            self._batch.enter_context(gpuscope.stage("litserve.run_batch", members=tokens))
        try:
            yield
        except BaseException as error:
            self._leave(error)
            raise
        if step == "unbatch" and not streams:
            self._leave(None)

    def _leave(self, error: BaseException | None) -> None:
        batch, self._batch = self._batch, None
        if batch is not None:
            batch.__exit__(
                None if error is None else type(error), error, None if error is None else error.__traceback__
            )


def install() -> Callable[[], None]:
    """Carry traces from the server to its workers, and make batches; return a function that undoes it."""
    undo = contextlib.ExitStack()
    replace(undo, LitServer, "_get_request_queue", _carrying)
    replace(undo, LitLoop, "put_response", _noticing)
    for module, streams in ((simple_loops, False), (streaming_loops, True)):
        replace(undo, module, "_inject_context", functools.partial(_placed, streams=streams))
    return undo.close


def _carrying(get_queue: Callable[..., Queue[tuple[object, ...]]]) -> Function:
    def _get_request_queue(self: LitServer, *args: object, **kwargs: object) -> object:
        queue = get_queue(self, *args, **kwargs)
        return _Outgoing(queue) if gpuscope.is_enabled() else queue

    return _get_request_queue


def _noticing(respond: Function) -> Function:
    """Wrap `put_response`, which loops call both when they have taken a request and when they answer it."""
    signature = inspect.signature(respond)

    def put_response(self: LitLoop, *args: object, **kwargs: object) -> object:
        sending: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        with contextlib.suppress(Exception):  # In another version, the arguments may be different.
            call = signature.bind(self, *args, **kwargs)
            work, uid, status = _work_of(self), call.arguments["uid"], call.arguments["status"]
            more = status == LitAPIStatus.OK and call.arguments["response_type"] == LoopResponseType.STREAMING
            if status == LitAPIStatus.START:
                work.take(uid)
            elif not more:
                work.answer(uid)
            call.arguments["uid"] = str(uid)
            args, kwargs = call.args[1:], call.kwargs
            if status != LitAPIStatus.START and call.arguments["response_type"] != LoopResponseType.STREAMING:
                sending = _sending(uid)
        with sending:
            return respond(self, *args, **kwargs)

    return put_response


@contextlib.contextmanager
def _sending(request_id: str) -> Iterator[None]:
    """Be in a stage of the request whose answer goes back to the server."""
    with gpuscope.extract(getattr(request_id, "carrier", {})), gpuscope.stage("litserve.put_response"):
        yield


def _work_of(loop: LitLoop) -> _Single | _Batched:
    work = _works.get(loop)
    if work is None:
        work = _works[loop] = _Batched() if isinstance(loop, BatchedLoop | BatchedStreamingLoop) else _Single()
    if isinstance(work, _Batched):
        _batched.work = work
    return work


def _placed(call: Function, *, streams: bool) -> Function:
    """Wrap the function by which loops call each step of a `LitAPI`: for one request, or for all of a batch."""

    def _inject_context(context: object, step: Function, *args: object, **kwargs: object) -> object:
        work: _Batched | None = getattr(_batched, "work", None)
        if work is None or not gpuscope.is_enabled():
            return call(context, step, *args, **kwargs)
        name = getattr(step, "__name__", "")
        with work.all(name, streams=streams) if isinstance(context, list) else work.one(name):
            return call(context, step, *args, **kwargs)

    return _inject_context


_works: WeakKeyDictionary[LitLoop, _Single | _Batched] = WeakKeyDictionary()
_batched = threading.local()
"""`work` is that of the batched loop which runs in this thread."""
