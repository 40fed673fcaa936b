"""
A batch as spans: which columns a span has, and which `SpanTemplate` it shares with many others.

Knows the names of the spans and of their attributes, and no format. Never makes an object per span: `Spans` holds
columns and, for each row, the number of its group, whose templates are encoded once and used again.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np

from gpuscope._data.attributes import (
    BATCH_BASIS,
    CUDA_STREAM,
    DEVICE_INDEX,
    FILE,
    FUNCTION,
    GPU_FLAGS,
    GPU_MEASURED,
    GPU_SAMPLED,
    HOST_FLAGS,
    HOST_MEASURED,
    HW_ID,
    HW_MODEL,
    HW_TYPE,
    HW_VENDOR,
    LINE,
    OURS,
    STAGE,
    THREAD_ID,
    THREAD_NAME,
)
from gpuscope._data.batch import RowFlag
from gpuscope._data.native import native
from gpuscope._data.plain.values import as_text, clean_mapping
from gpuscope.exporters._encoding.details import clean_details, link_members
from gpuscope.exporters._encoding.limits import NO_LIMITS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from gpuscope._data.batch import DeviceInfo, StageBatch
    from gpuscope._data.plain.values import Clean
    from gpuscope._data.record import Site, ThreadInfo
    from gpuscope.exporters._encoding.details import CleanDetails
    from gpuscope.exporters._encoding.limits import SpanLimits

T = TypeVar("T")
Key: TypeAlias = "bytes | tuple[bytes, str | None, tuple[str, ...]]"
"""Of a group, in its batch only. For a row with details: the bytes, its new name, and the attributes it sets."""
Where: TypeAlias = "tuple[int, int, DeviceInfo | None, bool]"
"""Of a GPU span: the device's index, the stream's address, the device, and whether there are samples."""
Group: TypeAlias = "tuple[Site, ThreadInfo, int, bool, Where | None, str | None, tuple[str, ...]]"
"""
The same as a key, in terms that hold across batches.

Site, thread, flags, whether there is a parent, where the GPU span is, a new name, and the attributes that the run sets.
Plain, because it is hashed at every look-up.
"""

_IN_GRAPH = int(RowFlag.IN_GRAPH)
_CACHE_SIZE = 2048
_SAID_OF_ALL = (STAGE, THREAD_ID, THREAD_NAME)
SAID_BY_US = OURS | {*_SAID_OF_ALL, FUNCTION, FILE, LINE}
"""Attributes of a host span that are not the application's, unless that has replaced them."""

