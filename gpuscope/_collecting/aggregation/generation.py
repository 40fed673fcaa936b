"""
Requests of generative models as OpenTelemetry's metrics of model servers: how long, until when the first token.

A request is a stage that says `gen_ai.operation.name` and has a stage `prefill` directly in it, as the `generate` of
transformers does. When its first token was there is what it says of the host's clock; if it says nothing, when the
prefill was done. The GPU's clock has metrics of its own. Visits rows in Python, but only of such stages, of which a
request has few. Takes no lock.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from gpuscope._collecting.aggregation.summary import OTHER
from gpuscope._data.attributes import ERROR_TYPE, NEW_TOKENS, OPERATION, OUTPUT_TOKENS, PROVIDER, REQUEST_MODEL
from gpuscope._data.batch import RowFlag
from gpuscope._data.metrics import (
    OF_GENERATIONS,
    OF_GENERATIONS_ON_GPU,
    REQUEST_DURATION,
    TIME_PER_OUTPUT_TOKEN,
    TIME_TO_FIRST_TOKEN,
    DataPoint,
    Exemplar,
    Histogram,
)
from gpuscope._data.plain.values import as_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gpuscope._data.batch import FinishedGeneration, StageBatch
    from gpuscope._data.metrics import InstrumentSpec

_PREFILL = "prefill"
_SAID = (*OF_GENERATIONS[1:], *OF_GENERATIONS_ON_GPU)
"""The metrics whose names are those of attributes, which have the same in seconds."""
_UNPLACED = int(RowFlag.UNPLACED)
_MAX_KINDS = 48
"""Of requests, by model and the like, with series of their own; later ones share one."""
_MAX_WAITING = 1024
"""Prefills whose request has not ended, and requests whose prefill has not come: the oldest are forgotten."""

T = TypeVar("T")


class Measurement(NamedTuple):
    """One value of a histogram."""

    spec: InstrumentSpec
    attributes: Mapping[str, str]
    seconds: float


class _Request(NamedTuple):
    """What a row says of a request. Times are since the epoch."""

    attributes: dict[str, str]
    start_ns: int
    end_ns: int
    times_s: dict[InstrumentSpec, float]
    """What it says itself, by both clocks."""
    new_tokens: int
    failed: bool
    link: tuple[int, int] | None
    """Trace id and span id, if the span is exported."""


class _Series:
    """One histogram, and its slowest exported request since exemplars were last taken."""

    def __init__(self, spec: InstrumentSpec) -> None:
        self._bounds = spec.bounds_s
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum_s = 0.0
        self._exemplar: Exemplar | None = None

    def add(self, seconds: float, request: _Request) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum_s += seconds
        if request.link is not None and (self._exemplar is None or seconds > self._exemplar.seconds):
            self._exemplar = Exemplar(seconds, request.end_ns, *request.link)

    def value(self, *, exemplars: bool) -> Histogram:
        taken = self._exemplar if exemplars else None
        if exemplars:
            self._exemplar = None
        return Histogram(tuple(self._counts), self._sum_s, taken)


class Generation:
    """Takes every batch; returns points, and each value once for histograms that are kept elsewhere."""

    def __init__(self) -> None:
        self._has_prefills = False
        self._first_ns: dict[int, int] = {}
        """When the prefill of a request ended that has not, by the request's span id."""
        self._waiting: dict[int, _Request] = {}
        """Requests whose prefill comes in a later batch: it ran on another stream, say."""
        self._kinds: set[tuple[str, ...]] = set()
        self._series: dict[tuple[InstrumentSpec, tuple[tuple[str, str], ...]], _Series] = {}

    def add(self, batch: StageBatch) -> list[Measurement]:
        """Count the requests that a batch completes, and return their values."""
        prefills = [number for number, site in enumerate(batch.sites) if site.name == _PREFILL]
        self._has_prefills = self._has_prefills or bool(prefills)
        if not self._has_prefills:
            # Most programs generate nothing, and pay for no more than this. It costs those that do their very first
            # request, if the prefill of that comes in a later batch.
            return []
        for row in np.flatnonzero(np.isin(batch.site, prefills)).tolist():
            span_id, ended_ns = int(batch.parent_id[row]), _end_ns(batch, row)
            # A prompt that is computed in chunks has several.
            _keep(self._first_ns, span_id, max(ended_ns, self._first_ns.get(span_id, 0)))
        for row, attributes in _operations(batch):
            _keep(self._waiting, int(batch.span_id[row]), self._request(batch, row, attributes))
        found: list[Measurement] = []
        for span_id in self._waiting.keys() & self._first_ns.keys():
            found += self._count(self._waiting.pop(span_id), self._first_ns.pop(span_id))
        return found

    def take(self, generations: Iterable[FinishedGeneration]) -> list[Measurement]:
        """Count generations that took part in many batches, and return their values."""
        found: list[Measurement] = []
        for each in generations:
            if OPERATION in each.attributes:
                failed = {} if each.error_type is None else {ERROR_TYPE: as_text(each.error_type)}
                attributes = self._bounded({key: as_text(text) for key, text in each.attributes.items()} | failed)
                times_s, has_failed = _times_s(each.times_s), each.error_type is not None
                request = _Request(attributes, each.start_ns, each.end_ns, times_s, 0, has_failed, each.link)
                found += self._count(request, None)
        return found

    def points(self, *, exemplars: bool = False) -> dict[InstrumentSpec, list[DataPoint]]:
        """Return the points as of now; with `exemplars`, those since they were last taken."""
        found: dict[InstrumentSpec, list[DataPoint]] = {}
        for (spec, attributes), series in self._series.items():
            found.setdefault(spec, []).append(DataPoint(dict(attributes), series.value(exemplars=exemplars)))
        return found

    def _request(self, batch: StageBatch, row: int, said: Mapping[str, object]) -> _Request:
        details = batch.details.get(row)
        error = details.error if details is not None else None
        texts = {name: said.get(name) for name in (OPERATION, PROVIDER, REQUEST_MODEL)}
        attributes = {name: as_text(text) for name, text in texts.items() if isinstance(text, str)}
        if error is not None:
            attributes[ERROR_TYPE] = as_text(error.type)
        tokens = [count for name in (NEW_TOKENS, OUTPUT_TOKENS) if type(count := said.get(name)) is int]
        trace_id = int(batch.trace_high[row]) << 64 | int(batch.trace_low[row])
        return _Request(
            self._bounded(attributes),
            int(batch.host_start_ns[row]),
            max(int(batch.host_end_ns[row]), _end_ns(batch, row)),
            _times_s(said),
            tokens[0] if tokens else 0,
            error is not None,
            (trace_id, int(batch.span_id[row])) if batch.sampled[row] else None,
        )

    def _bounded(self, attributes: dict[str, str]) -> dict[str, str]:
        kind = tuple(attributes.values())
        if kind not in self._kinds and len(self._kinds) >= _MAX_KINDS:
            return {OPERATION: OTHER}
        self._kinds.add(kind)
        return attributes

    def _count(self, request: _Request, first_ns: int | None) -> list[Measurement]:
        values = {REQUEST_DURATION: (request.end_ns - request.start_ns) / 1e9}
        if not request.failed:
            values |= request.times_s
            if first_ns is not None:
                values.setdefault(TIME_TO_FIRST_TOKEN, (first_ns - request.start_ns) / 1e9)
                if request.new_tokens > 1:
                    rest_ns = request.end_ns - first_ns
                    values.setdefault(TIME_PER_OUTPUT_TOKEN, rest_ns / (request.new_tokens - 1) / 1e9)
        found = []
        for spec, time_s in values.items():
            seconds, key = max(0.0, time_s), (spec, tuple(request.attributes.items()))
            if key not in self._series:
                self._series[key] = _Series(spec)
            self._series[key].add(seconds, request)
            found.append(Measurement(spec, request.attributes, seconds))
        return found


