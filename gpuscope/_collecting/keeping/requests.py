"""
Which request each resolved stage belongs to: a key per row of the batch that is being made.

Reads records and keeps none. A request is an outermost stage of this process with all stages inside; a trace that began
elsewhere, or has spans of the application's above its stages, may have several.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import numpy as np

from gpuscope._data.native import native

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope._collecting.resolve import Row
    from gpuscope._cuda.graphs.placing import Placed
    from gpuscope._data.record import StageRecord


class RequestKeys:
    """Collects the keys of a batch's rows, in their order."""

    def __init__(self) -> None:
        self._keys: list[bytes] = []
        self._roots: list[bytes] = []

    def add(self, rows: list[Row]) -> None:
        """Note stages that were added to the batch."""
        keys, roots = _keys_of(rows)
        self._keys.append(keys)
        self._roots.append(roots)

    def add_replays(self, placed: Placed) -> None:
        """Note the stages inside replays that were added to the batch, replay by replay."""
        for replay in placed.replays:
            key = array("Q", [_key_of(_outermost(replay.outer))])
            self._keys.append(key.tobytes() * len(placed.graph))
            self._roots.append(bytes(len(placed.graph)))

    def take(self) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        """
        Return the keys of the rows so far, and which of them are the outermost stages; begin anew.

        A row whose outermost stage is not known has the key 0.
        """
        keys, is_root = np.frombuffer(b"".join(self._keys), np.uint64), np.frombuffer(b"".join(self._roots), np.bool_)
        self._keys, self._roots = [], []
        return keys, is_root


def keys_in_python(rows: list[Row]) -> tuple[bytes, bytes]:
    """Return the key of each row, in 8 bytes, and whether the row is the outermost stage of its request, in one."""
    keys, roots = array("Q"), bytearray()
    for row in rows:
        record = row[0]
        top = _outermost(record)
        key = _key_of(top)
        keys.append(key)
        roots.append(key != 0 and top is record)
    return keys.tobytes(), bytes(roots)


def _key_of(top: StageRecord) -> int:
    # A stage that begins below one that had ended is not a request; its request's decision holds for it.
    return top.span_id if top.trace.root is top.site else 0


def _outermost(record: StageRecord) -> StageRecord:
    """Return the outermost stage around this one in its trace, also where the application's spans lie between."""
    while (outer := record.outer) is not None and (
        outer.trace is record.trace or outer.trace.trace_id == record.trace.trace_id
    ):
        record = outer
    return record


_keys_of = keys_in_python if native is None else native.request_keys
