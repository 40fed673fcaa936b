"""Stages by name: what is found, what is put in its place, what is said of what is not there, and what is put back."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import itertools
import pickle
import sys
import textwrap
from importlib.machinery import ModuleSpec

import pytest

import gpuscope
from gpuscope.instrument import Target, instrument, uninstrument
from gpuscope.instrument._targets import read_file, targets_of
from gpuscope.testing import capture

NUMBERS = itertools.count()
KINDS = """
import functools

def plain(images, *, k=3):
    "Doc."
    return len(images)

async def coroutine(x):
    return x

def generator(n):
    for i in range(n):
        sent = yield i
    return "end"

async def async_generator(n):
    for i in range(n):
        sent = yield i

@functools.lru_cache
def cached(x):
    return x

class Outer:
    class Inner:
        def method(self, x=(1, 2)):
            return self, x

        @staticmethod
        def static(x):
            return x

        @classmethod
        def of_class(cls, x):
            return cls, x

        def base(self, x, y):
            return x, y

        partial = functools.partialmethod(base, 1)
"""
FAMILY = """
class Base:
    def step(self, x):
        return ["base", x]

    @classmethod
    def make(cls):
        return cls()

class Child(Base):
    def step(self, x):
        return ["child", *super().step(x)]

    @classmethod
    def make(cls):
        return super().make()

class Silent(Base):
    pass
"""


@pytest.fixture(autouse=True)
def restored():
    """Each test leaves nothing instrumented."""
    yield
    uninstrument()


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return a function that writes a module, and returns its name, which is new."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def write(source):
        name = f"instrumented_{next(NUMBERS)}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        importlib.invalidate_caches()
        names.append(name)
        return name

    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def load(write):
    """Return a function that writes a module and imports it."""
    return lambda source: importlib.import_module(write(source))


def host_spans(bench):
    """Every span that is not a GPU's."""
    return [span for span in bench.collect() if span.kind == "host"]


def attributes(span):
    """The attributes that a target gave."""
    return {key: value for key, value in span.attributes.items() if "." not in key}


