"""
ASGI services; Starlette and FastAPI by name: each HTTP request is a stage, in the trace of whoever sent it.

The stage `request` lasts from the request's head to the last piece of the response's body, streamed or not; tasks in
the background run after it. Stages inside are its children, and `gpuscope.inject(headers)` there hands the trace on.
Nothing is buffered or changed, and websockets pass through. Where an instrumentation of OpenTelemetry has made a server
span, that is the request, and there is no stage beside it. At the end of the application's lifespan what was recorded
is exported, since uvicorn ends by the signal that it was sent, without handlers of `atexit`.

By name it takes applications whose first request is still to come. Any ASGI application can be wrapped by hand,
`app = Middleware(app)`.

Run against starlette 1.10.0, fastapi 0.165.0, uvicorn 0.54.0 and opentelemetry-instrumentation-fastapi 0.66b2.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import wrapt

import gpuscope

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]

MODULE = "starlette"
ALSO = "fastapi, starlette"
TARGETS = ()

_SERVER_ERROR = 500
_MARK = "gpuscope.request"
"""In the scope of a request that is a stage already, for applications mounted in others."""


class Middleware:
    """
    Makes each HTTP request to an ASGI application a stage.

    Args:
        app: the application.
        name: of the stage.

    """

    def __init__(self, app: Any, *, name: str = "request") -> None:
        gpuscope.stage(name)  # Refuses what can't be a name: here, and not with each request.
        self.app = app
        self.name = name

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Run the application, within a stage where that is called for."""
        if scope["type"] == "lifespan" and gpuscope.is_enabled():
            send = _flushing(send)
        if scope["type"] != "http" or _MARK in scope or not gpuscope.is_enabled() or _has_server_span():
            await self.app(scope, receive, send)
            return
        blocks = self._blocks(scope, send)
        if blocks is None:
            await self.app(scope, receive, send)
            return
        remote, request = blocks
        scope[_MARK] = True
        try:
            # The outer block also takes the stage out of this context where the response was sent by another task.
            with remote, request:
                await self.app(scope, receive, request.send)
        finally:
            scope.pop(_MARK, None)

    def _blocks(self, scope: Message, send: Send) -> tuple[Any, _Request] | None:
        """Return what the request runs in, or None where that can't be told."""
        try:
            return gpuscope.extract(scope["headers"], getter=_HEADERS), _Request(self.name, scope, send)
        except Exception:  # Of a propagator of the application's, or a scope of another kind: the request goes on.
            return None


def _flushing(send: Send) -> Send:
    async def send_on(message: Message) -> None:
        if message["type"] == "lifespan.shutdown.complete":
            gpuscope.flush()  # No request is left that this could hold up.
        await send(message)

    return send_on


class _Request:
    """The stage of one request, which ends once: with the body, or with the application."""

    def __init__(self, name: str, scope: Message, send: Send) -> None:
        self._scope, self._send, self._ended = scope, send, False
        self._root = len(scope.get("root_path", ""))
        attributes = {"http.request.method": scope["method"], "url.path": scope["path"]}
        self._stage = gpuscope.stage(name, attributes=attributes)

    def __enter__(self) -> None:
        self._stage.__enter__()

    def __exit__(self, *exception: object) -> None:
        if not self._ended:
            self._ended = True
            self._add_route()
            self._stage.__exit__(*exception)

    async def send(self, message: Message) -> None:
        """Pass a message on, and end the stage after the last of the response."""
        if message["type"] == "http.response.start" and not self._ended:
            self._add_status(message["status"])
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.__exit__(None, None, None)

    def _add_status(self, status: int) -> None:
        self._stage.set_attribute("http.response.status_code", status)
        if status >= _SERVER_ERROR:
            self._stage.set_attribute("error.type", str(status))

    def _add_route(self) -> None:
        path = getattr(self._scope.get("route"), "path", None)
        if isinstance(path, str):  # What an application is mounted at is in `root_path` by now.
            self._stage.set_attribute("http.route", self._scope.get("root_path", "")[self._root :] + path)


class _Headers:
    """Reads the headers of an ASGI scope, for OpenTelemetry's propagators."""

    def get(self, carrier: Any, key: str) -> list[str] | None:
        wanted = key.lower().encode("latin-1")
        return [value.decode("latin-1") for name, value in carrier if name.lower() == wanted] or None

    def keys(self, carrier: Any) -> list[str]:
        return [name.decode("latin-1") for name, _ in carrier]


_HEADERS: Any = _Headers()


def _has_server_span() -> bool:
    """Whether somebody else has made a span of the request, or has decided that it shall have none."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return False
    span = trace.get_current_span()
    ids = span.get_span_context()
    if not ids.is_valid or ids.is_remote:
        return False
    return getattr(span, "kind", None) is trace.SpanKind.SERVER or not span.is_recording()


class _Installed(Middleware):
    """What applications were given by name."""

    active = True

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        await (super().__call__ if self.active else self.app)(scope, receive, send)


def install() -> Callable[[], None]:
    """Put the middleware into applications of Starlette and FastAPI; return what takes it out again."""
    # Not above: other applications that are wrapped by hand need no Starlette.
    from starlette.applications import Starlette  # noqa: PLC0415

    _Installed.active = True
    originals: dict[type, Any] = {}
    _patch(Starlette, originals)

    @wrapt.when_imported("fastapi.applications")
    def patch_fastapi(applications: Any) -> None:
        if originals:  # Not undone meanwhile.
            _patch(applications.FastAPI, originals)

    def undo() -> None:
        _Installed.active = False
        while originals:
            kind, original = originals.popitem()
            kind.build_middleware_stack = original  # type: ignore[attr-defined]

    return undo


def _patch(kind: Any, originals: dict[type, Any]) -> None:
    original = vars(kind).get("build_middleware_stack")
    if original is None:  # Inherited, and patched there.
        return
    originals[kind] = original

    @functools.wraps(original)
    def build_middleware_stack(self: Any) -> Any:
        stack = original(self)
        # Not around the outermost: OpenTelemetry's instrumentation does without an application whose outermost
        # middleware is another than Starlette's own.
        if hasattr(stack, "app"):
            stack.app = _Installed(stack.app)
            return stack
        return _Installed(stack)

    kind.build_middleware_stack = build_middleware_stack
