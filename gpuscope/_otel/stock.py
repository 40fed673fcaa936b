"""
Whether the application's TracerProvider does to a span nothing but sample it, keep its limits and send it by OTLP.

Then spans need not be made one by one: their bytes may go through the application's own exporters. If not, they may
still be made at their end alone, where no span processor does anything before it. Compares methods,
not types: distributions subclass the SDK's classes for their constructors alone, and others replace a method on an
object. Sends nothing, changes nothing, and imports nothing that the application has not imported.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpuscope._data.plain.descriptions import name_of

if TYPE_CHECKING:
    from collections.abc import Callable

_SDK = "opentelemetry.sdk.trace"
_EXPORTERS = {
    "http": ("export", "_export", "_export_serialized_spans"),
    "grpc": ("export", "_export", "_translate_data"),
}
"""By protocol: the methods of `OTLPSpanExporter` that decide what is sent."""
_SAMPLERS_OF_PARENTS = (
    "_root",
    "_remote_parent_sampled",
    "_remote_parent_not_sampled",
    "_local_parent_sampled",
    "_local_parent_not_sampled",
)
_OURS = "gpuscope_end"
"""By this attribute of their class processors of ours are known, which only take notice of the end."""


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """An exporter of the application's that spans may go through."""

    protocol: str
    """`http` or `grpc`."""
    exporter: Any
    """The application's `OTLPSpanExporter`."""


@dataclass(frozen=True, slots=True, eq=False)
class Judgement:
    """What was found of a provider."""

    targets: tuple[Target, ...]
    """Empty where spans have to be made one by one."""
    reason: str
    """Why they have to; empty where they need not."""
    takes_finished: bool = False
    """Whether its span processors do nothing before a span's end, so that they may get spans that are made then."""

    @property
    def makes_ids(self) -> bool:
        """Whether spans have to begin with the provider, which then gives them their ids."""
        return not (self.targets or self.takes_finished)

    def is_like(self, other: Judgement) -> bool:
        """Tell whether another says the same of the same exporters."""
        exporters, others = ([id(target.exporter) for target in each.targets] for each in (self, other))
        return (self.reason, self.takes_finished, exporters) == (other.reason, other.takes_finished, others)


NOTHING = Judgement((), "there is no provider")


class Judge:
    """
    Remembers what it found, because nobody may wait for it on the way of a stage.

    Args:
        get_provider: returns the application's provider, or None.
        get_tracer: returns its tracer for gpuscope, or None.

    """

    def __init__(self, get_provider: Callable[[], Any], get_tracer: Callable[[], Any]) -> None:
        self._get_provider, self._get_tracer = get_provider, get_tracer
        self._last: tuple[object, object, Judgement] = None, None, NOTHING
        self._sampler: tuple[object, bool] = None, False

    def judgement(self, *, anew: bool = False) -> Judgement:
        """Return what is known of the provider, the same object as long as that is the same; `anew` looks again."""
        provider, (last, last_processors, known) = self._get_provider(), self._last
        processors = processors_of(provider)
        if provider is last and processors is last_processors and not anew:
            return known
        found = NOTHING if provider is None else judge(provider, self._get_tracer())
        self._last = provider, processors, known if known.is_like(found) else found
        return self._last[2]

    def keeps_roots(self) -> bool:
        """Tell whether the provider's sampler is known to keep every trace that begins here, and to add nothing."""
        sampler = getattr(self._get_provider(), "sampler", None)
        if sampler is not self._sampler[0]:
            self._sampler = sampler, _keeps_roots(sampler)
        return self._sampler[1]


def judge(provider: Any, tracer: Any) -> Judgement:
    """
    Look at a provider. What is not known for sure is not stock.

    Args:
        provider: of the application.
        tracer: the provider's for gpuscope.

    """
    try:
        targets: list[Target] = []
        reason = _of_tracer(provider, tracer) or _of_ids(provider)
        if reason:
            return Judgement((), reason)
        reason = _of_processors(provider, targets)
        takes_finished = bool(reason) and _wait_for_the_end(provider)
    except Exception as error:  # It is the application's object; whatever it does, its spans are made one by one.
        return Judgement((), f"the provider cannot be looked at ({name_of(type(error))})")
    return Judgement((), reason, takes_finished) if reason else Judgement(tuple(targets), "")


def processors_of(provider: Any) -> tuple[Any, ...] | None:
    """Return the provider's span processors, the same object until they change; None where they do not show."""
    several = getattr(provider, "_active_span_processor", None)
    found = getattr(several, "_span_processors", None)
    return found if isinstance(found, tuple) else None


