"""Values of the program: taken when they are set, in bounded time, and without running its code."""

from __future__ import annotations

import collections
import contextlib
import datetime as dt
import decimal
import gc
import pathlib
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace

import numpy as np
import pytest
import wrapt
from hypothesis import given
from hypothesis import strategies as st

from gpuscope import stage
from gpuscope._data.plain.descriptions import name_of
from gpuscope._data.plain.exceptions import exception_info
from gpuscope._data.plain.values import clean, message_of, shown, snapshot, snapshot_mapping


def untouchable(*bases, **names):
    """Return a class whose objects raise if anybody runs their code; no `Exception`, so that nobody hides it."""

    class Touched(BaseException):
        pass

    def touch(*args, **kwargs):
        raise Touched

    methods = (
        "__repr__ __str__ __format__ __len__ __iter__ __getitem__ __contains__ __bool__ __eq__ __int__ __float__ "
        "__index__ __bytes__ __getattr__ __getattribute__ __dir__ __reduce__ __array__ __fspath__ keys items values "
        "tolist item"
    )
    body = dict.fromkeys(methods.split(), touch) | {"__class__": property(touch), "__hash__": object.__hash__}
    return type("Mine", bases, body | names)


class Tensor(untouchable()):
    """Something like a tensor on a GPU: to print it, or to ask for its length, would be to wait for it."""

    shape, dtype, device = (2, 3), "float16", "cuda:0"


TENSOR = "<Tensor shape=(2, 3) dtype=float16 device=cuda:0>"
Mine = untouchable()


@dataclass(repr=False)
class Holder:
    """A dataclass with a tensor in it."""

    held: object


class Slotted:
    """An object whose shape lies in slots, and whose device was never set."""

    __slots__ = ("device", "dtype", "shape")


def slotted():
    """Return one that looks like a tensor."""
    value = Slotted()
    value.shape, value.dtype = [4], np.float16
    return value


class Meta(type):
    """A metaclass that replaces what a type says of itself."""

    def __getattribute__(cls, name):
        raise AssertionError(name)


class Odd(metaclass=Meta):
    """A class of it."""


class Unhashable(type):
    """A metaclass whose classes are compared by code of its own, and so not hashable."""

    __hash__ = None

    def __eq__(cls, other):
        raise AssertionError("compared")


class Unequal(metaclass=Unhashable):
    """A class of it."""


class UnequalError(Exception, metaclass=Unhashable):
    """An exception of it."""


class Colour(Enum):
    """A choice, which prints itself in a way of its own."""

    RED = 1

    def __str__(self):
        raise AssertionError("printed")


def array_of(*items):
    """Return an array of objects."""
    array = np.empty(len(items), object)
    for index, item in enumerate(items):
        array[index] = item
    return array


