"""
`DeepLook`, which `gpuscope.profile()` returns: a look for the length of a block, and its report.

Neither profiles nor analyses: `_profiling.session` does the one while the program runs, `_profiling.examine` the other.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from gpuscope._log import warn
from gpuscope._profiling.session import DONE, ProfilingSession
from gpuscope._recording.state import state

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from types import TracebackType

    from typing_extensions import Self

    from gpuscope._profiling.findings import DeepFindings
    from gpuscope._settings.config import Config

TRACE, TEXT, JSON = "trace.json", "report.txt", "report.json"


class DeepLook:
    """
    A deep look, as `gpuscope.profile()` returns it: a context manager. Print it for the report.

    Args:
        session: counts the requests, and profiles them.
        period: records for the length of a block.

    """

    def __init__(self, session: ProfilingSession, period: Callable[[Config], AbstractContextManager[object]]) -> None:
        self._period = period
        self._session = session
        self._entered = contextlib.ExitStack()
        self._content: bytes | None = None
        self._report: DeepFindings | None = None

    def __enter__(self) -> Self:
        """
        Begin to count requests; stages are recorded for the length of the block if nothing else records them.

        Raises:
            RuntimeError: if another thread switches recording off meanwhile.

        """
        if state.recorder is None:
            self._entered.enter_context(self._period(state.config.changed(mode="on", exporters="none")))
        state.look = state.look or self._session
        self._entered.callback(self._end)
        recorder = state.recorder
        if recorder is None:
            self._entered.close()
            raise RuntimeError(
                "Recording was switched off while the deep look began; call `gpuscope.disable()` before the `with` "
                "block or after it, not at the same time."
            )
        self._session.attach(recorder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the profile if it is still on."""
        self._entered.close()

    def _end(self) -> None:
        if state.look is self._session:
            state.look = None
        self._session.finish()

    @property
    def done(self) -> bool:
        """Whether the profile has ended, by itself or with the block."""
        return self._session.state == DONE

    @property
    def why(self) -> str:
        """Why there is no report, as far as is known; empty if there is one."""
        return self._session.why

    @property
    def report(self) -> DeepFindings | None:
        """What bounds each stage, and the evidence; None while the profile is on, or if there is none."""
        if self._report is None and self.done and not self.why:
            from gpuscope._profiling.examine import examine

            self._report = examine(json.loads(self._trace()))
        return self._report

    def save(self, folder: str | Path) -> list[Path]:
        """
        Write the Chrome trace (for https://ui.perfetto.dev) and the report, as text and as JSON, into a folder.

        Args:
            folder: where; it is made if it does not exist, in a folder that does.

        Returns:
            Paths of the trace, the text and the JSON; none, with a warning that says why, if there was no look.

        Raises:
            RuntimeError: while the look is still on.
            OSError: if the folder or a file cannot be written.

        """
        if self.report is None and not self.done:
            raise RuntimeError("There is no deep look to save: it is still on; leave its `with` block first.")
        if self.report is None:  # As where another profiler is on: the program goes on.
            warn("there is no deep look to save: %s", self.why)
            return []
        folder = Path(folder)
        # Not those above it: a path that was mistyped is refused.
        folder.mkdir(exist_ok=True)
        (folder / TRACE).write_bytes(self._trace())
        return [folder / TRACE, *write_report(self.report, folder)]

    def _trace(self) -> bytes:
        """Return the trace, which PyTorch writes once, and only into a file."""
        if self._content is None:
            with tempfile.TemporaryDirectory(prefix="gpuscope-") as folder:
                path = Path(folder) / TRACE
                self._session.save(str(path))
                self._content = path.read_bytes()
        return self._content

    def __str__(self) -> str:
        if self.report is not None:
            return str(self.report)
        return f"No deep look: {self.why}" if self.done or self.why else "A deep look, still on."


def write_report(report: DeepFindings, folder: Path) -> list[Path]:
    """Write a report as text and as JSON into a folder; return the files."""
    (folder / TEXT).write_text(f"{report}\n", encoding="utf-8", errors="replace")
    (folder / JSON).write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
    return [folder / TEXT, folder / JSON]