class TestKinds:
    """Functions of every kind, in every place."""

    @pytest.mark.parametrize("imported_before", [True, False])
    def test_functions_of_every_kind(self, bench, write, imported_before):
        """Each kind of function is a stage of its own kind, its module imported before or after."""
        name = write(KINDS)
        if imported_before:
            importlib.import_module(name)
        inner = f"{name}:Outer.Inner"
        instrument(
            f"plain={name}:plain{{n=len(images), k=k}}, coroutine={name}:coroutine{{x=x}}, cached={name}:cached{{x=x}},"
            f"generator={name}:generator{{n=n}}, async_generator={name}:async_generator{{n=n}},"
            f"m={inner}.method{{x=x}}, static={inner}.static{{x=x}}, class={inner}.of_class{{name=cls.__name__}},"
            f"partial={inner}.partial{{x=x, y=y}}"
        )
        module = importlib.import_module(name)

        async def consume():
            """Run it to its end."""
            return [item async for item in module.async_generator(1)]

        thing = module.Outer.Inner()
        assert module.plain(["a", "b"]) == 2
        assert asyncio.run(module.coroutine(4)) == 4
        assert list(module.generator(1)) == [0]
        assert asyncio.run(consume()) == [0]
        assert thing.method() == (thing, (1, 2))
        assert module.Outer.Inner.static(5) == 5
        assert thing.of_class(6) == (module.Outer.Inner, 6)
        assert thing.partial(7) == (1, 7)
        assert module.cached(8) == 8
        spans = [(span.name, attributes(span)) for span in host_spans(bench)]
        assert [pair for pair in spans if pair[1]] == [
            ("plain", {"n": 2, "k": 3}),
            ("coroutine", {"x": 4}),
            ("generator", {"n": 1}),
            ("async_generator", {"n": 1}),
            ("m", {"x": [1, 2]}),
            ("static", {"x": 5}),
            ("class", {"name": "Inner"}),
            ("partial", {"x": 1, "y": 7}),
            ("cached", {"x": 8}),
        ]
        # Each resumption of a generator is a run; the first has the attributes.
        assert [pair[0] for pair in spans if not pair[1]] == ["generator", "async_generator"]

    def test_what_a_program_may_ask_of_a_function_stays(self, bench, load):
        """Kind, signature, docstring, pickling by name, and a cache's own methods are as before."""
        module = load(KINDS)
        signature = inspect.signature(module.plain)
        names = ("plain", "coroutine", "generator", "async_generator", "cached")
        instrument({name: f"{module.__name__}:{name}{{a=1}}" for name in names})
        assert inspect.signature(module.plain) == signature
        assert (module.plain.__doc__, module.plain.__module__) == ("Doc.", module.__name__)
        assert inspect.iscoroutinefunction(module.coroutine)
        assert inspect.isgeneratorfunction(module.generator)
        assert inspect.isasyncgenfunction(module.async_generator)
        assert all(pickle.loads(pickle.dumps(getattr(module, name))) is getattr(module, name) for name in names)
        module.cached(1)
        assert module.cached.cache_info().misses == 1

    def test_values_sent_and_thrown_reach_generators(self, bench, load):
        """A consumer talks to the program's own generator, and its return value comes through."""
        module = load(
            """
            def plain():
                try:
                    yield (yield 1)
                except KeyError:
                    return "caught"
            async def asynchronous():
                try:
                    yield (yield 1)
                except KeyError:
                    yield "caught"
            """
        )
        instrument({"a": f"{module.__name__}:plain{{n=1}}", "b": f"{module.__name__}:asynchronous{{n=1}}"})
        generator = module.plain()
        assert (next(generator), generator.send(2)) == (1, 2)
        with pytest.raises(StopIteration, match="caught"):
            generator.throw(KeyError())

        async def talk():
            """Send and throw."""
            generator = module.asynchronous()
            first = [await anext(generator), await generator.asend(2), await generator.athrow(KeyError())]
            await generator.aclose()
            return first

        assert asyncio.run(talk()) == [1, 2, "caught"]

    def test_a_function_in_c(self, bench, write):
        """A module's function that is written in C is a stage too, and its own when undone."""
        import math

        original = math.hypot
        instrument("root=math:hypot")
        assert math.hypot(3, 4) == 5.0
        uninstrument()
        assert math.hypot is original
        assert len(bench.named("root")) == 1

    def test_a_method_of_an_instance(self, bench, load):
        """A path may lead through an object that the module holds."""
        module = load(KINDS + "\nmodel = Outer.Inner()\n")
        instrument(f"infer={module.__name__}:model.method")
        module.model.method()
        module.Outer.Inner().method()
        assert len(bench.named("infer")) == 1
        uninstrument()
        assert vars(module.model) == {}

    def test_compiled_models_stay_whole(self, bench, load):
        """`torch.compile` takes a forward that was made a stage by name in one graph."""
        torch = pytest.importorskip("torch")
        module = load(
            """
            import torch
            class Base(torch.nn.Module):
                def forward(self, x):
                    return x * 2
            class Net(Base):
                def forward(self, x):
                    return super().forward(x) + 1
            """
        )
        target = Target("forward", f"{module.__name__}:Base.forward", {"shape": "x.shape"}, subclasses=True)
        instrument([target])
        net, x = module.Net(), torch.arange(4.0)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(net, fullgraph=True, backend="eager")(x), x * 2 + 1)
        assert torch.equal(net(x), x * 2 + 1)
        assert [attributes(span) for span in bench.named("forward")] == [{"shape": [4]}]


