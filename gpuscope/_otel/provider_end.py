"""
The end of the application's TracerProvider: what we still hold goes out before it, and what comes after is told.

A provider has no hook for that. So its `shutdown` is called by way of ours, and a span processor of ours, which does
nothing else, hears of an end that goes another way, as by the provider's own handler of `atexit`. Its `force_flush` is
called by way of ours, too, because programs that freeze between requests count on it. Never ends a provider itself.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_lock = threading.RLock()  # A stage in a signal handler may come here while its own thread is here.


class ProviderEnd:
    """
    Watches one provider.

    Args:
        provider: of the application.

    """

    def __init__(self, provider: Any) -> None:
        self.has_come = False
        self.before: Callable[[], bool] | None = None
        """Called before the provider's `shutdown` and `force_flush`, in the process that has set it; returns whether
        all was handed over in time."""
        self._pid = 0
        original = provider.shutdown

        @functools.wraps(original)
        def shutdown(*arguments: Any, **keywords: Any) -> Any:
            self.come()
            return original(*arguments, **keywords)

        shutdown.gpuscope_end = self  # type: ignore[attr-defined]
        with contextlib.suppress(Exception):  # Not every provider has it.
            provider.force_flush = self._flushing(provider.force_flush)
        with contextlib.suppress(Exception):  # Not every provider takes processors.
            _add_first(provider, _processor(self))
        provider.shutdown = shutdown  # At last: by this another thread knows that all is done.

    def _flushing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def force_flush(*arguments: Any, **keywords: Any) -> Any:
            handed_over = self._hand_over()
            answer = original(*arguments, **keywords)
            return answer if handed_over else False

        force_flush.gpuscope_original = original  # type: ignore[attr-defined]
        return force_flush

    def come(self) -> None:
        """Do what is to be done before it."""
        self._hand_over()
        self.has_come = True

    def _hand_over(self) -> bool:
        before = self.before
        if before is None or self.has_come or self._pid != os.getpid():
            return True
        try:
            return before()
        except Exception:  # It is the application's call: no failure of ours is in its way.
            return False

    def tell(self, before: Callable[[], bool]) -> None:
        """Have this called before the end, instead of what was to be called."""
        self.before, self._pid = before, os.getpid()


def end_of(provider: Any) -> ProviderEnd | None:
    """Return what watches the provider, which is made once; None where its `shutdown` cannot be stood before."""
    found: ProviderEnd | None = getattr(getattr(provider, "shutdown", None), "gpuscope_end", None)
    if found is None and hasattr(provider, "shutdown"):
        with _lock, contextlib.suppress(Exception):
            found = getattr(provider.shutdown, "gpuscope_end", None) or ProviderEnd(provider)
    return found


def _processor(end: ProviderEnd) -> Any:
    """Return a span processor that takes notice of its shutdown. Of the SDK's kind, which must be there already."""
    base: Any = getattr(sys.modules.get("opentelemetry.sdk.trace"), "SpanProcessor", object)
    methods = {
        "shutdown": lambda _: end.come(),
        # In older versions that of the base class says no, and then the provider flushes none after it.
        "force_flush": lambda _, timeout_millis=30_000: True,  # noqa: ARG005
    }
    return type("GpuscopeEndProcessor", (base,), {**methods, "gpuscope_end": end})()


def _add_first(provider: Any, processor: Any) -> None:
    """Add a span processor and, where the SDK keeps them as we know, put it before those that export."""
    several: Any = getattr(provider, "_active_span_processor", None)
    if not isinstance(getattr(several, "_span_processors", None), tuple):
        provider.add_span_processor(processor)
        return
    # Not the provider's own method: Phoenix's takes each processor for a replacement of the one that exports.
    with several._lock:
        several._span_processors = (processor, *several._span_processors)


def original_flush(provider: Any) -> Callable[[int], object] | None:
    """Return the provider's own `force_flush`, which does not come back to us; None where it has none."""
    flush = getattr(provider, "force_flush", None)
    found: Callable[[int], object] | None = getattr(flush, "gpuscope_original", flush)
    return found
