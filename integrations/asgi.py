"""
ASGI services; Starlette and FastAPI by name: each HTTP request is a stage, in the trace of whoever sent it.

The stage `request` lasts from the request's head to the last piece of the response's body, streamed or not; background
tasks run after it. Stages inside are its children, and `gpuscope.inject(headers)` there hands the trace on. Nothing is
buffered or changed, and websockets pass through. If OpenTelemetry's own instrumentation has made a server span, that
span is the request, and there is no stage beside it. At the end of the application's lifespan everything recorded is
exported, because uvicorn then ends itself with the signal that it received, and no `atexit` handlers run.

Where `GPUSCOPE_KEEP` names a header (`header=x-force-trace`), requests that have it are kept. With
`GPUSCOPE_TRACE_HEADER=x-trace-id` responses say which trace is theirs. Both hold where the request is a span of
OpenTelemetry's too, and there a response of 500 or more keeps the trace by the rule `error`.

By name, applications are instrumented if their first request is still to come. Any ASGI application can be wrapped by
hand: `app = Middleware(app)`.

Run against starlette 1.10.0, fastapi 0.165.0, uvicorn 0.54.0 and opentelemetry-instrumentation-fastapi 0.66b2.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import TYPE_CHECKING, cast

import wrapt

import gpuscope

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, MutableMapping
    from types import ModuleType
    from typing import Any, TypeAlias

    from opentelemetry.propagators.textmap import Getter

    from ._wrapping import Block, Function

    Message: TypeAlias = MutableMapping[str, Any]
    """A scope or an event. `Any`, because ASGI's keys have values of many types."""
    Receive: TypeAlias = Callable[[], Awaitable[Message]]
    Send: TypeAlias = Callable[[Message], Awaitable[None]]
    Application: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]
    Headers: TypeAlias = Iterable[tuple[bytes, bytes]]

MODULE = "starlette"
ALSO = "fastapi, starlette"
TARGETS = ()

_logger = logging.getLogger("gpuscope")
_SERVER_ERROR = 500
_MARK = "gpuscope.request"
"""A key in the scope of a request that is a stage already, for applications that are mounted in others."""


class Middleware:
    """
    Makes each HTTP request to an ASGI application a stage.

    Args:
        app: the application.
        name: the stage's name.

    """

    def __init__(self, app: Application, *, name: str = "request") -> None:
        gpuscope.stage(name)  # Refuses what can't be a name: here, and not with each request.
        self.app = app
        self.name = name

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Run the application, in a stage if it is a request that has none yet."""
        if scope["type"] == "lifespan" and gpuscope.is_enabled():
            send = _flushing(send)
        if scope["type"] != "http" or _MARK in scope or not gpuscope.is_enabled():
            await self.app(scope, receive, send)
            return
        if _has_server_span():
            await self._run_in_span(scope, receive, send)
            return
        blocks = self._blocks(scope, send)
        if blocks is None:
            await self.app(scope, receive, send)
            return
        remote, request = blocks
        scope[_MARK] = True
        try:
            # The outer block takes the stage out of this context even if another task has sent the response.
            with remote, request:
                await self.app(scope, receive, request.send)
        finally:
            scope.pop(_MARK, None)

    async def _run_in_span(self, scope: Message, receive: Receive, send: Send) -> None:
        """
        Run a request that is a span of the application's: no stage, but its trace is kept and said as ever.

        In an application that is mounted in another this runs once more, because its span may begin a trace of its own.
        """
        try:
            remote, token = gpuscope.extract(scope["headers"], getter=_HEADERS, trace=False), gpuscope.here()
            if remote.keeps:
                remote.keep(token)
        except Exception:  # For an unusual scope: the request goes on.
            await self.app(scope, receive, send)
            return
        if not (remote.judges or remote.reply):
            await self.app(scope, receive, send)
            return

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] >= _SERVER_ERROR:
                    remote.keep(token, failed=True)
                header = remote.reply.encode("latin-1")
                if not any(name.lower() == header for name, _ in message.get("headers", ())):
                    message = _with_trace_id(message, header, token)
            await send(message)

        try:
            await self.app(scope, receive, send_on)
        except Exception:  # Whoever answers with 500 may stand around this.
            remote.keep(token, failed=True)
            raise

    def _blocks(self, scope: Message, send: Send) -> tuple[Block, _Request] | None:
        """Return the two blocks that the request runs in, or None if they can't be made."""
        try:
            remote = gpuscope.extract(scope["headers"], getter=_HEADERS)
            return remote, _Request(self.name, scope, send, keeps=remote.keeps, trace_header=remote.reply)
        except Exception:  # From the application's propagator, or for an unusual scope: the request goes on.
            return None


