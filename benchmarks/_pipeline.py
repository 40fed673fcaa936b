"""
The launch-bound loop of the tail benchmark: ResNet-50, batch 1, six stages in a request; and the ways to watch it.

A way takes the six functions and returns one function that runs a request. Nothing here measures or prints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    Request = Callable[[], Any]
    Steps = dict[str, Callable[[Any], Any]]

NAMES = ("cpu_prep", "h2d", "gpu_preprocess", "inference", "d2h", "postprocess")
STAGES_A_REQUEST = len(NAMES) + 1


def steps() -> Steps:
    """The six functions, each fed by the one before."""
    torch.set_grad_enabled(False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _model().to(device).eval()
    photographs = np.random.default_rng(0).integers(0, 256, (16, 256, 320, 3), dtype=np.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(1, 3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225], device=device).view(1, 3, 1, 1)

    def cpu_prep(index: int) -> torch.Tensor:
        photograph = photographs[index % len(photographs)]
        cropped = np.ascontiguousarray(photograph[16:240, 48:272].transpose(2, 0, 1))
        return torch.from_numpy(cropped).unsqueeze(0)

    def h2d(image: torch.Tensor) -> torch.Tensor:
        return image.to(device)

    def gpu_preprocess(image: torch.Tensor) -> torch.Tensor:
        return (image.float() / 255 - mean) / deviation

    def d2h(logits: torch.Tensor) -> torch.Tensor:
        return logits.cpu()

    def postprocess(logits: torch.Tensor) -> list[float]:
        return [float(value) for value in logits.softmax(-1).topk(5).values[0]]

    functions = (cpu_prep, h2d, gpu_preprocess, model, d2h, postprocess)
    return dict(zip(NAMES, functions, strict=True))


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    try:
        from torchvision.models import resnet50
    except ImportError:
        return _stand_in()
    return resnet50(weights=None) if torch.cuda.is_available() else _stand_in()


def _stand_in() -> torch.nn.Module:
    # Without a GPU or torchvision: many small operators, so that the loop is bound by launching them all the same.
    layers: list[torch.nn.Module] = [torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten()]
    for _ in range(50):
        layers += [torch.nn.Linear(192, 192), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(192, 1000))


def plain(functions: Steps) -> Request:
    """Not instrumented."""
    run = tuple(functions.values())

    def request() -> Any:
        value: Any = 0
        for function in run:
            value = function(value)
        return value

    return request


def staged(functions: Steps) -> Request:
    """Each function decorated, all within a `request` stage."""
    import gpuscope

    decorated = {name: gpuscope.stage(name)(function) for name, function in functions.items()}
    assert decorated["h2d"] is not functions["h2d"], "the benchmark needs GPUSCOPE=idle or 1"
    return gpuscope.stage("request")(plain(decorated))


def naive(functions: Steps, tracer: Any) -> Request:
    """Spans as current, new events, NVTX ranges; times asked for inline, when the results are on the host."""
    begin, end = (_begin_cuda, _end_cuda) if torch.cuda.is_available() else (_begin_nothing, _end_nothing)
    measured: list[tuple[str, Any]] = []

    def watch(name: str, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def watched(value: Any) -> Any:
            with tracer.start_as_current_span(name):
                events = begin(name)
                try:
                    return function(value)
                finally:
                    end(events)
                    measured.append((name, events))

        return watched

    inner = plain({name: watch(name, function) for name, function in functions.items()})

    def request() -> Any:
        with tracer.start_as_current_span("request") as span:
            events = begin("request")
            value = inner()
            end(events)
            if events is not None:
                events[1].synchronize()
                span.set_attribute("gpu_ms", events[0].elapsed_time(events[1]))
                for name, pair in measured:
                    span.set_attribute(f"gpu_ms.{name}", pair[0].elapsed_time(pair[1]))
            measured.clear()
        return value

    return request


def _begin_cuda(name: str) -> tuple[Any, Any]:
    torch.cuda.nvtx.range_push(name)
    pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
    pair[0].record()
    return pair


def _end_cuda(pair: tuple[Any, Any]) -> None:
    pair[1].record()
    torch.cuda.nvtx.range_pop()


def _begin_nothing(_: str) -> None:
    return None


def _end_nothing(_: None) -> None:
    pass
