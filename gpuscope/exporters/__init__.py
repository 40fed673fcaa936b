"""
What happens to resolved stages: one file an exporter.

Exporters see batches and nothing else; none may reach the recording side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuscope._data.batch import StageBatch
    from gpuscope._data.delivery import Delivery


class Exporter(Protocol):
    """
    Sends stages somewhere. Called on the collector's thread only.

    Any method may raise: the collector counts it, logs it once a kind, and goes on. One that has a method `account`
    is given a `Snapshot` of the account of stages every few seconds, on `flush` and after `shutdown`.
    """

    name: str

    def export(self, batch: StageBatch, delivery: Delivery) -> Iterator[None] | None:
        """
        Take one batch of at most a few hundred rows, all of them sampled.

        Works briefly and never waits for a network: what must wait is handed to the exporter's own thread. An
        exporter that has more to do returns an iterator, which the collector advances with pauses between.
        Calls `delivery.settle` exactly once for the batch, now or later, from any thread, unless it raises.
        """

    def flush(self, timeout_s: float) -> bool:
        """Send what is held; return whether all of it was settled within the time."""

    def shutdown(self, timeout_s: float) -> None:
        """Send what can be sent within the time, settle the rest as lost, and free everything."""
