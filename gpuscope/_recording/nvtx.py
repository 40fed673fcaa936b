"""
NVTX ranges in the domain `gpuscope`, for Nsight Systems, Nsight Compute and DCGM.

The only door to the `nvtx` package. Keeps no state of its own: a range that was opened is closed by whoever opened it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpuscope._data.record import Site

DOMAIN = "gpuscope"
_PUSHED = object()


class Nvtx:
    """Opens and closes ranges in one NVTX domain, with attributes that are prepared once a stage."""

    def __init__(self, domain: Any) -> None:
        self._prepare = domain.get_event_attributes
        self._push, self._pop = domain.push_range, domain.pop_range
        self._start, self._end = domain.start_range, domain.end_range

    def begin(self, site: Site, suspends: int) -> Any:
        """
        Open a range and return what `end` takes.

        Pushed ranges nest by thread, so what may be suspended (a coroutine, a generator) gets a start/end range,
        which belongs to the process: otherwise the ranges of interleaved tasks would close each other.
        """
        attributes = site.nvtx
        if attributes is None:
            attributes = site.nvtx = self._prepare(message=site.name)
        if suspends:
            return self._start(attributes)
        self._push(attributes)
        return _PUSHED

    def end(self, opened: Any) -> None:
        """Close a range."""
        if opened is _PUSHED:
            self._pop()
        else:
            self._end(opened)


def tool_is_listening(domain: Any) -> bool:
    """Tell whether a tool is attached to the process: without one the package hands out a dummy domain."""
    return type(domain).__name__ != "DummyDomain"


def open_nvtx() -> Nvtx | None:
    """Return the door, or None where the package is missing or no tool listens (a tool attaches at start or never)."""
    try:
        import nvtx
    except ImportError:
        return None
    domain = nvtx.get_domain(DOMAIN)
    return Nvtx(domain) if tool_is_listening(domain) else None
