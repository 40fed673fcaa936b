"""
Reads a Chrome trace of torch.profiler (Kineto): its stages, operators, CUDA calls and GPU work.

Judges nothing, and needs neither torch nor a GPU. Categories and arguments are those that Kineto writes:
https://github.com/pytorch/kineto, `libkineto/src/CuptiActivity.cpp`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

JsonObject: TypeAlias = "Mapping[str, Any]"
"""A JSON object from a file, values unchecked. `Any`, because whoever reads one catches what a wrong type raises."""
KEY = "gpuscope"
"""Where gpuscope notes in the trace which annotations are stages, and which of them were outermost."""
KERNEL, COPY, ON_DEVICE = "kernel", "copy", "memory on the GPU"
_COPY = re.compile(r"Memcpy (\w+) \((\w+) -> (\w+)\)")
_END_OF_TIME = 2**62
"""No number of nanoseconds or bytes is as large."""
_BETWEEN_HOST_AND_GPU = ("HtoD", "DtoH")

HostThread: TypeAlias = tuple[object, object]
"""A thread of the host: ids of its process and of itself, as the trace has them."""


class Range(NamedTuple):
    """An annotation or an operator on a host thread. Times are nanoseconds on the trace's clock, here and below."""

    name: str
    thread: HostThread
    start_ns: int
    end_ns: int
    finished: bool = True


class Call(NamedTuple):
    """A call of the CUDA runtime or driver."""

    name: str
    thread: HostThread
    start_ns: int
    end_ns: int
    correlation: int
    """The same number as that of the GPU work that the call launched; -1 for none."""


class Work(NamedTuple):
    """A piece of GPU work: a kernel, a copy between host and GPU, or a fill or copy within the GPU's memory."""

    kind: str
    name: str
    start_ns: int
    end_ns: int
    correlation: int
    bytes: int = 0
    direction: str = ""
    """`HtoD` or `DtoH`, for copies between host and GPU."""
    pageable: bool = False
    """Whether the host's side of such a copy is not pinned."""


@dataclass
class Trace:
    """What is in a trace."""

    stages: list[Range] = field(default_factory=list)
    requests: Collection[str] | None = None
    """Names of outermost stages, where the trace says so."""
    operators: list[Range] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    of_the_host: bool = False
    """Whether the trace says that the program used no GPU."""
    unwatched_ns: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """How long the host usually was in each stage before the look, by (outermost stage, stage)."""
    malformed: int = 0
    """Events that could not be read."""


def parse(trace: JsonObject) -> Trace:
    """
    Read a trace as `json.load` returns it.

    Without gpuscope's note, every `record_function` of the program is taken for a stage.

    Raises:
        ValueError: if this is not a Chrome trace.

    """
    events = trace.get("traceEvents") if hasattr(trace, "get") else None
    if not isinstance(events, list):
        raise ValueError(  # noqa: TRY004 - it is about the content of a file
            'This is not a Chrome trace: expected {"traceEvents": [...]}, as torch.profiler writes it.'
        )
    note = trace.get(KEY)
    names = _names(note, "stages")
    of_the_host = isinstance(note, dict) and note.get("gpu") is False
    found = Trace(
        requests=_names(note, "requests"), of_the_host=of_the_host, unwatched_ns=_lengths(note) if note else {}
    )
    for event in events:
        try:
            if event.get("ph") == "X":
                _add(found, event, names)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            found.malformed += 1
    return found


def _names(note: object, key: str) -> Collection[str] | None:
    names = note.get(key) if isinstance(note, dict) else None
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else None


def _lengths(note: object) -> dict[tuple[str, str], int]:
    """Return the lengths that were noted; none where anything is not as gpuscope writes it."""
    try:
        return {(str(root), str(name)): int(ns) for root, name, ns in note["unwatched"] if 0 < ns < _END_OF_TIME}  # type: ignore[index]
    except (KeyError, TypeError, ValueError, OverflowError):
        return {}


def _add(found: Trace, event: JsonObject, names: Collection[str] | None) -> None:
    category, name, thread = event.get("cat"), event["name"], (event.get("pid"), event.get("tid"))
    start_ns = round(float(event["ts"]) * 1e3)
    end_ns = start_ns + round(float(event.get("dur", 0)) * 1e3)
    if not isinstance(name, str) or not -_END_OF_TIME < start_ns <= end_ns < _END_OF_TIME:
        raise ValueError(name)
    hash(thread)  # Ids may be numbers or texts.
    arguments = event.get("args", {})
    if category == "user_annotation":
        if name in names if names is not None else not name.startswith("ProfilerStep#"):
            found.stages.append(Range(name, thread, start_ns, end_ns, arguments.get("finished", True) is not False))
    elif category == "cpu_op":
        found.operators.append(Range(name, thread, start_ns, end_ns))
    elif category in ("cuda_runtime", "cuda_driver"):
        found.calls.append(Call(name, thread, start_ns, end_ns, int(arguments.get("correlation", -1))))
    elif category in ("kernel", "gpu_memset", "gpu_memcpy"):
        found.work.append(_work(category, name, start_ns, end_ns, arguments))


def _work(category: str, name: str, start_ns: int, end_ns: int, arguments: JsonObject) -> Work:
    correlation, size = int(arguments.get("correlation", -1)), int(arguments.get("bytes", 0))
    if not 0 <= size < _END_OF_TIME:
        raise ValueError(size)
    parts = _COPY.match(name)
    if parts and parts[1] in _BETWEEN_HOST_AND_GPU:
        pageable = "pageable" in (parts[2].lower(), parts[3].lower())
        return Work(COPY, name, start_ns, end_ns, correlation, size, parts[1], pageable)
    return Work(KERNEL if category == "kernel" else ON_DEVICE, name, start_ns, end_ns, correlation, size)
