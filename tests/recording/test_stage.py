"""`stage` in every form: what it keeps of a function, and what it records."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import gc
import inspect
import pickle
import pydoc
import re
import threading
import weakref

import pytest

import gpuscope
from gpuscope import stage
from gpuscope._data.record import Site


class TestNothing:
    """Nothing comes of nothing."""

    def test_nothing_is_recorded_when_nothing_runs(self, bench):
        """A recorder that no stage passes through has no spans and an empty account."""
        assert bench.collect() == []
        assert bench.statistics().recorded == 0


class TestBlock:
    """The `with` statement."""

    def test_block_is_a_host_span_with_a_gpu_child(self, bench):
        """A `with` block becomes a span of its name and a child `[gpu]` that starts later."""
        with stage("infer"):
            pass
        gpu, host = sorted(bench.collect(), key=lambda span: span.kind)
        assert (host.name, host.kind) == ("infer", "host")
        assert (gpu.name, gpu.kind) == ("infer [gpu]", "gpu")
        assert gpu.parent_id == host.span_id
        assert gpu.trace_id == host.trace_id
        assert gpu.start_ns > host.start_ns

    def test_attributes_of_a_block_reach_its_host_span(self, bench):
        """Attributes given at the start and set inside are on the host span."""
        with stage("h2d", attributes={"model": "vit"}) as s:
            s.set_attribute("batch_size", 8)
        (span,) = bench.named("h2d")
        assert span.attributes["model"] == "vit"
        assert span.attributes["batch_size"] == 8

    def test_attribute_set_after_the_end_is_ignored(self, bench):
        """A record does not change once it is queued."""
        with stage("h2d") as s:
            pass
        s.set_attribute("late", 1)
        assert "late" not in bench.named("h2d")[0].attributes

    def test_blocks_nest(self, bench):
        """A stage inside another is its child, in the same trace; the outermost has no parent."""
        with stage("request"), stage("infer"):
            pass
        (request,), (infer,) = bench.named("request"), bench.named("infer")
        assert infer.parent_id == request.span_id
        assert infer.trace_id == request.trace_id
        assert not request.parent_id

    def test_siblings_share_the_parent_not_each_other(self, bench):
        """After a stage has ended the next one is its sibling."""
        with stage("request"):
            with stage("a"):
                pass
            with stage("b"):
                pass
        assert bench.named("a")[0].parent_id == bench.named("b")[0].parent_id == bench.named("request")[0].span_id

    def test_exception_is_noted_and_passes(self, bench):
        """An exception leaves the block unchanged and gives its span an error status and type."""
        error = ValueError("no such image")
        with pytest.raises(ValueError) as caught, stage("decode"):
            raise error
        assert caught.value is error
        (span,) = bench.named("decode")
        assert span.status == "ERROR"
        assert span.attributes["error.type"] == "ValueError"
        assert "no such image" in str(span.events)

    def test_object_entered_again_makes_a_new_record_each_time(self, bench):
        """One `stage` object may be entered in a loop, inside itself, and from many threads."""
        shared = stage("again")
        for _ in range(2):
            with shared:
                pass
        with shared, shared, shared:
            pass

        def enter() -> None:
            for _ in range(50):
                with shared:
                    pass

        threads = [threading.Thread(target=enter) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        spans = bench.named("again")
        assert len(spans) == 2 + 3 + 200
        assert len({span.span_id for span in spans}) == len(spans)
        assert bench.nvtx.stack == bench.nvtx.started == []

    def test_kept_block_records_nothing_while_disabled(self, bench):
        """Whatever was entered or only made before, nothing begins between `disable()` and `enable()`."""
        entered, made, open_ = stage("entered"), stage("made"), stage("open")
        with entered, open_:
            gpuscope.disable()
            for kept in (entered, made, open_, entered):
                with kept as block:
                    block.set_attribute("a", 1)
                with kept, kept, pytest.raises(KeyError), kept:
                    raise KeyError
            with stage("around"), made:
                gpuscope.enable()
                with made, stage("inside"):
                    pass
            with entered, made:
                gpuscope.disable()
        with entered, made, open_:
            pass
        assert [span.name for span in bench.collect() if span.kind == "host"] == [
            "inside", "made", "made", "entered", "open", "entered",
        ]  # fmt: skip
        assert not gpuscope._recording.stage._quiet
        assert bench.nvtx.stack == bench.nvtx.started == []

    def test_kept_block_goes_with_the_recording_that_is_on(self, bench, make_bench):
        """A block that was made before `enable()` with other settings is recorded by what is on when it is entered."""
        kept = stage("kept")
        other = make_bench()
        for _ in range(2):
            with kept:
                pass
        assert len(other.named("kept")) == 2
        assert bench.named("kept") == []

    @pytest.mark.parametrize("form", ["enter_context", "enter_async_context", "object", "with"])
    def test_range_that_a_coroutine_may_leave_elsewhere_is_no_thread_s(self, bench, form):
        """A block that is entered on behalf of a coroutine pushes no range, because others would end inside it."""

        class Timer:
            def __enter__(self):
                self.block = stage("block").__enter__()

            def __exit__(self, *exception):
                self.block.__exit__(*exception)

        async def work() -> None:
            """Stay open while another runs."""
            async with contextlib.AsyncExitStack() as stack:
                stack.enter_context(Timer() if form == "object" else stage("block"))
                await asyncio.sleep(0)

        async def plainly() -> None:
            """Open and close at once."""
            with contextlib.ExitStack() as stack:
                if form == "with":
                    stack.enter_context(_in_a_with("block"))
                else:
                    stack.enter_context(stage("block"))
                await asyncio.sleep(0)

        async def both() -> None:
            """Run both."""
            await asyncio.gather(work(), plainly(), work())

        asyncio.run(both())
        assert {kind for kind, _ in bench.nvtx.log} == {"start"}
        assert len(bench.named("block")) == 3
        assert bench.nvtx.started == []

    def test_block_without_a_name_is_called_stage(self, bench):
        """A block that forgot its name is recorded under a plain one rather than failing in production."""
        with stage():
            pass
        assert len(bench.named("stage")) == 1

    @pytest.mark.parametrize("first", [True, False])
    def test_settings_of_one_block_hold_for_that_block(self, bench, first):
        """`warmup` and `graph` of one block leave the others of its name alone, and its own calls are counted on."""
        own = {"warmup": 2, "graph": False}
        for options in ([own, {}] if first else [{}, own]) * 3:
            with stage(f"w{first}", **options) as block:
                assert block.site.graph is (not options)
        spans = [span for span in bench.named(f"w{first}") if span.kind == "host"]
        ours = spans[not first :: 2]
        assert [span.attributes.get("gpuscope.warmup", False) for span in ours] == [True, True, False]
        assert not any(span.attributes.get("gpuscope.warmup") for span in spans if span not in ours)

    def test_a_decorator_s_settings_are_no_block_s(self, bench):
        """A decorator with `warmup` changes no block that goes by the same name."""
        stage("w", warmup=3, graph=False)(len)
        with stage("w") as block:
            assert (block.site.warmup, block.site.graph) == (None, True)

    def test_names_beyond_the_limit_are_recorded_and_not_kept(self, bench, monkeypatch, caplog):
        """Names with request ids in them do not pile up. The collector says so: a stage logs nothing."""
        state = gpuscope._recording.state.state
        monkeypatch.setattr(gpuscope._recording.state, "MAX_SITES", len(state.sites) + 2)
        for number in range(5):
            with stage(f"request-{number}"):
                pass
        assert caplog.records == []  # A handler of the log may wait, so the collector calls it.
        assert len([span for span in bench.collect() if span.kind == "host"]) == 5
        assert len(caplog.records) == 1

    def test_a_block_that_was_never_entered_is_not_left(self, bench):
        """`ExitStack.push`, where `enter_context` was meant, costs nothing, and the block may be entered later."""
        block = stage("pushed")
        with contextlib.ExitStack() as stack:
            stack.push(block)
        assert bench.collect() == []
        with block:
            pass
        assert [span.name for span in bench.collect() if span.kind == "host"] == ["pushed"]

    def test_stages_that_end_out_of_order_leave_the_right_one_current(self, bench):
        """When stages held open across `yield` end in the wrong order, no ended stage stays current."""
        first, second = stage("first"), stage("second")
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        second.__exit__(None, None, None)
        with stage("after"):
            pass
        assert not bench.named("after")[0].parent_id

    def test_deep_nesting(self, bench):
        """A chain of 900 stages is recorded whole."""

        @stage("deep")
        def deep(left: int) -> None:
            if left:
                deep(left - 1)

        deep(400)
        spans = bench.named("deep")
        assert len(spans) == 401
        assert len({span.trace_id for span in spans}) == 1


class Forms:
    """Every kind of method, with the decorators in both orders."""

    @stage("never wrapped: decorated while gpuscope was off")
    def off(self):
        """Stay as it is."""
        return self


def _forms():
    class Decorated:
        @stage("method")
        def method(self, x):
            return self, x

        @staticmethod
        @stage("static_inside")
        def static_inside(x):
            return x

        @stage("static_outside")
        @staticmethod
        def static_outside(x):
            return x

        @classmethod
        @stage("class_inside")
        def class_inside(cls, x):
            return cls, x

        @stage("class_outside")
        @classmethod
        def class_outside(cls, x):
            return cls, x

        @property
        @stage("read")
        def read(self):
            return 5

    return Decorated


class TestTheFunctionItself:
    """`gpuscope.stage` is a function to whoever looks at it, also where its calls are answered in C."""

    def test_it_goes_by_its_name(self):
        """Pickle and copies lead to the same object; its name, module and source are found."""
        assert gpuscope.stage is stage
        assert pickle.loads(pickle.dumps(stage)) is copy.copy(stage) is copy.deepcopy(stage) is stage
        assert (stage.__name__, stage.__qualname__, stage.__module__) == ("stage", "stage", "gpuscope._recording.stage")
        assert repr(stage).startswith("<function stage at ")
        assert "def stage(" in inspect.getsource(stage)
        assert weakref.ref(stage)() is stage
        assert callable(stage)

    def test_it_documents_itself(self):
        """`help` shows signature and docstring, as of a function."""
        assert inspect.isroutine(stage)
        names = ["name", "attributes", "stream", "warmup", "graph", "members", "weights", "basis", "key", "memory"]
        assert [*inspect.signature(stage).parameters] == names
        text = " ".join(pydoc.render_doc(stage, renderer=pydoc.plaintext).split()).replace("( ", "(")
        assert "stage(name: 'Any' = None, /, attributes:" in text
        assert "Name a piece of inference work; as a decorator or as a context manager." in text

    @pytest.mark.parametrize("state", ["on", "idle"])
    @pytest.mark.parametrize(
        ("arguments", "options", "message"),
        [
            (("x",), {"colour": 1}, r"stage\(\) got an unexpected keyword argument 'colour'"),
            ((), {"name": "x"}, r"stage\(\) got some positional-only arguments passed as keyword arguments: 'name'"),
            (("x",) * 6, {}, r"stage\(\) takes from 0 to 5 positional arguments but 6 were given"),
            ((b"x",), {}, "must be a `str`"),
        ],
    )
    def test_wrong_calls_are_refused_as_by_a_function(self, bench, state, arguments, options, message):
        """Unknown keywords, the name as a keyword, too many arguments."""
        if state == "idle":
            gpuscope.disable()
        with pytest.raises(TypeError, match=message):
            stage(*arguments, **options)

    def test_an_idle_block_is_one_object_for_each_name(self, bench):
        """It is entered as itself, lets exceptions through, and may be entered in any way, as often as one likes."""
        gpuscope.disable()
        names = [*(f"idle{n}" for n in range(200)), "idle" + str(7), type("Name", (str,), {})("idle8")]
        for name in names * 2:
            block = stage(name)
            assert stage(name) is block
            with block as entered, block as again:
                entered.set_attribute("a", 1)
            assert entered is again is block
        assert stage("idle7") is stage(names[7]) is not stage("idle9")
        with contextlib.ExitStack() as stack:
            assert stack.enter_context(stage("a")) is stage("a")
        with pytest.raises(KeyError), stage("a"):
            raise KeyError
        assert type(block).__enter__(block) is block
        assert block.__exit__(None, None, None) is None
        with stage("b", attributes={"a": 1}) as one, stage("b", warmup=1) as other:
            assert one is not other
        assert bench.collect() == []

    def test_an_unkept_idle_block_needs_no_garbage_collector(self, bench):
        """One with settings of its own is gone when the program lets it go."""
        gpuscope.disable()
        block = stage("a", attributes={"a": bench})
        with block:
            pass
        holders = [each for each in gc.get_referrers(bench) if type(each) is dict and each.get("a") is bench]
        assert len(holders) == 1
        alive = len(gc.get_objects())
        gc.disable()
        try:
            del block, holders
            assert len(gc.get_objects()) < alive
        finally:
            gc.enable()

    def test_what_was_absent_may_become_idle(self, monkeypatch, caplog):
        """A name that was used before recording could be switched on makes stages of functions after that."""
        state = gpuscope._recording.state.state
        monkeypatch.setattr(state, "may_toggle", False)
        state.off_stages = {}

        def function():
            """Do nothing."""

        with stage("known"), stage("known"):
            pass
        assert stage("known")(function) is function
        state.allow_toggling()
        assert stage("known")(function) is not function
        assert "will not be recorded" in caplog.text

    def test_a_decorated_function_is_found_under_its_name_by_its_errors(self, bench):
        """The program sees wrapper and function in a traceback, idle as well; so does the span."""

        def work(x, *, y):
            if x == y:
                raise LookupError(x)
            return x + y

        staged, options = stage("work")(work), {"y": 2}
        for _ in range(2):
            assert staged(1, y=2) == staged(*[1], **options) == 3
            with pytest.raises(LookupError) as caught:
                staged(2, y=2)
            names = [entry.name for entry in caught.traceback]
            assert names == [inspect.currentframe().f_code.co_name, "work", "work"]
            with pytest.raises(TypeError, match=r"work\(\) missing 1 required keyword-only argument: 'y'"):
                staged(1)
            gpuscope.disable()
        failed = [span for span in bench.named("work") if span.status == "ERROR"]
        assert len(failed) == 2
        trace = failed[0].events[0][-1]["exception.stacktrace"]
        assert re.findall(r", in (\w+)$", trace, re.MULTILINE) == ["work", "work"]


class TestDecorator:
    """Functions, methods and callable objects."""

    def test_function_keeps_name_signature_and_docstring(self, bench):
        """A decorated function looks like the function."""

        def preprocess(image: bytes, *, size: int = 224) -> list[float]:
            """Resize and normalise."""
            return [float(size)]

        staged = stage("prep")(preprocess)
        assert staged(b"", size=3) == [3.0]
        assert staged.__name__ == "preprocess"
        assert staged.__qualname__ == preprocess.__qualname__
        assert staged.__doc__ == "Resize and normalise."
        assert inspect.signature(staged) == inspect.signature(preprocess)
        assert staged.__wrapped__ is preprocess
        assert bench.named("prep")[0].attributes["code.function.name"].endswith("preprocess")

    def test_bare_decorator_takes_the_qualified_name(self, bench):
        """`@stage` without a name uses the function's, without what encloses it."""

        class Detector:
            @stage
            def forward(self):
                return 1

        assert Detector().forward() == 1
        assert len(bench.named("Detector.forward")) == 1

    def test_attributes_of_a_decorator_are_on_every_span(self, bench):
        """Static attributes are on each call's span."""
        infer = stage("infer", attributes={"model": "vit"})(lambda: None)
        infer()
        infer()
        assert [span.attributes["model"] for span in bench.named("infer")] == ["vit", "vit"]

    def test_methods_in_either_order(self, bench):
        """Methods, static and class methods work with `stage` above or below the other decorator."""
        decorated = _forms()
        instance = decorated()
        assert instance.method(1) == (instance, 1)
        assert decorated.static_inside(2) == decorated.static_outside(2) == instance.static_outside(2) == 2
        assert decorated.class_inside(3) == decorated.class_outside(3) == (decorated, 3)
        assert instance.read == 5
        names = {span.name for span in bench.collect() if span.kind == "host"}
        assert names == {
            "method", "static_inside", "static_outside", "class_inside", "class_outside", "read"
        }  # fmt: skip

    def test_lambda_partial_builtin_and_bound_method(self, bench):
        """Anything callable can be a stage."""
        assert stage("lambda")(lambda x: x + 1)(1) == 2
        assert stage("partial")(functools.partial(pow, 2))(3) == 8
        assert stage("builtin")(len)([1, 2]) == 2
        assert stage("bound")([3, 1].index)(1) == 1
        assert {span.name for span in bench.collect() if span.kind == "host"} == {
            "lambda", "partial", "builtin", "bound"
        }  # fmt: skip

    def test_callable_object_keeps_its_attributes_and_pickles(self, bench):
        """A callable object stays itself but for the call, and can be copied and pickled."""
        model = stage("model")(_Model(3))
        assert model(2) == 6
        assert model.factor == 3
        again = pickle.loads(pickle.dumps(model))
        assert again(2) == 6
        assert inspect.signature(model) == inspect.signature(_Model(3))
        assert len(bench.named("model")) == 2

    def test_module_forward_and_instance(self, bench):
        """`forward` of an `nn.Module` and a module itself are stages; hooks and state still work."""
        torch = pytest.importorskip("torch")

        class Net(torch.nn.Linear):
            @stage("forward")
            def forward(self, x):
                return super().forward(x)

        net = Net(2, 2)
        whole = stage("whole")(net)
        x = torch.ones(1, 2)
        assert torch.equal(whole(x), net(x))
        assert len(list(whole.parameters())) == 2
        (outer,) = bench.named("whole")
        assert bench.named("forward")[0].parent_id == outer.span_id

    def test_decorated_module_level_function_pickles(self, run_python):
        """A decorated function is pickled by name, as a plain one is."""
        program = (
            "import pickle, gpuscope\n@gpuscope.stage('f')\ndef f(): return 7\n"
            "g = pickle.loads(pickle.dumps(f)); assert g is f and g() == 7; print('ok')\n"
        )
        result = run_python(program, GPUSCOPE="1", GPUSCOPE_EXPORTER="none")
        assert result.stdout == "ok\n", result.stderr

    def test_recursion_nests(self, bench):
        """Each call of a recursive function is a stage inside the one before."""

        @stage("fact")
        def fact(n):
            return n * fact(n - 1) if n else 1

        assert fact(3) == 6
        spans = sorted(bench.named("fact"), key=lambda span: span.start_ns)
        assert [span.parent_id for span in spans[1:]] == [span.span_id for span in spans[:-1]]

    def test_each_wrapper_has_its_own_code(self, bench):
        """Dynamo's limit of compiled versions counts by code object, so wrappers must not share one."""
        first, second = stage("a")(lambda: 1), stage("b")(lambda: 2)
        assert first.__code__ is not second.__code__

    @pytest.mark.parametrize(
        ("decorated", "message"),
        [
            (int, "Decorate its methods instead"),
            (property(lambda self: 1), "put `@property` above"),
            (5, "must be a `str`, not 5"),
        ],
    )
    def test_what_cannot_be_a_stage_is_refused_at_once(self, bench, decorated, message):
        """A class, a property or a number is refused when it is decorated, with what to do instead."""
        with pytest.raises(TypeError, match=message):
            stage(decorated)

    def test_wrong_arguments_are_refused_at_once(self, bench):
        """A stream that is not one and attributes that are not a mapping are refused when given."""
        with pytest.raises(TypeError, match=r"must be a `torch\.cuda\.Stream`"):
            stage("x", stream=3)
        with pytest.raises(TypeError, match="must be a mapping"):
            stage("x", attributes=3)
        for graph in ("no", None, 1):
            with pytest.raises(TypeError, match="`graph` of a `stage` must be True or False"):
                stage("x", graph=graph)
        for warmup in (-1, 2**63):
            with pytest.raises(ValueError, match="expected 0 or more calls"):
                stage("x", warmup=warmup)

    def test_options_of_a_bare_decorator_hold(self, bench):
        """Given beside the function itself, as elsewhere."""
        decorated = stage(lambda: None, warmup=2, graph=False)
        site = next(cell.cell_contents for cell in decorated.__closure__ if isinstance(cell.cell_contents, Site))
        assert (site.warmup, site.graph) == (2, False)

    @pytest.mark.parametrize("name", ["", " ", "\t\n", "\u3000", "\u200b", "\0", "\u200b \ufeff"])
    @pytest.mark.parametrize("state", ["on", "idle", "absent"])
    def test_a_blank_name_is_refused_at_once(self, bench, monkeypatch, name, state):
        """A row without a name says nothing; the refusal does not depend on whether anything is recorded."""
        if state != "on":
            gpuscope.disable()
        monkeypatch.setattr(gpuscope._recording.state.state, "may_toggle", state != "absent")
        for options in ({}, {"attributes": {"a": 1}}, {"warmup": 1}, {"graph": False}):
            with pytest.raises(ValueError, match=f"is {re.escape(repr(name))}: expected one that is not blank"):
                stage(name, **options)


