"""Callables of every kind are off, idle and on the same: results, kinds, attributes, signatures, copies and pickles."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import functools
import inspect
import operator
import pickle
import types
import unittest.mock
import weakref
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import pytest

import gpuscope
from gpuscope import stage
from gpuscope._recording.state import state

cloudpickle = pytest.importorskip("cloudpickle")
wrapt = pytest.importorskip("wrapt")
torch = pytest.importorskip("torch")


def module_function(x, /, y: int = 2, *, z=3):
    """Add."""
    return x + y + z


async def module_coroutine(x):
    """Wait, and return."""
    await asyncio.sleep(0)
    return x + 1


@functools.lru_cache(maxsize=2)
def cached(x):
    """Remember."""
    return x + 1


@functools.singledispatch
def dispatched(x):
    """Return what there is for the type."""
    return x


@dispatched.register
def _(x: int):
    return x + 1


def adding(y):
    """Return a closure."""
    return lambda x: x + y


class Plain:
    """Callable in every way."""

    factor = 3

    def __init__(self, held=1) -> None:
        self.held = held

    def __call__(self, x):
        """Multiply."""
        return x * self.factor + self.held

    def __len__(self) -> int:
        return self.held

    def __getitem__(self, key):
        return (key, self.held)

    def __bool__(self) -> bool:
        return False

    def __enter__(self):
        return self.held

    def __exit__(self, *exception) -> None:
        pass

    def method(self, x):
        """Add what is held."""
        return x + self.held

    async def coroutine_method(self, x):
        """Add what is held, later."""
        return x + self.held


class Value(Plain):
    """Equal to others, and without a hash."""

    def __repr__(self) -> str:
        return "value"

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other):
        return isinstance(other, Value) and self.held == other.held


class Async:
    """Called like a coroutine function."""

    async def __call__(self, x):
        """Return later."""
        return x + 1


class AsyncItems:
    """Called like an async generator function."""

    async def __call__(self, x):
        """Yield."""
        got = yield x
        yield got


class Items:
    """Called like a generator function."""

    def __call__(self, x):
        """Yield."""
        got = yield x
        return got


class HasFunc:
    """Has an attribute of the name that a partial has."""

    func = staticmethod(module_coroutine)

    def __call__(self, x):
        """Return at once."""
        return x + 1


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A callable dataclass."""

    by: int = 2

    def __call__(self, x):
        """Multiply."""
        return x * self.by


class Slotted:
    """Has slots alone."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held = 4

    def __call__(self, x):
        """Add."""
        return x + self.held


@wrapt.decorator
def seen(wrapped, instance, args, kwargs):
    """Tell what a wrapt decorator sees."""
    return (type(instance).__name__, wrapped(*args, **kwargs))


@seen
def wrapped_by_wrapt(x):
    """Add."""
    return x + 1


def generator(x):
    """Yield twice."""
    got = yield x
    yield got
    return 7


async def async_generator(x):
    """Yield twice."""
    got = yield x
    yield got


@types.coroutine
def old_coroutine(x):
    """Wait as before `async def`."""
    yield
    return x + 1


class Net(torch.nn.Module):
    """A linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x):
        """Apply the layer."""
        return self.layer(x)


class Parent(torch.nn.Module):
    """Has a child."""

    def __init__(self, child) -> None:
        super().__init__()
        self.child = child

    def forward(self, x):
        """Call the child."""
        return self.child(x)


def marked(x):
    """Return a coroutine, and be marked as a function that does."""
    return module_coroutine(x)


marked._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]
X = torch.ones(2)
torch.manual_seed(0)
net, plain = Net(), Plain()


class Case(NamedTuple):
    """A callable, and what it is called with."""

    make: Callable[[], Any]
    argument: Any = 1