class Ring(Sequence):
    """A sequence without an end."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return index


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        (Mine(), "<Mine>"),
        (Tensor(), TENSOR),
        ([Tensor(), {"t": (Tensor(), 1)}], [TENSOR, {"t": [TENSOR, 1]}]),
        ({Tensor(): 1}, {TENSOR: 1}),
        (Holder(Mine()), {"held": "<Mine>"}),
        (slotted(), "<Slotted shape=(4,) dtype=float16>"),
        (
            SimpleNamespace(shape=(1, Mine()), dtype=Mine(), device=3),
            "<SimpleNamespace shape=(1, ?) dtype=<Mine> device=3>",
        ),
        (untouchable(list)([1]), [1]),
        (untouchable(tuple)([1]), [1]),
        (untouchable(dict)(a=1), {"a": 1}),
        (untouchable(set)([1]), [1]),
        (untouchable(str)("text"), "text"),
        (untouchable(int)(3), 3),
        (untouchable(float)(0.5), 0.5),
        (untouchable(bytes)(b"b"), b"b"),
        (untouchable(bytearray)(b"b"), b"b"),
        (collections.deque([1, 2]), [1, 2]),
        (array_of(1, Mine()), [1, "<Mine>"]),
        (np.array([1, 2]).view(type("Sub", (np.ndarray,), {"tolist": None})), [1, 2]),
        (Ring(), "<Ring>"),
        (Odd(), "<Odd>"),
        (Unequal(), "<Unequal>"),
        ([1, Unequal(), {"a": Unequal()}], [1, "<Unequal>", {"a": "<Unequal>"}]),
        (array_of(Unequal()), ["<Unequal>"]),
        (ValueError("bad", Unequal()), "('bad', <Unequal>)"),
        (UnequalError(Unequal()), "<Unequal>"),
        (wrapt.LazyObjectProxy(Mine.__repr__), "<LazyObjectProxy>"),
        (Odd, "<class 'tests.data.test_values.Odd'>"),
        (Colour.RED, "Colour.RED"),
        (pathlib.PurePosixPath("/a"), "/a"),
        (decimal.Decimal("1.5"), "1.5"),
        (dt.date(2020, 1, 2), "2020-01-02"),
        (ValueError("bad", Tensor()), f"('bad', {TENSOR})"),
        (10**5000, 10**5000),
    ],
    ids=lambda value: name_of(type(value)),
)
def test_a_value_is_taken_without_running_its_code(value, taken):
    """Each value becomes plain by the methods of built-in types alone, or is described by what is stored in it."""
    assert snapshot(value) == taken
    assert type(snapshot(value)) is type(taken)


def test_a_slot_that_was_never_set_is_left_out():
    """An object that is half made is described by its type."""
    assert snapshot(Slotted()) == "<Slotted>"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner),
)


@given(VALUES)
def test_a_snapshot_is_its_own_snapshot(value):
    """What was taken is plain, so that it can be taken once more at no loss."""
    once = snapshot(value)
    assert snapshot(once) == once


@given(VALUES)
def test_a_plain_value_is_shown_as_python_shows_it(value):
    """Messages show what `repr` does wherever that runs nobody's code."""
    if len(repr(value)) < 1000 and "inf" not in repr(value):
        assert shown(value) == repr(value)


def test_work_is_bounded():
    """Neither a long value nor a deep one, nor one that holds itself, takes long."""
    assert snapshot([0] * 5000) == "<list of 5000 items>"
    assert snapshot(bytearray(1 << 21)) == f"<bytearray of {1 << 21} bytes>"
    assert snapshot(memoryview(bytes(1 << 21))) == f"<memoryview of {1 << 21} bytes>"
    assert clean(1 << (1 << 20)) == f"<int of {(1 << 20) + 1} bits>"
    doubling = []
    for _ in range(60):
        doubling = [doubling, doubling]
    assert len(str(snapshot(doubling))) < 20_000
    assert len(shown(doubling)) < 20_000


class Endless(Mapping):
    """A mapping without an end."""

    def __len__(self):
        return 1

    def __iter__(self):
        return iter(range(sys.maxsize))

    def __getitem__(self, key):
        return key


def test_attributes_are_a_mapping_of_any_kind():
    """Attributes that are given as a mapping are listed, up to a bound; where that fails there are none."""
    assert len(snapshot_mapping(Endless())) == 1024
    assert snapshot_mapping(collections.UserDict(a=[1])) == {"a": [1]}
    assert snapshot_mapping(3) == {}


@pytest.mark.parametrize("form", ["set_attribute", "block", "decorated"])
def test_later_changes_do_not_show(bench, form):
    """An attribute is what it was when it was set: buffers are used again while the stage waits to be exported."""
    shape, seen, array = [1, 3], {"n": [1]}, np.array([1, 2])
    given = {"shape": shape, "seen": seen, "array": array}
    decorated = stage("decorated", attributes=given)(lambda: None)
    if form == "decorated":
        decorated()
    with stage("block", attributes=given), stage("set_attribute") as inner:
        for key, value in given.items():
            inner.set_attribute(key, value)
        shape.append(9)
    seen["n"].append(2)
    array[:] = 7
    (span,) = bench.named(form)
    assert {key: span.attributes[key] for key in given} == {"shape": [1, 3], "seen": {"n": [1]}, "array": [1, 2]}


class Memory:
    """Stands for what a tensor holds."""

    shape, dtype = (1,), "float16"


def test_nothing_is_kept_of_an_object(bench):
    """What was given as an attribute, or left a stage in an exception, is let go at once."""

    def run(memory):
        with stage("kept", attributes={"a": memory}) as kept:
            kept.set_attribute("b", [memory])
            raise ValueError("bad", memory)

    memory = Memory()
    gone = weakref.ref(memory)
    with pytest.raises(ValueError, match="bad"):
        run(memory)
    del memory
    gc.collect()
    assert gone() is None
    (span,) = bench.named("kept")
    assert span.attributes["b"] == ["<Memory shape=(1,) dtype=float16>"]


