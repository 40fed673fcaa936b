"""
Verdicts as data: what bounds each stage and each kind of request, and the figures that say so.

Holds verdicts and prints them; decides nothing. Times are milliseconds, shares are from 0 to 1.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from gpuscope._data.plain.durations import duration
from gpuscope.analysis._verdicts.cold import ColdCall, cold_lines

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuscope.analysis._busy.looked import LookedAt
    from gpuscope.analysis._plain import Plain, PlainDict
    from gpuscope.analysis._verdicts.fit import Fit

GPU_BOUND, CPU_BOUND, PIPELINE_BOUND, UNKNOWN = "gpu-bound", "cpu-bound", "pipeline-bound", "unknown"
MOST_ANSWERS = 10
"""Kinds of request in the summary, and below that those with more than one line."""
MOST_IN_FULL = 3
WORTH_LINES = 0.01
"""A stage's verdict is printed with its evidence if the stage takes at least this part of the request."""


@dataclass(frozen=True, kw_only=True)
class IdleCause:
    """Why the GPU had nothing to do at one place in a request."""

    cause: str
    """`host not ready`, `waiting for a copy`, `waiting at a synchronisation`, `between requests`, or `unclear`."""
    stage: str | None
    """The innermost stage that the host was in; None between requests."""
    ms: float
    """Per request, on average."""
    share: float
    """Part of the request's duration; between requests, of the time from the start of one to the start of the next."""


@dataclass(frozen=True, kw_only=True)
class StageVerdict:
    """What bounds a stage within one kind of request."""

    name: str
    root: str
    """Name of the outermost stage: the kind of request."""
    verdict: str
    """`gpu-bound`, `cpu-bound`, `pipeline-bound` or `unknown`."""
    because: str
    """The evidence, or why there is no verdict, as a sentence."""
    assumes: str | None
    """What the verdict takes for granted because records cannot show it; it follows the word `assuming`."""
    calls: int
    """How many calls were judged. All figures below are of these calls."""
    warmup_calls: int
    """Calls left out because they are warm-up calls, contain one, or are in a warm-up request."""
    cold_calls: int
    """Calls left out because they are late cold calls or contain one."""
    duration_ms: float | None
    """From the host's start to the end of all the work. This and the following times are medians."""
    host_ms: float | None
    """None for a stage in a CUDA graph, as are the other figures of the host: its duration is the GPU's."""
    gpu_ms: float | None
    """Time between its two events on the stream, which is not the time that the GPU was busy."""
    launch_to_start_ms: float | None
    lag_ms: float | None
    """Time from the host's end to the GPU's; negative if the GPU ended first."""
    wait_share: float | None
    """The part of the duration in which the host waited for the GPU or for a copy."""
    idle_share: float | None
    """The part of the duration in which the GPU had nothing to do, as far as is known."""
    busy_share: float | None
    """
    The part of the duration in which the GPU had work, queued or running, as its streams answered when asked. Kernels
    ran for less than that. None with too few answers, and without any.
    """
    busy_range: tuple[float, float] | None
    """The 95 % interval of that, over requests."""
    answers: int
    """How many answers it rests on, and of how many requests."""
    answered_requests: int
    witness: str
    """
    What the shares rest on: `answers` of the streams; the `slope` of GPU intervals over host times, beside events; or
    `events` alone.
    """
    looked: LookedAt | None
    """What deep looks saw of it, where some were taken now and then."""
    request_share: float | None
    """Host time of the stage as a part of the durations of its requests."""
    gain_ms: float | None
    """
    What a request would save at most if the thing that bounds the stage took no time. It counts only time that nothing
    else is known to have filled. Gains of several stages may be the same time: do not add them.
    """
    gain_share: float | None
    """Part of the request's duration; if time between requests is the bottleneck, of the time from one to the next."""
    waits_for: str | None
    """The stage whose GPU work the host waits longest for in this one."""
    cost: Fit | None
    """Cost per call and per item, if the calls follow a straight line."""
    no_cost: str
    """Why there is no `cost`; empty if there is one."""
    next_steps: tuple[str, ...]
    """One or two things to try, the most promising first."""


