"""timm, the real package: models with random weights."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

from timm.models import _factory, _registry  # noqa: E402
from timm.models.resnet import ResNet  # noqa: E402

from .models_recorded import attributes, paths, recorded  # noqa: E402

IMAGES = torch.zeros(2, 3, 32, 32)
TINY_VIT = {"img_size": 32, "depth": 1, "embed_dim": 12, "num_heads": 2}


def test_forward_of_a_model_that_is_created():
    """A model that `create_model` makes has its `forward` as a stage, with its name; the answer is the same."""
    with recorded("timm") as spans:
        model = timm.create_model("resnet10t").eval()
        inside = model(IMAGES)
    assert torch.equal(model(IMAGES), inside)
    assert paths(spans) == ["forward"]
    assert attributes(spans, "forward") == [{"model": "resnet10t", "batch_size": 2}]


@pytest.mark.parametrize(
    ("name", "options"), [("resnet10t", {"features_only": True}), ("vit_tiny_patch16_224", TINY_VIT)]
)
def test_other_kinds_of_models(name, options):
    """A transformer, and a model that returns its features, are no different."""
    with recorded("timm") as spans:
        timm.create_model(name, **options).eval()(IMAGES)
    assert paths(spans) == ["forward"]
    assert attributes(spans, "forward")[0]["model"] == name


class Inheriting(torch.nn.Sequential):
    """A model without a `forward` of its own."""


@pytest.mark.parametrize("is_found", [True, False])
def test_a_model_of_the_program(monkeypatch, is_found):
    """A model of the program's own is one too if an import finds its class; PyTorch's classes are never touched."""

    class Local(torch.nn.Sequential):
        pass

    kind = Inheriting if is_found else Local
    monkeypatch.setitem(_registry._model_entrypoints, "programs_own", lambda **_: kind(torch.nn.Linear(3, 1)))
    with recorded("timm") as spans:
        model = timm.create_model("programs_own")
        torch.nn.Sequential(model)(torch.zeros(2, 3))
    assert paths(spans) == ["forward"] * is_found


def test_uninstrument_restores_what_was():
    """Afterwards timm has what it had, and nothing more."""
    before = _factory.model_entrypoint, ResNet.forward
    with recorded("timm"):
        timm.create_model("resnet10t")
        assert _factory.model_entrypoint is not before[0]
        assert ResNet.forward is not before[1]
    assert (_factory.model_entrypoint, ResNet.forward) == before
