"""
Hugging Face transformers: pipelines, and `generate` with its prefill and decode steps.

Run against transformers 5.23.0. A `pipeline` has the stages `preprocess`, `forward` and `postprocess`. A `generate`, in
a pipeline or not, has a `prefill`, the forward of the prompt, and a `decode` for each forward after it. A model class
with a `generate` of its own has a `generate` where it calls the common one: Whisper one for each window of a long
recording. Steps that `generate` or the program has compiled are stages too; continuous batching is not covered.
"""

from __future__ import annotations

import contextlib
import functools
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.utils import GenerationMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.pipelines.base import Pipeline

import gpuscope
from gpuscope.instrument import Target

from ._wrapping import replace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

MODULE = "transformers.modeling_utils"
_BASE = "transformers.pipelines.base:Pipeline"
TARGETS = (
    Target("pipeline", f"{_BASE}.__call__", {"task": "self.task"}, subclasses=True),
    Target("preprocess", f"{_BASE}.preprocess", {"task": "self.task"}, subclasses=True),
    Target("postprocess", f"{_BASE}.postprocess", {"task": "self.task"}, subclasses=True),
)


class _Generation:
    """A `generate` that runs: its stage, and how far it is. Set for the calls of its model alone."""

    __slots__ = ("forwards", "is_prefill", "model", "stage")

    def __init__(self, model: Any, stage: Any) -> None:
        self.model, self.stage = model, stage
        self.forwards, self.is_prefill = 0, False

    def next_step(self) -> str:
        """Return the name of the forward that begins: a prefill in chunks has several."""
        self.forwards += 1
        return "prefill" if self.is_prefill or self.forwards == 1 else "decode"


_running: ContextVar[_Generation | None] = ContextVar("gpuscope_generation", default=None)


def install() -> Callable[[], None]:
    """Wrap what no table can say: a stage that depends on the calls before it, attributes from results."""
    undo = contextlib.ExitStack()
    replace(undo, Pipeline, "forward", _pipeline_forward)
    replace(undo, PreTrainedModel, "__call__", _model_call)
    replace(undo, PreTrainedModel, "get_compiled_call", _get_compiled_call)
    replace(undo, GenerationMixin, "generate", _generate)
    for name in ("_sample", "_beam_search", "_assisted_decoding"):
        replace(undo, GenerationMixin, name, _decoding_loop)
    for name in ("_prefill", "_prefill_chunking"):
        replace(undo, GenerationMixin, name, _prefill)
    return undo.close


def _pipeline_forward(function: Any) -> Any:
    def forward(self: Any, model_inputs: Any, **parameters: Any) -> Any:
        if not gpuscope.is_enabled():
            return function(self, model_inputs, **parameters)
        attributes = _readable(task=lambda: self.task, model=lambda: _name(self.model))
        with gpuscope.stage("forward", attributes={**attributes, **_sizes(model_inputs)}):
            return function(self, model_inputs, **parameters)

    return forward


def _readable(**readers: Callable[[], Any]) -> dict[str, Any]:
    """Return what can be read: models and inputs are the program's, and may be anything."""
    values = {}
    for key, read in readers.items():
        with contextlib.suppress(Exception):
            values[key] = read()
    return values


def _name(model: Any) -> str:
    return getattr(model, "name_or_path", "") or type(model).__name__


def _sizes(inputs: Any) -> dict[str, Any]:
    """Return the batch size of a model's inputs, and their length where they are tokens."""
    tokens = _readable(
        batch_size=lambda: inputs["input_ids"].shape[0], input_length=lambda: inputs["input_ids"].shape[1]
    )
    return tokens or _readable(
        batch_size=lambda: next(value.shape[0] for value in inputs.values() if isinstance(value, torch.Tensor))
    )


@contextlib.contextmanager
def _generation(model: Any) -> Iterator[None]:
    with gpuscope.stage("generate", attributes={"model": _name(model)}) as stage:
        token = _running.set(_Generation(model, stage))
        try:
            yield
        finally:
            _running.reset(token)


def _generate(function: Any) -> Any:
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not gpuscope.is_enabled():
            return function(self, *args, **kwargs)
        with _generation(self):
            return function(self, *args, **kwargs)

    return generate


def _decoding_loop(function: Any) -> Any:
    def loop(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        generation = _running.get()
        if generation is not None and generation.model is self:
            result = function(self, input_ids, *args, **kwargs)
            for key, value in _generated(input_ids, kwargs, result).items():
                generation.stage.set_attribute(key, value)
            return result
        if not gpuscope.is_enabled():
            return function(self, input_ids, *args, **kwargs)
        with _generation(self):  # Of a model whose own `generate` calls the loop directly.
            return loop(self, input_ids, *args, **kwargs)

    return loop


def _generated(input_ids: Any, inputs: Mapping[str, Any], result: Any) -> dict[str, Any]:
    """Return sizes, none of which waits for the GPU; a prompt is an encoder's input, embeddings, or the tokens."""
    encoded, embedded = inputs.get("encoder_outputs"), inputs.get("inputs_embeds")
    prompt = encoded if encoded is not None else (embedded,) if embedded is not None else (input_ids,)
    return _readable(
        batch_size=lambda: input_ids.shape[0],
        input_length=lambda: prompt[0].shape[1],
        new_tokens=lambda: getattr(result, "sequences", result).shape[1] - input_ids.shape[1],
    )


def _prefill(function: Any) -> Any:
    def prefill(self: Any, *args: Any, **kwargs: Any) -> Any:
        generation = _running.get()
        if generation is None or generation.model is not self:
            return function(self, *args, **kwargs)
        generation.is_prefill = True
        try:
            return function(self, *args, **kwargs)
        finally:
            generation.is_prefill = False

    return prefill


def _model_call(function: Any) -> Any:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        # First and alone: what Dynamo traces has no stages, and nothing below is guarded on.
        if torch.compiler.is_dynamo_compiling() or _running.get() is None:
            return function(self, *args, **kwargs)
        return _step(self, functools.partial(function, self), args, kwargs)

    return __call__


def _get_compiled_call(function: Any) -> Any:
    def get_compiled_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiled = function(self, *args, **kwargs)
        return lambda *inputs, **named: _step(self, compiled, inputs, named)

    return get_compiled_call


def _step(model: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a model: as a step, where it is the one that generates."""
    generation = _running.get()
    if generation is None or generation.model is not model:
        return call(*args, **kwargs)
    token = _running.set(None)  # What the model calls within is no step.
    try:
        with gpuscope.stage(generation.next_step()):
            return call(*args, **kwargs)
    finally:
        _running.reset(token)