class TestSubclasses:
    """`subclasses=True`: a method wherever it is overridden."""

    def test_each_call_is_one_stage(self, bench, load):
        """An overriding method is a stage, in classes made before and after; what it calls by `super()` is not."""
        module = load(FAMILY)
        instrument(
            [Target("step", f"{module.__name__}:Base.step", {"kind": "self.__class__.__name__"}, subclasses=True)]
        )

        class Later(module.Child):
            def step(self, x):
                return ["later", *super().step(x)]

        assert Later().step(1) == ["later", "child", "base", 1]
        for kind in (module.Child, module.Silent, module.Base):
            kind().step(1)
        assert [attributes(span)["kind"] for span in bench.named("step")] == ["Later", "Child", "Silent", "Base"]
        uninstrument()
        assert not hasattr(Later.step, "__wrapped__")
        assert "__init_subclass__" not in vars(module.Base)

    def test_an_object_within_another_is_a_second_stage(self, bench, load):
        """Only `super()` is seen through: a method that calls another object's is a stage around a stage."""
        module = load(FAMILY)
        instrument([Target("step", f"{module.__name__}:Base.step", subclasses=True)])

        class Pair(module.Base):
            def step(self, x):
                return module.Child().step(x)

        assert Pair().step(1) == ["child", "base", 1]
        inner, outer = sorted(bench.named("step"), key=lambda span: span.end_ns)
        assert inner.parent_id == outer.span_id

    def test_class_methods(self, bench, load):
        """A class method calls its parent's by `super()` within one stage."""
        module = load(FAMILY)
        instrument([Target("make", f"{module.__name__}:Base.make", subclasses=True)])
        assert type(module.Child.make()) is module.Child
        assert len(bench.named("make")) == 1

    def test_abstract_methods_and_keywords_of_classes(self, bench, load):
        """A class with an `__init_subclass__` of its own keeps it, and an abstract method is left alone."""
        module = load(
            """
            import abc
            class Base(abc.ABC):
                def __init_subclass__(cls, tag):
                    cls.tag = tag
                @abc.abstractmethod
                def step(self): ...
            """
        )
        instrument([Target("step", f"{module.__name__}:Base.step", subclasses=True)])

        class Child(module.Base, tag="t"):
            def step(self):
                return self.tag

        assert Child().step() == "t"
        assert len(bench.named("step")) == 1
        with pytest.raises(TypeError, match="abstract"):
            module.Base()


class TestNotThere:
    """Names that cannot be stages: one warning, and the program runs on."""

    @pytest.mark.parametrize(
        ("path", "said"),
        [
            ("plaine", "no `plaine`; did you mean `plain`"),
            ("Outer.Iner.method", "no `Iner`; did you mean `Inner`"),
            ("Outer.Inner.zzz", "`Inner` has no `zzz`."),
            ("Outer.Inner", "it is a class; name one of its methods"),
            ("Outer.prop", "it is a property; name the function that it calls"),
            ("NUMBER", "it is of type `int`, which cannot be called; name a function"),
            ("instance", "it is an instance; name its method, as in `Call.__call__`"),
        ],
    )
    def test_one_warning_says_why(self, bench, write, caplog, path, said):
        """The warning names the path, the reason and the way out; importing goes on, and it is said once."""
        name = write(
            KINDS + "\nNUMBER = 1\nOuter.prop = property(id)\nclass Call:\n  __call__ = len\ninstance = Call()\n"
        )
        for _ in range(2):
            instrument(f"x={name}:{path}")
        importlib.import_module(name)
        instrument(f"x={name}:{path}")
        assert [said in message and f"{name}:{path}" in message for message in caplog.messages] == [True]

    def test_a_type_in_c_cannot_be_changed(self, bench, caplog):
        """A method of a built-in type stays, and a warning says so."""
        instrument("x=builtins:str.upper")
        assert "a".upper() == "A"
        assert "builtins:str.upper cannot be replaced" in caplog.text

    def test_optional_targets_are_quiet(self, bench, load, caplog):
        """What other versions of a framework have is not missed."""
        instrument([Target("x", f"{load(KINDS).__name__}:gone", optional=True)])
        assert caplog.messages == []

    def test_an_argument_that_is_not_there(self, bench, load, caplog):
        """An expression with an unknown name is left out with a warning; the stage and other attributes are there."""
        module = load(KINDS)
        instrument(f"plain={module.__name__}:plain{{n=len(imagess), k=k}}")
        module.plain([])
        assert attributes(*bench.named("plain")) == {"k": 3}
        assert "did you mean `images`" in caplog.text

    def test_an_expression_that_fails_at_run_time(self, bench, load, caplog):
        """A call whose arguments have no such item lacks the attribute; that is said once, and nothing is raised."""
        module = load(KINDS)
        instrument(f"plain={module.__name__}:plain{{first=images[0], k=k}}")
        assert [module.plain(images) for images in ([], [], [object()], ["a"])] == [0, 0, 1, 1]
        assert [attributes(span) for span in bench.named("plain")] == [{"k": 3}] * 3 + [{"first": "a", "k": 3}]
        assert len(caplog.messages) == 1
        assert "first=images[0]" in caplog.text

    def test_code_that_fails_while_something_is_looked_up(self, bench, load, caplog):
        """A module whose `__getattr__` raises is imported as ever."""
        module = load("def __getattr__(name):\n    raise RuntimeError(name)\n")
        instrument(f"x={module.__name__}:anything")
        assert "is not instrumented: RuntimeError('anything')" in caplog.text


