"""
The kinds of function (plain, coroutine, generator, async generator), and what a wrapper takes over from its function.

Decides nothing about what a wrapper does. `import gpuscope` does not import this, because `inspect` is slow to import.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import sys
from types import FunctionType, GetSetDescriptorType, MethodType, coroutine
from typing import TYPE_CHECKING, Any, TypeVar, cast
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CellType
    from typing import SupportsIndex

    from gpuscope._data.interfaces import Stream
    from gpuscope._data.record import Site

T = TypeVar("T")
_OWNER = "__class__"
"""The variable by which `super()` without arguments finds the class; a function has it where it calls that."""


def by_kind(function: object, *, plain: T, coroutine: T, generator: T, async_generator: T) -> T:
    """Return the argument that is named like the kind of a function, or of a callable object."""
    for called in _called(function):
        if inspect.iscoroutinefunction(called) or _is_marked(called):
            return coroutine
        if inspect.isasyncgenfunction(called):
            return async_generator
        if inspect.isgeneratorfunction(called):
            return generator
    return plain


def _called(function: object) -> list[object]:
    """Return what a call leads to: the object, what it is a partial of, and the `__call__` of the last."""
    called = [function]
    while isinstance(called[-1], functools.partial):
        called.append(called[-1].func)
    if not inspect.isroutine(called[-1]) and not isinstance(called[-1], type):
        called.append(getattr(called[-1], "__call__", None))  # noqa: B004 - it is asked for its kind
    return called


def _is_marked(function: object) -> bool:
    """Tell whether asyncio takes it for a coroutine function: one that Cython compiled, or a mock."""
    coroutines = sys.modules.get("asyncio.coroutines")
    mark = getattr(coroutines, "_is_coroutine", None)
    # Without `getattr`, because a mock would make an attribute of that name.
    try:
        found = inspect.getattr_static(function, "_is_coroutine", None)
    except Exception:  # From Python 3.14 on it compares classes, by their metaclass's `==`.
        return False
    found = found.__get__(function) if isinstance(found, GetSetDescriptorType) else found
    return mark is not None and found is mark


def is_at_its_name(function: object) -> bool:
    """Tell whether a module has the function under its own name, as pickle would look for it."""
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    return getattr(module, "__dict__", {}).get(getattr(function, "__qualname__", "")) is function


def looking_like(function: Callable[..., object], wrapper: Callable[..., object]) -> FunctionType:
    """
    Return the wrapper, with the function's name, signature and docstring, and a code object of its own.

    Pickle looks for a function by its name and takes no other one that it finds there. So `fast = stage(library.run)`
    can't be pickled where the library keeps its own `run`. An object could say how, but Dynamo breaks a graph where one
    stands for a function: at methods that are bound to it, and under `vmap`. A stage of a `functools.partial` of it is
    one, and goes by value.
    """
    made = _with_own_code(cast("FunctionType", wrapper), function)
    functools.update_wrapper(made, function)
    return made


def _with_own_code(wrapper: FunctionType, function: Callable[..., object]) -> FunctionType:
    name = str(getattr(function, "__name__", "stage"))
    names = {"co_name": name}
    if sys.version_info >= (3, 11):
        names["co_qualname"] = str(getattr(function, "__qualname__", name))
    code = wrapper.__code__.replace(**names)  # type: ignore[arg-type]  # Two names.
    made = FunctionType(code, wrapper.__globals__, name, None, _closure(function, wrapper))
    # What `types.coroutine` made is a generator function, and its generators may be awaited.
    may_be_awaited = any(_flags(called) & inspect.CO_ITERABLE_COROUTINE for called in _called(function))
    return cast("FunctionType", coroutine(made)) if may_be_awaited else made


def _flags(function: object) -> int:
    flags = getattr(getattr(function, "__code__", None), "co_flags", 0)
    return flags if isinstance(flags, int) else 0


def _suspends(function: object) -> bool:
    return bool(_flags(function) & (inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR))


def _closure(function: Callable[..., object], wrapper: FunctionType) -> tuple[CellType, ...]:
    """
    Return the wrapper's cells, with the function's own for the class.

    What makes a class anew, as attrs does for one with slots, looks through the cells of its methods for the old class.
    """
    cells = wrapper.__closure__ or ()
    variables = function.__code__.co_freevars if isinstance(function, FunctionType) else ()
    if _OWNER not in variables or function.__closure__ is None:
        return cells
    owner = function.__closure__[variables.index(_OWNER)]
    return tuple(
        owner if name == _OWNER else cell for name, cell in zip(wrapper.__code__.co_freevars, cells, strict=True)
    )


_OURS = frozenset(
    f"__{name}__"
    for names in (
        "annotate annotate_func call class copy deepcopy del delattr dict dir doc get getattr getattribute",
        "getnewargs getnewargs_ex getstate",
        "hash init init_subclass module new reduce reduce_ex repr setattr setstate sizeof slots subclasshook weakref",
        "wrapped",
    )
    for name in names.split()
)
"""Special methods that are the wrapper's own, or not asked of an object."""
_NOTHING = object()
_kinds: WeakValueDictionary[int, type[StagedCallable]] = WeakValueDictionary()
"""By the identity of the object's class, which need not be hashable."""


