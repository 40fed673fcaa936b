"""
Where `gpuscope top` looks: the file of a flight recorder, or the lines of the `file` exporter as they come.

Both are read and never written; the service does not notice. A file that is replaced, as by a restart, is followed.
"""

from __future__ import annotations

import os
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from gpuscope._data import flight as layout
from gpuscope._errors import CommandError
from gpuscope.analysis._reading.flight_batch import batch_of
from gpuscope.analysis._reading.flight_ring import NotAFlightError, durations_ns, have_ended, numbers_of, read_flight
from gpuscope.analysis._reading.spans import Lines
from gpuscope.commands._top.view import WINDOW_S, View
from gpuscope.commands.flight import is_held

if TYPE_CHECKING:
    from gpuscope.analysis._reading.flight_ring import FlightRing

_MOST_BYTES = 32 << 20
"""Of lines that were there before: so much is read."""
_ACCOUNT = ("waiting", "dropped", "lost", "untimed", "refused_dumps")

_NO_RECORDING = "{} is not a recording: neither a flight recorder's file nor lines of the exporter `file`."


class Source(Protocol):
    """A place to look at again and again."""

    def look(self) -> View:
        """
        Return this moment.

        Raises:
            CommandError: it cannot be read.

        """


def source_of(path: str) -> Source:
    """
    Return what reads a path.

    Raises:
        CommandError: there is nothing to read.

    """
    try:
        with Path(path).open("rb") as file:
            first = file.read(8)
    except OSError as error:
        way_out = f"With GPUSCOPE=1 GPUSCOPE_FLIGHT={path} a service makes it."
        raise CommandError(f"cannot read {path!r}: {error.strerror or error}. {way_out}") from error
    if first == layout.MAGIC.to_bytes(8, "little"):
        return RingSource(path)
    if first.strip() and not first.lstrip().startswith(b"{"):
        raise CommandError(_NO_RECORDING.format(repr(path)))
    return LinesSource(path)