@contextlib.contextmanager
def _in_a_with(name):
    with stage(name):
        yield


class _Model:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return x * self.factor


class TestGenerators:
    """Generators, plain and asynchronous."""

    def test_generator_is_timed_per_resumption(self, bench):
        """Each resumption is a stage; what the consumer does between them is outside."""

        @stage("tokens")
        def tokens():
            with stage("step"):
                pass
            received = yield "a"
            yield received

        assert inspect.isgeneratorfunction(tokens)
        generator = tokens()
        assert bench.named("tokens") == []
        assert next(generator) == "a"
        with stage("consumer"):
            pass
        assert generator.send("b") == "b"
        assert next(generator, "end") == "end"
        assert len(bench.named("tokens")) == 3
        assert not bench.named("consumer")[0].parent_id
        assert bench.named("step")[0].parent_id == bench.named("tokens")[0].span_id

    def test_generator_return_value_throw_and_close(self, bench):
        """The wrapper hands on what is thrown in, the value returned, and the close."""
        closed = []

        @stage("g")
        def generate():
            try:
                yield 1
            except KeyError:
                yield 2
            finally:
                closed.append(True)
            return 3

        def outer():
            return (yield from generate())

        generator = outer()
        assert next(generator) == 1
        assert generator.throw(KeyError("x")) == 2
        with pytest.raises(StopIteration) as stop:
            next(generator)
        assert stop.value.value == 3
        other = generate()
        next(other)
        other.close()
        assert closed == [True, True]
        assert all(span.status != "ERROR" for span in bench.named("g"))

    def test_generator_that_raises_has_an_error_and_ends(self, bench):
        """An exception inside a resumption is that stage's error and the consumer's exception."""

        @stage("g")
        def generate():
            yield 1
            raise OSError("disk")

        with pytest.raises(OSError, match="disk"):
            list(generate())
        assert bench.named("g")[1].status == "ERROR"
        assert bench.nvtx.stack == []

    def test_async_generator_is_timed_per_resumption(self, bench):
        """An async generator is a stage each time that it is resumed, and can be sent to and closed."""
        closed = []

        @stage("stream")
        async def stream():
            """Yield what was sent, and note the end."""
            try:
                got = yield 1
                await asyncio.sleep(0)
                yield got
                yield 3
            finally:
                closed.append(True)

        async def main():
            """Resume it, send to it, close it; then exhaust another."""
            generator = stream()
            assert await generator.__anext__() == 1
            assert await generator.asend(2) == 2
            await generator.aclose()
            return [item async for item in stream()]

        assert inspect.isasyncgenfunction(stream)
        assert asyncio.run(main()) == [1, None, 3]
        assert closed == [True, True]
        assert len(bench.named("stream")) == 2 + 4
        assert bench.nvtx.started == []


