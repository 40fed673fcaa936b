"""
Page-locked memory of one shape and dtype, with the event of its last copy.

Checks nothing, because callers have. Asks about and waits for its own event only, never a stream or a device; only
`give_back` may wait for the GPU.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from gpuscope._data.plain.values import message_of
from gpuscope._log import WarnOnce
from gpuscope.pinned._checks import has_cuda

if TYPE_CHECKING:
    from collections.abc import Iterable

Event: TypeAlias = Any
"""A `torch.cuda.Event`. `Any`, because its methods have no types."""

ONE_THREAD_BYTES = 1_000_000
"""From this size on several threads copy faster than one."""

_memmove = ctypes.PyDLL(None).memmove
_warnings = WarnOnce()
_PAGEABLE = ": using pageable memory instead; copies are slower and may block."
_holders: weakref.WeakSet[object] = weakref.WeakSet()


def survives_forks(holder: object) -> None:
    """Never destroy an object that holds CUDA events or graphs in the child of a fork: that would abort the child."""
    _holders.add(holder)


class HostMemory:
    """
    One block of host memory, and the copy that is under way, if any.

    Copies follow each other on the GPU, whatever their streams, so that the event of the last one tells of all.
    """

    __slots__ = ("__weakref__", "_copy", "_events", "_source", "is_pinned", "tensor")

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.tensor, self.is_pinned = _allocate(shape, dtype)
        self._events: dict[int, Event] = {}  # By device: an event belongs to the device of its first stream.
        self._copy: Event | None = None
        self._source: torch.Tensor | None = None
        survives_forks(self)

    def ready(self) -> bool:
        """Return whether the last copy is done, without waiting."""
        if self._copy is not None and self._copy.query():
            self._copy = self._source = None
        return self._copy is None

    def wait(self) -> None:
        """Wait until the last copy is done."""
        if self._copy is not None:
            self._copy.synchronize()
            self._copy = self._source = None

    def to_cuda(self, device: torch.device, stream: torch.cuda.Stream | None, out: torch.Tensor | None) -> torch.Tensor:
        """Queue a copy to the GPU, and have the current stream wait for it."""
        if stream is None:
            result = self._send(device, out)
            self._sent(torch.cuda.current_stream(device))
            return result
        current = torch.cuda.current_stream(device)
        if stream == current:
            return self.to_cuda(device, None, out)
        with torch.cuda.stream(stream):
            if out is not None:
                stream.wait_stream(current)
            # A new tensor comes from this stream's memory; the current stream's may be in use by kernels yet to run.
            result = self._send(device, out)
            event = self._sent(stream)
        for user in (current, stream):
            result.record_stream(user)
        current.wait_event(event)
        return result

    def from_cuda(self, source: torch.Tensor, stream: torch.cuda.Stream | None) -> None:
        """Queue a copy from the GPU, behind what the current stream has been given so far."""
        if source.requires_grad:
            source = source.detach()
        if stream is None:
            self._follow(source.device)
            self.tensor.copy_(source, non_blocking=True)
            stream = torch.cuda.current_stream(source.device)
            self._sent(stream)
        else:
            # If both are the same stream, this waits for nothing new.
            stream.wait_stream(torch.cuda.current_stream(source.device))
            with torch.cuda.stream(stream):
                self._follow(source.device)
                self.tensor.copy_(source, non_blocking=True)
                self._sent(stream)
        # Both keep the source's memory: `record_stream` that of PyTorch's allocator, even if this buffer is let go;
        # the reference any other.
        source.record_stream(stream)
        self._source = source

    def _follow(self, device: torch.device) -> None:
        """Have the device's current stream wait for the copy that is under way."""
        if self._copy is not None and not self.ready():
            self._copy.wait(torch.cuda.current_stream(device))

    def _send(self, device: torch.device, out: torch.Tensor | None) -> torch.Tensor:
        """Queue the copy on the device's current stream. Whatever a caller does before this delays the copy."""
        self._follow(device)
        if out is None:
            return self.tensor.to(device, non_blocking=True)
        (out.detach() if out.requires_grad else out).copy_(self.tensor, non_blocking=True)
        return out

    def _sent(self, stream: torch.cuda.Stream) -> Event:
        """Record the event behind a copy on a stream."""
        index = stream.device.index
        event = self._events.get(index)
        if event is None:
            event = self._events[index] = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        self._copy = event
        return event


def copy_on_host(target: torch.Tensor, source: torch.Tensor) -> None:
    """
    Copy between dense tensors of one shape and dtype, `target` contiguous; with several threads where that gains much.

    PyTorch uses all its threads from 128 kB on. They gain nothing on what one thread copies in 50 us, and once asleep
    they must be woken first: on a shared machine, one in ten copies of 0.6 MB took over 4 ms. So short copies are made
    here. They keep the GIL, because to get it back from a thread that computes would take 5 ms.
    """
    plain = type(source) is torch.Tensor and source.is_contiguous() and not (source.is_neg() or source.is_conj())
    if plain and 0 < source.nbytes < ONE_THREAD_BYTES:
        pointers = target.data_ptr(), source.data_ptr()
        if all(pointers):  # A tensor's storage may have been freed under it.
            _memmove(*map(ctypes.c_void_p, pointers), ctypes.c_size_t(source.nbytes))
            return
    target.copy_(source)


def give_back(memories: Iterable[HostMemory]) -> None:
    """
    Give memory back to the system, each block once its copy is done.

    PyTorch caches pinned blocks, so its cache is emptied; freeing them may wait for the GPU.
    """
    pinned = False
    for memory in memories:
        memory.wait()
        pinned |= memory.is_pinned
        del memory.tensor
    if pinned and hasattr(torch._C, "_host_emptyCache"):
        torch._C._host_emptyCache()


def _allocate(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, bool]:
    # Not in the caller's inference mode: outside that the tensor could not be written to.
    with torch.inference_mode(mode=False):
        if has_cuda():
            try:
                return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True), True
            except RuntimeError as error:
                _warnings.warn("failed", f"pinning memory failed (%s){_PAGEABLE}", message_of(error))
        else:
            _warnings.warn("no CUDA", f"no CUDA device can be used, so memory can't be pinned{_PAGEABLE}")
        return torch.empty(shape, dtype=dtype, device="cpu"), False


def _keep_for_ever() -> None:
    for holder in list(_holders):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(holder))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_for_ever)
