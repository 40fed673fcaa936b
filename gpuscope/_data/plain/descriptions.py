"""
Describes objects of the program by what can be read without running their code.

Types are looked at, and attributes are read where they are stored: `repr`, `str`, `len`, iteration and properties may
run anything, and to print a tensor is to wait for the GPU. Imports only what every program has loaded, because the hot
path comes here.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from itertools import islice
from types import GetSetDescriptorType, MemberDescriptorType
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

Value: TypeAlias = Any
"""Whatever the program gave. Nothing but its type is known of it."""

MISSING = object()
MAX_TEXT = 4096
"""Characters kept of a text that is made here; a string of the program is kept whole."""
_MAX_DIMENSIONS = 64
_ITEM_BYTES = 64
_COPIED_BYTES = 1 << 20
"""The most that is copied of a buffer, in some 0.1 ms."""
_MAX_BITS = 1 << 13
"""Of a whole number that becomes text: the time for that grows with the square of its length."""

_KNOWN = frozenset(
    ("cupy", "gpuscope", "jax", "jaxlib", "keras", "ml_dtypes", "mlx", "numpy", "paddle", "tensorflow", "torch")
)
"""Packages whose tensors tell their shape without waiting for the GPU, also where that is a property in Python."""
_TRUSTED = _KNOWN | sys.stdlib_module_names
"""Packages whose descriptors in C read what is stored, and run nothing."""
_DICT_DOC = type("", (), {}).__dict__["__dict__"].__doc__
"""The docstring of the `__dict__` that each class statement makes."""
_PRINTED = frozenset(("datetime", "decimal", "fractions", "ipaddress", "pathlib", "pathlib._local", "uuid", "zoneinfo"))
"""Modules of the standard library whose objects print themselves and nothing else."""
_WORDS = ("dtype", "device", "layout", "memory_format", "longdouble", "float128", "complex256")
"""How the names of types end whose objects are words, as `torch.float16` is, or numbers that no plain type can hold."""

# The descriptors themselves, because a metaclass may replace the attributes by code of its own.
_dict_of: Callable[[type], Mapping[str, Value]] = type.__dict__["__dict__"].__get__
_module_of: Callable[[type], object] = type.__dict__["__module__"].__get__
_mro_of: Callable[[type], tuple[type, ...]] = type.__dict__["__mro__"].__get__
_qualname_of: Callable[[type], str] = type.__dict__["__qualname__"].__get__


def name_of(kind: type) -> str:
    """Return the qualified name of a type, without that of a function which it is defined in."""
    return _qualified(kind).rpartition("<locals>.")[2]


def full_name_of(kind: type) -> str:
    """Return the name of a type with its module, which is left out if it is built in."""
    module = _module_of(kind)
    return f"{module}.{_qualified(kind)}" if type(module) is str and module != "builtins" else _qualified(kind)


def size_of(value: Value) -> int:
    """Return roughly how many bytes a snapshot takes."""
    kind = type(value)
    if kind is str or kind is bytes:
        return kind.__sizeof__(value)
    if kind is dict:
        return sum(size_of(key) + size_of(item) for key, item in value.items()) + _ITEM_BYTES
    return sum(map(size_of, value)) + _ITEM_BYTES if kind is list else _ITEM_BYTES


def _qualified(kind: type) -> str:
    return str.__str__(_qualname_of(kind))[:MAX_TEXT]


def digits(number: int) -> str:
    """Return a whole number as text, or its length if it is so long that this would take time."""
    bits = number.bit_length()
    return str(number) if bits <= _MAX_BITS else f"<int of {bits} bits>"


def defined(kind: type, name: str) -> tuple[Value, type]:
    """Return what a type or one of its bases defines by this name, and which of them; else `MISSING` and `object`."""
    for base in _mro_of(kind):
        names = _dict_of(base)
        if name in names:
            return names[name], base
    return MISSING, object


def attribute(value: Value, name: str) -> Value:
    """Return an attribute if that can be read without running the program's code, else `MISSING`."""
    found, base = defined(type(value), name)
    if _is_stored(found, base) or (type(found) is property and _package_of(base) in _KNOWN):
        try:
            return found.__get__(value)
        except AttributeError:  # A slot that is not set.
            return MISSING
    own = own_attributes(value)
    if name in own:
        return own[name]
    return MISSING if found is MISSING or defined(type(found), "__get__")[0] is not MISSING else found


def described(value: Value) -> str:
    """Return a text for an object that is neither a scalar nor a container; it fits every object."""
    kind = type(value)
    if issubclass(kind, type):
        return f"<class '{full_name_of(value)}'>"[:MAX_TEXT]
    if _prints_itself(value, kind):
        return str(value)[:MAX_TEXT]
    name = attribute(value, "_name_") if issubclass(kind, _enum()) else None
    if type(name) is str:
        return f"{name_of(kind)}.{name}"[:MAX_TEXT]
    return tensor(value) or f"<{name_of(kind)}>"


