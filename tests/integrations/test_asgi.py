"""ASGI: requests as stages, over real Starlette and FastAPI applications and a real uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")

import httpx
from opentelemetry import context, propagate, trace
from opentelemetry.sdk.trace import TracerProvider
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware as Plugged
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route

import gpuscope
from gpuscope.analysis.figures import figures
from gpuscope.instrument import _frameworks
from gpuscope.integrations import asgi
from gpuscope.testing import capture

TRACE_ID, SPAN_ID = 0xA1 << 120, 0xB2 << 56
HEADERS = {"traceparent": f"00-{TRACE_ID:032x}-{SPAN_ID:016x}-01"}


def get(app, path="/", headers=HEADERS, **options):
    """Ask an application within this process for a page."""

    async def ask():
        """Ask once."""
        transport = httpx.ASGITransport(app, **options)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(ask())


def infer(request):
    """A handler, in a thread of its own, that hands the trace on."""
    outgoing: dict[str, str] = {}
    with gpuscope.stage("infer"):
        gpuscope.inject(outgoing)
    return JSONResponse(outgoing)


async def fail(request):
    """A handler that fails."""
    raise ValueError("no")


async def refuse(request):
    """A handler that answers with an error."""
    return PlainTextResponse("busy", status_code=503)


ROUTES = [Route("/infer/{size}", infer), Route("/fail", fail), Route("/refuse", refuse)]


def host_spans(spans) -> dict:
    """Host spans by name."""
    assert gpuscope.flush()
    return host_spans_of(spans)


def host_spans_of(spans) -> dict:
    """The same, once recording has ended."""
    return {span.name: span for span in spans if span.kind == "host"}


@pytest.fixture
def installed():
    """Starlette and FastAPI with the middleware that is put into them by name."""
    undo = asgi.install()
    yield undo
    undo()


class TestRequest:
    """One request."""

    def test_it_is_a_stage_in_the_callers_trace(self):
        """The request is a child of the span in its headers, stages in the handler are its children."""
        with capture() as spans:
            response = get(asgi.Middleware(Starlette(routes=ROUTES)), "/infer/8")
        found = host_spans(spans)
        request, inner = found["request"], found["infer"]
        assert (request.trace_id, request.parent_id) == (TRACE_ID, SPAN_ID)
        assert (inner.trace_id, inner.parent_id) == (TRACE_ID, request.span_id)
        assert response.json()["traceparent"] == f"00-{TRACE_ID:032x}-{inner.span_id:016x}-01"

    def test_its_attributes_are_those_of_opentelemetry(self):
        """Method, path, route and status have their names in the conventions; the route is the whole route."""
        app = asgi.Middleware(Starlette(routes=[Mount("/v1", app=Starlette(routes=ROUTES))]))
        with capture() as spans:
            get(app, "/v1/infer/8")
        attributes = host_spans(spans)["request"].attributes
        assert attributes["http.request.method"] == "GET"
        assert attributes["url.path"] == "/v1/infer/8"
        assert attributes["http.route"] == "/v1/infer/{size}"
        assert attributes["http.response.status_code"] == 200

    def test_without_headers_it_begins_a_trace(self):
        """Two requests that nobody traces are two traces."""
        app = asgi.Middleware(Starlette(routes=ROUTES))
        with capture() as spans:
            get(app, "/infer/1", {})
            get(app, "/infer/1", {})
            assert gpuscope.flush()
        requests = [span for span in spans if span.name == "request"]
        assert [span.parent_id for span in requests] == [0, 0]
        assert len({span.trace_id for span in requests}) == 2

    def test_an_exception_is_noted_and_goes_on(self):
        """A handler that fails fails as without us, and the request has the error."""
        with capture() as spans, pytest.raises(ValueError, match="no"):
            get(asgi.Middleware(Starlette(routes=ROUTES)), "/fail")
        # Starlette answers with 500, which ends the request, before it hands the exception on.
        assert host_spans(spans)["request"].attributes["error.type"] == "500"

    def test_an_error_of_the_server_is_an_error(self):
        """A status from 500 on is the request's `error.type`, its span's status, and counts in summary and report."""
        with capture(warmup=0) as spans:
            assert get(asgi.Middleware(Starlette(routes=ROUTES)), "/refuse").status_code == 503
            assert gpuscope.flush()
            (line,) = gpuscope.summary().stages
        request = host_spans(spans)["request"]
        assert (request.attributes["error.type"], request.status, request.description) == ("503", "ERROR", "")
        (reported,) = figures(spans.recording()).requests
        assert (line.errors, reported.errors) == (1, 1)

    def test_an_error_of_the_client_is_none(self):
        """OpenTelemetry leaves the status of a server's span unset for 4xx."""
        with capture() as spans:
            assert get(asgi.Middleware(Starlette(routes=ROUTES)), "/nowhere").status_code == 404
        request = host_spans(spans)["request"]
        assert (request.status, "error.type" in request.attributes) == ("UNSET", False)

    @pytest.mark.parametrize(
        ("headers", "is_kept"),
        [({}, False), ({"X-Force-Trace": "1"}, True), ({"x-force-trace": "0"}, False), ({"x-force": "1"}, False)],
    )
    def test_a_header_keeps_the_trace(self, headers, is_kept):
        """Where `keep` names one; a header that says no does not."""
        with capture(keep="slower=1h, header=X-Force-Trace") as spans:
            get(asgi.Middleware(Starlette(routes=ROUTES)), "/infer/1", headers)
            assert gpuscope.flush()
            assert {span.name for span in spans} == ({"request", "infer"} if is_kept else set())

    @pytest.mark.parametrize("keep", ["", "slower=1h"])
    def test_no_header_keeps_a_trace_unless_it_is_named(self, keep):
        """Otherwise every client could have traces stored."""
        with capture(keep=keep) as spans:
            get(asgi.Middleware(Starlette(routes=ROUTES)), "/infer/1", {"x-force-trace": "1"})
        assert {span.name for span in spans} == (set() if keep else {"request", "infer"})
        assert not any("gpuscope.keep" in span.attributes for span in spans)

    def test_an_error_of_the_server_keeps_the_trace(self):
        """Starlette answers with 500 and the exception leaves no stage of ours, and 503 is no exception at all."""
        with capture(keep="error") as spans:
            app = asgi.Middleware(Starlette(routes=ROUTES))
            assert get(app, "/infer/1", {}).status_code == 200
            assert get(app, "/refuse", {}).status_code == 503
        assert [span.attributes["url.path"] for span in spans if span.name == "request"] == ["/refuse"]

    @pytest.mark.parametrize("headers", [HEADERS, {}])
    def test_the_response_says_which_trace_is_its(self, headers):
        """In the header that is asked for, beside those of the application."""
        with capture(trace_header="X-Trace-Id") as spans:
            response = get(asgi.Middleware(Starlette(routes=ROUTES)), "/infer/1", headers)
        request = host_spans_of(spans)["request"]
        assert response.headers["x-trace-id"] == f"{request.trace_id:032x}"
        assert response.headers["content-type"] == "application/json"

    def test_the_response_says_nothing_unless_asked(self):
        """The application's headers are as it made them."""
        with capture(keep="slower=1h, header=x-force-trace"):
            response = get(asgi.Middleware(Starlette(routes=ROUTES)), "/infer/1")
        assert set(response.headers) == {"content-length", "content-type"}

    def test_the_end_of_the_application_is_in_the_log(self, caplog):
        """With what came of it: uvicorn ends itself by a signal then, and nothing that runs at exit does."""

        async def app(scope, receive, send):
            """An application that has ended."""
            await send({"type": "lifespan.shutdown.complete"})

        async def nothing(*_):
            """Receive and send nothing."""

        with capture(), caplog.at_level("INFO", "gpuscope"):
            get(asgi.Middleware(Starlette(routes=ROUTES)), "/infer/1")
            asyncio.run(asgi.Middleware(app)({"type": "lifespan"}, nothing, nothing))
        assert "the application ends; stages recorded: 2, exported: 2." in caplog.messages

    def test_what_follows_in_the_callers_context_is_not_part_of_it(self):
        """A caller in the same task, such as a test's client, has its own stages as before."""

        async def app(scope, receive, send):
            """An application that lets another task answer."""

            async def respond():
                """Answer."""
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": b""})

            await asyncio.create_task(respond())  # Another task ends the request than the one that began it.

        async def main():
            """Call the application as a server or a client in the same task would."""
            scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "root_path": ""}

            async def nothing(*_):
                """Receive and send nothing."""

            await asgi.Middleware(app)(scope, nothing, nothing)
            with gpuscope.stage("after"):
                pass
            return scope

        with capture() as spans:
            scope = asyncio.run(main())
        found = host_spans(spans)
        assert found["after"].parent_id == 0
        assert found["after"].trace_id != found["request"].trace_id
        assert set(scope) == {"type", "method", "path", "headers", "root_path"}

    def test_websockets_pass_through(self):
        """A websocket reaches the application with the very callables of the server."""
        seen = []

        async def app(*arguments):
            """Keep what it is called with."""
            seen.append(arguments)

        sent = ({"type": "websocket"}, object(), object())
        with capture() as spans:
            asyncio.run(asgi.Middleware(app)(*sent))
        assert seen == [sent]
        assert host_spans(spans) == {}

    def test_off_it_is_not_there(self):
        """With recording off the application gets the very callables of the server."""
        seen = []

        async def app(*arguments):
            """Keep what it is called with."""
            seen.append(arguments)

        sent = ({"type": "http"}, object(), object())
        asyncio.run(asgi.Middleware(app)(*sent))
        assert seen == [sent]


