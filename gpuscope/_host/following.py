"""
What follows the program in each pass of the collector: the parts of this room that a period of recording has.

Asks whether modules are there, and imports none of the program's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuscope._host.compiling import compilations
from gpuscope._host.memory import attach
from gpuscope._recording.state import state

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._recording.recorder import Recorder
    from gpuscope._settings.config import Config


def on_pass(config: Config, also: Callable[[Recorder], None] | None = None) -> Callable[[Recorder], None]:
    """
    Begin to follow the program, and return what the collector calls once per pass.

    Args:
        config: of the period of recording.
        also: what else is called then.

    """
    compilations.follow()
    state.measure = attach
    polls = [] if also is None else [also]
    if config.syncs:
        from gpuscope._host.sync_turns import SyncTurns

        polls.append(SyncTurns(config.syncs).poll)

    def poll(recorder: Recorder) -> None:
        for each in polls:
            each(recorder)

    return poll
