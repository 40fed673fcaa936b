"""
Metrics to OTLP/HTTP, from a thread of their own.

Makes nobody wait, except in `flush` and `shutdown`. Figures are cumulative, so the next snapshot makes good one that
could not be sent: only the newest is held, and each is tried once.
"""

from __future__ import annotations

import contextlib
from threading import Condition, Event
from typing import TYPE_CHECKING

from gpuscope._log import SUPPRESSED, WarnOnce, inform
from gpuscope._version import __version__
from gpuscope.exporters._encoding.metrics_message import request_bytes
from gpuscope.exporters._encoding.otlp_message import rejected_spans
from gpuscope.exporters._transport.grpc_client import METRICS, client_for
from gpuscope.exporters._transport.http import Endpoint, Outcome
from gpuscope.exporters._transport.sender import (
    start_thread,
    suppress_instrumentation,
    without_instrumentation,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpuscope._data.metrics import Snapshot
    from gpuscope._data.plain.values import Clean
    from gpuscope._settings.config import Config

_NO_METRICS = ("http_404", "http_405", "http_501", "grpc_unimplemented")
"""The answers of an endpoint that takes spans only, as Jaeger does."""


class OtlpMetrics:
    """
    Posts snapshots to `config.metrics_url`. Starts its thread at once.

    Args:
        config: its `otlp_metrics_` settings are used.
        resource: the process's attributes.

    """

    def __init__(self, config: Config, resource: Mapping[str, Clean]) -> None:
        once = Event()
        once.set()
        self._client = client_for(Endpoint.for_metrics(config), METRICS, once, version=__version__)
        self._resource = resource
        self._changed = Condition()
        self._next: Snapshot | None = None
        self._put = self._done = 0
        self._closing = False
        self._succeeded = False
        self._warnings = WarnOnce(SUPPRESSED)
        # Started at once, because Python 3.12 and later start no thread once the interpreter has begun to exit.
        self._thread = start_thread(self._run, "gpuscope-metrics")

    def put(self, snapshot: Snapshot) -> None:
        """Have a snapshot sent, in place of the one that still waits, if any."""
        with self._changed:
            if not self._closing:
                self._next = snapshot
                self._put += 1
                self._changed.notify_all()

    def flush(self, timeout_s: float) -> None:
        """Wait until what was put has been tried, for at most `timeout_s` seconds."""
        with self._changed:
            target = self._put
        if self._thread is None and self._next is not None:
            with without_instrumentation():
                self._send_next(here=True)
        with self._changed:
            self._changed.wait_for(lambda: self._done >= target or self._closing, timeout_s)

    def shutdown(self, timeout_s: float) -> None:
        """Wait as `flush` does, and end the thread; a request that hangs ends with its own timeout."""
        self.flush(timeout_s)
        self._close()
        if self._thread is None:
            self._client.close()

    def _close(self) -> None:
        with self._changed:
            self._closing = True
            self._next = None
            self._changed.notify_all()

    def _run(self) -> None:
        suppress_instrumentation()
        while self._send_next():
            pass
        self._client.close()

    def _send_next(self, *, here: bool = False) -> bool:
        """Send the next snapshot; return False once all is done. `here`, an interrupt is the program's, and goes on."""
        taken = self._take()
        if taken is None:
            return False
        snapshot, number = taken
        try:
            outcome = self._client.post(request_bytes(snapshot, self._resource))
        except BaseException as error:  # Whatever it is, the next snapshot may fare better.
            if here and not isinstance(error, Exception):
                raise
            outcome = Outcome("error", type(error).__name__)
        # The application's log handlers may raise, and the thread must outlive them.
        with contextlib.suppress(Exception):
            self._conclude(outcome)
        with self._changed:
            self._done = number
            self._changed.notify_all()
        return True

    def _take(self) -> tuple[Snapshot, int] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._next is not None or self._closing)
            snapshot, self._next = self._next, None
            return None if snapshot is None else (snapshot, self._put)

    def _conclude(self, outcome: Outcome) -> None:
        rejected, message = rejected_spans(outcome.body) if outcome.body else (0, "")
        if outcome.reason in _NO_METRICS:
            try:
                inform("%s takes no metrics (%s): none are sent.", self._client.shown_url, outcome.detail)
            finally:
                self._close()
        elif outcome.reason or rejected:
            detail = outcome.detail or f"{rejected} data points rejected: {message or 'the endpoint does not say why'}"
            reason = outcome.reason or "rejected"
            self._warnings.warn(reason, "cannot export metrics to %s: %s (%s).", self._client.shown_url, reason, detail)
        elif not self._succeeded:
            self._succeeded = True
            inform("exporting metrics to %s.", self._client.shown_url)
