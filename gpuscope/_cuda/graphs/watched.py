"""
`Watched`: what is known of one of PyTorch's graphs, and the lock that all use of it is under.

CUDA's graph objects "are not internally synchronized": a launch of an executable graph while another thread exchanges
the events of its nodes may never come back from the driver. So whoever launches, instantiates, resets, prints or
exchanges holds the lock, also while nothing is recorded. Calls no driver.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpuscope._cuda.graphs.capture import Capture
    from gpuscope._cuda.graphs.events import GraphStages
    from gpuscope._data.interfaces import Captures


class Watched:
    """
    One of PyTorch's graphs.

    Args:
        process: stands for the process that the graph belongs to.
        keeps: whether PyTorch keeps the graph that was captured, without which its nodes have no addresses.
        ours: whether it does so because we said so.

    """

    __slots__ = (
        "_finalizer",
        "capture",
        "captures",
        "ident",
        "keeps",
        "lock",
        "ours",
        "process",
        "stages",
        "was_timed",
    )

    def __init__(self, process: object, *, keeps: bool, ours: bool) -> None:
        self.lock = threading.RLock()
        """
        Of the graph, not of its stages: a thread that waits for it while another resets the graph and captures it anew
        finds other stages afterwards. An interrupt lets go of it.
        """
        self.process = process
        self.keeps = keeps
        self.ours = ours
        self.captures: Captures | None = None
        """What was told of the graph's capture, as long as that lasts."""
        self.ident = 0
        self.capture: Capture | None = None
        self.stages: GraphStages | None = None
        """Read under the lock."""
        self.was_timed = False
        """Whether there ever were stages inside: from then on the lock is used, also while there are none."""
        self._finalizer: weakref.finalize[..., object] | None = None

    def keep(self, graph: object, stages: GraphStages) -> None:
        """Take the stages of a capture that is over, until the graph is reset, captured anew or gone."""
        with self.lock:
            self.drop()
            self.was_timed = True
            self._finalizer = weakref.finalize(graph, stages.retire)
            self._finalizer.atexit = False
            self.stages = stages

    def drop(self) -> None:
        """Let go of the stages. The caller holds the lock."""
        self.stages, finalizer, self._finalizer = None, self._finalizer, None
        if finalizer is not None:
            finalizer()
