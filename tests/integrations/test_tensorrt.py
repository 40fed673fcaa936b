"""TensorRT, which is not installed here: its class and its calls by a stand-in of the same shape."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

import gpuscope
from gpuscope.integrations import tensorrt as integration
from gpuscope.testing import capture


class ExecutionContext:
    """What is used of `tensorrt.IExecutionContext`."""

    name, active_optimization_profile = "context", 1
    engine = SimpleNamespace(name="resnet")

    def execute_async_v3(self, stream_handle):
        """Launch."""
        return stream_handle == 7

    def execute_v2(self, bindings):
        """Run and wait."""
        return bool(bindings)


@pytest.fixture
def tensorrt(monkeypatch):
    """A module in TensorRT's place, and what undoes its installation."""
    module = ModuleType("tensorrt")
    module.IExecutionContext = type("IExecutionContext", (ExecutionContext,), dict(vars(ExecutionContext)))
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


def launches(spans) -> list:
    """The host spans of launches."""
    assert gpuscope.flush()
    return [span for span in spans if span.name == "tensorrt.execute"]


def test_launches_are_stages(tensorrt):
    """Either way to run an engine is a stage with the engine's name, by place and by name of its arguments."""
    undo = integration.install()
    context = tensorrt.IExecutionContext()
    with capture() as spans:
        assert [context.execute_async_v3(7), context.execute_async_v3(stream_handle=7), context.execute_v2([1])] == [
            True
        ] * 3
        found = launches(spans)
    assert len(found) == 3
    assert found[0].attributes["tensorrt.engine"] == "resnet"
    assert found[0].attributes["tensorrt.profile"] == 1
    undo()
    with capture() as spans:
        assert context.execute_async_v3(7)
        assert launches(spans) == []


def test_one_context_can_be_wrapped(tensorrt):
    """A proxy's launches are stages, everything else is the context's, and other contexts are as they were."""
    context = tensorrt.IExecutionContext()
    proxy = integration.wrap(context)
    with capture() as spans:
        assert proxy.execute_async_v3(7)
        assert context.execute_async_v3(7)
        assert len(launches(spans)) == 1
    proxy.active_optimization_profile = 0
    assert (context.active_optimization_profile, proxy.name) == (0, "context")


def test_without_a_gpu_there_is_no_stream():
    """Where PyTorch has not begun to use a GPU, a launch has a host span alone."""
    assert integration._stream(7) is None
    assert integration._stream(None) is None


def test_methods_of_bindings_can_be_replaced():
    """Classes of pybind11, as TensorRT's are, take another method and give the old one back."""
    torch = pytest.importorskip("torch")
    kind = torch._C.Graph
    assert type(kind).__name__ == "pybind11_type"
    before = kind.nodes
    kind.nodes = integration._staged(before)
    assert kind.nodes.__wrapped__ is before
    kind.nodes = before
    assert kind.nodes is before
