"""
Which traces are exported: the application's sampler where it has one, else `OTEL_TRACES_SAMPLER`.

Knows no record, keeps no decision, and imports the OpenTelemetry SDK only for a ratio. A sampler that is installed as
an entry point decides whether a trace is exported; attributes or a trace state that it would add are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.trace import SpanKind, get_current_span

from gpuscope._data.plain.values import shown
from gpuscope._interrupts import is_the_programs
from gpuscope._settings.environment import variables
from gpuscope._settings.parsers import SAMPLER_GROUP, SAMPLERS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.sampling import Sampler
    from opentelemetry.trace import TracerProvider
    from opentelemetry.util.types import AttributeValue

    from gpuscope._log import WarnOnce


class EnvironmentSampler:
    """
    The sampler that `OTEL_TRACES_SAMPLER` and `OTEL_TRACES_SAMPLER_ARG` ask for.

    Args:
        name: one of OpenTelemetry's six names, or that of an entry point which makes a sampler.
        ratio: the share of traces that the two samplers by ratio keep, from 0 to 1.
        warnings: says that a sampler cannot be made.

    """

    def __init__(self, name: str, ratio: float, warnings: WarnOnce) -> None:
        prefix, usual = "parentbased_", "parentbased_always_on"
        self._foreign = "" if name in SAMPLERS else name
        name = usual if self._foreign else name
        self.parent_based = name.startswith(prefix)
        self._rule = name[len(prefix) :] if self.parent_based else name
        self._ratio, self._warnings = ratio, warnings
        self._sampler: Sampler | None = None
        self._has_asked = False
        self.keeps_all = self._rule == "always_on" and not self._foreign
        """Whether every trace that begins here is exported."""

    def load(self) -> Sampler | None:
        """
        Return the sampler that is not one of OpenTelemetry's six, made when first asked for; None where none is.

        Whoever asks meanwhile does not wait, and has its trace kept: what makes a sampler may ask a network.
        """
        if self._foreign and not self._has_asked:
            self._has_asked = True
            try:
                self._sampler = _made(self._foreign)
            except Exception as error:  # Of whoever has written the sampler.
                if is_the_programs(error):
                    raise
                self._warnings.warn(
                    "sampler of the environment",
                    "the sampler %r of OTEL_TRACES_SAMPLER cannot be used (%s); using parentbased_always_on.",
                    self._foreign,
                    shown(error),
                )
        return self._sampler

    def keeps(self, context: Context, trace_id: int, name: str, attributes: Mapping[str, AttributeValue]) -> bool:
        """Decide for a stage whose parent is the span in the context, if any."""
        if (sampler := self.load()) is not None:
            return is_kept(sampler, context, trace_id, name, attributes)
        if self.parent_based:
            parent = get_current_span(context).get_span_context()
            if parent.is_valid:
                return parent.trace_flags.sampled
        if self._rule != "traceidratio":
            return self._rule == "always_on"
        # OpenTelemetry's own, so that services which sample by the same ratio keep the same traces.
        from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

        return is_kept(TraceIdRatioBased(self._ratio), context, trace_id, "", {})


def _made(name: str) -> Sampler:
    """Make a sampler as the SDK does: by an entry point, of the text of `OTEL_TRACES_SAMPLER_ARG`."""
    from importlib.metadata import entry_points

    (found,) = tuple(entry_points(group=SAMPLER_GROUP, name=name))[:1]
    made: Sampler = found.load()(variables().get("OTEL_TRACES_SAMPLER_ARG"))
    if not hasattr(made, "should_sample"):
        raise TypeError
    return made


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
