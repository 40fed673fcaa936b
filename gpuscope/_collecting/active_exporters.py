"""
Which exporters are in use, from the configuration and from whether the application has a TracerProvider.

Makes exporters and hands batches to them; knows nothing of records. Runs on the collector's thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._data.batch import StageBatch
    from gpuscope._data.metrics import Snapshot
    from gpuscope._log import WarnOnce
    from gpuscope._recording.ledger import Ledger
    from gpuscope._settings.config import Config
    from gpuscope.exporters import Exporter


def _make(name: str, config: Config, bridge: Any, resource: Callable[[], dict[str, Any]]) -> Exporter:
    if name == "otlp":
        from gpuscope.exporters.otlp import OtlpExporter

        return OtlpExporter(config, resource())
    if name == "sdk":
        from gpuscope.exporters.sdk import SdkExporter

        return SdkExporter(bridge)
    from gpuscope.exporters.file import FileExporter

    return FileExporter(config, resource())


class ActiveExporters:
    """The exporters of one period of recording, and the account of what they take."""

    def __init__(self, config: Config, ledger: Ledger, warnings: WarnOnce, *, extra: tuple[Exporter, ...] = ()) -> None:
        self.names: tuple[str, ...] = ()
        self._config = config
        self._ledger = ledger
        self._warnings = warnings
        self._extra = extra
        self._seen: tuple[Any, Any] = None, None
        """The bridge, and the application's provider, for which the exporters were chosen."""
        self._resource: dict[str, Any] = {}
        self._made: dict[str, Exporter] = {}
        self._failed: set[str] = set()
        self._active: list[Exporter] = list(extra)

    def resource(self) -> dict[str, Any]:
        """Return the attributes of the process, the same for all that is sent."""
        if not self._resource:
            from gpuscope.exporters._encoding.resource import resource_attributes

            self._resource = resource_attributes()
        return self._resource

    def refresh(self, bridge: Any) -> None:
        """Choose the exporters anew: `auto` follows the application's provider, which may come at any time."""
        provider = None if bridge is None else bridge.provider
        if self._active and bridge is self._seen[0] and provider is self._seen[1]:
            return
        names, self._seen = self._wanted(bridge), (bridge, provider)
        if bridge is not None:
            bridge.sdk = "sdk" in names
        if names == self.names and self._active:
            return
        self.names = names
        found = (self._exporter(name, bridge) for name in names)
        self._active = [*self._extra, *(exporter for exporter in found if exporter is not None)]

    def _wanted(self, bridge: Any) -> tuple[str, ...]:
        config, names = self._config, self._config.exporters
        if "auto" in names:
            provided = bridge is not None and bridge.provider is not None
            automatic = "none" if config.traces_exporter.strip().lower() == "none" else "sdk" if provided else "otlp"
            names = tuple(dict.fromkeys(automatic if name == "auto" else name for name in names))
        off = {"none"} | ({"otlp", "sdk"} if config.sdk_disabled else set())
        return tuple(name for name in names if name not in off)

    def _exporter(self, name: str, bridge: Any) -> Exporter | None:
        if name not in self._made and name not in self._failed:
            try:
                self._made[name] = _make(name, self._config, bridge, self.resource)
            except Exception as error:  # Not tried again; with no other, `exporter_set_up` counts.
                self._failed.add(name)
                self._warnings.warn(name, "the exporter %r can't be set up: %r.", name, error)
        return self._made.get(name)

    def export(self, batch: StageBatch, breathe: Callable[[], None]) -> None:
        """Hand a batch of sampled stages to each exporter, breathing after every piece of work."""
        stages = len(batch.site)
        if not self._active:
            reason = "no_exporter" if not self._failed else "exporter_set_up"
            (self._ledger.lose if self._failed else self._ledger.drop)(reason, stages)
            return
        delivery = self._ledger.deliver(stages, len(self._active))
        for exporter in self._active:
            try:
                for _ in exporter.export(batch, delivery) or ():
                    breathe()
            except Exception as error:  # An exporter's failure is its own; the others still get the batch.
                delivery.settle(0, {"exporter_error": stages})
                self._warnings.warn(exporter.name, "the exporter %r failed: %r.", exporter.name, error)
            breathe()

    def flush(self, remaining_s: Callable[[], float]) -> bool:
        """Flush each exporter that was ever made, within the time that remains."""
        results = [self._try(exporter, "flush", remaining_s()) for exporter in self._all()]
        return all(results)

    def account(self, snapshot: Snapshot) -> None:
        """Give the account of stages to the exporters that keep one."""
        for exporter in self._all():
            if hasattr(exporter, "account"):
                self._try(exporter, "account", snapshot)

    def shutdown(self, remaining_s: Callable[[], float]) -> None:
        """Shut each exporter down, within the time that remains."""
        for exporter in self._all():
            self._try(exporter, "shutdown", remaining_s())

    def _all(self) -> list[Exporter]:
        return [*self._extra, *self._made.values()]

    def _try(self, exporter: Exporter, action: str, argument: Any) -> bool:
        try:
            return getattr(exporter, action)(argument) is not False
        except Exception as error:  # As in `export`.
            self._warnings.warn(f"{exporter.name}.{action}", "`%s` of %r failed: %r.", action, exporter.name, error)
            return False
