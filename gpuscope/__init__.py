"""See where the time of a GPU inference goes, stage by stage, in production, without slowing it down."""

import typing

from gpuscope._measure import measure, warm_up
from gpuscope._profile import profile
from gpuscope._runtime import disable, enable, flush, is_enabled, set_up, shutdown, statistics, summary
from gpuscope._stage import stage
from gpuscope._version import __version__

if typing.TYPE_CHECKING:
    from gpuscope._double_buffer import DoubleBuffer
    from gpuscope._overlap import overlap

__all__ = [
    "DoubleBuffer",
    "__version__",
    "disable",
    "enable",
    "flush",
    "is_enabled",
    "measure",
    "overlap",
    "profile",
    "shutdown",
    "stage",
    "statistics",
    "summary",
    "warm_up",
]

set_up()
del set_up

_HELPERS = {"DoubleBuffer": "_double_buffer", "overlap": "_overlap"}
"""Names and their modules, which import torch: that is not for `import gpuscope` to do."""


def __getattr__(name: str) -> typing.Any:
    if name not in _HELPERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    globals()[name] = found = getattr(import_module(f"{__name__}.{_HELPERS[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
