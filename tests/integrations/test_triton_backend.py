"""Triton's Python backend, which runs in its server alone: models by a stand-in for its requests."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest

import gpuscope
from gpuscope.integrations.triton_backend import staged
from gpuscope.testing import capture

TRACE_ID, SPAN_ID = 0xA1 << 120, 0xB2 << 56
CONTEXT = json.dumps({"traceparent": f"00-{TRACE_ID:032x}-{SPAN_ID:016x}-01"})


def request(context=CONTEXT):
    """What is used of a `pb_utils.InferenceRequest`."""
    return SimpleNamespace(request_id=lambda: "r-1", trace=lambda: SimpleNamespace(get_context=lambda: context))


class Model:
    """A model in both its forms."""

    @staged
    def execute(self, requests):
        """Answer."""
        with gpuscope.stage("infer"):
            return [1 for _ in requests]

    @staged
    async def execute_async(self, requests):
        """Answer later."""
        await asyncio.sleep(0)
        return [1 for _ in requests]


def execute(*requests, asynchronous=False):
    """Run the model; return what it answers and its stage."""
    with capture() as spans:
        model = Model()
        answers = asyncio.run(model.execute_async([*requests])) if asynchronous else model.execute([*requests])
        assert gpuscope.flush()
        (span,) = (span for span in spans if span.name == "triton.execute")
    return answers, span


@pytest.mark.parametrize("asynchronous", [False, True])
def test_execute_is_a_stage_in_the_servers_trace(asynchronous):
    """The stage has the number of requests and the server's trace, whether the model is a coroutine function or not."""
    answers, span = execute(request(), request(), asynchronous=asynchronous)
    assert answers == [1, 1]
    assert (span.trace_id, span.parent_id) == (TRACE_ID, SPAN_ID)
    assert (span.attributes["batch_size"], span.attributes["triton.request_id"]) == (2, "r-1")


@pytest.mark.parametrize(
    "first", [request(""), request("{"), request("[]"), request(None), SimpleNamespace(request_id=str)]
)
def test_without_a_trace_of_the_servers_it_begins_one(first):
    """A server that does not trace, or is of an older version, changes nothing."""
    answers, span = execute(first)
    assert (answers, span.parent_id) == ([1], 0)


def test_no_requests_and_recording_off_are_fine():
    """An empty list is a stage without a trace; with recording off the model runs as it is."""
    assert execute()[0] == []
    assert Model().execute([request()]) == [1]