class Batch:
    """Stands for memory on the GPU."""


class Thrown(Exception):
    """Something that a consumer throws into a generator."""


def step_of(generator, name, value):
    """Call a method of a plain generator, or of an asynchronous one, which never waits here."""
    if hasattr(generator, name):
        return getattr(generator, name)(value)
    try:
        getattr(generator, f"a{name}")(value).send(None)
    except StopIteration as done:
        return done.value


def plain(first, log):
    """Yield a new batch at each step, and note whether those before are alive."""
    del first
    while True:
        batch = Batch()
        log.append(weakref.ref(batch))
        sent = yield batch
        log.append(weakref.ref(sent))
        del batch, sent


async def asynchronous(first, log):
    """Do the same."""
    del first
    while True:
        batch = Batch()
        log.append(weakref.ref(batch))
        sent = yield batch
        log.append(weakref.ref(sent))
        del batch, sent


@pytest.mark.parametrize("function", [plain, asynchronous])
class TestWhatGeneratorsHold:
    """A decorated generator holds no more than the generator does, though the garbage collector is off."""

    @pytest.fixture(autouse=True)
    def no_garbage_collector(self):
        """Switch it off."""
        gc.disable()
        yield
        gc.enable()

    def test_neither_arguments_nor_items_nor_what_was_sent(self, bench, function):
        """Each is gone as soon as the consumer and the generator have let go of it."""
        first, log = Batch(), []
        gone = weakref.ref(first)
        generator = stage("g")(function)(first, log)
        del first
        step_of(generator, "send", None)
        assert gone() is None
        for _ in range(3):
            step_of(generator, "send", Batch())
        assert [reference() for reference in log[:-1]] == [None] * 6  # The generator itself holds the last one.
        assert len(bench.named("g")) == 4

    def test_no_exception_that_was_thrown_in(self, bench, function):
        """The exception comes back out, and its traceback holds nothing that holds it."""
        generator = stage("g")(function)(None, [])
        step_of(generator, "send", None)

        def throw():
            thrown = [Thrown()]
            gone = weakref.ref(thrown[0])
            try:
                step_of(generator, "throw", thrown.pop())
            except Thrown as error:
                # What the frames of this test hold: from Python 3.12 on, those that they have called refer to them.
                error.__traceback__.tb_next.tb_frame.clear()
            return gone

        assert throw()() is None
        assert bench.named("g")[-1].status == "ERROR"


