"""
The file of a flight recorder, read whole: its head, its tables, and those records that are not torn.

The file may be written meanwhile: a record whose check does not hold is left out and counted. Relates no stage to
another. The writer is `_flight/ring.py`.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuscope._data import flight as layout

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from numpy.typing import NDArray

_WORD = 7
_MANTISSA, _EXPONENT_AT = 2047, 11


class NotAFlightError(ValueError):
    """The file is none of a flight recorder; the text says why."""


@dataclass(frozen=True, eq=False)
class FlightRing:
    """What a file holds. Times are of the records' clock, in nanoseconds; with `offset_ns` they are since the epoch."""

    head: Mapping[str, int]
    """Its numbers: see `_data.flight.HEAD`."""
    reason: str
    """Why this copy was made; empty for the file itself."""
    resource: Mapping[str, Any]
    devices: Mapping[int, tuple[str, str]]
    """Model and uuid by index."""
    threads: Mapping[int, str]
    """Names by ident."""
    names: Mapping[int, str]
    """Of stages, by number."""
    stages: NDArray[np.uint64]
    """Records as rows of eight numbers, in the order in which they were begun."""
    resolved: NDArray[np.uint64]
    marks: NDArray[np.uint64]
    torn: int
    """Records that were not whole: one, normally, for a thread that was at it when the process ended."""

    @property
    def offset_ns(self) -> int:
        """Epoch less the records' clock."""
        return self.head["offset_ns"]

    @property
    def ended_well(self) -> bool:
        """Whether the process ended recording itself."""
        return self.head["ended"] != 0

    @property
    def last_ns(self) -> int:
        """The newest time in the file."""
        times = [self.head["seen_ns"]]
        if len(self.stages):
            starts = self.stages[:, 4].astype(np.int64)
            times.append(int((starts + durations_ns(self.stages)).max()))
        return max(times)


def durations_ns(stages: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return how long stages took; 0 for those that have not ended."""
    took: NDArray[np.int64] = (stages[:, 5] >> np.uint64(2)).astype(np.int64)
    return took


def have_ended(stages: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return which stages have ended."""
    ended: NDArray[np.bool_] = stages[:, 5] != 0
    return ended


def numbers_of(records: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the numbers of the stages' names."""
    numbers: NDArray[np.int64] = (records[:, _WORD] >> np.uint64(layout.SITE_AT)).astype(np.int64) & layout.SITES - 1
    return numbers


def flags_of(records: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the flags."""
    flags: NDArray[np.int64] = (records[:, _WORD] >> np.uint64(layout.FLAGS_AT)).astype(np.int64) & 0xFF
    return flags


def unrounded(bits: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the nanoseconds that 16 bits stand for: eleven bits, and five to shift them by."""
    number = bits.astype(np.int64)
    shifted: NDArray[np.int64] = (number & _MANTISSA) << (number >> _EXPONENT_AT)
    return shifted


def read_flight(path: str | PathLike[str]) -> FlightRing:
    """
    Read a file, whether its process still runs or not.

    Raises:
        OSError: it cannot be read.
        NotAFlightError: it is none of a flight recorder, or was not finished.

    """
    data = Path(path).read_bytes()
    if len(data) < layout.RING_AT or _number(data, 0) != layout.MAGIC:
        raise NotAFlightError("not the file of a flight recorder, or one that was not finished")
    slots = min(_number(data, layout.HEAD["slots"]), (len(data) - layout.RING_AT) // layout.SLOT_BYTES)
    rows = np.frombuffer(data, np.uint64, slots * 8, layout.RING_AT).reshape(-1, 8)
    whole = _are_whole(rows)
    kinds = np.where(whole, rows[:, _WORD] & np.uint64(15), 0)
    torn = int(((rows != 0).any(axis=1) & ~whole).sum())
    signed = {"offset_ns", "seen_ns"}
    return FlightRing(
        head={name: _number(data, at, signed=name in signed) for name, at in layout.HEAD.items()},
        reason=_text(data, layout.REASON_AT, layout.REASON_BYTES),
        resource=_resource(data),
        devices=_devices(data),
        threads=_threads(data),
        names=_names(data),
        stages=_in_order(rows[kinds == layout.STAGE]),
        resolved=rows[kinds == layout.RESOLVED],
        marks=_in_order(rows[kinds == layout.MARK]),
        torn=torn,
    )


def _are_whole(rows: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return which records are there and have a check that holds."""
    word = rows[:, _WORD]
    bare = word & ~np.uint64(0xFFFF << layout.CHECK_AT)
    total = bare * np.uint64(layout.WORD_WEIGHT)
    for column, weight in enumerate(layout.WEIGHTS):
        total = total + rows[:, column] * np.uint64(weight)
    total = total - np.where(word & np.uint64(15) == layout.STAGE, rows[:, 5] * np.uint64(layout.WEIGHTS[5]), 0)
    check = total * np.uint64(layout.SPREAD) >> np.uint64(48)
    holds: NDArray[np.bool_] = (word & np.uint64(15) != 0) & (
        check == word >> np.uint64(layout.CHECK_AT) & np.uint64(0xFFFF)
    )
    return holds


def _in_order(rows: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return rows[np.argsort(rows[:, 4], kind="stable")]


def _number(data: bytes, at: int, *, signed: bool = False) -> int:
    return int.from_bytes(data[at : at + 8], "little", signed=signed)


def _text(data: bytes, at: int, room: int) -> str:
    size = min(int.from_bytes(data[at : at + 4], "little"), room - 4)
    return data[at + 4 : at + 4 + size].decode("utf-8", "replace")


def _resource(data: bytes) -> dict[str, Any]:
    with suppress(ValueError):
        found = json.loads(_text(data, layout.RESOURCE_AT, layout.RESOURCE_BYTES))
        if isinstance(found, dict):
            return found
    return {}


def _devices(data: bytes) -> dict[int, tuple[str, str]]:
    places = {index: layout.DEVICES_AT + index * layout.DEVICE_BYTES for index in range(layout.DEVICES)}
    rest = layout.DEVICE_BYTES - layout.UUID_AT
    found = {
        index: (_text(data, at, layout.UUID_AT), _text(data, at + layout.UUID_AT, rest)) for index, at in places.items()
    }
    return {index: known for index, known in found.items() if any(known)}


def _threads(data: bytes) -> dict[int, str]:
    found = {}
    for index in range(layout.THREADS):
        at = layout.THREADS_AT + index * layout.THREAD_BYTES
        if name := _text(data, at + 8, layout.THREAD_BYTES - 8):
            found[_number(data, at)] = name
    return found


def _names(data: bytes) -> dict[int, str]:
    places = range(layout.SITES_AT, layout.RING_AT, layout.SITE_BYTES)
    return {number: _text(data, at, layout.SITE_BYTES) for number, at in enumerate(places) if data[at]}
