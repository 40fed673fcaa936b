"""`torch.compile` traces through stages of every form as if they were not there."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import gpuscope
from gpuscope.testing import capture


def with_block():
    """A function with a block, an attribute set in it, and a block inside the block."""

    def function(x):
        with gpuscope.stage("outer") as stage:
            stage.set_attribute("rows", 4)
            y = x.sin()
            with gpuscope.stage("inner", attributes={"model": "small"}):
                y = y * 2
        return y + 1

    return function


def decorated_function():
    """A function that calls one decorated with a name, one without, and a lambda."""

    @gpuscope.stage("named")
    def named(x):
        return x.sin()

    @gpuscope.stage
    def unnamed(x, *, by=1):
        return x + by

    double = gpuscope.stage("lambda")(lambda x: x * 2)
    return lambda x: double(unnamed(named(x), by=3))


def methods():
    """A method, and class and static methods in both orders of decoration."""

    class Model:
        scale = 2

        @gpuscope.stage("method")
        def method(self, x):
            return x * self.scale

        @classmethod
        @gpuscope.stage("class inside")
        def class_inside(cls, x):
            return x * cls.scale

        @gpuscope.stage("class outside")
        @classmethod
        def class_outside(cls, x):
            return x + cls.scale

        @staticmethod
        @gpuscope.stage("static inside")
        def static_inside(x):
            return x.sin()

        @gpuscope.stage("static outside")
        @staticmethod
        def static_outside(x):
            return x.cos()

    model = Model()

    def function(x):
        x = model.method(x) + model.class_inside(x) + Model.class_outside(x)
        return model.static_inside(x) + Model.static_outside(x)

    return function


def module_forward():
    """An `nn.Module` whose `forward` is decorated, with a decorated submodule's."""

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        @gpuscope.stage("forward")
        def forward(self, x):
            return self.linear(x).relu()

    torch.manual_seed(0)
    return torch.nn.Sequential(Layer(), Layer()).cuda().eval()


def callable_object():
    """An object with a decorated `__call__`."""

    class Scale:
        @gpuscope.stage("call")
        def __call__(self, x):
            return x * 3

    scale = Scale()
    return lambda x: scale(x) + 1


def generator():
    """A decorated generator that the compiled function runs through."""

    @gpuscope.stage("generator")
    def parts(x):
        yield x.sin()
        yield x.cos()

    return lambda x: sum(parts(x))


def stage_inside_stage():
    """A decorated function that is the compiled one itself, with a block and another decorated function inside."""
    inner = gpuscope.stage("inner")(lambda x: x.tanh())

    @gpuscope.stage("outer")
    def outer(x):
        with gpuscope.stage("block"):
            return inner(x) * 2

    return outer


FORMS = [with_block, decorated_function, methods, module_forward, callable_object, generator, stage_inside_stage]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """Compile anew in each test."""
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def x():
    """An input."""
    return torch.linspace(0, 1, 32, device="cuda").reshape(4, 8)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_traces_whole(form, x):
    """`torch.compile(fullgraph=True)` over each form of stage makes one graph without a break, and equal results."""
    with capture(), torch.no_grad():
        function = form()
        expected = function(x)
        got = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, expected)
    assert not counters["graph_break"]


def test_all_forms_in_one_graph_with_the_default_backend(x):
    """All forms together compile into one graph with the default backend, and compute the same."""
    with capture(), torch.no_grad():
        functions = [form() for form in FORMS]

        def everything(x):
            return torch.stack([function(x) for function in functions])

        expected = everything(x)
        got = torch.compile(everything, fullgraph=True)(x)
    torch.testing.assert_close(got, expected)
    assert not counters["graph_break"]


def test_switching_recording_on_and_off_recompiles_nothing(x):
    """A compiled function is the same with recording on, off, on again, and within another stage."""
    gpuscope.enable(exporters="none")
    function = stage_inside_stage()
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        expected = compiled(x)
        gpuscope.disable()
        torch.testing.assert_close(compiled(x), expected)
        gpuscope.enable()
        torch.testing.assert_close(compiled(x), expected)
        with gpuscope.stage("around"):
            torch.testing.assert_close(compiled(x), expected)


def test_reduce_overhead_keeps_its_cuda_graphs(x, gpu_of):
    """
    With `mode="reduce-overhead"` no CUDA graph is skipped, and results stay right while the collector polls.

    A stage around the compiled call is timed.
    """
    with capture(interval_s=0.001) as spans, torch.no_grad():
        function = stage_inside_stage()
        expected = function(x)
        skips = counters["inductor"]["cudagraph_skips"]
        compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
        for _ in range(10):
            torch.compiler.cudagraph_mark_step_begin()
            with gpuscope.stage("around"):
                got = compiled(x)
            torch.testing.assert_close(got.clone(), expected)
        assert counters["inductor"]["cudagraph_skips"] == skips
        assert not counters["graph_break"]
    gpu = gpu_of(spans)
    around = [span for span in spans if span.kind == "host" and span.name == "around"]
    assert len(around) == 10
    assert all(span.span_id in gpu for span in around)
