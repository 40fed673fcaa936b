"""
The answer on top: for each kind of request what bounds it, how long it takes, what there is to gain, what to try first.

Puts verdicts into sentences. Where there are no GPU times, `host_only` says what the host can tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gpuscope._data.batch import RowFlag
from gpuscope._data.plain.durations import duration
from gpuscope.analysis._structure.parts import counted
from gpuscope.analysis._verdicts.decide import ENOUGH
from gpuscope.analysis._verdicts.findings import CPU_BOUND, PIPELINE_BOUND, UNKNOWN, WORTH_LINES, Answer
from gpuscope.analysis._verdicts.host_only import where_time_goes
from gpuscope.analysis._verdicts.weigh import ANSWERS, SLOPE
from gpuscope.analysis.latency.in_batches import PLACES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope.analysis._verdicts.calls import CallsOfStage
    from gpuscope.analysis._verdicts.decide import Ruling
    from gpuscope.analysis._verdicts.findings import RequestVerdict
    from gpuscope.analysis._verdicts.weigh import Weighed


@dataclass(frozen=True)
class _Spread:
    """How long the requests of a kind take."""

    rows: NDArray[np.int64]
    """Those that percentiles are of."""
    judged: NDArray[np.int64]
    """Those without late cold calls, if there are any."""
    took_ms: NDArray[np.float64]
    """One per row of the recording."""

    @property
    def median_row(self) -> int:
        """The request whose duration is nearest to the median."""
        middle = float(np.median(self.took_ms[self.rows]))
        return int(self.judged[np.argmin(np.abs(self.took_ms[self.judged] - middle))])

    @property
    def slowest_row(self) -> int:
        """The slowest that is judged."""
        return int(self.judged[np.argmax(self.took_ms[self.judged])])


def answer(calls: CallsOfStage, verdict: RequestVerdict) -> Answer:
    """
    Return the answer for one kind of request.

    Args:
        calls: The requests.
        verdict: The verdict on them.

    """
    recording = calls.material.recording
    spread = _Spread(counted(recording, calls.rows), calls.requests.rows, calls.material.duration_ns / 1e6)
    rows = np.isin(recording.root, calls.rows)
    untimed = (recording.flags[rows] & (RowFlag.CAPTURED | RowFlag.GIVEN_UP)) != 0
    on_gpu = bool(((recording.stream[rows] >= 0) | untimed).any())
    more: list[str] = []
    if on_gpu:
        headline, first = _bound(verdict, _how_long(calls, spread)), verdict.next_steps[:1]
        told = verdict.verdict != UNKNOWN and verdict.witness == ANSWERS
        if told and verdict.busy_share is not None and verdict.busy_range is not None:
            low, high = verdict.busy_range
            where = "Within a request the GPU" if verdict.gain_of == "period" else "The GPU"
            more.append(
                f"{where} had {_work(calls)}, queued or running, for {verdict.busy_share:.0%} of the time "
                f"({100 * low:.0f} to {100 * high:.0f}%)."
            )
    else:
        headline, first, more = where_time_goes(calls, _how_long(calls, spread))
        if (recording.stream >= 0).any():
            more.append("These requests have no GPU times.")
    return Answer(
        name=calls.name,
        headline=headline,
        try_first=first[0] if first else None,
        more=(*more, *_slowest(calls, spread)),
        on_gpu=on_gpu,
        median_row=spread.median_row,
        slowest_row=spread.slowest_row,
    )


def because_of(calls: CallsOfStage, ruling: Ruling) -> str:
    """Return what a verdict rests on, as a sentence."""
    weighed, waits_for = ruling.weighed, calls.waits_for()
    wait, idle = weighed.wait, weighed.idle
    work = f"the work of `{waits_for}`" if waits_for else "earlier work"
    if ruling.verdict == PIPELINE_BOUND:
        what = "a copy" if calls.share(calls.material.evidence.copy_ns) >= wait / 2 else work
        because = (
            f"Host and GPU take turns: for {wait:.0%} of the time the host waits for {what}, and for {idle:.0%} "
            "the GPU has nothing else to do."
        )
        return f"{because} {_asked(calls, weighed)}".strip()
    if ruling.verdict == CPU_BOUND:
        because = f"for {idle:.0%} of the time it has nothing to do, or waits for launches."
        if weighed.by == ANSWERS:
            return f"{_asked(calls, weighed)} The host keeps it waiting: {because}"
        return f"The GPU keeps up with the host: {because}{_told(weighed, 'as much longer')}"
    waits = f"for {wait:.0%} the host waits for {work}." if wait >= ENOUGH else ""
    if weighed.by == ANSWERS:
        return f"{_asked(calls, weighed)} {waits[:1].upper()}{waits[1:]}".strip()
    least, most = f"{100 * (1 - idle - weighed.unproven):.0f}", f"{1 - idle:.0%}"
    busy = f"The GPU has work for {most if f'{least}%' == most else f'{least} to {most}'} of the time"
    return (
        f"{busy}; {waits}{_told(weighed, 'no longer')}"
        if waits
        else (f"{busy}, and is behind the host.{_told(weighed, 'no longer')}")
    )


def _asked(calls: CallsOfStage, weighed: Weighed) -> str:
    """Return what streams answered when they were asked; empty where that is not what decided."""
    busy = calls.busy
    if weighed.by != ANSWERS or busy is None:
        return ""
    low, high, share = (f"{100 * (1 - each):.0f}" for each in (weighed.idle_high, weighed.idle_low, weighed.idle))
    return (
        f"The GPU had {_work(calls)}, queued or running, for {share}% of the time ({low} to {high}%; "
        f"{busy.answers:,} answers in {busy.requests:,} requests)."
    )


def _work(calls: CallsOfStage) -> str:
    """Return what answers are about: those in copies that the host waits for do not count."""
    copies = calls.share(calls.material.evidence.copy_ns) >= WORTH_LINES
    return "work besides the copies that the host waits for" if copies else "work"


def _told(weighed: Weighed, how: str) -> str:
    """Return what the slope says, if that is what decided."""
    if weighed.by != SLOPE or weighed.slope is None:
        return ""
    low, high = weighed.slope.low, weighed.slope.high
    return (
        f" Calls that the host takes longer to launch take {how} on the GPU (slope {low:.2f} to {high:.2f}, "
        f"{weighed.slope.calls:,} calls)."
    )


def _how_long(calls: CallsOfStage, spread: _Spread) -> str:
    """Return `14.7 ms (median of 57 requests)`."""
    count = len(spread.rows)
    median = duration(calls.material.request_ms(calls.kind))
    recording = calls.material.recording
    if recording.not_ended[spread.rows].all():
        return f"{median} so far ({count:,} not ended)"
    kind = "warm-up request" if recording.in_warmup_request[spread.rows].all() else "request"
    return f"{median} (1 {kind})" if count == 1 else f"{median} (median of {count:,} {kind}s)"


def _bound(verdict: RequestVerdict, how_long: str) -> str:
    if verdict.verdict == UNKNOWN:
        return f"`{verdict.name}` takes {how_long}. What bounds it is unknown: {_lowered(verdict.because)}"
    assuming = f", assuming {verdict.assumes}" if verdict.assumes else ""
    whole = f" and comes every {duration(verdict.period_ms)}" if verdict.gain_of == "period" else ""
    gain = f"At most {duration(verdict.gain_ms)} ({verdict.gain_share:.0%}) of that can be gained."
    return f"`{verdict.name}` is {verdict.verdict}{assuming}. It takes {how_long}{whole}. {gain}"


def _lowered(sentence: str) -> str:
    """Return a sentence as the end of another: a capital that begins an ordinary word is lowered."""
    return sentence if sentence[:2].isupper() or sentence.startswith("GPU") else sentence[:1].lower() + sentence[1:]


def _slowest(calls: CallsOfStage, spread: _Spread) -> list[str]:
    """Return how much the requests differ, and where the time of the slowest went, if there are several."""
    if len(spread.judged) < 2:  # noqa: PLR2004 - one request is neither slow nor fast
        return []
    recording, row = calls.material.recording, spread.slowest_row
    nine_of_ten = duration(float(np.percentile(spread.took_ms[spread.rows], 90)))
    said = f"Nine of ten take at most {nine_of_ten}. The slowest"
    said += " that is judged" if len(spread.judged) < len(spread.rows) else ""
    said += f" took {duration(float(spread.took_ms[row]))} (trace {recording.trace_id[row]})"
    what, more_ms = _where_it_went(calls, row)
    told = more_ms > 0 and more_ms >= (spread.took_ms[row] - calls.material.request_ms(calls.kind)) / 4
    told = told and bool((recording.parent[recording.root == row] >= 0).any() or what.startswith("it "))
    return [f"{said}: {what.format(duration(more_ms))}." if told else f"{said}."]


def _where_it_went(calls: CallsOfStage, slowest: int) -> tuple[str, float]:
    """Return in words what took most beyond its usual share of a request, and how many milliseconds that is."""
    material, requests = calls.material, np.sort(calls.requests.rows)
    recording, place_of_slowest = material.recording, int(np.searchsorted(requests, slowest))
    rows = np.flatnonzero(np.isin(recording.root, requests))
    place = np.searchsorted(requests, recording.root[rows])
    own_ms = np.zeros((len(recording.names), len(requests)))
    np.add.at(own_ms, (recording.stage[rows], place), material.own_ns[rows] / 1e6)
    more = own_ms[:, place_of_slowest] - np.median(own_ms, axis=1)
    collected_ms = np.bincount(place, material.collected_ns[rows] / 1e6, len(requests))
    found = [(float(collected_ms[place_of_slowest] - np.median(collected_ms)), "it had {} more of garbage collection")]
    in_batches = material.in_batches.of(requests)
    if in_batches is not None:
        more[list(material.in_batches.waiting_stages(requests))] = 0
        usual_ns = np.median(in_batches.spent_ns, axis=0)
        beyond_ns = (np.array(material.in_batches.spent_ns(slowest)) - usual_ns).tolist()
        found += [(ns / 1e6, f"it was {{}} longer than usual {PLACES[each]}") for each, ns in enumerate(beyond_ns)]
    stage = int(np.argmax(more))
    where = "in no stage" if stage == calls.kind else f"in `{_braced(recording.names[stage])}`"
    more_ms, what = max([(float(more[stage]), f"the host was {{}} longer than usual {where}"), *found])
    return what, more_ms


def _braced(name: str) -> str:
    """Return a name as `str.format` gives it back."""
    return name.replace("{", "{{").replace("}", "}}")