class TestAsync:
    """Coroutines and tasks."""

    def test_coroutine_is_timed_while_it_runs(self, bench):
        """A coroutine function stays one, and its stage lasts until it returns, not until it is created."""

        @stage("handle")
        async def handle(x):
            """Work in an inner stage."""
            with stage("inner"):
                await asyncio.sleep(0)
            return x

        assert inspect.iscoroutinefunction(handle)
        coroutine = handle(4)
        assert bench.collect() == []
        assert asyncio.run(coroutine) == 4
        assert bench.named("inner")[0].parent_id == bench.named("handle")[0].span_id

    def test_concurrent_tasks_nest_and_do_not_mix_ranges(self, bench):
        """Interleaved tasks keep their own parents, and use start/end ranges, which need no order."""

        @stage("handle")
        async def handle(number, barrier):
            """Work in an inner stage, at the same time as the others."""
            with stage(f"inner-{number}") as s:
                s.set_attribute("number", number)
                await barrier()

        async def main():
            """Run five tasks that meet in their stages."""
            turns = asyncio.Event()
            waiting = 0

            async def barrier():
                """Wait until all five have come."""
                nonlocal waiting
                waiting += 1
                if waiting == 5:
                    turns.set()
                await turns.wait()

            await asyncio.gather(*(handle(number, barrier) for number in range(5)))

        asyncio.run(main())
        handles = {span.span_id: span for span in bench.named("handle")}
        inners = [span for span in bench.collect() if span.name.startswith("inner") and span.kind == "host"]
        assert len(handles) == len(inners) == len({span.parent_id for span in inners}) == 5
        assert {span.parent_id for span in inners} == set(handles)
        assert {kind for kind, _ in bench.nvtx.log} == {"start"}
        assert bench.nvtx.started == []

    def test_a_task_that_starts_its_successor_holds_no_old_stage(self, bench):
        """A chain of tasks is a chain of parents by their ids; the stages before are let go. No provider is set."""
        bench.engine.recorder.open_bridge()
        outer = []

        async def work(left):
            """Start the next task, which begins when this stage has ended."""
            with stage("work") as running:
                outer.append(running.outer)
                return asyncio.create_task(work(left - 1)) if left else None

        async def main():
            """Follow the chain to its end."""
            task = asyncio.create_task(work(3))
            while task is not None:
                task = await task

        asyncio.run(main())
        assert outer == [None] * 4
        spans = sorted(bench.named("work"), key=lambda span: span.start_ns)
        assert [span.parent_id for span in spans[1:]] == [span.span_id for span in spans[:-1]]

    def test_cancelled_task_closes_its_stage(self, bench):
        """Cancellation passes through and leaves no range open."""

        @stage("wait")
        async def wait():
            """Wait for ever, two stages deep."""
            with stage("inner"):
                await asyncio.Event().wait()

        async def main():
            """Start the task and cancel it."""
            task = asyncio.create_task(wait())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(main())
        assert bench.named("wait")[0].attributes["error.type"].endswith("CancelledError")
        assert bench.nvtx.started == []
        assert bench.device.pairs_in_use == 0

    def test_task_started_inside_a_stage_is_its_child(self, bench):
        """A task inherits the stage that was current when it was created."""

        async def main():
            """Start a task inside a stage, and await it outside."""

            async def work():
                """Be one stage."""
                with stage("work"):
                    await asyncio.sleep(0)

            with stage("request"):
                task = asyncio.create_task(work())
            await task

        asyncio.run(main())
        assert bench.named("work")[0].parent_id == bench.named("request")[0].span_id


