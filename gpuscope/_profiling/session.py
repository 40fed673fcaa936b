"""
A deep look at a running program: torch.profiler for a few requests, with the stages as ranges in its trace.

Meanwhile `NvtxTap` stands in for the recorder's NVTX door, which the hot path asks about anyway. Afterwards nothing
remains but ranges that could not be closed. Never raises into the application: `why` says why there is no profile.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

from gpuscope._data.plain import values
from gpuscope._errors import CannotProfileError
from gpuscope._interrupts import is_an_interrupt
from gpuscope._log import logger
from gpuscope._profiling.torch_profiler import LEAVING_S, Profiler
from gpuscope._profiling.unwatched import Unwatched
from gpuscope._recording.hot_path import current

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from gpuscope._data.record import Site
    from gpuscope._recording.recorder import Recorder

WAITING, RUNNING, DONE = "waiting", "running", "done"

_never_closed: list[AbstractContextManager[object]] = []
"""Ranges of stages that were still running when their session ended: a few per session, kept for ever."""


class _OpenRange:
    """The open ranges of one stage: that of the door behind the tap, and ours."""

    __slots__ = ("inner", "noted", "range", "request", "seen")

    def __init__(self, inner: object, *, request: bool) -> None:
        self.inner = inner
        self.noted: tuple[str, str, int] | None = None  # What `Unwatched.add` takes, if nobody watched at its start.
        self.range: AbstractContextManager[object] | None = None
        self.request = request  # Whether this is an outermost stage.
        self.seen = False  # Whether the profiler was on at its start.


class NvtxTap:
    """Stands in for a recorder's NVTX door, opens that door's ranges too, and tells the session of every stage."""

    def __init__(self, session: ProfilingSession, recorder: Recorder) -> None:
        self._session = session
        self._recorder = recorder
        self._door = recorder.nvtx
        self._lock = threading.RLock()  # A garbage collection within may run a finalizer that is a stage.
        self._open = 0
        self._retired = False
        recorder.nvtx = self

    def begin(self, site: Site, suspends: int) -> object:
        """Open the ranges of a stage; called by the hot path after the stage has become the current one."""
        inner = self._door.begin(site, suspends) if self._door is not None else None
        with self._lock:
            if self._retired:
                return inner
            self._open += 1
        stage = current.get()
        opened = _OpenRange(inner, request=getattr(stage, "outer", None) is None and not site.warms_up)
        if self._session.state == WAITING and stage is not None and not site.warms_up:
            opened.noted = stage.trace.root.name, site.name, time.perf_counter_ns()
        self._session.enter(opened, site)
        return opened

    def end(self, opened: object) -> None:
        """Close them. What was opened before the session has no range of ours."""
        if type(opened) is not _OpenRange:
            if self._door is not None:
                self._door.end(opened)
            return
        try:
            self._session.leave(opened)
        finally:
            if opened.inner is not None and self._door is not None:
                self._door.end(opened.inner)
            with self._lock:
                self._open -= 1
                self._step_aside()

    def retire(self) -> None:
        """Open no more ranges, and put the door back as soon as the last of those that are open is closed."""
        with self._lock:
            self._retired = True
            self._step_aside()

    def _step_aside(self) -> None:
        if self._retired and not self._open and self._recorder.nvtx is self:
            self._recorder.nvtx = self._door


class ProfilingSession:
    """
    Counts requests, and runs the profiler for some of them.

    It starts and stops on the threads of the requests, between two requests.

    Args:
        requests: how many to profile.
        warmup: how many to let pass first; the profiler is prepared before the last of them. With 0 it starts at once.
        when_enough: called once `requests` of them have been profiled, instead of ending the profile there and then.
            It is also called once `warmup` have passed: the profiler then starts with `begin`, and not by itself.

    """

    def __init__(self, requests: int, warmup: int, *, when_enough: Callable[[], None] | None = None) -> None:
        self.requests, self.warmup = requests, warmup
        self.state = WAITING
        self.why = ""
        """Why there is no profile."""
        self.profiled = 0
        """Requests that began and ended while the profiler was on."""
        self.profiler: Profiler | None = None
        self.unwatched = Unwatched()
        self.passed = 0
        """Requests before that."""
        self._when_enough = when_enough
        self.warn: Callable[..., object] = logger.warning
        self._taps: list[NvtxTap] = []
        self._names: set[str] = set()
        self._roots: set[str] = set()
        self._lock = threading.RLock()
        self._gate = threading.RLock()
        self._inside = 0  # Threads that are in the profiler's code at this moment.

    def attach(self, recorder: Recorder) -> None:
        """Put a tap on a recorder's stages. There may be several recorders, one after the other."""
        with self._lock:
            if isinstance(recorder.nvtx, NvtxTap):
                self._give_up(
                    "another deep look is on, or stages of one are still open; end it first. The program goes on."
                )
            if self.state == WAITING and self._when_enough is None:
                self._advance()
            if self.state != DONE:
                self._taps.append(NvtxTap(self, recorder))

    def begin(self) -> None:
        """Start the profiler on this thread, though fewer requests than the warm-up may have passed."""
        with self._lock:
            if self.state == WAITING:
                self.passed = max(self.passed, self.warmup)
                self._advance()

    def enter(self, opened: _OpenRange, site: Site) -> None:
        """Take note of a stage that begins."""
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
            opened.range = None
            if is_an_interrupt(error):
                raise
            why = f"torch.profiler failed: {values.shown(error)}."
        finally:
            self._come_out(why)

    def leave(self, opened: _OpenRange) -> None:
        """Take note of a stage that ends."""
        if opened.range is not None:
            self._close(opened.range)
        elif opened.noted is not None and self.state == WAITING:
            self.unwatched.add(*opened.noted)
        # Not while the profile is being ended: that may take a while, and must not hold up other requests.
        if opened.request and self.state != DONE:
            self._count(opened)

    def _close(self, shown: AbstractContextManager[object]) -> None:
        if self._go_in() is None:
            # Closing it would write to what PyTorch has freed, or is about to free; so would its destructor.
            _never_closed.append(shown)
            return
        why = ""
        try:
            shown.__exit__(None, None, None)
        except Exception as error:  # As in `enter`.
            if is_an_interrupt(error):
                raise
            why = f"torch.profiler failed: {values.shown(error)}."
        finally:
            self._come_out(why)

    def _go_in(self) -> Profiler | None:
        """Return the profiler if it is on; it then stays on until `_come_out`."""
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
        """Let no more threads in, wait for those inside (microseconds), and return the state before."""
        with self._gate:
            state, self.state = self.state, DONE
        deadline = time.monotonic() + LEAVING_S
        while self._inside and time.monotonic() < deadline:
            time.sleep(0.001)
        return state

    def _count(self, opened: _OpenRange) -> None:
        # In production nobody waits while the profiler is prepared: a request that ends meanwhile does not count.
        if not self._lock.acquire(blocking=self._when_enough is None):
            return
        try:
            if self.state == WAITING:
                self.passed += 1
                if self._when_enough is None:
                    self._advance()
                elif self.passed == self.warmup:
                    self._when_enough()
            elif self.state == RUNNING and opened.seen:
                self.profiled += 1
                if self.profiled == self.requests:
                    (self._when_enough or self.finish)()
        finally:
            self._lock.release()

    def _advance(self) -> None:
        """Prepare the profiler after the last but one request of the warm-up, and start it after the last."""
        try:
            if self.profiler is None and self.passed >= self.warmup - 1:
                on_demand = self._when_enough is not None
                self.profiler = Profiler(early=not self.passed and not on_demand, elsewhere=on_demand)
                self.profiler.prepare()
            if self.profiler is not None and self.passed >= self.warmup:
                self.profiler.start()
                self.state, self.why = RUNNING, ""
        except CannotProfileError as error:
            self.profiler = None
            # A program may import PyTorch as late as in its first requests.
            if self.passed < max(self.warmup, 1):
                self.why = str(error)
            else:
                self._give_up(str(error))
        except Exception as error:  # PyTorch's, or CUPTI's: the program goes on without a profile.
            if is_an_interrupt(error):
                raise
            self._give_up(f"torch.profiler did not start: {values.shown(error)}.")

    def finish(self) -> None:
        """End the profile, if it is on, and leave the recorders as they were."""
        with self._lock:
            state = self._end()
            if state == RUNNING and self.profiler is not None:
                try:
                    note: dict[str, object] = {"stages": sorted(self._names), "requests": sorted(self._roots)}
                    note |= {"gpu": self.profiler.has_gpu, "unwatched": self.unwatched.note()}
                    self.profiler.stop({"gpuscope": note})
                except Exception as error:  # As in `_advance`.
                    self._give_up(f"torch.profiler did not end: {values.shown(error)}.")
            elif state == WAITING:
                self.profiler = None
                seen = (
                    f"{self.passed} requests (outermost stages) ended, and {self.warmup} are to pass before it starts"
                )
                self.why = self.why or f"{seen}; run more requests, or give a smaller `warmup`."
            if not self.profiled:
                self.why = self.why or "no request (outermost stage) ran from its start to its end while it was on."
            for tap in self._taps:
                tap.retire()

    def save(self, path: str) -> None:
        """Write the trace of a session that has ended well; possible once."""
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
            self.warn("no deep look: %s", why)
            for tap in self._taps:
                tap.retire()
