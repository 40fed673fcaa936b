"""
What may be copied, and how: which tensors, in which strides, and which objects may hold tensors where nobody looks.

Refuses with a sentence what can't be copied. Copies nothing, and knows no streams.
"""

from __future__ import annotations

import copy
import enum
import gc
import types
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuscope.pinned._checks import Array

Tree: TypeAlias = Any
"""Nested containers, as `torch.utils._pytree` knows them, of tensors, arrays and other leaves. PyTorch has no type."""
Leaf: TypeAlias = object

PLAIN = (torch.Tensor, torch.nn.Parameter)
"""What a copy keeps whole. Other subclasses may carry more than their elements."""
MAX_SEARCHED = 1000
"""Objects that are searched for tensors; what holds more is taken to hold one."""

_PYTHONS = (int, float, complex, bool, str, bytes, range, type(None), type(...), type(NotImplemented), object)
_ATOMS = frozenset((*_PYTHONS, torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format))
_ARRAYS = (np.ndarray, np.memmap, np.matrix)
_MEMORY = (weakref.ref, torch.Tensor, torch.UntypedStorage, torch.TypedStorage, np.ndarray, np.void)
_LEFT_OUT = (type, types.ModuleType, types.CodeType)


class FlatTree(NamedTuple):
    """A tree taken apart: its leaves, and the structure, which is None for a lone leaf."""

    leaves: list[Leaf]
    structure: pytree.TreeSpec | None

    def tree(self) -> Tree:
        """Put the tree together again."""
        return self.leaves[0] if self.structure is None else pytree.tree_unflatten(self.leaves, self.structure)


def taken_apart(tree: Tree) -> FlatTree:
    """Take a tree apart; a lone tensor, as most trees are, needs no search."""
    return FlatTree([tree], None) if type(tree) is torch.Tensor else FlatTree(*pytree.tree_flatten(tree, is_size))


def is_size(tree: Tree) -> bool:
    """Tell whether it is a `torch.Size`, which PyTorch would make into a tuple."""
    return type(tree) is torch.Size


def is_atom(leaf: Leaf) -> bool:
    """Tell whether a value never changes and holds no tensor. Subclasses may hold anything."""
    if type(leaf) in _ATOMS:
        return True
    if isinstance(leaf, enum.Enum):
        return type(leaf._value_) in _ATOMS
    return isinstance(leaf, np.generic) and not isinstance(leaf, np.void)


def check_input(tensor: torch.Tensor) -> None:
    """Refuse a tensor of a batch that a copy would make into something else."""
    _check_plain(tensor, "a batch", " in `prepare`")
    _check_dense(tensor, "a batch")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            "A tensor in a batch requires gradients, which would not reach it through the copy: `.detach()` it in "
            "`prepare`, or run the loop under `torch.no_grad()` or `torch.inference_mode()`."
        )


def check_output(tensor: torch.Tensor) -> None:
    """Refuse an output that is on a device and can't be copied as it is."""
    check_type(tensor)
    _check_dense(tensor, "the outputs of `infer`")


def check_type(tensor: torch.Tensor) -> None:
    """Refuse an output of a subclass."""
    _check_plain(tensor, "the outputs of `infer`", "")


def check_object(leaf: Leaf) -> None:
    """Refuse an object from `infer` that may hold tensors, because later calls of `infer` may overwrite those."""
    if not is_atom(leaf) and may_hold_tensors(leaf):
        raise TypeError(
            f"`infer` returned an object of type `{type(leaf).__qualname__}`, which may hold tensors that its later "
            "calls overwrite: return tensors in dicts, lists, tuples or other containers that `torch.utils._pytree` "
            "knows. `copy_outputs=False` takes it as it is, for an `infer` that never uses such memory again."
        )


def copied_object(leaf: Leaf, memo: dict[int, object]) -> Leaf:
    """
    Return a copy of an object from `infer` that holds no tensors, because its later calls may change it as well.

    Args:
        leaf: the object, or an array of objects.
        memo: objects that stay what they are, and the copies so far, by identity: as for `copy.deepcopy`.

    """
    if id(leaf) in memo:
        return memo[id(leaf)]
    searched = leaf.ravel().tolist() if isinstance(leaf, np.ndarray) else leaf
    check_object(searched)
    if is_atom(leaf):
        return leaf
    try:
        # What holds nothing cannot change, and programs compare it by identity.
        memo.update((id(found), found) for found in _reached_from(searched) if _is_empty(found))
        return copy.deepcopy(leaf, memo)
    except Exception as error:  # Of the program's own `__deepcopy__`, for one.
        raise TypeError(
            f"`infer` returned an object of type `{type(leaf).__qualname__}`, which its later calls may change, and "
            "which cannot be copied: return what is needed of it. `copy_outputs=False` takes it as it is."
        ) from error


