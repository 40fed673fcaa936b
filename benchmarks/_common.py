"""
What every benchmark shares: facts about the machine, interleaved rounds, percentiles, a table, goals, a JSON file.

Measures nothing itself, and creates no CUDA context.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "nvtx",
    "wrapt",
    "cuda-bindings",
    "opentelemetry-sdk",
    "opentelemetry-exporter-otlp-proto-http",
)


@dataclass(frozen=True)
class Goal:
    """One promise, the figure measured for it, and whether it holds."""

    text: str
    value: float
    limit: float
    unit: str = ""
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        bound = "at least" if self.at_least else "at most"
        verdict = "met" if self.met else "NOT MET"
        return f"{verdict:8s}{self.text}: {self.value:.4g}{self.unit} ({bound} {self.limit:g}{self.unit})"


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description.strip().splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="few short rounds, to see that it runs; the figures mean nothing"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON file")
    return parser


def interleave(
    cases: Mapping[str, Callable[[], T]], rounds: int, *, warmup: int = 1, seed: int = 0
) -> dict[str, list[T]]:
    """Run every case once per round, in a new random order each time; the `warmup` rounds are not kept."""
    order, shuffler = list(cases), random.Random(seed)
    raw: dict[str, list[T]] = {name: [] for name in order}
    for done in range(warmup + rounds):
        shuffler.shuffle(order)
        for name in order:
            result = cases[name]()
            if done >= warmup:
                raw[name].append(result)
    return raw


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values)) if values else float("nan")


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed; `ordered` is sorted."""
    if not ordered:
        return float("nan")
    rank = -int(-(share * len(ordered)) // 1)
    return float(ordered[min(len(ordered), max(1, rank)) - 1])


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns aligned: the first to the left, figures to the right."""
    cells = [[cell if isinstance(cell, str) else f"{cell:,.2f}" for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(headers), *cells]) for i in range(len(headers))]
    lines = [list(headers), ["-" * width for width in widths], *cells]
    return "\n".join(_aligned(line, widths) for line in lines)


def facts() -> dict[str, Any]:
    """What the figures depend on."""
    from gpuscope._data.native import native

    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "device": _device(),
        "hot_path": "Python" if native is None else "C",
    }


def save(name: str, out: Path, *, goals: Sequence[Goal] = (), **content: Any) -> Path:
    """Print the goals, which every benchmark prints last, and write `NAME.json` with the machine's facts."""
    for goal in goals:
        print(goal)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    record = {
        "benchmark": name,
        "machine": facts(),
        "goals": [{**asdict(goal), "met": goal.met} for goal in goals],
        **content,
    }
    path.write_text(re.sub(r"\[[-+\d.\seE,]+\]", _on_one_line, json.dumps(record, indent=1)) + "\n")
    print(f"raw rounds: {path.name}")
    return path


def environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """The variables of a new process: of ours and OpenTelemetry's only `changes`; this checkout can be imported."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("GPUSCOPE", "OTEL_")) and k not in changes}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environ.get("PYTHONPATH")]))
    return environ | {variable: value for variable, value in changes.items() if value is not None}


def child(arguments: Sequence[str], changes: Mapping[str, str | None], timeout_s: float = 580) -> Any:
    """Run this Python on `arguments` with variables changed (None: removed); return its last line as JSON."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment(changes),
        stdout=subprocess.PIPE,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"`{' '.join(arguments)}` exited with {done.returncode}:\n{done.stdout}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def has_cuda() -> bool:
    """Whether CUDA can be used; asks the driver without creating a context."""
    import torch

    return torch.cuda.is_available()


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    cells = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
    return "  ".join(cells).rstrip()


def _on_one_line(numbers: re.Match[str]) -> str:
    return re.sub(r"\s+", " ", numbers.group()).replace("[ ", "[").replace(" ]", "]")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _device() -> dict[str, Any] | None:
    if not has_cuda():
        return None
    import torch

    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False).stdout
    except OSError:
        answer = ""
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    return {"count": torch.cuda.device_count(), "cuda": torch.version.cuda, "devices": lines}
