"""Continuous batching of transformers, with a small random Llama: requests join and leave at each step."""

from __future__ import annotations

import copy
import time

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers.generation.continuous_batching")

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor, OutputRouter
from transformers.generation.continuous_batching.requests import RequestState

import gpuscope

from ..spans_of_files import wait_for
from .models_recorded import recorded

NEW = 5
LENGTHS = (3, 20, 7, 1)
BUDGET = 16
"""Tokens of a step at most, so that a prompt of 20 takes two steps."""
STEP, LIGHT = "generate_step", "generate_step (shared)"


@pytest.fixture(scope="module")
def llama():
    """Two layers of random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)).eval()


def options(**more):
    """Greedy, never an end but after `NEW` tokens; a small cache."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    return {
        "generation_config": GenerationConfig(**settings | more),
        "continuous_batching_config": ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=BUDGET),
    }


def of_name(spans, name):
    """Host spans of a name, in order."""
    return [span for span in spans if span.name == name]


def light_of(spans, generation):
    """The light span of a generation, of which it has one."""
    (found,) = (span for span in of_name(spans, LIGHT) if span.parent_id == generation.span_id)
    return found


@pytest.fixture(scope="module")
def spans(llama):
    """Spans of `generate_batch` with prompts of known lengths, whose answers are those without recording."""
    inputs = [[3] * length for length in LENGTHS]
    plain = llama.generate_batch(inputs, **options())
    with recorded("transformers") as spans, gpuscope.stage("request"):
        found = llama.generate_batch(inputs, **options())
    assert [each.generated_tokens for each in found.values()] == [each.generated_tokens for each in plain.values()]
    return spans


class TestGenerateBatch:
    """`generate_batch` of prompts of known lengths."""

    def test_each_request_is_a_generation_in_its_trace(self, spans):
        """It is below the stage that asked, with its tokens in and out and the times of a client."""
        (request,) = of_name(spans, "request")
        generations = of_name(spans, "generate")
        assert {(span.trace_id, span.parent_id) for span in generations} == {(request.trace_id, request.span_id)}
        assert sorted(span.attributes["gen_ai.usage.input_tokens"] for span in generations) == sorted(LENGTHS)
        for span in generations:
            said = span.attributes
            assert said["gen_ai.usage.output_tokens"] == NEW
            assert (said["gen_ai.operation.name"], said["gen_ai.provider.name"]) == ("text_completion", "transformers")
            assert said["gen_ai.request.model"] == "LlamaForCausalLM"
            first, each = said["gen_ai.server.time_to_first_token"], said["gen_ai.server.time_per_output_token"]
            assert 0 < first + (NEW - 1) * each <= span.duration_ns / 1e9

    def test_one_light_span_with_all_steps(self, spans):
        """A request has so many steps as tokens; one with a prompt in two pieces has one more."""
        for generation in of_name(spans, "generate"):
            light = light_of(spans, generation)
            pieces = light.attributes["gpuscope.batch.steps"] - (NEW - 1)
            assert pieces == (2 if generation.attributes["gen_ai.usage.input_tokens"] > BUDGET else 1)
            assert light.attributes["gpuscope.batch.basis"] == "tokens"
            assert light.attributes["gpuscope.batch.size"] <= len(LENGTHS)
        assert len(of_name(spans, LIGHT)) == len(LENGTHS)

    def test_steps_are_batches_of_whoever_is_in_them(self, spans):
        """Steps are in no request's trace, and link to each request once per step of it."""
        steps = of_name(spans, STEP)
        (request,) = of_name(spans, "request")
        assert not any(step.parent_id or step.trace_id == request.trace_id for step in steps)
        links = [span_id for step in steps for _, span_id, *_ in step.links]
        for generation in of_name(spans, "generate"):
            light = light_of(spans, generation)
            assert links.count(generation.span_id) == light.attributes["gpuscope.batch.steps"]

    def test_waits_and_steps_are_the_whole(self, spans):
        """From the token to the last step, a request is in a step or waits for one."""
        by_request = {}
        for step in of_name(spans, STEP):
            for _, span_id, *_ in step.links:
                by_request[span_id] = by_request.get(span_id, 0) + step.duration_ns
        for generation in of_name(spans, "generate"):
            light = light_of(spans, generation)
            whole_ns = light.end_ns - generation.start_ns
            assert light.attributes["gpuscope.batch.wait"] * 1e9 + by_request[generation.span_id] == pytest.approx(
                whole_ns,
                abs=200_000,  # The token is made a little after its stage has begun.
            )


