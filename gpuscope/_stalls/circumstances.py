"""
What excuses a stage that makes no progress, or keeps anybody from looking, as far as loaded modules say.

Imports nothing.
"""

from __future__ import annotations

import sys


def compiles() -> bool:
    """Tell whether PyTorch compiles something now, on any thread; without importing what would know."""
    handler = getattr(sys.modules.get("torch._dynamo.callback"), "callback_handler", None)
    return bool(getattr(handler, "_CompilationCallbackHandler__pending_callbacks_counter", 0))


def has_greenlets() -> bool:
    """Tell whether a library has made greenlets of threads, so that one which waits in C would stop all others."""
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    return bool(
        (gevent is not None and gevent.is_module_patched("threading"))
        or (eventlet is not None and eventlet.is_monkey_patched("thread"))
    )
