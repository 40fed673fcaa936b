"""
The layout of a flight recorder's file: a head, tables, and a ring of records of 64 bytes. The twin is `csrc/flight.h`.

Who writes and who reads share it. All numbers are 64 bits, in the order of the machine. A record is seven numbers and a
*word*, which is written last: it says what the record is, in which lap of the ring it was written, and has a check of
the rest. At the end is what the recorder, the collector and what looks for stalls (`_stalls/`) tell each other.
Nothing here acts but the check.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from gpuscope._data.batch import StageBatch
    from gpuscope._data.record import StageRecord

MAGIC = 0x3154_4847_494C_4653
"""`SFLIGHT1`, written when the file is ready."""
LEAST_BYTES, MOST_BYTES = 1 << 20, 1 << 34

HEAD = {
    "magic": 0,
    "pid": 8,
    "slots": 16,
    "opened_ns": 24,
    "ended": 32,
    "offset_ns": 40,
    "seen_ns": 48,
    "waiting": 56,
    "recorded": 64,
    "exported": 72,
    "dropped": 80,
    "lost": 88,
    "untimed": 96,
    "asked": 104,
    "had_work": 112,
    "refused_dumps": 120,
}
"""
Where the numbers of the head are, in bytes. `offset_ns` is the epoch less the records' clock, and `seen_ns` that
clock when the collector last came by. From `waiting` on they are the account, as the collector last knew it.
"""
REASON_AT, REASON_BYTES = 256, 64
"""Why a copy was made: a length in 4 bytes, and text, as each text in the file is."""
DEVICES_AT, DEVICES, DEVICE_BYTES, UUID_AT = 4096, 16, 256, 160
"""The models of GPUs by their index; each one's uuid stands behind the model."""
RESOURCE_AT, RESOURCE_BYTES = 8192, 8192
"""The attributes of the process, in JSON."""
THREADS_AT, THREADS, THREAD_BYTES = 16_384, 512, 64
"""An ident, and a name as text. The oldest makes room for the newest."""
SITES_AT, SITES, SITE_BYTES = 49_152, 4096, 128
"""Names of stages, by number. Number 0 is that of all for which there is no room."""
RING_AT = SITES_AT + SITES * SITE_BYTES
SLOT_BYTES = 64
END_AT = 40
"""Where in a stage's record its end is."""
OTHER_STAGES = "(other stages)"

STAGE, RESOLVED, MARK = 1, 2, 3
"""
What a record is.

`STAGE`: both halves of the trace's id, the span's id, the parent's, the start, the end, the thread. The end is 0 while
the stage runs; then it is the duration times 4, plus 2 if an exception left the stage, plus 1. The check leaves it out.
`RESOLVED`, of the collector: both halves and the span's id as they are exported, the start on the host, the start on
the GPU, the device + 1 above 48 bits of the time on the GPU, a rounded uncertainty above 48 bits of the stream.
`MARK`: both halves, the span's id, why a dump is wanted, the start, the duration, the thread.
"""
REMOTE = 2
"""A flag of a stage's record: the parent is of another process."""
ROW_FLAGS, SAMPLED = 0x7F, 0x80
"""The flags of what the collector writes: those of `RowFlag`, and whether the stage is exported."""
KIND_BITS, FLAG_BITS, SITE_BITS, CHECK_BITS = 4, 8, 12, 16
FLAGS_AT, SITE_AT, CHECK_AT, LAP_AT = 4, 12, 24, 40
LAPS = 1 << 24
WEIGHTS = (1, 3, 5, 7, 11, 13, 17)
WORD_WEIGHT, SPREAD = 19, 0x9E37_79B9_7F4A_7C15
LOW_48, LOW_64 = (1 << 48) - 1, (1 << 64) - 1
MOST_SKIPPED = 16
"""So many records of stages that still run are stepped over at once; beyond that the oldest is lost."""

SLOW, FAILED, OUT_OF_MEMORY, SIGNAL = 1, 2, 4, 8
"""Why a dump is wanted, as bits."""
REASONS = {OUT_OF_MEMORY: "oom", FAILED: "error", SLOW: "slow", SIGNAL: "signal"}
DIED = "died"
"""The reason in the name of a file that an earlier process left."""

SLOT = struct.Struct("=8Q")
NUMBER, LENGTH = struct.Struct("=Q"), struct.Struct("=I")


def checked(fields: tuple[int, ...], word: int) -> int:
    """Return the word of a record with its check, which is of 16 bits."""
    total = sum(weight * field for weight, field in zip(WEIGHTS, fields, strict=True)) + WORD_WEIGHT * word
    if word & 15 == STAGE:
        total -= WEIGHTS[5] * fields[5]
    return word | ((total * SPREAD & LOW_64) >> 48) << CHECK_AT


def cut(text: str, most: int) -> bytes:
    """Return text in UTF-8, cut where it is too long, between two letters."""
    return text.encode("utf-8", "replace")[:most].decode("utf-8", "ignore").encode()


class Flight(Protocol):
    """Keeps the newest stages where they outlive the process: `_flight.ring.Ring`, or what opens one. Never raises."""

    def begin(self, record: StageRecord) -> None:
        """Note that a stage has begun."""

    def end(self, record: StageRecord, error: BaseException | None) -> None:
        """Note that it has ended."""


class FlightRecorder(Protocol):
    """The collector's side of that: `_flight.flight_recorder.FlightRecorder`. It never raises."""

    def add(self, batch: StageBatch, offset_ns: NDArray[np.int64]) -> None:
        """Write what became of stages, whose times are later by this than the records': one number, or each's."""

    def poll(self) -> None:
        """Note the account, and make a copy of the file if one is wanted; called once per pass."""

    def ask(self, reason: str) -> None:
        """Ask for a copy of the file."""

    def close(self) -> None:
        """Say in the file that recording ended well, and let go of it."""

    def abandon(self) -> None:
        """Let go of the file, which is the parent's."""


StallEvent: TypeAlias = "tuple[str, int, Mapping[str, object]]"
"""The event of a stage that stalled: name, nanoseconds on the records' clock, attributes."""


class WaitingStage(NamedTuple):
    """The oldest stage of a stream that the host has left, and whose GPU work is not known to be done."""

    record: StageRecord
    device: int
    stream: int
    waiting: int
    """How many stages wait there."""
    asked_ns: int
    """When the GPU last said that it is not done; 0 for never."""
    done: str
    """The stage that was done there last; empty for none."""
    done_ns: int
    """When that was found."""


class StallWatch(Protocol):
    """Looks for stages without progress: `_stalls.stalls.Stalls`. It never raises."""

    has_events: bool
    """Whether there are events for stages that end later."""

    def take_event(self, span_id: int) -> StallEvent | None:
        """Return the event of a stage, once."""

    def look(self, batch: StageBatch) -> None:
        """Learn the names of stages."""

    def start(self) -> None:
        """Look again, after `stop`."""

    def stop(self) -> None:
        """Look for nothing until `start`."""

    def close(self) -> None:
        """End."""

    def abandon(self) -> None:
        """Let go: this process is the child of a fork."""
