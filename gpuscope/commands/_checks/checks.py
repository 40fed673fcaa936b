"""
The checks of `gpuscope doctor`: each yields findings, and what to do about those that are not right.

Prints nothing. Sends one test span, and leaves no recording, no file, and no CUDA context that PyTorch itself would
not make for the device.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import gpuscope
from gpuscope._collecting.active_exporters import automatic_exporter, exporters_in_use, uses_of_variables
from gpuscope._data.native import native
from gpuscope._data.plain.durations import duration
from gpuscope._log import logger
from gpuscope._settings.complaints import METRICS
from gpuscope._settings.config import Config, read_environment
from gpuscope._settings.environment import variables, wants_native
from gpuscope._settings.shown import shown_path, shown_setting
from gpuscope.commands._checks.finding import OK, PROBLEM, WARNING, Finding
from gpuscope.commands._checks.startup import seen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from torch import Tensor

    from gpuscope._otel.bridge import Bridge
    from gpuscope._settings.complaints import Complaint

TEST_SPAN = "gpuscope doctor"
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


class _Ears(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def _listening() -> Iterator[list[str]]:
    """Collect what the logger `gpuscope` says meanwhile, so that it is shown as the reason and not on stderr."""
    ears = _Ears()
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(ears)
    try:
        yield ears.messages
    finally:
        logger.removeHandler(ears)
        logger.propagate = propagated


def all_checks() -> tuple[Callable[[], Iterator[Finding]], ...]:
    """Return the checks, in the order in which their findings make sense."""
    return versions, devices, nvtx, startup, settings, exporters, endpoint, files, recording, asking, compiling


def versions() -> Iterator[Finding]:
    """gpuscope, Python and PyTorch."""
    yield Finding("gpuscope", OK, f"{gpuscope.__version__}, Python {platform.python_version()}")
    if native is not None:
        yield Finding("hot path", OK, "in C")
    elif not wants_native():
        yield Finding(
            "hot path",
            OK,
            "in Python, because of GPUSCOPE_NATIVE or a Python without the GIL; in C a stage would cost a third",
        )
    else:
        yield Finding(
            "hot path",
            WARNING,
            "in Python, because the part in C was not built; with it a stage would cost a third",
            "Install a C compiler and Python's headers (Debian: gcc, python3-dev), then install gpuscope again.",
        )
    try:
        import torch
    except (ImportError, OSError) as error:
        advice = "Install it: https://pytorch.org/get-started."
        yield Finding("PyTorch", PROBLEM, f"cannot be imported: {error}", advice)
        return
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield Finding("PyTorch", OK, f"{torch.__version__}, {built}")


def devices() -> Iterator[Finding]:
    """The GPUs, as PyTorch sees them."""
    torch = _torch()
    driver = _driver_version()
    if torch is not None and torch.cuda.is_available():
        count = torch.cuda.device_count()
        names = ", ".join(f"{index}: {torch.cuda.get_device_name(index)}" for index in range(count))
        yield Finding("GPU", OK, f"{names}; driver {driver or 'unknown'}")
    elif driver is None:
        yield Finding("GPU", OK, "no NVIDIA driver on this machine: stages get host spans only")
    else:
        yield Finding(
            "GPU",
            WARNING,
            f"there is an NVIDIA driver ({driver}), but PyTorch cannot use a GPU: stages get host spans only",
            "Install a PyTorch build for a CUDA version that this driver supports, and check CUDA_VISIBLE_DEVICES.",
        )


def nvtx() -> Iterator[Finding]:
    """NVTX ranges, and whether a tool listens to them."""
    from gpuscope._recording.nvtx import DOMAIN, tool_is_listening

    try:
        import nvtx
    except ImportError:
        yield Finding("NVTX", WARNING, "the package `nvtx` is missing: no ranges for Nsight tools", "pip install nvtx")
        return
    if tool_is_listening(nvtx.get_domain(DOMAIN)):
        yield Finding("NVTX", OK, f"a tool is listening; ranges are in the domain `{DOMAIN}`")
    else:
        yield Finding("NVTX", OK, "no tool is listening, so ranges cost nothing (nsys or ncu must start the program)")


def startup() -> Iterator[Finding]:
    """What Python's start does for programs that do not import gpuscope."""
    found, advice = seen(variables().get("GPUSCOPE_STARTUP", "1"))
    yield Finding("start-up", WARNING if advice else OK, found, advice)


def settings() -> Iterator[Finding]:
    """The settings in effect, and the variables that could not be understood."""
    config, complaints = read_environment()
    for complaint in (each for each in complaints if _matters(each, config)):
        yield Finding("settings", PROBLEM, complaint, complaint.advice)
    changed = [
        f"{field.name}={shown_setting(field.name, getattr(config, field.name))}"
        for field in fields(Config)
        if field.name != "mode" and getattr(config, field.name) != getattr(Config(), field.name)
    ]
    yield Finding("settings", OK, ", ".join(changed) or "all at their defaults")
    if config.mode == "absent":
        yield Finding("recording", WARNING, "off: decorated functions stay as they are", "Set GPUSCOPE=1 to record.")
    else:
        yield Finding("recording", OK, "on" if config.mode == "on" else "idle until `gpuscope.enable()`")


