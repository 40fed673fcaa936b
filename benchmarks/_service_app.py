"""
The service of `bench_service.py`: FastAPI, a vision transformer, photographs in, five classes out.

Each worker process obeys signals, because a request to switch recording would reach only one of several workers:
SIGUSR1 switches it on, SIGRTMIN on without asking the streams, SIGUSR2 off. A worker answers with a file named after
its process, in the folder that SERVICE_STATE names.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from _service_load import photograph
from fastapi import Depends, FastAPI, Request
from PIL import Image

import gpuscope

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

STATE = Path(os.environ["SERVICE_STATE"], str(os.getpid()))
WARMUP = 20
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model() -> Callable[[torch.Tensor], torch.Tensor]:
    """ViT-B/16 on a GPU; without one a small transformer of the same form. Weights are random."""
    torch.manual_seed(0)
    if DEVICE.type == "cuda":
        from torchvision.models import vit_b_16

        return vit_b_16(weights=None).eval().half().to(DEVICE)
    from transformers import ViTConfig, ViTForImageClassification

    torch.set_num_threads(1)
    size = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    small = ViTForImageClassification(ViTConfig(**size, num_labels=1000)).eval()
    return lambda images: small(images).logits


def steps() -> dict[str, Callable[[Any], Any]]:
    """What a request does; each step takes the result of the one before."""
    infer = model()
    kind = torch.float16 if DEVICE.type == "cuda" else torch.float32
    mean = torch.tensor([0.485, 0.456, 0.406], device=DEVICE).view(1, 3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225], device=DEVICE).view(1, 3, 1, 1)

    def decode(body: bytes) -> torch.Tensor:
        picture = np.asarray(Image.open(io.BytesIO(body)).resize((224, 224)))
        return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1))).unsqueeze(0)

    def postprocess(logits: torch.Tensor) -> list[int]:
        return [int(index) for index in logits.float().topk(5).indices[0]]

    return {
        "decode": decode,
        "h2d": lambda image: image.to(DEVICE),
        "preprocess": lambda image: ((image.float() / 255 - mean) / deviation).to(kind),
        "infer": infer,
        "d2h": lambda logits: logits.cpu(),
        "postprocess": postprocess,
    }


def chained(functions: dict[str, Callable[[Any], Any]]) -> Callable[[Any], Any]:
    run = tuple(functions.values())

    def request(value: Any) -> Any:
        with torch.inference_mode():
            for function in run:
                value = function(value)
        return value

    return request


class Service:
    """The request with stages and without, and which of them is in use."""

    def __init__(self) -> None:
        functions = steps()
        self.plain = self.request = chained(functions)
        staged = chained({name: gpuscope.stage(name)(function) for name, function in functions.items()})
        self.staged = gpuscope.stage("request")(staged)
        assert self.staged is not staged, "the benchmark needs GPUSCOPE=idle"

    def say(self, state: str, **more: Any) -> None:
        """Answer with a file that appears by a rename, so that nobody reads half of it."""
        draft = STATE.with_suffix(".draft")
        draft.write_text(json.dumps({"state": state, **more}))
        draft.rename(STATE)

    def record(self, state: str, **settings: float) -> None:
        endpoint = os.environ["SERVICE_RECEIVER"]
        gpuscope.enable(exporters="otlp", otlp_base_endpoint=endpoint, schedule_delay_s=1.0, **settings)
        self.request = self.staged
        self.say(state)

    def do_not_record(self) -> None:
        self.request = self.plain
        gpuscope.shutdown(timeout=30)
        statistics = gpuscope.statistics()
        names = ("recorded", "exported", "dropped", "lost", "pending")
        self.say("off", account={name: getattr(statistics, name) for name in names})


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.service = service = Service()
    for _ in range(WARMUP):
        service.plain(photograph())
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, service.record, "on")
    loop.add_signal_handler(signal.SIGRTMIN, partial(service.record, "unasked", sample_hz=0))
    loop.add_signal_handler(signal.SIGUSR2, service.do_not_record)
    service.say("off")
    yield
    gpuscope.shutdown(timeout=5)


app = FastAPI(lifespan=lifespan)


async def body_of(request: Request) -> bytes:
    return await request.body()


@app.post("/classify")
def classify(request: Request, body: Annotated[bytes, Depends(body_of)]) -> list[int]:
    """Runs in the thread pool, as endpoints that are not coroutines do."""
    return request.app.state.service.request(body)