class TestBalance:
    """Every begin has its end."""

    @pytest.mark.parametrize("outcome", ["returns", "raises", "cancelled"])
    @pytest.mark.parametrize("form", ["with", "decorator"])
    @pytest.mark.parametrize("kind", ["plain", "async"])
    def test_every_begin_has_its_end(self, bench, outcome, form, kind):
        """Whatever happens inside a stage, its range is closed and its events are given back."""
        errors = {"returns": None, "raises": ValueError("x"), "cancelled": asyncio.CancelledError()}

        def body():
            if errors[outcome] is not None:
                raise errors[outcome]

        async def async_body():
            """Run the body after a turn of the loop."""
            await asyncio.sleep(0)
            body()

        def run_plain():
            if form == "decorator":
                stage("s")(body)()
            else:
                with stage("s"):
                    body()

        async def run_async():
            """Run the body in the form asked for."""
            if form == "decorator":
                await stage("s")(async_body)()
            else:
                with stage("s"):
                    await async_body()

        try:
            run_plain() if kind == "plain" else asyncio.run(run_async())
        except (ValueError, asyncio.CancelledError):
            assert outcome != "returns"
        assert len(bench.named("s")) == 1
        assert bench.nvtx.stack == bench.nvtx.started == []
        assert bench.device.pairs_in_use == 0
        with stage("next"):
            pass
        assert not bench.named("next")[0].parent_id


class TestStreams:
    """Which stream and device a stage is on."""

    def test_stream_argument_is_the_stage_s_stream(self, bench):
        """With `stream=` the events go on that stream and device."""

        class Stream:
            device_index = 1
            cuda_stream = 99

        with stage("copy", stream=Stream()):
            pass
        stage("copy2", stream=Stream())(lambda: None)()
        for name in ("copy [gpu]", "copy2 [gpu]"):
            (span,) = bench.named(name)
            assert span.attributes["gpuscope.cuda.stream"] == 99
            assert span.attributes["gpuscope.device.index"] == 1

    def test_threads_have_traces_of_their_own(self, bench):
        """Stages on different threads do not see each other, and say which thread they ran on."""

        def work():
            with stage("outer"), stage("inner"):
                pass

        threads = [threading.Thread(target=work, name=f"worker-{n}") for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        outers = bench.named("outer")
        assert {span.attributes["thread.name"] for span in outers} == {"worker-0", "worker-1", "worker-2"}
        assert len({span.trace_id for span in outers}) == 3
