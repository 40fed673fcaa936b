"""See where the time of a GPU inference goes, stage by stage, in production, without slowing it down."""

from typing import TYPE_CHECKING

from gpuscope._measure import measure, warm_up
from gpuscope._profile import profile
from gpuscope._recording.current_stage import bind
from gpuscope._recording.stage import stage
from gpuscope._runtime import disable, enable, flush, is_enabled, set_up, shutdown, statistics, summary
from gpuscope._version import __version__

if TYPE_CHECKING:
    from gpuscope import analysis as analysis
    from gpuscope import exporters as exporters
    from gpuscope import instrument as instrument
    from gpuscope import pinned as pinned
    from gpuscope import testing as testing
    from gpuscope._host.syncs import watch_syncs
    from gpuscope._otel.propagation import extract, inject
    from gpuscope._overlap.double_buffer import DoubleBuffer
    from gpuscope._overlap.overlap import overlap
    from gpuscope._recording.batches.generation import Generation
    from gpuscope._recording.batches.token import Token, here
    from gpuscope.pinned import PinnedBuffer, PinnedPool, PoolExhaustedError

__all__ = [
    "DoubleBuffer",
    "Generation",
    "PinnedBuffer",
    "PinnedPool",
    "PoolExhaustedError",
    "Token",
    "__version__",
    "bind",
    "disable",
    "enable",
    "extract",
    "flush",
    "here",
    "inject",
    "is_enabled",
    "measure",
    "overlap",
    "profile",
    "shutdown",
    "stage",
    "statistics",
    "summary",
    "warm_up",
    "watch_syncs",
]

_LAZY = {
    "DoubleBuffer": "_overlap.double_buffer",
    "Generation": "_recording.batches.generation",
    "PinnedBuffer": "pinned",
    "PinnedPool": "pinned",
    "PoolExhaustedError": "pinned",
    "Token": "_recording.batches.token",
    "extract": "_otel.propagation",
    "here": "_recording.batches.token",
    "inject": "_otel.propagation",
    "overlap": "_overlap.overlap",
    "watch_syncs": "_host.syncs",
}
"""Names whose modules import torch or OpenTelemetry, or that few programs use; imported when somebody asks for them."""

_SUBMODULES = frozenset(("analysis", "exporters", "instrument", "integrations", "pinned", "testing"))
"""Public folders and files; `gpuscope.testing.capture()` needs no import of its own."""

if not TYPE_CHECKING:  # With this, type checkers would take any name for one of ours.

    def __getattr__(name: str) -> object:
        if name not in _LAZY and name not in _SUBMODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        if name in _SUBMODULES:
            return import_module(f"{__name__}.{name}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})


if set_up():
    from gpuscope.instrument._instrumentation import follow_environment

    follow_environment()
    del follow_environment
del set_up, TYPE_CHECKING
