"""ONNX Runtime: runs of real sessions, on the CPU, as stages."""

from __future__ import annotations

import numpy as np
import pytest

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

import gpuscope  # noqa: E402
from gpuscope.integrations import onnxruntime as integration  # noqa: E402
from gpuscope.testing import capture  # noqa: E402

INPUT = np.ones((2, 3), dtype=np.float32)


@pytest.fixture
def installed():
    """`InferenceSession` with its runs as stages."""
    undo = integration.install()
    yield undo
    undo()


@pytest.fixture(scope="module")
def session():
    """A session of a model that adds its input to itself."""
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "x"], ["y"])],
        "double",
        [value("x", onnx.TensorProto.FLOAT, ["batch", 3])],
        [value("y", onnx.TensorProto.FLOAT, ["batch", 3])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def runs(spans) -> list:
    """The host spans of runs."""
    assert gpuscope.flush()
    return [span for span in spans if span.name == "onnxruntime.run"]


@pytest.mark.parametrize("by_name", [False, True])
def test_a_run_is_a_stage(installed, session, by_name):
    """A run has its provider and the shape of each input, and returns what it returned."""
    arguments = {"output_names": None, "input_feed": {"x": INPUT}}
    with capture() as spans:
        (result,) = session.run(**arguments) if by_name else session.run(*arguments.values())
        assert (result == 2).all()
        (run,) = runs(spans)
    assert run.attributes["onnxruntime.provider"] == "CPUExecutionProvider"
    assert tuple(run.attributes["onnxruntime.input.x.shape"]) == (2, 3)


def test_values_of_onnx_runtimes_own_have_shapes_too(installed, session):
    """An `OrtValue` among the inputs is treated alike."""
    with capture() as spans:
        session.run(None, {"x": onnxruntime.OrtValue.ortvalue_from_numpy(INPUT)})
        (run,) = runs(spans)
    assert tuple(run.attributes["onnxruntime.input.x.shape"]) == (2, 3)


def test_a_run_by_binding_is_a_stage(installed, session):
    """So is a run whose inputs and outputs are bound."""
    binding = session.io_binding()
    binding.bind_cpu_input("x", INPUT)
    binding.bind_output("y")
    with capture() as spans:
        session.run_with_iobinding(binding)
        assert len(runs(spans)) == 1
    assert (binding.copy_outputs_to_cpu()[0] == 2).all()


def test_an_error_of_the_runtime_goes_on_and_is_noted(installed, session):
    """What the runtime refuses it refuses as ever, and the stage has the error."""
    with capture() as spans:
        with pytest.raises(ValueError, match="Required inputs"):
            session.run(None, {})
        (run,) = runs(spans)
    assert run.error.type == "ValueError"


def test_off_and_undone_it_is_as_before(session):
    """With recording off a run is not a stage; undone, the method is the one of before."""
    undo = integration.install()
    assert (session.run(None, {"x": INPUT})[0] == 2).all()
    undo()
    assert "run" not in vars(onnxruntime.InferenceSession)
    with capture() as spans:
        session.run(None, {"x": INPUT})
        assert runs(spans) == []


def test_the_stream_is_the_one_among_the_providers_options(monkeypatch):
    """The stream that the program gave the provider is the stage's; a provider without one has none."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda address, device: (address, device))
    options = {"CUDAExecutionProvider": {"user_compute_stream": "4711", "device_id": "1"}, "CPUExecutionProvider": {}}
    assert integration._find_stream(options) == (4711, 1)
    assert integration._find_stream({"CUDAExecutionProvider": {"user_compute_stream": "0"}}) is None
    assert integration._find_stream({"CPUExecutionProvider": {}}) is None
