"""
NVIDIA's management library, NVML, through `ctypes`: the few calls that are needed, and its words for their answers.

It knows GPUs and no CUDA: nothing here creates a context. Calls take microseconds to milliseconds, and let go of the
GIL meanwhile. Source of names, numbers and structures: the header `nvml.h` of CUDA 12.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from typing import Any, TypeAlias

Argument: TypeAlias = Any
"""What `ctypes` takes; it checks that itself."""

LIBRARY = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
SUCCESS, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, NO_FUNCTION = 0, 3, 4, 6, 13
NEVER = (NOT_SUPPORTED, NO_PERMISSION, NO_FUNCTION)
"""Answers that will be the same next time."""
CLOCK_SM = 1

REASONS = (
    (0x80, "power_brake"),
    (0x40, "hardware_thermal"),
    (0x08, "hardware_slowdown"),
    (0x20, "software_thermal"),
    (0x04, "power_cap"),
    (0x10, "sync_boost"),
)
"""
Why clocks are held down, the one that says most first. Left out: an idle GPU, clocks that somebody has set, displays.
"""


class Utilization(ctypes.Structure):
    """`nvmlUtilization_t`: percent of the last sample period, 1/6 to 1 second."""

    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class Process(ctypes.Structure):
    """`nvmlProcessInfo_t`."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("memory", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class ProcessSample(ctypes.Structure):
    """`nvmlProcessUtilizationSample_t`: percent, and when it was sampled, in microseconds since the epoch."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("at_us", ctypes.c_ulonglong),
        ("sm", ctypes.c_uint),
        ("memory", ctypes.c_uint),
        ("encoder", ctypes.c_uint),
        ("decoder", ctypes.c_uint),
    )


class NoNvmlError(Exception):
    """
    The library is missing, or it does not work.

    Args:
        why: The reason, as the end of a sentence.

    """

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class Nvml:
    """
    The loaded and initialised library. It is never shut down, because others of the process may use it.

    Raises:
        NoNvmlError: if there is none, or it cannot be initialised.

    """

    def __init__(self, name: str) -> None:
        self._library = _load(name)
        code = self.call("nvmlInit_v2")
        if code != SUCCESS:
            raise NoNvmlError(f"{os.path.basename(name)} cannot be initialised ({self.words(code)})")  # noqa: PTH119 - a name

    def call(self, name: str, *arguments: Argument) -> int:
        """Call a function by its name, and return its answer; `NO_FUNCTION` where this library has no such one."""
        function = getattr(self._library, name, None)
        return NO_FUNCTION if function is None else int(function(*arguments))

    def words(self, code: int) -> str:
        """Return what the library calls an answer."""
        function = getattr(self._library, "nvmlErrorString", None)
        if function is None:
            return str(code)
        function.restype = ctypes.c_char_p
        return (function(code) or b"").decode(errors="replace") or str(code)

    def find(self, uuid: str) -> ctypes.c_void_p | None:
        """
        Return the handle of the GPU with this UUID, as CUDA gave it; None where NVML knows none.

        Never by its number, which `CUDA_VISIBLE_DEVICES` changes. CUDA does not say whether a UUID is that of a GPU or
        of an instance of one (MIG).
        """
        handle, ident = ctypes.c_void_p(), uuid.partition("-")[2]
        for kind in ("GPU", "MIG"):
            if self.call("nvmlDeviceGetHandleByUUID", f"{kind}-{ident}".encode(), ctypes.byref(handle)) == SUCCESS:
                return handle
        return None

    def whole(self, handle: ctypes.c_void_p) -> ctypes.c_void_p | None:
        """Return the GPU that an instance (MIG) is a part of; None where the handle is that of a GPU."""
        parent, is_mig = ctypes.c_void_p(), ctypes.c_uint()
        answer = self.call("nvmlDeviceIsMigDeviceHandle", handle, ctypes.byref(is_mig))
        if answer != SUCCESS or not is_mig.value:
            return None
        answer = self.call("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle, ctypes.byref(parent))
        return parent if answer == SUCCESS else None


def _load(name: str) -> ctypes.CDLL:
    """Load a library without holding the GIL while the system does so, where that is possible."""
    with contextlib.suppress(AttributeError, TypeError, OSError):
        dlopen = ctypes.CDLL(None).dlopen
        dlopen.restype = ctypes.c_void_p
        handle = dlopen(name.encode(), os.RTLD_NOW)
        if handle:
            return ctypes.CDLL(name, handle=handle)
    try:
        return ctypes.CDLL(name)
    except OSError:
        raise NoNvmlError(f"there is no {os.path.basename(name)}") from None  # noqa: PTH119 - as above
