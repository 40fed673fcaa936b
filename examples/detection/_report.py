"""
The recordings of the three versions, read back and compared by gpuscope's own analysis.

Only arranges figures, all of which are from `gpuscope.analysis`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gpuscope.analysis.compare import compare
from gpuscope.analysis.figures import figures
from gpuscope.analysis.read import read

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from gpuscope.analysis.compare import Change
    from gpuscope.analysis.recording import Recording

STAGES = ("preprocess", "inference", "postprocess")
LANES = ("host", "gpu")
PUBLISHED_MS = {"preprocess": (2.47, 1.70), "postprocess": (1.11, 0.74)}
"""Before and after, as published for another pipeline of this kind on other hardware."""
ON_HOST_ALONE = {"with_helpers": ("preprocess", "postprocess")}
"""Stages that launch nothing: between their events the stream does the work of other requests."""


def measured(paths: Mapping[str, Path]) -> dict[str, Any]:
    """Return each version's medians, their change from the first version's, and what that does to a whole request."""
    recordings = {name: read([path]) for name, path in paths.items()}
    first = next(iter(recordings.values()))
    return {
        name: _version(recording, None if recording is first else first, ON_HOST_ALONE.get(name, ()))
        for name, recording in recordings.items()
    }


def _version(recording: Recording, before: Recording | None, on_host_alone: Collection[str]) -> dict[str, Any]:
    medians, old = _medians(recording), _medians(before) if before else {}
    for stage in on_host_alone:
        medians[stage]["gpu_ms"] = None
    return {
        "request_ms": medians["request"]["host_ms"],
        "request": asdict(_request(before, recording)) if before else None,
        "stages": {stage: medians[stage] | _changes(old.get(stage, {}), medians[stage]) for stage in STAGES},
    }


def _medians(recording: Recording) -> dict[str, dict[str, float | None]]:
    """Return the medians of each stage, whichever stages are around it."""
    return {
        stage.name: {"host_ms": stage.host_ms.p50, "gpu_ms": stage.gpu_ms.p50 if stage.gpu_ms else None}
        for stage in figures(recording).stages
    }


def _changes(before: dict[str, float | None], after: dict[str, float | None]) -> dict[str, float | None]:
    changes = {}
    for lane in LANES:
        old, new = before.get(f"{lane}_ms"), after[f"{lane}_ms"]
        changes[f"{lane}_change"] = new / old - 1 if old and new is not None else None
    return changes


def _request(before: Recording, after: Recording) -> Change:
    """
    Return the change of the time from one answer to the next.

    That is, of a request on the host. The end of its GPU work, which `gpuscope compare` includes, is of no use here:
    where requests overlap, some of that work belongs to the next request.
    """
    stages = compare(before, after).stages
    return next(each.change for each in stages if each.name == "request" and each.lane == "host")


def lines(figures_of: Mapping[str, Any], device: str) -> Iterator[str]:
    """Yield the report, line by line."""
    yield f"Medians in milliseconds, on {device}; changes are from the first version."
    yield ""
    yield f"{'version':14}{'stage':14}{'host':>9}{'change':>9}{'GPU':>9}{'change':>9}"
    for name, version in figures_of.items():
        for stage, its in version["stages"].items():
            cells = "".join(_ms(its[f"{lane}_ms"]) + _percent(its[f"{lane}_change"]) for lane in LANES)
            yield f"{name:14}{stage:14}{cells}"
    yield ""
    yield "From one answer to the next (`request`, on the host):"
    for name, version in figures_of.items():
        yield f"{name:14}{version['request_ms']:9.3f} ms   {_effect(version['request'])}".rstrip()
    yield ""
    yield from _published()


def _effect(change: dict[str, Any] | None) -> str:
    """Say how a whole request changed, with the interval of the bootstrap."""
    if change is None:
        return ""
    interval = ""
    if change["low_ms"] is not None and change["before_ms"]:
        low, high = (100 * change[end] / change["before_ms"] for end in ("low_ms", "high_ms"))
        interval = f" (99 % interval {low:+.1f} .. {high:+.1f} %)"
    before, after = change["calls"]
    return f"{_percent(change['relative']).strip()}{interval}: {change['verdict']}, from {before} and {after} requests"


def _published() -> Iterator[str]:
    yield "For comparison, published by others for their own pipeline and GPU (not measured here):"
    for stage, (before, after) in PUBLISHED_MS.items():
        yield f"{stage:14}{before:.2f} -> {after:.2f} ms ({100 * (1 - after / before):.0f} % less)"


def _ms(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.3f}':>9}"


def _percent(change: float | None) -> str:
    return f"{'-' if change is None else f'{100 * change:+.1f} %':>9}"
