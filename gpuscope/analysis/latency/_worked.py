"""
The batches that worked for a request: when, how long on the GPU, what was allotted to it, and when it waited for them.

Reads a recording's links and shares; decides nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpuscope.analysis._structure.intervals import Intervals, union

if TYPE_CHECKING:
    from gpuscope.analysis.recording import Recording


class Run(NamedTuple):
    """One run of a batch's stage. Times are since the epoch; 0 without GPU times."""

    start_ns: int
    end_ns: int
    gpu_start_ns: int
    gpu_end_ns: int
    row: int
    """-1 where the files do not have it."""


class Worked(NamedTuple):
    """What worked for one member: one batch, or all steps of a generation."""

    name: str
    """Of the batch's stage."""
    runs: tuple[Run, ...]
    waits_from_ns: int
    """From when the member may have waited for it."""
    token_ns: int | None
    """When the member's token was made. None where files do not tell: they have links alone."""
    gpu_ns: int
    """Of all runs."""
    share_ns: int
    """Of that, what is allotted to the member."""
    size: int
    is_whole: bool
    """Whether all runs are here, so that the rest of their GPU time is that of others."""


class Work:
    """
    All batches of a recording.

    Args:
        recording: any recording.

    """

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._stages = {name: number for number, name in enumerate(recording.names)}
        links, shares = recording.batches.links, recording.batches.shares
        self.batch_rows = frozenset(links.batch[links.batch >= 0].tolist())
        self._of_member: dict[int, list[int]] = {}
        for batch, member in zip(links.batch.tolist(), links.member.tolist(), strict=True):
            if batch >= 0 and member >= 0:
                self._of_member.setdefault(member, []).append(batch)
        self._sizes = dict(zip(*(each.tolist() for each in np.unique(links.batch, return_counts=True)), strict=True))
        self._lines: dict[int, list[int]] = {}
        for line, member in enumerate(shares.member.tolist()):
            if member >= 0:
                self._lines.setdefault(member, []).append(line)
        self._members_in: dict[int, list[int]] = {}
        for member in sorted(self._of_member.keys() | self._lines.keys()):
            self._members_in.setdefault(int(recording.root[member]), []).append(member)
        self._busy: dict[tuple[int, int], Intervals] = {}
        self._copies = self._copies_in_batches()

    def members_in(self, root: int) -> list[int]:
        """Return the rows of a request that batches worked for."""
        return self._members_in.get(root, [])

    def for_member(self, member: int) -> list[Worked]:
        """Return what worked for a row."""
        found, shares, linked = [], self._recording.batches.shares, dict.fromkeys(self._of_member.get(member, ()))
        for line in self._lines.get(member, ()):
            rows = [row for row in self._rows(line, linked) if linked.pop(row, 0) is None]
            steps = int(shares.steps[line])
            runs = tuple(map(self._run, rows)) or (self._light(line),)
            waits_ns = int(shares.start_ns[line] - shares.wait_ns[line])
            if steps > 1:
                waits_ns = int(self._recording.host_start_ns[member])
            found.append(
                Worked(
                    self._name(line, rows),
                    runs,
                    waits_ns,
                    waits_ns,
                    sum(run.gpu_end_ns - run.gpu_start_ns for run in runs),
                    max(0, int(shares.share_ns[line])),
                    int(shares.size[line]),
                    len(rows) == steps or (steps == 1 and not rows),
                )
            )
        return found + [self._without_share(row) for row in linked]

    def copies(self, row: int) -> list[tuple[int, int]]:
        """Return when data was copied in a run of a batch's stage, as far as stages say so by `bytes`."""
        return self._copies.get(row, [])

    def others(self, run: Run) -> Intervals:
        """Return when batches of the same stage ran in the same process, this one included."""
        recording, row = self._recording, run.row
        if row < 0:
            return Intervals(np.zeros(0, np.int64), np.zeros(0, np.int64))
        process = recording.threads[recording.thread[row]].process
        key = int(recording.stage[row]), process
        if key not in self._busy:
            rows = [each for each in self.batch_rows if self._kind(each) == key]
            runs = [self._run(each) for each in rows]
            start = np.array([each.start_ns for each in runs], np.int64)
            self._busy[key] = union(Intervals(start, np.array([max(each.end_ns, each.gpu_end_ns) for each in runs])))
        return self._busy[key]

    def _kind(self, row: int) -> tuple[int, int]:
        recording = self._recording
        return int(recording.stage[row]), recording.threads[recording.thread[row]].process

    def _name(self, line: int, rows: list[int]) -> str:
        batch = int(self._recording.batches.shares.batch[line])
        row = rows[0] if rows else batch
        return self._recording.names[self._recording.stage[row]] if row >= 0 else "a batch that is not in the files"

    def _rows(self, line: int, linked: dict[int, None]) -> list[int]:
        shares, recording = self._recording.batches.shares, self._recording
        first = int(shares.batch[line])
        if first < 0 or shares.steps[line] == 1:
            return [first] if first in linked else []
        return [
            row
            for row in linked
            if recording.stage[row] == recording.stage[first]
            and shares.start_ns[line] <= recording.host_start_ns[row] <= shares.end_ns[line]
        ]

    def _run(self, row: int) -> Run:
        recording = self._recording
        timed = bool(recording.measured[row])
        return Run(
            int(recording.host_start_ns[row]),
            int(recording.host_end_ns[row]),
            int(recording.gpu_start_ns[row]) if timed else 0,
            int(recording.gpu_end_ns[row]) if timed else 0,
            row,
        )

    def _light(self, line: int) -> Run:
        shares = self._recording.batches.shares
        gpu = int(shares.gpu_start_ns[line]), int(shares.gpu_end_ns[line])
        return Run(int(shares.start_ns[line]), int(shares.end_ns[line]), *gpu, -1)

    def _without_share(self, row: int) -> Worked:
        """Return a batch that only links to its members: its GPU time is divided equally."""
        run, size = self._run(row), self._sizes[row]
        gpu_ns, name = run.gpu_end_ns - run.gpu_start_ns, self._recording.names[self._recording.stage[row]]
        return Worked(name, (run,), run.start_ns, None, gpu_ns, gpu_ns // size, size, is_whole=True)

    def _copies_in_batches(self) -> dict[int, list[tuple[int, int]]]:
        found: dict[int, list[tuple[int, int]]] = {}
        recording = self._recording
        for row, attributes in recording.attributes.items() if self.batch_rows else ():
            if "bytes" not in attributes or not recording.leaf[row]:
                continue
            around = int(recording.parent[row])
            while around >= 0 and around not in self.batch_rows:
                around = int(recording.parent[around])
            if around >= 0:
                run = self._run(row)
                timed = run.gpu_start_ns, run.gpu_end_ns
                found.setdefault(around, []).append(timed if run.gpu_end_ns else (run.start_ns, run.end_ns))
        return found
