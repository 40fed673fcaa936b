"""
Small batches become few: what an exporter does per batch costs as much as 500 stages in it.

Pure.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from gpuscope._data.batch import SharedColumns

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from numpy.typing import NDArray

    from gpuscope._data.batch import StageBatch

T = TypeVar("T", bound="Hashable")

_MOST_ROWS = 2048
_REMAPPED = ("site", "root", "thread")
_COLUMNS = (
    *("trace_high", "trace_low", "span_id", "parent_id", "gpu_span_id", "sampled"),
    *("host_start_ns", "host_end_ns", "gpu_start_ns", "gpu_end_ns", "uncertainty_ns", "device", "stream", "flags"),
)
_MAYBE = ("samples", "had_work")
"""Columns that all batches of a kind have, or none."""


def joined(batches: list[StageBatch]) -> Iterator[StageBatch]:
    """Yield the same rows in fewer batches, of 2,048 rows or one that was larger; each of stages or of light spans."""
    kinds: dict[object, list[StageBatch]] = {}
    for batch in batches:
        kinds.setdefault((batch.shared is None, batch.live is None, batch.samples is None), []).append(batch)
    for alike in kinds.values():
        together: list[StageBatch] = []
        for batch in alike:
            if together and sum(len(each.site) for each in together) + len(batch.site) > _MOST_ROWS:
                yield join(together)
                together = []
            together.append(batch)
        yield join(together)


def join(batches: list[StageBatch]) -> StageBatch:
    """Return all rows of batches of one kind in one, in their order."""
    first = batches[0]
    if len(batches) == 1:
        return first
    sites, of_site = _table([batch.sites for batch in batches])
    threads, of_thread = _table([batch.threads for batch in batches])
    offsets = np.cumsum([0, *(len(batch.site) for batch in batches)]).tolist()
    pairs = list(zip(batches, offsets, strict=False))
    changes: dict[str, Any] = {
        name: np.concatenate([getattr(batch, name) for batch in batches])
        for name in (*_COLUMNS, *(name for name in _MAYBE if getattr(first, name) is not None))
    }
    for name in _REMAPPED:
        places = of_thread if name == "thread" else of_site
        columns = [place[getattr(batch, name)] for batch, place in zip(batches, places, strict=True)]
        changes[name] = np.concatenate(columns)
    changes["details"] = {row + offset: what for batch, offset in pairs for row, what in batch.details.items()}
    changes["devices"] = {index: info for batch in batches for index, info in batch.devices.items()}
    if first.live is not None:
        changes["live"] = tuple(span for batch in batches for span in batch.live or ())
    if first.shared is not None:
        columns_of = {
            each.name: [getattr(batch.shared, each.name) for batch in batches] for each in fields(SharedColumns)
        }
        changes["shared"] = SharedColumns(**{name: np.concatenate(parts) for name, parts in columns_of.items()})
    # What streams answered in the whole is in the batches that metrics and summary have seen.
    return replace(first, sites=sites, threads=threads, device_samples=None, stream_samples=None, **changes)


def _table(tables: list[tuple[T, ...]]) -> tuple[tuple[T, ...], list[NDArray[np.int32]]]:
    """Return one table of all entries, and for each of the tables where its entries are in that."""
    found: dict[T, int] = {}
    places = [np.array([found.setdefault(each, len(found)) for each in table], np.int32) for table in tables]
    return tuple(found), places
