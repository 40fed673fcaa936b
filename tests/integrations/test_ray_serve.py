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

hook = {"worker_process_setup_hook": "gpuscope.integrations.ray_serve.set_up_worker"}
ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100_000_000, runtime_env=hook)
serve.start(http_options={"port": int(sys.argv[1])})
front = serve.run(Front.bind(Detector.bind()))
detector = serve.get_deployment_handle("Detector", "default")
with gpuscope.stage("driver"):
    assert detector.remote(4).result() == 8
headers = {"traceparent": "00-" + "a1" * 16 + "-" + "b2" * 8 + "-01"}
request = urllib.request.Request(f"http://127.0.0.1:{sys.argv[1]}/?number=3", headers=headers)
assert urllib.request.urlopen(request).read() == b"6"
front.flush.remote().result()
detector.flush.remote().result()
serve.shutdown()
ray.shutdown()
"""


def test_a_trace_goes_through_handles_and_http(run_python, tmp_path):
    """A call by a handle, a request over HTTP and the call that it makes are part of the caller's trace."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    on = {"GPUSCOPE": "1", "GPUSCOPE_EXPORTER": "file", "GPUSCOPE_FILE": f"{tmp_path}/spans-{{pid}}.jsonl"}
    result = run_python(APPLICATION, str(port), **on, timeout=150)
    assert result.returncode == 0, result.stderr
    spans = {(span.trace_id[:6], span.name): span for span in spans_in(tmp_path)}
    (driver,) = (span for (_, name), span in spans.items() if name == "driver")
    by_handle = spans[driver.trace_id[:6], "ray.Detector.__call__"]
    assert by_handle.parent_id == driver.span_id
    assert spans[driver.trace_id[:6], "infer"].parent_id == by_handle.span_id
    parent_id = "b2" * 8
    for name in ("ray.Front.__call__", "parse", "ray.Detector.__call__", "infer"):
        assert spans["a1a1a1", name].parent_id == parent_id
        parent_id = spans["a1a1a1", name].span_id
    assert len({driver.instance, by_handle.instance, spans["a1a1a1", "parse"].instance}) == 3
