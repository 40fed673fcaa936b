"""
The `file` exporter: OTLP JSON lines in a file that rotates by size.

Each line is whole and carries its resource, so that it can be read alone, also while the file is being written. Waits
only for the disk.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from gpuscope._data.metrics import OF_GPUS, RECORDED
from gpuscope._log import COUNTED, WarnOnce, inform
from gpuscope._settings.shown import shown_path
from gpuscope._version import __version__
from gpuscope.exporters._encoding.otlp_json import JsonEncoder
from gpuscope.exporters._encoding.resource import resource_attributes
from gpuscope.exporters._transport.line_file import LineFile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gpuscope._data.batch import StageBatch
    from gpuscope._data.metrics import DataPoint, InstrumentSpec, Snapshot
    from gpuscope._data.plain.values import Clean
    from gpuscope._data.statistics import Delivery
    from gpuscope._settings.config import Config

_WATCHED_EVERY_NS = 60 * 10**9
"""What NVML says changes all the time, and alone it is written so often, and at the end."""


class FileExporter:
    """
    Writes to `config.file`, in which `{pid}` becomes the process id. Creates the file with the first batch.

    Args:
        config: its `file` settings are used.
        resource: the process's attributes; by default `resource_attributes()`.

    """

    name = "file"
    every_gpu_span = True
    """Reports tell a stage that kept its stream waiting from one that had none."""

    def __init__(self, config: Config, resource: Mapping[str, Clean] | None = None) -> None:
        attributes = resource_attributes() if resource is None else resource
        self.path = config.file.replace("{pid}", str(os.getpid()))
        self.place = shown_path(self.path)
        self._encoder = JsonEncoder(attributes, __version__)
        self._file = LineFile(self.path, config.file_max_bytes, config.file_backups)
        self._succeeded = self._ended = False
        self._warnings = WarnOnce(COUNTED)
        self._account: Mapping[InstrumentSpec, Sequence[DataPoint]] = {}
        self._account_ns = 0

    def export(self, batch: StageBatch, delivery: Delivery) -> None:
        """Write the batch as one line, or settle it as lost (`disk`) where that fails."""
        if not len(batch.site):
            delivery.settle(0)
            return
        line = self._encoder.encode(batch).encode()
        try:
            self._file.write(line)
        except OSError as error:
            self._warn(error)
            delivery.settle(0, {"disk": delivery.stages})
            return
        if not self._succeeded:
            self._succeeded = True
            inform("exporting spans to %s.", self.place)
        delivery.settle(delivery.stages)

    def account(self, snapshot: Snapshot) -> None:
        """Write the account of stages if it has changed, so that readers know what is missing from the file and why."""
        recorded = any(point.value for point in snapshot.points[RECORDED])
        if not recorded or not self._is_news(snapshot):
            return
        self._account, self._account_ns = snapshot.points, snapshot.time_ns
        try:
            self._file.write(self._encoder.encode_metrics(snapshot).encode())
        except OSError as error:
            self._warn(error)
        if self._ended:
            self._file.close()

    def _is_news(self, snapshot: Snapshot) -> bool:
        before, now = self._account, snapshot.points
        if self._ended or snapshot.time_ns - self._account_ns >= _WATCHED_EVERY_NS:
            return now != before
        return any(now.get(spec) != before.get(spec) for spec in (now.keys() | before.keys()) - {*OF_GPUS})

    def flush(self, timeout_s: float) -> bool:  # noqa: ARG002
        """Return True: each batch is handed to the operating system as it is exported."""
        return True

    def shutdown(self, timeout_s: float) -> None:  # noqa: ARG002
        """Close the file; only the last account may still be written."""
        self._ended = True
        self._file.close()

    def _warn(self, error: OSError) -> None:
        self._warnings.warn("disk", "cannot write to %s: %s.", self.place, error)
