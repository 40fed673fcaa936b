"""
The parts in C, as the module `native`; it is None where they were not built or `GPUSCOPE_NATIVE=0` rules them out.

Each part has a twin in Python that does the same at a higher price. This module chooses at import, once, and does
nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpuscope._settings.environment import wants_native

native: Any = None  # A module in C, without stubs.
if wants_native():
    try:
        from gpuscope import _native as native  # type: ignore[attr-defined,no-redef]
    except ImportError:
        # There was no C compiler when gpuscope was installed, as `gpuscope doctor` says; or the parts in C serve an
        # earlier import of gpuscope in this process.
        native = None

if TYPE_CHECKING or native is None:
    from gpuscope._data.record import StageRecord, TimedStreamFields, Trace
else:
    StageRecord, TimedStreamFields, Trace = native.StageRecord, native.TimedStreamFields, native.Trace

__all__ = ["StageRecord", "TimedStreamFields", "Trace", "native"]
