"""
Deep looks on demand, in a service that runs: asked for by a signal or by a file. Opens no port.

The collector asks `poll` once a pass. A look has a thread of its own, which waits for the requests to come, and its
trace is read in another process: reading holds the GIL for longer than a request may take.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from gpuscope._log import logger
from gpuscope._profiling.session import ProfilingSession
from gpuscope._settings.environment import variables

REQUESTS = 5
DEADLINE_S = 60.0
"""Within which so many requests should come; else the look is at those that did."""
READING_TIMEOUT_S = 600.0


class OnDemand:
    """
    Starts a look when asked to, one at a time.

    Args:
        how: `signal`, or the path of a file whose appearance asks for a look. It is removed, so that of several
            processes one looks; the result goes beside it, and for a signal into the working directory.

    """

    def __init__(self, how: str) -> None:
        self._file = None if how == "signal" else how
        self._asked = False
        self._looks = 0
        self._thread: threading.Thread | None = None
        if self._file is None:
            self._listen()

    def poll(self, recorder: Any) -> None:
        """Start a look if one is asked for and none is on: a microsecond or two."""
        if (self._thread is None or not self._thread.is_alive()) and self._take_wish():
            self._looks += 1
            self._thread = threading.Thread(target=self._look, args=(recorder,), name="gpuscope-look", daemon=True)
            self._thread.start()

    def _take_wish(self) -> bool:
        if self._file is None:
            asked, self._asked = self._asked, False
            return asked
        try:
            os.unlink(self._file)  # noqa: PTH108 - every pass: a tenth of what `Path.unlink` costs
        except FileNotFoundError:
            return False
        return True

    def _listen(self) -> None:
        """Take SIGUSR2, unless the program has a use for it."""
        try:
            before = signal.getsignal(signal.SIGUSR2)
            if before is not signal.SIG_DFL and not isinstance(getattr(before, "__self__", None), OnDemand):
                logger.warning("GPUSCOPE_PROFILE=signal: the program handles SIGUSR2 itself; use the path of a file.")
                return
            signal.signal(signal.SIGUSR2, self._on_signal)
        except ValueError:
            logger.warning(
                "GPUSCOPE_PROFILE=signal: handlers can be set in the main thread only; call `gpuscope.enable()` there, "
                "or use the path of a file."
            )

    def _on_signal(self, *_: object) -> None:
        self._asked = True

    def _look(self, recorder: Any) -> None:
        folder = Path(f"{self._file or 'gpuscope-profile'}-{os.getpid()}-{self._looks}").absolute()
        try:
            self._look_into(folder, recorder)
        except Exception as error:  # The last line of a thread of ours: the program has no part in it.
            logger.warning("the deep look into %s failed: %r.", folder, error)

    def _look_into(self, folder: Path, recorder: Any) -> None:
        enough = threading.Event()
        look = ProfilingSession(REQUESTS, 0, when_enough=enough.set)
        look.attach(recorder)
        if not look.why:
            enough.wait(DEADLINE_S)
        look.finish()
        if look.why:
            logger.warning("no deep look: %s", look.why)
            return
        folder = _new_folder(folder)
        trace = folder / "trace.json"
        look.save(str(trace))
        read = _read(trace, folder)
        if read.returncode:
            logger.warning("reading %s failed: %s", trace, read.stderr.strip())
        else:
            logger.info("a deep look at %d requests is in %s.", look.profiled, folder)


def _new_folder(folder: Path) -> Path:
    """Make a folder that nobody else can name or enter, and return it: with more in its name where that is taken."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        return Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    return folder


def _read(trace: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gpuscope", "profile", "--trace", str(trace), "--out", str(folder)]
    ours = {name: value for name, value in variables().items() if not name.startswith("GPUSCOPE")}
    # From the new folder, because Python would import what lies in the present one, which may be anybody's.
    if path := ours.get("PYTHONPATH"):
        ours["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, path.split(os.pathsep)))
    return subprocess.run(  # noqa: S603 - ourselves
        command, cwd=folder, env=ours, capture_output=True, text=True, timeout=READING_TIMEOUT_S, check=False
    )
