"""
Is the GPU asked whether it is busy? Two checks of `gpuscope doctor`: the sampler of streams, and NVML.

With a GPU, stages are recorded for a moment, and what came of the questions is read. Without, NVML is loaded alone.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import gpuscope
from gpuscope._cuda.nvml import library
from gpuscope._cuda.nvml.watch import HZ
from gpuscope._data.native import native
from gpuscope._data.plain.gpu_use import in_words
from gpuscope._settings.environment import wants_native
from gpuscope.commands._checks.finding import OK, WARNING, Finding

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from gpuscope._data.plain.gpu_use import GpuUse
    from gpuscope._data.statistics import Statistics
    from gpuscope._settings.config import Config

_LONGEST_S = 3.0
"""To initialise NVML takes some 0.1 to 1 second, and the first answers of streams come sooner."""
_AT_LEAST_S = 0.3


def watching(config: Config, torch: ModuleType | None) -> Iterator[Finding]:
    """
    Say whether streams and NVML are asked, how often, and why not.

    Args:
        config: the settings of the environment.
        torch: PyTorch, where it can use a GPU.

    """
    asks = config.nvml or config.sample_hz > 0
    seen = None if torch is None or not asks else _recorded(config, torch)
    yield _sampler(config, seen)
    yield _nvml(config, seen)


def _recorded(config: Config, torch: ModuleType) -> Statistics:
    """Record stages until both have answered, or have said why not."""
    x, pause, began_s = torch.zeros(1, device="cuda"), threading.Event(), time.monotonic()
    gpuscope.enable(exporters="none", interval_s=0.01)
    while True:
        for _ in range(20):
            with gpuscope.stage("gpuscope doctor"):
                x.add_(1)
        gpuscope.flush(1.0)
        found, took_s = gpuscope.statistics(), time.monotonic() - began_s
        asked = config.sample_hz <= 0 or found.samples.get("asked") or found.sampler.startswith("off")
        told = not config.nvml or found.gpus or "not" in found.nvml
        if took_s > _LONGEST_S or (asked and told and took_s > _AT_LEAST_S):
            break
        pause.wait(0.02)
    gpuscope.shutdown(1.0)
    return found


def _sampler(config: Config, seen: Statistics | None) -> Finding:
    rate = f"{config.sample_hz:g} times a second"
    if config.sample_hz <= 0:
        advice = "Set GPUSCOPE_SAMPLE_HZ=200 to have streams asked whether they have work: verdicts rest on it."
        return Finding("sampler", OK, "off, because GPUSCOPE_SAMPLE_HZ is 0", advice)
    if not hasattr(native, "StreamSampler"):
        why = (
            "GPUSCOPE_NATIVE or a Python without the GIL keeps them out" if not wants_native() else "they are not built"
        )
        advice = "Install a C compiler and gpuscope again, or unset GPUSCOPE_NATIVE."
        return Finding("sampler", WARNING, f"does not run: it needs the parts in C, and {why}", advice)
    if seen is None:
        return Finding("sampler", OK, f"would ask streams {rate}; there is no GPU to ask here")
    asked = seen.samples.get("asked", 0)
    if seen.sampler.startswith("off") or not asked:
        advice = "Verdicts rest on events alone. Report it if PyTorch's own streams are used here."
        return Finding("sampler", WARNING, f"does not run: {seen.sampler or 'no stream was asked'}", advice)
    return Finding("sampler", OK, f"asks streams {rate}; {asked:,} answers in this check")


def _nvml(config: Config, seen: Statistics | None) -> Finding:
    if not config.nvml:
        return Finding("NVML", OK, "not asked: GPUSCOPE_NVML=1 switches it on")
    if seen is None:
        return _alone()
    if not seen.gpus:
        why = seen.nvml.removeprefix("not at all: ") or "it gave no reading in time"
        advice = "In a container, have the driver's `utility` capability: NVIDIA_DRIVER_CAPABILITIES=compute,utility."
        return Finding("NVML", WARNING, f"not asked: {why}", advice)
    use = "; ".join(f"{in_words(each)}{_others(each)}" for each in seen.gpus)
    return Finding("NVML", OK, f"asked {seen.nvml}: {use}")


def _others(use: GpuUse) -> str:
    return ", other processes not shown" if "hidden" in use.others_s else ""


def _alone() -> Finding:
    """Load it where there is no GPU for stages."""
    try:
        library.Nvml(library.LIBRARY)
    except library.NoNvmlError as error:
        return Finding("NVML", OK, f"not asked, because there is no GPU for stages here; {error.why}")
    return Finding("NVML", OK, f"is there, and would be asked {HZ:g} times a second; there is no GPU for stages here")