CASES = {
    "function": Case(lambda: module_function),
    "lambda": Case(lambda: lambda x: x + 1),
    "closure": Case(lambda: adding(2)),
    "coroutine function": Case(lambda: module_coroutine),
    "generator function": Case(lambda: generator),
    "async generator function": Case(lambda: async_generator),
    "types.coroutine": Case(lambda: old_coroutine),
    "marked as a coroutine function": Case(lambda: marked),
    "partial": Case(lambda: functools.partial(module_function, y=5)),
    "partial of a partial": Case(lambda: functools.partial(functools.partial(module_function, y=5), z=6)),
    "partial of a coroutine function": Case(lambda: functools.partial(module_coroutine)),
    "partial of a generator function": Case(lambda: functools.partial(generator)),
    "partial of an async generator function": Case(lambda: functools.partial(async_generator)),
    "partial of types.coroutine": Case(lambda: functools.partial(old_coroutine)),
    "partial of a class": Case(lambda: functools.partial(Frozen)),
    "partial of a class with an async call": Case(lambda: functools.partial(Value)),
    "partial of an async callable": Case(lambda: functools.partial(Async())),
    "bound method": Case(lambda: plain.method),
    "bound coroutine method": Case(lambda: plain.coroutine_method),
    "bound class method": Case(lambda: dict.fromkeys, argument="ab"),
    "unbound method": Case(lambda: Plain.method, argument=(Plain(), 1)),
    "builtin": Case(lambda: abs),
    "builtin bound method": Case(lambda: [1, 2].count),
    "method descriptor": Case(lambda: str.upper, argument="a"),
    "slot wrapper": Case(lambda: int.__neg__),
    "method wrapper": Case(lambda: (5).__add__),
    "operator.itemgetter": Case(lambda: operator.itemgetter(0), argument="ab"),
    "operator.methodcaller": Case(lambda: operator.methodcaller("upper"), argument="ab"),
    "lru_cache": Case(lambda: cached),
    "singledispatch": Case(lambda: dispatched),
    "callable object": Case(lambda: Plain(3)),
    "callable object that is equal to others": Case(lambda: Value(3)),
    "async callable object": Case(Async),
    "callable object that is a generator": Case(Items),
    "callable object that is an async generator": Case(AsyncItems),
    "callable object with `func`": Case(HasFunc),
    "dataclass": Case(Frozen),
    "slotted object": Case(Slotted),
    "wrapt": Case(lambda: wrapped_by_wrapt),
    "mock": Case(lambda: unittest.mock.MagicMock(return_value=3)),
    "async mock": Case(lambda: unittest.mock.AsyncMock(return_value=3)),
    "module": Case(lambda: net, argument=X),
    "bound forward": Case(lambda: net.forward, argument=X),
    "scripted module": Case(lambda: torch.jit.trace(net, X), argument=X),
    "traced function": Case(lambda: torch.jit.trace(torch.sin, X), argument=X),
    "torch function": Case(lambda: torch.sin, argument=X),
    "torch operator": Case(lambda: torch.ops.aten.sin.default, argument=X),
    "numpy ufunc": Case(lambda: pytest.importorskip("numpy").sin),
    "class method of a class": Case(lambda: Fraction.from_float, argument=0.5),
}


def ask(function, question, *arguments):
    """Return the answer, or the type of what is raised."""
    try:
        return question(function, *arguments)
    except Exception as error:
        return type(error)


def drive(coroutine):
    """Run an awaitable that nothing has to be waited for."""

    async def wait():
        """Wait for the worker."""
        return await coroutine

    iterator = wait().__await__()
    while True:
        try:
            next(iterator)
        except StopIteration as stop:
            return stop.value


async def all_of(items):
    """Run an async generator with a value sent in."""
    return [await items.__anext__(), await items.asend("sent")]


def outcome(result):
    """Return what becomes of a call's result, whatever has to be done with it."""
    if inspect.isawaitable(result):
        return type(result), plainly(drive(result))
    if inspect.isasyncgen(result):
        return type(result), result.__name__, drive(all_of(result))
    if inspect.isgenerator(result):
        taken = [next(result)]
        try:
            taken.append(result.send("sent"))
        except StopIteration as stop:
            taken.append(("returned", stop.value))
        return type(result), result.__name__, taken
    return plainly(result)


def plainly(value):
    """Return what can be compared."""
    return (type(value), value.tolist()) if hasattr(value, "tolist") else (type(value), repr(value))


def called(function, argument):
    """Call a function and follow its result."""
    return outcome(function(*argument) if isinstance(argument, tuple) else function(argument))


QUESTIONS = {
    "callable": callable,
    "iscoroutinefunction": inspect.iscoroutinefunction,
    "asyncio.iscoroutinefunction": asyncio.coroutines.iscoroutinefunction,
    "isgeneratorfunction": inspect.isgeneratorfunction,
    "isasyncgenfunction": inspect.isasyncgenfunction,
    "its call is a coroutine function": lambda f: inspect.iscoroutinefunction(f.__call__),
    "its call is an async generator function": lambda f: inspect.isasyncgenfunction(f.__call__),
    "isfunction": inspect.isfunction,
    "ismethod": inspect.ismethod,
    "isbuiltin": inspect.isbuiltin,
    "isroutine": inspect.isroutine,
    "is a partial": lambda f: isinstance(f, functools.partial),
    "is a module": lambda f: isinstance(f, torch.nn.Module),
    "class": lambda f: f.__class__,
    "signature": lambda f: str(inspect.signature(f)),
    "name": lambda f: f.__name__,
    "qualified name": lambda f: f.__qualname__,
    "module": lambda f: f.__module__,
    "docstring": lambda f: f.__doc__,
    "getdoc": inspect.getdoc,
    "annotations": lambda f: f.__annotations__,
    "public attributes": lambda f: {name for name in dir(f) if name[0] != "_"},
    "values of public attributes": lambda f: [name for name in dir(f) if name[0] != "_" and not hasattr(f, name)],
    "func": lambda f: f.func,
    "args": lambda f: f.args,
    "keywords": lambda f: f.keywords,
    "self": lambda f: f.__self__ if isinstance(f, types.MethodType) else None,
    "cache_info": lambda f: type(f.cache_info()),
    "registry": lambda f: set(f.registry),
    "source": inspect.getsource,
    "length": len,
    "item": lambda f: f[1],
    "truth": bool,
    "with": lambda f: f.__class__.__enter__(f),
    "iteration": lambda f: next(iter(f)),
    "equal to itself": lambda f: f == f,  # noqa: PLR0124
    "has a hash": lambda f: isinstance(hash(f), int),
    "weak reference": lambda f: weakref.ref(f).__class__,
    "copy": lambda f: copy.copy(f).__class__,
    "deep copy": lambda f: copy.deepcopy(f).__class__,
    "state of a module": lambda f: list(f.state_dict()),
    "new attribute": lambda f: (setattr(f, "some_new", 5), f.some_new, delattr(f, "some_new"), hasattr(f, "some_new"))[
        1:
    ],
}