class TestStreaming:
    """Responses that come in pieces."""

    @pytest.mark.parametrize("middleware", [[], [Plugged(BaseHTTPMiddleware, dispatch=lambda r, go_on: go_on(r))]])
    def test_the_stage_lasts_until_the_last_piece_and_not_until_the_background_is_done(self, middleware):
        """The pieces are made within the request, and what runs after them does so after it."""
        order = []

        async def pieces():
            """Three pieces, each of which is a stage."""
            for number in range(3):
                order.append(number)
                with gpuscope.stage(f"piece-{number}"):
                    yield b"x"

        async def later():
            """What is done in the background."""
            await asyncio.sleep(0)
            with gpuscope.stage("later"):
                order.append("later")

        async def handler(request):
            """Stream."""
            return StreamingResponse(pieces(), background=BackgroundTask(later))

        app = Starlette(routes=[Route("/", handler)], middleware=middleware)
        with capture() as spans:
            assert get(asgi.Middleware(app)).content == b"xxx"
        found = host_spans(spans)
        request = found["request"]
        for number in range(3):
            piece = found[f"piece-{number}"]
            assert piece.parent_id == request.span_id
            assert request.start_ns <= piece.start_ns <= piece.end_ns <= request.end_ns
        assert found["later"].start_ns >= request.end_ns
        assert found["later"].trace_id == TRACE_ID

    def test_nothing_is_buffered(self):
        """Each message of the application is with the server before the application goes on."""
        got, seen = [], []

        async def app(scope, receive, send):
            """Answer in three pieces."""
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for number in range(3):
                await send({"type": "http.response.body", "body": b"x", "more_body": number < 2})
                seen.append(len(got))

        async def receive():
            """Refuse to be asked."""
            raise AssertionError("nobody asked for the body")

        async def send(message):
            """Keep what is sent."""
            got.append(message)

        with capture():
            asyncio.run(asgi.Middleware(app)(http_scope(), receive, send))
        assert seen == [2, 3, 4]