def exporters() -> Iterator[Finding]:
    """Where spans would go."""
    config, _ = read_environment()
    chosen = ",".join(config.exporters)
    if config.sdk_disabled:
        advice = "Unset OTEL_SDK_DISABLED to export spans."
        yield Finding("exporter", WARNING, "OTEL_SDK_DISABLED is true: `otlp` and `sdk` export nothing", advice)
    elif "auto" in config.exporters:
        bridge = _bridge()
        found = "no TracerProvider" if bridge.provider is None else "a TracerProvider"
        why = f" ({bridge.judgement().reason})" if automatic_exporter(bridge) in ("processors", "sdk") else ""
        yield Finding("exporter", OK, f"`{chosen}`; this process has {found}{why}, so: {', '.join(_names(config))}")
    elif "sdk" in config.exporters and _bridge().provider is None:
        advice = "Have the application set one, run this under `opentelemetry-instrument`, or use `auto`."
        yield Finding("exporter", WARNING, "`sdk`, but this process has no TracerProvider", advice)
    elif config.exporters == ("none",):
        yield Finding("exporter", WARNING, "`none`: spans are not exported", "Set GPUSCOPE_EXPORTER, or unset it.")
    else:
        yield Finding("exporter", OK, f"`{chosen}`")


def endpoint() -> Iterator[Finding]:
    """The OTLP endpoint, which is sent one span."""
    config, _ = read_environment()
    if "otlp" not in _names(config):
        return
    yield of_endpoint(config)


def of_endpoint(config: Config) -> Finding:
    """Send the endpoint of these settings one span."""
    from gpuscope.commands._endpoint.diagnosis import diagnose

    found = diagnose(config)
    return Finding("endpoint", OK if found.ok else PROBLEM, found.seen, found.advice)


def files() -> Iterator[Finding]:
    """The file exporter's folder. Nothing is written."""
    config, _ = read_environment()
    if "file" not in _names(config):
        return
    folder = str(Path(config.file).absolute().parent)
    if os.access(folder, os.W_OK):
        yield Finding("file", OK, f"{shown_path(config.file)}, rotated at {config.file_max_bytes:,} bytes")
    else:
        yield Finding(
            "file", PROBLEM, f"cannot write into {shown_path(folder)}", "Create the folder, or set GPUSCOPE_FILE."
        )


def recording() -> Iterator[Finding]:
    """What a stage costs here and now, and how well the GPU's clock is known."""
    from gpuscope.commands._checks import cost

    torch = _torch()
    gpu = torch if torch is not None and torch.cuda.is_available() else None
    with _listening():
        gpuscope.enable(exporters="none", interval_s=0.01)
        stage_ns = cost.stage(gpu)
        statistics = gpuscope.statistics()
        gpuscope.shutdown(1.0)
    if gpu is None:
        yield Finding("cost", OK, f"{duration(stage_ns / 1e6)} per stage on the calling thread")
        return
    pair_ns = cost.bare_pair(gpu)
    pair = f"a bare pair of events: {duration(pair_ns / 1e6)}"
    yield Finding(
        "cost",
        OK,
        f"{duration(stage_ns / 1e6)} per stage on the calling thread ({pair})",
    )
    if statistics.clock_uncertainty_ns is None:
        untimed = ", ".join(statistics.untimed) or "no reason given"
        yield Finding("clock", PROBLEM, f"the GPU's clock could not be read ({untimed})", "Stages get host spans only.")
    else:
        yield Finding("clock", OK, f"GPU spans are placed within {duration(statistics.clock_uncertainty_ns / 1e6)}")


def asking() -> Iterator[Finding]:
    """Whether streams and NVML are asked how busy the GPU is."""
    from gpuscope.commands._checks.watching import watching

    config, torch = read_environment()[0], _torch()
    with _listening():
        found = list(watching(config, torch if torch is not None and torch.cuda.is_available() else None))
    yield from found


def compiling() -> Iterator[Finding]:
    """What `torch.compile` makes of a stage, with the backend that needs no compiler."""
    torch = _torch()
    if torch is None:
        return

    def inside(x: Tensor) -> Tensor:
        with gpuscope.stage(TEST_SPAN):
            return x + 1

    before = sum(gpuscope.statistics().elided.values())
    with _listening():
        try:
            torch.compile(inside, backend="eager", fullgraph=True)(torch.zeros(1))
        except Exception as error:  # Whatever it is, the doctor shows it.
            said = str(error).strip().partition("\n")[0]
            advice = "Report it if the same function compiles without the stage."
            yield Finding("compile", WARNING, f"a function with a stage inside does not compile: {said}", advice)
            return
    counted = sum(gpuscope.statistics().elided.values()) > before
    told = "and counted in `gpuscope.statistics().elided`" if counted else "and not counted before PyTorch 2.6"
    yield Finding("compile", OK, f"a stage around a compiled callable is timed; one inside is left out, {told}")


def _torch() -> ModuleType | None:
    try:
        import torch
    except (ImportError, OSError):
        return None
    return torch


def _driver_version() -> str | None:
    try:
        first_line = _DRIVER_FILE.read_text().partition("\n")[0]
    except OSError:
        return None
    return next((word for word in first_line.split() if word[0].isdigit()), "unknown")


def _names(config: Config) -> tuple[str, ...]:
    return exporters_in_use(config, _bridge())


def _matters(complaint: Complaint, config: Config) -> bool:
    names = _names(config)
    metrics = {METRICS} if config.metrics == "otlp" or (config.metrics == "auto" and "otlp" in names) else set()
    return not complaint.uses or bool(complaint.uses & (metrics | uses_of_variables(names, _bridge())))


def _bridge() -> Bridge:
    from gpuscope._otel import bridge

    return bridge.Bridge(Config())
