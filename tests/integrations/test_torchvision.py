"""torchvision, the real package: models with random weights."""

from __future__ import annotations

import importlib

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")

from torchvision.models import detection, get_model, resnet18, segmentation  # noqa: E402
from torchvision.models.resnet import ResNet  # noqa: E402

from .models_recorded import attributes, paths, recorded  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(builder, **options):
    """Return a model with fixed random weights, on the GPU where there is one."""
    torch.manual_seed(0)
    return builder(weights=None, **options).eval().to(DEVICE)


def images(size: int = 32):
    """Return two images as one tensor."""
    return torch.ones(2, 3, size, size, device=DEVICE)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "vit_b_16", "swin_t"])
def test_forward_of_a_model(name):
    """A model for images has its `forward` as a stage, with its class and the batch size."""
    model = make(lambda **options: get_model(name, **options), num_classes=4)
    size = 224 if name == "vit_b_16" else 64
    with recorded("torchvision") as spans, torch.inference_mode():
        model(images(size))
    assert paths(spans) == ["forward"]
    assert attributes(spans, "forward") == [{"model": type(model).__name__, "batch_size": 2}]


def test_the_answer_is_the_same():
    """With the stages there, a model says what it says without."""
    model = make(resnet18)
    plain = model(images())
    with recorded("torchvision"):
        assert torch.equal(model(images()), plain)


def test_a_detector_has_its_parts():
    """A detector's `forward` has scaling, proposals, the heads and scaling back in it; boxes are the same."""
    sizes = {"weights_backbone": None, "num_classes": 3, "min_size": 64, "max_size": 64}
    model = make(detection.fasterrcnn_mobilenet_v3_large_fpn, **sizes)
    batch = list(images(64))
    with torch.inference_mode():
        plain = model(batch)
        with recorded("torchvision") as spans:
            found = model(batch)
    assert all(torch.equal(one["boxes"], other["boxes"]) for one, other in zip(found, plain, strict=True))
    parts = ["preprocess", "rpn", "roi_heads", "postprocess"]
    assert paths(spans) == ["forward", *(f"forward/{part}" for part in parts)]
    assert attributes(spans, "forward") == [{"model": "FasterRCNN", "batch_size": 2}]


def test_a_segmenter_is_one_stage():
    """A model around a backbone of torchvision's own has one `forward`, not two."""
    model = make(segmentation.lraspp_mobilenet_v3_large, weights_backbone=None, num_classes=3)
    with recorded("torchvision") as spans:
        model(images(64))
    assert paths(spans) == ["forward"]
    assert attributes(spans, "forward")[0]["batch_size"] == 2


def test_every_class_of_the_table_is_there():
    """The installed version has what the table names, so that no line of it is for nothing."""
    table = importlib.import_module("gpuscope.integrations.torchvision").TARGETS
    for target in table:
        owner = importlib.import_module(target.module)
        for name in target.qualified_name.split("."):
            owner = getattr(owner, name)


def test_uninstrument_restores_what_was():
    """Afterwards the classes have what they had, and nothing more."""
    before = dict(vars(ResNet))
    with recorded("torchvision"):
        assert dict(vars(ResNet)) != before
    assert dict(vars(ResNet)) == before