def http_scope() -> dict:
    """A request's scope, as a server makes it."""
    return {"type": "http", "method": "GET", "path": "/", "headers": [], "root_path": ""}


class TestByName:
    """Put into Starlette and FastAPI."""

    @pytest.mark.parametrize("kind", ["starlette", "fastapi"])
    def test_applications_need_no_change(self, installed, kind):
        """An application that is made as ever has a stage for each request, once, mounted applications included."""
        if kind == "fastapi":
            app = pytest.importorskip("fastapi").FastAPI()
            app.add_api_route("/infer/{size}", lambda size: {"size": size})
        else:
            app = Starlette(routes=ROUTES)
        outer = Starlette(routes=[Mount("/v1", app=app)])
        with capture() as spans:
            assert get(outer, "/v1/infer/8").status_code == 200
            assert gpuscope.flush()
        (request,) = (span for span in spans if span.name == "request")
        assert (request.trace_id, request.parent_id) == (TRACE_ID, SPAN_ID)
        assert request.attributes["http.route"] == "/v1/infer/{size}"

    def test_it_can_be_undone(self, installed):
        """Afterwards new applications are as they were, and those of before have no more stages."""
        before = Starlette(routes=ROUTES)
        with capture() as spans:
            get(before, "/infer/1")
            installed()
            get(before, "/infer/1")
            get(Starlette(routes=ROUTES), "/infer/1")
            assert gpuscope.flush()
        assert [span.name for span in spans if span.kind == "host"].count("request") == 1
        assert not hasattr(Starlette.build_middleware_stack, "__wrapped__")

    def test_a_server_span_of_opentelemetrys_instrumentation_is_the_request(self, installed, monkeypatch):
        """Where their middleware is at work there is no second request, and stages are children of its span."""
        fastapi = pytest.importorskip("fastapi")
        instrumentation = pytest.importorskip("opentelemetry.instrumentation.fastapi")
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        provider, finished = TracerProvider(), InMemorySpanExporter()
        provider.add_span_processor(SimpleSpanProcessor(finished))
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
        app = fastapi.FastAPI()

        @app.get("/work")
        def work():
            with gpuscope.stage("infer"):
                return 1

        instrumentation.FastAPIInstrumentor.instrument_app(app, tracer_provider=provider)
        with capture() as spans:
            assert get(app, "/work").status_code == 200
        found = host_spans(spans)
        (server,) = (span for span in finished.get_finished_spans() if span.kind is trace.SpanKind.SERVER)
        assert set(found) == {"infer"}
        assert (found["infer"].trace_id, found["infer"].parent_id) == (TRACE_ID, server.context.span_id)
        assert server.parent.span_id == SPAN_ID
        context.attach(context.Context())