WAYS = {
    "copy": copy.copy,
    "deep copy": copy.deepcopy,
    "pickle": lambda f: pickle.loads(pickle.dumps(f)),
    "older pickle": lambda f: pickle.loads(pickle.dumps(f, 2)),
    "cloudpickle": lambda f: pickle.loads(cloudpickle.dumps(f)),
    "pickle in Python": lambda f: pickle._loads(pickle._dumps(f)),
}


def called_after(function, take, argument):
    """Return what a function does that went some way; or the type of what was raised."""
    return ask(function, lambda f: called(take(f), argument))


STAY = {"singledispatch", "mock", "async mock"}
"""What holds weak references, or was never meant to be sent."""
MAY_BE_MORE = {"weak reference", "iscoroutinefunction", "module"}


@pytest.fixture(params=["on", "idle"])
def switched(request, bench):
    """Recording is on, or may be switched on."""
    if request.param == "idle":
        gpuscope.disable()
    return bench


@pytest.mark.parametrize("name", CASES)
def test_absent_a_callable_is_itself(monkeypatch, name):
    """With gpuscope off for good, whatever is decorated is returned."""
    monkeypatch.setattr(state, "may_toggle", False)
    function = CASES[name].make()
    assert stage("s")(function) is function or isinstance(function, types.BuiltinMethodType)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_a_callable_answers_as_it_does_undecorated(switched, name):
    """What programs and frameworks ask of a callable before they call it has the answer that it has without a stage."""
    case = CASES[name]
    function = case.make()
    staged = stage("s")(function)
    answers = {question: (ask(function, it), ask(staged, it)) for question, it in QUESTIONS.items()}
    # A stage may be more: have a module and weak references, and be a coroutine function where only asyncio knew.
    different = {question: pair for question, pair in answers.items() if not _same(*pair)}
    assert {question: pair for question, pair in different.items() if question not in MAY_BE_MORE} == {}


def _same(plain_answer, staged_answer):
    return plain_answer == staged_answer or repr(plain_answer) == repr(staged_answer)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_a_callable_does_as_it_does_undecorated(switched, name):
    """The call, its result, and copies and pickles of the callable are those of the plain one."""
    case = CASES[name]
    expected = called(case.make(), case.argument)
    staged = stage("s")(case.make())
    assert called(staged, case.argument) == expected
    for way, take in WAYS.items():
        # Pickle looks a function up by its name, and finds the plain one there. It goes by value, if all in it does.
        if "pickle" in way and (name in STAY or ("cloud" not in way and type(staged) is types.FunctionType)):
            continue
        if called_after(case.make(), take, case.argument) == expected:  # Not all can be copied and pickled.
            assert called_after(stage("s")(case.make()), take, case.argument) == expected, way


