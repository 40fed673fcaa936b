"""Roboflow inference-models, the real package: a classifier of its own with random weights."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
inference_models = pytest.importorskip("inference_models")

from inference_models.models.common.roboflow.model_packages import InferenceConfig  # noqa: E402
from inference_models.models.resnet.resnet_classification_torch import (  # noqa: E402
    ResNetClassifier,
    ResNetForClassificationTorch,
)

from .models_recorded import attributes, paths, recorded  # noqa: E402

CONFIG = {
    "network_input": {
        "training_input_size": {"height": 32, "width": 32},
        "dynamic_spatial_size_supported": False,
        "color_mode": "rgb",
        "resize_mode": "stretch",
        "input_channels": 3,
        "scaling_factor": 255,
    },
    "post_processing": {"type": "softmax", "fused": False},
}
STEPS = ["infer", "infer/pre_process", "infer/forward", "infer/post_process"]
IMAGE = np.full((48, 48, 3), 100, np.uint8)


@pytest.fixture(scope="module")
def model() -> ResNetForClassificationTorch:
    """A classifier as the package loads them, but for its weights."""
    torch.manual_seed(0)
    network = ResNetClassifier(timm.create_model("resnet10t", num_classes=3), softmax_fused=False).eval()
    return ResNetForClassificationTorch(network, InferenceConfig(**CONFIG), ["a", "b", "c"], torch.device("cpu"))


def test_a_call_has_its_three_steps(model):
    """A call is `infer` with `pre_process`, `forward` and `post_process` in it; the answer is the same."""
    plain = model(IMAGE)
    with recorded("inference_models") as spans:
        answer = model(IMAGE)
    assert torch.equal(answer.confidence, plain.confidence)
    assert paths(spans) == STEPS
    assert attributes(spans, "forward") == [{"model": "ResNetForClassificationTorch"}]


def test_an_error_ends_its_stages(model):
    """What cannot be read fails as it does without us, and the stages around it say so."""
    with recorded("inference_models") as spans:
        with pytest.raises(Exception, match=r".") as failure:
            model(object())
        model(IMAGE)
    assert [(span.name, span.status) for span in spans[:2]] == [("infer", "ERROR"), ("pre_process", "ERROR")]
    assert spans[0].attributes["error.type"].endswith(type(failure.value).__name__)
    assert paths(spans)[2:] == STEPS


def test_every_class_of_the_table_is_there():
    """The installed version has what the table names, so that no line of it is for nothing."""
    import importlib

    for target in importlib.import_module("gpuscope.integrations.inference_models").TARGETS:
        owner = importlib.import_module(target.module)
        for name in target.qualified_name.split("."):
            owner = getattr(owner, name)


def test_uninstrument_restores_what_was():
    """Afterwards the classes have what they had, and nothing more."""
    owners = (ResNetForClassificationTorch, inference_models.ClassificationModel)
    before = [dict(vars(owner)) for owner in owners]
    with recorded("inference_models"):
        assert [dict(vars(owner)) for owner in owners] != before
    assert [dict(vars(owner)) for owner in owners] == before
