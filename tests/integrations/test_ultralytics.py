"""Ultralytics, the real package: predictors of models with random weights."""

from __future__ import annotations

import os
import tempfile

import numpy as np
import pytest

# Read when the package is imported, which otherwise writes its settings into the home directory.
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())
os.environ.setdefault("YOLO_OFFLINE", "true")
torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
pytest.importorskip("ultralytics")

from ultralytics import YOLO  # noqa: E402
from ultralytics.engine.predictor import BasePredictor  # noqa: E402

from .models_recorded import attributes, paths, recorded  # noqa: E402

IMAGES = [np.zeros((64, 64, 3), np.uint8)] * 2
OPTIONS = {"imgsz": 64, "verbose": False, "save": False, "conf": 0.001, "device": "cpu"}
BATCH = ["predict/preprocess", "predict/inference", "predict/postprocess"]


@pytest.fixture(scope="module", params=["detect", "classify"])
def model(request) -> YOLO:
    """A model with random weights, for one task or another: they override different steps."""
    torch.manual_seed(0)
    suffix = "-cls" if request.param == "classify" else ""
    return YOLO(f"yolov8n{suffix}.yaml", task=request.param)


def answers(results) -> list[np.ndarray]:
    """Return what was found in each image."""
    return [(one.boxes if one.probs is None else one.probs).data.numpy() for one in results]


def test_each_batch_has_its_three_steps(model):
    """A prediction has `preprocess`, `inference` and `postprocess` in it; what is found is the same."""
    plain = answers(model.predict(IMAGES, **OPTIONS))
    with recorded("ultralytics") as spans:
        found = answers(model.predict(IMAGES, **OPTIONS))
    assert all(map(np.array_equal, found, plain))
    assert [path for path in paths(spans) if "/" in path] == BATCH
    assert attributes(spans, "inference") == [{"input_shape": [2, 3, 64, 64]}]
    assert attributes(spans, "predict")[0]["task"] == model.task


def test_a_stream_of_results(model):
    """Streamed, the first result of each batch has the batch's work in it, and time between results is not a stage."""
    with recorded("ultralytics") as spans:
        for _ in model.predict(IMAGES, stream=True, **OPTIONS):
            pass
    found = paths(spans)
    assert found[: len(BATCH) + 1] == ["predict", *BATCH]
    assert set(found[len(BATCH) + 1 :]) == {"predict"}


def test_uninstrument_restores_what_was(model):
    """Afterwards the classes have what they had, and nothing more."""
    owners = (BasePredictor, type(model.predictor))
    before = [dict(vars(owner)) for owner in owners]
    with recorded("ultralytics"):
        assert dict(vars(BasePredictor)) != before[0]
    assert [dict(vars(owner)) for owner in owners] == before
