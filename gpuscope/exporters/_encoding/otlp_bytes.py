"""
Batches into the bytes of OTLP's `ScopeSpans.spans`, by templates.

What differs from row to row has a fixed width: ids, times and doubles, of which there is a column each. What a group
shares is encoded once. Knows the wire format of exactly these fields, and nothing of HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np

from gpuscope._data.attributes import (
    BATCH_POSITION,
    BATCH_SIZE,
    BATCH_WAIT,
    GPU_HAD_WORK,
    GPU_MEASURED,
    GPU_SAMPLES,
    GPU_SHARE,
    HOST_MEASURED,
)
from gpuscope._data.native import native
from gpuscope.exporters._encoding.limits import NO_LIMITS
from gpuscope.exporters._encoding.otlp_message import (
    LINK,
    LINK_AT,
    details_bytes,
    template_bytes,
    trace_state_bytes,
    varint,
)
from gpuscope.exporters._encoding.spans import resolve, spans_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from gpuscope._data.batch import SharedColumns, StageBatch
    from gpuscope.exporters._encoding.limits import SpanLimits
    from gpuscope.exporters._encoding.otlp_message import AttributeKey
    from gpuscope.exporters._encoding.spans import Group, Spans, SpanTemplate

_SPAN = b"\x12"
"""The tag of `ScopeSpans.spans`."""
_DOUBLE, _INT = b"\x21", b"\x18"
"""The tags of an `AnyValue`'s number."""
_CONTINUES = np.uint64(0x0080_8080_8080_8080)
"""The bit of each byte of a number that says that another byte follows."""

# The slices of a row that a span may be. 0 to 3 are host spans: the sum of the first two, as they hold.
_WITHOUT_PARENT, _WITH_GPU, _GPU, _NONE, _GPU_ASKED = 1, 2, 4, 5, 6


class _Layout:
    """
    Where the columns lie in a row's bytes: those of the host span, then those of the GPU span.

    A span's optional fields are at its two ends, the parent first and the GPU's doubles or the samples last. What a
    span has is therefore always one slice of the row.
    """

    def __init__(self, *, light: bool = False) -> None:
        self._fields: list[tuple[str, str, int]] = []
        self._row = bytearray()
        parent, host, *host_ends = self._add_span("host", HOST_MEASURED, light=light)
        gpu, *_, gpu_end, _ = self._add_span("gpu", (*GPU_MEASURED, GPU_HAD_WORK))
        self._add(_tag(GPU_SAMPLES, _INT), (f"gpu.{GPU_SAMPLES}", "<u8"))
        self.slices = [(parent, host_ends[0]), (host, host_ends[0])]
        self.slices += [(parent, host_ends[-1]), (host, host_ends[-1]), (gpu, gpu_end), (0, 0), (gpu, len(self._row))]
        """First and last byte, by the numbers `_WITHOUT_PARENT` and so on."""
        self.row = bytes(self._row)
        names, formats, offsets = zip(*self._fields, strict=True)
        self.dtype = np.dtype(
            {"names": list(names), "formats": list(formats), "offsets": list(offsets), "itemsize": len(self.row)}
        )
        self.columns = [(name, at, not np.dtype(kind).isnative) for name, kind, at in self._fields]
        """Name, place, and whether the bytes of a number are written in reverse."""

    def _add_span(self, span: str, measured: tuple[str, ...], *, light: bool = False) -> list[int]:
        """Add a span's columns. Return where it begins with a parent and without one, and where each double ends."""
        bounds = [len(self._row)]
        self._add(b"\x22\x08", (f"{span}.parent_id", ">u8"))
        bounds.append(len(self._row))
        self._add(b"\x0a\x10", (f"{span}.trace_high", ">u8"), (f"{span}.trace_low", ">u8"))
        self._add(b"\x12\x08", (f"{span}.span_id", ">u8"))
        self._add(b"\x39", (f"{span}.start_ns", "<u8"))
        self._add(b"\x41", (f"{span}.end_ns", "<u8"))
        if light:
            self._add_of_light()
        for name in measured:
            self._add(_tag(name, _DOUBLE), (f"{span}.{name}", "<f8"))
            bounds.append(len(self._row))
        if light:
            self._add(_tag(GPU_SHARE, _INT), (GPU_SHARE, "<u8"))
            bounds[-1] = len(self._row)
        return bounds

    def _add_of_light(self) -> None:
        first, second, third = LINK_AT
        self._add(LINK[:first], ("link.trace_high", ">u8"))
        self._add(LINK[first + 8 : second], ("link.trace_low", ">u8"))
        self._add(LINK[second + 8 : third], ("link.span_id", ">u8"))
        self._add(LINK[third + 8 :] + _tag(BATCH_WAIT, _DOUBLE), (BATCH_WAIT, "<f8"))
        for name in (BATCH_SIZE, BATCH_POSITION):
            self._add(_tag(name, _INT), (name, "<u8"))

    def size_of(self, kind: int) -> int:
        """Return the bytes of a slice."""
        first, last = self.slices[kind]
        return last - first

    def _add(self, tag: bytes, *columns: tuple[str, str]) -> None:
        self._row += tag
        for name, kind in columns:
            self._fields.append((name, kind, len(self._row)))
            self._row += bytes(8)


