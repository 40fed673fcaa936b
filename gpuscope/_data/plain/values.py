"""
Values of the program as plain data: what an attribute is at the moment when it is set, and what OTLP can carry of it.

`snapshot` never runs code of the program, keeps none of its objects, never waits for a GPU, and does bounded work.
Built-in containers are read by their own methods, also where a subclass replaces those; whatever else is not
plain is described. The hot path comes here with what is not plain, so nothing is imported that a program may not have.
"""

from __future__ import annotations

import sys
from collections import deque
from itertools import islice
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeAlias

from gpuscope._data.plain.descriptions import (
    MAX_TEXT,
    MISSING,
    SCALARS,
    Value,
    attribute,
    dataclass_fields,
    defined,
    described,
    digits,
    full_name_of,
    name_of,
    own_attributes,
    tensor,
)
from gpuscope._interrupts import instead_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Clean: TypeAlias = "bool | int | float | str | bytes | list[Clean] | dict[str, Clean] | None"
"""What a snapshot is made of: these types exactly. In what OTLP can carry, an `int` has 64 bits."""
PLAIN = frozenset((str, int, float, bool, bytes, NoneType))
"""Types whose values never change and refer to nothing."""
_PLAIN = frozenset(map(id, PLAIN))  # To compare types by identity alone: a metaclass may replace `==` and `hash`.
UNPRINTABLE = "<unprintable>"
_INT64 = range(-(2**63), 2**63)
_ITEMS = 1024
"""Items that one value may have, all levels together, which bounds the time and ends cycles."""
_DEPTH = 16
_WITH_FIELDS = (OSError, ImportError, SyntaxError)  # Their `__str__` shows more than their arguments.
_GROUP = getattr(sys.modules["builtins"], "BaseExceptionGroup", None)  # Its `__str__` shows a `str` and a number.
_args_of: Callable[[BaseException], tuple[Value, ...]] = BaseException.__dict__["args"].__get__
_BRACKETS: dict[Any, tuple[str, str]] = {
    list: ("[", "]"),
    tuple: ("(", ")"),
    set: ("{", "}"),
    frozenset: ("{", "}"),
    dict: ("{", "}"),
}


def snapshot(value: Value) -> Any:
    """
    Return the value as `Clean` is, but for the size of its numbers; no later change of it shows in the result.

    The signature does not say so, because type checkers can't follow the comparison of types, which is the fastest.
    """
    if id(type(value)) in _PLAIN:
        return value
    try:
        return _take(value, [_ITEMS], _DEPTH)
    except Exception as error:  # A dict that another thread changes, a buffer that was released.
        return instead_of(error, UNPRINTABLE)


def snapshot_mapping(values: Value) -> dict[str, Any]:
    """
    Return a snapshot of attributes, with text for keys; an empty dict if nothing can be listed.

    Only here are mappings read that are not `dict`s, because they were given as attributes.
    """
    try:
        items = dict.items(values) if issubclass(type(values), dict) else values.items()
        return {as_key(key): snapshot(value) for key, value in list(islice(items, _ITEMS))}
    except Exception as error:  # A mapping of the application's own making may raise anything.
        return instead_of(error, {})


def clean(value: Value) -> Any:
    """Return a snapshot of the value with what OTLP can carry: numbers of 64 bits, and text that is Unicode."""
    kind = type(value)
    if value is None or kind is bool or kind is float:
        return value
    if kind is str and value.isascii():
        return value
    if kind is int and value in _INT64:
        return value
    return _fit(snapshot(value))


def clean_mapping(values: Value) -> dict[str, Any]:
    """Return a dict with text keys, whatever the keys are, and clean values; an empty one if nothing can be listed."""
    return {_text(key): clean(value) for key, value in snapshot_mapping(values).items()}


def as_text(value: Value) -> str:
    """Return a name or a key, which should be text but may be anything, as text that OTLP can carry."""
    if type(value) is str and value.isascii():
        return value
    return _text(as_key(value))


def as_key(key: Value) -> str:
    """Return a name, which should be text but may be anything, as text."""
    if type(key) is str:
        return key
    plain = snapshot(key)
    return digits(plain) if type(plain) is int else str(plain)


def _fit(value: Any) -> Any:  # A `Clean` before and after.
    kind = type(value)
    if kind is str:
        return _text(value)
    if kind is int:
        return value if value in _INT64 else digits(value)
    if kind is list:
        return [_fit(item) for item in value]
    return {_text(key): _fit(item) for key, item in value.items()} if kind is dict else value


def _text(value: str) -> str:
    # Lone surrogates are not Unicode text; protobuf would refuse the whole message.
    return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")


def _take(value: Value, budget: list[int], depth: int) -> Any:
    budget[0] -= 1
    if budget[0] < 0 or depth < 0:
        return "…"
    kind = type(value)
    if id(kind) in _PLAIN:
        return value
    if kind is list or kind is tuple or kind is dict:
        return _take_container(value, kind, budget, depth - 1)
    # Not `isinstance`, which asks the object for its `__class__` where its type does not fit.
    for base, take in SCALARS.items():
        if issubclass(kind, base):
            return take(value)
    for base in (dict, list, tuple, set, frozenset, deque):
        if issubclass(kind, base):
            return _take_container(value, base, budget, depth - 1)
    return _take_numpy(value, kind, budget, depth - 1)


