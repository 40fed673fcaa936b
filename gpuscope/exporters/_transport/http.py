"""
Sends one payload to one OTLP/HTTP endpoint, with the retries that the protocol prescribes.

The only code that talks to a network. It knows bytes and outcomes, and nothing of stages, buffers or threads. It waits
only as long as the payload's time allows, and not between attempts once `interrupt` is set. For one thread only.
"""

from __future__ import annotations

import gzip
import random
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import monotonic, time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import requests

if TYPE_CHECKING:
    from collections.abc import Mapping
    from threading import Event

    from gpuscope._settings.config import Config

_RETRYABLE = frozenset((429, 502, 503, 504))
_ANSWER_BYTES = 65_536
"""The most that is read of an answer; a receiver has no reason to say more."""
_BACKOFF_MAX_S = 30.0
_SPEED_LEVEL = 1
"""Of gzip. Spans are so repetitive that slower levels gain little and keep a core busy for longer."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a payload."""

    reason: str = ""
    """Empty when the endpoint took it; else what lost stages are counted under: `tls`, `timeout`, `unreachable`,
    `invalid_request`, `http_503` and the like, or `error`."""
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

    url: str
    headers: Mapping[str, str]
    timeout_s: float
    """For one payload, all attempts included."""
    compression: str
    """`gzip`, or anything else for none."""
    certificate: str
    """This and the following two are paths, or empty."""
    client_certificate: str
    client_key: str

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
        )


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
        self.shown_url = _without_secrets(endpoint.url)
        self._url = endpoint.url
        self._timeout_s = endpoint.timeout_s
        self._gzip = endpoint.compression == "gzip"
        self._interrupt = interrupt
        self._backoff_s = backoff_s
        self._session = requests.Session()
        self._session.headers.update(endpoint.headers)
        self._session.headers["User-Agent"] = f"OTel-OTLP-Exporter-gpuscope/{version}"
        self._session.headers["Content-Type"] = "application/x-protobuf"
        if self._gzip:
            self._session.headers["Content-Encoding"] = "gzip"
        self._verify: str | bool = endpoint.certificate or True
        certificate, key = endpoint.client_certificate, endpoint.client_key
        self._cert = (certificate, key) if certificate and key else certificate or None

    def post(self, payload: bytes) -> Outcome:
        """Send the payload, and again where that may help, within the endpoint's `timeout_s`."""
        deadline = monotonic() + self._timeout_s
        body = gzip.compress(payload, _SPEED_LEVEL) if self._gzip else payload
        attempt = 0
        while True:
            last = self._interrupt.is_set()
            outcome = self._attempt(body, deadline)
            if last or not outcome.retry:
                return outcome
            wait_s = self._wait_s(attempt, outcome.retry_after_s)
            if monotonic() + wait_s >= deadline:
                # There would be no time left for another attempt after this wait.
                return outcome
            self._interrupt.wait(wait_s)
            attempt += 1

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def _wait_s(self, attempt: int, asked_s: float | None) -> float:
        if asked_s is not None:
            return asked_s
        # Jitter, so that the workers of a restarted service do not all come back at once. It needs no cryptography,
        # and the global generator is left alone, because frameworks seed it and count on its sequence.
        longest_s: float = min(self._backoff_s * 2.0**attempt, _BACKOFF_MAX_S)
        return longest_s * _JITTER.uniform(0.5, 1.0)

    def _attempt(self, body: bytes, deadline: float) -> Outcome:
        remaining_s = max(deadline - monotonic(), 0.001)
        try:
            # Redirects are not followed: the library would make the POST a GET, and would send the headers, which hold
            # keys, to whatever host is named.
            with self._session.post(
                self._url,
                data=body,
                timeout=remaining_s,
                verify=self._verify,
                cert=self._cert,
                allow_redirects=False,
                stream=True,
            ) as response:
                return _judge(response, deadline)
        except requests.exceptions.SSLError as error:
            return Outcome("tls", _cause(error))
        except requests.exceptions.Timeout as error:
            return Outcome("timeout", _cause(error), retry=True)
        except (requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            return Outcome("unreachable", _cause(error), retry=True)
        except (requests.exceptions.RequestException, ValueError, OSError) as error:
            # Another attempt would not help. The message stays out of the log, because it quotes headers with keys.
            detail = f"{type(error).__name__}: check the endpoint's URL, the headers and the certificate files"
            return Outcome("invalid_request", detail)


_JITTER = random.Random()  # noqa: S311


def _without_secrets(url: str) -> str:
    """Return the URL without user, password and query."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "an endpoint that is not a valid URL"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _cause(error: BaseException) -> str:
    """Describe the root cause: the outer messages are long and quote the whole URL."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}"


def _judge(response: requests.Response, deadline: float) -> Outcome:
    status = response.status_code
    if status // 100 == 2:  # noqa: PLR2004
        return Outcome(body=_read(response, deadline))
    detail = f"HTTP {status} {response.reason or ''}".strip()
    if status in _RETRYABLE:
        asked = _retry_after_s(response.headers.get("Retry-After"))
        return Outcome(f"http_{status}", detail, retry=True, retry_after_s=asked)
    return Outcome(f"http_{status}", detail)


def _read(response: requests.Response, deadline: float) -> bytes:
    """Return what of the answer came in time, or nothing if it is broken: the payload is accepted already."""
    answer = bytearray()
    try:
        # Byte by byte: a longer read returns only when it is complete, so an endpoint that drips would hold the thread
        # past the deadline. It costs nothing for the usual answer of none to sixty bytes.
        for piece in response.iter_content(1):
            answer += piece
            if len(answer) >= _ANSWER_BYTES or monotonic() >= deadline:
                break
    except (requests.exceptions.RequestException, OSError):
        return b""
    return bytes(answer)


def _retry_after_s(text: str | None) -> float | None:
    """Return the seconds of a `Retry-After` header, which holds seconds or a date; None if neither."""
    if text is None:
        return None
    try:
        if text.strip().isdigit():
            return float(text)
        return max(parsedate_to_datetime(text).timestamp() - time(), 0.0)
    except (TypeError, ValueError, OverflowError):
        return None
