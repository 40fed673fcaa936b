"""Ray Serve: a real cluster on this machine, one trace over driver, proxy and replicas."""

from __future__ import annotations

import socket

import pytest

pytest.importorskip("ray")
pytest.importorskip("ray.serve")

from ..spans_of_files import spans_in

APPLICATION = """
import sys, urllib.request
import ray
from ray import serve
import gpuscope
from gpuscope.instrument import instrument

instrument(frameworks="ray_serve")

@serve.deployment
class Detector:
    async def __call__(self, number):
        with gpuscope.stage("infer"):
            return 2 * number

    async def flush(self):
        assert gpuscope.flush(30)

@serve.deployment
class Front:
    def __init__(self, detector):
        self.detector = detector

    async def __call__(self, request):
        with gpuscope.stage("parse"):
            return await self.detector.remote(int(request.query_params["number"]))

    async def flush(self):
        assert gpuscope.flush(30)

@serve.deployment
class Doubler:
    @serve.batch(max_batch_size=3, batch_wait_timeout_s=20)
    async def double(self, numbers):
        with gpuscope.stage("forward"):
            if 13 in numbers:
                raise ValueError("thirteen")
            return [2 * number for number in numbers]

    async def __call__(self, number):
        return await self.double(number)

    async def flush(self):
        assert gpuscope.flush(30)

hook = {"worker_process_setup_hook": "gpuscope.integrations.ray_serve.set_up_worker"}
ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100_000_000, runtime_env=hook)
serve.start(http_options={"port": int(sys.argv[1])})
front = serve.run(Front.bind(Detector.bind()))
detector = serve.get_deployment_handle("Detector", "default")
with gpuscope.stage("driver"):
    assert detector.remote(4).result() == 8
doubler = serve.run(Doubler.bind(), name="doubling", route_prefix=None)
for numbers in ((1, 2, 3), (4, 13, 5)):
    answers = []
    for number in numbers:
        with gpuscope.stage("caller"):
            answers.append(doubler.remote(number))
    try:
        assert [answer.result() for answer in answers] == [2, 4, 6]
    except ValueError:
        assert 13 in numbers
headers = {"traceparent": "00-" + "a1" * 16 + "-" + "b2" * 8 + "-01"}
request = urllib.request.Request(f"http://127.0.0.1:{sys.argv[1]}/?number=3", headers=headers)
assert urllib.request.urlopen(request).read() == b"6"
front.flush.remote().result()
detector.flush.remote().result()
doubler.flush.remote().result()
serve.shutdown()
ray.shutdown()
"""


@pytest.fixture
def spans_of_cluster(run_python, tmp_path):
    """Every span of a cluster's processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    on = {"GPUSCOPE": "1", "GPUSCOPE_EXPORTER": "file", "GPUSCOPE_FILE": f"{tmp_path}/spans-{{pid}}.jsonl"}
    result = run_python(APPLICATION, str(port), **on, timeout=150)
    assert result.returncode == 0, result.stderr
    return spans_in(tmp_path)


def test_a_trace_goes_through_handles_and_http(spans_of_cluster):
    """A call by a handle, a request over HTTP and the call that it makes are part of the caller's trace."""
    spans = {(span.trace_id[:6], span.name): span for span in spans_of_cluster}
    (driver,) = (span for (_, name), span in spans.items() if name == "driver")
    by_handle = spans[driver.trace_id[:6], "ray.Detector.__call__"]
    assert by_handle.parent_id == driver.span_id
    assert spans[driver.trace_id[:6], "infer"].parent_id == by_handle.span_id
    parent_id = "b2" * 8
    for name in ("ray.Front.__call__", "parse", "ray.Detector.__call__", "infer"):
        assert spans["a1a1a1", name].parent_id == parent_id
        parent_id = spans["a1a1a1", name].span_id
    assert len({driver.instance, by_handle.instance, spans["a1a1a1", "parse"].instance}) == 3


def test_a_batch_belongs_to_all_its_calls(spans_of_cluster):
    """What `serve.batch` decorates is linked with each call of its batch, the first as the others; failed ones too."""
    calls = {span.span_id: span for span in spans_of_cluster if span.name == "ray.Doubler.__call__"}
    callers = {span.span_id for span in spans_of_cluster if span.name == "caller"}
    assert {call.parent_id for call in calls.values()} == callers
    batches = [span for span in spans_of_cluster if span.name == "ray.Doubler.double.batch"]
    assert [len(batch.links) for batch in batches] == [3, 3]
    assert {span_id for batch in batches for _, span_id in batch.links} == set(calls)
    for batch in batches:
        assert batch.trace_id not in {call.trace_id for call in calls.values()}
        assert [s.parent_id for s in spans_of_cluster if s.name == "forward" and s.trace_id == batch.trace_id] == [
            batch.span_id
        ]
    light = [span for span in spans_of_cluster if span.name == "ray.Doubler.double.batch (shared)"]
    assert sorted((span.trace_id, span.parent_id) for span in light) == sorted(
        (call.trace_id, call.span_id) for call in calls.values()
    )
    assert all(0 <= span.attributes["gpuscope.batch.wait"] < 20 for span in light)
