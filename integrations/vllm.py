"""
vLLM: each step of the model runner is a stage, `vllm.execute_model`; the sampling after it is `vllm.sample_tokens`.

A step works on a batch of requests of many traces, so its stages form a trace of their own. Of the requests in a step,
`vllm.requests.new` are prefilled; each of the `vllm.requests.running` decodes, or continues a prefill in chunks;
`vllm.tokens` is the number of tokens scheduled, and `gen_ai.request.model` the model. A step is not a request, and has
no other of OpenTelemetry's attributes for those. The time to the first token is in vLLM's own metrics: nothing here
sees where a request begins and ends. vLLM's engine runs in separate processes, which must be instrumented
too: `GPUSCOPE` and `GPUSCOPE_FRAMEWORKS` reach them, and something there has to import gpuscope (`gpuscope run` does).

Not run, because vLLM needs a GPU and its CUDA build of PyTorch. Written against the source of vLLM 0.33.0.
"""

from gpuscope.instrument import Target

MODULE = "vllm"

_STEP = {
    "vllm.requests": "len(scheduler_output.num_scheduled_tokens)",
    "vllm.requests.new": "len(scheduler_output.scheduled_new_reqs)",
    "vllm.requests.running": "len(scheduler_output.scheduled_cached_reqs.req_ids)",
    "vllm.tokens": "scheduler_output.total_num_scheduled_tokens",
    "gen_ai.request.model": "self.model_config.model",
}
_RUNNERS = ("vllm.v1.worker.gpu_model_runner:GPUModelRunner", "vllm.v1.worker.gpu.model_runner:GPUModelRunner")

TARGETS = (
    *(
        Target("vllm.execute_model", f"{runner}.execute_model", _STEP, subclasses=True, optional=True)
        for runner in _RUNNERS
    ),
    *(Target("vllm.sample_tokens", f"{runner}.sample_tokens", subclasses=True, optional=True) for runner in _RUNNERS),
)
