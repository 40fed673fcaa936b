"""
A deep look at a program that runs: torch.profiler for a few requests, with the stages as ranges in its trace.

While it is on, `NvtxTap` stands where the recorder's NVTX door was, which the hot path asks about anyway; afterwards
the door is back and nothing of the look is left. Never raises into the application: why there is no profile is in
`why`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

from gpuscope._errors import CannotProfileError
from gpuscope._log import logger
from gpuscope._profiling.torch_profiler import LEAVING_S, Profiler
from gpuscope._recording.hot_path import current

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._data.record import Site

WAITING, RUNNING, DONE = "waiting", "running", "done"

_never_closed: list[Any] = []
"""Ranges of stages that were running when their look ended: a few a look, kept for ever."""


class _OpenRange:
    """What is open of a stage: the range of the door behind, and ours."""

    __slots__ = ("inner", "range", "request", "seen")

    def __init__(self, inner: Any, *, request: bool) -> None:
        self.inner = inner
        self.range: Any = None
        self.request = request
        """Whether this is an outermost stage."""
        self.seen = False
        """Whether the profiler was on at its start."""


class NvtxTap:
    """Stands for a recorder's NVTX door, opens that one's ranges too, and tells the look of every stage."""

    def __init__(self, look: ProfilingSession, recorder: Any) -> None:
        self._look = look
        self._recorder = recorder
        self._door = recorder.nvtx
        self._lock = threading.Lock()
        self._open = 0
        self._retired = False
        recorder.nvtx = self

    def begin(self, site: Site, suspends: int) -> Any:
        """Open the ranges of a stage; called by the hot path after the stage has become the current one."""
        inner = self._door.begin(site, suspends) if self._door is not None else None
        with self._lock:
            if self._retired:
                return inner
            self._open += 1
        stage = current.get()
        opened = _OpenRange(inner, request=getattr(stage, "outer", None) is None and not site.warms_up)
        self._look.enter(opened, site)
        return opened

    def end(self, opened: Any) -> None:
        """Close them. What was opened before the look has no range of ours."""
        if type(opened) is not _OpenRange:
            if self._door is not None:
                self._door.end(opened)
            return
        try:
            self._look.leave(opened)
        finally:
            if opened.inner is not None:
                self._door.end(opened.inner)
            with self._lock:
                self._open -= 1
                self._step_aside()

    def retire(self) -> None:
        """Take part no more, and put the door back as soon as no stage is open that this one has to close."""
        with self._lock:
            self._retired = True
            self._step_aside()

    def _step_aside(self) -> None:
        if self._retired and not self._open and self._recorder.nvtx is self:
            self._recorder.nvtx = self._door


class ProfilingSession:
    """
    Counts requests, and has the profiler on for some of them: all on the threads of the requests, between two of them.

    Args:
        requests: how many to profile.
        warmup: how many to let pass first; the profiler is prepared before the last of these. With 0 it starts at once.
        when_enough: called when so many have ended, instead of ending the profile there and then.

    """

    def __init__(self, requests: int, warmup: int, *, when_enough: Callable[[], None] | None = None) -> None:
        self.requests, self.warmup = requests, warmup
        self.state = WAITING
        self.why = ""
        """Why there is no profile."""
        self.profiled = 0
        """Requests that ended while the profiler was on and began so."""
        self.profiler: Profiler | None = None
        self._passed = 0
        self._when_enough = when_enough
        self._taps: list[NvtxTap] = []
        self._names: set[str] = set()
        self._roots: set[str] = set()
        self._lock = threading.RLock()
        self._gate = threading.Lock()
        self._inside = 0
        """Threads that are in the profiler's code at this moment."""

    def attach(self, recorder: Any) -> None:
        """Take part in a recorder's stages. There may be several recorders, one after the other."""
        with self._lock:
            if isinstance(recorder.nvtx, NvtxTap):
                self._give_up("another deep look is on, or stages of one are; end it first. The program goes on.")
            if self.state == WAITING:
                self._advance()
            if self.state != DONE:
                self._taps.append(NvtxTap(self, recorder))

    def enter(self, opened: _OpenRange, site: Site) -> None:
        """Take notice of a stage that begins."""
        profiler = self._go_in()
        if profiler is None:
            return
        opened.seen = True
        self._names.add(site.name)
        if opened.request:
            self._roots.add(site.name)
        why = ""
        try:
            opened.range = profiler.range(site.name)
            opened.range.__enter__()
        except Exception as error:  # The stage is recorded all the same.
            opened.range, why = None, f"torch.profiler failed: {error!r}."
        self._come_out(why)

    def leave(self, opened: _OpenRange) -> None:
        """Take notice of a stage that ends."""
        if opened.range is not None:
            self._close(opened.range)
        # Not while the profile is being ended, which may take a while and must not hold up other requests.
        if opened.request and self.state != DONE:
            self._count(opened)

    def _close(self, opened: Any) -> None:
        if self._go_in() is None:
            # It would write to what PyTorch has freed, or is about to free; so would its destructor.
            _never_closed.append(opened)
            return
        why = ""
        try:
            opened.__exit__(None, None, None)
        except Exception as error:  # As in `enter`.
            why = f"torch.profiler failed: {error!r}."
        self._come_out(why)

    def _go_in(self) -> Profiler | None:
        """Return the profiler if it is on, which it then is until `_come_out`."""
        with self._gate:
            if self.state != RUNNING or self.profiler is None:
                return None
            self._inside += 1
            return self.profiler

    def _come_out(self, why: str) -> None:
        with self._gate:
            self._inside -= 1
        if why:
            self._give_up(why)

    def _end(self) -> str:
        """Let nobody go in any more, wait for those inside (microseconds), and return the state before."""
        with self._gate:
            state, self.state = self.state, DONE
        deadline = time.monotonic() + LEAVING_S
        while self._inside and time.monotonic() < deadline:
            time.sleep(0.001)
        return state

    def _count(self, opened: _OpenRange) -> None:
        with self._lock:
            if self.state == WAITING:
                self._passed += 1
                self._advance()
            elif self.state == RUNNING and opened.seen:
                self.profiled += 1
                if self.profiled == self.requests:
                    (self._when_enough or self.finish)()

    def _advance(self) -> None:
        """Prepare the profiler when the last request but one of the warm-up has passed, and start it after the last."""
        try:
            if self.profiler is None and self._passed >= self.warmup - 1:
                on_demand = self._when_enough is not None
                self.profiler = Profiler(early=not self._passed and not on_demand, elsewhere=on_demand)
                self.profiler.prepare()
            if self.profiler is not None and self._passed >= self.warmup:
                self.profiler.start()
                self.state, self.why = RUNNING, ""
        except CannotProfileError as error:
            self.profiler = None
            # A program may import PyTorch as late as in its first requests.
            if self._passed < max(self.warmup, 1):
                self.why = str(error)
            else:
                self._give_up(str(error))
        except Exception as error:  # PyTorch's, or CUPTI's: the program goes on without a profile.
            self._give_up(f"torch.profiler did not start: {error!r}.")

    def finish(self) -> None:
        """End the profile, if it is on, and leave the recorders as they were."""
        with self._lock:
            state = self._end()
            if state == RUNNING and self.profiler is not None:
                try:
                    self.profiler.stop({"gpuscope": {"stages": sorted(self._names), "requests": sorted(self._roots)}})
                except Exception as error:  # As in `_advance`.
                    self._give_up(f"torch.profiler did not end: {error!r}.")
            elif state == WAITING:
                self.profiler = None
                seen = (
                    f"{self._passed} requests (outermost stages) ended, and {self.warmup} are to pass before it starts"
                )
                self.why = self.why or f"{seen}; give more, or a smaller `warmup`."
            if not self.profiled:
                self.why = self.why or "no request (outermost stage) ran from its start to its end while it was on."
            for taps in self._taps:
                taps.retire()

    def save(self, path: str) -> None:
        """Write the trace of a look that has ended well: once."""
        assert self.profiler is not None
        self.profiler.save(path)
        self.profiler = None  # It holds every event.

    def _give_up(self, why: str) -> None:
        with self._lock:
            state, profiler = self._end(), self.profiler
            self.why, self.profiler = why, None
            if state == RUNNING and profiler is not None:
                with contextlib.suppress(Exception):  # It has failed already, and that is what is said.
                    profiler.stop({})
            logger.warning("no deep look: %s", why)
            for taps in self._taps:
                taps.retire()
