"""
Payloads through an OTLP exporter of the application's: its connection, credentials, TLS, compression and retries.

That takes private names, which differ between versions of OpenTelemetry. Where one is missing, or what stands there
fails, spans are made of the payload and go through the exporter's public `export`: slower, and nothing is lost.
"""

from __future__ import annotations

import time
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeAlias

from gpuscope._data.plain.values import shown
from gpuscope._log import logger
from gpuscope._settings.shown import shown_url
from gpuscope.exporters._transport.http import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Readable: TypeAlias = "Callable[[bytes], Sequence[Any]]"
"""Makes a payload into spans of the SDK's."""

_SPANS = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
_RETRYABLE = (408, 429, 502, 503, 504)
_GRPC_RETRYABLE = ("CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS")
"""As the OTLP specification has them; `RESOURCE_EXHAUSTED` only if the receiver says when to come again."""
_FIRST_WAIT_S = 1.0


class ApplicationClient:
    """
    Posts payloads through one exporter.

    Args:
        protocol: `http` or `grpc`.
        exporter: the application's.
        readable: makes spans of a payload.
        wait: waits so many seconds between attempts, or until recording ends.

    """

    def __init__(self, protocol: str, exporter: Any, readable: Readable, wait: Callable[[float], object]) -> None:
        endpoint = getattr(exporter, "_endpoint", "")
        self.shown_url = shown_url(endpoint) if isinstance(endpoint, str) and endpoint else "an endpoint of its own"
        self._exporter, self._readable, self._wait = exporter, readable, wait
        self._send: Callable[[bytes], Outcome] | None = self._grpc if protocol == "grpc" else self._http_way()
        self._channel: Any = None
        self._call: Any = None

    def post(self, payload: bytes) -> Outcome:
        """Send the payload, and again where that may help."""
        if getattr(self._exporter, "_shutdown", False) is True:
            return Outcome("provider_shutdown", "the application has shut its exporter down")
        if self._send is not None:
            try:
                return self._send(payload)
            except Exception as error:  # Of a version that we do not know.
                self._send = None
                logger.info(
                    "spans go to %s one by one, because bytes cannot be passed to this version of its exporter: %s.",
                    self.shown_url,
                    shown(error),
                )
        result = self._exporter.export(self._readable(payload))
        return Outcome() if getattr(result, "value", 1) == 0 else Outcome("export_failed", "by the exporter's own word")

    def close(self) -> None:
        """Leave everything as it is: it is the application's."""

    # ---- HTTP

    def _http_way(self) -> Callable[[bytes], Outcome] | None:
        exporter = self._exporter
        if hasattr(getattr(exporter, "_client", None), "export"):
            return self._by_client
        return self._by_attempts if hasattr(exporter, "_export") and hasattr(exporter, "_timeout") else None

    def _by_client(self, payload: bytes) -> Outcome:
        """OpenTelemetry 1.44 and later: its client retries."""
        result = self._exporter._client.export(payload)
        return Outcome() if result.success else _refused(result.status_code, result.reason or result.error)

    def _by_attempts(self, payload: bytes) -> Outcome:
        """Before that one call is one attempt; until 1.33 it knows no deadline, and its caller goes on for 64 s."""
        exporter = self._exporter
        knows_deadline = len(signature(exporter._export).parameters) > 1
        deadline_s = time.monotonic() + float(getattr(exporter, "_MAX_RETRY_TIMEOUT", exporter._timeout))

        def attempt(left_s: float) -> tuple[Outcome, bool]:
            try:
                answer = exporter._export(payload, left_s) if knows_deadline else exporter._export(payload)
            except OSError as error:  # All that `requests` raises; the exporter has tried twice.
                return Outcome("unreachable", type(error).__name__), True
            if answer.ok:
                return Outcome(body=answer.content), False
            return _refused(answer.status_code, answer.reason), answer.status_code in _RETRYABLE

        return self._until(deadline_s, attempt)

    # ---- gRPC

    def _grpc(self, payload: bytes) -> Outcome:
        import grpc  # The exporter has imported it.

        exporter = self._exporter
        deadline_s = time.monotonic() + float(exporter._timeout)

        def attempt(left_s: float) -> tuple[Outcome, bool]:
            if exporter._channel is not self._channel:  # The exporter opens another after a failure.
                self._call, self._channel = exporter._channel.unary_unary(_SPANS), exporter._channel
            try:
                return Outcome(body=self._call(payload, metadata=exporter._headers, timeout=left_s)), False
            except grpc.RpcError as error:
                code = error.code().name
                return Outcome(f"grpc_{code.lower()}", str(error.details() or "")[:300]), code in _GRPC_RETRYABLE
            except ValueError:  # The exporter has closed its channel meanwhile.
                return Outcome("unreachable", "the channel is closed"), exporter._channel is not self._channel

        return self._until(deadline_s, attempt)

    def _until(self, deadline_s: float, attempt: Callable[[float], tuple[Outcome, bool]]) -> Outcome:
        wait_s = _FIRST_WAIT_S
        while True:
            outcome, may_help = attempt(max(0.001, deadline_s - time.monotonic()))
            if not may_help or time.monotonic() + wait_s > deadline_s or self._wait(wait_s):
                return outcome
            wait_s *= 2


def _refused(status: int | None, why: object) -> Outcome:
    said = why if isinstance(why, str) else shown(why)
    return Outcome(f"http_{status}" if status else "unreachable", said[:300])