def test_keys_of_any_kind_reach_nobody(bench):
    """A key that is not text, not even hashable, neither raises in the program nor costs the stage."""
    with stage("s") as s:
        s.set_attribute(["a"], 1)
        s.set_attribute(None, 2)
    (span,) = bench.named("s")
    assert (span.attributes["['a']"], span.attributes["None"]) == (1, 2)


class OwnText(Exception):
    """An exception with a text of its own making."""

    def __str__(self):
        raise AssertionError("printed")


class Keywords(OwnText):
    """One that keeps what it was given by keyword."""

    def __init__(self, **given):
        self.__dict__.update(given)


def leaves(error):
    """Return what Python says of an exception that was raised."""
    with contextlib.suppress(BaseException):
        raise error
    return error


PLAIN_ERRORS = [
    ValueError(),
    ValueError("bad"),
    ValueError("bad", 3, None),
    ValueError(["a", {"b": (1,)}]),
    KeyError("key"),
    FileNotFoundError(2, "No such file or directory", "x.txt"),
    OSError("odd"),
    ImportError("no module", name="m"),
    SyntaxError("invalid syntax", ("f.py", 3, 1, "x = = 1", 3, 1)),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    StopIteration(3),
    SystemExit(1),
    RuntimeError(ValueError("inner")),
]


@pytest.mark.parametrize("error", PLAIN_ERRORS, ids=lambda error: name_of(type(error)))
def test_a_plain_message_is_what_python_says(error):
    """Where all arguments are plain, an exception's message is what `str` makes of it."""
    assert message_of(leaves(error)) == str(error)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no groups")
def test_a_group_counts_its_exceptions():
    """The message of a group is Python's, and does not print what is in it."""
    group = sys.modules["builtins"].ExceptionGroup("several", [ValueError(Mine()), ValueError(2)])
    assert message_of(group) == "several (2 sub-exceptions)"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("bad", Tensor()), f"('bad', {TENSOR})"),
        (AssertionError(Tensor()), TENSOR),
        (KeyError(Tensor()), TENSOR),
        (ValueError([Tensor(), {"logits": Tensor()}]), f"[{TENSOR}, {{'logits': {TENSOR}}}]"),
        (RuntimeError(ValueError("inner", Mine())), "('inner', <Mine>)"),
        (OSError(2, "no", Mine()), "(2, 'no')"),
        (OwnText("text", 3), "('text', 3)"),
        (Keywords(status=404, seen=Mine()), "status=404, seen='<Mine>'"),
        (untouchable(ValueError)("bad"), "bad"),
        (ValueError("x" * 10_000), "x" * 4096),
    ],
    ids=lambda value: name_of(type(value)),
)
def test_a_message_is_made_of_plain_arguments(error, message):
    """Whatever is not plain in an exception is described, and never printed."""
    assert message_of(error) == message
    assert exception_info(leaves(error)).message == message


def test_whatever_is_called_an_exception_is_none(bench):
    """`__exit__` may be called by hand, with anything."""
    block = stage("by hand")
    block.__enter__()
    block.__exit__(None, Mine(), None)
    (span,) = bench.named("by hand")
    assert span.status == "ERROR"


def test_misuse_is_told_without_printing():
    """The errors at set-up describe what was given."""
    with pytest.raises(TypeError, match="not <OwnText>"):
        stage("s", warmup=type("OwnText", (), {"__repr__": OwnText.__str__})())


def test_tensors_of_subclasses_are_described():
    """A subclass of PyTorch's tensor is asked nothing that would run its `__torch_function__`."""
    torch = pytest.importorskip("torch")

    class Mine(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *args, **kwargs):
            raise AssertionError("ran")

        shape = property(lambda self: pytest.fail("ran"))

    value = torch.zeros(2, 3, dtype=torch.float16).as_subclass(Mine)
    assert snapshot([value, torch.ones(2)]) == [
        "<Mine shape=(2, 3) dtype=torch.float16 device=cpu>",
        "<Tensor shape=(2,) dtype=torch.float32 device=cpu>",
    ]
    assert snapshot([torch.float16, torch.device("cpu"), torch.Size([1])]) == ["torch.float16", "cpu", [1]]
