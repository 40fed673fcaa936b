"""
Which exporters are in use: chosen by the configuration and by whether the application has a TracerProvider.

Makes exporters and hands batches to them. Knows nothing of records, and waits only to flush and to shut down. Runs on
the collector's thread; any thread may read `names`.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np

from gpuscope._data.batch import NO_WORK_NS, NO_WORK_TRIMMED_NS, RowFlag
from gpuscope._data.plain.values import shown
from gpuscope._log import logger
from gpuscope._recording.state import state
from gpuscope._settings.complaints import SAMPLING, SPANS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gpuscope._data.batch import StageBatch
    from gpuscope._data.interfaces import Bridge
    from gpuscope._data.metrics import Snapshot
    from gpuscope._data.plain.values import Clean
    from gpuscope._log import WarnOnce
    from gpuscope._otel.bridge import Bridge as SdkBridge
    from gpuscope._recording.ledger import Ledger
    from gpuscope._settings.config import Config
    from gpuscope.exporters import Exporter
    from gpuscope.exporters.application import ApplicationExporter


BY_PROVIDER = frozenset(("application", "processors", "sdk"))
"""Exporters by the application's TracerProvider."""
_IN_GRAPH, _TRIMMED = int(RowFlag.IN_GRAPH), int(RowFlag.TRIMMED)


def with_work(batch: StageBatch) -> StageBatch:
    """
    Return the batch without the GPU spans of stages that gave their stream no work which could be measured.

    Their GPU times stay in the columns. On an idle GPU a stage without work cannot be told from one that waits for its
    work: there its two events are as far apart as on the host. A stage inside a graph has no other span, and keeps it.
    """
    if not batch.gpu_span_id.any():
        return batch
    limit_ns = np.where(batch.flags & _TRIMMED, NO_WORK_TRIMMED_NS, NO_WORK_NS)
    no_work = batch.gpu_end_ns - batch.gpu_start_ns <= limit_ns
    no_work &= batch.flags & _IN_GRAPH == 0
    return replace(batch, gpu_span_id=np.where(no_work, np.uint64(0), batch.gpu_span_id))


def _make(
    name: str, config: Config, bridge: Bridge | None, resource: Callable[[], Mapping[str, Clean]], ledger: Ledger
) -> Exporter:
    if name == "otlp":
        from gpuscope.exporters.otlp import OtlpExporter

        return OtlpExporter(config, resource(), get_provider=lambda: None if bridge is None else bridge.provider)
    if name == "sdk":
        from gpuscope.exporters.sdk import SdkExporter

        # The collector opens the bridge before it chooses exporters, and opens no other kind.
        return SdkExporter(cast("SdkBridge", bridge), ledger.faults.note)
    if name == "processors":
        from gpuscope.exporters.processors import ProcessorsExporter

        return ProcessorsExporter(cast("SdkBridge", bridge))
    if name == "application":
        from gpuscope.exporters.application import ApplicationExporter

        return ApplicationExporter(cast("SdkBridge", bridge), config)
    from gpuscope.exporters.file import FileExporter

    return FileExporter(config, resource())


def automatic_exporter(bridge: Bridge | None) -> str:
    """Return the exporter that `auto` means: by the application's TracerProvider, if it has one."""
    if bridge is None or bridge.provider is None:
        return "otlp"
    judgement = bridge.judgement()
    return "application" if judgement.targets else "processors" if judgement.takes_finished else "sdk"


def exporters_in_use(config: Config, bridge: Bridge | None) -> tuple[str, ...]:
    """Return the exporters that the settings mean now."""
    names = config.exporters
    if "auto" in names:
        automatic = "none" if config.traces_exporter.strip().lower() == "none" else automatic_exporter(bridge)
        names = tuple(dict.fromkeys(automatic if name == "auto" else name for name in names))
    off = {"none"} | ({"otlp", *BY_PROVIDER} if config.sdk_disabled else set())
    return tuple(name for name in names if name not in off)


def uses_of_variables(names: tuple[str, ...], bridge: Bridge | None) -> set[str]:
    """Return what is in use, of spans, as far as variables matter for that alone."""
    sampling = {SAMPLING} if names and bridge is not None and bridge.provider is None else set()
    return sampling | ({SPANS} if "otlp" in names else set())