def _flushing(send: Send) -> Send:
    async def send_on(message: Message) -> None:
        if message["type"] == "lifespan.shutdown.complete":
            gpuscope.flush()  # This holds up no request: none is left.
            account = gpuscope.statistics()
            _logger.info("the application ends; stages recorded: %d, exported: %d.", account.recorded, account.exported)
        await send(message)

    return send_on


class _Request:
    """The stage of one request. It ends once: with the response's body or, if that never ends, with the application."""

    def __init__(self, name: str, scope: Message, send: Send, *, keeps: bool, trace_header: str) -> None:
        self._scope, self._send, self._ended = scope, send, False
        self._root = len(scope.get("root_path", ""))
        attributes: dict[str, object] = {"http.request.method": scope["method"], "url.path": scope["path"]}
        if keeps:
            attributes["gpuscope.keep"] = True
        self._stage = gpuscope.stage(name, attributes=attributes)
        self._trace_header = trace_header.encode("latin-1")
        self._token = gpuscope.Token()

    def __enter__(self) -> None:
        self._stage.__enter__()
        if self._trace_header:
            self._token = gpuscope.here()

    def __exit__(self, *exception: object) -> None:
        if not self._ended:
            self._ended = True
            self._add_route()
            self._stage.__exit__(*exception)

    async def send(self, message: Message) -> None:
        """Pass a message on, and end the stage after the last one of the response."""
        if message["type"] == "http.response.start" and not self._ended:
            self._add_status(message["status"])
            message = _with_trace_id(message, self._trace_header, self._token)
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.__exit__(None, None, None)

    def _add_status(self, status: int) -> None:
        self._stage.set_attribute("http.response.status_code", status)
        if status >= _SERVER_ERROR:
            self._stage.set_attribute("error.type", str(status))

    def _add_route(self) -> None:
        path = getattr(self._scope.get("route"), "path", None)
        if isinstance(path, str):  # By now `root_path` includes the path that a sub-application is mounted at.
            self._stage.set_attribute("http.route", self._scope.get("root_path", "")[self._root :] + path)


def _with_trace_id(message: Message, header: bytes, token: gpuscope.Token) -> Message:
    """Return the head of a response with the trace's id, where that is wanted."""
    if not header or not token:
        return message
    return {**message, "headers": [*message.get("headers", ()), (header, f"{token.trace_id:032x}".encode())]}


class _Headers:
    """Reads the headers of an ASGI scope, for OpenTelemetry's propagators."""

    def get(self, carrier: Headers, key: str) -> list[str] | None:
        wanted = key.lower().encode("latin-1")
        return [value.decode("latin-1") for name, value in carrier if name.lower() == wanted] or None

    def keys(self, carrier: Headers) -> list[str]:
        return [name.decode("latin-1") for name, _ in carrier]


_HEADERS = cast("Getter[Headers]", _Headers())  # Not a subclass: OpenTelemetry is not imported here.


def _has_server_span() -> bool:
    """Whether someone else has made a span for the request, or has decided that it gets none."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return False
    span = trace.get_current_span()
    ids = span.get_span_context()
    if not ids.is_valid or ids.is_remote or type(span).__module__.startswith("gpuscope."):
        return False
    if getattr(span, "end_time", None) is not None:  # Of another request, which this connection has inherited.
        return False
    return getattr(span, "kind", None) is trace.SpanKind.SERVER or not span.is_recording()


class _Installed(Middleware):
    """The middleware of applications that are instrumented by name."""

    active = True

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        await (super().__call__ if self.active else self.app)(scope, receive, send)


def install() -> Callable[[], None]:
    """Put the middleware into applications of Starlette and FastAPI; return a function that takes it out again."""
    # Not at the top: other ASGI applications, wrapped by hand, need no Starlette.
    from starlette.applications import Starlette  # noqa: PLC0415

    _Installed.active = True
    originals: dict[type, Function] = {}
    _patch(Starlette, originals)

    @wrapt.when_imported("fastapi.applications")
    def patch_fastapi(applications: ModuleType) -> None:
        if originals:  # Not undone in the meantime.
            _patch(applications.FastAPI, originals)

    def undo() -> None:
        _Installed.active = False
        while originals:
            kind, original = originals.popitem()
            kind.build_middleware_stack = original  # type: ignore[attr-defined]

    return undo


def _patch(kind: type, originals: dict[type, Function]) -> None:
    original = vars(kind).get("build_middleware_stack")
    if original is None:  # It is inherited, and patched where it is defined.
        return
    originals[kind] = original

    @functools.wraps(original)
    def build_middleware_stack(self: object) -> object:
        stack = original(self)
        # Not around the outermost middleware: OpenTelemetry's instrumentation leaves an application alone whose
        # outermost middleware is not Starlette's own.
        if hasattr(stack, "app"):
            stack.app = _Installed(stack.app)
            return stack
        return _Installed(stack)

    kind.build_middleware_stack = build_middleware_stack  # type: ignore[attr-defined]
