"""
What the three versions share: an RF-DETR with random weights, photographs as a camera would give them, detections.

Nothing is downloaded: the photographs are those inside scikit-learn and, where it is installed, scikit-image.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import RfDetrConfig, RfDetrDinov2Config, RfDetrForObjectDetection

import gpuscope

if TYPE_CHECKING:
    from collections.abc import Sequence

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TOP, THRESHOLD = 100, 0.5
"""How many detections per image are considered, and the score above which they are returned."""
SCORE_TOLERANCE, EDGE_TOLERANCE_PX = 0.01, 1.0
"""Two detections match if they have the same label and their scores and all edges of their boxes differ by no more."""


class Detection(NamedTuple):
    """One object in a photograph."""

    label: str
    score: float
    box: tuple[float, ...]
    """Left, top, right, bottom, in pixels of the photograph."""


Answer = list[list[Detection]]
"""The detections in each photograph of a request."""


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    side: int
    """Of the square that the model sees, in pixels."""
    frame: tuple[int, int]
    """Height and width of the photographs."""
    batch: int
    threshold_logit: float
    """So high that the random head returns some ten detections per photograph."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the model; what is not here is as in RF-DETR-base."""


BASE = Size(side=560, frame=(720, 1280), batch=4, threshold_logit=0.95)
QUICK = Size(
    side=112,
    frame=(180, 320),
    batch=2,
    threshold_logit=0.45,
    settings={
        "backbone_config": RfDetrDinov2Config(
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=56,
            num_windows=2,
            out_features=["stage1", "stage3"],
        ),
        "num_queries": 30,
        "d_model": 64,
        "decoder_layers": 1,
        "decoder_ffn_dim": 64,
        "decoder_self_attention_heads": 2,
        "decoder_cross_attention_heads": 2,
    },
)


@dataclass(frozen=True)
class Detector:
    """The model on a device: the stage in the middle, the same in all versions."""

    model: RfDetrForObjectDetection
    size: Size
    device: torch.device

    @property
    def names(self) -> dict[int, str]:
        """The names of the labels, as the model's configuration has them."""
        return self.model.config.id2label

    @torch.inference_mode()
    def infer(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits and boxes (centre and extent, as parts of 1) of every query."""
        with gpuscope.stage("inference"):
            outputs = self.model(pixel_values=pixels)
            return outputs.logits, outputs.pred_boxes


def build(size: Size, device: str) -> Detector:
    """Make the model, with the same weights on every machine."""
    torch.manual_seed(0)
    model = RfDetrForObjectDetection(RfDetrConfig(num_labels=91, **size.settings)).eval()
    with torch.no_grad():
        _spread(model, size.threshold_logit)
    return Detector(model.to(device), size, torch.device(device))


def _spread(model: RfDetrForObjectDetection, threshold_logit: float) -> None:
    """Make random weights answer as trained ones do: some clear detections, boxes of many shapes."""
    gain = 20.0
    model.class_embed.weight.mul_(gain)
    model.class_embed.bias.fill_(-gain * threshold_logit)
    model.bbox_embed.layers[-1].weight.normal_(std=1.0)
    # RF-DETR ranks its proposals and gives each rank a query of its own. Scores of random proposals nearly tie: with
    # different queries, a rounding error that swaps two would give altogether different detections.
    model.model.query_feat.weight.zero_()
    model.model.reference_point_embed.weight.zero_()


def photographs(size: Size) -> dict[str, np.ndarray]:
    """Return photographs by name, cut and scaled to the frames of a camera: height, width, RGB."""
    height, width = size.frame
    frames = {}
    for path in _files():
        with Image.open(path) as image:
            frames[path.name] = np.array(ImageOps.fit(image.convert("RGB"), (width, height)))
    return frames


def _files() -> list[Path]:
    from sklearn.datasets import load_sample_images

    files = [Path(name) for name in load_sample_images().filenames]
    try:
        import skimage
    except ImportError:
        return files
    folder = Path(skimage.__file__).parent / "data"
    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
    return files + [folder / name for name in names if (folder / name).is_file()]


def batches(frames: Sequence[np.ndarray], size: Size, count: int) -> list[list[np.ndarray]]:
    """Return this many requests, each with other photographs than the one before."""
    return [[frames[(first + place) % len(frames)] for place in range(size.batch)] for first in range(count)]


def without_a_like(expected: Sequence[Answer], found: Sequence[Answer]) -> int:
    """Return how many detections on either side have no match on the other."""
    missing = 0
    for one, other in zip(expected, found, strict=True):
        for ours, theirs in zip(one, other, strict=True):
            missing += sum(not any(_alike(each, its) for its in theirs) for each in ours)
            missing += sum(not any(_alike(each, its) for its in ours) for each in theirs)
    return missing


def _alike(one: Detection, other: Detection) -> bool:
    return (
        one.label == other.label
        and abs(one.score - other.score) <= SCORE_TOLERANCE
        and all(abs(a - b) <= EDGE_TOLERANCE_PX for a, b in zip(one.box, other.box, strict=True))
    )
