"""
diffusers: `pipeline`, with `text_encoder`, one `denoise` per step, `vae_encode` and `vae_decode`.

Run against diffusers 0.42.1. A `denoise` is one step of the pipeline's own progress bar, shown or not: the denoiser's
calls, guidance and the scheduler, even if the denoiser is compiled. `text_encoder` is `encode_prompt`, including
tokenization. Each class of pipelines or VAEs is wrapped when the first pipeline with it is made; pipelines made of
blocks (`ModularPipeline`) are not covered.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Protocol

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from gpuscope import stage
from gpuscope.instrument import instrument

from ._wrapping import Block, method_of, replace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from typing_extensions import Self

    from gpuscope.instrument import Target

    from ._wrapping import Function

MODULE = "diffusers.pipelines.pipeline_utils"
TARGETS = ()
_ARGUMENTS = {name: name for name in ("num_inference_steps", "height", "width", "num_frames", "num_images_per_prompt")}


def install() -> Callable[[], None]:
    """Wrap what a table can't express: each pipeline has its own `__call__`, and a step is not a function."""
    undo = contextlib.ExitStack()
    replace(undo, DiffusionPipeline, "register_modules", _register_modules)
    replace(undo, DiffusionPipeline, "progress_bar", _progress_bar)
    return undo.close


def _register_modules(function: Function) -> Function:
    def register_modules(self: DiffusionPipeline, **components: object) -> None:
        function(self, **components)
        instrument([*_of_pipeline(type(self)), *_of_components(components)])

    return register_modules


def _of_pipeline(kind: type) -> list[Target]:
    call = method_of("pipeline", kind, "__call__", {"pipeline": "self.__class__.__name__", **_ARGUMENTS})
    return call + method_of("text_encoder", kind, "encode_prompt", {})


def _of_components(components: Mapping[str, object]) -> Iterator[Target]:
    for name, component in components.items():
        if name.startswith(("vae", "vq")):
            yield from method_of("vae_encode", type(component), "encode", {})
            yield from method_of("vae_decode", type(component), "decode", {})


class _Bar(Block, Protocol):
    """What is used of a progress bar of `tqdm`."""

    def __iter__(self) -> Iterator[object]: ...

    def update(self, n: int) -> object: ...


def _progress_bar(function: Callable[..., _Bar]) -> Function:
    def progress_bar(self: object, iterable: object = None, total: int | None = None, **more: object) -> _Steps:
        return _Steps(function(self, iterable, total, **more), total)

    return progress_bar


class _Steps:
    """
    A progress bar whose steps are stages: from one `update` to the next or, if it is iterated over, one per item.

    Everything else is passed on to the bar.
    """

    def __init__(self, bar: _Bar, total: int | None) -> None:
        self._bar, self._total, self._done = bar, total, 0
        self._open: Block | None = None

    def __enter__(self) -> Self:
        self._bar.__enter__()
        self._begin()
        return self

    def __exit__(self, *exception: object) -> object:
        self._end(*exception)
        return self._bar.__exit__(*exception)

    def update(self, n: int = 1) -> object:
        """End this step, and begin the next if there is one."""
        self._end(None, None, None)
        self._done += n
        shown = self._bar.update(n)
        if self._total is None or self._done < self._total:
            self._begin()
        return shown

    def __iter__(self) -> Iterator[object]:
        for index, item in enumerate(self._bar):
            with stage("denoise", attributes={"step": index}):
                yield item

    def __getattr__(self, name: str) -> object:
        return getattr(self._bar, name)

    def _begin(self) -> None:
        self._open = stage("denoise", attributes={"step": self._done})
        self._open.__enter__()

    def _end(self, *exception: object) -> None:
        step, self._open = self._open, None
        if step is not None:
            step.__exit__(*exception)
