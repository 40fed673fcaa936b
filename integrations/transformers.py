"""
Hugging Face transformers: pipelines, and `generate` with its prefill and decode steps.

Run against transformers 5.24.0. A `pipeline` has the stages `preprocess`, `forward` and `postprocess`. A `generate`, in
a pipeline or not, has a `prefill`, which is the forward of the prompt, and a `decode` per forward after it. If a model
class has its own `generate`, each call of the common one inside it is a `generate`: Whisper has one per window of a
long recording. Steps that `generate` or the program has compiled are stages too. Continuous batching is in
`_continuous.py`: each request is a `generate`, a member of the batches `generate_step`.

A `generate` has OpenTelemetry's attributes of generative models: `gen_ai.operation.name` (`text_completion`, or
`generate_content` where a model takes or gives more than text), `gen_ai.provider.name` (`transformers`),
`gen_ai.request.model`, and `gen_ai.usage.input_tokens` and `.output_tokens` of all sequences together. Tokens are
counted by shapes, so padding counts, and so does what comes after a sequence's end. `batch_size`, `input_length` and
`new_tokens` are the shapes themselves, by which reports tell the cost per item. The `generate` of an assistant model is
part of another's, and says its model only.

From each `generate` come OpenTelemetry's metrics of model servers. The time to the first token lasts from its begin to
the end of its prefill on the GPU or, without GPU times, on the host; to sample that token takes a little longer. The
time per output token is the rest, until host and GPU are done, over the tokens of one sequence after the first.

The attributes `gen_ai.server.time_to_first_token` and `.time_per_output_token` are by the host's clock: until the step
after the first token begins, when a streamer has just had it, and from there to the end of the loop. Those of the GPU's
clock, and the GPU time of prefill and decode, are `gpuscope.gpu.*`, where the GPU is timed.
"""

from __future__ import annotations

import contextlib
import functools
import time
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

    __slots__ = ("began_s", "first_s", "forwards", "is_prefill", "is_request", "model", "stage")

    def __init__(self, model: object, stage: StageOfCall, *, is_request: bool) -> None:
        self.model, self.stage, self.is_request = model, stage, is_request
        self.forwards, self.is_prefill = 0, False
        self.began_s, self.first_s = time.perf_counter(), 0.0

    def next_step(self) -> str:
        """Return the stage name of the forward that begins; a prefill in chunks has several forwards."""
        self.forwards += 1
        if self.is_prefill or self.forwards == 1:
            return "prefill"
        self.first_s = self.first_s or time.perf_counter()
        return "decode"

    def times(self, new_tokens: object) -> dict[str, object]:
        """Return the times to the first token and per further one, now that the loop has ended."""
        if not self.is_request or not isinstance(new_tokens, int) or new_tokens < 1:
            return {}
        now_s = time.perf_counter()
        first_s = self.first_s or now_s
        found: dict[str, object] = {"gen_ai.server.time_to_first_token": first_s - self.began_s}
        if new_tokens > 1:
            found["gen_ai.server.time_per_output_token"] = (now_s - first_s) / (new_tokens - 1)
        return found


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
    with contextlib.suppress(ImportError):  # Other versions have none, or elsewhere.
        from . import _continuous  # noqa: PLC0415

        _continuous.install(undo)
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


def _request(model: Given, args: tuple[Given, ...], kwargs: Mapping[str, Given]) -> dict[str, object]:
    """Return what is known of a request before it runs."""
    given = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
    return {"gen_ai.provider.name": "transformers"} | _readable(
        **{
            "gen_ai.operation.name": lambda: _operation(model),
            "gen_ai.usage.input_tokens": lambda: _tokens(model, next(each for each in given if each is not None)),
        }
    )


def _operation(model: Given) -> str:
    """Return OpenTelemetry's word for what a model does. Models tell their modalities since transformers 5."""
    text = ("text", ("text",))
    takes = getattr(model, "input_modalities", "text" if model.main_input_name == "input_ids" else "other")
    gives = getattr(model, "output_modalities", "text")
    return "text_completion" if takes in text and gives in text else "generate_content"


def _tokens(model: Given, prompt: Given) -> int:
    if model.main_input_name != "input_ids":
        raise TypeError(model.main_input_name)  # Audio and pixels have no tokens.
    return int(prompt.shape[0] * prompt.shape[1])


@contextlib.contextmanager
def _generation(model: object, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Iterator[None]:
    is_request = _running.get() is None  # Not that of an assistant.
    attributes = _readable(**{"gen_ai.request.model": lambda: _name(model)})
    if is_request:
        attributes |= _request(model, args, kwargs)
    with gpuscope.stage("generate", attributes=attributes) as stage:
        token = _running.set(_Generation(model, stage, is_request=is_request))
        try:
            yield
        finally:
            _running.reset(token)


def _generate(function: Function) -> Function:
    def generate(self: GenerationMixin, *args: object, **kwargs: object) -> object:
        if not gpuscope.is_enabled():
            return function(self, *args, **kwargs)
        with _generation(self, args, kwargs):
            return function(self, *args, **kwargs)

    return generate


def _decoding_loop(function: Callable[..., Given]) -> Function:
    def loop(self: GenerationMixin, input_ids: torch.Tensor, *args: object, **kwargs: object) -> object:
        generation = _running.get()
        if generation is not None and generation.model is self:
            result = function(self, input_ids, *args, **kwargs)
            found = _generated(input_ids, kwargs, result, is_request=generation.is_request)
            for key, value in {**found, **generation.times(found.get("new_tokens"))}.items():
                generation.stage.set_attribute(key, value)
            return result
        if not gpuscope.is_enabled():
            return function(self, input_ids, *args, **kwargs)
        # The model has its own `generate`, which calls the loop directly. An encoder's input is not to be seen here.
        with _generation(self, () if "encoder_outputs" in kwargs else (input_ids,), {}):
            return loop(self, input_ids, *args, **kwargs)

    return loop


def _generated(
    input_ids: torch.Tensor, inputs: Mapping[str, Given], result: Given, *, is_request: bool
) -> dict[str, object]:
    """Return sizes, none of which waits for the GPU. The prompt is an encoder's output, embeddings, or the tokens."""
    encoded, embedded = inputs.get("encoder_outputs"), inputs.get("inputs_embeds")
    prompt: Given = encoded if encoded is not None else (embedded,) if embedded is not None else (input_ids,)
    sequences: Given = result.sequences if hasattr(result, "sequences") else result
    found = _readable(
        batch_size=lambda: input_ids.shape[0],
        input_length=lambda: prompt[0].shape[1],
        new_tokens=lambda: sequences.shape[1] - input_ids.shape[1],
    )
    if is_request and "new_tokens" in found:
        found |= _readable(**{"gen_ai.usage.output_tokens": lambda: sequences.shape[0] * found["new_tokens"]})
    return found


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
