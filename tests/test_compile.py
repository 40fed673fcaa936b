"""`torch.compile` over functions that contain stages: no graph break, equal results, no recompilation. On the CPU."""

from __future__ import annotations

import functools

import pytest

from gpuscope import stage

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Each test begins with nothing compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


compiled = functools.partial(torch.compile, fullgraph=True, backend="eager")
X = torch.arange(4.0)


def forms():
    """Functions that contain a stage in each form, and compute x * 2 + 1."""

    @stage("function")
    def double(x):
        return x * 2

    @stage
    def bare(x):
        return x * 2

    class Net(torch.nn.Module):
        @stage("forward", attributes={"model": "net"})
        def forward(self, x):
            return self.method(x)

        @stage("method")
        def method(self, x):
            return x * 2

        @staticmethod
        @stage("static")
        def static(x):
            return x * 2

        @classmethod
        @stage("class")
        def klass(cls, x):
            return x * 2

    class Scale:
        def __call__(self, x):
            return x * 2

    net, scale, lambda_ = Net(), stage("object")(Scale()), stage("lambda")(lambda x: x * 2)

    def block(x):
        with stage("block"):
            return x * 2

    def block_with_attribute(x):
        with stage("block", attributes={"a": 1}) as s:
            s.set_attribute("batch", 4)
            return x * 2

    def nested(x):
        with stage("outer"), stage("inner"):
            return double(x)

    return {
        "function": double,
        "bare": bare,
        "module": net,
        "method": net.method,
        "static": Net.static,
        "class": Net.klass,
        "object": scale,
        "lambda": lambda_,
        "block": block,
        "block_with_attribute": block_with_attribute,
        "nested": nested,
    }


NAMES = [
    "function", "bare", "module", "method", "static", "class", "object", "lambda", "block", "block_with_attribute",
    "nested",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_form_traces_whole(bench, name):
    """A function with a stage in it is one graph, computes the same, and records nothing while it is compiled."""
    function = forms()[name]
    program = compiled(lambda x: function(x) + 1)
    assert torch.equal(program(X), X * 2 + 1)
    assert torch.equal(program(X), X * 2 + 1)
    assert [span for span in bench.collect() if span.kind == "host"] == []
    assert torch.equal(function(X), X * 2)
    assert bench.collect() != []


def test_stage_around_a_compiled_callable_is_timed(bench):
    """The whole call of a compiled function is a stage."""
    around = stage("whole")(torch.compile(lambda x: x + 1, backend="eager"))
    around(X)
    around(X)
    assert len(bench.named("whole")) == 2


def test_twenty_separately_compiled_stages_share_no_limit(bench):
    """Dynamo's limit of 8 compiled versions counts by code object, and each wrapper has its own."""
    stages = [stage(f"s{n}")(lambda x, n=n: x + n) for n in range(20)]
    programs = [compiled(function) for function in stages]
    for n, program in enumerate(programs):
        assert torch.equal(program(X), X + n)


def test_toggling_does_not_recompile(make_bench):
    """Whether recording is on is not looked at while tracing, so no guard depends on it."""
    from torch._dynamo.testing import CompileCounter

    from gpuscope import _runtime

    bench = make_bench()
    counter = CompileCounter()
    function = forms()["nested"]
    program = torch.compile(lambda x: function(x) + 1, backend=counter, fullgraph=True)
    for recorder in (bench.engine.recorder, None, bench.engine.recorder):
        _runtime.state.recorder = recorder
        assert torch.equal(program(X), X * 2 + 1)
    assert counter.frame_count == 1


def test_generator_in_eager_code_around_a_compiled_step(bench):
    """A generator stage whose body calls compiled code is timed per resumption."""
    step = torch.compile(lambda x: x + 1, backend="eager")

    @stage("tokens")
    def tokens(x):
        for _ in range(2):
            x = step(x)
            yield x

    assert len(list(tokens(X))) == 2
    assert len(bench.named("tokens")) == 3
