"""
The deep look as data and as text: what bounds each stage, with the counts and times that say so.

Holds and shows; decides nothing. Figures are averages per call of the stage; times are milliseconds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gpuscope._data.plain.durations import duration
from gpuscope._data.plain.numbers import number

if TYPE_CHECKING:
    from collections.abc import Iterator

TRANSFER_BOUND, COMPUTE_BOUND = "transfer-bound", "compute-bound"
DISPATCH_BOUND, SYNC_BOUND, HOST_BOUND, UNKNOWN = "dispatch-bound", "sync-bound", "host-bound", "unknown"
PER_CALL, PROPORTIONAL = "per call", "proportional"
WORTH_LINES = 0.01
"""The share of a request from which a stage is printed with more than its name and bound."""


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Copies of one direction from or to one kind of memory."""

    direction: str
    """`HtoD` or `DtoH`."""
    pageable: bool
    """Whether the host's memory is pageable: the host waits for such a copy. With pinned memory it need not."""
    count: float
    bytes: float
    ms: float


@dataclass(frozen=True, kw_only=True)
class Counted:
    """How often one operator or CUDA call does something."""

    name: str
    count: float
    ms: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StageLook:
    """What is in a stage, including all stages inside it, and what bounds it."""

    name: str
    root: str
    """Name of the outermost stage: the kind of request."""
    depth: int
    bound: str
    """One of `transfer-`, `compute-`, `dispatch-`, `sync-` and `host-bound`, or `unknown`."""
    because: str
    overhead: str | None
    """`per call` or `proportional`: whether the cost is per kernel or copy, or grows with the size of the data."""
    next_steps: tuple[str, ...]
    calls: int
    ms: float
    """From its start on the host to the end of all its work; before the profiler was on, where that is known."""
    watched_ms: float | None
    """The same with the profiler on, where `ms` is without it."""
    by_request: tuple[tuple[float, float], ...]
    """For each request the stage's time in it, as `ms` has it, and the part of that in which the GPU worked."""
    host_ms: float
    kernels: float
    kernel_ms: float
    """Time in which at least one of its kernels runs."""
    kernel_us: float | None
    """Half of the kernels' time is in kernels longer than this, in microseconds."""
    launches: float
    """Calls that launch kernels, launches of CUDA graphs included."""
    graph_launches: float
    copies: tuple[Copies, ...]
    small_copies: tuple[Counted, ...]
    """Copies to the GPU of so few bytes that they are numbers, by the operator that makes them; most frequent first."""
    waits: tuple[Counted, ...]
    """What waits for the GPU, by operator or CUDA call; longest first. Times are of the calls."""
    compute_ms: float
    """The part of `ms` in which the GPU computes, whichever stage launched that."""
    transfer_ms: float
    """Time in which it copies between host and GPU, and nothing else."""
    dispatch_ms: float
    """Time in which it has nothing to do while the host launches, in operators and CUDA, or a launch is on its way."""
    sync_ms: float
    """Time in which it has nothing to do while the host is in a call that waits: what that costs beyond the wait."""
    host_only_ms: float
    """Time in which it has nothing to do while the host does something else."""
    computing_ms: float
    """The part of that in which the host is in operators of PyTorch that use no GPU."""
    gaps: float
    """How often the GPU ran out of work."""
    wait_ms: float
    """Time in which the host waits for kernels."""
    copy_wait_ms: float
    """Time in which the host waits for copies."""
    waits_for: str | None
    """The stage whose work the host mostly waits for, if that is another stage."""

    @property
    def idle_ms(self) -> float:
        """Time in which the GPU has nothing to do."""
        return self.dispatch_ms + self.sync_ms + self.host_only_ms


@dataclass(frozen=True, kw_only=True)
class DeepFindings:
    """All that the deep look says. Print it for a few lines per stage."""

    stages: tuple[StageLook, ...]
    """Each kind of request with its stages below it, the one that takes most time first."""
    notes: tuple[str, ...]
    """What limits all of these findings."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain data: dictionaries, lists, strings, numbers and None. `Any`, so that callers can index it."""
        return {"stages": [asdict(stage) for stage in self.stages], "notes": list(self.notes)}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(findings: DeepFindings) -> Iterator[str]:
    total_ms = {stage.root: stage.calls * stage.ms for stage in findings.stages if not stage.depth}
    said: set[str] = set()
    for stage in findings.stages:
        indent = "  " * min(stage.depth, 12)
        calls = f"{stage.calls} call{'' if stage.calls == 1 else 's'}"
        yield f"{indent}`{stage.name}`: {stage.bound} ({calls} of {duration(stage.ms)})"
        if stage.bound == UNKNOWN or stage.calls * stage.ms < WORTH_LINES * total_ms.get(stage.root, 0.0):
            continue
        yield f"{indent}    {stage.because}{f' The cost is {stage.overhead}.' if stage.overhead else ''}"
        yield f"{indent}    {'; '.join(_contents(stage))}."
        yield from (f"{indent}    - {step}" for step in stage.next_steps if step not in said)
        said.update(stage.next_steps)
    yield from findings.notes


def _contents(stage: StageLook) -> Iterator[str]:
    """Yield what is in a call of the stage, in words."""
    graphs = f", {number(stage.graph_launches)} of graphs" if stage.graph_launches else ""
    median = (
        f", half of it in longer ones than {duration(stage.kernel_us / 1e3)}" if stage.kernel_us is not None else ""
    )
    yield (
        f"Per call: {number(stage.kernels)} kernels from {number(stage.launches)} launches{graphs} "
        f"({duration(stage.kernel_ms)}{median})"
    )
    for copies in stage.copies:
        memory = "pageable" if copies.pageable else "pinned"
        yield f"{number(copies.count)} {memory} {copies.direction} ({size(copies.bytes)}, {duration(copies.ms)})"
    for small in stage.small_copies:
        yield f"{number(small.count)} tiny tensors made on the host by `{small.name}`"
    for wait in stage.waits:
        yield f"{number(wait.count)} waits in `{wait.name}` ({duration(wait.ms)})"
    yield f"the GPU has nothing to do for {duration(stage.idle_ms)}, and runs out of work {number(stage.gaps)} times"


def size(count: float) -> str:
    """Return a number of bytes as text, in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{number(count / scale)} {unit}"
    return f"{number(count)} B"