def _of_tracer(provider: Any, tracer: Any) -> str:
    sdk = sys.modules.get(_SDK)
    if sdk is None or not isinstance(provider, sdk.TracerProvider):
        return f"the provider is a {_name(provider)}"
    if not _is_stock(tracer, (sdk.Tracer,), ("start_span",)):
        return f"its tracer is a {_name(tracer)}"
    return "" if getattr(tracer, "_is_enabled", lambda: True)() else "its tracer for gpuscope is disabled"


def _of_ids(provider: Any) -> str:
    if not _is_plain(provider.sampler, sys.modules[f"{_SDK}.sampling"]):
        return f"the sampler {_name(provider.sampler)} may look at more than the trace's id"
    if type(provider.id_generator) is not sys.modules[f"{_SDK}.id_generator"].RandomIdGenerator:
        return f"ids come from a {_name(provider.id_generator)}"
    return ""


def _of_processors(provider: Any, targets: list[Target]) -> str:
    export = sys.modules[f"{_SDK}.export"]
    if not _holds_them_as_known(provider):
        return f"its span processors are held by a {_name(getattr(provider, '_active_span_processor', None))}"
    for processor in processors_of(provider) or ():
        if hasattr(type(processor), _OURS):
            continue
        known = (export.BatchSpanProcessor, export.SimpleSpanProcessor)
        if not _is_stock(processor, known, ("on_start", "on_end", "_on_ending")):
            return f"the span processor {_name(processor)} may change spans"
        exporter = getattr(processor, "span_exporter", None)
        target = _target(exporter)
        if target is None:
            return f"the span exporter {_name(exporter)} is not OpenTelemetry's for OTLP"
        targets.append(target)
    return "" if targets else "it has no span processor"


def _holds_them_as_known(provider: Any) -> bool:
    sdk = sys.modules[_SDK]
    several = getattr(provider, "_active_span_processor", None)
    holders = (sdk.SynchronousMultiSpanProcessor, sdk.ConcurrentMultiSpanProcessor)
    return processors_of(provider) is not None and _is_stock(several, holders, ("on_start", "on_end", "_on_ending"))


def _wait_for_the_end(provider: Any) -> bool:
    """Tell whether no processor does anything at the start of a span or just before its end."""
    sdk, export = sys.modules[_SDK], sys.modules[f"{_SDK}.export"]
    processors = processors_of(provider) if _holds_them_as_known(provider) else None
    known = (export.BatchSpanProcessor, export.SimpleSpanProcessor, sdk.SpanProcessor)
    others = [processor for processor in processors or () if not hasattr(type(processor), _OURS)]
    return bool(others) and all(_is_stock(each, known, ("on_start", "_on_ending")) for each in others)


def _target(exporter: Any) -> Target | None:
    for protocol, methods in _EXPORTERS.items():
        module = sys.modules.get(f"opentelemetry.exporter.otlp.proto.{protocol}.trace_exporter")
        known = getattr(module, "OTLPSpanExporter", None)
        if known is not None and _is_stock(exporter, (known,), methods):
            return Target(protocol, exporter)
    return None


def _is_stock(thing: Any, classes: tuple[type, ...], methods: tuple[str, ...]) -> bool:
    """Tell whether the object does in these methods what one of the classes does."""
    for known in classes:
        if isinstance(thing, known):
            own = getattr(thing, "__dict__", {})
            return all(
                getattr(type(thing), name, None) is getattr(known, name, None) and name not in own for name in methods
            )
    return False


def _is_plain(sampler: Any, sampling: Any) -> bool:
    """Tell whether a sampler decides by the trace's id and its parent alone, and adds nothing."""
    if _is_stock(sampler, (sampling.StaticSampler, sampling.TraceIdRatioBased), ("should_sample",)):
        return True
    return _is_stock(sampler, (sampling.ParentBased,), ("should_sample",)) and all(
        _is_plain(getattr(sampler, part, None), sampling) for part in _SAMPLERS_OF_PARENTS
    )


def _keeps_roots(sampler: Any) -> bool:
    sampling = sys.modules.get(f"{_SDK}.sampling")
    try:
        if sampling is None or not _is_plain(sampler, sampling):
            return False
        return getattr(sampler, "_root", sampler) is sampling.ALWAYS_ON
    except Exception:  # It is the application's object: it is asked itself.
        return False


def _name(thing: Any) -> str:
    kind = type(thing)
    return f"`{kind.__module__}.{kind.__qualname__}`"
