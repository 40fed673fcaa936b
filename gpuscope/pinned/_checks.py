"""
Argument checks of the pinned buffers.

They look only at types, shapes, layouts and devices, never at contents, so that every error comes before any copy.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, strided

from gpuscope._data.plain.values import message_of, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

Array: TypeAlias = "npt.NDArray[Any]"
"""A numpy array. `Any`, because its dtype is known at run time only."""
DTypeLike: TypeAlias = "torch.dtype | npt.DTypeLike"
DeviceLike: TypeAlias = "torch.device | str | int"


@functools.cache
def has_cuda() -> bool:
    """Return whether CUDA can be used. Asks once, and creates no context."""
    return torch.cuda.is_available()


def checked_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    """Return a shape as a tuple; a number is the shape of a vector."""
    try:
        sizes = tuple(map(operator.index, (shape,) if hasattr(shape, "__index__") else shape))
    except TypeError:
        raise TypeError(
            f"`shape` is {shown(shape)}: expected a number or a sequence of numbers, such as (3, 224)."
        ) from None
    if any(size < 0 for size in sizes):
        raise ValueError(f"`shape` is {shown(shape)}: expected sizes of 0 or more.")
    return sizes


def checked_dtype(dtype: DTypeLike) -> torch.dtype:
    """Return a dtype of torch or numpy as one of torch."""
    if not isinstance(dtype, torch.dtype):
        return _dtype_from_numpy(dtype)
    try:
        torch.empty(1, dtype=dtype, device="cpu").clone()
    except RuntimeError as error:
        raise TypeError(
            f"`dtype` is {dtype}: expected one that torch can copy on the host ({message_of(error)})."
        ) from None
    return dtype


def _dtype_from_numpy(dtype: npt.DTypeLike) -> torch.dtype:
    if dtype is not None:  # numpy takes None for float64.
        with contextlib.suppress(TypeError, ValueError):
            return torch.from_numpy(np.empty(0, dtype)).dtype
    raise TypeError(
        f"`dtype` is {shown(dtype)}: expected a dtype of torch, or one of numpy that torch has too, in this machine's "
        "byte order."
    )


def check_array(array: Array, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuse a numpy array that is not of this shape and dtype."""
    try:
        seen: torch.dtype | str = torch.from_numpy(np.empty(0, array.dtype)).dtype
    except (TypeError, ValueError):
        seen = f"numpy's {array.dtype.str!r}"
    if seen != dtype:
        raise TypeError(f"The array is of {seen}, the buffer of {dtype}: convert it first, with `array.astype(...)`.")
    _check_shape("The array", tuple(array.shape), shape)


def check_dense(name: str, tensor: object, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuse what is not a dense tensor of this shape and dtype."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is of type `{type(tensor).__name__}`: expected a `torch.Tensor`.")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} has the layout {tensor.layout}: expected a dense tensor; call `.to_dense()` first.")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is of {tensor.dtype}, the buffer of {dtype}: convert it first, with `tensor.to(...)`.")
    _check_shape(name, tuple(tensor.shape), shape)


def check_transfer(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuse also what one transfer can't fill or read: PyTorch would copy through temporary memory and wait."""
    # First the usual case, in which all is well: whatever is asked before a copy delays it.
    if (
        isinstance(tensor, Tensor)
        and tensor.dtype is dtype
        and tensor.shape == shape
        and tensor.layout is strided
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and not tensor.is_conj()
    ):
        return
    check_dense(name, tensor, shape, dtype)
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} has the strides {tuple(tensor.stride())}: expected contiguous memory, which one transfer can "
            "copy; call `.contiguous()` first."
        )
    raise ValueError(f"{name} is a lazy conjugate or negative: call `.resolve_conj().resolve_neg()` first.")


def _check_shape(name: str, seen: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if seen != shape:
        hint = (
            "reshape it first."
            if math.prod(seen) == math.prod(shape)
            else "use a buffer of that shape, or copy a part."
        )
        raise ValueError(f"{name} has the shape {seen}, the buffer {shape}: {hint}")


def checked_device(device: DeviceLike) -> torch.device:
    """Return the device of a copy: a CUDA device with its index, or the CPU where there is no CUDA."""
    try:
        found, is_known = _known_devices[device], True
    except (KeyError, TypeError):
        found, is_known = None, False
    if not is_known:  # Out of the handler, whose exception is nobody's business.
        found = _found_device(device)
    return _cuda_device(torch.cuda.current_device()) if found is None else found


_known_devices: dict[DeviceLike, torch.device | None] = {}
"""The devices of copies so far, None for the current CUDA device. A look-up costs a tenth of checking one."""


@functools.cache
def _cuda_device(index: int) -> torch.device:
    return torch.device("cuda", index)


def _found_device(device: DeviceLike) -> torch.device | None:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f'`device` is {shown(device)}: expected a device such as "cuda" or "cuda:1".') from None
    if not has_cuda():
        if found.type != "cpu":
            raise ValueError(f'`device` is {found}, but no CUDA device can be used here: expected "cpu".')
    elif found.type != "cuda":
        raise ValueError(f"`device` is {found}: expected a CUDA device. `buffer.tensor.clone()` copies on the host.")
    elif found.index is not None and found.index >= torch.cuda.device_count():
        raise ValueError(f"`device` is {found}: expected an index below {torch.cuda.device_count()}.")
    known = None if found.type == "cuda" and found.index is None else found
    if isinstance(device, str | torch.device):
        _known_devices[device] = known
    return known


def check_on_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Refuse a tensor that is not where the copy goes."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, `device` is {device}: expected both to be the same.")


def check_on_gpu(tensor: torch.Tensor) -> None:
    """Refuse a tensor that `copy_from_device` can't copy from, because of where it is."""
    if tensor.is_cuda != has_cuda() or not (tensor.is_cuda or tensor.is_cpu):
        expected = "cuda" if has_cuda() else "cpu"
        hint = " `fill_from` copies on the host." if tensor.device.type == "cpu" else ""
        raise ValueError(f"The tensor is on {tensor.device}: expected a device of type {expected!r}.{hint}")


def check_stream(stream: object, device: torch.device) -> None:
    """Refuse what is not a stream of the device."""
    if not isinstance(stream, torch.cuda.Stream):
        raise TypeError(f"`stream` is of type `{type(stream).__name__}`: expected a `torch.cuda.Stream` or None.")
    if stream.device != device:
        raise ValueError(f"`stream` belongs to {stream.device}, the copy to {device}: expected a stream of {device}.")


def check_no_capture() -> None:
    """Refuse a copy while the current stream is captured, because the buffer would not know of replays."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "The current stream is being captured into a CUDA graph, and the buffer would not know of its replays: "
            "copy before the capture, or copy to or from `buffer.tensor` yourself and keep the buffer for as long "
            "as the graph."
        )