# A row's key is these bytes: one structured array and a hash of 27 bytes cost a third of a tuple of eight numbers.
_KEY = Struct("=QiiiI???")
_KEY_DTYPE = np.dtype(
    {
        "names": ["stream", "site", "thread", "device", "flags", "child", "gpu", "asked"],
        "formats": ["u8", "i4", "i4", "i4", "u4", "?", "?", "?"],
        "offsets": [0, 8, 12, 16, 20, 24, 25, 26],
        "itemsize": _KEY.size,
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class SpanTemplate:
    """What the spans of one group share. The attributes are clean."""

    name: str
    attributes: Mapping[str, Clean]
    child: bool
    """Whether there is a parent at all."""
    remote: bool
    """Whether the parent belongs to another process."""
    measured: tuple[str, ...]
    """The names of its measured attributes."""
    dropped: int = 0
    """How many of the stage's attributes it has no room for."""


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """
    The spans of one batch: one host span per row and, where the row has a GPU part, a GPU span.

    A stage inside a replay of a CUDA graph has a GPU span only.
    """

    batch: StageBatch
    limits: SpanLimits
    keys: list[Key]
    """One per group. `resolve` turns them into what an exporter makes of the groups' templates."""
    groups: NDArray[np.int32]
    """Index into `keys`."""
    gpu: NDArray[np.bool_]
    """Whether the row has a GPU span."""
    gpu_parent_id: NDArray[np.uint64]
    """Its own host span, or the stage around it where there is none."""
    details_by_row: dict[int, CleanDetails]
    """By row: what only its host span has."""
    host_s: NDArray[np.float64]
    gpu_s: NDArray[np.float64]
    """This and the following two are meaningless where the row has no GPU span."""
    launch_s: NDArray[np.float64]
    uncertainty_s: NDArray[np.float64]
    samples: NDArray[np.int32] | None
    """This and the next are None where nothing was asked; they mean something where there is a GPU span and this is
    not 0."""
    had_work: NDArray[np.float64] | None


def spans_of(batch: StageBatch, limits: SpanLimits = NO_LIMITS) -> Spans:
    """Return the batch's spans, within limits."""
    gpu = batch.gpu_span_id != 0
    packed, groups = _grouped(batch, gpu)
    with_details: dict[Key, int] = {}
    details_by_row = {}
    for row, details in batch.details.items():
        clean = clean_details(details, int(batch.host_end_ns[row]))
        missing = _fit(clean, batch, row, limits) if limits is not NO_LIMITS else []
        if details.linked is not None:
            link_members(clean, details.linked)
        name = None if details.name is None else as_text(details.name)
        key = packed[groups[row]], name, (*clean.attributes, *missing)
        groups[row] = len(packed) + with_details.setdefault(key, len(with_details))
        details_by_row[row] = clean
    return Spans(
        batch=batch,
        limits=limits,
        keys=[*packed, *with_details],
        groups=groups,
        gpu=gpu,
        gpu_parent_id=np.where(batch.flags & _IN_GRAPH, batch.parent_id, batch.span_id),
        details_by_row=details_by_row,
        host_s=(batch.host_end_ns - batch.host_start_ns) / 1e9,
        gpu_s=(batch.gpu_end_ns - batch.gpu_start_ns) / 1e9,
        launch_s=(batch.gpu_start_ns - batch.host_start_ns) / 1e9,
        uncertainty_s=batch.uncertainty_ns / 1e9,
        samples=batch.samples,
        had_work=None if batch.samples is None else batch.had_work / batch.samples.clip(min=1),
    )


def resolve(
    spans: Spans, cache: dict[Group, T], make: Callable[[SpanTemplate | None, SpanTemplate | None], T]
) -> list[T]:
    """
    Return for each group what `make` makes of its templates, made once and kept in a bounded cache.

    Args:
        spans: of a batch.
        cache: of the exporter. New groups are added to it.
        make: takes the templates of the host span and of the GPU span, each None where the row has no such span.

    """
    found: list[T] = []
    for key in spans.keys:
        group = _group(spans.batch, key)
        made = cache.get(group)
        if made is None:
            if len(cache) >= _CACHE_SIZE:
                # Starting anew costs some microseconds per group; an order of use would cost at every hit.
                cache.clear()
            made = cache[group] = make(_host_template(group, spans.limits), _gpu_template(group, spans.limits))
        found.append(made)
    return found


def _grouped(batch: StageBatch, gpu: NDArray[np.bool_]) -> tuple[list[bytes], NDArray[np.int32]]:
    """Return the keys of the batch's groups, and each row's index among them."""
    cells = np.zeros(len(batch.site), _KEY_DTYPE)
    for name in ("stream", "site", "thread", "device", "flags"):
        cells[name] = getattr(batch, name)
    cells["child"] = batch.parent_id
    cells["gpu"] = gpu
    if batch.samples is not None:
        cells["asked"] = gpu & (batch.samples != 0)
    keys, groups = _grouped_in_python(cells) if native is None else native.group(cells, _KEY.size)
    return keys, np.frombuffer(groups, np.int32)


def _grouped_in_python(cells: NDArray[np.void]) -> tuple[list[bytes], bytearray]:
    keys: dict[bytes, int] = {}
    groups = [keys.setdefault(key, len(keys)) for key in cells.view(f"V{_KEY.size}").tolist()]
    return list(keys), bytearray(np.array(groups, np.int32))


def _fit(details: CleanDetails, batch: StageBatch, row: int, limits: SpanLimits) -> list[str]:
    """Fit a row's details, and return the names of its stage's attributes for which there is no room."""
    site, has_gpu = batch.sites[batch.site[row]], batch.gpu_span_id[row] != 0
    flags = int(batch.flags[row])
    return limits.fit(details, _attributes_of(site), _ours(site, flags, measured=3 if has_gpu else 1))


def _ours(site: Site, flags: int, *, measured: int) -> int:
    """Return how many attributes of a host span are not the application's."""
    return len(_SAID_OF_ALL) + len(_function_of(site)) + sum(bool(flags & flag) for flag in HOST_FLAGS) + measured


def _group(batch: StageBatch, key: Key) -> Group:
    packed, name, replaced = key if isinstance(key, tuple) else (key, None, ())
    stream, site, thread, device, flags, child, gpu, asked = _KEY.unpack(packed)
    where = (device, stream, batch.devices.get(device), asked) if gpu else None
    return batch.sites[site], batch.threads[thread], flags, child, where, name, replaced


def _common(site: Site, thread: ThreadInfo, flags: int, names: Mapping[RowFlag, str]) -> dict[str, Clean]:
    """Return what both spans of a row say, and the flags that `names` has."""
    flagged = {name: True for flag, name in names.items() if flags & flag}
    return {STAGE: site.name, **flagged, THREAD_ID: thread.ident, THREAD_NAME: thread.name}


def _of_site(site: Site) -> dict[str, Clean]:
    """Return what is known of a stage before it runs; only one of its spans shows it."""
    return _function_of(site) | _attributes_of(site)


def _function_of(site: Site) -> dict[str, Clean]:
    """Return what gpuscope itself says of a stage: its function, or the basis of a batch."""
    if not site.function:
        return {key: as_text(site.attributes[key]) for key in (BATCH_BASIS,) if key in site.attributes}
    found: dict[str, Clean] = {FUNCTION: site.function}
    if site.code is not None:
        found[FILE], found[LINE] = site.code
    return found


def _attributes_of(site: Site) -> dict[str, Clean]:
    return {key: value for key, value in clean_mapping(site.attributes).items() if key not in OURS}


def _host_template(group: Group, limits: SpanLimits) -> SpanTemplate | None:
    site, thread, flags, child, where, name, replaced = group
    if flags & _IN_GRAPH:
        return None
    own = {key: value for key, value in _attributes_of(site).items() if key not in replaced}
    own, dropped = limits.fit_of_site(own, _ours(site, flags, measured=3 if where else 1))
    attributes = _common(site, thread, flags, HOST_FLAGS) | _function_of(site) | own
    attributes = clean_mapping({key: value for key, value in attributes.items() if key not in replaced})
    return SpanTemplate(
        dropped=dropped,
        name=as_text(site.name) if name is None else name,
        attributes=limits.cut(attributes),
        child=child,
        remote=child and bool(flags & RowFlag.REMOTE_PARENT),
        measured=HOST_MEASURED if where else HOST_MEASURED[:1],
    )


def _gpu_template(group: Group, limits: SpanLimits) -> SpanTemplate | None:
    site, thread, flags, _, where, name, _ = group
    if where is None:
        return None
    index, stream, device, asked = where
    attributes = _common(site, thread, flags, GPU_FLAGS)
    attributes |= {CUDA_STREAM: stream, DEVICE_INDEX: index, HW_TYPE: "gpu"}
    if device is not None:
        attributes |= {HW_ID: device.uuid, HW_MODEL: device.name, HW_VENDOR: device.vendor}
    if flags & _IN_GRAPH:
        attributes = _of_site(site) | attributes
    return SpanTemplate(
        name=(as_text(site.name) if name is None else name) + " [gpu]",
        attributes=limits.cut(clean_mapping(attributes)),
        child=True,
        remote=False,
        measured=GPU_MEASURED + GPU_SAMPLED * asked,
    )