def _take_container(value: Value, base: Any, budget: list[int], depth: int) -> Any:
    size = base.__len__(value)
    if size > _ITEMS:
        return f"<{name_of(type(value))} of {size} items>"
    if base is dict:
        return {as_key(key): _take(item, budget, depth) for key, item in list(dict.items(value))}
    items = list(base.__iter__(value))
    if size <= budget[0] and _PLAIN.issuperset(map(id, map(type, items))):
        budget[0] -= size
        return items
    return [_take(item, budget, depth) for item in items]


def _take_numpy(value: Value, kind: type, budget: list[int], depth: int) -> Any:
    """Take an array or a scalar of numpy; there can be one only if somebody has imported that."""
    numpy = sys.modules.get("numpy")
    array, scalar = getattr(numpy, "ndarray", None), getattr(numpy, "generic", None)
    if array is not None and issubclass(kind, array):
        size, shape, dtype = (getattr(array, name).__get__(value) for name in ("size", "shape", "dtype"))
        if size > _ITEMS:
            return f"<{name_of(kind)} shape={shape} dtype={dtype}>"[:MAX_TEXT]
        return _take(array.tolist(value), budget, depth)
    if scalar is not None and issubclass(kind, scalar):
        plain = scalar.item(value)
        return _take(plain, budget, depth) if type(plain) is not kind else described(value)
    return _take_object(value, kind, budget, depth)


def _take_object(value: Value, kind: type, budget: list[int], depth: int) -> Any:
    if issubclass(kind, BaseException):
        return message_of(value)
    text = tensor(value)  # Before the fields, because a dataclass may be a tensor as well.
    fields = None if text else dataclass_fields(value)
    if fields is None:
        return text or described(value)
    return {name: _take(item, budget, depth) for name, item in fields.items()}


def shown(value: Value) -> str:
    """Return what `repr` shows of a value that is plain; what is not is described. For messages and the log."""
    try:
        return _show(value, [_ITEMS], _DEPTH)[:MAX_TEXT]
    except Exception as failure:  # As in `snapshot`.
        return instead_of(failure, UNPRINTABLE)


def message_of(error: BaseException) -> str:
    """Return what `str` shows of an exception, as far as its arguments are plain; what is not is described."""
    try:
        args = _args_of(error)
        if len(args) == 1 and type(args[0]) is str and defined(type(error), "__str__")[1] is BaseException:
            return args[0][:MAX_TEXT]  # The most frequent by far.
        return _message(error, [_ITEMS], _DEPTH)[:MAX_TEXT]
    except Exception as failure:  # As in `snapshot`.
        return instead_of(failure, UNPRINTABLE)


def _show(value: Value, budget: list[int], depth: int) -> str:
    kind = type(value)
    budget[0] -= 1
    if budget[0] < 0 or depth < 0:
        return "…"
    if id(kind) in _PLAIN:
        return digits(value) if kind is int else repr(value[:MAX_TEXT] if kind is str or kind is bytes else value)
    if issubclass(kind, BaseException):
        return f"{name_of(kind)}({', '.join(_show(item, budget, depth - 1) for item in _args_of(value))})"
    for base in _BRACKETS:
        if issubclass(kind, base) and base.__len__(value) <= _ITEMS:
            return _show_container(value, base, budget, depth - 1)
    plain = _take(value, budget, depth - 1)
    # A text is a description, unless the value was a text already.
    return plain if type(plain) is str and not issubclass(kind, str) else _show(plain, budget, depth - 1)


def _show_container(value: Value, base: Any, budget: list[int], depth: int) -> str:
    if base is dict:
        pairs = list(dict.items(value))
        items = [f"{_show(key, budget, depth)}: {_show(item, budget, depth)}" for key, item in pairs]
    else:
        items = [_show(item, budget, depth) for item in list(base.__iter__(value))]
    opening, closing = _BRACKETS[base]
    return f"{opening}{', '.join(items)}{',' * (base is tuple and len(items) == 1)}{closing}"


def _message(error: BaseException, budget: list[int], depth: int) -> str:
    args = _args_of(error)
    method, base = defined(type(error), "__str__")
    if full_name_of(base) == name_of(base) and (base is _GROUP or all(map(_is_short, _read_by_str(error, args)))):
        return str(method.__get__(error)())  # Built in, so it prints nothing but what was looked at.
    if not args:
        own = snapshot_mapping(own_attributes(error))
        return ", ".join(f"{name}={_show(item, budget, depth - 1)}" for name, item in islice(own.items(), _DEPTH))
    if len(args) > 1:
        return f"({', '.join(_show(item, budget, depth - 1) for item in args)})"
    (only,) = args
    if issubclass(type(only), str):
        return str.__str__(only)
    return (
        _message(only, budget, depth - 1) if issubclass(type(only), BaseException) else _show(only, budget, depth - 1)
    )


def _read_by_str(error: BaseException, args: tuple[Value, ...]) -> Iterator[Value]:
    """Iterate over what the `__str__` of a built-in exception may look at."""
    for item in args:
        yield from item if type(item) is tuple else (item,)  # `SyntaxError` has a tuple among them.
    if issubclass(type(error), _WITH_FIELDS):
        yield from (attribute(error, name) for name in ("filename", "filename2", "lineno", "msg"))


def _is_short(value: Value) -> bool:
    kind = type(value)
    if kind is int:
        return value in _INT64
    return value is MISSING or (id(kind) in _PLAIN and (kind not in (str, bytes) or len(value) <= MAX_TEXT))