class TestUndo:
    """Idempotence, and what `uninstrument` restores."""

    def test_restores_exactly_what_was(self, bench, load):
        """Own attributes are the same objects again, inherited ones are gone from the class."""
        module = load(KINDS + FAMILY)
        before = [dict(vars(module)), dict(vars(module.Outer.Inner)), dict(vars(module.Silent))]
        inner = "Outer.Inner"
        paths = (
            "plain",
            "cached",
            f"{inner}.static",
            f"{inner}.of_class",
            f"{inner}.partial",
            "Silent.step",
            "Base.step",
        )
        instrument({f"s{number}": f"{module.__name__}:{path}" for number, path in enumerate(paths)})
        assert "step" in vars(module.Silent)
        uninstrument()
        assert [dict(vars(module)), dict(vars(module.Outer.Inner)), dict(vars(module.Silent))] == before
        assert module.plain([]) == 0
        assert bench.collect() == []

    def test_once_is_enough(self, bench, load, caplog):
        """A function that is instrumented again is one stage; of two names it keeps the first, with a warning."""
        module = load(KINDS)
        for _ in range(2):
            instrument(f"plain={module.__name__}:plain")
        instrument(f"other={module.__name__}:plain")
        module.plain([])
        assert [span.name for span in host_spans(bench)] == ["plain"]
        assert "is already the stage 'plain'; it cannot be 'other' as well" in caplog.text

    def test_an_inherited_method_is_a_stage_of_its_own(self, bench, load):
        """Two classes may give one inherited function two names."""
        module = load(FAMILY)
        instrument({"base": f"{module.__name__}:Base.step", "silent": f"{module.__name__}:Silent.step"})
        module.Silent().step(1)
        module.Base().step(1)
        assert [span.name for span in host_spans(bench)] == ["silent", "base"]

    def test_reloading(self, bench, load):
        """A module that is reloaded is as new: instrumented again when asked, and not undone to what it was before."""
        module = load(KINDS)
        instrument(f"plain={module.__name__}:plain")
        importlib.reload(module)
        fresh = module.plain
        instrument(f"plain={module.__name__}:plain")
        module.plain([])
        assert len(bench.named("plain")) == 1
        uninstrument()
        assert module.plain is fresh

    def test_what_was_replaced_since_stays(self, bench, load):
        """A function that the program has replaced after us is the program's."""
        module = load(KINDS)
        instrument(f"plain={module.__name__}:plain")
        module.plain = print
        uninstrument()
        assert module.plain is print

    def test_modules_not_imported_yet_are_forgotten(self, bench, write):
        """After `uninstrument` a module is imported as it is."""
        name = write(KINDS)
        instrument(f"plain={name}:plain")
        uninstrument()
        assert not hasattr(importlib.import_module(name).plain, "__wrapped__")

    def test_nothing_is_replaced_while_gpuscope_is_off(self, load):
        """Off for good: every function stays the object that it was."""
        module = load(KINDS)
        before = dict(vars(module))
        instrument(f"plain={module.__name__}:plain")
        assert dict(vars(module)) == before

    def test_attributes_are_read_only_while_recording(self, load):
        """While recording is switched off no expression is read."""
        module = load("def f(images):\n    return 1\n")

        class Counted(list):
            asked = 0

            def __len__(self):
                Counted.asked += 1
                return 0

        with capture(device=None):
            instrument(f"f={module.__name__}:f{{n=len(images)}}")
            module.f(Counted())
            gpuscope.disable()
            module.f(Counted())
        assert Counted.asked == 1