def _operations(batch: StageBatch) -> list[tuple[int, Mapping[str, object]]]:
    """Return the rows that say which operation they are, with all that they say."""
    own = {row: details.attributes for row, details in batch.details.items() if details.attributes}
    rows = {row for row, attributes in own.items() if OPERATION in attributes}
    always = [number for number, site in enumerate(batch.sites) if OPERATION in site.attributes]
    rows.update(np.flatnonzero(np.isin(batch.site, always)).tolist())
    return [(row, {**batch.sites[batch.site[row]].attributes, **own.get(row, {})}) for row in sorted(rows)]


def _times_s(said: Mapping[str, object]) -> dict[InstrumentSpec, float]:
    values = {spec: said.get(spec.name) for spec in _SAID}
    return {spec: value for spec, value in values.items() if isinstance(value, float) and math.isfinite(value)}


def _end_ns(batch: StageBatch, row: int) -> int:
    """Return when the GPU ended a stage's work where that is known, else when the stage ended on the host."""
    placed = batch.gpu_end_ns[row] and not int(batch.flags[row]) & _UNPLACED
    return int((batch.gpu_end_ns if placed else batch.host_end_ns)[row])


def _keep(waiting: dict[int, T], span_id: int, what: T) -> None:
    waiting[span_id] = what
    if len(waiting) > _MAX_WAITING:
        del waiting[next(iter(waiting))]
