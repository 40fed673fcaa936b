"""
`ROW`, the layout of one resolved stage on its way into a batch. Its twin is `Cells` in `csrc/pack.c`.

Nothing here acts.
"""

from __future__ import annotations

import numpy as np

_IDS = ("trace_high", "trace_low", "span_id", "parent_id", "stream")
_TABLES = ("site", "root", "thread")
_TIMES = ("host_start_ns", "host_end_ns", "gpu_start_ns", "gpu_end_ns", "uncertainty_ns")
_NUMBERS = (*_TABLES, "sampled", *_TIMES, "device", "flags")

ROW = np.dtype([*((name, np.uint64) for name in _IDS), *((name, np.int64) for name in _NUMBERS)])
"""The columns of a `StageBatch`, 64 bits each. Times are in nanoseconds of `perf_counter_ns`."""
FORMAT = "=" + "".join("Q" if ROW[name].kind == "u" else "q" for name in ROW.names or ())
"""The same layout for `struct`: packing takes half the time that making an array of tuples does."""
