"""Page-locked host memory that is allocated once and reused: `PinnedBuffer`, and `PinnedPool`, which lends buffers."""

from gpuscope.pinned._pool import PinnedBuffer, PinnedPool, PoolExhaustedError, PoolStatistics

__all__ = ["PinnedBuffer", "PinnedPool", "PoolExhaustedError", "PoolStatistics"]
