"""
The modes of PyTorch that belong to a thread: read in the program's thread, and set in the threads that call `post`.

Sets nothing in the program's own threads.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    T = TypeVar("T")
    A = TypeVar("A")

Autocast: TypeAlias = tuple[str, bool, torch.dtype]
_AUTOCAST_OF = ("cuda", "cpu")


def modes_of_thread() -> Hashable:
    """Return the modes on which the kernels of a function depend, some of the process included."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        _autocast(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
    )


def in_modes_of_this_thread(function: Callable[[A], T]) -> Callable[[A], T]:
    """Return the function for another thread, with the modes, the device and the stream of this one."""
    inference, gradients, cached = (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_cache_enabled(),
    )
    autocast, device, stream = _autocast(), torch.get_default_device(), _current_stream()

    def run(argument: A) -> T:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(gradients))
            stack.enter_context(_autocast_as(autocast, cached=cached))
            if device.type != "cpu":
                stack.enter_context(device)
            if stream is not None:
                stack.enter_context(torch.cuda.stream(stream))
            return function(argument)

    return run


def _autocast() -> tuple[Autocast, ...]:
    return tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _AUTOCAST_OF)


@contextlib.contextmanager
def _autocast_as(autocast: tuple[Autocast, ...], *, cached: bool) -> Iterator[None]:
    # Not `torch.autocast`, which warns where there is no GPU. The thread is ours, and only later calls see what is set.
    for kind, enabled, dtype in autocast:
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
    torch.set_autocast_cache_enabled(cached)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        # Copies of weights in another dtype are kept until the outermost autocast ends.
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


def _current_stream() -> torch.cuda.Stream | None:
    """Return the current stream, which belongs to the current device, if the program uses a GPU."""
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.current_stream() if used else None
