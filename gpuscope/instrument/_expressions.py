"""
Attributes from arguments: expressions over a call's arguments, made into functions that read them.

Names of arguments, attributes, items by a constant, `len(...)` and constants; parsed by `ast`, and nothing is evaluated
as code. What comes out never refers to the GPU, and nothing here waits for it.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import numbers
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import inspect
    from collections.abc import Callable

    Arguments = tuple[Any, ...]
    Reader = Callable[[Arguments, dict[str, Any]], Any]

FORM = "names of arguments, attributes, items by a constant, `len(...)` and constants, as in `len(batch['ids'])`"
MAX_ITEMS = 64
"""Of a list or tuple; a longer one is no attribute of a span."""
_AS_TEXT = ("torch.dtype", "torch.device")


def check(text: str) -> None:
    """
    Raise where a text is no expression.

    Raises:
        ValueError: with what was seen and what is allowed.

    """
    reader(text, None)


def reader(text: str, signature: inspect.Signature | None) -> Reader:
    """
    Return a function of a call's `args` and `kwargs` that gives the expression's value, or raises what reading raises.

    Args:
        text: the expression.
        signature: of the function that is called; None to check the form alone.

    Raises:
        ValueError: for what is no expression, or a name that is no parameter.

    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise ValueError(f"{text!r} is no expression of {FORM}.") from None
    return _build(tree, text, signature)


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
    raise ValueError(f"{text!r} has {ast.unparse(node)!r} in it: an attribute is made of {FORM}.")


def _constant(node: ast.expr, text: str) -> Any:
    with contextlib.suppress(ValueError):
        key = ast.literal_eval(node)
        if isinstance(key, str | int):
            return key
    raise ValueError(f"{text!r} has the index {ast.unparse(node)!r}: expected a whole number or a text.")


def _argument(name: str, signature: inspect.Signature | None) -> Reader:
    """Return what finds one argument, by position or by name, its default included."""
    parameters = {} if signature is None else signature.parameters
    if name in parameters:
        return _parameter(parameters[name], list(parameters).index(name), frozenset(parameters))
    if signature is None or any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return lambda _args, kwargs: kwargs[name]
    close = difflib.get_close_matches(name, parameters, 1)
    hint = f"did you mean `{close[0]}`?" if close else f"there are {', '.join(map(repr, parameters)) or 'none'}."
    raise ValueError(f"it has no parameter {name!r}; {hint}")


def _parameter(parameter: inspect.Parameter, index: int, named: frozenset[str]) -> Reader:
    name, default = parameter.name, parameter.default
    if parameter.kind is parameter.VAR_POSITIONAL:
        return lambda args, _kwargs: args[index:]
    if parameter.kind is parameter.VAR_KEYWORD:
        return lambda _args, kwargs: {key: value for key, value in kwargs.items() if key not in named}
    if parameter.kind is parameter.KEYWORD_ONLY:
        return lambda _args, kwargs: kwargs.get(name, default)
    return lambda args, kwargs: args[index] if index < len(args) else kwargs.get(name, default)


def plain(value: Any) -> Any:
    """
    Return a value as one that a span may carry without asking the GPU for anything.

    Text, numbers and booleans stay; a list or tuple of them becomes a tuple; a tensor or an array becomes its shape; a
    `torch.dtype` or `torch.device` its name. None stays None, which is no attribute.

    Raises:
        TypeError: for anything else.

    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, tuple | list) and len(value) <= MAX_ITEMS:
        return tuple(map(_number_or_text, value))
    if f"{type(value).__module__}.{type(value).__qualname__}" in _AS_TEXT:
        return str(value)
    if hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, numbers.Number):
        return tuple(map(_number_or_text, value.shape))
    return _number_or_text(value)


def _number_or_text(value: Any) -> Any:
    if isinstance(value, str | bool | int | float):
        return value
    # numpy's scalars say that they are such, and live on the host; a tensor is none, whatever its shape.
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"a `{type(value).__name__}` is no attribute: expected text, numbers, few of them, or a tensor")
