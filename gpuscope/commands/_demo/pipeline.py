"""
The six stages of an image classification as a service would run them, on photographs, with a `transformers` model.

An application like any other: of gpuscope it uses `stage` and nothing else.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gpuscope

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor
    from torch import device as torch_device
    from torch.nn import Module

SIDE = 224
MODELS = {"vit-tiny": (192, 3), "vit-small": (384, 6), "vit-base": (768, 12)}
"""Hidden size and number of heads, of vision transformers with 12 layers and patches of 16 by 16 pixels."""
TOP = 5
MEAN = DEVIATION = 0.5


@dataclass
class Pipeline:
    """A model on a device, and the photographs that it is asked about."""

    torch: ModuleType
    device: torch_device
    model: Module
    photographs: list[bytes]

    def run(self, batch_size: int) -> list[list[tuple[int, float]]]:
        """Answer one request: the most probable classes of each photograph in a batch, with their probabilities."""
        with gpuscope.stage("request", attributes={"batch_size": batch_size}), self.torch.inference_mode():
            with gpuscope.stage("cpu prep"):
                pixels = self.decode(batch_size)
            with gpuscope.stage("h2d") as stage:
                stage.set_attribute("bytes", pixels.nbytes)
                pixels = pixels.to(self.device)
            with gpuscope.stage("gpu preprocess"):
                pixels = self.normalise(pixels)
            with gpuscope.stage("inference"):
                logits = self.model(pixel_values=pixels).logits
            with gpuscope.stage("d2h") as stage:
                stage.set_attribute("bytes", logits.nbytes)
                logits = logits.cpu()
            with gpuscope.stage("postprocess"):
                return self.rank(logits)

    def decode(self, batch_size: int) -> Tensor:
        """Decode and resize the JPEG files on the CPU, to bytes of shape `(batch_size, SIDE, SIDE, 3)`."""
        import numpy as np
        from PIL import Image

        images = []
        for index in range(batch_size):
            with Image.open(io.BytesIO(self.photographs[index % len(self.photographs)])) as image:
                images.append(np.asarray(image.convert("RGB").resize((SIDE, SIDE))))
        pixels: Tensor = self.torch.from_numpy(np.stack(images))
        return pixels

    def normalise(self, pixels: Tensor) -> Tensor:
        """Turn bytes into what the model was made for: channels first, floating point, normalised."""
        return (pixels.permute(0, 3, 1, 2).float() / 255 - MEAN) / DEVIATION

    def rank(self, logits: Tensor) -> list[list[tuple[int, float]]]:
        """Return the most probable classes of each image, with their probabilities."""
        probabilities, classes = logits.softmax(-1).topk(TOP)
        return [
            list(zip(each_class, each, strict=True))
            for each_class, each in zip(classes.tolist(), probabilities.tolist(), strict=True)
        ]


def build(model_name: str, device_name: str) -> Pipeline:
    """
    Make the pipeline.

    Raises:
        ImportError: if a package that the demo needs is missing.

    """
    import torch

    device = torch.device(device_name)
    if device.type == "cpu":
        # Threads that wait for one another are slowed tenfold by one busy neighbour (79 ms became 865 on two cores).
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    return Pipeline(torch, device, _model(model_name).to(device), _photographs())


def _model(name: str) -> Module:
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    hidden_size, heads = MODELS[name]
    # With random weights nothing is downloaded, and a stage takes as long as with trained ones.
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=hidden_size,
        num_hidden_layers=12,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        image_size=SIDE,
        num_labels=1000,
    )
    model: Module = ViTForImageClassification(config).eval()
    return model


def _photographs() -> list[bytes]:
    import PIL.Image  # noqa: F401 - decoding needs it later; it is better to fail now
    from sklearn.datasets import load_sample_images

    return [Path(name).read_bytes() for name in load_sample_images().filenames]
