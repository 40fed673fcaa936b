"""
The door to torch.profiler: one at a time, of all threads, GPU activities included where the program uses a GPU.

Looks PyTorch up among what the program has imported, as `_cuda.cuda_device` does. Nothing here is called unless a
deep look is on.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from gpuscope._errors import CannotProfileError

if TYPE_CHECKING:
    from collections.abc import Mapping


LEAVING_S = 0.2


class Profiler:
    """
    One profile: `prepare`, `start`, `stop`, `save`, in this order, each on any thread.

    Args:
        early: the program has not run yet, so that whether it has used a GPU tells nothing.
        elsewhere: the requests run on other threads than the one that starts this.

    Raises:
        CannotProfileError: where PyTorch has not been imported, or is too old, or another profiler is on.

    """

    def __init__(self, *, early: bool = False, elsewhere: bool = False) -> None:
        torch = sys.modules.get("torch")
        if torch is None or not hasattr(torch, "profiler"):
            raise CannotProfileError("the program has not imported PyTorch.")
        self._torch = torch
        _refuse_a_second(torch)
        activities = [torch.profiler.ProfilerActivity.CPU]
        # With a GPU, the end of the profile waits for it: a program that uses none must not be given a context.
        self._gpu = torch.cuda.is_initialized() or (early and torch.cuda.is_available())
        if self._gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._of_all_threads = _of_all_threads(torch)
        if self._of_all_threads is None and elsewhere:
            raise CannotProfileError("this PyTorch profiles only the thread that starts the profiler; use a newer one.")
        self._profile = torch.profiler.profile(activities=activities, experimental_config=self._of_all_threads)

    def prepare(self) -> None:
        """Load and warm what the profiler needs: a second or two the first time, without the GIL."""
        self._profile.prepare_trace()

    def start(self) -> None:
        """Begin to collect."""
        _refuse_a_second(self._torch)
        self._profile.start_trace()

    def stop(self, notes: Mapping[str, Any]) -> None:
        """Wait for the GPU and end; the notes become part of the trace."""
        for key, note in notes.items():
            self._profile.add_metadata_json(key, json.dumps(note))
        self._let_threads_leave()
        with self._on_a_gpu_in_use():
            self._profile.stop_trace()

    def _let_threads_leave(self) -> None:
        """
        Have no thread begin anything more in the profiler, and give those within the time to leave it.

        PyTorch frees at the end what operators on other threads are writing to: with two to four busy threads, one end
        in five to three hundred crashed the process, and none of 510 that came after this (2.13, CPU).
        """
        if self._of_all_threads is not None:
            self._profile.toggle_collection_dynamic(False, [self._torch.profiler.ProfilerActivity.CPU])
            time.sleep(LEAVING_S)  # There is nothing to ask. An operator is within for less than a microsecond.

    def _on_a_gpu_in_use(self) -> Any:
        """
        Wait for all GPUs that the program uses, and return the guard of one of them.

        PyTorch waits for the current one at the end of a profile. On a thread of ours that is GPU 0, which would be
        given a context where the program uses another.
        """
        cuda = self._torch.cuda
        in_use = (
            [i for i in range(cuda.device_count()) if self._torch._C._cuda_hasPrimaryContext(i)] if self._gpu else []
        )
        for index in in_use:
            cuda.synchronize(index)
        return cuda.device(in_use[0]) if in_use else contextlib.nullcontext()

    def save(self, path: str) -> None:
        """Write the Chrome trace. PyTorch allows it once."""
        self._profile.export_chrome_trace(path)

    def range(self, name: str) -> Any:
        """Return a context manager that shows its block in the profile."""
        return self._torch.profiler.record_function(name)


def _refuse_a_second(torch: Any) -> None:
    # One that starts within another takes its events away: neither has them all.
    if torch.autograd.profiler._is_profiler_enabled or torch.autograd._profiler_enabled():
        raise CannotProfileError("another profiler is on (torch.profiler); end it first. The program goes on.")


def _of_all_threads(torch: Any) -> Any:
    """Return the setting without which only operators of the thread that starts the profiler are seen, or None."""
    if not hasattr(torch.profiler.profile, "toggle_collection_dynamic"):
        return None  # It could not be ended safely.
    try:
        return torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    except TypeError:  # An older PyTorch.
        return None
