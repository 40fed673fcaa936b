"""
What `opentelemetry-instrument` finds in the entry point group `opentelemetry_instrumentor`: it switches gpuscope on.

Has the methods of OpenTelemetry's `BaseInstrumentor`, but does not import it, so that the package stays optional.
"""

from __future__ import annotations

import gpuscope
from gpuscope._recording.state import state


class GpuscopeInstrumentor:
    """Starts gpuscope as its variables say; if `GPUSCOPE` is unset, it records."""

    def instrumentation_dependencies(self) -> tuple[str, ...]:
        """Return what else has to be installed: nothing."""
        return ()

    def instrument(self, **_options: object) -> None:
        """Record, unless `GPUSCOPE` says otherwise, and make the functions that the variables name stages."""
        # Every Python below comes here, so one that has no stage has made no mistake.
        state.has_recorded = True
        if not state.environ.get("GPUSCOPE", "").strip():
            gpuscope.enable()
            from gpuscope.instrument._instrumentation import follow_environment

            follow_environment()
        if state.instrumentation is not None:  # Every child of the program comes here as well.
            state.instrumentation.is_asked = False

    def uninstrument(self, **_options: object) -> None:
        """Put the functions back, and stop recording."""
        from gpuscope.instrument import uninstrument

        uninstrument()
        gpuscope.disable()
