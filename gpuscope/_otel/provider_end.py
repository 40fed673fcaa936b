"""
The end of the application's TracerProvider: what we still hold goes out before it, and what comes after is told.

A provider has no hook for that. So its `shutdown` is called by way of ours, and a span processor of ours, which does
nothing else, hears of an end that goes another way, as by the provider's own handler of `atexit`. Never ends a provider
itself.
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
        self.before: Callable[[], object] | None = None
        """Called before the provider's `shutdown`, in the process that has set it."""
        self._pid = 0
        original = provider.shutdown

        @functools.wraps(original)
        def shutdown(*arguments: Any, **keywords: Any) -> Any:
            self.come()
            return original(*arguments, **keywords)

        shutdown.gpuscope_end = self  # type: ignore[attr-defined]
        provider.shutdown = shutdown
        with contextlib.suppress(Exception):  # Not every provider takes processors.
            _add_first(provider, _processor(self))

    def come(self) -> None:
        """Do what is to be done before it."""
        before = self.before
        if before is not None and not self.has_come and self._pid == os.getpid():
            with contextlib.suppress(Exception):  # It is the application's call: no failure of ours is in its way.
                before()
        self.has_come = True

    def tell(self, before: Callable[[], object]) -> None:
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
    return type("GpuscopeEndProcessor", (base,), {"shutdown": lambda _: end.come()})()


def _add_first(provider: Any, processor: Any) -> None:
    """Add a span processor and, where the SDK keeps them as we know, put it before those that export."""
    provider.add_span_processor(processor)
    several: Any = getattr(provider, "_active_span_processor", None)
    if isinstance(getattr(several, "_span_processors", None), tuple):
        with several._lock:
            others = tuple(other for other in several._span_processors if other is not processor)
            several._span_processors = (processor, *others)
