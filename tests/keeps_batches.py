"""An exporter that keeps what it is given, for tests of what exporters get."""

from __future__ import annotations


class KeepsBatches:
    """Keeps batches, and settles their stages."""

    name = "keeps"
    every_gpu_span = True

    def __init__(self):
        self.batches = []

    def export(self, batch, delivery):
        """Keep a batch."""
        self.batches.append(batch)
        delivery.settle(delivery.stages)

    def flush(self, timeout_s):
        """Do nothing."""
        return True

    def shutdown(self, timeout_s):
        """Do nothing."""