class TestForms:
    """The ways to write targets; a mistake in a call raises."""

    def test_text(self):
        """Commas and line ends separate, but not within attributes."""
        text = "a=m:f{x=b['k, v'], y=len(c)},\n pre process = p.q:C.D.m"
        assert targets_of(text) == [
            Target("a", "m:f", {"x": "b['k, v']", "y": "len(c)"}),
            Target("pre process", "p.q:C.D.m"),
        ]

    def test_file(self, tmp_path):
        """A TOML file has paths, tables or lists of them, and frameworks."""
        pytest.importorskip("tomllib", reason="from Python 3.11 on")
        file = tmp_path / "stages.toml"
        file.write_text(
            """
            frameworks = ["transformers"]
            [stages]
            pre = "app:pre{n=len(x)}"
            infer = ["app:a", { path = "app:M.f", attributes = { n = "len(x)" }, subclasses = true, optional = true }]
            """
        )
        targets, frameworks = read_file(file)
        assert frameworks == ["transformers"]
        assert targets == [
            Target("pre", "app:pre", {"n": "len(x)"}),
            Target("infer", "app:a"),
            Target("infer", "app:M.f", {"n": "len(x)"}, subclasses=True, optional=True),
        ]

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ({"stages": "app:f"}, "Invalid stage 'app:f': expected `stage=package.module:function`"),
            ({"stages": "a=app.f"}, "Invalid stage 'a=app.f': expected `stage=package.module:function`"),
            ({"stages": "a=app:f{n}"}, "Invalid attribute 'n': expected `name=expression`"),
            (
                {"stages": "a=app:f{n=open(x)}"},
                r"Invalid expression 'open\(x\)', at 'open\(x\)': expected names of arguments",
            ),
            (
                {"frameworks": "transformer"},
                r"Unknown framework 'transformer': expected one of .* \(did you mean transformers\?\)",
            ),
        ],
    )
    def test_mistakes_in_calls_raise(self, arguments, said):
        """What was seen, what is allowed; whether recording is on or not."""
        with pytest.raises(ValueError, match=said):
            instrument(**arguments)

    def test_other_types_are_refused(self):
        """A list holds targets and nothing else."""
        with pytest.raises(TypeError, match="Expected a `Target`, got 'a=app:f'; write"):
            instrument(["a=app:f"])
        with pytest.raises(TypeError, match="`stages` is of type `int`: expected a text, a mapping or a list"):
            instrument(3)
        for frameworks in (3, None, [3]):
            with pytest.raises(TypeError, match=r"`frameworks` has a `.*`: expected names, as a text or a list"):
                instrument(frameworks=frameworks)

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            (("", "m:f"), ValueError),
            ((" ", "m:f"), ValueError),
            (("\u200b", "m:f"), ValueError),
            ((3, "m:f"), TypeError),
            (("a", None), TypeError),
            (("a", "m:f", ["n"]), TypeError),
            (("a", "m:f", {"n": 3}), TypeError),
            (("a", "m:f", {3: "n"}), TypeError),
        ],
    )
    def test_what_cannot_be_a_target(self, arguments, error):
        """Names are texts in which something can be seen."""
        with pytest.raises(error, match="expected"):
            Target(*arguments)

    @pytest.mark.parametrize("text", ["stage = 1", "stages = 1", "[stages]\na = 1", "[stages.a]\npath='m:f'\nname='x'"])
    def test_mistakes_in_files_raise(self, tmp_path, text):
        """A key that is not known, or a value of another type, is named."""
        pytest.importorskip("tomllib", reason="from Python 3.11 on")
        file = tmp_path / "stages.toml"
        file.write_text(text)
        with pytest.raises(ValueError, match="expected"):
            instrument(file=file)