def test_it_streams(llama):
    """Requests come and go while others run; times to the first token are those that the client sees, or less."""
    seen = {}
    with recorded("transformers") as spans, llama.continuous_batching_context_manager(**options()) as manager:
        for number in range(6):
            with gpuscope.stage("request") as stage:
                stage.set_attribute("number", number)
                asked = time.perf_counter()
                request_id = manager.add_request([3] * (number + 1), streaming=True)
            for _ in manager.request_id_iter(request_id):
                seen.setdefault(number, time.perf_counter() - asked)
    generations = of_name(spans, "generate")
    assert len({span.trace_id for span in generations}) == len(generations) == 6
    numbers = {span.span_id: span.attributes["number"] for span in of_name(spans, "request")}
    for generation in generations:
        assert generation.attributes["gen_ai.usage.output_tokens"] == NEW
        assert generation.attributes["gen_ai.server.time_to_first_token"] <= seen[numbers[generation.parent_id]]
        light_of(spans, generation)


def test_a_request_that_is_cancelled(llama):
    """It ends, and says so; the other one goes on."""
    with (
        recorded("transformers") as spans,
        llama.continuous_batching_context_manager(**options(max_new_tokens=200)) as manager,
    ):
        first = manager.add_request([3, 4], streaming=True)
        second = manager.add_request([5], max_new_tokens=3)
        next(manager.request_id_iter(first))
        manager.cancel_request(first)
        assert wait_for(lambda: [r for r in [manager.get_result(timeout=1)] if r and r.request_id == second])
        wait_for(lambda: not manager.batch_processor.scheduler.active_requests)
    generations = of_name(spans, "generate")
    assert [bool(span.attributes.get("cancelled")) for span in generations] == [True, False]
    assert 1 <= generations[0].attributes["gen_ai.usage.output_tokens"] < 200
    assert all(span.status == "UNSET" for span in generations)


def test_a_step_that_fails(llama, monkeypatch):
    """Each request in it fails, with the error."""

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("transformers.generation.continuous_batching.model_runner.ModelRunner.compute_batch", fail)
    with recorded("transformers") as spans:
        found = llama.generate_batch([[3], [4, 5]], **options())
    assert all(each.error for each in found.values())
    assert [span.attributes["error.type"] for span in of_name(spans, "generate")] == ["RuntimeError"] * 2
    assert of_name(spans, STEP)[0].status == "ERROR"


def test_several_answers_to_one_prompt(llama):
    """Each further answer is a generation below that of the first."""
    with recorded("transformers") as spans:
        found = llama.generate_batch([[3, 4]], **options(num_return_sequences=3, do_sample=True))
    assert len(found) == 3
    (first,) = (span for span in of_name(spans, "generate") if not span.parent_id)
    others = [span for span in of_name(spans, "generate") if span is not first]
    assert [span.parent_id for span in others] == [first.span_id] * 2
    assert all(span.attributes["gen_ai.usage.output_tokens"] == NEW for span in of_name(spans, "generate")[:1])


def test_what_is_refused_is_over(llama):
    """A request that comes while the manager stops is not a generation that never ends."""
    with recorded("transformers") as spans, llama.continuous_batching_context_manager(**options()) as manager:
        manager.add_request([3])
        manager.stop(block=True)
        assert manager.add_request([4]) is None
    assert len(of_name(spans, "generate")) == 2


def test_a_state_that_is_copied_keeps_its_generation(llama):
    """`copy.deepcopy` of a request's state, as transformers makes, works."""
    with recorded("transformers"):
        state = RequestState("1", [1])
        state._gpuscope_generation = gpuscope.Generation()
        assert copy.deepcopy(state)._gpuscope_generation is state._gpuscope_generation
        state._gpuscope_generation.end()


def test_uninstrument_restores_what_was():
    """Afterwards the classes have what they had."""
    owners = (ContinuousBatchProcessor, OutputRouter, RequestState)
    before = [dict(vars(owner)) for owner in owners]
    with recorded("transformers"):
        assert [dict(vars(owner)) for owner in owners] != before
    assert [dict(vars(owner)) for owner in owners] == before
