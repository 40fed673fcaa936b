"""
The report of `gpuscope run --report`: made at the end of the program's process, or after it.

Run as a script this is a watcher: a process of its own that waits until the program's is gone, and makes the report
where that could not. A signal, `os._exit` or a crash leaves a process no time. It is nobody's child, because a program
may wait for all of its own, and it is in a session of its own, because what is sent to the program's group is not for
it. Imports nothing of ours, because it starts beside the program.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_SAID = "said"
"""A file in the folder of a recording whose report failed, once that was said."""
_CUT_SHORT = " (the process ended without its handlers of `atexit`: what it did last may be missing)"
_PAUSE_S = 0.2
NOTHING = (
    "no report, because no stage was recorded: name functions by `--stage`, or mark them in the program. With "
    "GPUSCOPE=0, and after `gpuscope.enable(exporters=...)`, nothing comes here."
)


def start(folder: str, out: Path, keep: str, environ: Mapping[str, str]) -> None:
    """Start the watcher of this process."""
    if os.getpid() == 1:
        return  # In a container. All others end with it, and its orphans become its children.
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), folder, str(out), keep]
    quiet = subprocess.DEVNULL
    # It returns at once, because the process that it starts leaves the work to another.
    subprocess.run(command, stdin=quiet, stdout=quiet, env=environ, start_new_session=True, check=False)  # noqa: S603


def make_report(folder: str, out: Path, keep: str, environ: Mapping[str, str] | None = None) -> str:
    """Make a report of the recordings in a folder, keep or remove these, and return what is to be said."""
    if not any(Path(folder).glob("*.jsonl")):
        shutil.rmtree(folder, ignore_errors=True)
        return NOTHING
    command = [sys.executable, "-m", "gpuscope", "report", folder, "--html", str(out)]
    # In a process of its own: in that of the program, the program may have changed anything.
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)  # noqa: S603
    if done.returncode == 0:
        said = f"the report is {out}"
        try:
            kept = _keep(folder, keep) if keep else []
        except OSError as error:
            with contextlib.suppress(OSError):
                Path(folder, _SAID).touch()
            return f"{said}; the recording stays in {folder}, because it cannot go to {keep}: {error.strerror}"
        shutil.rmtree(folder, ignore_errors=True)
        return f"{said}, the recording {', '.join(kept)}" if kept else said
    with contextlib.suppress(OSError):
        Path(folder, _SAID).touch()
    return f"no report from {folder}: {done.stderr.strip().removeprefix('gpuscope report: ')}"


def _keep(folder: str, pattern: str) -> list[str]:
    """Add the recordings to the files that the user named, with `{pid}` in their names, and return these."""
    kept = []
    for recording in sorted(Path(folder).glob("*.jsonl")):
        path = pattern.replace("{pid}", recording.stem)
        older = sorted(Path(folder).glob(f"{recording.name}.*"), key=lambda part: -int(part.suffix[1:]))
        with Path(path).open("ab") as file:
            for part in (*older, recording):
                with part.open("rb") as content:
                    shutil.copyfileobj(content, file)
        kept.append(path)
    return list(dict.fromkeys(kept))


def _watch(pid: int, folder: str, out: Path, keep: str) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # As a service manager sends them to all.
        signal.signal(number, signal.SIG_IGN)
    _wait_for(pid)
    if Path(folder).is_dir() and not Path(folder, _SAID).exists():
        said = make_report(folder, out, keep)
        with contextlib.suppress(OSError):
            sys.stderr.write(f"gpuscope run: {said}{_CUT_SHORT}\n")


def _wait_for(pid: int) -> None:
    """Wait for the end of a process that is not our child."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    except (AttributeError, OSError):  # An old kernel, or another system.
        while _is_there(pid):
            time.sleep(_PAUSE_S)
    else:
        select.select([descriptor], [], [])


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


if __name__ == "__main__" and not os.fork():
    _watch(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4])