class ActiveExporters:
    """
    The exporters of one period of recording.

    Args:
        config: the settings.
        ledger: counts what becomes of each batch.
        warnings: logs each kind of failure once.
        extra: more exporters than `config` names.

    """

    def __init__(self, config: Config, ledger: Ledger, warnings: WarnOnce, *, extra: tuple[Exporter, ...] = ()) -> None:
        self.names: tuple[str, ...] = ()
        self.route = ""
        """Which way spans go, where an application has a TracerProvider; for people."""
        self._config = config
        self._ledger = ledger
        self._warnings = warnings
        self._extra = extra
        self._seen: tuple[object, ...] = ()
        """The bridge, and what was known of the application's provider, when the exporters were last chosen."""
        self._resource: Mapping[str, Clean] = {}
        self._made: dict[str, Exporter] = {}
        self._failed: set[str] = set()
        self._active: list[Exporter] = list(extra)

    def resource(self) -> Mapping[str, Clean]:
        """Return the attributes of the process, which are the same for everything that is sent."""
        if not self._resource:
            from gpuscope.exporters._encoding.resource import resource_attributes

            self._resource = resource_attributes()
        return self._resource

    def refresh(self, bridge: Bridge | None, before_change: Callable[[], object] = lambda: None) -> None:
        """
        Choose the exporters again: `auto` follows the application's provider, which may appear at any time.

        Before others take over, `before_change` hands to the present ones what was made for them.
        """
        provider, judgement = (None, None) if bridge is None else (bridge.provider, bridge.judgement(anew=True))
        seen = bridge, provider, judgement
        if self._active and len(self._seen) == len(seen) and all(map(operator.is_, seen, self._seen)):
            return
        names, self._seen = exporters_in_use(self._config, bridge), seen
        for use in uses_of_variables(names, bridge):
            state.complain(use, self._config)
        if bridge is not None and provider is None:
            bridge.load_sampler()
        if names != self.names and self._active:
            before_change()
        if bridge is not None:
            # The bridge reads it wherever it gives a stage its ids: with `sdk` the application's provider makes them.
            # Apart from this line only the bridge sets it: when it is made, and in `uses_sdk`.
            bridge.sdk = "sdk" in names
        if names == self.names and self._active:
            return
        self.names = names
        found = (self._exporter(name, bridge) for name in names)
        self._active = [*self._extra, *(exporter for exporter in found if exporter is not None)]
        self._say_which_way(bridge)

    def _say_which_way(self, bridge: Bridge | None) -> None:
        self.route = ""
        if "application" in self.names and "application" in self._made:
            where = ", ".join(cast("ApplicationExporter", self._made["application"]).endpoints())
            self.route = f"as columns through the application's own exporter to {where}"
        elif "processors" in self.names and bridge is not None:
            self.route = f"to the application's span processors, made at their end, because {bridge.judgement().reason}"
        elif "sdk" in self.names and bridge is not None:
            reason = bridge.judgement().reason if "auto" in self._config.exporters else "`GPUSCOPE_EXPORTER` says so"
            self.route = f"one by one through the application's TracerProvider, because {reason}"
        if self.route:
            logger.info("spans go %s.", self.route)

    def _exporter(self, name: str, bridge: Bridge | None) -> Exporter | None:
        if name not in self._made and name not in self._failed:
            try:
                self._made[name] = _make(name, self._config, bridge, self.resource, self._ledger)
            except BaseException as error:  # Not tried again; `export` counts what that costs.
                self._failed.add(name)
                self._warnings.warn(name, "the exporter %r cannot be set up: %s.", name, shown(error))
        return self._made.get(name)

    def export(self, batch: StageBatch, breathe: Callable[[], None]) -> None:
        """Hand a batch of sampled stages, or of light spans, to each exporter; `breathe` after every piece of work."""
        stages = len(batch.site)
        account = self._ledger if batch.shared is None else self._ledger.shared
        if not self._active:
            reason = "no_exporter" if not self._failed else "exporter_set_up"
            (account.lose if self._failed else account.drop)(reason, stages)
            return
        delivery = account.deliver(stages, len(self._active))
        for_back_ends = with_work(batch) if self._config.gpu_spans == "work" else batch
        for exporter in self._active:
            # `every_gpu_span` is optional, as `account` is below.
            given = batch if getattr(exporter, "every_gpu_span", False) else for_back_ends
            try:
                for _ in exporter.export(given, delivery) or ():
                    breathe()
            except BaseException as error:  # One exporter's failure; the others still get the batch.
                delivery.settle(0, {"exporter_error": stages})
                self._warnings.warn(exporter.name, "the exporter %r failed: %s.", exporter.name, shown(error))
            breathe()

    def flush(self, remaining_s: Callable[[], float]) -> bool:
        """Flush every exporter made so far, in use or not, within the time that remains; return whether all did."""
        results = [self._try(exporter, "flush", remaining_s()) for exporter in self._all()]
        return all(results)

    def pass_on(self, remaining_s: Callable[[], float]) -> bool:
        """Send what goes through the application's exporters but past its provider, before that flushes or ends."""
        exporter = self._made.get("application")
        return exporter is None or self._try(exporter, "flush", remaining_s())

    def account(self, snapshot: Snapshot) -> None:
        """Give the account of stages to the exporters that write it down."""
        for exporter in self._all():
            # `account` is an optional method: the protocol `Exporter` only describes it. Of ours only `file` has it.
            if hasattr(exporter, "account"):
                self._try(exporter, "account", snapshot)

    def shutdown(self, remaining_s: Callable[[], float]) -> None:
        """Shut down every exporter made so far, in use or not, within the time that remains."""
        for exporter in self._all():
            self._try(exporter, "shutdown", remaining_s())

    def places(self) -> tuple[str, ...]:
        """Return where each exporter in use sends or writes to, for people."""
        return tuple(str(getattr(self._made.get(name), "place", f"`{name}`")) for name in self.names)

    def _all(self) -> list[Exporter]:
        return [*self._extra, *self._made.values()]

    def _try(self, exporter: Exporter, action: str, argument: float | Snapshot) -> bool:
        try:
            return getattr(exporter, action)(argument) is not False
        except BaseException as error:  # As in `export`.
            self._warnings.warn(
                f"{exporter.name}.{action}", "`%s` of %r failed: %s.", action, exporter.name, shown(error)
            )
            return False
