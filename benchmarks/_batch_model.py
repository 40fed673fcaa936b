"""
The model of `bench_batches.py`: a vision transformer with random weights, and when each of its batches ran.

An item is a number, from which its image is made. Some numbers make their batch fail.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FAILS = 97
"""One item in so many makes its whole batch fail."""
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96, "image_size": 64}
"""Without a GPU; with one it is ViT-B/16, as the default of transformers is."""


def fails(number: int) -> bool:
    return number % FAILS == FAILS // 2


def use_gpu() -> str:
    """Return which GPU this process has; where there is none, have gpuscope see a stand-in, if it can be compiled."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    torch.set_num_threads(1)
    from _fake_gpu import install

    try:
        install()
    except OSError:  # No compiler.
        return "none"
    return "a stand-in"


class Model:
    """
    Classifies.

    Args:
        log: a file that gets one line per batch: its items, and when it began, by the monotonic clock.
        device: where it runs.

    """

    def __init__(self, log: Path, device: str) -> None:
        from transformers import ViTConfig, ViTForImageClassification

        self._log, self._device = log, torch.device(device)
        config = ViTConfig() if self._device.type == "cuda" else ViTConfig(**SMALL)
        kind = torch.float16 if self._device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        self._network = ViTForImageClassification(config).eval().to(self._device, kind)
        self._images = torch.rand(16, 3, config.image_size, config.image_size).to(kind)

    @torch.inference_mode()
    def __call__(self, numbers: Sequence[int], began_ns: int | None = None) -> list[tuple[int, int]]:
        """Return each item's number and its class; a batch may have begun before it comes here."""
        began_ns = began_ns or time.monotonic_ns()
        with self._log.open("a") as log:
            log.write(json.dumps({"items": list(numbers), "began_ns": began_ns}) + "\n")
        if any(map(fails, numbers)):
            raise ValueError("an item that no model takes")
        images = self._images[[number % len(self._images) for number in numbers]].to(self._device)
        classes = self._network(images).logits.argmax(-1).tolist()
        return list(zip(numbers, classes, strict=True))


def batches_in(log: Path) -> list[dict[str, Any]]:
    """Return the lines of a log."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