def tensor(value: Value) -> str:
    """Return shape, dtype and device of a tensor, of whatever package; an empty text for anything else."""
    with _without_overrides():
        shape, dtype, device = (_of_tensor(value, name) for name in ("shape", "dtype", "device"))
        if shape is MISSING or dtype is MISSING:
            return ""
        where = "" if device is MISSING or device is None else f" device={_word(device)}"
        return f"<{name_of(type(value))} shape={_shape(shape)} dtype={_word(dtype)}{where}>"[:MAX_TEXT]


def shape_of(value: Value) -> list[Value] | None:
    """Return the sizes of a tensor of whatever package, or None for anything else."""
    with _without_overrides():
        shape, dtype = _of_tensor(value, "shape"), _of_tensor(value, "dtype")
        return None if dtype is MISSING else _sizes(shape)


def _of_tensor(value: Value, name: str) -> Value:
    found, base = attribute(value, name), getattr(sys.modules.get("torch"), "Tensor", None)
    if found is MISSING and base is not None and issubclass(type(value), base):
        return defined(base, name)[0].__get__(value)  # Hidden by a property of the program.
    return found


def dataclass_fields(value: Value) -> dict[str, Value] | None:
    """Return the fields of a dataclass that can be read, or None for what is not a dataclass."""
    fields, _ = defined(type(value), "__dataclass_fields__")
    if type(fields) is not dict:
        return None
    own = ((name, attribute(value, name)) for name, field in fields.items() if field._field_type.name == "_FIELD")
    return {name: item for name, item in own if item is not MISSING}


def own_attributes(value: Value) -> dict[str, Value]:
    """Return the attributes that are stored in the object itself, slots aside."""
    found, base = defined(type(value), "__dict__")
    own = found.__get__(value) if _is_stored(found, base) else None
    return own if type(own) is dict else {}


def _is_stored(found: Value, base: type) -> bool:
    """Tell whether a descriptor reads what is stored: others in C may run anything, as those of a lazy proxy do."""
    if type(found) is not GetSetDescriptorType:
        return type(found) is MemberDescriptorType
    return found.__doc__ == _DICT_DOC or _package_of(base) in _TRUSTED


def _package_of(kind: type) -> str:
    module = _module_of(kind)
    return module.partition(".")[0] if type(module) is str else ""


def _prints_itself(value: Value, kind: type) -> bool:
    if _module_of(kind) in _PRINTED:
        zone = attribute(value, "tzinfo")
        return zone is MISSING or zone is None or _module_of(type(zone)) in _PRINTED
    return _package_of(kind) in _KNOWN and name_of(kind).lower().endswith(_WORDS)


def _enum() -> type:
    return sys.modules["enum"].Enum  # type: ignore[no-any-return]


def _without_overrides() -> AbstractContextManager[object]:
    """Keep PyTorch from calling the `__torch_function__` of subclasses and modes, which may be the program's."""
    disable = getattr(getattr(sys.modules.get("torch"), "_C", None), "DisableTorchFunction", None)
    return nullcontext() if disable is None else disable()


def _shape(shape: Value) -> str:
    sizes = _sizes(shape)
    if sizes is None:
        return _word(shape)
    texts = [digits(int.__index__(size)) if issubclass(type(size), int) else "?" for size in sizes]
    return f"({', '.join(texts)}{',' * (len(texts) == 1)})"


def _sizes(shape: Value) -> list[Value] | None:
    for base in (tuple, list):
        if issubclass(type(shape), base):
            return list(islice(base.__iter__(shape), _MAX_DIMENSIONS))
    return None


def _word(value: Value) -> str:
    """Return the name of a dtype or a device, whatever stands for it."""
    kind = type(value)
    if kind is str or kind is int:
        return str(value)
    if issubclass(kind, type):
        return name_of(value)
    return str(value) if _package_of(kind) in _KNOWN else f"<{name_of(kind)}>"


def _bytes(value: Value) -> Value:
    size = bytearray.__len__(value)
    return (
        bytes(bytearray.__getitem__(value, slice(None)))
        if size <= _COPIED_BYTES
        else f"<{name_of(type(value))} of {size} bytes>"
    )


def _view(value: memoryview) -> Value:
    return value.tobytes() if value.nbytes <= _COPIED_BYTES else f"<memoryview of {value.nbytes} bytes>"


SCALARS: dict[type, Callable[[Value], Value]] = {
    int: int.__index__,
    float: float.__float__,
    str: str.__str__,
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
    bytearray: _bytes,
    memoryview: _view,
    complex: complex.__repr__,
    range: lambda value: repr(range(*map(int.__index__, (value.start, value.stop, value.step)))),
}
"""How values of each type, or of subclasses of it, become plain; each by the type's own method."""
