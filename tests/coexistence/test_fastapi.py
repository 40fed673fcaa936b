"""OpenTelemetry's instrumentation of FastAPI: its server spans around stages, the application's spans inside them."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("opentelemetry.instrumentation.fastapi")
pytest.importorskip("httpx")

PROGRAM = """
import asyncio
import httpx
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.trace import TracerProvider
import gpuscope

provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(finished))
trace.set_tracer_provider(provider)
tracer, app = trace.get_tracer("app"), FastAPI()


@app.get("/threads")
def in_the_thread_pool():
    with gpuscope.stage("infer"), tracer.start_as_current_span("look up"):
        return "pooled"


@app.get("/loop")
async def in_the_loop():
    with gpuscope.stage("infer"):
        await asyncio.sleep(0)
        with tracer.start_as_current_span("look up"):
            await asyncio.sleep(0)
    return "looped"


@app.get("/stream")
async def stream():
    @gpuscope.stage("decode")
    async def tokens():
        for index in range(3):
            with tracer.start_as_current_span("token"):
                await asyncio.sleep(0)
            yield str(index)

    return StreamingResponse(tokens())


@app.get("/fails")
def fails():
    with gpuscope.stage("infer"):
        raise ValueError


FastAPIInstrumentor.instrument_app(app, exclude_spans=["send", "receive"])


async def main():
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        paths = ["/threads", "/loop"] * 3 + ["/stream", "/fails"]
        answers = await asyncio.gather(*map(client.get, paths))
        return [[answer.status_code, answer.text] for answer in answers]


answers = asyncio.run(main())
assert gpuscope.flush(10)
print_as_json(answers=answers)
"""
STAGES = ("infer", "decode")


def others(spans):
    """The spans that are no stages, with status and attributes, and what would lie above them without stages."""
    rows = []
    for path, status, attributes in spans:
        name, *above = path.split(" < ")
        if name not in STAGES:
            rows.append(str((name, [n for n in above if n not in STAGES], status, sorted(attributes.items()))))
    return sorted(rows)


def test_stages_lie_between_the_server_spans_and_the_applications(ask_for_spans):
    """
    Concurrent requests, in the thread pool and in the loop: each stage lies in its own request's span.

    A streaming response's stages, one a chunk and one for its end, do so too; an error is a stage's and a request's.
    Answers, and the other spans with their status and attributes, are the same as with gpuscope off.
    """
    watched, plain = ask_for_spans(PROGRAM, GPUSCOPE="1"), ask_for_spans(PROGRAM)
    assert Counter((path, status) for path, status, _ in watched["spans"]) == {
        ("GET /threads", "UNSET"): 3,
        ("infer < GET /threads", "UNSET"): 3,
        ("look up < infer < GET /threads", "UNSET"): 3,
        ("GET /loop", "UNSET"): 3,
        ("infer < GET /loop", "UNSET"): 3,
        ("look up < infer < GET /loop", "UNSET"): 3,
        ("GET /stream", "UNSET"): 1,
        ("decode < GET /stream", "UNSET"): 4,
        ("token < decode < GET /stream", "UNSET"): 3,
        ("GET /fails", "ERROR"): 1,
        ("infer < GET /fails", "ERROR"): 1,
    }
    assert watched["answers"] == plain["answers"]
    assert others(watched["spans"]) == others(plain["spans"])
