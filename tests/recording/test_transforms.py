"""Stages under what PyTorch does to functions and modules: outputs, gradients and graphs are those without stages."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import sys
import types

import pytest

import gpuscope
from gpuscope import stage

torch = pytest.importorskip("torch")
from torch.func import functional_call, grad, jacfwd, jacrev, vmap  # noqa: E402
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.linspace(-1, 1, 12).reshape(3, 4)
forms = pytest.mark.parametrize("form", ["decorator", "block"])


@pytest.fixture(params=["on", "idle"])
def runs(request, bench):
    """Return a function that tells how often a stage was recorded, and whether that is right."""
    if request.param == "idle":
        gpuscope.disable()

    def were(expected: int, name: str = "part") -> bool:
        return len(bench.named(name)) == (expected if request.param == "on" else 0)

    return were


@pytest.fixture
def fresh_dynamo():
    """Nothing is compiled, before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def plain(x):
    """Return something that every transform has to work for."""
    return torch.tanh(torch.sin(x) * x).exp()


def staged(form, function=plain, name="part"):
    """Return the function as a stage of the given form; as it is for "plain"."""
    if form == "plain":
        return function
    if form == "decorator":
        return stage(name)(function)

    @functools.wraps(function)
    def block(*args, **kwargs):
        with stage(name) as s:
            s.set_attribute("form", form)
            return function(*args, **kwargs)

    return block


