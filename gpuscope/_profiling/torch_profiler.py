"""
The door to torch.profiler: one profile at a time, of all threads, with GPU activities if the program uses a GPU.

Never imports PyTorch: takes it from what the program has imported, as `_cuda.cuda_device` does. Nothing here is called
unless a deep look is on.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import TYPE_CHECKING

from gpuscope._errors import CannotProfileError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager
    from types import ModuleType


LEAVING_S = 0.2
"""How long threads have to leave the profiler's code when it ends."""


class Profiler:
    """
    One profile: `prepare`, `start`, `stop`, `save`, in this order, each on any thread.

    Args:
        early: the program has not run yet, so it may still come to use a GPU that it has not used so far.
        elsewhere: the requests run on other threads than the one that starts this.

    Raises:
        CannotProfileError: if PyTorch has not been imported, or is too old, or another profiler is on.

    """

    def __init__(self, *, early: bool = False, elsewhere: bool = False) -> None:
        torch = sys.modules.get("torch")
        if torch is None or not hasattr(torch, "profiler"):
            raise CannotProfileError("the program has not imported PyTorch.")
        self._torch = torch
        _refuse_a_second(torch)
        activities = [torch.profiler.ProfilerActivity.CPU]
        # The end of a profile with GPU activities waits for the GPU, and a program that uses none must not be given a
        # context by that.
        self._gpu = torch.cuda.is_initialized() or (early and torch.cuda.is_available())
        if self._gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._of_all_threads = _of_all_threads(torch)
        if self._of_all_threads is None and elsewhere:
            raise CannotProfileError("this PyTorch profiles only the thread that starts the profiler; use a newer one.")
        self._profile = torch.profiler.profile(activities=activities, experimental_config=self._of_all_threads)

    @property
    def has_gpu(self) -> bool:
        """Whether GPU activities are asked for, because the program uses a GPU."""
        return self._gpu

    def prepare(self) -> None:
        """Load and warm up what the profiler needs: a second or two the first time, without the GIL."""
        self._profile.prepare_trace()

    def start(self) -> None:
        """Begin to collect."""
        _refuse_a_second(self._torch)
        self._profile.start_trace()

    def stop(self, notes: Mapping[str, object]) -> None:
        """Wait for the GPU and end; the notes become part of the trace, as JSON."""
        for key, note in notes.items():
            self._profile.add_metadata_json(key, json.dumps(note))
        self._let_threads_leave()
        with self._on_a_gpu_in_use():
            self._profile.stop_trace()

    def _let_threads_leave(self) -> None:
        """
        Let no thread begin anything new in the profiler, and give those inside the time to leave it.

        When a profile ends, PyTorch frees what operators on other threads may be writing to. With two to four busy
        threads, one end in 5 to 300 crashed the process; with this, none of 510 did (2.13, CPU).
        """
        if self._of_all_threads is not None:
            self._profile.toggle_collection_dynamic(False, [self._torch.profiler.ProfilerActivity.CPU])
            time.sleep(LEAVING_S)  # PyTorch cannot be asked. An operator stays inside for less than a microsecond.

    def _on_a_gpu_in_use(self) -> AbstractContextManager[object]:
        """
        Wait for all GPUs that the program uses, and return a context manager that makes one of them current.

        PyTorch waits for the current GPU at the end of a profile. On a thread of ours that is GPU 0, which would be
        given a context even if the program uses another.
        """
        cuda = self._torch.cuda
        in_use = (
            [i for i in range(cuda.device_count()) if self._torch._C._cuda_hasPrimaryContext(i)] if self._gpu else []
        )
        for index in in_use:
            cuda.synchronize(index)
        guard: AbstractContextManager[object] = cuda.device(in_use[0]) if in_use else contextlib.nullcontext()
        return guard

    def save(self, path: str) -> None:
        """Write the Chrome trace. PyTorch allows it once."""
        self._profile.export_chrome_trace(path)

    def range(self, name: str) -> AbstractContextManager[object]:
        """Return a context manager that shows its block in the profile."""
        shown: AbstractContextManager[object] = self._torch.profiler.record_function(name)
        return shown


def _refuse_a_second(torch: ModuleType) -> None:
    # A profiler that starts inside another takes some of its events away: neither has them all.
    if torch.autograd.profiler._is_profiler_enabled or torch.autograd._profiler_enabled():
        raise CannotProfileError("another profiler is on (torch.profiler); end it first. The program goes on.")


def _of_all_threads(torch: ModuleType) -> object:
    """Return PyTorch's setting to profile all threads, or None: then only the thread that starts it is seen."""
    if not hasattr(torch.profiler.profile, "toggle_collection_dynamic"):
        return None  # It could not be ended safely.
    try:
        return torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    except TypeError:  # An older PyTorch.
        return None
