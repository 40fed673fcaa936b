"""Two GPUs in one process: each stage on its own device, and no context where the program has none."""

from __future__ import annotations

import pytest
import torch

import gpuscope
from gpuscope.testing import capture

ONE_DEVICE = """
import ctypes, json, torch, gpuscope
from gpuscope.testing import capture
torch.cuda.set_device({index})
x = torch.ones(8, device="cuda")
with capture(interval_s=0.001) as spans:
    for _ in range(20):
        with gpuscope.stage("work"):
            x.add_(1)
    assert gpuscope.flush(30)
cuda, active = ctypes.CDLL("libcuda.so.1"), []
for index in range(2):
    device, flags, state = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(state))
    active.append(state.value)
devices = sorted({{span.attributes["gpuscope.device.index"] for span in spans if span.kind == "gpu"}})
print(json.dumps([active, devices, len(spans)]))
"""


@pytest.fixture(autouse=True)
def _two_devices():
    """Skip where there are fewer."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")


def test_stages_belong_to_the_device_they_ran_on(gpu_of):
    """Stages on both devices in one process carry the index, name and UUID of their own."""
    buffers = [torch.ones(8, device=f"cuda:{index}") for index in (0, 1)]
    with capture(interval_s=0.001) as spans:
        for _ in range(20):
            for index, buffer in enumerate(buffers):
                with torch.cuda.device(index), gpuscope.stage(f"on {index}"):
                    buffer.add_(1)
    gpu = gpu_of(spans)
    hosts = [span for span in spans if span.kind == "host"]
    assert len(hosts) == len(gpu) == 40
    for host in hosts:
        index = int(host.name[-1])
        properties, attributes = torch.cuda.get_device_properties(index), gpu[host.span_id].attributes
        assert attributes["gpuscope.device.index"] == index
        assert attributes["hw.model"] == properties.name
        assert attributes["hw.id"] == f"GPU-{properties.uuid}"


def test_times_are_right_on_both_devices(cupti):
    """With streams of both devices in one run, durations and placements agree with CUPTI's."""
    streams = [torch.cuda.Stream(index) for index in (0, 1)]
    spins, indices = cupti.Spins(), []
    for stream in streams:
        spins.launch(stream, 1000)
        stream.synchronize()
    with capture() as spans, cupti.Window() as window:
        for _ in range(20):
            indices += [spins.launch(stream, 2_000_000) for stream in streams]
            for stream in streams:
                stream.synchronize()
    kernels, _ = cupti.pairs(window, indices)
    held, _ = cupti.differences(spans, kernels)
    assert len(held) > 20
    assert all(difference.is_right_duration() and difference.is_right_place() for difference in held)


def test_a_stage_of_the_other_device_leaves_the_current_one_alone(gpu_of):
    """`stage(..., stream=...)` with a stream of the other device is timed there, and the current device stays."""
    buffer, stream = torch.ones(8, device="cuda:1"), torch.cuda.Stream(1)
    torch.cuda.synchronize(1)
    with capture(interval_s=0.001) as spans, torch.cuda.device(0):
        with gpuscope.stage("there", stream=stream):
            assert torch.cuda.current_device() == 0
            with torch.cuda.stream(stream):
                buffer.add_(1)
        assert torch.cuda.current_device() == 0
    (host,) = (span for span in spans if span.kind == "host")
    assert gpu_of(spans)[host.span_id].attributes["gpuscope.device.index"] == 1


def test_graphs_of_both_devices_are_seen_inside():
    """Stages inside graphs of both devices, replayed in turns, are timed on their own."""

    def captured(index):
        with torch.cuda.device(index):
            graph = torch.cuda.CUDAGraph()
            # The stream that `torch.cuda.graph` takes by itself is of the device that captured first.
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(index)):
                for _ in range(2):
                    with gpuscope.stage(f"on {index}"):
                        torch.cuda._sleep(100_000)
            return graph

    with capture(interval_s=0.001) as spans:
        graphs = [captured(index) for index in (0, 1)]
        for _ in range(20):
            for index, graph in enumerate(graphs):
                with torch.cuda.device(index), gpuscope.stage("request"):
                    graph.replay()
        for index in (0, 1):
            torch.cuda.synchronize(index)
        assert gpuscope.flush(20)
    inner = [span for span in spans if span.attributes.get("gpuscope.graph")]
    assert len(inner) == 2 * 20 * 2
    for span in inner:
        assert span.name == f"on {span.attributes['gpuscope.device.index']} [gpu]"
        assert 20_000 < span.duration_ns < 200_000


@pytest.mark.parametrize("index", [0, 1])
def test_the_unused_device_gets_no_context(run_program, index):
    """Where the program uses one device, whichever, the other has no context afterwards."""
    active, devices, count = run_program(ONE_DEVICE.format(index=index))
    assert active == [int(number == index) for number in range(2)]
    assert devices == [index]
    assert count == 40
