"""
The pipeline as it is commonly written: clear, correct, and full of small waits.

Photographs are resized one by one and normalised on the CPU, copied from pageable memory, and the results are read
number by number. Constants are made and names looked up again in every call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from _common import DEVIATION, MEAN, THRESHOLD, TOP, Answer, Detection, Detector
from torch.nn import functional

import gpuscope

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy as np


class AsWritten:
    """One request after the other."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector

    def answers(self, batches: Iterable[Sequence[np.ndarray]]) -> Iterator[Answer]:
        """Yield the detections of each batch."""
        for frames in batches:
            with gpuscope.stage("preprocess"):
                pixels = preprocess(frames, self.detector.size.side).to(self.detector.device)
            logits, boxes = self.detector.infer(pixels)
            with gpuscope.stage("postprocess"):
                answer = postprocess(logits, boxes, [frame.shape[:2] for frame in frames], self.detector.names)
            yield answer


def preprocess(frames: Sequence[np.ndarray], side: int) -> torch.Tensor:
    """Resize, bring the channels to the front and normalise, on the CPU."""
    images = []
    for frame in frames:
        image = torch.from_numpy(frame).permute(2, 0, 1).float()[None]
        images.append(functional.interpolate(image, (side, side), mode="bilinear", antialias=True))
    pixels = torch.cat(images) / 255
    mean = torch.tensor(MEAN, device=pixels.device).view(1, 3, 1, 1)
    deviation = torch.tensor(DEVIATION, device=pixels.device).view(1, 3, 1, 1)
    return (pixels - mean) / deviation


@torch.inference_mode()
def postprocess(
    logits: torch.Tensor, boxes: torch.Tensor, sizes: Sequence[tuple[int, int]], names: dict[int, str]
) -> Answer:
    """Choose the best detections, scale their boxes to the photographs, and read them."""
    scores, places = logits.sigmoid().flatten(1).topk(TOP)
    queries, labels = places // logits.shape[-1], places % logits.shape[-1]
    centre, extent = boxes.split(2, dim=-1)
    corners = torch.cat([centre - extent / 2, centre + extent / 2], dim=-1)
    corners = corners.gather(1, queries[..., None].repeat(1, 1, 4))
    height, width = torch.tensor(sizes, device=boxes.device).unbind(1)
    corners = corners * torch.stack([width, height, width, height], dim=1)[:, None]
    return [_read(*image, names) for image in zip(scores, labels, corners, strict=True)]


def _read(scores: torch.Tensor, labels: torch.Tensor, boxes: torch.Tensor, names: dict[int, str]) -> list[Detection]:
    """Read the detections of one photograph, each number with a wait of its own."""
    keep = scores > THRESHOLD
    return [
        Detection(names[label.item()], score.item(), tuple(edge.item() for edge in box))
        for score, label, box in zip(scores[keep], labels[keep], boxes[keep], strict=True)
    ]
