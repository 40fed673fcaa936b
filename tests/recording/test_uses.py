"""Programs that decorate in odd places do, with recording on and idle, what they do without a decorator."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import contextvars
import copy
import dataclasses
import doctest
import enum
import functools
import gc
import inspect
import io
import operator
import pickle
import pydoc
import textwrap
import threading
import traceback
import types
import typing
import unittest.mock
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

import gpuscope
from gpuscope import stage

torch = pytest.importorskip("torch")

USES = {}


def use(function):
    """Note a use: it gets a decorator and returns what a program sees."""
    USES[function.__name__] = function
    return function


@use
def cached_property(deco):
    """Cached property."""

    class Model:
        made = 0

        @functools.cached_property
        @deco
        def weights(self):
            """Make them."""
            self.made += 1
            return [self.made]

    model = Model()
    return model.weights is model.weights, model.made, Model.weights.__doc__, vars(model)


@use
def property_with_setter(deco):
    """Property with setter."""

    class Model:
        def __init__(self):
            self._size = 1

        @property
        @deco
        def size(self):
            """Its size."""
            return self._size

        @size.setter
        @deco
        def size(self, value):
            self._size = value

        @size.deleter
        @deco
        def size(self):
            self._size = 0

    model = Model()
    model.size = 5
    before = model.size
    del model.size
    return before, model.size, Model.size.__doc__


@use
def abstract_methods(deco):
    """Abstract methods."""

    class Base(abc.ABC):
        @abc.abstractmethod
        @deco
        def inner(self):
            """Do."""

        @deco
        @abc.abstractmethod
        def outer(self):
            """Do."""

        @classmethod
        @abc.abstractmethod
        @deco
        def of_class(cls):
            """Do."""

    class Whole(Base):
        def inner(self):
            return 1

        def outer(self):
            return 2

        @classmethod
        def of_class(cls):
            return 3

    with pytest.raises(TypeError) as refused:
        Base()
    return str(refused.value), sorted(Base.__abstractmethods__), Whole().inner(), inspect.isabstract(Base)


@use
def stacks_of_methods(deco):
    """Stacks of methods."""

    class Model:
        @classmethod
        @deco
        def one(cls, x):
            return cls.__name__, x

        @deco
        @classmethod
        def two(cls, x):
            return cls.__name__, x

        @staticmethod
        @deco
        def three(x):
            return x

        @deco
        @staticmethod
        def four(x):
            return x

    class Child(Model):
        pass

    kinds = [type(vars(Model)[name]).__name__ for name in ("one", "two", "three", "four")]
    return Child.one(1), Child().two(2), Model.three(3), Child().four(4), kinds


@use
def methods_of_a_dataclass(deco):
    """Methods of a dataclass."""

    @dataclasses.dataclass(order=True, slots=True)
    class Batch:
        size: int = 3
        made: list = dataclasses.field(default_factory=deco(list) if deco is plain else list)

        @deco
        def __post_init__(self):
            self.made.append(self.size)

        @deco
        def double(self):
            return dataclasses.replace(self, size=self.size * 2, made=[])

    batch = Batch().double()
    return (
        repr(batch),
        [field.name for field in dataclasses.fields(Batch)],
        dataclasses.asdict(batch),
        Batch(1) < Batch(2),
    )


@use
def members_of_an_enum(deco):
    """Members of an enum."""

    class Phase(enum.Enum):
        PREFILL = 1
        DECODE = 2

        @deco
        def label(self):
            return self.name.lower()

        @classmethod
        @deco
        def first(cls):
            return cls(1)

    return list(Phase.__members__), Phase.DECODE.label(), Phase.first().name


@use
def functions_as_members_of_an_enum(deco):
    """Functions as members of an enum."""

    class Operator(enum.Enum):
        ADD = enum.member(deco(lambda a, b: a + b)) if hasattr(enum, "member") else (deco(lambda a, b: a + b),)

    return list(Operator.__members__)


@use
def context_managers(deco):
    """Context managers."""
    seen = []

    @contextlib.contextmanager
    @deco
    def inside(x):
        seen.append("in")
        try:
            yield x
        except KeyError:
            seen.append("handled")
        finally:
            seen.append("out")

    with inside(1) as one:
        seen.append(one)
    with inside(2):
        raise KeyError
    with pytest.raises(ValueError, match="through"), inside(3):
        raise ValueError("through")

    @inside(4)
    def decorated():
        return seen.append("called")

    decorated()
    return seen


@use
def async_context_managers(deco):
    """Async context managers."""
    seen = []

    @contextlib.asynccontextmanager
    @deco
    async def inside(x):
        """Return a context."""
        seen.append("in")
        try:
            yield x
        except KeyError:
            seen.append("handled")
        finally:
            seen.append("out")

    async def main():
        """Run it."""
        async with inside(1) as one:
            seen.append(one)
        async with inside(2):
            raise KeyError

    asyncio.run(main())
    return seen


@use
def exceptions_of_generators(deco):
    """Exceptions of generators."""

    @deco
    def stops(how):
        yield 1
        if how == "stop":
            raise StopIteration("odd")  # noqa: PLR1708 - a fault of the program
        return "value"

    def delegating():
        return (yield from stops("value"))

    found = []
    for how in ("stop", "value"):
        try:
            found.append(list(stops(how)))
        except RuntimeError as error:
            found.append((str(error), type(error.__cause__)))
    iterator = delegating()
    next(iterator)
    try:
        next(iterator)
    except StopIteration as stop:
        found.append(stop.value)
    iterator = stops("value")
    found.append(iterator.close())
    found.append(next(iterator, "over"))
    return found


@use
def classes_that_make_classes(deco):
    """Classes that make classes."""

    class Meta(type):
        @deco
        def __call__(cls, *args):
            return super().__call__(*args)

        @classmethod
        @deco
        def __prepare__(cls, name, bases, **keywords):
            return {"prepared": True}

        def __new__(cls, name, bases, namespace, **keywords):
            return super().__new__(cls, name, bases, dict(namespace), **keywords)

        def __init__(cls, name, bases, namespace, **keywords):
            super().__init__(name, bases, namespace)

    class Model(metaclass=Meta):
        @deco
        def __new__(cls, *args):
            made = super().__new__(cls)
            made.made = args
            return made

        @deco
        def __init__(self, x):
            self.x = x

        @deco
        def __init_subclass__(cls, **keywords):
            cls.keywords = keywords

        @deco
        def __class_getitem__(cls, item):
            return cls.__name__, item

    class Child(Model, option=1):
        pass

    return Child(3).x, Child(3).made, Child.keywords, Child[int], Model.prepared


@use
def special_methods(deco):
    """Special methods."""

    class Model:
        def __init__(self):
            self.items = [1, 2]

        @deco
        def __call__(self, x):
            return x

        @deco
        def __len__(self):
            return 2

        @deco
        def __getitem__(self, key):
            return self.items[key]

        @deco
        def __iter__(self):
            yield from self.items

        @deco
        def __contains__(self, x):
            return x in self.items

        @deco
        def __eq__(self, other):
            return isinstance(other, Model)

        @deco
        def __hash__(self):
            return 5

        @deco
        def __getattr__(self, name):
            if name == "dynamic":
                return "found"
            raise AttributeError(name)

        @deco
        def __enter__(self):
            return self

        @deco
        def __exit__(self, *exception):
            return True

    model = Model()
    with model:
        raise ValueError
    return (
        *(model(1), len(model), model[0], list(model), 2 in model, model == Model(), hash(model), model.dynamic),
        *(hasattr(model, "other"), {model: 1}[Model()], copy.deepcopy(model) == model),
    )


@use
def awaitables_and_iterators(deco):
    """Awaitables and iterators."""

    class Model:
        @deco
        def __await__(self):
            yield from asyncio.sleep(0).__await__()
            return "awaited"

        @deco
        async def __aenter__(self):
            return "entered"

        @deco
        async def __aexit__(self, *exception):
            return True

        @deco
        async def __aiter__(self):
            yield 1
            yield 2

    async def main():
        """Run it."""
        async with Model() as entered:
            raise ValueError
        return entered, await Model(), [item async for item in Model()]

    return asyncio.run(main())


@use
def single_dispatch(deco):
    """Single dispatch."""

    @functools.singledispatch
    @deco
    def show(x):
        """Show."""
        return "any"

    @show.register
    @deco
    def _(x: int):
        return "int"

    @show.register(str)
    @deco
    def _(x):
        return "str"

    class Model:
        @functools.singledispatchmethod
        @deco
        def show(self, x):
            return "any"

        @show.register
        @deco
        def _(self, x: int):
            return "int"

    return show([]), show(1), show("a"), show.__doc__, Model().show(1), Model().show([])


@use
def partial_methods(deco):
    """Partial methods."""

    class Model:
        @deco
        def run(self, x, y):
            return x, y

        fast = functools.partialmethod(run, y=2)

    return Model().fast(1), str(inspect.signature(Model.fast))


@use
def overloads(deco):
    """Overloads."""

    @typing.overload
    def run(x: int) -> int: ...
    @typing.overload
    def run(x: str) -> str: ...
    @deco
    def run(x):
        return x

    return run(1), [len(getattr(typing, "get_overloads", lambda _: [1, 2])(run))]


@use
def type_hints(deco):
    """Type hints."""

    @deco
    def run(x: int, *args: str, y: list[int] | None = None, **kwargs: float) -> dict[str, int]:
        return {}

    hints = typing.get_type_hints(run)
    return (hints, str(inspect.signature(run)), run.__annotations__)


@use
def binding_of_arguments(deco):
    """Binding of arguments."""

    @deco
    def run(a, /, b=2, *c, d, e=5, **f):
        return a, b, c, d, e, f

    found = [run(1, d=4), run(1, 2, 3, d=4, g=6)]
    for arguments, keywords in (((), {}), ((1,), {}), ((1,), {"a": 1}), ((1,), {"d": 1, "b": 2})):
        try:
            found.append(run(*arguments, **keywords))
        except TypeError as error:
            found.append(str(error).rpartition(".")[2])
    bound = inspect.signature(run).bind(1, d=2)
    bound.apply_defaults()
    return found, bound.arguments


@use
def help_texts(deco):
    """Help texts."""

    @deco
    def run(x: int = 3) -> int:
        """Run it."""
        return x

    class Model:
        @deco
        def forward(self, x):
            """Go."""

    return pydoc.render_doc(run, renderer=pydoc.plaintext), "Go." in pydoc.render_doc(Model)


@use
def doctests(deco):
    """Doctests."""

    @deco
    def run(x):
        """
        Double.

        >>> run(2)
        4
        """
        return x * 2

    module = types.ModuleType("documented")
    run.__module__ = "documented"
    found = doctest.DocTestFinder(exclude_empty=False).find(run, "run", module=False, globs={"run": run})
    runner = doctest.DocTestRunner(verbose=False)
    return [(test.name, runner.run(test)) for test in found], module.__name__


@use
def sources(deco):
    """Sources."""

    @deco
    def run(x):
        return x

    return (inspect.getsource(run).count("return x"), inspect.unwrap(run).__name__)


@use
def chains_of_wrappers(deco):
    """Chains of wrappers."""

    def other(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            return ["other", function(*args, **kwargs)]

        return wrapper

    @other
    @deco
    @other
    @deco
    def run(x: int = 1):
        """Run."""
        return x

    run.note = "noted"
    return run(), run.__name__, run.__doc__, str(inspect.signature(run)), run.note


@use
def names_and_attributes(deco):
    """Names and attributes."""

    @deco
    def run():
        return run.calls

    run.calls = 3
    run.__name__ = "renamed"
    run.__doc__ = "Changed."
    return run(), run.__name__, run.__doc__, vars(run).get("calls"), run.__qualname__.endswith("run")


@use
def weak_references(deco):
    """Weak references."""

    @deco
    def run(x):
        return x

    class Model:
        @deco
        def run(self, x):
            return x

    model = Model()
    reference, method = weakref.ref(run), weakref.WeakMethod(model.run)
    kept = weakref.WeakKeyDictionary({run: 1})[run], weakref.WeakSet([run]).__contains__(run)
    found = reference() is run, method()(1), kept
    del run, model
    gc.collect()
    return found, reference(), method()


@use
def equality_of_methods(deco):
    """Equality of methods."""

    class Model:
        @deco
        def run(self):
            return 1

        def __eq__(self, other):
            return True

        __hash__ = None

    one, other = Model(), Model()
    return one.run == one.run, one.run == other.run, Model.run is Model.run, one.run.__func__ is Model.run


@use
def without_gradients(deco):
    """Without gradients."""

    @torch.no_grad()
    @deco
    def inner(x):
        return torch.is_grad_enabled(), (x * 2).requires_grad

    @deco
    @torch.inference_mode()
    def outer(x):
        return torch.is_inference_mode_enabled(), (x * 2).requires_grad

    @torch.no_grad()
    @deco
    def items(x):
        yield torch.is_grad_enabled()
        yield (x * 2).requires_grad

    x = torch.ones(2, requires_grad=True)
    return inner(x), outer(x), list(items(x)), torch.is_grad_enabled()


@use
def hooks_of_modules(deco):
    """Hooks of modules."""
    net, seen = torch.nn.Linear(2, 2), []

    @deco
    def hook(module, inputs, outputs):
        seen.append((type(module).__name__, len(inputs)))
        return outputs * 0

    handle = net.register_forward_hook(hook)
    result = net(torch.ones(1, 2)).tolist()
    handle.remove()
    return result, seen


@use
def functions_of_autograd(deco):
    """Functions of autograd."""

    class Double(torch.autograd.Function):
        @staticmethod
        @deco
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @deco
        def backward(ctx, gradient):
            return gradient * 3

    x = torch.ones(2, requires_grad=True)
    Double.apply(x).sum().backward()
    return x.grad.tolist()


@use
def checkpoints(deco):
    """Checkpoints."""
    from torch.utils.checkpoint import checkpoint

    @deco
    def block(x):
        return (x * 2).sin()

    x = torch.ones(2, requires_grad=True)
    checkpoint(block, x, use_reentrant=False).sum().backward()
    return x.grad.tolist()


@use
def transforms_of_functions(deco):
    """Transforms of functions."""

    @deco
    def loss(x):
        return (x**2).sum()

    x = torch.arange(3.0)
    return torch.func.grad(loss)(x).tolist(), torch.vmap(deco(torch.sin))(x).tolist()


@use
def modules_for_torchscript(deco):
    """Modules for torchscript."""

    class Net(torch.nn.Module):
        @torch.jit.ignore
        @deco
        def note(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    return torch.jit.script(Net())(torch.ones(1)).tolist()


@use
def loaders_of_data(deco):
    """Loaders of data."""

    class Data(torch.utils.data.Dataset):
        @deco
        def __len__(self):
            return 4

        @deco
        def __getitem__(self, index):
            return index

    loader = torch.utils.data.DataLoader(Data(), batch_size=2, collate_fn=deco(sum))
    return list(loader)


@use
def threads_and_contexts(deco):
    """Threads and contexts."""
    variable = contextvars.ContextVar("variable", default=0)

    @deco
    def run(x):
        variable.set(x)
        return variable.get()

    with ThreadPoolExecutor(2) as pool:
        found = sorted(pool.map(run, range(5)))
    context = contextvars.copy_context()
    thread = threading.Thread(target=run, args=(9,))
    thread.start()
    thread.join()
    return found, context.run(run, 7), context[variable], variable.get()


@use
def tasks(deco):
    """Tasks."""

    @deco
    async def work(x):
        """Do something."""
        await asyncio.sleep(0)
        if x == 2:
            raise KeyError(x)
        return x

    async def main():
        """Run it."""
        found = await asyncio.gather(*(work(x) for x in range(4)), return_exceptions=True)
        task = asyncio.create_task(deco(asyncio.sleep)(60), name="sleeper")
        await asyncio.sleep(0)
        task.cancel("stop")
        try:
            await task
        except asyncio.CancelledError as error:
            found.append(error.args)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(work(1), 5)
            await asyncio.wait_for(deco(asyncio.sleep)(60), 0.001)
        return [repr(item) for item in found], task.cancelled(), (await asyncio.to_thread(deco(lambda: 5)))

    return asyncio.run(main())


@use
def coroutines_that_are_never_awaited(deco):
    """Coroutines that are never awaited."""

    @deco
    async def work():
        """Do something."""
        return 1

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        work()
        gc.collect()
    coroutine = work()
    coroutine.close()
    return [str(one.message).rpartition(".")[2] for one in said], inspect.getcoroutinestate(coroutine)


@use
def tracebacks(deco):
    """Tracebacks."""

    @deco
    def fails():
        raise ValueError("bad")

    try:
        fails()
    except ValueError as error:
        frames = traceback.extract_tb(error.__traceback__)
        return frames[-1].name, error.__context__, error.__cause__, error.args
    return None


@use
def recursion(deco):
    """Recursion."""

    @deco
    def count(n):
        return 0 if n == 0 else 1 + count(n - 1)

    @deco
    def forever():
        return forever()

    with pytest.raises(RecursionError):
        forever()
    return count(50)


@use
def mocks(deco):
    """Mocks."""

    class Model:
        @deco
        def run(self, x, *, y=1):
            return x

    with unittest.mock.patch.object(Model, "run", autospec=True) as mock:
        mock.return_value = 7
        result = Model().run(1, y=2)
        with pytest.raises(TypeError):
            Model().run(1, z=2)
    return result, mock.call_count, Model().run(1)


@use
def named_tuples_and_slots(deco):
    """Named tuples and slots."""

    class Point(typing.NamedTuple):
        x: int

        @deco
        def double(self):
            return self._replace(x=self.x * 2)

    class Slotted:
        __slots__ = ("x",)

        @deco
        def set(self, x):
            self.x = x
            return hasattr(self, "__dict__")

    return Point(2).double(), Slotted().set(1)


@use
def protocols(deco):
    """Protocols."""

    @typing.runtime_checkable
    class Runs(typing.Protocol):
        @deco
        def run(self):
            """Run."""

    class Model:
        @deco
        def run(self):
            return 1

    return isinstance(Model(), Runs), isinstance(3, Runs)


@use
def operators(deco):
    """Operators."""

    @deco
    def key(x):
        return -x

    return (
        sorted([1, 3, 2], key=key),
        list(map(key, [1, 2])),
        functools.reduce(deco(operator.add), [1, 2, 3]),
        max([1, 2], key=key),
        deco(functools.cmp_to_key(lambda a, b: a - b))(3) < deco(functools.cmp_to_key(lambda a, b: a - b))(4),
    )


@use
def output(deco):
    """Output."""

    @deco
    def run():
        print("said")  # noqa: T201 - it is what is looked at

    with contextlib.redirect_stdout(io.StringIO()) as said:
        run()
    return said.getvalue()


def plain(function):
    """Stand for no decorator."""
    return function


@pytest.fixture(params=["on", "idle"])
def switched(request, bench):
    """Recording is on, or may be switched on."""
    if request.param == "idle":
        gpuscope.disable()
    return bench


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", USES)
def test_a_use_is_what_it_is_without_a_stage(switched, name):
    """What the program sees is the same."""
    assert USES[name](stage("s")) == USES[name](plain)


POOL = """
import functools, multiprocessing, operator
from gpuscope import stage

@stage("at its name")
def double(x):
    return x * 2

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(double, [1, 2]), pool.map(stage("partial")(functools.partial(operator.mul, 3)), [1, 2]))
"""


def test_a_decorated_function_goes_to_spawned_workers(run_python):
    """It is found there by its name."""
    done = run_python(POOL, GPUSCOPE="1", GPUSCOPE_EXPORTER="none")
    assert done.stdout == "[2, 4] [3, 6]\n", done.stderr


def test_a_function_that_stays_where_it_is(switched):
    """Pickle says what stands in the way; a partial of the function goes by value."""
    staged = stage("s")(textwrap.dedent)
    with pytest.raises(pickle.PicklingError, match=r"it's not the same object as textwrap\.dedent"):
        pickle.dumps(staged)
    assert pickle.loads(pickle.dumps(stage("s")(functools.partial(textwrap.dedent))))(" x") == "x"


def test_a_function_in_place_of_another_is_pickled_by_its_name(switched, monkeypatch):
    """What stands where its name says is found there."""
    monkeypatch.setattr(textwrap, "dedent", stage("s")(textwrap.dedent))
    assert pickle.loads(pickle.dumps(textwrap.dedent)) is textwrap.dedent
