"""
A `Recording` as the data of the HTML timeline: values that JSON can hold, in columns rather than objects.

Decides what the page is told; draws nothing and writes no file. Times are nanoseconds since the recording's start.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, metadata
from typing import TYPE_CHECKING

import numpy as np

from gpuscope._data.batch import RowFlag
from gpuscope._version import __version__
from gpuscope.analysis._structure.intervals import gaps
from gpuscope.analysis._structure.own_time import own_ns
from gpuscope.analysis._structure.replays import outside_ns
from gpuscope.analysis._viewers.timeline_lanes import devices, gpu_rows, host_rows, leaves, thread_gaps
from gpuscope.analysis._viewers.timeline_stages import stage_lines
from gpuscope.analysis._viewers.timeline_usual import usual_work
from gpuscope.analysis.figures import figures

if TYPE_CHECKING:
    from gpuscope.analysis._plain import Plain
    from gpuscope.analysis._structure.intervals import Intervals
    from gpuscope.analysis._viewers.timeline_lanes import Device
    from gpuscope.analysis.figures import Figures
    from gpuscope.analysis.recording import Recording

TEXT_LENGTH = 2_000
"""Longer values of attributes are cut."""


def timeline_data(
    recording: Recording, findings: Mapping[str, Plain] | None = None, figured: Figures | None = None
) -> dict[str, Plain]:
    """
    Return all that the page shows.

    Args:
        recording: Any recording; it may be empty.
        findings: The verdicts as plain data, or None if nothing was judged.
        figured: The recording's figures, or None to compute them here.

    """
    start_ns = int(recording.host_start_ns.min()) if recording.stage.size else 0
    figured = figured or figures(recording)
    return {
        "version": __version__,
        "guide": _guide(),
        "start_ns": str(start_ns),  # text: a number in JavaScript holds 53 bits
        "names": recording.names,
        "processes": [{"name": each.name, "resource": _texts(each.resource)} for each in recording.processes],
        "threads": [
            {
                "process": each.process,
                "name": each.name,
                "ident": str(each.ident),
                "gaps": _intervals(thread_gaps(recording, number), start_ns),
            }
            for number, each in enumerate(recording.threads)
        ],
        "streams": [{"process": each.process, "handle": hex(each.handle)} for each in recording.streams],
        "devices": [_device(each, start_ns) for each in devices(recording)],
        "columns": _columns(recording, start_ns),
        "outside": {str(row): ns for row, ns in outside_ns(recording).items()},
        "traces": [recording.trace_id[row] for row in np.flatnonzero(recording.parent < 0)],
        "attributes": {str(row): _texts(attributes) for row, attributes in recording.attributes.items()},
        "stages": list(stage_lines(recording, figured.stages)),
        "usual": list(usual_work(recording)),
        "requests": [asdict(each) for each in figured.requests],
        "batches": _batches(recording),
        "losses": _losses(recording),
        "clock": _clock(recording),
        "findings": _finite(findings),
    }


def _guide() -> str:
    """Return where the page on reading a report is, as the package says; empty where it does not."""
    with contextlib.suppress(PackageNotFoundError):
        for line in metadata("gpuscope").get_all("Project-URL") or []:
            label, _, url = line.partition(", ")
            if label == "Reading the report" and url.startswith("https://"):
                return str(url)
    return ""


def _columns(recording: Recording, start_ns: int) -> dict[str, list[int]]:
    timed = recording.stream >= 0
    number = np.arange(len(timed))
    columns = {
        "stage": recording.stage,
        "thread": recording.thread,
        "stream": recording.stream,
        "parent": np.where(recording.parent >= 0, number - recording.parent, 0),  # how many rows above; 0 for a root
        "step": np.diff(recording.host_start_ns, prepend=start_ns),
        "host": recording.host_end_ns - recording.host_start_ns,
        "delay": np.where(timed, recording.gpu_start_ns - recording.host_start_ns, 0),
        "gpu": np.where(timed, recording.gpu_end_ns - recording.gpu_start_ns, 0),
        "uncertainty": recording.uncertainty_ns,
        "flags": recording.flags,
        "error": recording.error.astype(np.int8),
        "leaf": leaves(recording).astype(np.int8),
        "own": own_ns(recording),
        "host_row": host_rows(recording),
        "gpu_row": gpu_rows(recording),
    }
    return {name: column.tolist() for name, column in columns.items()}


def _batches(recording: Recording) -> dict[str, list[int]]:
    """Return which stages worked for which others, both by their rows."""
    links = recording.batches.links
    here = (links.batch >= 0) & (links.member >= 0)
    return {"batch": links.batch[here].tolist(), "member": links.member[here].tolist()}


def _device(device: Device, start_ns: int) -> dict[str, Plain]:
    return {
        "index": device.index,
        "name": device.name,
        "uuid": device.uuid,
        "streams": device.streams,
        "start": device.start_ns - start_ns,
        "end": device.end_ns - start_ns,
        "idle": _intervals(gaps(device.covered), start_ns),
        "queued": _intervals(device.queued, start_ns),
    }


def _intervals(intervals: Intervals, start_ns: int) -> dict[str, list[int]]:
    return {"start": (intervals.start - start_ns).tolist(), "end": (intervals.end - start_ns).tolist()}


def _losses(recording: Recording) -> dict[str, Plain]:
    losses = recording.losses.missing()
    return {
        "skipped_lines": dict(losses.skipped_lines),
        "orphans": losses.orphans,
        "dropped": dict(losses.dropped),
        "lost": dict(losses.lost),
        "untimed": dict(losses.untimed),
        "captured": _count(recording, RowFlag.CAPTURED),
        "given_up": _count(recording, RowFlag.GIVEN_UP),
        "host_only": int((recording.stream < 0).sum()),
    }


def _clock(recording: Recording) -> dict[str, Plain] | None:
    """Return how uncertain the places of GPU times are, and how many had to be moved; None without GPU times."""
    uncertainty_ns = recording.uncertainty_ns[recording.stream >= 0]
    if not uncertainty_ns.size:
        return None
    median, worst = np.percentile(uncertainty_ns, (50, 100)).tolist()
    return {"median": median, "worst": worst, "clamped": _count(recording, RowFlag.CLAMPED)}


def _count(recording: Recording, flag: RowFlag) -> int:
    return int(((recording.flags & flag) != 0).sum())


def _finite(value: Plain) -> Plain:
    """Return plain data with None in place of NaN and infinity, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _texts(attributes: Mapping[str, object]) -> dict[str, str]:
    """Return every value as text, because JSON has no infinity, and JavaScript has no large integers."""
    return {str(key): str(value)[:TEXT_LENGTH] for key, value in attributes.items()}
