"""
Which calls wait for the GPU or copy pageable memory, what they move, and from which line of the program.

Looks at tensors' types, sizes and places alone, never at their values. Never imports PyTorch.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from types import FrameType

DEVICE_TO_HOST, HOST_TO_DEVICE, NO_COPY = "device to host", "host to device", ""
SCALARS = ("item", "__bool__", "__int__", "__float__", "__complex__", "__index__", "is_nonzero")
"""Methods that bring one element to the host."""
WHOLE = ("tolist", "numpy")
"""Methods that bring all elements to the host, into pageable memory."""
COPIES = ("cpu", "cuda", "to", "copy_")
COUNTED = ("nonzero", "masked_select", "argwhere", "unique")
"""Methods whose result's size is known on the GPU alone, so that the host waits for it."""
WAITS = "synchronize"
UNNAMED = "synchronisation"
"""What PyTorch tells of, and none of these methods did."""
_getframe = sys._getframe
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep  # noqa: PTH120 - as code objects have it: text


class Sync(NamedTuple):
    """Calls of one line that made the host wait for the GPU, or that copied pageable memory."""

    file: str
    line: int
    stage: str | None
    """The innermost stage around it."""
    operation: str
    """The method, `synchronize`, or `synchronisation` for what PyTorch tells of without a name, as of `x[mask]`."""
    direction: str
    """`device to host`, `host to device`, or empty."""
    pinned: bool | None
    """Whether the host's memory was page-locked; None where there is no copy, or the memory is PyTorch's own."""
    calls: int
    bytes: int | None
    """Of all its copies; None where that is not known."""
    seconds: float
    """In all these calls; 0 where that is not known."""

    def __str__(self) -> str:
        copied = "" if self.bytes is None else f", {self.bytes:,} bytes"
        memory = {True: " (pinned)", False: " (pageable)", None: ""}[self.pinned]
        way = f" {self.direction}{memory}{copied}" if self.direction else ""
        stage = f" in `{self.stage}`" if self.stage else ""
        times = f"{self.calls:,} time{'' if self.calls == 1 else 's'}"
        return f"{self.file}:{self.line} {self.operation}{way}, {times}{stage}"


class Move(NamedTuple):
    """What one call moved."""

    direction: str
    pinned: bool | None
    bytes: int | None


WAIT = Move(NO_COPY, None, None)


def move_of(name: str, args: tuple[Any, ...], keywords: dict[str, Any], result: Any, *, kind: str) -> Move | None:
    """
    Return what a call moved while the host waited, or from or to pageable memory; None where neither is so.

    Args:
        name: of the method.
        args: of the call, the tensor first.
        keywords: of the call.
        result: what it returned.
        kind: the type of the devices that count as GPUs.

    """
    tensor, *more = args
    if name in COPIES:
        source, target = (more[0] if more else keywords.get("src"), tensor) if name == "copy_" else (tensor, result)
        return _copy(kind, source, target, _is_non_blocking(more, keywords))
    if tensor.device.type != kind:
        return None
    if name in SCALARS:
        return Move(DEVICE_TO_HOST, None, tensor.element_size())
    if name in WHOLE:
        return Move(DEVICE_TO_HOST, False, tensor.numel() * tensor.element_size())
    return WAIT


def _copy(kind: str, source: Any, target: Any, non_blocking: bool) -> Move | None:
    if target is source or not hasattr(source, "device"):
        return None
    to_gpu, from_gpu = target.device.type == kind, source.device.type == kind
    if to_gpu == from_gpu or not target.numel():
        return None
    on_gpu, on_host = (target, source) if to_gpu else (source, target)
    pinned = on_host.device.type == "cpu" and bool(on_host.is_pinned())
    if pinned and non_blocking:
        return None
    # Where the types differ, PyTorch converts on the host, or on the GPU where the copy does not wait.
    size = (on_host if non_blocking else on_gpu).element_size()
    return Move(HOST_TO_DEVICE if to_gpu else DEVICE_TO_HOST, pinned, target.numel() * size)


def _is_non_blocking(args: list[Any], keywords: dict[str, Any]) -> bool:
    """Tell whether the call asks for that: by its name, or as the first truth value of `to`, `cuda` and `copy_`."""
    given = keywords.get("non_blocking")
    return bool(next((each for each in args if type(each) is bool), False) if given is None else given)


def place() -> tuple[str, int]:
    """Return file and line of the innermost frame that is neither ours nor PyTorch's."""
    torch = getattr(sys.modules.get("torch"), "__file__", None)
    theirs = os.path.dirname(torch) + os.sep if torch else _OURS  # noqa: PTH120 - as above
    frame: FrameType | None = _getframe(1)
    innermost = None
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_OURS):
            innermost = innermost or (file, frame.f_lineno)
            if not file.startswith(theirs) and not file.endswith(_WARNINGS):
                return file, frame.f_lineno
        frame = frame.f_back
    return innermost or ("unknown", 0)


_WARNINGS = (os.sep + "warnings.py", os.sep + "_py_warnings.py")
"""PyTorch's warning of a synchronisation comes through here."""
