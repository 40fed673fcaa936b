"""
Hugging Face transformers: pipelines, and `generate` with its prefill and decode steps.

Run against transformers 5.23.0. A `pipeline` has the stages `preprocess`, `forward` and `postprocess`. A `generate`, in
a pipeline or not, has a `prefill`, which is the forward of the prompt, and a `decode` per forward after it. If a model
class has its own `generate`, each call of the common one inside it is a `generate`: Whisper has one per window of a
long recording. Steps that `generate` or the program has compiled are stages too; continuous batching is not covered.
"""

from __future__ import annotations

import contextlib
import functools
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from transformers.generation.utils import GenerationMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.pipelines.base import Pipeline

import gpuscope
from gpuscope.instrument import Target

from ._wrapping import replace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any, Protocol, TypeAlias

    from ._wrapping import Function

    class StageOfCall(Protocol):
        """What a `generate` needs of its stage."""

        def set_attribute(self, key: str, value: object) -> None:
            """Add an attribute."""

    Given: TypeAlias = Any
    """A model's inputs and results. `Any`, because models differ: whatever is read from one may be missing."""

MODULE = "transformers.modeling_utils"
_BASE = "transformers.pipelines.base:Pipeline"
TARGETS = (
    Target("pipeline", f"{_BASE}.__call__", {"task": "self.task"}, subclasses=True),
    Target("preprocess", f"{_BASE}.preprocess", {"task": "self.task"}, subclasses=True),
    Target("postprocess", f"{_BASE}.postprocess", {"task": "self.task"}, subclasses=True),
)


class _Generation:
    """A running `generate`: its model, its stage, and how far it is. It concerns calls of that model only."""

    __slots__ = ("forwards", "is_prefill", "model", "stage")

    def __init__(self, model: object, stage: StageOfCall) -> None:
        self.model, self.stage = model, stage
        self.forwards, self.is_prefill = 0, False

    def next_step(self) -> str:
        """Return the stage name of the forward that begins; a prefill in chunks has several forwards."""
        self.forwards += 1
        return "prefill" if self.is_prefill or self.forwards == 1 else "decode"


_running: ContextVar[_Generation | None] = ContextVar("gpuscope_generation", default=None)


def install() -> Callable[[], None]:
    """Wrap what a table can't express: stages that depend on the calls before them, and attributes from results."""
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


def _pipeline_forward(function: Function) -> Function:
    def forward(self: Pipeline, model_inputs: Given, **parameters: object) -> object:
        if not gpuscope.is_enabled():
            return function(self, model_inputs, **parameters)
        attributes = _readable(task=lambda: self.task, model=lambda: _name(self.model))
        with gpuscope.stage("forward", attributes={**attributes, **_sizes(model_inputs)}):
            return function(self, model_inputs, **parameters)

    return forward


def _readable(**readers: Callable[[], object]) -> dict[str, object]:
    """Return what can be read, because models and inputs are the program's and may be anything."""
    values = {}
    for key, read in readers.items():
        with contextlib.suppress(Exception):
            values[key] = read()
    return values


def _name(model: object) -> str:
    return getattr(model, "name_or_path", "") or type(model).__name__


def _sizes(inputs: Given) -> dict[str, object]:
    """Return the batch size of a model's inputs and, if they are tokens, their length."""
    tokens = _readable(
        batch_size=lambda: inputs["input_ids"].shape[0], input_length=lambda: inputs["input_ids"].shape[1]
    )
    return tokens or _readable(
        batch_size=lambda: next(value.shape[0] for value in inputs.values() if isinstance(value, torch.Tensor))
    )


@contextlib.contextmanager
def _generation(model: object) -> Iterator[None]:
    with gpuscope.stage("generate", attributes={"model": _name(model)}) as stage:
        token = _running.set(_Generation(model, stage))
        try:
            yield
        finally:
            _running.reset(token)


def _generate(function: Function) -> Function:
    def generate(self: GenerationMixin, *args: object, **kwargs: object) -> object:
        if not gpuscope.is_enabled():
            return function(self, *args, **kwargs)
        with _generation(self):
            return function(self, *args, **kwargs)

    return generate


def _decoding_loop(function: Callable[..., Given]) -> Function:
    def loop(self: GenerationMixin, input_ids: torch.Tensor, *args: object, **kwargs: object) -> object:
        generation = _running.get()
        if generation is not None and generation.model is self:
            result = function(self, input_ids, *args, **kwargs)
            for key, value in _generated(input_ids, kwargs, result).items():
                generation.stage.set_attribute(key, value)
            return result
        if not gpuscope.is_enabled():
            return function(self, input_ids, *args, **kwargs)
        with _generation(self):  # The model has its own `generate`, which calls the loop directly.
            return loop(self, input_ids, *args, **kwargs)

    return loop


def _generated(input_ids: torch.Tensor, inputs: Mapping[str, Given], result: Given) -> dict[str, object]:
    """Return sizes, none of which waits for the GPU. The prompt is an encoder's output, embeddings, or the tokens."""
    encoded, embedded = inputs.get("encoder_outputs"), inputs.get("inputs_embeds")
    prompt: Given = encoded if encoded is not None else (embedded,) if embedded is not None else (input_ids,)
    return _readable(
        batch_size=lambda: input_ids.shape[0],
        input_length=lambda: prompt[0].shape[1],
        new_tokens=lambda: (result.sequences if hasattr(result, "sequences") else result).shape[1] - input_ids.shape[1],
    )


def _prefill(function: Function) -> Function:
    def prefill(self: GenerationMixin, *args: object, **kwargs: object) -> object:
        generation = _running.get()
        if generation is None or generation.model is not self:
            return function(self, *args, **kwargs)
        generation.is_prefill = True
        try:
            return function(self, *args, **kwargs)
        finally:
            generation.is_prefill = False

    return prefill


def _model_call(function: Function) -> Function:
    def __call__(self: PreTrainedModel, *args: object, **kwargs: object) -> object:  # noqa: N807
        # This comes first, and on its own: what Dynamo traces has no stages, and makes no guards of what is below.
        if torch.compiler.is_dynamo_compiling() or _running.get() is None:
            return function(self, *args, **kwargs)
        return _step(self, functools.partial(function, self), args, kwargs)

    return __call__


def _get_compiled_call(function: Callable[..., Function]) -> Function:
    def get_compiled_call(self: PreTrainedModel, *args: object, **kwargs: object) -> Function:
        compiled = function(self, *args, **kwargs)
        return lambda *inputs, **named: _step(self, compiled, inputs, named)

    return get_compiled_call


def _step(model: object, call: Function, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    """Call a model; the call is a step if that model generates."""
    generation = _running.get()
    if generation is None or generation.model is not model:
        return call(*args, **kwargs)
    token = _running.set(None)  # Calls inside the model are not steps.
    try:
        with gpuscope.stage(generation.next_step()):
            return call(*args, **kwargs)
    finally:
        _running.reset(token)
