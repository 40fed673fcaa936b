"""
Deep looks on demand in a running service, asked for by a signal or by a file. Opens no port.

The collector calls `poll` once per pass. Each look has a thread of its own, which waits for requests. Its trace is read
in another process, because reading holds the GIL for longer than a request may take.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gpuscope._data.plain.values import shown
from gpuscope._log import logger
from gpuscope._profiling.session import ProfilingSession
from gpuscope._recording.state import state
from gpuscope._settings.environment import variables

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._recording.recorder import Recorder

REQUESTS = 5
UNWATCHED, UNWATCHED_S = 5, 10.0
"""Before that, so many requests are timed without the profiler, or as many as end within this time."""
DEADLINE_S = 60.0
"""How long to wait for these requests; a look that had fewer by then is at those."""
CAPTURES_S = 60.0
"""How long to wait at most for the end of captures."""
READING_TIMEOUT_S = 600.0


class OnDemand:
    """
    Starts a look when asked to, one at a time.

    Args:
        how: `signal`, or the path of a file whose appearance asks for a look. The file is removed, so that only one
            of several processes looks. The result goes beside it, or into the working directory for a signal.

    """

    def __init__(self, how: str) -> None:
        self._file = None if how == "signal" else how
        self._asked = False
        self._looks = 0
        self._thread: threading.Thread | None = None
        if self._file is None:
            self._listen()
        elif not (folder := Path(self._file).absolute().parent).is_dir():
            logger.warning(
                "GPUSCOPE_PROFILE: there is no folder %s, so the file that asks for a look has no place.", folder
            )

    def poll(self, recorder: Recorder) -> None:
        """Start a look if one is asked for and none is on: a microsecond or two."""
        if (self._thread is None or not self._thread.is_alive()) and self._take_wish():
            self._looks += 1
            self._thread = threading.Thread(target=self._profile, args=(recorder,), name="gpuscope-look", daemon=True)
            self._thread.start()

    def _take_wish(self) -> bool:
        if self._file is None:
            asked, self._asked = self._asked, False
            return asked
        try:
            os.unlink(self._file)  # noqa: PTH108 - in every pass, at a tenth of the cost of `Path.unlink`
        except FileNotFoundError:
            return False
        return True

    def _listen(self) -> None:
        """Handle SIGUSR2, unless the program does."""
        try:
            before = signal.getsignal(signal.SIGUSR2)
            if before is not signal.SIG_DFL and not isinstance(getattr(before, "__self__", None), OnDemand):
                logger.warning("GPUSCOPE_PROFILE=signal: the program handles SIGUSR2 itself; use the path of a file.")
                return
            signal.signal(signal.SIGUSR2, self._on_signal)
        except ValueError:
            logger.warning(
                "GPUSCOPE_PROFILE=signal: handlers can only be set in the main thread; call `gpuscope.enable()` there, "
                "or use the path of a file."
            )

    def _on_signal(self, *_: object) -> None:
        self._asked = True

    def _profile(self, recorder: Recorder) -> None:
        folder = Path(f"{self._file or 'gpuscope-profile'}-{os.getpid()}-{self._looks}").absolute()
        try:
            self._profile_into(folder, recorder)
        except Exception as error:  # The last guard of a thread of ours: the program has no part in it.
            logger.warning("the deep look into %s failed: %s.", folder, shown(error))

    def _profile_into(self, folder: Path, recorder: Recorder) -> None:
        session = look_at(recorder)
        if session.why:
            logger.warning("no deep look: %s", session.why)
            return
        folder = _new_folder(folder)
        trace = folder / "trace.json"
        session.save(str(trace))
        read = read_elsewhere(trace, folder)
        if read.returncode:
            logger.warning("reading %s failed: %s", trace, read.stderr.strip())
        else:
            logger.info("a deep look at %d requests is in %s.", session.profiled, folder)


def look_at(
    recorder: Recorder,
    *,
    unwatched_s: float = UNWATCHED_S,
    only_if_any: bool = False,
    warn: Callable[..., object] = logger.warning,
) -> ProfilingSession:
    """
    Look at the next requests, and return the session, which has ended: `why` says why there is no profile.

    Args:
        recorder: whose requests they are.
        unwatched_s: how long to wait for those that are timed before.
        only_if_any: whether there is no profile unless one of those has come.
        warn: logs why there is no look.

    """
    enough, captures = threading.Event(), _captures()
    session = ProfilingSession(REQUESTS, UNWATCHED, when_enough=enough.set)
    session.warn = warn
    session.attach(recorder)
    if not session.why:
        enough.wait(unwatched_s)
        enough.clear()
        # A capture since would be broken, or slowed down, by a look that nobody asked for.
        if not only_if_any or (session.passed and _captures() == captures):
            session.begin()
            if not session.why:
                enough.wait(DEADLINE_S)
    wait_for_captures()
    session.finish()
    return session


def _captures() -> tuple[int, bool]:
    """Return how many captures of CUDA graphs have begun, and whether one is going on."""
    return (0, False) if state.graphs is None else (state.graphs.quiet.begun, state.graphs.quiet.is_capturing)


def wait_for_captures() -> None:
    """
    Wait until no CUDA graph is being captured, as far as it shows: the end of a look would break a capture.

    One that begins after that is on its own. The wait has an end, because a capture may have failed unseen.
    """
    deadline_s = time.monotonic() + CAPTURES_S
    while state.graphs is not None and state.graphs.quiet.is_capturing and time.monotonic() < deadline_s:
        time.sleep(0.01)


def _new_folder(folder: Path) -> Path:
    """Make a folder that nobody else can name or enter, and return it: with more in its name where that is taken."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        return Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    return folder


def read_elsewhere(trace: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Have another process read a trace, and write what it says into a folder."""
    command = [sys.executable, "-m", "gpuscope", "profile", "--trace", str(trace), "--out", str(folder)]
    ours = {name: value for name, value in variables().items() if not name.startswith("GPUSCOPE")}
    # From the new folder, because Python would import what lies in the present one, which may be anybody's.
    if path := ours.get("PYTHONPATH"):
        ours["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, path.split(os.pathsep)))
    return subprocess.run(  # noqa: S603 - ourselves
        command, cwd=folder, env=ours, capture_output=True, text=True, timeout=READING_TIMEOUT_S, check=False
    )