def _tag(name: str, kind: bytes) -> bytes:
    """Return everything of an attribute except its number, which has eight bytes."""
    key = name.encode()
    # KeyValue{1: key, 2: AnyValue{3: int or 4: double}}, as field 9 of a span.
    body = b"\x0a" + varint(len(key)) + key + b"\x12\x09" + kind
    return b"\x4a" + varint(len(body) + 8) + body


def _padded(values: NDArray[np.int32] | NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return numbers below 2**56 as protobuf's variable-length ones, each of eight bytes: the last are padding."""
    left, padded = values.astype(np.uint64), np.full(len(values), _CONTINUES, np.uint64)
    for place in range(-(-int(values.max(initial=1)).bit_length() // 7)):
        padded |= (left >> np.uint64(7 * place) & np.uint64(0x7F)) << np.uint64(8 * place)
    return padded


_LAYOUT, _LIGHT_LAYOUT = _Layout(), _Layout(light=True)


_Template = tuple[bytes, int, bytes, int, bytes, int]
"""
What is written for a row: constant bytes around two slices of it. A slice is empty where the row has no such span.

The host span's tag and length; its slice; what the host spans share, and the GPU span's tag and length; its slice; what
the GPU spans share; and the size of the host span. Not a class: a named tuple takes three times as long to unpack.
"""
_KINDS = itemgetter(1, 3)


@dataclass(slots=True, eq=False)
class SpanEncoder:
    """Encodes batches, and remembers what it encoded of their groups. For one thread only."""

    _templates: dict[Group, _Template] = field(default_factory=dict)
    _attributes: dict[AttributeKey, bytes] = field(default_factory=dict)
    limits: SpanLimits = NO_LIMITS
    """Not to be changed once something was encoded."""

    def encode(self, batch: StageBatch) -> bytes:
        """Return the batch's spans as the fields `spans` of a `ScopeSpans`."""
        return self.join(*self.prepare(batch))

    def prepare(self, batch: StageBatch) -> tuple[Spans, list[_Template]]:
        """Do the first half of the work: find each group's template. A row with details becomes a group of its own."""
        spans = spans_of(batch, self.limits)
        layout = _LAYOUT if batch.shared is None else _LIGHT_LAYOUT
        templates, groups = resolve(spans, self._templates, partial(_template, layout)), spans.groups
        for row, details in spans.details_by_row.items():
            template, more = templates[groups[row]], details_bytes(details, self._attributes)
            if details.trace_state:
                state = trace_state_bytes(details.trace_state)
                template, more = _with_gpu_field(template, state), state + more
            groups[row] = len(templates)
            templates.append(_extended(template, more))
        return spans, templates

    def join(self, spans: Spans, templates: list[_Template]) -> bytes:
        """Do the second half: write what differs from row to row, and join it with the templates."""
        columns, layout = _columns(spans), _LAYOUT if spans.batch.shared is None else _LIGHT_LAYOUT
        if native is None:
            return _join_in_python(columns, [templates[group] for group in spans.groups.tolist()], layout)
        given = [(at, swapped, columns[name]) for name, at, swapped in layout.columns if name in columns]
        joined: bytes = native.join(layout.row, layout.slices, given, templates, spans.groups)
        return joined


def _join_in_python(
    columns: Mapping[str, NDArray[np.generic]], templates: list[_Template], layout: _Layout = _LAYOUT
) -> bytes:
    """Return the rows' bytes; there is a template for each row."""
    cells: NDArray[np.void] = np.frombuffer(bytearray(layout.row * len(templates)), dtype=layout.dtype)
    for name, column in columns.items():
        cells[name] = column
    slices = _slices(cells, templates, layout)
    pieces: list[bytes] = []
    # The only loop over rows; its cost does not depend on the number of groups.
    for row, (before, host, between, gpu, after, _) in enumerate(templates):
        pieces += (before, slices[host][row], between, slices[gpu][row], after)
    return b"".join(pieces)


def _slices(cells: NDArray[np.void], templates: list[_Template], layout: _Layout) -> list[list[bytes]]:
    """Return, for every slice that is in use, each row's bytes."""
    count = len(templates)
    rows = cells.view(np.uint8).reshape(count, len(layout.row))
    slices: list[list[bytes]] = [[]] * len(layout.slices)
    slices[_NONE] = [b""] * count
    for used in {slice_of for pair in set(map(_KINDS, templates)) for slice_of in pair}:
        if used != _NONE:
            first, last = layout.slices[used]
            slices[used] = rows[:, first:last].view(f"V{last - first}")[:, 0].tolist()
    return slices


def _columns(spans: Spans) -> dict[str, NDArray[np.generic]]:
    """
    Return the columns of the layout by their names, those of samples where there are any.

    Of the GPU span they mean nothing where a row has none.
    """
    batch = spans.batch
    host = batch.parent_id, batch.span_id, batch.host_start_ns, batch.host_end_ns
    gpu = spans.gpu_parent_id, batch.gpu_span_id, batch.gpu_start_ns, batch.gpu_end_ns
    columns: dict[str, NDArray[np.generic]] = {}
    for span, (parent_id, span_id, start_ns, end_ns) in (("host", host), ("gpu", gpu)):
        columns |= {
            f"{span}.parent_id": parent_id,
            f"{span}.trace_high": batch.trace_high,
            f"{span}.trace_low": batch.trace_low,
            f"{span}.span_id": span_id,
            f"{span}.start_ns": start_ns,
            f"{span}.end_ns": end_ns,
        }
    of_host, of_gpu = (spans.host_s, spans.gpu_s, spans.launch_s), (spans.gpu_s, spans.launch_s, spans.uncertainty_s)
    columns |= {f"host.{name}": column for name, column in zip(HOST_MEASURED, of_host, strict=True)}
    columns |= {f"gpu.{name}": column for name, column in zip(GPU_MEASURED, of_gpu, strict=True)}
    if spans.samples is not None and spans.had_work is not None:
        columns[f"gpu.{GPU_HAD_WORK}"] = spans.had_work
        columns[f"gpu.{GPU_SAMPLES}"] = _padded(spans.samples)
    return columns if batch.shared is None else columns | _light_columns(batch.shared)


def _light_columns(shared: SharedColumns) -> dict[str, NDArray[np.generic]]:
    return {
        "link.trace_high": shared.batch_trace_high,
        "link.trace_low": shared.batch_trace_low,
        "link.span_id": shared.batch_span_id,
        BATCH_WAIT: shared.wait_s,
        BATCH_SIZE: _padded(shared.size),
        BATCH_POSITION: _padded(shared.position),
        GPU_SHARE: _padded(shared.share_ns),
    }


def _template(layout: _Layout, host: SpanTemplate | None, gpu: SpanTemplate | None) -> _Template:
    after = b"" if gpu is None else template_bytes(gpu)
    gpu_kind = _NONE if gpu is None else _GPU_ASKED if GPU_SAMPLES in gpu.measured else _GPU
    of_gpu = b"" if gpu is None else _head_of_gpu(gpu_kind, after)
    if host is None:
        return b"", _NONE, of_gpu, gpu_kind, after, 0
    kind = _WITHOUT_PARENT * (not host.child) + _WITH_GPU * (gpu is not None)
    shared = template_bytes(host)
    size = layout.size_of(kind) + len(shared)
    return _SPAN + varint(size), kind, shared + of_gpu, gpu_kind, after, size


def _with_gpu_field(template: _Template, more: bytes) -> _Template:
    """Return the template with more fields in the GPU span, if it has one."""
    before, host, between, gpu, after, size = template
    if gpu == _NONE:
        return template
    head = _head_of_gpu(gpu, after)
    return before, host, between.removesuffix(head) + _head_of_gpu(gpu, after + more), gpu, after + more, size


def _head_of_gpu(kind: int, shared: bytes) -> bytes:
    return _SPAN + varint(_LAYOUT.size_of(kind) + len(shared))


def _extended(template: _Template, more: bytes) -> _Template:
    """Return the template with more fields in the host span."""
    _, host, between, gpu, after, size = template
    size += len(more)
    return _SPAN + varint(size), host, more + between, gpu, after, size