class StagedCallable:
    """
    A callable object, such as an `nn.Module`, whose calls are stages. Everything but the call is the object's.

    So that programs and frameworks take it for the object, `isinstance` does, special methods are forwarded (see
    `_special_methods`), and attributes are read and set there.
    """

    def __init__(self, target: Any, call: Any, site: Site, stream: Stream, again: Any) -> None:
        """
        Wrap an object.

        Args:
            target: the object.
            call: what calls it, as a stage.
            site: the stage.
            stream: that of the stage.
            again: makes the same stage of another object.

        """
        # Not in slots, and `__dict__` is not the object's, because Dynamo finds these then.
        self.__dict__.update(__wrapped__=target, _gpuscope_call=call, _gpuscope_site=site)
        self.__dict__.update(_gpuscope_stream=stream, _gpuscope_again=again)
        if hasattr(target, "__module__"):
            self.__dict__["__module__"] = target.__module__

    def __getattr__(self, name: str) -> Any:
        """Take every other attribute from the object."""
        if name == "__wrapped__":
            raise AttributeError(name)  # While it is being made.
        return getattr(self.__wrapped__, name)

    def __setattr__(self, name: str, value: object) -> None:
        """Set the object's attribute."""
        setattr(self.__wrapped__, name, value)

    def __delattr__(self, name: str) -> None:
        """Delete the object's attribute."""
        delattr(self.__wrapped__, name)

    def __dir__(self) -> list[str]:
        """Name the object's attributes."""
        return dir(self.__wrapped__)

    def __eq__(self, other: object) -> bool:
        """Tell whether the objects are equal."""
        return bool(self.__wrapped__ == _unwrapped(other))

    def __hash__(self) -> int:
        """Return that of the object, which it equals."""
        return hash(self.__wrapped__)

    def __copy__(self) -> object:
        """Make a stage of a copy."""
        return self._gpuscope_of(copy.copy(self.__wrapped__))

    def __deepcopy__(self, memo: dict[int, object]) -> object:
        """Make a stage of a deep copy."""
        return self._gpuscope_of(copy.deepcopy(self.__wrapped__, memo))

    def _gpuscope_of(self, other: object) -> object:
        if other is self.__wrapped__:
            return self
        return self._gpuscope_again(other, self._gpuscope_site, self._gpuscope_stream)

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[object, ...]:
        """Pickle it by name where its name leads here; otherwise pickle the object, which is decorated again there."""
        if is_at_its_name(self):
            return str(self.__qualname__)
        return self._gpuscope_again, (self.__wrapped__, self._gpuscope_site)

    def __repr__(self) -> str:
        """Show the stage and the object."""
        return f"<stage {self._gpuscope_site.name!r} of {self.__wrapped__!r}>"


def _unwrapped(value: object) -> object:
    return value.__wrapped__ if issubclass(type(value), StagedCallable) else value  # type: ignore[attr-defined]


def staged_callable(target: Any, wrapper: Callable[..., Any], *details: Any) -> StagedCallable:
    """Return the object as a stage whose calls are the wrapper's; the details are the last arguments of its class."""
    call = _with_own_code(cast("FunctionType", wrapper), target)
    called: Any = next(filter(_suspends, _called(target)), target.__call__)
    functools.update_wrapper(call, called)
    kind = type(target)
    made = _kinds.get(id(kind))
    if made is None:
        methods = {**_special_methods(kind), "_gpuscope_kind": kind}  # As long as that lives, its identity is its own.
        made = _kinds[id(kind)] = type(kind.__name__, (StagedCallable,), methods)
    return made(target, call, *details)


class _Found:
    """An attribute that is found elsewhere. Not a `property`, because `torch.jit.script` compiles those of modules."""

    def __init__(self, path: str) -> None:
        self._find = operator.attrgetter(path)

    def __get__(self, instance: object, owner: type) -> Any:
        return self._find(instance) if instance is not None else self


def _special_methods(kind: type) -> dict[str, object]:
    found: dict[str, object] = {"__call__": _call_of(kind), "__hash__": StagedCallable.__hash__}
    if vars(kind).get("__hash__", _NOTHING) is None:
        found["__hash__"] = None
    for name in dir(kind):
        if name[:2] == name[-2:] == "__" and name not in _OURS:
            method = getattr(kind, name, _NOTHING)
            if method is None:
                found[name] = None  # As in `__iter__ = None`.
            elif callable(method) and method != getattr(object, name, None):
                found[name] = _forwarding(name)
    found.update(__module__=kind.__module__, __qualname__=kind.__qualname__)
    for name in ("__class__", "__doc__"):
        found[name] = _Found(f"__wrapped__.{name}")
    if hasattr(kind, "__get__"):
        found["__get__"] = _bind
    return found


def _forwarding(name: str) -> FunctionType:
    def forward(self: StagedCallable, *args: object, **kwargs: object) -> object:
        method = inspect.getattr_static(type(self.__wrapped__), name)
        if hasattr(method, "__get__"):
            method = method.__get__(self.__wrapped__, type(self.__wrapped__))
        return method(*map(_unwrapped, args), **kwargs)

    return forward  # type: ignore[return-value]  # It is a function.


def _call_of(kind: type) -> object:
    """Return a `__call__` of the same kind: frameworks ask an object's for that."""
    if _suspends(kind.__call__):
        return _Found("_gpuscope_call")

    def __call__(self: StagedCallable, *args: object, **kwargs: object) -> object:  # noqa: N807
        return self._gpuscope_call(*args, **kwargs)

    return functools.wraps(kind.__call__)(__call__)


def _bind(self: Any, instance: object, owner: type | None = None) -> object:
    """Bind as the object does: most make a method of it, and some an object of their own."""
    bound = self.__wrapped__.__get__(instance, owner)
    if type(bound) is MethodType and bound.__func__ is self.__wrapped__:
        return MethodType(self, bound.__self__)
    return self._gpuscope_of(bound)