class TestFrameworks:
    """Files of `integrations/`."""

    @pytest.fixture
    def framework(self, write, tmp_path, monkeypatch):
        """Return the names of a framework and of its file."""
        name = write(KINDS)
        file = f"{name}_file"
        (tmp_path / f"{file}.py").write_text(
            f'from gpuscope.instrument import Target\nMODULE = "{name}"\nlog = []\n'
            f'TARGETS = (Target("plain", "{name}:plain"), Target("gone", "{name}:gone", optional=True))\n'
            "def install():\n    log.append('installed')\n    return lambda: log.append('undone')\n"
        )
        monkeypatch.setattr("gpuscope.integrations.__path__", [str(tmp_path)])
        return name, file

    def test_file_is_imported_when_its_framework_is(self, bench, framework, caplog):
        """Naming a framework imports nothing; its import brings the file, whose targets are stages until undone."""
        name, file = framework
        instrument(frameworks=[file])
        full_name = f"gpuscope.integrations.{file}"
        assert full_name not in sys.modules
        importlib.import_module(name).plain([])
        log = sys.modules.pop(full_name).log
        assert log == ["installed"]
        uninstrument()
        assert log == ["installed", "undone"]
        assert len(bench.named("plain")) == 1
        assert caplog.messages == []

    @pytest.mark.parametrize(
        "first", ["from {0} import Late", "from {0}.late import Late", "import {0}.base", "import {0}"]
    )
    def test_file_is_imported_when_the_import_of_its_framework_is_over(
        self, bench, tmp_path, monkeypatch, caplog, first
    ):
        """A file may import what its framework, whose modules import each other, is in the middle of importing."""
        name = f"lazy_{len(first)}"
        (tmp_path / name).mkdir()
        for module, text in {
            "__init__": "def __getattr__(name):\n    if name != 'Late': raise AttributeError(name)\n"
            "    from importlib import import_module\n    return import_module(__name__ + '.late').Late\n",
            "base": "class Base:\n    def run(self): return 1\n",
            "late": "from .base import Base\nclass Late(Base): pass\nfrom .other import other\n",
            "other": "def other(): return 2\nfrom . import late\n",
        }.items():
            (tmp_path / name / f"{module}.py").write_text(text)
        (tmp_path / "files").mkdir()
        (tmp_path / "files" / f"{name}_file.py").write_text(
            f"from {name}.other import other\nfrom {name}.late import Late\nfrom gpuscope.instrument import Target\n"
            f'MODULE = "{name}.base"\nTARGETS = (Target("run", "{name}.base:Base.run"),)\n'
        )
        monkeypatch.setattr("gpuscope.integrations.__path__", [str(tmp_path / "files")])
        monkeypatch.syspath_prepend(str(tmp_path))
        instrument(frameworks=f"{name}_file")
        exec(first.format(name), {})
        importlib.import_module(f"{name}.late").Late().run()
        sys.modules.pop(f"gpuscope.integrations.{name}_file")
        assert len(bench.named("run")) == 1
        assert type(sys.modules[f"{name}.base"].__spec__) is ModuleSpec
        assert caplog.messages == []

    def test_what_the_user_names_comes_first(self, bench, framework, caplog):
        """A function of a framework to which the user gave a name has that name."""
        name, file = framework
        instrument(f"mine={name}:plain", frameworks=file)
        importlib.import_module(name).plain([])
        assert [span.name for span in host_spans(bench)] == ["mine"]
        sys.modules.pop(f"gpuscope.integrations.{file}")
        assert caplog.messages == []

    def test_a_file_that_fails(self, bench, framework, tmp_path, caplog):
        """The framework is imported all the same, and a warning names it."""
        name, file = framework
        (tmp_path / f"{file}.py").write_text(f'MODULE = "{name}"\n1 / 0\n')
        instrument(frameworks="all")
        assert importlib.import_module(name).plain([]) == 0
        [said] = [text for text in caplog.messages if text.startswith(f"{file} is not instrumented.\n")]
        assert said.endswith("ZeroDivisionError: division by zero\n")


class TestWhileImporting:
    """Modules that are half imported when they are named."""

    def test_a_module_that_instruments_itself_first(self, bench, load, caplog):
        """What a module defines after the call is a stage as soon as its import is over."""
        module = load(
            """
            from gpuscope.instrument import instrument
            instrument(f"late={__name__}:late")
            def late():
                return 1
            """
        )
        assert module.late() == 1
        assert len(bench.named("late")) == 1
        assert caplog.messages == []