@dataclass(frozen=True, kw_only=True)
class RequestVerdict(StageVerdict):
    """What bounds a kind of request: an outermost stage and all inside it."""

    idle: tuple[IdleCause, ...]
    """Where the GPU had nothing to do, longest first."""
    period_ms: float | None
    """Median time from the start of a request to the start of the next on its thread."""
    gain_of: str = "request"
    """What the gain is a part of: the `request`, or the `period` from the start of one to the start of the next."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer for one kind of request, in words."""

    name: str
    headline: str
    """What bounds it, how long it takes, what there is to gain."""
    try_first: str | None
    more: tuple[str, ...]
    """Further sentences: how much requests differ, where the slowest spent its time, what an item costs."""
    on_gpu: bool
    """Whether any stage of these requests has GPU times."""
    median_row: int
    """The request of median duration: its row in the recording."""
    slowest_row: int
    """The slowest request that is judged."""

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        """Yield the headline, and below it what to try first and the rest."""
        yield self.headline
        if self.try_first is not None:
            yield f"  Try first: {self.try_first}"
        yield from (f"  {sentence}" for sentence in self.more)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that can be said about a recording. Print it for the answers, and a few lines per verdict."""

    answers: tuple[Answer, ...]
    """One per kind of request, in the order of `requests`."""
    requests: tuple[RequestVerdict, ...]
    """Longest total time first."""
    stages: tuple[StageVerdict, ...]
    """In the order of their kinds of request, and within a kind in the order in which they run."""
    cold: tuple[ColdCall, ...]
    """Late cold calls: left out of all figures."""
    notes: tuple[str, ...]
    """Sentences on what limits all verdicts."""
    no_gpu: str = ""
    """A sentence, if the recording has no GPU times."""
    top: tuple[str, ...] = ()
    """Sentences to read before all others: which requests these are, and what stalled."""

    def as_dict(self) -> PlainDict:
        """Return plain data: dictionaries, lists, strings, numbers, booleans and None."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    def __str__(self) -> str:
        return "\n".join([*self.summary(), "", *self.details()]).strip()

    def summary(self) -> Iterator[str]:
        """Yield the answers in lines, and what limits all of them."""
        if not self.answers:
            yield "No stages, no verdicts."
        yield from self.top
        if self.no_gpu:
            yield self.no_gpu
        for number, each in enumerate(self.answers[:MOST_ANSWERS]):
            yield from each.lines() if number < MOST_IN_FULL else [each.headline]
        if len(self.answers) > MOST_ANSWERS:
            yield f"And {len(self.answers) - MOST_ANSWERS:,} more kinds of request, which take less time altogether."

    def details(self) -> Iterator[str]:
        """Yield the verdicts in lines, with their evidence, the late cold calls, and the notes."""
        on_gpu = {each.name for each in self.answers if each.on_gpu}
        said: set[str] = set()
        for request in self.requests:
            if request.name in on_gpu:
                yield from _verdict(request, "request", "", said)
                yield from (_idle(cause) for cause in request.idle[:3] if cause.share >= WORTH_LINES)
                for stage in self.stages:
                    if stage.root == request.name:
                        yield from _verdict(stage, "call", "  ", said)
        yield from cold_lines(self.cold)
        yield from self.notes


def _plain(value: Plain) -> Plain:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _idle(cause: IdleCause) -> str:
    where = f" in `{cause.stage}`" if cause.stage else ""
    what = "GPU perhaps without work" if cause.cause == "unclear" else "GPU without work"
    return f"    {what}: {duration(cause.ms)} ({cause.share:.0%}){where}, {cause.cause}"


def _verdict(verdict: StageVerdict, unit: str, indent: str, said: set[str]) -> Iterator[str]:
    """Yield a verdict in lines. Advice is given once, where it is due first."""
    counted = f"{verdict.calls:,} {unit}{'' if verdict.calls == 1 else 's'}"
    took = "" if verdict.duration_ms is None else f"; {duration(verdict.duration_ms)} end to end"
    condition = f", assuming {verdict.assumes}" if verdict.assumes else ""
    yield f"{indent}`{verdict.name}`: {verdict.verdict}{condition} ({counted}{took})"
    if verdict.request_share is not None and verdict.request_share < WORTH_LINES:
        return
    yield f"{indent}    {verdict.because}"
    if verdict.gain_ms is not None and verdict.gain_share is not None:
        yield f"{indent}    At most {duration(verdict.gain_ms)} per request to gain ({verdict.gain_share:.0%})."
    if verdict.cost is not None:
        cost = verdict.cost
        per_item = f"{duration(cost.per_item_ms)} per unit of `{cost.size}`"
        yield f"{indent}    {duration(cost.fixed_ms)} per call, plus {per_item}."
    yield from (f"{indent}    - {step}" for step in verdict.next_steps if step not in said)
    said.update(verdict.next_steps)
