"""
vLLM: each step of the model runner is a stage, `vllm.execute_model`; the sampling after it is `vllm.sample_tokens`.

A step is a batch of all requests in it, by their scheduled tokens. Each request is a `generate` from its first step
until the runner hears of its end: with its tokens, and a light span with its steps, and its waits and shares summed.
It is in a trace of its own, because the runner does not know where a request comes from; so its times begin with its
first step, and what it waited before that is in vLLM's own metrics alone. Tokens are counted as the scheduler tells
of them, at the begin of the following step; that of the last step is taken to be one. Where several workers share a
model each has the same requests, so they do not say `gen_ai.operation.name`, and make no metrics.

Of the requests in a step, `vllm.requests.new` are prefilled; each of the `vllm.requests.running` decodes, or continues
a prefill in chunks; `vllm.tokens` is the number of tokens scheduled, and `gen_ai.request.model` the model. vLLM's
engine runs in separate processes, which must be instrumented too: `GPUSCOPE` and `GPUSCOPE_FRAMEWORKS` reach them, and
something there has to import gpuscope (`gpuscope run` does).

Not run, because vLLM needs a GPU and its CUDA build of PyTorch. Written against the source of vLLM 0.33.0.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import gpuscope
from gpuscope.instrument import Target

if TYPE_CHECKING:
    from typing import Any, TypeAlias

    Given: TypeAlias = Any
    """A runner, and what its scheduler says. `Any`, because vLLM is not here: whatever is read may be missing."""

MODULE = "vllm"

_STEP = {
    "vllm.requests": "len(scheduler_output.num_scheduled_tokens)",
    "vllm.requests.new": "len(scheduler_output.scheduled_new_reqs)",
    "vllm.requests.running": "len(scheduler_output.scheduled_cached_reqs.req_ids)",
    "vllm.tokens": "scheduler_output.total_num_scheduled_tokens",
    "gen_ai.request.model": "self.model_config.model",
}
_RUNNERS = ("vllm.v1.worker.gpu_model_runner:GPUModelRunner", "vllm.v1.worker.gpu.model_runner:GPUModelRunner")


class _Requests:
    """The requests that a runner has begun and not heard the end of."""

    def __init__(self, model: str, *, is_alone: bool) -> None:
        self._generations: dict[str, gpuscope.Generation] = {}
        self._prompts: dict[str, int] = {}
        self._said: dict[str, object] = {"gen_ai.provider.name": "vllm", "gen_ai.request.model": model}
        if is_alone:
            self._said["gen_ai.operation.name"] = "text_completion"

    def step(self, output: Given) -> list[gpuscope.Generation | gpuscope.Token]:
        """Return the members of a step that is about to begin, in the order of its scheduled tokens."""
        for request_id in output.finished_req_ids:
            self._end(request_id)
        for new in output.scheduled_new_reqs:
            self._begin(new.req_id, len(new.prompt_token_ids or ()))
            self._note(output, new.req_id, computed=new.num_computed_tokens, made=0)
        cached = output.scheduled_cached_reqs
        for request_id, computed, made in zip(
            cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
        ):
            self._note(output, request_id, computed=computed, made=made)
        return [self._generations.get(request_id) or gpuscope.Token() for request_id in output.num_scheduled_tokens]

    def _begin(self, request_id: str, prompt: int) -> None:
        self._end(request_id)
        attributes = {**self._said, "gen_ai.usage.input_tokens": prompt, "vllm.request_id": request_id}
        with gpuscope.extract(gpuscope.Token()):
            self._generations[request_id] = gpuscope.Generation("generate", attributes=attributes)
        self._prompts[request_id] = prompt

    def _note(self, output: Given, request_id: str, *, computed: int, made: int) -> None:
        """Note what a request has so far, and whether this step makes its first token."""
        generation = self._generations.get(request_id)
        if generation is not None:
            generation.had_tokens(made - generation.tokens)
            if computed + output.num_scheduled_tokens.get(request_id, 0) >= self._prompts[request_id]:
                generation.prefilled()

    def _end(self, request_id: str) -> None:
        generation = self._generations.pop(request_id, None)
        self._prompts.pop(request_id, None)
        if generation is not None:
            generation.had_tokens(1 if generation.first_step is not None else 0)
            generation.end()


_requests: WeakKeyDictionary[object, _Requests] = WeakKeyDictionary()
"""By the runner."""


def _members(self: Given, scheduler_output: Given, *_: object, **__: object) -> Given:
    """Return whom a step works for; None for one that only tells of requests that are over."""
    if self not in _requests:
        alone, model = False, ""
        with contextlib.suppress(Exception):  # Another version may keep it elsewhere.
            model = str(self.model_config.model)
            alone = self.parallel_config.world_size == 1
        _requests[self] = _Requests(model, is_alone=alone)
    return _requests[self].step(scheduler_output) or None


def _weights(_: object, scheduler_output: Given, *__: object, **___: object) -> list[int]:
    return [*scheduler_output.num_scheduled_tokens.values()]


TARGETS = (
    *(
        Target(
            "vllm.execute_model",
            f"{runner}.execute_model",
            _STEP,
            subclasses=True,
            optional=True,
            members=_members,
            weights=_weights,
            basis="tokens",
        )
        for runner in _RUNNERS
    ),
    *(Target("vllm.sample_tokens", f"{runner}.sample_tokens", subclasses=True, optional=True) for runner in _RUNNERS),
)
