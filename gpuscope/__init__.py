"""See where the time of a GPU inference goes, stage by stage, in production, without slowing it down."""

from gpuscope._measure import measure, warm_up
from gpuscope._profile import profile
from gpuscope._runtime import disable, enable, flush, is_enabled, set_up, shutdown, statistics, summary
from gpuscope._stage import stage
from gpuscope._version import __version__

__all__ = [
    "__version__",
    "disable",
    "enable",
    "flush",
    "is_enabled",
    "measure",
    "profile",
    "shutdown",
    "stage",
    "statistics",
    "summary",
    "warm_up",
]

set_up()
del set_up
