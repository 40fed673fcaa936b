"""
A GPU that is done at once, for benchmarks of what follows the recording: the driver in C of `tests/native`.

Stands in for the driver and for what PyTorch says of its GPU. Its events cost less than real ones.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

from _common import ROOT

_STREAM = 0x70
_IDENT = _STREAM << 5 | 3
"""PyTorch's own streams have odd numbers."""


def install() -> None:
    """Have gpuscope find this GPU in this process."""
    import torch

    from gpuscope._cuda import cuda_device
    from gpuscope._cuda.driver import Driver

    path = Path(tempfile.mkdtemp()) / "libcuda.so.1"
    source = ROOT / "tests" / "native" / "fake_cuda.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-pthread", "-O2", "-o", str(path), str(source)], check=True)
    driver = Driver(ctypes.PyDLL(str(path)))
    stream = SimpleNamespace(cuda_stream=_STREAM, device_index=0, stream_id=_IDENT)
    for owner, name, value in (
        (cuda_device, "load_driver", lambda: driver),
        (torch.cuda, "is_initialized", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_stream", lambda *_: stream),
        (torch._C, "_cuda_getDevice", lambda: 0),
        (torch._C, "_cuda_getCurrentRawStream", lambda _: _STREAM),
    ):
        setattr(owner, name, value)