class RingSource:
    """The file of a flight recorder."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._asked: deque[tuple[int, int, int]] = deque()
        """(time, how often streams were asked, how often they had work), for the window."""

    def look(self) -> View:
        """As in `Source`."""
        before_ns = time.perf_counter_ns()
        try:
            ring, runs = read_flight(self._path), is_held(self._path)
        except OSError as error:
            raise CommandError(f"cannot read {self._path!r} any more: {error.strerror or error}.") from error
        except NotAFlightError as error:
            raise CommandError(f"{self._path!r} is not the file of a flight recorder any more.") from error
        stages = ring.stages
        now_ns = before_ns if runs else ring.last_ns
        starts = stages[:, 4].astype(np.int64)
        ended = have_ended(stages)
        ends = starts + durations_ns(stages)
        recent = np.flatnonzero(ended & (ends > now_ns - WINDOW_S * 1e9))
        first_ns = int(starts[0]) if len(starts) else now_ns
        state = "runs" if runs else "ended well" if ring.ended_well else "did not end well"
        batch = batch_of(ring) if len(stages) else None
        gpu_ns = np.full(len(stages), -1)
        if batch is not None:
            gpu_ns = np.where(batch.gpu_end_ns != 0, batch.gpu_end_ns - batch.gpu_start_ns, -1)
        numbers, stage = np.unique(numbers_of(stages)[recent], return_inverse=True)
        return View(
            state=f"process {ring.head['pid']} {state}",
            names=tuple(ring.names.get(number, layout.OTHER_STAGES) for number in numbers.tolist()),
            stage=stage.ravel(),
            took_ns=(ends - starts)[recent],
            gpu_ns=gpu_ns[recent],
            failed=(stages[recent, 5] & np.uint64(2)) != 0,
            seconds=min(WINDOW_S, max(0.001, (now_ns - first_ns) / 1e9)),
            running=_running(ring, now_ns),
            account={name: ring.head[name] for name in _ACCOUNT},
            busy=self._busy(ring, now_ns),
        )

    def _busy(self, ring: FlightRing, now_ns: int) -> float | None:
        self._asked.append((now_ns, ring.head["asked"], ring.head["had_work"]))
        while len(self._asked) > 2 and self._asked[1][0] <= now_ns - WINDOW_S * 1e9:  # noqa: PLR2004 - first and last
            self._asked.popleft()
        (_, asked, had_work), (_, asked_now, had_work_now) = self._asked[0], self._asked[-1]
        if asked_now <= asked:  # Nothing new: what is known from the beginning.
            return had_work_now / asked_now if asked_now else None
        return (had_work_now - had_work) / (asked_now - asked)


def _running(ring: FlightRing, now_ns: int) -> dict[str, tuple[int, int]]:
    running = ring.stages[~have_ended(ring.stages)]
    found: dict[str, tuple[int, int]] = {}
    for number, start_ns in zip(numbers_of(running).tolist(), running[:, 4].tolist(), strict=True):
        name = ring.names.get(number, layout.OTHER_STAGES)
        count, longest_ns = found.get(name, (0, 0))
        found[name] = count + 1, max(longest_ns, now_ns - start_ns)
    return found


class _Ended(NamedTuple):
    end_ns: int
    name: str
    took_ns: int
    gpu_ns: int
    failed: bool
    samples: int
    had_work: int


class LinesSource:
    """A file of the `file` exporter, read as it grows. What runs is not in it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._inode = self._at = 0
        self._rest = b""
        self._first_ns = 0
        self._ended: deque[_Ended] = deque()
        self._account: dict[str, int] = {}

    def look(self) -> View:
        """As in `Source`."""
        try:
            self._take(self._new_bytes())
        except OSError as error:
            raise CommandError(f"cannot read {self._path!r} any more: {error.strerror or error}.") from error
        now_ns = time.time_ns()
        while self._ended and self._ended[0].end_ns < now_ns - WINDOW_S * 1e9:
            self._ended.popleft()
        rows = [*self._ended]
        names = tuple({row.name: None for row in rows})
        places = {name: place for place, name in enumerate(names)}
        samples = sum(row.samples for row in rows)
        return View(
            state="lines of the `file` exporter",
            names=names,
            stage=np.array([places[row.name] for row in rows], np.int64),
            took_ns=np.array([row.took_ns for row in rows], np.int64),
            gpu_ns=np.array([row.gpu_ns for row in rows], np.int64),
            failed=np.array([row.failed for row in rows], np.bool_),
            seconds=min(WINDOW_S, max(0.001, (now_ns - self._first_ns) / 1e9)) if self._first_ns else WINDOW_S,
            account=self._account,
            busy=sum(row.had_work for row in rows) / samples if samples else None,
        )

    def _new_bytes(self) -> bytes:
        with Path(self._path).open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._at:
                self._inode, self._rest = status.st_ino, b""
                self._at = max(0, status.st_size - _MOST_BYTES)
            file.seek(self._at)
            data = file.read()
        self._at += len(data)
        return data

    def _take(self, data: bytes) -> None:
        *whole, self._rest = (self._rest + data).split(b"\n")
        if not whole:
            return
        lines = Lines()
        for line in whole:
            lines.add(line)
        if lines.skipped and not (lines.host or lines.gpu or lines.account.of("dropped") or self._first_ns):
            raise CommandError(_NO_RECORDING.format(repr(self._path)))
        names = [*lines.names]
        found = []
        for key, part in lines.host.items():
            numbers, gpu = part.numbers, lines.gpu.get(key)
            took_ns = numbers.end_ns - numbers.start_ns
            timed = (gpu.end_ns - gpu.start_ns, gpu.samples, gpu.had_work) if gpu is not None else (-1, 0, 0)
            found.append(_Ended(numbers.end_ns, names[numbers.stage], took_ns, timed[0], numbers.error, *timed[1:]))
        self._ended = deque(sorted([*self._ended, *found]))
        if self._ended:
            self._first_ns = self._first_ns or self._ended[0].end_ns
        for kind in ("dropped", "lost", "untimed"):
            if counts := lines.account.of(kind):
                self._account[kind] = sum(counts.values())