def _is_empty(thing: object) -> bool:
    """Tell whether an object is made of its class alone, by a class statement."""
    if type(thing).__new__ is not object.__new__ or any(not isinstance(each, type) for each in gc.get_referents(thing)):
        return False
    try:
        return not any(thing.__reduce_ex__(2)[2:])
    except Exception:  # It keeps something in C that cannot be copied, as a lock does.
        return False


def may_hold_tensors(thing: object) -> bool:
    """Tell whether tensors, arrays or buffers can be reached from an object, or so much that it can't be searched."""
    return any(
        isinstance(found, _MEMORY) or _lends_memory(found) or count >= MAX_SEARCHED
        for count, found in enumerate(_reached_from(thing))
    )


def _reached_from(thing: object) -> Iterator[object]:
    waiting, seen = [thing], {id(thing)}
    while waiting:
        found = waiting.pop()
        yield found
        for held in _held_by(found):
            if id(held) not in seen and not is_atom(held) and not isinstance(held, _LEFT_OUT):
                seen.add(id(held))
                waiting.append(held)


def _held_by(thing: object) -> list[object]:
    if isinstance(thing, types.FunctionType):  # Not its module, which holds all of the program.
        cells: list[object] = list(thing.__closure__ or ())
        return [*cells, thing.__defaults__, thing.__kwdefaults__, thing.__dict__]
    return gc.get_referents(thing)


def _lends_memory(thing: object) -> bool:
    # On the type, because to ask an object may run code of the program.
    if hasattr(type(thing), "__dlpack__") or hasattr(type(thing), "__cuda_array_interface__"):
        return True
    try:
        memoryview(thing).release()  # type: ignore[arg-type]
    except Exception:  # A `TypeError` of all that has no buffer.
        return False
    return True


def dense_strides(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Return the strides of a copy by `.to()`, which keeps the order of dimensions; None where it is contiguous."""
    if tensor.is_contiguous():
        return None
    strides: tuple[int, ...] = torch.empty_like(tensor, device="meta", requires_grad=False).stride()
    return strides


def dense_strides_of_array(source: Array) -> tuple[int, ...] | None:
    """Return the strides, in elements, of a copy of an array that keeps its order; None where it is contiguous."""
    if source.flags.c_contiguous or not source.size:
        return None
    return tuple(stride // source.itemsize for stride in np.empty_like(source, subok=False).strides)


def torch_dtype(source: Array) -> torch.dtype:
    """Return PyTorch's dtype for an array of a batch; refuse what is more than an array."""
    if type(source) not in _ARRAYS:
        raise TypeError(
            f"An array in a batch is of the subclass `{type(source).__qualname__}`, and a tensor would lose what that "
            "adds: convert it in `prepare`."
        )
    try:
        return torch.from_numpy(np.empty(0, source.dtype)).dtype
    except TypeError:
        raise TypeError(
            f"An array in a batch is of {source.dtype}, which PyTorch does not have: convert it in `prepare`."
        ) from None


def _check_plain(tensor: torch.Tensor, where: str, place: str) -> None:
    if type(tensor) not in PLAIN:
        raise TypeError(
            f"A tensor in {where} is of the subclass `{type(tensor).__qualname__}`, and a copy might lose what that "
            f"adds: expected a plain tensor. Write `.as_subclass(torch.Tensor)`{place}, or take its parts."
        )


def _check_dense(tensor: torch.Tensor, where: str) -> None:
    if tensor.layout is not torch.strided:
        raise TypeError(
            f"A tensor in {where} has the layout {tensor.layout}: expected a dense tensor. Copy its parts, or call "
            "`.to_dense()`."
        )
    if tensor.is_quantized:
        raise TypeError(f"A tensor in {where} is quantized, of {tensor.dtype}: call `.int_repr()` or `.dequantize()`.")
