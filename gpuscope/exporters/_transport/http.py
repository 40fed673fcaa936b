"""
Sends one payload to one OTLP/HTTP endpoint, with the retries that the protocol prescribes.

Knows bytes and outcomes, and nothing of stages, buffers, threads or sockets. Waits only as long as the payload's time
allows, and not between attempts once `interrupt` is set. For one thread only.
"""

from __future__ import annotations

import gzip
import http.client
import os
import random
import ssl
import zlib
from dataclasses import dataclass, field
from datetime import timezone
from email.utils import parsedate_to_datetime
from time import monotonic, time
from typing import TYPE_CHECKING, Any, Protocol

from gpuscope._settings.shown import shown_url
from gpuscope.exporters._transport.connection import Answer, Connection, NotHttpError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from threading import Event

    from gpuscope._settings.config import Config

_RETRYABLE = frozenset((429, 502, 503, 504))
_ANSWER_BYTES = 65_536
"""The most that is read of an answer; a receiver has no reason to say more."""
_BACKOFF_MAX_S = 30.0
_GZIP_BITS = 31
"""For zlib: the format of gzip, with the largest window."""
_ABOUT_THE_BODY = ("content-length", "content-encoding", "transfer-encoding", "content-type")
"""Headers that nobody else may set: they would be wrong."""
_SPEED_LEVEL = 1
"""Of compression. Spans are so repetitive that slower levels gain little and keep a core busy for longer."""
_COMPRESS: Mapping[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "gzip": lambda payload: gzip.compress(payload, _SPEED_LEVEL),
    "deflate": lambda payload: zlib.compress(payload, _SPEED_LEVEL),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a payload."""

    reason: str = ""
    """Empty when the endpoint took it; else what lost stages are counted under: `tls`, `timeout`, `unreachable`,
    `not_http`, `not_otlp`, `invalid_request`, `http_503` and the like, or `error`."""
    detail: str = ""
    """What the log says beside the reason."""
    body: bytes = b""
    """The endpoint's answer, if it took the payload."""
    retry: bool = False
    """Whether another attempt may help."""
    retry_after_s: float | None = None
    """How long the endpoint asks to be left alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where payloads go, and how."""

    url: str = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    timeout_s: float
    """For one payload, all attempts included."""
    compression: str
    """`gzip`, `deflate`, or anything else for none."""
    certificate: str
    """This and the following two are paths, or empty."""
    client_certificate: str
    client_key: str
    protocol: str = "http/protobuf"
    """Or `grpc`."""

    @classmethod
    def for_traces(cls, config: Config) -> Endpoint:
        """Return the endpoint for spans."""
        return cls(
            url=config.traces_url,
            headers=config.otlp_headers,
            timeout_s=config.otlp_timeout_s,
            compression=config.otlp_compression,
            certificate=config.otlp_certificate,
            client_certificate=config.otlp_client_certificate,
            client_key=config.otlp_client_key,
            protocol=config.otlp_protocol,
        )

    @classmethod
    def for_metrics(cls, config: Config) -> Endpoint:
        """Return the endpoint for metrics."""
        return cls(
            url=config.metrics_url,
            headers=config.otlp_metrics_headers,
            timeout_s=config.otlp_metrics_timeout_s,
            compression=config.otlp_metrics_compression,
            certificate=config.otlp_metrics_certificate,
            client_certificate=config.otlp_metrics_client_certificate,
            client_key=config.otlp_metrics_client_key,
            protocol=config.otlp_metrics_protocol,
        )


class Client(Protocol):
    """What a sender sends with."""

    shown_url: str
    """Where payloads go, without secrets."""

    def post(self, payload: bytes) -> Outcome:
        """Send the payload, and again where that may help."""

    def close(self) -> None:
        """Free what is the client's own."""


class HttpClient:
    """
    Posts payloads to an endpoint, whose URL without secrets is `shown_url`.

    Args:
        endpoint: where they go.
        interrupt: once set, ends the waits between attempts: one last attempt is made at once.
        version: of gpuscope, for the header `User-Agent`.
        backoff_s: the first wait in seconds. Each further one is twice as long, up to 30 s.

    """

    def __init__(self, endpoint: Endpoint, interrupt: Event, *, version: str, backoff_s: float = 1.0) -> None:
        self.shown_url = shown_url(endpoint.url)
        self._timeout_s = endpoint.timeout_s
        self._compression = endpoint.compression if endpoint.compression in _COMPRESS else "none"
        self._interrupt = interrupt
        self._backoff_s = backoff_s
        self._why_not = ""
        """Why nothing can be sent at all."""
        try:
            self._connection: Connection | None = Connection(
                endpoint.url,
                {**_given(endpoint.headers), **_ours(version, compression=self._compression)},
                certificate=endpoint.certificate,
                client_certificate=endpoint.client_certificate,
                client_key=endpoint.client_key,
            )
        except ValueError as error:
            self._connection, self._why_not = None, str(error)

    def post(self, payload: bytes) -> Outcome:
        """Send the payload, and again where that may help, within the endpoint's `timeout_s`."""
        deadline = monotonic() + self._timeout_s
        body = _COMPRESS[self._compression](payload)
        attempt = 0
        while True:
            last = self._interrupt.is_set()
            outcome = self._attempt(body, deadline)
            if last or not outcome.retry:
                return outcome
            wait_s = backoff(self._backoff_s, attempt, outcome.retry_after_s)
            if monotonic() + wait_s >= deadline:
                # There would be no time left for another attempt after this wait.
                return outcome
            self._interrupt.wait(wait_s)
            attempt += 1

    def close(self) -> None:
        """Close the connections."""
        if self._connection is not None:
            self._connection.close()

    def _attempt(self, body: bytes, deadline: float) -> Outcome:
        if self._connection is None:
            return Outcome("invalid_request", self._why_not)
        try:
            self._connection.prepare()
        except OSError as error:
            return Outcome("invalid_request", f"{type(error).__name__}: check the certificate files")
        try:
            return _judge(self._connection.post(body, deadline, _ANSWER_BYTES))
        except Exception as error:  # Each kind has its reason; none may end the thread.
            return _failure(error)


_JITTER = random.Random()  # noqa: S311


def backoff(first_s: float, attempt: int, asked_s: float | None) -> float:
    """Return how many seconds to wait after an attempt, the first being 0; at least what the endpoint asks for."""
    # Jitter, so that the workers of a restarted service do not all come back at once. It needs no cryptography,
    # and the global generator is left alone, because frameworks seed it and count on its sequence.
    longest_s: float = min(first_s * 2.0 ** min(attempt, 30), _BACKOFF_MAX_S)
    # An endpoint may ask for a longer wait, not for a shorter one: "0" would be a busy loop.
    return max(longest_s * _JITTER.uniform(0.5, 1.0), asked_s or 0.0)


def _given(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items() if name.lower() not in _ABOUT_THE_BODY}


def _ours(version: str, *, compression: str) -> dict[str, str]:
    ours = {"user-agent": f"OTel-OTLP-Exporter-gpuscope/{version}", "content-type": "application/x-protobuf"}
    return ours if compression == "none" else {**ours, "content-encoding": compression}


def _failure(error: Exception) -> Outcome:
    """
    Return what an exception of the connection comes to.

    Of messages only those of the system are quoted: others hold what the endpoint sent, or headers with keys.
    """
    for kind, reason, retry, detail in _FAILURES:
        if isinstance(error, kind):
            return Outcome(reason, detail(error), retry=retry)
    return Outcome("error", type(error).__name__)


def _tls_cause(error: ssl.SSLError) -> str:
    code = getattr(error, "reason", None)  # One that was not raised by OpenSSL has none.
    reason = getattr(error, "verify_message", None) or code or "no reason given"
    hint = "; the endpoint may not speak TLS: try http://" if code == "WRONG_VERSION_NUMBER" else ""
    return f"{type(error).__name__}: {reason}{hint}"


def _system_message(error: OSError) -> str:
    if isinstance(error, http.client.RemoteDisconnected):
        return "the connection was closed without an answer; OTLP/HTTP is by default on port 4318, gRPC on 4317"
    if error.errno is None:
        # `http.client` says so, and quotes the proxy, which may say anything.
        return "the proxy gives no tunnel" if "Tunnel" in str(error) else "no reason given"
    return error.strerror or os.strerror(error.errno)


_FAILURES: tuple[tuple[type[Exception], str, bool, Callable[[Any], str]], ...] = (
    (NotHttpError, "not_http", False, lambda error: f"it speaks {error}"),
    (ssl.SSLError, "tls", False, _tls_cause),
    (TimeoutError, "timeout", True, lambda _: "no answer in time"),
    (OSError, "unreachable", True, lambda error: f"{type(error).__name__}: {_system_message(error)}"),
    (http.client.InvalidURL, "invalid_request", False, lambda _: "check the endpoint's URL"),
    (http.client.HTTPException, "unreachable", True, lambda error: f"{type(error).__name__}: no valid HTTP"),
    (ValueError, "invalid_request", False, lambda _: "check the endpoint's URL and the headers"),
)
"""The kinds of exceptions, the first that fits: reason, whether another attempt may help, and what is said of it."""


def _judge(answer: Answer) -> Outcome:
    status = answer.status
    if status // 100 == 2:  # noqa: PLR2004
        if (_header(answer, "content-type") or "").lower().startswith("text/html"):
            # Some servers have their start page for whatever is asked: Jaeger's user interface on port 16686 is one.
            return Outcome("not_otlp", "a web page answers there: it is not a receiver of OTLP")
        return Outcome(body=_decoded(answer))
    # The standard's words for the status: the endpoint's own may hold anything.
    detail = f"HTTP {status} {http.client.responses.get(status, '')}".strip()
    if status in _RETRYABLE:
        asked = _retry_after_s(_header(answer, "retry-after"))
        return Outcome(f"http_{status}", detail, retry=True, retry_after_s=asked)
    return Outcome(f"http_{status}", detail)


def _header(answer: Answer, name: str) -> str | None:
    return next((value for key, value in answer.headers.items() if key.lower() == name), None)


def _decoded(answer: Answer) -> bytes:
    """Return the body; of one that is compressed unasked, as much as one that is not may have, or nothing."""
    if (_header(answer, "content-encoding") or "identity").strip().lower() not in ("gzip", "x-gzip"):
        return answer.body
    try:
        return zlib.decompressobj(_GZIP_BITS).decompress(answer.body, _ANSWER_BYTES)
    except zlib.error:
        return b""


def _retry_after_s(text: str | None) -> float | None:
    """Return the seconds of a `Retry-After` header, which holds seconds or a date; None if neither."""
    if text is None:
        return None
    try:
        if text.strip().isdigit():
            return float(text)
        date = parsedate_to_datetime(text)
        return max((date if date.tzinfo else date.replace(tzinfo=timezone.utc)).timestamp() - time(), 0.0)
    except (TypeError, ValueError, OverflowError):
        return None
