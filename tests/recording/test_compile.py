"""`torch.compile` over functions that contain stages: no graph break, equal results, no recompilation. On the CPU."""

from __future__ import annotations

import collections
import functools
import json
import logging
import threading

import pytest

from gpuscope import stage
from gpuscope._log import say_what_waits
from gpuscope._recording import dynamo
from gpuscope._recording.dynamo import MAX_PLACES, Elisions, elisions

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


@pytest.fixture
def left_out():
    """Return a function that tells how often each function's stages were left out since the test began."""
    before = dict(elisions.places)

    def since():
        counts = collections.Counter()
        for place, count in elisions.places.items():
            counts[place.rpartition(" in ")[2]] += count - before.get(place, 0)
        return dict(+counts)

    return since


class TestLeftOut:
    """Stages inside compiled regions leave no trace but in a count."""

    def test_each_traced_stage_is_counted_by_its_place(self, bench, left_out):
        """A block counts where it stands, a decorated function where it is called; the account says so."""
        double = stage("double")(lambda x: x * 2)

        def program(x):
            with stage("block"):
                return double(x)

        run = compiled(program)
        for _ in range(3):
            run(X)
        assert left_out() == {"program": 2}
        statistics = bench.statistics()
        assert sum(f"{__file__}:" in place for place in statistics.elided) >= 2
        assert "compiled away at" in str(statistics)
        assert statistics.recorded == 0

    @pytest.mark.parametrize("name", NAMES)
    def test_every_form_is_counted(self, bench, left_out, name):
        """No form of a stage vanishes unseen."""
        function = forms()[name]
        compiled(lambda x: function(x) + 1)(X)
        assert sum(left_out().values()) == {"module": 2, "nested": 3}.get(name, 1)

    def test_what_runs_is_not_counted(self, bench, left_out):
        """Stages in eager code, and around compiled callables, are recorded and not left out."""
        around = stage("around")(torch.compile(lambda x: x + 1, backend="eager"))
        around(X)
        assert len(bench.named("around")) == 1
        assert left_out() == {}

    def test_graph_and_recompilations_are_those_without_stages(self, bench):
        """The compiled graph has the operations alone, and every new shape costs as many compilations as without."""

        def traced(function, dynamic):
            graphs = []

            def backend(module, _):
                graphs.append(module.code)
                return module.forward

            run = torch.compile(lambda x: function(x) + 1, backend=backend, fullgraph=True, dynamic=dynamic)
            for size in (4, 7, 9, 4):
                run(torch.ones(size))
            return graphs

        for dynamic in (None, True, False):
            torch._dynamo.reset()
            with_stages = traced(forms()["nested"], dynamic)
            torch._dynamo.reset()
            assert with_stages == traced(lambda x: x * 2, dynamic)
            assert len(with_stages) == {None: 2, True: 1, False: 3}[dynamic]

    def test_count_adds_one_guard_however_many_stages(self, bench, monkeypatch):
        """What is guarded of the count is which function counts, once a compiled frame."""

        def guards(stages):
            functions = [stage(f"s{n}")(lambda x: x + 1) for n in range(stages)]
            seen = []
            torch._dynamo.reset()

            def program(x):
                return sum(function(x) for function in functions)

            def filtered(entries):
                seen.extend(entry.orig_guard.name for entry in entries)
                return [True] * len(entries)

            torch.compile(program, backend="eager", options={"guard_filter_fn": filtered})(X)
            return sum("gpuscope_left_out" in str(name) for name in seen)

        pytest.importorskip("torch", minversion="2.8", reason="shows its guards")
        assert guards(1) == guards(9) <= 1

    def test_nothing_is_counted_where_dynamo_cannot_call(self, bench, left_out, monkeypatch):
        """On a PyTorch before 2.6 stages are traced as ever, without a graph break, and not counted."""
        monkeypatch.setattr(torch, "__version__", "2.4.1")
        function = forms()["nested"]
        assert torch.equal(compiled(lambda x: function(x) + 1)(X), X * 2 + 1)
        assert left_out() == {}

    def test_stage_is_counted_without_its_place(self, left_out, monkeypatch):
        """Where PyTorch's stack can't be read, as Dynamo calls the count, it counts and does not raise."""
        monkeypatch.setattr(torch._guards, "TracingContext", None)
        dynamo.gpuscope_left_out()
        assert left_out() == {"unknown": 1}

    def test_logger_that_raises_breaks_no_compilation(self, monkeypatch):
        """The count is kept and nothing is raised where the application's logging fails."""

        def refuse(_):
            raise RuntimeError("the application's")

        monkeypatch.setattr(logging.getLogger("gpuscope"), "handle", refuse)
        places = Elisions()
        places.listen()
        places.add("model.py:1 in forward")
        say_what_waits()
        assert places.places == {"model.py:1 in forward": 1}

    def test_is_said_once(self, caplog):
        """Nothing is said before recording has begun; then of the first place, and never again."""
        places = Elisions()
        places.add("model.py:1 in forward")
        assert caplog.messages == []
        places.listen()
        places.add("model.py:2 in forward")
        places.listen()
        say_what_waits()
        assert len(caplog.messages) == 1
        assert "such as the one at model.py:1 in forward." in caplog.messages[0]
        assert caplog.messages[0].endswith("are suppressed. `gpuscope.statistics().elided` has all.")

    def test_generated_code_does_not_pile_up(self):
        """Beyond a number of places the others are counted together."""
        places = Elisions()
        for number in range(MAX_PLACES + 5):
            places.add(f"<string>:{number} in f")
        assert len(places.places) == MAX_PLACES + 1
        assert places.places["elsewhere"] == 5


def test_twenty_stages_run_while_another_thread_compiles(bench, left_out):
    """What one thread traces takes no stage from the others; each traced stage is counted once."""
    done, calls = threading.Event(), 0
    eager = stage("eager")(lambda x: x + 1)

    def run():
        nonlocal calls
        while not done.is_set():
            eager(X)
            calls += 1

    runner = threading.Thread(target=run)
    runner.start()
    try:
        programs = [compiled(stage(f"s{n}")(lambda x, n=n: x + n)) for n in range(20)]
        results = [program(X) for program in programs]
    finally:
        done.set()
        runner.join()
    assert all(torch.equal(result, X + n) for n, result in enumerate(results))
    assert calls > 20
    assert len(bench.named("eager")) + bench.statistics().dropped.get("queue_full", 0) == calls
    assert sum(left_out().values()) == 20


def test_threads_compile_and_run_at_once(bench):
    """Four threads that compile and call functions with stages get the right results; the stages around are timed."""
    failures = []

    def work(number):
        inner = stage(f"inner{number}")(lambda x: x * number)
        around = stage("around")(torch.compile(lambda x: inner(x) + 1, backend="eager"))
        for size in (3, 5, 8):
            x = torch.ones(size)
            if not torch.equal(around(x), x * number + 1):
                failures.append((number, size))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(bench.named("around")) == 12


def test_doctor_says_what_becomes_of_stages(run_python):
    """`gpuscope doctor` compiles a stage, and says that one inside a region is left out and counted."""
    program = "from gpuscope.__main__ import main; import sys; sys.exit(main(['doctor', '--json']))"
    done = run_python(program, GPUSCOPE_EXPORTER="none")
    (finding,) = [each for each in json.loads(done.stdout)["findings"] if each["subject"] == "compile"]
    assert finding["verdict"] == "ok"
    assert "left out, and counted in `gpuscope.statistics().elided`" in finding["seen"]
