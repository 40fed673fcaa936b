"""
Verdicts as data: what bounds each stage and each kind of request, with the figures that say so.

Holds and shows; decides nothing. Times are milliseconds, shares are from 0 to 1.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuscope.analysis._verdicts.cold import ColdCall
    from gpuscope.analysis._verdicts.fit import Fit

GPU_BOUND, CPU_BOUND, PIPELINE_BOUND, UNKNOWN = "gpu-bound", "cpu-bound", "pipeline-bound", "unknown"
WORTH_LINES = 0.01
"""The part of a request from which on a stage's verdict is printed with its evidence."""


@dataclass(frozen=True, kw_only=True)
class IdleCause:
    """Why the GPU had nothing to do, in one place of a request."""

    cause: str
    """`host not ready`, `waiting for a copy`, `waiting at a synchronisation`, `between requests`, or `unclear`."""
    stage: str | None
    """The innermost stage that the host was in; None between requests."""
    ms: float
    """A request, on average."""
    share: float
    """Of the request's duration; between requests, of the time from one to the next."""


@dataclass(frozen=True, kw_only=True)
class StageVerdict:
    """What bounds a stage within one kind of request."""

    name: str
    root: str
    """Name of the outermost stage: the kind of request."""
    verdict: str
    """`gpu-bound`, `cpu-bound`, `pipeline-bound` or `unknown`."""
    because: str
    """A sentence: the evidence, or why there is no verdict."""
    assumes: str | None
    """What the verdict rests on and records cannot show."""
    calls: int
    """How many calls were judged; nothing below is of others."""
    warmup_calls: int
    """Calls left out: warm-up, or with warm-up inside."""
    cold_calls: int
    """Calls left out: late cold ones, or with such inside."""
    duration_ms: float | None
    """Median, from the host's start to the end of all its work; the following ones are medians too."""
    host_ms: float | None
    """None, as are the times and shares of the host below, of a stage in a CUDA graph, whose duration is the GPU's."""
    gpu_ms: float | None
    """Between its two events on the stream: not the time that the GPU was busy."""
    launch_to_start_ms: float | None
    lag_ms: float | None
    """How long after the host the GPU ended."""
    wait_share: float | None
    """The part of the duration in which the host waited for the GPU or for a copy."""
    idle_share: float | None
    """The part of the duration in which the GPU had nothing to do, as far as is known."""
    request_share: float | None
    """Host time of the stage as a part of the request's duration."""
    gain_ms: float | None
    """
    What a request would save at most if what bounds the stage took no time. Only time that nothing else is known to
    have filled is counted. Gains of several stages may be the same time: do not add them.
    """
    gain_share: float | None
    """Of the request's duration; where the time between requests is what bounds, of the time from one to the next."""
    waits_for: str | None
    """The stage whose GPU work the host mostly waits for in this one."""
    cost: Fit | None
    """Cost per call and per item, where the data can bear it."""
    no_cost: str
    """Why there is none."""
    next_steps: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RequestVerdict(StageVerdict):
    """What bounds a kind of request: an outermost stage and all inside it."""

    idle: tuple[IdleCause, ...]
    """Where the GPU had nothing to do, longest first."""
    period_ms: float | None
    """Median time from the start of a request to the start of the next on its thread."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that can be said about a recording. Print it for a few lines a verdict."""

    requests: tuple[RequestVerdict, ...]
    """By total time, longest first; so are stages within their kind of request."""
    stages: tuple[StageVerdict, ...]
    cold: tuple[ColdCall, ...]
    """Late cold calls: left out of all figures."""
    notes: tuple[str, ...]
    """What limits all verdicts."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain data: dictionaries, lists, strings, numbers and None."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _lines(findings: Findings) -> Iterator[str]:
    if not findings.requests:
        yield "No stages, no verdicts."
    for request in findings.requests:
        yield from _verdict(request, "request", "")
        for cause in request.idle[:3]:
            where = f" in `{cause.stage}`" if cause.stage else ""
            yield f"    GPU without work: {cause.ms:,.3f} ms ({cause.share:.0%}){where}, {cause.cause}"
        for stage in findings.stages:
            if stage.root == request.name:
                yield from _verdict(stage, "call", "  ")
    for call in findings.cold:
        yield f"cold: `{call.name}` {call.ms:,.3f} ms instead of {call.usual_ms:,.3f} ms, {call.because}; left out"
    yield from findings.notes


def _verdict(verdict: StageVerdict, unit: str, indent: str) -> Iterator[str]:
    counted = f"{verdict.calls} {unit}{'' if verdict.calls == 1 else 's'}"
    took = "" if verdict.duration_ms is None else f" of {verdict.duration_ms:,.3f} ms"
    condition = f", assuming {verdict.assumes}" if verdict.assumes else ""
    yield f"{indent}`{verdict.name}`: {verdict.verdict}{condition} ({counted}{took})"
    if verdict.request_share is not None and verdict.request_share < WORTH_LINES:
        return
    yield f"{indent}    {verdict.because}"
    if verdict.gain_ms is not None and verdict.gain_share is not None:
        yield f"{indent}    At most {verdict.gain_ms:,.3f} ms a request to gain ({verdict.gain_share:.0%})."
    if verdict.cost is not None:
        cost = verdict.cost
        yield f"{indent}    {cost.fixed_ms:,.3f} ms a call and {cost.per_item_ms:,.6f} ms for each of `{cost.size}`."
    for step in verdict.next_steps:
        yield f"{indent}    - {step}"
