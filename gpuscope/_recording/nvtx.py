"""
NVTX ranges in the domain `gpuscope`, for Nsight Systems, Nsight Compute and DCGM.

The only door to the `nvtx` package. It does not keep open ranges: whoever opened one closes it. An open range is a list
with the arguments that close it, after a None. C opens a range and notes it in one step, and takes it out and closes it
in one step (`map`, `iter`), so that no interrupt can come between.
"""

from __future__ import annotations

from collections import deque
from itertools import starmap
from operator import itemgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpuscope._data.record import Site

DOMAIN = "gpuscope"
_NOTHING: tuple[tuple[()], ...] = ((),)
_SECOND = itemgetter(1)


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
        opened: list[tuple[object, ...] | None] = [None]
        try:
            if suspends:
                opened.extend(zip(map(self._start, (attributes,))))
            else:
                opened.extend(map(_SECOND, zip(map(self._push, (attributes,)), _NOTHING)))  # noqa: B905
            return opened
        except BaseException:  # An interrupt, which goes on.
            self.end(opened)
            raise

    def end(self, opened: object) -> None:
        """Close a range, unless it is closed already."""
        if isinstance(opened, list) and len(opened) > 1:
            close = self._end if opened[1] else self._pop
            deque(starmap(close, iter(opened.pop, None)), 0)


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
