"""
The flight recorder: a file with the newest stages, which is there whatever ends the process.

The hot path writes its ring (`ring.py`). Here is the rest: the file is opened, the collector adds what became of
stages and makes dumps, and at the end it is said that all went well. Nothing here raises into a pass or a stage:
without a file there is no flight recorder, and that is said once.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from gpuscope._data import flight as layout
from gpuscope._data.plain.values import shown
from gpuscope._data.statistics import ROOM
from gpuscope._flight.dumps import Dumps
from gpuscope._flight.files import FlightFile, RefusedError, open_file
from gpuscope._flight.resolved import records_of
from gpuscope._flight.ring import make_ring, write_text
from gpuscope._flight.triggers import listen, out_of_memory
from gpuscope._interrupts import is_the_programs
from gpuscope._log import WarnOnce, inform, later
from gpuscope._settings.environment import is_our_command

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from gpuscope._data.batch import StageBatch
    from gpuscope._data.record import StageRecord
    from gpuscope._data.statistics import Statistics
    from gpuscope._flight.ring import Ring
    from gpuscope._recording.state import Period

_warnings = WarnOnce(say=later)
_MOST_ASKED = 16


class FlightRecorder:
    """
    The collector's side of one file.

    Args:
        file: reserved and mapped.
        ring: in that file.
        clock: of the records.
        statistics: returns the account of this moment.
        keeps: whether the file stays when the process ends well.

    """

    def __init__(
        self,
        file: FlightFile,
        ring: Ring,
        *,
        clock: Callable[[], int],
        statistics: Callable[[], Statistics],
        keeps: bool,
    ) -> None:
        self.ring = ring
        self._file, self._clock, self._statistics, self._keeps = file, clock, statistics, keeps
        self._dumps = Dumps(file.base, file.mapped)
        self._asked: deque[str] = deque(maxlen=_MOST_ASKED)
        self._devices: set[int] = set()
        self._is_described = False
        self._pid = os.getpid()
        self._begin()

    @property
    def _is_ours(self) -> bool:
        """Whether this is not the child of a fork that Python did not make, as a library may."""
        return self._pid == os.getpid()

    def _begin(self) -> None:
        file = self._file
        file.put("pid", os.getpid())
        file.put("slots", (len(file.mapped) - layout.RING_AT) // layout.SLOT_BYTES)
        file.put("opened_ns", time.time_ns())
        write_text(file.mapped, layout.SITES_AT, layout.OTHER_STAGES, layout.SITE_BYTES)
        now_ns = self._clock()
        file.put("offset_ns", time.time_ns() - now_ns)
        file.put("seen_ns", now_ns)
        file.put("magic", layout.MAGIC)

    def poll(self) -> None:
        """Note the account, and make a dump if one is wanted; the collector calls it once per pass."""
        try:
            if self._is_ours:
                self._poll()
        except Exception as error:  # The pass goes on.
            _warnings.warn("pass", "a pass of the flight recorder failed: %s.", shown(error))

    def _poll(self) -> None:
        self._file.put("seen_ns", self._clock())
        self._note_account(self._statistics())
        if not self._is_described:
            self._is_described = True
            self._describe()
        out_of_memory.attach()
        self._dump()

    def _note_account(self, account: Statistics) -> None:
        file = self._file
        file.put("waiting", account.pending)
        file.put("recorded", account.recorded)
        file.put("exported", account.exported)
        file.put("dropped", sum(count for reason, count in account.dropped.items() if reason in ROOM))
        file.put("lost", sum(account.lost.values()))
        file.put("untimed", sum(account.untimed.values()))

    def _describe(self) -> None:
        from gpuscope.exporters._encoding.resource import basic_attributes, resource_attributes  # They take a while.

        # To import the SDK for this alone would hold the GIL for long.
        has_sdk = "opentelemetry.sdk.resources" in sys.modules
        text = json.dumps(resource_attributes() if has_sdk else basic_attributes())
        if len(text) <= layout.RESOURCE_BYTES - 4:
            write_text(self._file.mapped, layout.RESOURCE_AT, text, layout.RESOURCE_BYTES)

    def _dump(self) -> None:
        wanted = self.ring.take_wanted() | out_of_memory.take()
        reasons = [reason for bit, reason in layout.REASONS.items() if wanted & bit]
        reasons += [self._asked.popleft() for _ in range(len(self._asked))]
        for reason in reasons:
            try:
                path = self._dumps.make(reason)
            except OSError as error:
                path = None
                _warnings.warn("dump", "no dump of the flight recorder: %s.", error.strerror)
            if path is None:
                self._file.add("refused_dumps", 1)
            else:
                self._file.put("seen_ns", self._clock())  # If the process dies now, that was after this copy.
                inform("flight recorder: %s, because of: %s.", path, reason)

    def ask(self, reason: str) -> None:
        """Ask for a dump, from any thread; the collector makes it in its next pass."""
        self._asked.append(reason)

    def add(self, batch: StageBatch, offset_ns: NDArray[np.int64]) -> None:
        """Write what became of resolved stages: their GPU times, and their ids as they are exported."""
        try:
            if not self._is_ours:
                return
            self.ring.write(records_of(batch, self.ring, offset_ns))
            self._file.put("offset_ns", int(offset_ns.max()))  # As exporters place them, so that both agree.
            for index, device in batch.devices.items():
                if index not in self._devices and 0 <= index < layout.DEVICES:
                    self._devices.add(index)
                    at = layout.DEVICES_AT + index * layout.DEVICE_BYTES
                    write_text(self._file.mapped, at, device.name, layout.UUID_AT)
                    uuid_at, room = at + layout.UUID_AT, layout.DEVICE_BYTES - layout.UUID_AT
                    write_text(self._file.mapped, uuid_at, device.uuid, room)
            for asked, had_work in (batch.device_samples or {}).values():
                self._file.add("asked", asked)
                self._file.add("had_work", had_work)
        except Exception as error:  # It costs the flight recorder this batch, and nobody else anything.
            _warnings.warn("batch", "the flight recorder lacks a batch: %s.", shown(error))

    def close(self) -> None:
        """Make the last dump, say in the file that all went well, and let go of it."""
        if not self._is_ours:
            return
        with contextlib.suppress(Exception):  # The end of recording goes on.
            self._dump()
            self._file.put("seen_ns", self._clock())
            self._file.put("ended", 1)
        self._let_go()
        if not self._keeps:
            with contextlib.suppress(OSError):
                self._file.path.unlink()

    def abandon(self) -> None:
        """Let go of the file, which is the parent's."""
        self._let_go()

    def _let_go(self) -> None:
        with contextlib.suppress(Exception):  # As above.
            self.ring.close()
            self._file.close()


