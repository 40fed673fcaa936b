"""
`PinnedBuffer`: page-locked host memory that is filled, copied and read, again and again.

Checks everything before anything is copied. Waits for its own copy only, never for a stream or a device.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gpuscope.pinned import _checks as checks
from gpuscope.pinned._memory import HostMemory, copy_on_host, give_back

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

    from gpuscope.pinned._stock import BlockPool


class PinnedBuffer:
    """
    Page-locked host memory of one shape and dtype, for one thread at a time; a context manager that releases it.

    Copies of one buffer follow each other, whatever their streams. `wait` and `ready` are about the buffer's own last
    copy only. Until that copy from a device is done, what `tensor` and `array` show is garbage; until a copy to a
    device is done, writing through them changes what arrives. `fill_from` waits by itself.

    Args:
        shape: the sizes, or one number; () and sizes of 0 are allowed.
        dtype: of torch, or one of numpy that torch has too.

    Raises:
        TypeError: for a shape or dtype that is none, or that torch can't copy on the host.
        ValueError: for a negative size.

    """

    __slots__ = ("__weakref__", "_finalizer", "_memory", "_stock", "dtype", "is_pinned", "nbytes", "shape")

    def __init__(self, shape: int | Sequence[int], dtype: Any) -> None:
        self._hold(HostMemory(checks.checked_shape(shape), checks.checked_dtype(dtype)), None)

    @classmethod
    def _of_stock(cls, pool: BlockPool, memory: HostMemory) -> Self:
        """Return a buffer on memory that goes back to a pool's stock."""
        buffer = cls.__new__(cls)
        buffer._hold(memory, pool)
        return buffer

    def _hold(self, memory: HostMemory, pool: BlockPool | None) -> None:
        self._memory: HostMemory | None = memory
        self._stock = pool
        self._finalizer: weakref.finalize[[], PinnedBuffer] | None = None
        if pool is not None:
            # Only counted back and not reused: somebody may hold its `array` still.
            self._finalizer = weakref.finalize(self, pool.forget)
            self._finalizer.atexit = False
        tensor = memory.tensor
        self.shape, self.dtype, self.nbytes = tuple(tensor.shape), tensor.dtype, tensor.nbytes
        self.is_pinned = memory.is_pinned

    def _held(self) -> HostMemory:
        if self._memory is None:
            raise RuntimeError("The buffer was released: its memory may be another's by now. Acquire or make another.")
        return self._memory

    @property
    def tensor(self) -> torch.Tensor:
        """The memory as a tensor on the host; don't use it after the release."""
        return self._held().tensor

    @property
    def array(self) -> np.ndarray[Any, Any]:
        """The memory as a numpy array, without a copy; TypeError for dtypes that numpy lacks, such as bfloat16."""
        try:
            return self.tensor.numpy()
        except TypeError:
            bits = {1: "uint8", 2: "int16", 4: "int32"}.get(self.dtype.itemsize, "int64")
            raise TypeError(
                f"numpy has no {self.dtype}: use `.tensor`, or its bits, `.tensor.view(torch.{bits}).numpy()`."
            ) from None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        array = self.array
        if copy or (dtype is not None and array.dtype != dtype):
            if copy is False:
                raise ValueError(f"The buffer is of {array.dtype}: as {np.dtype(dtype)} it can only be copied.")
            return array.astype(array.dtype if dtype is None else dtype)
        return array

    def __repr__(self) -> str:
        kind = "released" if self._memory is None else "pinned" if self.is_pinned else "pageable"
        return f"PinnedBuffer({self.shape}, {self.dtype}, {kind})"

    def fill_from(self, source: np.ndarray[Any, Any] | torch.Tensor) -> Self:
        """
        Copy from elsewhere on the host; waits first for this buffer's own copy.

        Args:
            source: a numpy array or a tensor on the CPU, of the buffer's shape and dtype, with any strides.

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

    def _check_on_host(self, source: Any) -> None:
        if not isinstance(source, torch.Tensor):
            raise TypeError(
                f"`fill_from` was given a `{type(source).__name__}`: expected a numpy array or a tensor on the CPU; "
                "`numpy.asarray(...)` makes an array of most things."
            )
        checks.check_dense("The tensor", source, self.shape, self.dtype)
        if source.device.type != "cpu":
            raise ValueError(f"The tensor is on {source.device}: expected one on the CPU. Use `copy_from_device`.")

    def to_device(
        self, device: Any, stream: torch.cuda.Stream | None = None, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Start a copy to a GPU, and return the tensor there, which the current stream may use at once.

        With a stream of its own, a copy to a new tensor runs beside everything; one to `out` starts behind what the
        current stream has been given so far, which may be using it. Inside `with torch.cuda.stream(...)` that stream is
        the current one: nothing waits for another, and the order is yours to keep.

        Args:
            device: a CUDA device; without an index the current one. Where there is no CUDA, "cpu": copied at once.
            stream: one of that device to copy on; None: its current one.
            out: contiguous, of the buffer's shape and dtype and on that device, instead of a new tensor.

        Raises:
            TypeError: for what is no stream or tensor, or another dtype.
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
        Start a copy from a GPU; the contents are garbage until `wait` or `result`, or until `ready` says so.

        The tensor may be let go at once: its memory stays until the copy is done.

        Args:
            tensor: contiguous, of the buffer's shape and dtype, on a CUDA device; on the CPU where there is no CUDA.
            stream: one of that device to copy on, behind what its current stream has been given so far; None: the
                current one.

        Raises:
            TypeError: for what is no tensor or stream, or another dtype.
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
        """Return whether the buffer's last copy is done; does not wait. True if there was none."""
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
        Give the buffer back to its pool at once, whose next user gets it when its copy is done.

        One without a pool waits for its copy and gives its memory back to the system.

        Raises:
            RuntimeError: if it was released already.

        """
        memory, self._memory = self._held(), None
        if self._stock is None:
            give_back([memory])
            return
        if self._finalizer is not None:
            self._finalizer.detach()
        self._stock.give(memory)

    def __enter__(self) -> Self:
        self._held()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._memory is not None:
            self.release()