class Net(torch.nn.Module):
    """Two layers, with the same numbers each time."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.inner, self.outer = torch.nn.Linear(4, 5), torch.nn.Linear(5, 1)

    def forward(self, x):
        """Return one number per row."""
        return self.outer(plain(self.inner(x)))


def make_class(form):
    """Return the class of nets whose `forward` is a stage of the given form."""

    def block(self, x):
        with stage("part"):
            return self.outer(plain(self.inner(x)))

    forwards = {"plain": Net.forward, "decorator": stage("part")(Net.forward), "block": block}
    return type("Net", (Net,), {"forward": forwards[form], "__module__": __name__, "__qualname__": "StagedNet"})


def make(form):
    """Return such a net."""
    return make_class(form)()


def trained(module, x=X):
    """Return the output and all gradients of one step."""
    out = module(x)
    out.sum().backward()
    return [out.detach(), *[parameter.grad for parameter in module.parameters()]]


def same(some, others):
    """Tell whether all tensors of two lists are equal, bit for bit."""
    return len(some) == len(others) and all(map(torch.equal, some, others))


def calls(graph):
    """Return what a graph calls, in order."""
    return [(node.op, str(node.target)) for node in graph.nodes]


class TestTracers:
    """What turns a function into a graph sees through a stage."""

    @forms
    @pytest.mark.parametrize("strict", [True, False])
    def test_exported_program_is_that_of_the_module_without_stages(self, runs, form, strict):
        """`torch.export` gives the same graph, signature and numbers, and nothing of ours is in it."""
        program = torch.export.export(make(form), (X,), strict=strict)
        expected = torch.export.export(make("plain"), (X,), strict=strict)
        assert calls(program.graph) == calls(expected.graph)
        assert str(program.graph_signature) == str(expected.graph_signature)
        assert "gpuscope" not in program.graph_module.code
        assert torch.equal(program.module()(X), make("plain")(X))

    @forms
    def test_strict_export_records_nothing(self, bench, form):
        """Strict export reads the function and does not run it."""
        torch.export.export(make(form), (X,), strict=True)
        assert bench.named("part") == []

    @forms
    def test_jit_trace_keeps_the_operations_alone(self, runs, form):
        """`torch.jit.trace` runs the function, which is recorded, and what it makes has no stage in it."""
        function = staged(form)
        traced = torch.jit.trace(function, X, check_trace=False)
        expected = torch.jit.trace(plain, X, check_trace=False)
        kinds, wanted = ([node.kind() for node in each.inlined_graph.nodes()] for each in (traced, expected))
        assert kinds == wanted
        assert torch.equal(traced(X), plain(X))
        assert runs(1)
        assert torch.equal(torch.jit.trace(make(form), X)(X), make("plain")(X))

    @forms
    def test_fx_keeps_the_operations_alone(self, runs, form):
        """`torch.fx.symbolic_trace` of a module that calls a stage, or is one, is that of one without."""

        class Caller(torch.nn.Module):
            def __init__(self, function):
                super().__init__()
                self.net, self.function = Net(), function

            def forward(self, x):
                return self.function(self.net(x)) + 1

        graph, expected = (torch.fx.symbolic_trace(Caller(staged(each))) for each in (form, "plain"))
        assert graph.code == expected.code
        assert runs(1)
        assert torch.equal(graph(X), Caller(plain)(X))
        assert runs(1)
        assert torch.fx.symbolic_trace(make(form)).code == torch.fx.symbolic_trace(make("plain")).code

    def test_script_knows_the_source_but_not_its_names(self, bench):
        """`torch.jit.script` compiles a decorated function from its source, but looks names up where its wrapper is."""

        @stage("part")
        def double(x):
            return x * 2

        assert torch.equal(torch.jit.script(double)(X), X * 2)
        assert bench.named("part") == []
        with pytest.raises(RuntimeError, match="undefined value torch"):
            torch.jit.script(stage("part")(plain))

    @pytest.mark.parametrize("make_graph", [torch.jit.script, lambda f: torch.jit.trace(f, X), torch.fx.symbolic_trace])
    def test_stage_of_a_graph_is_timed(self, runs, make_graph):
        """What a tracer has made can be a stage, function or module."""
        whole = stage("part")(make_graph(plain))
        assert torch.equal(whole(X), plain(X))
        assert torch.equal(stage("part")(make_graph(Net()))(X), Net()(X))
        assert runs(2)


class TestFunctorch:
    """`torch.func`."""

    @forms
    @pytest.mark.parametrize(
        "transform",
        [
            vmap,
            lambda f: grad(lambda x: f(x).sum()),
            lambda f: vmap(grad(lambda x: f(x).sum())),
            jacrev,
            jacfwd,
            lambda f: jacfwd(jacrev(f)),
        ],
        ids=["vmap", "grad", "vmap(grad)", "jacrev", "jacfwd", "hessian"],
    )
    def test_transformed_stage_is_the_transformed_function(self, runs, form, transform):
        """Batching and differentiating pass through a stage, which is timed once; a stage around them is, too."""
        assert torch.equal(transform(staged(form))(X), transform(plain)(X))
        assert runs(1)
        assert torch.equal(staged(form, transform(plain), "around")(X), transform(plain)(X))
        assert runs(1, "around")

    @forms
    def test_functional_call(self, runs, form):
        """A module whose `forward` is a stage takes its parameters from a dictionary, and gradients flow to them."""
        parameters = {name: value.detach() * 2 for name, value in Net().named_parameters()}

        def loss(module, given):
            return functional_call(module, given, (X,)).sum()

        found, expected = (grad(functools.partial(loss, make(each)))(parameters) for each in (form, "plain"))
        assert same(list(found.values()), list(expected.values()))
        assert runs(1)


class TestModules:
    """What wraps, copies, stores and hooks modules."""

    @forms
    def test_data_parallel(self, runs, form):
        """`DataParallel` calls the module where there is no GPU, and its replicas run the stage as well."""
        if torch.cuda.is_available():
            pytest.skip("would move the module to the GPUs")
        net = make(form)
        assert same(trained(torch.nn.DataParallel(net)), trained(make("plain")))
        assert torch.equal(net._replicate_for_data_parallel()(X), make("plain")(X))
        assert runs(2)

    @forms
    @pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
    def test_distributed_data_parallel(self, runs, form, options):
        """Gradients after `DistributedDataParallel` has reduced them are those without a stage."""
        distributed = torch.distributed
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        try:
            wrap = functools.partial(torch.nn.parallel.DistributedDataParallel, **options)
            assert same(trained(wrap(make(form))), trained(wrap(make("plain"))))
        finally:
            distributed.destroy_process_group()
        assert runs(1)

    @forms
    def test_copies_are_stages_of_their_own(self, runs, form):
        """A deep copy works and is recorded as the module is, and shares no parameter with it."""
        net = make(form)
        again = copy.deepcopy(net)
        assert same(trained(again), trained(make("plain")))
        assert all(parameter.grad is None for parameter in net.parameters())
        assert runs(1)

    @forms
    def test_pickled_and_saved_modules_are_what_they_were(self, runs, form, monkeypatch):
        """A module whose class has a stage goes through `pickle` and `torch.save`, whole and as a state."""
        kind = make_class(form)
        monkeypatch.setattr(sys.modules[__name__], "StagedNet", kind, raising=False)
        net, file = kind(), io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        loaded = [pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False), kind()]
        loaded[2].load_state_dict(net.state_dict())
        for each in loaded:
            assert same(trained(each), trained(make("plain")))
        assert runs(3)
        assert list(net.state_dict()) == list(Net().state_dict())

    @forms
    def test_hooks(self, runs, form):
        """Hooks run around a staged `forward`, see its values and change them; a hook may be a stage itself."""

        def hooked(net, form):
            scale = staged(form, lambda module, args, out: out * 3, "hook")
            seen = []
            net.register_forward_pre_hook(staged(form, lambda module, args: (args[0] + 1,), "pre"))
            net.register_forward_hook(scale)
            net.register_full_backward_hook(staged(form, lambda module, *grads: seen.append(grads[1][0]), "backward"))
            return [*trained(net), *seen]

        assert same(hooked(make(form), form), hooked(make("plain"), "plain"))
        assert all(runs(1, name) for name in ("pre", "part", "hook", "backward"))


class TestModes:
    """What changes how operations run."""

    @forms
    def test_autocast(self, runs, form):
        """Mixed precision reaches into a stage, and one inside it leaves precision alone."""

        def step(net):
            with torch.autocast("cpu", torch.bfloat16):
                return trained(net)

        found, expected = step(make(form)), step(make("plain"))
        assert found[0].dtype == torch.bfloat16
        assert same(found, expected)
        around = torch.autocast("cpu", torch.bfloat16)(make(form).forward)
        assert torch.equal(around(X), expected[0])
        inside = staged(form, torch.autocast("cpu", torch.bfloat16)(make("plain")))
        assert torch.equal(inside(X), expected[0])
        assert runs(3)

    @forms
    @pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
    def test_inference_mode(self, runs, form, mode):
        """A stage in inference mode makes inference tensors, whichever decorator is above the other."""
        for function in (mode()(staged(form)), staged(form, mode()(plain))):
            out = function(X.clone().requires_grad_())
            assert (out.is_inference(), out.requires_grad) == (mode is torch.inference_mode, False)
            assert torch.equal(out, plain(X))
        assert runs(2)

    @forms
    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("early_stop", [True, False])
    def test_checkpointing_records_the_second_run_too(self, bench, form, reentrant, early_stop):
        """A stage that is computed again is recorded again, below the stage that wanted it, and is no error."""

        def step(form):
            x = X.clone().requires_grad_()
            function = staged(form)
            with set_checkpoint_early_stop(early_stop):
                with stage("forward"):
                    out = checkpoint(lambda x: function(x) * 2, x, use_reentrant=reentrant)
                with stage("backward"):
                    out.sum().backward()
            return [out.detach(), x.grad]

        expected = step("plain")
        bench.collect().clear()
        assert same(step(form), expected)
        first, second = bench.named("part")
        assert first.parent_id == bench.named("forward")[0].span_id
        assert second.parent_id == bench.named("backward")[0].span_id
        assert {span.status for span in (first, second)} == {"UNSET"}

    @forms
    def test_checkpointing_while_idle(self, bench, form):
        """Gradients are right with recording off as well."""
        gpuscope.disable()
        grads = []
        for each in (form, "plain"):
            x = X.clone().requires_grad_()
            checkpoint(staged(each), x, use_reentrant=False).sum().backward()
            grads.append(x.grad)
        assert torch.equal(*grads)
        assert bench.collect() == []


@pytest.mark.usefixtures("fresh_dynamo")
class TestCompile:
    """`torch.compile` around the transforms and modules; functions alone are in `test_compile`."""

    @forms
    @pytest.mark.parametrize("how", ["module.compile", "torch.compile"])
    def test_module_whose_forward_is_a_stage(self, runs, form, how):
        """A compiled module gives the outputs and gradients of one without a stage, which is left out."""

        def compiled(net):
            options = {"fullgraph": True, "backend": "aot_eager"}
            if how == "torch.compile":
                return torch.compile(net, **options)
            net.compile(**options)
            return net

        assert same(trained(compiled(make(form))), trained(compiled(make("plain"))))
        assert runs(0)

    @forms
    @pytest.mark.parametrize("transform", [vmap, lambda f: grad(lambda x: f(x).sum())], ids=["vmap", "grad"])
    def test_transforms_of_stages_compile_whole(self, runs, form, transform):
        """A transform of a stage is one graph, with a stage inside or outside of the transform."""
        for function in (transform(staged(form)), staged(form, transform(plain))):
            program = torch.compile(function, fullgraph=True, backend="eager")
            assert torch.equal(program(X), transform(plain)(X))
        assert runs(0)

    @forms
    def test_checkpoint_inside_a_compiled_function(self, runs, form):
        """Activation checkpointing of a stage compiles whole, with the same gradients."""
        grads = []
        for each in (form, "plain"):
            function, x = staged(each), X.clone().requires_grad_()
            program = torch.compile(
                lambda x, function=function: checkpoint(function, x, use_reentrant=False),
                fullgraph=True,
                backend="aot_eager",
            )
            program(x).sum().backward()
            grads.append(x.grad)
        assert torch.equal(*grads)
        assert runs(0)

    @forms
    def test_graph_break_in_a_stage(self, runs, form):
        """What Dynamo can't trace inside a stage gives equal results, whether it is compiled in parts or not at all."""

        def broken(x):
            y = torch.sin(x)
            torch._dynamo.graph_break()
            return y * x

        function = staged(form, broken)
        program = torch.compile(lambda x: function(x + 1) + 1, backend="eager")
        for _ in range(2):
            assert torch.equal(program(X), broken(X + 1) + 1)

    @forms
    def test_twenty_modules_compile_separately(self, bench, form):
        """Twenty stages, each of a class of its own and compiled whole, share no limit of versions."""
        expected = make("plain")(X)
        for _ in range(20):
            code = make_class("plain").forward.__code__.replace()
            own = type(Net.forward)(code, globals())  # Such as twenty functions of a program.
            forward = staged(form, own)
            if form == "block":
                forward.__code__ = forward.__code__.replace()
            kind = type("Own", (Net,), {"forward": forward})
            assert torch.equal(torch.compile(kind(), fullgraph=True, backend="eager")(X), expected)
        assert bench.named("part") == []

    @pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="this PyTorch has no stances")
    @forms
    @pytest.mark.parametrize("first", ["on", "idle"])
    def test_enable_and_disable_cause_no_recompilation(self, bench, form, first):
        """What was compiled with recording on runs with it off, and the other way round."""
        if first == "idle":
            gpuscope.disable()
        programs = [
            torch.compile(each, fullgraph=True, backend="eager")
            for each in (make(form), staged(form), vmap(staged(form)))
        ]
        expected = [program(X) for program in programs]
        with torch.compiler.set_stance("fail_on_recompile"):
            for toggle in (gpuscope.disable, gpuscope.enable, gpuscope.disable, gpuscope.enable):
                toggle()
                assert same([program(X) for program in programs], expected)
        assert bench.engine is gpuscope._runtime.state.engine
        assert bench.named("part") == []

    @forms
    @pytest.mark.parametrize("dynamic", [None, True, False])
    def test_dynamic_shapes_cost_what_they_cost_without_stages(self, runs, form, dynamic):
        """For a row of shapes a stage is compiled as often as the function alone."""
        from torch._dynamo.testing import CompileCounter

        frames = []
        for each in (form, "plain"):
            torch._dynamo.reset()
            counter, function = CompileCounter(), staged(each)
            program = torch.compile(
                lambda x, function=function: function(x) + 1, backend=counter, dynamic=dynamic, fullgraph=True
            )
            for rows in (2, 3, 5, 8, 13):
                x = torch.ones(rows, 4)
                assert torch.equal(program(x), plain(x) + 1)
            frames.append(counter.frame_count)
        assert frames[0] == frames[1]

    @forms
    def test_modules_may_be_imported_while_dynamo_traces(self, bench, form):
        """Dynamo does not walk `sys.modules`, where an import at the wrong moment would break the compilation."""

        class Importing(types.ModuleType):
            @property
            def __class__(self):
                sys.modules[f"imported_{len(sys.modules)}"] = sys
                return types.ModuleType

        before = set(sys.modules)
        sys.modules["importing"] = Importing("importing")
        try:
            assert torch.equal(torch.compile(staged(form), fullgraph=True, backend="eager")(X), plain(X))
        finally:
            for name in [name for name in sys.modules if name.startswith("import") and name not in before]:
                del sys.modules[name]

    @forms
    def test_threads_compile_while_others_run(self, bench, form):
        """Stages of other threads are recorded, all of them, while some thread compiles, and every result is right."""
        from concurrent.futures import ThreadPoolExecutor
        from threading import Barrier, Event

        done, together, eager = Event(), Barrier(4), staged(form, name="eager")
        expected = plain(X)

        def compiling(number):
            together.wait()
            outs = []
            for turn in range(4):
                function = staged(form, lambda x, add=10 * number + turn: plain(x) + add)
                program = torch.compile(lambda x, function=function: function(x), fullgraph=True, backend="eager")
                outs.append(torch.equal(program(X), expected + (10 * number + turn)))
            return all(outs)

        def running():
            together.wait()
            count = 0
            while count < 20 or not done.is_set():
                assert torch.equal(eager(X), expected)
                count += 1
                bench.collect() if count % 500 == 0 else None
            return count

        with ThreadPoolExecutor(4) as pool:
            compilers = [pool.submit(compiling, number) for number in (1, 2)]
            runners = [pool.submit(running) for _ in range(2)]
            try:
                assert all(future.result() for future in compilers)
            finally:
                done.set()
            counts = [future.result() for future in runners]
        assert bench.statistics().recorded == sum(counts)
        assert bench.named("part") == []