class FirstStage:
    """
    Opens the file with the first stage.

    That of a child of a fork: most have none, and need no memory for one. And that of `gpuscope run`'s program: other
    commands read such files, and must not make another in the place of one.
    """

    def __init__(self, period: Period, *, is_child: bool) -> None:
        self._period, self._is_child = period, is_child
        self._turn = threading.Lock()

    def begin(self, record: StageRecord) -> None:
        """Open the file, step aside, and note the stage."""
        if self._turn.acquire(blocking=False):  # Who comes meanwhile is not in the file.
            recorder = self._period.recorder
            recorder.flight = None
            if not is_our_command():
                _open(self._period, is_child=self._is_child)
            if recorder.flight is not None:
                recorder.flight.begin(record)

    def end(self, record: StageRecord, error: BaseException | None) -> None:
        """Do nothing: what has begun before is not in the file."""


def attach(period: Period, *, is_child: bool) -> None:
    """Give a period of recording its flight recorder, at once or with its first stage."""
    if is_child or is_our_command():
        period.recorder.flight = FirstStage(period, is_child=is_child)
    else:
        _open(period, is_child=False)


def _open(period: Period, *, is_child: bool) -> None:
    """Open the file and have the hot path write to it, or say why there is none."""
    config, recorder = period.config, period.recorder
    warnings = WarnOnce(say=later) if is_child else WarnOnce()
    try:
        file = open_file(config.flight, config.flight_bytes, touch=not is_child)
        ring = make_ring(file.mapped, round(config.flight_slow_s * 1e9))
        keeps = not is_child and file.path == file.base
        recorder.flight_recorder = FlightRecorder(
            file, ring, clock=recorder.clock, statistics=period.statistics, keeps=keeps
        )
        recorder.flight = ring
        listen(ring)
    except RefusedError as error:
        warnings.warn("refused", "there is no flight recorder: %s.", error.args[0])
    except Exception as error:  # Whatever it is, stages go on without.
        if is_the_programs(error):
            raise
        warnings.warn("open", "there is no flight recorder: %s.", shown(error))
