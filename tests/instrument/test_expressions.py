"""Attributes from arguments: what an expression reads, what it refuses, and which values come out."""

from __future__ import annotations

import enum
import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpuscope._recording.arguments.expressions import MAX_ITEMS, plain, reader

REFUSED = (
    "|print(images)|len()|len(images, k)|images.sort()|k + 1|-k|images[k]|images[0:1]|lambda: 0|[k]|f'{k}'|"
    "k if k else 0|(k := 1)|images[1.5]|None|b''|images len|\0"
)


class Size(enum.IntEnum):
    """A number that is more than a number."""

    SMALL = 3


class Untouchable:
    """Stands for a tensor on a GPU: to read it, to print it or to ask whether it is true would wait."""

    shape = (2, 3)
    dtype = "float16"

    def _never(self, *_):
        raise AssertionError("This would have waited for the GPU.")

    __bool__ = __str__ = __repr__ = __int__ = __float__ = __index__ = __eq__ = __len__ = item = tolist = _never
    __hash__ = None


def function(images, k=3, *more, key="default", **options):
    """Has an argument of every kind."""


def read(text, *args, **kwargs):
    """Read an expression of a call of `function`."""
    return reader(text, inspect.signature(function))(args, kwargs)


class TestReading:
    """Expressions over the arguments of a call."""

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("images", ["a", "bc"]),
            ("len(images)", 2),
            ("images[0]", "a"),
            ("images[-1]", "bc"),
            ("len(images[1])", 2),
            ("images.__class__.__name__", "list"),
            ("k", 4),
            ("more", (5, 6)),
            ("more[1]", 6),
            ("key", "given"),
            ("options", {"top_p": 0.5}),
            ("options['top_p']", 0.5),
            ("top_p", 0.5),
            ("'prefill'", "prefill"),
            (" 7 ", 7),
        ],
    )
    def test_reads_what_the_call_was_given(self, text, value):
        """Names, items, attributes, lengths and constants, for parameters of every kind."""
        assert read(text, ["a", "bc"], 4, 5, 6, key="given", top_p=0.5) == value

    def test_by_name_and_by_default(self):
        """An argument is found by its name too, and one that was not given has its default."""
        assert read("len(images)", images=[1]) == 1
        assert (read("k", []), read("key", []), read("more", [])) == (3, "default", ())

    @pytest.mark.parametrize("text", [*REFUSED.split("|"), "x[{[]: 1}]", "x[{[]}]"])
    def test_everything_else_is_refused(self, text):
        """What would call, compute or build is not an expression, and the message says what is."""
        with pytest.raises(ValueError, match=r"names of arguments|an integer or a string"):
            reader(text, None)

    @pytest.mark.parametrize("depth", [40, 400, 4000, 40_000])
    @pytest.mark.parametrize(("before", "after"), [("x", ".a"), ("len(", ")"), ("-", ""), ("(", ")"), ("x[", "]")])
    def test_what_is_nested_too_deep_is_refused_in_a_sentence(self, depth, before, after):
        """However deep a text is nested, and whatever the parser raises for that, it is a short `ValueError`."""
        text = before + after * depth if before == "x" else before * depth + "x" + after * depth
        if before == "(" and depth == 40:
            return  # Brackets that the parser takes away are no depth.
        with pytest.raises(
            ValueError, match=r"nested more than 32 deep|names of arguments|an integer or a string"
        ) as raised:
            reader(text, None)
        assert len(str(raised.value)) < 300

    def test_as_deep_as_people_write_is_read(self):
        """Twenty attributes in a row are an expression."""
        assert callable(reader("len(self" + ".a" * 20 + "[0])", None))

    def test_unknown_parameter_is_named_with_the_closest(self):
        """A typo in an argument's name is found when the function is, not when it is called."""
        with pytest.raises(ValueError, match="no parameter 'imagess'; did you mean `images`"):
            reader("len(imagess)", inspect.signature(lambda images: images))
        with pytest.raises(ValueError, match="no parameter 'batch'; expected 'self'"):
            reader("len(batch)", inspect.signature(lambda self: self))

    @given(st.text(alphabet="abk[]().,'0 +-len", max_size=12))
    def test_any_text_is_read_or_refused(self, text):
        """Whatever is written, there is a reader or a `ValueError`."""
        try:
            found = reader(text, None)
        except ValueError:
            return
        assert callable(found)


class TestValues:
    """What becomes of a value before it is an attribute."""

    @pytest.mark.parametrize(
        ("value", "attribute"),
        [
            ("text", "text"),
            (True, True),
            (2.5, 2.5),
            (Size.SMALL, 3),
            (None, None),
            ([1, "a"], (1, "a")),
            (torch.Size([2, 3]), (2, 3)),
            (torch.zeros(2, 3), (2, 3)),
            (torch.zeros(()), ()),
            (np.zeros((4, 1)), (4, 1)),
            (np.int64(5), 5),
            (np.float32(0.5), 0.5),
            (torch.float16, "torch.float16"),
            (torch.device("cpu"), "cpu"),
        ],
    )
    def test_becomes_plain(self, value, attribute):
        """Numbers and text stay, sequences are copied, arrays and tensors become their shapes."""
        assert plain(value) == attribute
        assert type(plain(value)) in (type(attribute), type(value))

    def test_a_sequence_has_as_many_items_as_may_be(self):
        """The longest that is allowed is taken whole."""
        assert plain(list(range(MAX_ITEMS))) == tuple(range(MAX_ITEMS))

    @pytest.mark.parametrize("value", [object(), {}, {1}, b"", [[1]], [torch.zeros(1)], list(range(MAX_ITEMS + 1))])
    def test_anything_else_is_refused(self, value):
        """What is not plain cannot be an attribute; nothing prints it to find out."""
        with pytest.raises(TypeError, match="cannot be an attribute; expected text"):
            plain(value)

    def test_a_tensor_is_never_read(self):
        """The shape is taken, and nothing that would wait for a GPU."""
        assert plain(Untouchable()) == (2, 3)
