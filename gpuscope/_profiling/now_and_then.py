"""
Deep looks by themselves: a short one at a random moment now and then, whose figures are kept and whose trace is not.

What they see of the GPU is counted where answers of streams are: the two are two measurements of one thing.
"""

from __future__ import annotations

import json
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from gpuscope._data.plain.values import shown
from gpuscope._data.statistics import LookedStage
from gpuscope._log import SUPPRESSED, WarnOnce
from gpuscope._profiling.deep_look import JSON, TRACE
from gpuscope._profiling.on_demand import DEADLINE_S, OnDemand, look_at, read_elsewhere
from gpuscope._recording.state import state

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._recording.recorder import Recorder
    from gpuscope._settings.config import Config

CALM_S = 30.0
"""After a capture of a CUDA graph there is no look for so long: the end of one would break a capture."""
Report: TypeAlias = "dict[str, Any]"
"""What `DeepFindings.as_dict` returns."""


def polls(config: Config) -> Callable[[Recorder], None] | None:
    """Return what the collector calls once per pass, if deep looks are wanted on demand, or now and then."""
    found: list[Callable[[Recorder], None]] = []
    if config.profile:
        found.append(OnDemand(config.profile).poll)
    if config.profile_every_s:
        found.append(NowAndThen(config.profile_every_s).poll)

    def poll(recorder: Recorder) -> None:
        for each in found:
            each(recorder)

    return poll if found else None


def read(trace: Path) -> Report:
    """
    Have another process read a trace, and return what it says.

    Raises:
        RuntimeError: if it fails.

    """
    done = read_elsewhere(trace, trace.parent)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-200:])
    report: Report = json.loads((trace.parent / JSON).read_text(encoding="utf-8"))
    return report


class NowAndThen:
    """
    Takes a look at random moments, one at a time.

    Args:
        every_s: seconds from one to the next, on average: each pause is from half of that to one and a half.
        read: reads a trace.
        clock: seconds, monotonic.

    """

    def __init__(
        self, every_s: float, *, read: Callable[[Path], Report] = read, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._every_s, self._read, self._clock = every_s, read, clock
        self._warnings = WarnOnce(SUPPRESSED)
        self._random = random.Random()  # noqa: S311 - not the program's, which may have seeded that
        self._thread: threading.Thread | None = None
        self._begun = 0
        self._due_s = clock() + self._pause_s()

    def _pause_s(self) -> float:
        # No rhythm, and not at the same time in all processes of a service.
        return self._random.uniform(0.5, 1.5) * self._every_s

    def poll(self, recorder: Recorder) -> None:
        """Start a look if it is time and none is on: a microsecond."""
        now_s = self._clock()
        if now_s < self._due_s or (self._thread is not None and self._thread.is_alive()):
            return
        if self._captures():
            self._due_s = now_s + CALM_S
            return
        self._due_s = now_s + self._pause_s()
        self._thread = threading.Thread(target=self._look, args=(recorder,), name="gpuscope-look", daemon=True)
        self._thread.start()

    def _captures(self) -> bool:
        """Whether CUDA graphs are being captured, or were since the last question: captures come in bursts."""
        if state.graphs is None:
            return False
        before, self._begun = self._begun, state.graphs.quiet.begun
        return self._begun != before or state.graphs.quiet.is_capturing

    def _look(self, recorder: Recorder) -> None:
        outcome: str = "failed"
        stages: list[LookedStage] = []
        try:
            outcome, stages = self._take(recorder)
        except Exception as error:  # The last guard of a thread of ours: the program has no part in it.
            self._warnings.warn("failed", "a deep look failed: %s.", shown(error))
        recorder.ledger.look(outcome, stages)

    def _take(self, recorder: Recorder) -> tuple[str, list[LookedStage]]:
        session = look_at(recorder, unwatched_s=DEADLINE_S, only_if_any=True, warn=self._warn)
        if session.why:
            return ("failed" if session.passed else "no_request"), []
        # Nobody else may enter it. What a trace says is the program's: it goes with its folder.
        with tempfile.TemporaryDirectory(prefix="gpuscope-look-") as folder:
            trace = Path(folder) / TRACE
            session.save(str(trace))
            stages = stages_of(self._read(trace))
        return ("done" if stages else "no_gpu_work"), stages

    def _warn(self, message: str, why: str) -> None:
        self._warnings.warn(why, message, why)


def stages_of(report: Report) -> list[LookedStage]:
    """Return what a look saw of each stage; nothing where it saw no work on a GPU, since that says nothing."""
    # A stage may be inside itself: the outermost counts, as where answers are counted.
    outermost = {(each["root"], each["name"]): each for each in sorted(report["stages"], key=lambda it: -it["depth"])}
    found = [_stage(each) for each in outermost.values() if each["by_request"]]
    return found if any(each.busy_s for each in found) else []


def _stage(look: dict[str, Any]) -> LookedStage:
    times = [(time_ms / 1e3, busy_ms / 1e3) for time_ms, busy_ms in look["by_request"]]
    return LookedStage(
        root=look["root"],
        stage=look["name"],
        requests=len(times),
        calls=look["calls"],
        time_s=sum(time_s for time_s, _ in times),
        busy_s=sum(busy_s for _, busy_s in times),
        kernels=look["kernels"] * look["calls"],
        time2_s2=sum(time_s * time_s for time_s, _ in times),
        busy2_s2=sum(busy_s * busy_s for _, busy_s in times),
        both_s2=sum(time_s * busy_s for time_s, busy_s in times),
    )
