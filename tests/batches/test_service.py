"""The batcher of the examples under load: every request is answered for, exactly once, in numbers that add up."""

from __future__ import annotations

import asyncio
import importlib.util
import random
import time
from collections import Counter
from pathlib import Path

import gpuscope
from gpuscope.testing import FakeDevice, capture

EXAMPLE = Path(__file__).parents[2] / "examples" / "batching.py"
REQUESTS = 2000


def example():
    """The module of the example."""
    spec = importlib.util.spec_from_file_location("batching_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Model:
    """Doubles what it is given; fails now and then, and takes a little while."""

    def __init__(self, chance):
        self.chance, self.batches, self.began_ns = chance, [], {}

    def __call__(self, items):
        """Run one batch."""
        self.began_ns |= dict.fromkeys(items, time.perf_counter_ns())
        self.batches.append(list(items))
        if self.chance.random() < 0.05:
            raise RuntimeError("the model failed")
        return [2 * item for item in items]


async def load(batcher, chance, asked_ns):
    """Send requests at Poisson arrivals, of which some are given up; return what came of each, and note when."""

    @gpuscope.stage("request")
    async def handle(number):
        """Answer one request."""
        with gpuscope.stage("parse") as stage:
            stage.set_attribute("number", number)
        asked_ns[number] = time.perf_counter_ns()
        return await batcher(number)

    serving = asyncio.create_task(batcher.serve())
    requests = []
    for number in range(REQUESTS):
        task = asyncio.create_task(handle(number))
        requests.append(task)
        if chance.random() < 0.1:
            asyncio.get_running_loop().call_later(chance.expovariate(500), task.cancel)
        if chance.random() < 0.5:
            await asyncio.sleep(chance.expovariate(4000))
    done = await asyncio.gather(*requests, return_exceptions=True)
    serving.cancel()
    return done


def test_every_request_is_in_one_batch_and_shares_add_up():
    """Two thousand requests with cancels and failures: integer equality, and waits as the client saw them."""
    chance = random.Random(7)
    model, asked_ns = Model(chance), {}
    batcher = example().Batcher(model, size=32, delay_s=0.001)
    device = FakeDevice(time.perf_counter_ns, completes=True)
    with capture(device=device, clock=time.perf_counter_ns) as spans:
        done = asyncio.run(load(batcher, chance, asked_ns))
        gpuscope.flush(30)
        statistics = gpuscope.statistics()
    came = Counter(type(each).__name__ for each in done)
    assert came["int"] > 1000
    assert came["CancelledError"] > 20
    assert came["RuntimeError"] > 10
    assert statistics.recorded == statistics.exported
    assert (statistics.batch_faults, statistics.pending) == ({}, 0)

    traces = {span.attributes["number"]: span.trace_id for span in spans if span.name == "parse"}
    hosts = {span.span_id: span for span in spans if span.kind == "host"}
    batches = [span for span in spans if span.name == "predict"]
    gpu = {span.parent_id: span for span in spans if span.name == "predict [gpu]"}
    light = {}
    for span in spans:
        if span.name == "predict (shared)":
            light.setdefault(span.links[0][1], []).append(span)
    served = [number for batch in model.batches for number in batch]
    assert Counter(traces[number] for number in served) == Counter(
        span.trace_id for members in light.values() for span in members
    )
    assert len(set(served)) == len(served)
    assert {number for number, each in enumerate(done) if each == 2 * number} <= set(served)
    assert statistics.shared_spans == {"exported": len(served)}
    assert len(batches) == len(model.batches)
    for batch in batches:
        members = light[batch.span_id]
        assert len(members) == batch.attributes["gpuscope.batch.size"] == len(batch.links)
        assert sum(span.attributes["gpuscope.gpu.share"] for span in members) == gpu[batch.span_id].duration_ns
        assert sorted(span.attributes["gpuscope.batch.position"] for span in members) == list(range(len(members)))
        assert {(span.trace_id, span.parent_id) for span in members} == {link[:2] for link in batch.links}
        for span in members:
            request = hosts[span.parent_id]
            assert (request.name, request.trace_id) == ("request", span.trace_id)
            assert span.status == batch.status
    numbers = {trace_id: number for number, trace_id in traces.items()}
    late_s = []
    for span in (span for members in light.values() for span in members):
        number, wait_s = numbers[span.trace_id], span.attributes["gpuscope.batch.wait"]
        late_s.append((model.began_ns[number] - asked_ns[number]) / 1e9 - wait_s)
    assert min(late_s) >= 0
    assert sorted(late_s)[len(late_s) * 9 // 10] < 0.001  # Not all: a busy machine may take the thread away in between.
    recording = spans.recording()
    assert recording.losses.orphans == 0
    assert not any(recording.losses.skipped_lines.values())
    assert len(recording.stage) == statistics.recorded
