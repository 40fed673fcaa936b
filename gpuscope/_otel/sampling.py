"""
Which traces are exported: the application's sampler where it has one, else `OTEL_TRACES_SAMPLER`.

Decides from its arguments alone; knows no record, keeps nothing, and imports the OpenTelemetry SDK only for a ratio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.trace import SpanKind, get_current_span

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.sampling import Sampler
    from opentelemetry.trace import TracerProvider
    from opentelemetry.util.types import AttributeValue


class EnvironmentSampler:
    """
    The sampler that `OTEL_TRACES_SAMPLER` and `OTEL_TRACES_SAMPLER_ARG` ask for.

    Args:
        name: one of OpenTelemetry's six names.
        ratio: the share of traces that the two samplers by ratio keep, from 0 to 1.

    """

    def __init__(self, name: str, ratio: float) -> None:
        prefix = "parentbased_"
        self.parent_based = name.startswith(prefix)
        self._rule = name[len(prefix) :] if self.parent_based else name
        self._ratio = ratio
        self.keeps_all = self._rule == "always_on"
        """Whether every trace that begins here is exported."""

    def keeps(self, context: Context, trace_id: int) -> bool:
        """Decide for a stage whose parent is the span in the context, if any."""
        if self.parent_based:
            parent = get_current_span(context).get_span_context()
            if parent.is_valid:
                return parent.trace_flags.sampled
        if self._rule != "traceidratio":
            return self._rule == "always_on"
        # OpenTelemetry's own, so that services which sample by the same ratio keep the same traces.
        from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

        return is_kept(TraceIdRatioBased(self._ratio), context, trace_id, "", {})


def sampler_of(provider: TracerProvider | None) -> Sampler | None:
    """Return the provider's sampler, or None where it has none that can be asked."""
    sampler = getattr(provider, "sampler", None)
    return sampler if hasattr(sampler, "should_sample") else None


def is_kept(
    sampler: Sampler, context: Context, trace_id: int, name: str, attributes: Mapping[str, AttributeValue]
) -> bool:
    """Ask a sampler as the SDK would when it starts a span."""
    result = sampler.should_sample(context, trace_id, name, SpanKind.INTERNAL, attributes, ())
    return bool(result.decision.is_sampled())  # type: ignore[no-untyped-call]  # The SDK gives it no types.
