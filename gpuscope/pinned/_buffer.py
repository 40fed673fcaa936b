"""
`PinnedBuffer`: page-locked host memory that is filled, copied and read, again and again.

Checks everything before anything is copied. Waits for its own copy only, never for a stream or a device; only releasing
a buffer without a pool may.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import numpy as np
import torch

from gpuscope.pinned import _checks as checks
from gpuscope.pinned._memory import HostMemory, copy_on_host, give_back

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from typing_extensions import Self

    from gpuscope.pinned._blocks import BlockPool
    from gpuscope.pinned._checks import Array, DeviceLike, DTypeLike


class PinnedBuffer:
    """
    Page-locked host memory of one shape and dtype, for one thread at a time; a context manager that releases it.

    Copies of one buffer follow each other, whatever their streams. `wait` and `ready` are about the buffer's own last
    copy only. Until a copy from a device is done, `tensor` and `array` show garbage; until a copy to a device is done,
    writing through them changes what arrives. `fill_from` waits by itself.

    Args:
        shape: the sizes, or one number for a vector; () and sizes of 0 are allowed.
        dtype: one of torch, or one of numpy that torch has too.

    Raises:
        TypeError: for an invalid shape, and for a dtype that torch doesn't have or can't copy on the host.
        ValueError: for a negative size.

    """

    __slots__ = ("__weakref__", "_finalizer", "_memory", "_pool", "dtype", "is_pinned", "nbytes", "shape")

    def __init__(self, shape: int | Sequence[int], dtype: DTypeLike) -> None:
        self._hold(HostMemory(checks.checked_shape(shape), checks.checked_dtype(dtype)), None)

    @classmethod
    def _of_pool(cls, pool: BlockPool, memory: HostMemory) -> Self:
        """Return a buffer on memory that goes back to a pool."""
        buffer = cls.__new__(cls)
        buffer._hold(memory, pool)
        return buffer

    def _hold(self, memory: HostMemory, pool: BlockPool | None) -> None:
        self._memory: HostMemory | None = memory
        self._pool = pool
        self._finalizer: weakref.finalize[[], PinnedBuffer] | None = None
        if pool is not None:
            # Its memory is only counted back, not reused: somebody may still hold the buffer's `array`.
            self._finalizer = weakref.finalize(self, pool.forget)
            self._finalizer.atexit = False
        tensor = memory.tensor
        self.shape, self.dtype, self.nbytes = tuple(tensor.shape), tensor.dtype, tensor.nbytes
        self.is_pinned = memory.is_pinned

    def _held(self) -> HostMemory:
        if self._memory is None:
            raise RuntimeError(
                "The buffer was released, and its memory may be in use elsewhere: acquire or make a new one."
            )
        return self._memory

    @property
    def tensor(self) -> torch.Tensor:
        """The memory as a tensor on the host. Don't use it after the release."""
        return self._held().tensor

    @property
    def array(self) -> Array:
        """
        The memory as a numpy array, without a copy. Don't use it after the release.

        Raises:
            TypeError: for dtypes that numpy lacks, such as bfloat16.
            RuntimeError: after the release.

        """
        try:
            return self.tensor.numpy()
        except TypeError:
            bits = {1: "uint8", 2: "int16", 4: "int32"}.get(self.dtype.itemsize, "int64")
            raise TypeError(
                f"numpy has no {self.dtype}: use `.tensor`, or its bits, `.tensor.view(torch.{bits}).numpy()`."
            ) from None

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        array = self.array
        if copy or (dtype is not None and array.dtype != dtype):
            if copy is False:
                raise ValueError(f"The buffer has dtype {array.dtype}: as {np.dtype(dtype)} it can only be copied.")
            return array.astype(array.dtype if dtype is None else dtype)
        return array

    def __repr__(self) -> str:
        kind = "released" if self._memory is None else "pinned" if self.is_pinned else "pageable"
        return f"PinnedBuffer({self.shape}, {self.dtype}, {kind})"

    def fill_from(self, source: Array | torch.Tensor) -> Self:
        """
        Copy from elsewhere on the host, after waiting for this buffer's own last copy. Returns itself.

        Args:
            source: a numpy array, or a tensor on the CPU, of the buffer's shape and dtype, with any strides.

        Raises:
            TypeError: for anything else, or another dtype.
            ValueError: for another shape or layout, or a tensor that is not on the CPU.
            RuntimeError: after the release.

        """
        memory = self._held()
        if not isinstance(source, np.ndarray):
            self._check_on_host(source)
            memory.wait()
            copy_on_host(memory.tensor, source.detach())
            return self
        checks.check_array(source, self.shape, self.dtype)
        memory.wait()
        if source.flags.c_contiguous and source.flags.writeable:
            copy_on_host(memory.tensor, torch.from_numpy(source))
        else:
            np.copyto(self.array, source)
        return self

    def _check_on_host(self, source: object) -> None:
        if not isinstance(source, torch.Tensor):
            raise TypeError(
                f"`fill_from` was given a `{type(source).__name__}`: expected a numpy array or a tensor on the CPU; "
                "`numpy.asarray(...)` makes arrays of most things."
            )
        checks.check_dense("The tensor", source, self.shape, self.dtype)
        if source.device.type != "cpu":
            raise ValueError(f"The tensor is on {source.device}: expected one on the CPU. Use `copy_from_device`.")

    def to_device(
        self, device: DeviceLike, stream: torch.cuda.Stream | None = None, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Start a copy to a GPU, and return the tensor there, which the current stream may use at once.

        On a stream of its own, a copy to a new tensor runs beside everything; one to `out` starts after what the
        current stream has been given so far, because that may be using `out`. Inside `with torch.cuda.stream(...)` that
        stream is the current one: no stream waits for another, and the order is up to you.

        Args:
            device: a CUDA device; without an index, the current one. Where there is no CUDA, "cpu": copied at once.
            stream: one of that device to copy on; None: its current one.
            out: a contiguous tensor to copy into, of the buffer's shape and dtype and on that device; None: a new one.

        Raises:
            TypeError: if `stream` is not a stream, `out` is not a tensor, or `out` has another dtype.
            ValueError: for another shape, layout or device.
            RuntimeError: after the release, or while the current stream is captured into a CUDA graph.

        """
        memory, device = self._held(), checks.checked_device(device)
        if stream is not None:
            checks.check_stream(stream, device)
        if out is not None:
            checks.check_transfer("`out`", out, self.shape, self.dtype)
            checks.check_on_device("`out`", out, device)
        if device.type == "cuda":
            checks.check_no_capture()
            return memory.to_cuda(device, stream, out)
        if out is None:
            return memory.tensor.clone()
        out.detach().copy_(memory.tensor)
        return out

    def copy_from_device(self, tensor: torch.Tensor, stream: torch.cuda.Stream | None = None) -> Self:
        """
        Start a copy from a GPU. The contents are garbage until `wait` or `result` returns, or `ready` is true.

        The tensor may be let go at once: its memory stays until the copy is done. Returns the buffer itself.

        Args:
            tensor: contiguous, of the buffer's shape and dtype, on a CUDA device; on the CPU where there is no CUDA.
            stream: one of that device to copy on, after what its current stream has been given so far; None: the
                current one.

        Raises:
            TypeError: if `tensor` is not a tensor, `stream` is not a stream, or `tensor` has another dtype.
            ValueError: for another shape, layout or device.
            RuntimeError: after the release, or while the current stream is captured into a CUDA graph.

        """
        memory = self._held()
        checks.check_transfer("The tensor", tensor, self.shape, self.dtype)
        checks.check_on_gpu(tensor)
        if stream is not None:
            checks.check_stream(stream, tensor.device)
        if tensor.is_cuda:
            checks.check_no_capture()
            memory.from_cuda(tensor, stream)
        else:
            memory.tensor.copy_(tensor.detach())
        return self

    def ready(self) -> bool:
        """Return whether the buffer's last copy is done, without waiting. True if there was none."""
        return self._held().ready()

    def wait(self) -> None:
        """Wait until the buffer's last copy is done, and for nothing else."""
        self._held().wait()

    def result(self) -> torch.Tensor:
        """Wait until the buffer's last copy is done, and return the tensor on the host."""
        self.wait()
        return self.tensor

    def release(self) -> None:
        """
        Give the buffer back to its pool at once; its next user gets it once its copy is done.

        A buffer without a pool waits for its copy and gives its memory back to the system.

        Raises:
            RuntimeError: if it was already released.

        """
        memory, self._memory = self._held(), None
        if self._pool is None:
            give_back([memory])
            return
        if self._finalizer is not None:
            self._finalizer.detach()
        self._pool.give(memory)

    def __enter__(self) -> Self:
        self._held()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._memory is not None:
            self.release()
