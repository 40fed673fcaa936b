"""vLLM, which does not install here: its runner's names and the scheduler's output by stand-ins of the same shape."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest

import gpuscope
from gpuscope.instrument import instrument, uninstrument
from gpuscope.integrations import vllm as integration
from gpuscope.testing import capture


@dataclass
class NewRequestData:
    """A request that is scheduled for the first time, as vLLM has it."""

    req_id: str
    prompt_token_ids: list[int] | None
    num_computed_tokens: int = 0


@dataclass
class CachedRequestData:
    """Requests that were scheduled before: what is computed and what was made of each, so far."""

    req_ids: list[str] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)
    num_output_tokens: list[int] = field(default_factory=list)


@dataclass
class SchedulerOutput:
    """What a step is to do."""

    num_scheduled_tokens: dict[str, int]
    scheduled_new_reqs: list[NewRequestData] = field(default_factory=list)
    scheduled_cached_reqs: CachedRequestData = field(default_factory=CachedRequestData)
    finished_req_ids: set[str] = field(default_factory=set)

    @property
    def total_num_scheduled_tokens(self) -> int:
        """Of all requests."""
        return sum(self.num_scheduled_tokens.values())


STEPS = (
    SchedulerOutput({"a": 7, "b": 9}, [NewRequestData("a", [1] * 7), NewRequestData("b", [1] * 12)]),
    SchedulerOutput({"a": 1, "b": 3}, [], CachedRequestData(["a", "b"], [7, 9], [1, 0])),
    SchedulerOutput(
        {"a": 1, "b": 1, "c": 2},
        [NewRequestData("c", [1] * 18, num_computed_tokens=16)],
        CachedRequestData(["a", "b"], [8, 12], [2, 1]),
    ),
    SchedulerOutput({"b": 1, "c": 1}, [], CachedRequestData(["b", "c"], [13, 18], [2, 1]), {"a"}),
    SchedulerOutput({}, finished_req_ids={"b", "c"}),
)
"""`a` has its prompt in one piece and 3 tokens; `b` in two pieces, and 3; `c` half of it from a cache, and 2."""


@pytest.fixture
def runner(monkeypatch):
    """A runner of a subclass, instrumented: its methods return what shows that they were called."""

    class GPUModelRunner:
        def execute_model(self, scheduler_output, intermediate_tensors=None):
            return len(scheduler_output.num_scheduled_tokens)

        def sample_tokens(self, grammar_output):
            return grammar_output

    class CPUModelRunner(GPUModelRunner):
        def execute_model(self, scheduler_output, intermediate_tensors=None):
            return super().execute_model(scheduler_output)

    name = integration.TARGETS[0].module
    module = ModuleType(name)
    module.GPUModelRunner, GPUModelRunner.__module__ = GPUModelRunner, name
    monkeypatch.setitem(sys.modules, name, module)
    made = CPUModelRunner()
    made.model_config = SimpleNamespace(model="org/model")
    made.parallel_config = SimpleNamespace(world_size=1)
    return made


def run(runner, steps):
    """Run steps; return the host spans, and those of generations by their ids, with their light spans."""
    with capture() as spans:
        instrument([target for target in integration.TARGETS if target.module == integration.TARGETS[0].module])
        try:
            for step in steps:
                assert runner.execute_model(step) == len(step.num_scheduled_tokens)
            assert runner.sample_tokens(None) is None
        finally:
            uninstrument()
        assert gpuscope.flush()
    generations = {span.attributes["vllm.request_id"]: span for span in spans if span.name == "generate"}
    light = {span.parent_id: span for span in spans if span.name == "vllm.execute_model (shared)"}
    return spans, {name: (span, light[span.span_id]) for name, span in generations.items()}


def test_a_step_says_what_is_in_it(runner):
    """A step has the number of requests, new and running, and of tokens, in subclasses of the runner too."""
    spans, _ = run(runner, STEPS)
    steps = [span for span in spans if span.name == "vllm.execute_model"]
    assert len(steps) == len(STEPS)
    assert len([span for span in spans if span.name == "vllm.sample_tokens"]) == 1
    names = ("requests", "requests.new", "requests.running", "tokens")
    assert {key: steps[2].attributes[f"vllm.{key}"] for key in names} == {
        "requests": 3,
        "requests.new": 1,
        "requests.running": 2,
        "tokens": 4,
    }
    assert steps[0].attributes["gen_ai.request.model"] == "org/model"
    assert "gen_ai.operation.name" not in steps[0].attributes


def test_a_step_is_a_batch_of_its_requests(runner):
    """It links to each request in it; the last one, which only tells of ends, is none."""
    spans, generations = run(runner, STEPS)
    steps = [span for span in spans if span.name == "vllm.execute_model"]
    ids = {generation.span_id: name for name, (generation, _) in generations.items()}
    linked = ["".join(sorted(ids[span_id] for _, span_id, *_ in step.links)) for step in steps]
    assert linked == ["ab", "ab", "abc", "bc", ""]
    assert steps[0].attributes["gpuscope.batch.basis"] == "tokens"
    assert "gpuscope.batch.size" not in steps[-1].attributes
    assert gpuscope.statistics().batch_faults == {}


def test_each_request_is_a_generation(runner):
    """It has its tokens in and out, and one light span with all its steps, in a trace of its own."""
    _, generations = run(runner, STEPS)
    said = {name: generation.attributes for name, (generation, _) in generations.items()}
    assert {name: each["gen_ai.usage.input_tokens"] for name, each in said.items()} == {"a": 7, "b": 12, "c": 18}
    assert {name: each["gen_ai.usage.output_tokens"] for name, each in said.items()} == {"a": 3, "b": 3, "c": 2}
    assert {name: light.attributes["gpuscope.batch.steps"] for name, (_, light) in generations.items()} == {
        "a": 3,
        "b": 4,
        "c": 2,
    }
    assert all(each["gen_ai.operation.name"] == "text_completion" for each in said.values())
    assert all(each["gen_ai.server.time_to_first_token"] > 0 for each in said.values())
    assert len({generation.trace_id for generation, _ in generations.values()}) == 3


def test_workers_of_one_model_count_no_request_twice(runner):
    """Where several share a model, none says which operation it is, so there are no metrics."""
    runner.parallel_config.world_size = 2
    _, generations = run(runner, STEPS)
    assert not any("gen_ai.operation.name" in generation.attributes for generation, _ in generations.values())


def test_another_version_is_not_broken(runner, make_bench):
    """Where the scheduler says something else, steps run and are stages; the fault is counted."""
    bench = make_bench()
    instrument([target for target in integration.TARGETS if target.module == integration.TARGETS[0].module])
    try:
        assert runner.execute_model(SimpleNamespace(num_scheduled_tokens={"a": 1})) == 1
    finally:
        uninstrument()
    assert bench.named("vllm.execute_model")
    assert gpuscope.statistics().batch_faults == {"unreadable": 1}
