"""
What `opentelemetry-instrument` finds under the entry point group `opentelemetry_instrumentor`: gpuscope, switched on.

Has the methods of OpenTelemetry's `BaseInstrumentor`, and does not import it: who has no use for it need not have it.
"""

from __future__ import annotations

from typing import Any

import gpuscope
from gpuscope._recording.state import state


class GpuscopeInstrumentor:
    """Starts gpuscope as its variables say; with `GPUSCOPE` unset, it records."""

    def instrumentation_dependencies(self) -> tuple[str, ...]:
        """Return what has to be installed besides: nothing."""
        return ()

    def instrument(self, **_options: Any) -> None:
        """Record, unless `GPUSCOPE` says otherwise, and make stages of the functions that the variables name."""
        if not state.environ.get("GPUSCOPE", "").strip():
            gpuscope.enable()
            from gpuscope.instrument._instrumentation import follow_environment

            follow_environment()

    def uninstrument(self, **_options: Any) -> None:
        """Put the functions back, and stop recording."""
        from gpuscope.instrument import uninstrument

        uninstrument()
        gpuscope.disable()