@pytest.mark.parametrize("ask", ["alone", "mounted"], indirect=True)
class TestInASpanOfTheServer:
    """OpenTelemetry's middleware has made a span of the request, so that there is no stage `request`."""

    @pytest.fixture
    def ask(self, installed, monkeypatch, request):
        """Return a function that asks such an application once and returns the response and the server's trace id."""
        is_mounted = request.param == "mounted"
        fastapi = pytest.importorskip("fastapi")
        instrumentation = pytest.importorskip("opentelemetry.instrumentation.fastapi")
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        provider, finished = TracerProvider(), InMemorySpanExporter()
        provider.add_span_processor(SimpleSpanProcessor(finished))
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
        app = outer = fastapi.FastAPI()
        if is_mounted:
            app = fastapi.FastAPI()
            outer.mount("/v1", app)

        @app.get("/{status}" if is_mounted else "/v1/{status}")
        def work(status: int):
            """Answer after a stage, with a status that is no exception, or with one."""
            with gpuscope.stage("infer"):
                pass
            if not status:
                raise ValueError("no")
            return fastapi.Response(status_code=status)

        instrumentation.FastAPIInstrumentor.instrument_app(outer, tracer_provider=provider)

        def ask_once(status=200, headers=None):
            finished.clear()
            response = get(outer, f"/v1/{status}", headers or {}, raise_app_exceptions=False)
            spans = [span for span in finished.get_finished_spans() if span.kind is trace.SpanKind.SERVER]
            # The one of the mounted application begins a trace, of which the handler's stage is.
            return response, spans[-1].context.trace_id

        yield ask_once
        context.attach(context.Context())

    @pytest.mark.parametrize(("value", "is_kept"), [("1", True), ("0", False), (None, False)])
    def test_a_header_keeps_the_trace(self, ask, value, is_kept):
        """As it does where the request is a stage."""
        with capture(keep="slower=1h, header=x-force-trace") as spans:
            _, trace_id = ask(headers={} if value is None else {"x-force-trace": value})
            assert gpuscope.flush()
            account = gpuscope.statistics()
            assert {(span.name, span.trace_id) for span in spans} == ({("infer", trace_id)} if is_kept else set())
            assert account.kept == ({"asked": 1} if is_kept else {"left_out": 1})

    @pytest.mark.parametrize("keep", ["", "slower=1h"])
    def test_the_response_says_which_trace_is_its(self, ask, keep):
        """Once, also where applications are mounted in others, and whether or not it is kept."""
        with capture(keep=keep, trace_header="X-Trace-Id"):
            response, trace_id = ask()
            assert response.headers.get_list("x-trace-id") == [f"{trace_id:032x}"]
        with capture(keep=keep):
            assert "x-trace-id" not in ask()[0].headers

    @pytest.mark.parametrize("rule", ["error", "slower=1h"])
    def test_an_error_of_the_server_keeps_the_trace(self, ask, rule):
        """A status from 500 on, or an exception that leaves the application; where that is a rule."""
        with capture(keep=rule) as spans:
            traces = [ask(status)[1] for status in (200, 503, 404, 0)]
            assert gpuscope.flush()
            assert [span.trace_id for span in spans] == ([traces[1], traces[3]] if rule == "error" else [])


def test_a_trace_that_the_sampler_leaves_out_is_not_kept():
    """Nor counted as one."""
    with capture(keep="slower=1h, header=x-force-trace") as spans:
        ids = trace.SpanContext(5 << 64 | 1 << 63, 7, is_remote=False, trace_flags=trace.TraceFlags(0))
        with trace.use_span(trace.NonRecordingSpan(ids)):
            get(asgi.Middleware(Starlette(routes=ROUTES)), "/infer/1", {"x-force-trace": "1"})
        assert gpuscope.flush()
        assert not spans
        assert gpuscope.statistics().kept == {}


