"""
The pipeline with both of its ends on the GPU, each one stage of `torch.compile`.

Bytes are uploaded instead of floating point numbers, from memory pinned once; constants and names are made once; boxes
are scaled in place; and a request has one wait, for one small copy of all its detections.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from _common import DEVIATION, MEAN, THRESHOLD, TOP, Answer, Detection, Detector
from torch import nn
from torch.nn import functional

import gpuscope

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy as np


class Preprocess(nn.Module):
    """Resizes, brings the channels to the front and normalises a batch of frames."""

    def __init__(self, side: int) -> None:
        super().__init__()
        deviation = torch.tensor(DEVIATION).view(3, 1, 1)
        self.side = side
        self.register_buffer("scale", 1 / (255 * deviation))
        self.register_buffer("offset", torch.tensor(MEAN).view(3, 1, 1) / deviation)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Return what the model takes."""
        pixels = frames.permute(0, 3, 1, 2).float()
        pixels = functional.interpolate(pixels, (self.side, self.side), mode="bilinear", antialias=True)
        return pixels * self.scale - self.offset


class Postprocess(nn.Module):
    """Chooses the best detections and scales their boxes to the photographs."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.register_buffer("extent", torch.tensor([width, height, width, height], dtype=torch.float32))

    def forward(self, logits: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Return for each detection the four edges, the score and the label, so that one copy brings all."""
        scores, places = logits.sigmoid().flatten(1).topk(TOP)
        queries, labels = places // logits.shape[-1], places % logits.shape[-1]
        chosen = boxes.gather(1, queries[..., None].expand(-1, -1, 4))
        centre, extent = chosen.split(2, dim=-1)
        corners = torch.cat([centre - extent / 2, centre + extent / 2], dim=-1).mul_(self.extent)
        return torch.cat([corners, scores[..., None], labels[..., None].float()], dim=-1)


class Compiled:
    """One request after the other, in few kernels."""

    def __init__(self, detector: Detector, *, compile_stages: bool = True) -> None:
        size, device = detector.size, detector.device
        self.detector = detector
        self.not_compiled = "" if compile_stages else "--no-compile"
        """Why the stages are not compiled, if they are not."""
        self._names = [detector.names[label] for label in range(len(detector.names))]
        self._eager = Preprocess(size.side).to(device), Postprocess(*size.frame).to(device)
        self._host = torch.empty((size.batch, *size.frame, 3), dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._preprocess, self._postprocess = self._eager
        if compile_stages:
            self._compile()

    def _compile(self) -> None:
        """Compile now, or go on uncompiled where that is not possible, for example on a CPU without a C++ compiler."""
        self._preprocess, self._postprocess = (torch.compile(stage, dynamic=False) for stage in self._eager)
        try:
            with torch.inference_mode():
                pixels = self._preprocess(self._host.to(self.detector.device))
            self._download(*self.detector.infer(pixels))
        except Exception as error:  # What a compiler's failure looks like depends on the compiler.
            self.not_compiled = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            self._preprocess, self._postprocess = self._eager

    def answers(self, batches: Iterable[Sequence[np.ndarray]]) -> Iterator[Answer]:
        """Yield the detections of each batch."""
        for frames in batches:
            with gpuscope.stage("preprocess"):
                pixels = self._upload(frames)
            logits, boxes = self.detector.infer(pixels)
            with gpuscope.stage("postprocess"):
                answer = [self._read(image) for image in self._download(logits, boxes)]
            yield answer

    @torch.inference_mode()
    def _upload(self, frames: Sequence[np.ndarray]) -> torch.Tensor:
        # No copy out of this memory is under way: the last answer came after that copy, and was waited for.
        for host, frame in zip(self._host, frames, strict=True):
            host.copy_(torch.from_numpy(frame))
        return self._preprocess(self._host.to(self.detector.device, non_blocking=True))

    @torch.inference_mode()
    def _download(self, logits: torch.Tensor, boxes: torch.Tensor) -> list[list[list[float]]]:
        return self._postprocess(logits, boxes).tolist()

    def _read(self, image: list[list[float]]) -> list[Detection]:
        return [
            Detection(self._names[int(label)], score, tuple(box)) for *box, score, label in image if score > THRESHOLD
        ]
