"""
What happens to resolved stages: one file per exporter.

An exporter sees batches and the account of stages, and nothing of the recording side. Only `sdk.py` and
`application.py` hold the bridge to OpenTelemetry too: one ends the spans that stand in the application's contexts, and
the other sends through the application's exporters. `metrics_otlp.py` and
`metrics_sdk.py` take snapshots of the metrics, and are not exporters in the sense of the protocols here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuscope._data.batch import StageBatch
    from gpuscope._data.metrics import Snapshot
    from gpuscope._data.statistics import Delivery


class Exporter(Protocol):
    """
    Sends stages somewhere.

    The collector calls all methods, one after the other, on its own thread. Each of them may raise: the collector logs
    the first failure per method and goes on. A batch whose `export` raised counts as not delivered (`exporter_error`).

    While a method runs, no stage is collected, and the application competes with it for the GIL. Therefore an exporter

    * never waits in `export` or `account` for a network, for the GPU or for another thread;
    * never calls `gpuscope.flush` or `gpuscope.shutdown`, which wait for the thread that it runs on;
    * never changes a batch, because the other exporters are given the same one; it may keep it;
    * starts its threads in its constructor: once the interpreter begins to exit, which is when the last batches come,
      Python 3.12 and later start no more.

    After a fork, the child never calls its parent's exporters.
    """

    name: str
    """Names it in log lines."""

    def export(self, batch: StageBatch, delivery: Delivery) -> Iterator[None] | None:
        """
        Take one batch.

        Args:
            batch: at least one row, and sampled stages only. The collector finishes a batch at 512 rows, about 0.5 s
                after its first row, or at a flush. Where many replays of CUDA graphs wait, a batch grows to 4,096 rows.
                The last slice of work is added whole, so a batch may exceed either number. The rows are in no order,
                and a stage's parent may come after it, in a later batch too. Where `GPUSCOPE_GPU_SPANS` is `work`, rows
                without work on the GPU have no GPU span, unless the exporter has the attribute `every_gpu_span`.
                Where it has `shared`, all its rows are light spans of batches in their members' traces and no stages;
                the delivery then counts them.
            delivery: takes the outcome. Call `delivery.settle` exactly once, now or later, from any thread. Afterwards
                `export` must not raise, because a failure settles the delivery as well. What is not settled when the
                period of recording ends is lost as `shutdown`.

        Returns:
            None when the work is done, or an iterator over the rest of it, as a generator function returns. The
            collector runs it to its end before anything else and ignores its values; after each step it sleeps 4 ms,
            unless it is shutting down. A step should hold the GIL for no more than some 0.3 ms.

        """

    def flush(self, timeout_s: float) -> bool:
        """
        Send what is held.

        Args:
            timeout_s: seconds that this may wait, 0 included: what other exporters left of `gpuscope.flush`'s time.

        Returns:
            Whether all of it was settled within the time.

        """

    def shutdown(self, timeout_s: float) -> None:
        """
        Send what can be sent within the time, settle the rest as lost, and free everything. Called once.

        Args:
            timeout_s: seconds that this may wait, 0 included: what is left of the time for the end of recording.

        """


class AccountExporter(Exporter, Protocol):
    """An exporter that takes the account of stages too: the collector looks for the method `account`."""

    def account(self, snapshot: Snapshot) -> None:
        """
        Take the account so far. Called every 5 s, after each `flush`, and once after `shutdown`.

        Args:
            snapshot: sums since recording started, namely the stages recorded and exported, and those dropped, lost and
                untimed by reason; and the clock's uncertainty, once it is known. It has no histograms.

        """