@pytest.mark.filterwarnings("ignore")
class TestPlaces:
    """Where a stage stands in the place of what it was made of."""

    def test_slotted_classes_find_their_parents(self, switched):
        """`super()` works in a class that attrs makes anew, below one `stage` and below several."""
        attrs = pytest.importorskip("attrs")

        @attrs.define
        class Base:
            def run(self):
                return 1

        @attrs.define
        class Child(Base):
            @stage("run")
            @stage("inner")
            def run(self):
                return super().run() + 1

            @stage("later")
            async def later(self):
                return super().run() + 1

            @stage("items")
            def items(self):
                yield super().run() + 1

            @classmethod
            @stage("of_class")
            def of_class(cls):
                return super().__name__ if hasattr(super(), "__name__") else cls.__name__

        assert (Child().run(), drive(Child().later()), list(Child().items()), Child.of_class()) == (2, 2, [2], "Child")

    def test_a_module_s_own_forward_goes_with_its_copies(self, switched, tmp_path):
        """A module whose `forward` was replaced on the object is copied, pickled and saved; each runs its weights."""
        whole = Net()
        whole.forward = stage("forward")(whole.forward)
        torch.save(whole, tmp_path / "net.pt")
        copies = [
            copy.deepcopy(whole),
            pickle.loads(pickle.dumps(whole)),
            torch.load(tmp_path / "net.pt", weights_only=False),
        ]
        for each in copies:
            assert torch.equal(each(X), whole(X))
            torch.nn.init.zeros_(each.layer.weight)
            torch.nn.init.zeros_(each.layer.bias)
            assert each(X).tolist() == [0, 0]
        assert whole(X).tolist() != [0, 0]
        assert copies[0].forward.__self__ is copies[0]

    def test_a_module_that_is_a_stage_is_a_child_like_any(self, switched, tmp_path):
        """A parent finds its parameters, moves and loads it, and all that reads modules reads through it."""
        inner = Net()
        plain_parent, parent = Parent(inner), Parent(stage("child")(inner))
        assert list(parent.state_dict()) == list(plain_parent.state_dict())
        assert [*map(id, parent.parameters())] == [*map(id, plain_parent.parameters())]
        assert torch.equal(parent.double()(X.double()), inner(X.double()))
        parent.float().eval()
        assert not inner.training
        parent.load_state_dict(plain_parent.state_dict())
        torch.save(parent, tmp_path / "parent.pt")
        ways = (
            copy.deepcopy, torch.compile(fullgraph=True, backend="eager"), torch.fx.symbolic_trace,
            lambda each: torch.jit.trace(each, X), torch.jit.script, lambda each: pickle.loads(pickle.dumps(each)),
            lambda each: torch.load(tmp_path / "parent.pt", weights_only=False),
        )  # fmt: skip
        for way in ways:
            assert torch.equal(way(parent)(X), inner(X))

    def test_a_cache_on_a_method(self, switched):
        """`stage` above `functools.lru_cache` binds, and the cache is reached by the class and by an object."""

        class Service:
            @stage("load")
            @functools.lru_cache  # noqa: B019 - as programs write it
            def load(self, name):
                return name.upper()

        service = Service()
        assert (service.load("a"), service.load("a"), Service.load(service, "a")) == ("A", "A", "A")
        assert Service.load.cache_info().hits == service.load.cache_info().hits == 2
        service.load.cache_clear()
        assert Service.load.cache_info().currsize == 0

    def test_wrapt_sees_the_object_of_a_method(self, switched):
        """What binds in its own way is bound in its own way."""

        class Service:
            @stage("run")
            @seen
            def run(self, x):
                return x + 1

        assert Service().run(1) == ("Service", 2)

    def test_a_kept_stage_goes_along(self, switched):
        """An object that keeps a stage can be copied and sent, and enters the stage where it is then."""
        kept = stage("kept", attributes={"model": "m"}, warmup=2, graph=False)
        for way, take in WAYS.items():
            with take(types.SimpleNamespace(timer=kept)).timer:
                pass
            with take(types.SimpleNamespace(timer=stage("cached"))).timer:
                pass
            assert take(kept).__class__ is kept.__class__, way

    def test_a_function_sent_by_value_is_a_stage_there(self, bench):
        """What cloudpickle sends holds nothing of this process, and is recorded by whoever runs it."""

        @stage("sent", attributes={"model": "m"}, warmup=0)
        def double(x):
            return x * 2

        class Service:
            @stage("method")
            def method(self, x):
                return double(x) + 1

        bench.nvtx.begin(double.__closure__[2].cell_contents, 0)  # What is prepared for a name stays here.
        sent = pickle.loads(cloudpickle.dumps((double, Service(), stage("partial")(functools.partial(lambda x: x, 1)))))
        assert (sent[0](2), sent[1].method(2), sent[2]()) == (4, 5, 1)
        assert {span.name for span in bench.collect() if span.kind == "host"} == {"sent", "method", "partial"}
        assert bench.named("sent")[0].attributes["model"] == "m"


def test_an_object_whose_class_is_not_hashable(monkeypatch):
    """Classes are told apart by identity, whatever their metaclass says of equality."""

    class Unhashable(type):
        __hash__ = None

        def __eq__(cls, other):
            raise AssertionError("compared")

    class First(metaclass=Unhashable):
        def __call__(self):
            return 1

    class Second(First):
        def __len__(self):
            return 2

    monkeypatch.setattr(state, "may_toggle", True)
    first, second = stage(First()), stage(Second())
    assert (first(), second(), len(second), hasattr(first, "__len__")) == (1, 1, 2, False)
