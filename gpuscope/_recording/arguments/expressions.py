"""
Attributes from arguments: expressions over a call's arguments, made into functions that read them.

An expression has names of arguments, attributes, items by a constant, `len(...)` and constants. `ast` parses it, and
nothing is evaluated as code. No value refers to the GPU, and nothing here waits for it.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import reprlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from gpuscope._data.plain.descriptions import described, full_name_of, name_of, shape_of
from gpuscope._data.plain.values import PLAIN, snapshot

if TYPE_CHECKING:
    import inspect

Value: TypeAlias = Any
"""What a call was given. `Any`, because its attributes and items are looked up by name at run time."""
Reader: TypeAlias = Callable[[tuple[Value, ...], dict[str, Value]], Value]
"""Takes a call's `args` and `kwargs`, and returns what an expression says of them."""
Plain: TypeAlias = "str | bool | int | float"

FORM = "names of arguments, attributes, items by a constant, `len(...)` and constants, as in `len(batch['ids'])`"
MAX_DEPTH = 32
"""Levels of an expression: each is a call, while the program's own call waits."""
_TOO_DEEP = f"Invalid expression {{}}: it is nested more than {MAX_DEPTH} deep; name something nearer to the argument."
MAX_ITEMS = 64
"""Items of the longest list or tuple that becomes an attribute."""
_NUMBERS = (bool, int, float)
_AS_TEXT = ("torch.dtype", "torch.device")


def check(text: str) -> None:
    """
    Raise if a text is not an expression.

    Raises:
        ValueError: with what was seen and what is allowed.

    """
    reader(text, None)


def reader(text: str, signature: inspect.Signature | None) -> Reader:
    """
    Return a function of a call's `args` and `kwargs` that returns the expression's value, and raises what reading does.

    Args:
        text: the expression.
        signature: of the function that is called; None to check the form alone.

    Raises:
        ValueError: if the text is not an expression, or if it has a name that is not a parameter.

    """
    return _build(_parse(text), text, signature)


def _parse(text: str) -> ast.expr:
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (RecursionError, MemoryError):  # CPython's way of saying that a text is nested too deep for its parser.
        raise ValueError(_TOO_DEEP.format(reprlib.repr(text))) from None
    except (SyntaxError, ValueError):
        raise ValueError(f"Invalid expression {reprlib.repr(text)}: expected {FORM}.") from None
    if _is_too_deep(tree):
        raise ValueError(_TOO_DEEP.format(reprlib.repr(text)))
    return tree


def _is_too_deep(tree: ast.AST) -> bool:
    """Tell whether what follows here, and reading a value later, would need more of the stack than is fair."""
    level: list[ast.AST] = [tree]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        if not level:
            return False
    return True


def _build(node: ast.expr, text: str, signature: inspect.Signature | None) -> Reader:
    if isinstance(node, ast.Name):
        return _argument(node.id, signature)
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float):
        value = node.value
        return lambda _args, _kwargs: value
    if isinstance(node, ast.Attribute):
        of, name = _build(node.value, text, signature), node.attr
        return lambda args, kwargs: getattr(of(args, kwargs), name)
    if isinstance(node, ast.Subscript):
        of, key = _build(node.value, text, signature), _constant(node.slice, text)
        return lambda args, kwargs: of(args, kwargs)[key]
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "len" and len(node.args) == 1 and not node.keywords:
        of = _build(node.args[0], text, signature)
        return lambda args, kwargs: len(of(args, kwargs))
    raise ValueError(f"Invalid expression {reprlib.repr(text)}, at {reprlib.repr(ast.unparse(node))}: expected {FORM}.")


def _constant(node: ast.expr, text: str) -> str | int:
    with contextlib.suppress(ValueError, TypeError):  # A `TypeError` for what cannot be made, such as `{[]}`.
        key = ast.literal_eval(node)
        if isinstance(key, str | int):
            return key
    raise ValueError(
        f"Invalid index {reprlib.repr(ast.unparse(node))} in {reprlib.repr(text)}: expected an integer or a string."
    )


def _argument(name: str, signature: inspect.Signature | None) -> Reader:
    """Return what finds one argument, by position or by name, or its default."""
    parameters = {} if signature is None else signature.parameters
    if name in parameters:
        return _parameter(parameters[name], list(parameters).index(name), frozenset(parameters))
    if signature is None or any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return lambda _args, kwargs: kwargs[name]
    close = difflib.get_close_matches(name, parameters, 1)
    hint = f"did you mean `{close[0]}`?" if close else f"expected {', '.join(map(repr, parameters)) or 'none'}."
    raise ValueError(f"the function has no parameter {name!r}; {hint}")


def _parameter(parameter: inspect.Parameter, index: int, named: frozenset[str]) -> Reader:
    name, default = parameter.name, parameter.default
    if parameter.kind is parameter.VAR_POSITIONAL:
        return lambda args, _kwargs: args[index:]
    if parameter.kind is parameter.VAR_KEYWORD:
        return lambda _args, kwargs: {key: value for key, value in kwargs.items() if key not in named}
    if parameter.kind is parameter.KEYWORD_ONLY:
        return lambda _args, kwargs: kwargs.get(name, default)
    return lambda args, kwargs: args[index] if index < len(args) else kwargs.get(name, default)


def plain(value: object) -> Plain | tuple[Plain, ...] | None:
    """
    Return a value in a form that a span may carry, without asking the GPU for anything.

    Text, numbers and booleans stay; a list or tuple of them becomes a tuple; a tensor or an array becomes its shape; a
    `torch.dtype` or `torch.device` becomes its name. None stays None, and makes no attribute.

    Raises:
        TypeError: for anything else.

    """
    kind = type(value)
    if kind is not bytes and any(kind is plain for plain in PLAIN):
        return value  # type: ignore[return-value]  # Its type has been looked at.
    for base in (tuple, list):
        if issubclass(kind, base) and base.__len__(value) <= MAX_ITEMS:  # type: ignore[arg-type]
            return tuple(map(_number_or_text, base.__iter__(value)))  # type: ignore[arg-type]
    if full_name_of(kind) in _AS_TEXT:
        return described(value)
    shape = None if type(snapshot(value)) in _NUMBERS else shape_of(value)
    return _number_or_text(value) if shape is None else tuple(map(_number_or_text, shape))


def _number_or_text(value: object) -> Plain:
    # Numpy's scalars live on the host, and are numbers. What is described by a text is not a text.
    plain = snapshot(value)
    if type(plain) in _NUMBERS or (type(plain) is str and issubclass(type(value), str)):
        return plain  # type: ignore[no-any-return]  # As above.
    raise TypeError(
        f"a `{name_of(type(value))}` cannot be an attribute; expected text, a number, up to {MAX_ITEMS} of them, or a "
        "tensor."
    )