@pytest.mark.parametrize("before", ["", "f(1)\n"], ids=["first seen by Dynamo", "run before"])
def test_torch_may_be_imported_after_the_functions_are_decorated(run_python, before):
    """Nobody tells gpuscope that PyTorch was imported, and a stage is traced whole all the same."""
    program = (
        "import sys\nfrom gpuscope import stage\n"
        "@stage('f')\ndef f(x):\n    with stage('block'): return x * 2\n"
        f"{before}assert 'torch' not in sys.modules\nimport torch\n"
        "program = torch.compile(f, fullgraph=True, backend='eager')\n"
        "assert torch.equal(program(torch.ones(3)), torch.ones(3) * 2)\n"
        "f(torch.ones(3))\nprint('ok')\n"
    )
    result = run_python(program, GPUSCOPE="idle", PYTHONPATH=":".join(path for path in sys.path if path))
    assert result.stdout == "ok\n", result.stderr


@pytest.mark.parametrize("order", ["gpuscope, torch", "torch, gpuscope"])
@pytest.mark.parametrize("native", ["1", "0"])
def test_stages_are_traced_whole_in_either_order_of_imports(run_python, order, native):
    """Absent, idle and on, compiled and exported; switching recompiles nothing; Dynamo comes when PyTorch wants it."""
    program = (
        f"import sys\nfor name in '{order}'.split(', '): __import__(name)\n"
        "import gpuscope, torch\nfrom gpuscope import stage\n"
        "@stage('f')\ndef f(x, *, y=1):\n    with stage('block'), gpuscope.stage('b', attributes={'a': 1}) as s:\n"
        "        s.set_attribute('n', 1)\n        return x * 2 * y\n"
        "class Net(torch.nn.Module):\n    @stage\n    def forward(self, x): return f(x, y=3)\n"
        "before = {*sys.modules}\nwith stage('eager'): Net()(torch.ones(3))\n"
        "assert 'torch._dynamo' not in {*sys.modules} - before\n"
        "from torch._dynamo.testing import CompileCounter\n"
        "counter = CompileCounter()\n"
        "compiled = torch.compile(Net(), fullgraph=True, backend=counter)\nx = torch.ones(3)\n"
        "for switch in (lambda: None, lambda: gpuscope.enable(exporters='none'), gpuscope.disable):\n"
        "    switch()\n    assert torch.equal(compiled(x), x * 6)\n    assert counter.frame_count == 1\n"
        "for switch in (lambda: None, gpuscope.enable, gpuscope.disable):\n"
        "    switch()\n    for strict in (True, False):\n"
        "        graph = torch.export.export(Net(), (x,), strict=strict).graph\n"
        "        assert [str(n.target) for n in graph.nodes if n.op == 'call_function'] == ['aten.mul.Tensor'] * 2\n"
        "print('ok')\n"
    )
    for environment in ({}, {"GPUSCOPE": "idle"}):
        path = ":".join(path for path in sys.path if path)
        result = run_python(program, PYTHONPATH=path, GPUSCOPE_NATIVE=native, **environment)
        assert result.stdout == "ok\n", result.stderr
