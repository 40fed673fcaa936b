"""
Continuous batching of transformers: each step of the loop is a batch, `generate_step`, of all requests in it.

A request is a `generate`, from `add_request`, in whose trace it is, until it is complete, has failed or was cancelled.
Weights are the tokens that each request has in a step. Its first token is made by the step that ends its prefill. The
host has a token where the loop hands it on, so times by its clock are those of a client that streams.

Run against transformers 5.24.0, whose internal classes this relies on. With tensor parallelism the driver alone has
traces; that was not run.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from typing import TYPE_CHECKING

from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.scheduler import Scheduler

import gpuscope

from ._wrapping import replace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, TypeAlias

    from ._wrapping import Function

    Ios: TypeAlias = Any
    """Inputs and outputs of a step: of two kinds, which have no common class."""

_GENERATION = "_gpuscope_generation"
"""The attribute of a request's state that holds its generation."""
_arriving: ContextVar[gpuscope.Generation | None] = ContextVar("gpuscope_arriving", default=None)
"""That of the request whose state is about to be made."""


def install(undo: contextlib.ExitStack) -> None:
    """Follow each request from its arrival to its end."""
    replace(undo, ContinuousBatchingManager, "add_request", _add_request)
    replace(undo, RequestState, "__post_init__", _made)
    replace(undo, RequestState, "fork", _forked)
    replace(undo, RequestState, "create_equivalent_initial_request", _begun_again)
    replace(undo, RequestState, "update_and_check_completion", _updated)
    replace(undo, OutputRouter, "fail_and_deliver", _failed)
    for kind in (Scheduler, *Scheduler.__subclasses__()):
        if "clear_cancelled_requests" in vars(kind):
            replace(undo, kind, "clear_cancelled_requests", _cancelled)
    replace(undo, ContinuousBatchProcessor, "_generation_step", _generation_step)


def _of(state: object) -> gpuscope.Generation | None:
    return getattr(state, _GENERATION, None)


def _add_request(function: Function) -> Function:
    def add_request(self: ContinuousBatchingManager, *args: object, **kwargs: object) -> object:
        if not gpuscope.is_enabled():
            return function(self, *args, **kwargs)
        generation = None
        with contextlib.suppress(Exception):  # Another version may call them otherwise: then there is no generation.
            model = self.model
            name = getattr(model, "name_or_path", "") or type(model).__name__
            said = {"gen_ai.operation.name": "text_completion", "gen_ai.provider.name": "transformers"}
            generation = gpuscope.Generation("generate", attributes={**said, "gen_ai.request.model": name})
        token = _arriving.set(generation)
        try:
            result = function(self, *args, **kwargs)
        except BaseException as error:
            if generation is not None:
                generation.end(error)
            raise
        finally:
            _arriving.reset(token)
        if result is None and generation is not None:  # It was refused.
            generation.end()
        return result

    return add_request


def _made(function: Function) -> Function:
    def __post_init__(self: RequestState, *args: object, **kwargs: object) -> object:  # noqa: N807
        result, generation = function(self, *args, **kwargs), _arriving.get()
        if generation is not None:
            with contextlib.suppress(Exception):  # Another version may have no such field.
                generation.set_attribute("gen_ai.usage.input_tokens", len(self.initial_tokens))
            setattr(self, _GENERATION, generation)
        return result

    return __post_init__


def _forked(function: Callable[..., RequestState]) -> Function:
    def fork(self: RequestState, *args: object, **kwargs: object) -> RequestState:
        child, parent = function(self, *args, **kwargs), _of(self)
        if parent is not None:
            with gpuscope.extract(parent.token):  # One more answer to the same request.
                setattr(child, _GENERATION, gpuscope.Generation("generate"))
        return child

    return fork


def _begun_again(function: Callable[..., RequestState]) -> Function:
    def create_equivalent_initial_request(self: RequestState, *args: object, **kwargs: object) -> RequestState:
        again = function(self, *args, **kwargs)
        setattr(again, _GENERATION, _of(self))
        return again

    return create_equivalent_initial_request


def _updated(function: Callable[..., bool]) -> Function:
    def update_and_check_completion(self: RequestState, *args: object, **kwargs: object) -> bool:
        generation = _of(self)
        if generation is None:
            return function(self, *args, **kwargs)
        before = len(self.generated_tokens)
        is_complete = function(self, *args, **kwargs)
        generation.had_tokens(len(self.generated_tokens) - before)
        if is_complete:
            generation.end()
        return is_complete

    return update_and_check_completion


def _failed(function: Function) -> Function:
    def fail_and_deliver(self: OutputRouter, state: RequestState, error: BaseException) -> object:
        generation = _of(state)
        if generation is not None:
            generation.end(error)
        return function(self, state, error)

    return fail_and_deliver


def _cancelled(function: Callable[..., Iterable[RequestState]]) -> Function:
    def clear_cancelled_requests(self: Scheduler, *args: object, **kwargs: object) -> Iterable[RequestState]:
        states = function(self, *args, **kwargs)
        for state in states:
            generation = _of(state)
            if generation is not None:
                generation.set_attribute("cancelled", True)
                generation.end()
        return states

    return clear_cancelled_requests


def _generation_step(function: Function) -> Function:
    def step(self: ContinuousBatchProcessor, *args: object, **kwargs: object) -> object:
        with _step(self.inputs_and_outputs):
            return function(self, *args, **kwargs)

    return step


def _step(ios: Ios) -> contextlib.ExitStack:
    block = contextlib.ExitStack()
    if gpuscope.is_enabled():
        with contextlib.suppress(Exception):  # Another version may keep it elsewhere: then the step is not a stage.
            pair = ios.io_pairs[ios.current_pair].host_io if hasattr(ios, "io_pairs") else ios
            requests = pair.requests_in_batch
            members = [_of(request.state) or gpuscope.Token() for request in requests]
            tokens = [request.query_length for request in requests]
            for request, member in zip(requests, members, strict=True):
                if request.has_new_token and isinstance(member, gpuscope.Generation):
                    member.prefilled()
            block.enter_context(gpuscope.extract(gpuscope.Token()))  # Some Pythons have threads inherit a context.
            stage = gpuscope.stage(
                "generate_step", stream=ios.compute_stream, members=members, weights=tokens, basis="tokens"
            )
            block.enter_context(stage)
    return block
