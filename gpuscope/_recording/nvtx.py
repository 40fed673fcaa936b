"""
NVTX ranges in the domain `gpuscope`, for Nsight Systems, Nsight Compute and DCGM.

The only door to the `nvtx` package. It does not keep open ranges: whoever opened one closes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpuscope._data.record import Site

DOMAIN = "gpuscope"
_PUSHED = object()


class Nvtx:
    """Opens and closes ranges in one NVTX domain, with attributes that are prepared once per name of a stage."""

    def __init__(self, domain: Any) -> None:  # The package has no types.
        self._prepare = domain.get_event_attributes
        self._push, self._pop = domain.push_range, domain.pop_range
        self._start, self._end = domain.start_range, domain.end_range

    def begin(self, site: Site, suspends: int) -> object:
        """
        Open a range and return what `end` takes.

        Pushed ranges nest by thread, so the ranges of interleaved tasks would close each other. What may be suspended
        (a coroutine, a generator) therefore gets a start/end range, which belongs to the process.
        """
        attributes = site.nvtx
        if attributes is None:
            attributes = site.nvtx = self._prepare(message=site.name)
        opened: list[object] = []
        try:
            # Opened and noted in one step, so that no interrupt finds a range that is open and unknown.
            opened.extend(map(self._start if suspends else self._push, (attributes,)))
            return opened[0] if suspends else _PUSHED
        except BaseException:  # An interrupt, which goes on.
            if opened:
                self.end(opened[0] if suspends else _PUSHED)
            raise

    def end(self, opened: object) -> None:
        """Close a range."""
        if opened is _PUSHED:
            self._pop()
        else:
            self._end(opened)


def tool_is_listening(domain: object) -> bool:
    """Tell whether a tool is attached to the process; without one the package hands out a dummy domain."""
    return type(domain).__name__ != "DummyDomain"


def open_nvtx() -> Nvtx | None:
    """Return the door, or None if the package is missing or no tool listens (a tool attaches at start or never)."""
    try:
        import nvtx
    except ImportError:
        return None
    domain = nvtx.get_domain(DOMAIN)
    return Nvtx(domain) if tool_is_listening(domain) else None
