"""vLLM, which does not install here: its runner's names and the scheduler's output by stand-ins of the same shape."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import gpuscope
from gpuscope.instrument import instrument, uninstrument
from gpuscope.integrations import vllm as integration
from gpuscope.testing import capture


def test_a_step_says_what_is_in_it(monkeypatch):
    """A step has the number of requests, new and running, and of tokens, in subclasses of the runner too."""

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
    output = SimpleNamespace(
        scheduled_new_reqs=[1, 2],
        scheduled_cached_reqs=SimpleNamespace(req_ids=["a"]),
        num_scheduled_tokens={"a": 1, "b": 7, "c": 8},
        total_num_scheduled_tokens=16,
    )
    with capture() as spans:
        instrument([target for target in integration.TARGETS if target.module == name])
        try:
            runner = CPUModelRunner()
            runner.model_config = SimpleNamespace(model="org/model")
            assert runner.execute_model(output) == 3
            assert runner.sample_tokens(None) is None
        finally:
            uninstrument()
        assert gpuscope.flush()
    step, sample = spans
    assert (step.name, sample.name) == ("vllm.execute_model", "vllm.sample_tokens")
    counts = {key: step.attributes[f"vllm.{key}"] for key in ("requests", "requests.new", "requests.running", "tokens")}
    assert counts == {"requests": 3, "requests.new": 2, "requests.running": 1, "tokens": 16}
    assert step.attributes["gen_ai.request.model"] == "org/model"
    assert "gen_ai.operation.name" not in step.attributes