class TestEnvironment:
    """The variables, in programs of their own."""

    def test_stages_by_variable(self, run_python, tmp_path):
        """`GPUSCOPE_STAGES` is enough where gpuscope is imported; a mistake costs that part and warns once."""
        (tmp_path / "app.py").write_text(KINDS)
        program = "import app, gpuscope\napp.plain([1])\ngpuscope.flush()\nprint(gpuscope.statistics().recorded)\n"
        done = run_python(
            program,
            GPUSCOPE="1",
            GPUSCOPE_EXPORTER="none",
            GPUSCOPE_STAGES="hunter2, a=app:plain, b=app:cachd, c=ap:gone, d=app:plain{n=hunter2(x)}",
            GPUSCOPE_FRAMEWORKS="hunter2",
            GPUSCOPE_STAGES_FILE="missing.toml",
        )
        assert done.stdout == "1\n"
        assert done.returncode == 0
        said = [line.removeprefix("gpuscope: ") for line in done.stderr.splitlines()]
        assert "ignoring GPUSCOPE_STAGES_FILE: [Errno 2] No such file or directory: 'missing.toml'" in said
        assert any(line.startswith("ignoring number 1 of GPUSCOPE_FRAMEWORKS: expected one of ") for line in said)
        assert any(
            line.startswith("ignoring number 1 of GPUSCOPE_STAGES: expected `stage=package.module:function`")
            for line in said
        )
        assert any(
            line.startswith("ignoring number 5 of GPUSCOPE_STAGES: expected names of arguments") for line in said
        )
        assert "hunter2" not in done.stderr
        assert "app:cachd does not exist: `app` has no `cachd`; did you mean `cached`?" in said
        assert len(said) == 6

    def test_a_module_that_is_never_imported(self, run_python, tmp_path):
        """A module that never came is said at exit, with the one that was meant if there is one."""
        (tmp_path / "application.py").write_text(KINDS)
        program = "import application, gpuscope\n"
        done = run_python(program, GPUSCOPE="idle", GPUSCOPE_STAGES="a=applicatio_n:plain, b=not_needed_here:f")
        assert done.stderr.splitlines() == [
            "gpuscope: applicatio_n was never imported; did you mean `application`?",
            "gpuscope: not_needed_here was never imported, so `not_needed_here:f` is not a stage.",
        ]

    @pytest.mark.parametrize(("names", "said"), [("transformers", 1), ("all", 0)])
    def test_a_framework_that_is_never_imported(self, run_python, names, said):
        """One that was named is said at exit; of all, nobody expects each."""
        done = run_python("import gpuscope\n", GPUSCOPE="idle", GPUSCOPE_FRAMEWORKS=names)
        end = "was never imported, so nothing of the framework transformers is a stage."
        assert done.stderr.splitlines() == [f"gpuscope: transformers.modeling_utils {end}"] * said

    def test_a_script_that_instruments_itself(self, run_python):
        """`__main__` is the program: found below the definition, and a warning above it."""
        program = """
            import gpuscope
            from gpuscope.instrument import instrument
            instrument("late=__main__:late")
            def early(): return 1
            instrument("early=__main__:early, alias=program:aliased, typo=__main__:earlyy")
            def late(): return 2
            early(), late()
            gpuscope.flush()
            print(gpuscope.statistics().recorded)
            """
        done = run_python(textwrap.dedent(program), GPUSCOPE="1", GPUSCOPE_EXPORTER="none")
        assert done.stdout == "1\n"
        first, second = done.stderr.splitlines()
        assert "__main__:late does not exist" in first
        assert "Call `instrument` below its definition, or start with `gpuscope run`" in first
        assert "__main__:earlyy does not exist: `__main__` has no `earlyy`; did you mean `early`?" in second

    @pytest.mark.parametrize(
        ("mode", "unwanted"), [("0", {"wrapt", "gpuscope.instrument"}), ("1", {"gpuscope.instrument"})]
    )
    def test_what_is_not_asked_for_costs_nothing(self, run_python, mode, unwanted):
        """With gpuscope off wrapt is not imported, and the parser only where a stage is named."""
        program = f"import sys, gpuscope\nprint(not {unwanted}.isdisjoint(sys.modules))\n"
        stages = {"GPUSCOPE_STAGES": "a=app:f"} if mode == "0" else {}
        assert run_python(program, GPUSCOPE=mode, GPUSCOPE_EXPORTER="none", **stages).stdout == "False\n"