@contextlib.contextmanager
def served(app):
    """Serve an application by uvicorn, in a thread, on a port of the system's choice."""
    uvicorn = pytest.importorskip("uvicorn")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    started = threading.Event()
    startup = server.startup

    async def announce(sockets=None):
        """Say that the server listens."""
        await startup(sockets)
        started.set()

    server.startup = announce
    thread.start()
    try:
        assert started.wait(20)
        yield SimpleNamespace(port=server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(20)


def test_a_real_server_streams_and_keeps_connections(installed):
    """Over one connection of a real uvicorn two requests are two stages, each as long as its streamed body."""

    async def pieces():
        """Three pieces, each of which is a stage."""
        for _ in range(3):
            with gpuscope.stage("piece"):
                yield b"x" * 1000

    async def handler(request):
        """Stream."""
        return StreamingResponse(pieces())

    with capture() as spans, served(Starlette(routes=[Route("/", handler)])) as service:
        with httpx.Client(base_url=f"http://127.0.0.1:{service.port}") as client:
            assert {len(client.get("/", headers=HEADERS).content) for _ in range(2)} == {3000}
        assert gpuscope.flush()
    requests = [span for span in spans if span.name == "request"]
    assert [(span.trace_id, span.parent_id) for span in requests] == [(TRACE_ID, SPAN_ID)] * 2
    for request in requests:
        pieces_of = [span for span in spans if span.parent_id == request.span_id]
        assert len(pieces_of) == 3
        assert max(piece.end_ns for piece in pieces_of) <= request.end_ns


class TestKeptConnections:
    """A server may run a request in the context of the connection's last one, as uvicorn does after a large body."""

    @pytest.mark.parametrize("provided", [False, True], ids=["alone", "with a provider"])
    @pytest.mark.parametrize("first", [None, HEADERS], ids=["", "after a remote trace"])
    @pytest.mark.parametrize("kind", [None, trace.SpanKind.SERVER, trace.SpanKind.INTERNAL])
    def test_each_request_is_a_trace_of_its_own(self, provided, first, kind, monkeypatch):
        """Without a trace of its own it is a root, and with one it belongs to that; ended spans are nobody's."""
        tracer = TracerProvider().get_tracer("of the application")
        if provided:
            monkeypatch.setattr(trace, "_TRACER_PROVIDER", TracerProvider())
        contexts = []

        async def app(scope, receive, send):
            """Answer once the body is read."""
            with tracer.start_as_current_span("handle", kind=kind) if kind else contextlib.nullcontext():
                contexts.append(contextvars.copy_context())
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        async def receive():
            """Give the body piece by piece."""
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            """Take the answer."""

        def serve(headers):
            encoded = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
            scope = {"type": "http", "method": "POST", "path": "/", "headers": encoded}
            where = contexts[-1] if contexts else contextvars.copy_context()
            where.run(asyncio.run, asgi.Middleware(app)(scope, receive, send))

        with capture() as spans:
            for headers in (first, None, None, HEADERS, None):
                serve(headers)
        requests = [span for span in spans if span.name == "request" and span.kind == "host"]
        alone = [span for span in requests if span.trace_id != TRACE_ID]
        assert len(requests) == 5
        assert len({span.trace_id for span in alone}) == len(alone) == (3 if first else 4)
        assert all(not span.parent_id for span in alone)
        assert {span.parent_id for span in requests if span.trace_id == TRACE_ID} == {SPAN_ID}


def test_it_goes_by_the_names_that_people_try():
    """`fastapi` and `starlette` name the same file."""
    assert _frameworks.modules_of(["fastapi"]) == _frameworks.modules_of(["starlette", "asgi"]) == {"asgi": "starlette"}


def test_a_propagator_that_fails_costs_the_trace_and_not_the_request(monkeypatch):
    """The application's propagators are its own; what they raise when asked for us is not the request's affair."""

    class Broken(propagate.textmap.TextMapPropagator):
        """Raises, in either direction."""

        fields = frozenset()

        def extract(self, *args, **kwargs):
            """Raise."""
            raise ValueError("broken")

        inject = extract

    monkeypatch.setattr(propagate, "_HTTP_TEXT_FORMAT", Broken())
    app = Starlette(routes=[Route("/refuse", refuse)])
    with capture() as spans:
        assert get(asgi.Middleware(app), "/refuse").text == "busy"
    assert "request" in {span.name for span in spans}
