"""
Why a stage has no GPU times, or none that can be relied on, in words.

Knows flags alone.
"""

from __future__ import annotations

from gpuscope._data.batch import RowFlag


def why_unmeasured(flags: int) -> str:
    """Return the end of a sentence that begins with the stage's name, from the flags of a row."""
    if flags & RowFlag.CAPTURED:
        return "ran while a CUDA graph was captured, so it has no GPU times"
    if flags & RowFlag.GIVEN_UP:
        return "was given up before its GPU work ended"
    if flags & RowFlag.UNPLACED:
        return "has GPU times that cannot be placed: the GPU's clock could not be read"
    if flags & RowFlag.CLAMPED:
        return "has GPU times that cannot be placed: they lie before the launch"
    return "has no GPU times: recorded without a GPU, or on a device that was not current"
