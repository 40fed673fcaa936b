"""
What a person at a terminal is told: where stages go when recording starts, and what came of them when the program ends.

Others are told by the log. Nothing is said in workers, in children and under pytest; nothing here raises, and nothing
goes to standard output.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from gpuscope._data.native import native
from gpuscope._log import SENDER, WarnOnce, inform, is_silenced, logger, say, shows_information
from gpuscope._recording.state import state
from gpuscope._settings.enabling import places_of
from gpuscope._settings.environment import is_of_multiprocessing, wants_native
from gpuscope._settings.names import listed
from gpuscope._settings.shown import shown_path

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gpuscope._collecting.engine import Engine
    from gpuscope._data.statistics import Statistics
    from gpuscope._settings.config import Config

_warnings = WarnOnce()
_MOST_LINES = 60
"""Of the table: a screen."""
_NOTHING = (
    'no stage was recorded in this process. Put `@gpuscope.stage("name")` on functions that it calls, or name them: '
    "GPUSCOPE_STAGES=name=module:function."
)


def where(config: Config) -> None:
    """Say where stages will go; `enable` with other settings says so again. Warn of a file that nobody writes."""
    if config.file != type(config).file and "file" not in config.exporters and not state.said_unwritten:
        state.said_unwritten = True
        logger.warning(
            "nothing is written to %s, because the exporter is %s. Set GPUSCOPE_EXPORTER=file, or `exporters='file'`.",
            shown_path(config.file),
            ",".join(config.exporters),
        )
    _in_vain(config)
    text = "recording, for a report." if state.makes_report else f"recording; stages go {places_of(config)}."
    if native is None and wants_native():
        text += " Each costs three times as much as it could: the parts in C were not built (`gpuscope doctor`)."
    if text != state.told and _is_watched(quiet=config.quiet) and not shows_information():
        state.told = text
        say(text)


def _in_vain(config: Config) -> None:
    """Warn of settings that change nothing beside the others, each once."""
    from gpuscope._settings.flight import limits

    stall_s = limits(config.stall).seconds if config.stall else 0.0
    if config.flight_slow_s and not config.flight:
        _warnings.warn("slow", "GPUSCOPE_FLIGHT_SLOW has no effect: GPUSCOPE_FLIGHT names no file to copy.")
    if stall_s > config.event_deadline_s:
        _warnings.warn(
            "stall",
            "GPUSCOPE_STALL (%g s) is longer than GPUSCOPE_EVENT_DEADLINE (%g s), after which nobody asks any more "
            "whether GPU work is done: a GPU that hangs is never said to stall. Raise the second, or lower the first.",
            stall_s,
            config.event_deadline_s,
        )


def _unread_headers(config: Config) -> None:
    """Warn of settings about headers in a program that has taken none in."""
    if state.reads_headers or _is_apart() or state.has_launched:
        return
    from gpuscope._settings.keeping.rules import rules_of

    rules = rules_of(config.keep)
    asks = {
        "GPUSCOPE_TRACE_HEADER": config.trace_header,
        "`header=` of GPUSCOPE_KEEP": rules is not None and rules.header,
    }
    for name in [name for name, wanted in asks.items() if wanted]:
        _warnings.warn(
            name,
            "%s had no effect: no request's headers were seen. GPUSCOPE_FRAMEWORKS=asgi sees them, or "
            "`gpuscope.extract(headers)` in the program.",
            name,
        )


def without_the_switch(variables: Iterable[str]) -> None:
    """Warn of variables of ours that are set while nothing says whether to record."""
    from dataclasses import fields  # As well as what follows, for those whom it concerns.

    from gpuscope._settings.config import Config

    known = {variable for setting in fields(Config) for variable in setting.metadata["variables"]}
    names = sorted(known & {*variables})
    if names and state.audience is not False:
        logger.warning(
            "%s %s set and GPUSCOPE is not, so nothing is recorded. Set GPUSCOPE=1; or GPUSCOPE=idle, if the program "
            "calls `gpuscope.enable()`.",
            listed(names),
            "is" if len(names) == 1 else "are",
        )


def outcome(engine: Engine) -> None:
    """Say at the end of the program what came of this period of recording, the last one."""
    if state.said_outcome:
        return
    state.said_outcome = True
    try:
        account = engine.statistics()
        if not account.recorded:
            if _is_a_mistake(engine):
                logger.warning(_NOTHING)
            return
        _unread_headers(engine.config)
        places = engine.collector.active_exporters.places()
        recorded = f"{account.recorded:,} stage{'' if account.recorded == 1 else 's'} recorded"
        text = f"{recorded}, {_sent(account, places)}."
        if state.makes_report:
            text = f"{recorded}."
        elif "file" in account.exporters and account.exported:
            text += f" `gpuscope report {places[account.exporters.index('file')]}` shows more."
        inform(text)
        if _is_watched(quiet=engine.config.quiet) and not hasattr(sys, "ps1"):
            _show(engine, text)
    except Exception as error:  # Whatever it is: the program ends as it would.
        logger.debug("the last words failed: %s", type(error).__name__)


def _show(engine: Engine, text: str) -> None:
    lines = str(engine.summary.summary(engine.statistics().looks)).split("\n")
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"... {len(lines) - _MOST_LINES} more lines; `print(gpuscope.summary())` has them."]
    # One text, so that processes on one terminal do not come between each other's lines.
    last = "" if shows_information() else f"\n{SENDER}{text}"
    say("stages of this process\n" + "\n".join(lines) + last, every_line=False)


def _sent(account: Statistics, places: tuple[str, ...]) -> str:
    if not places:
        return "exported nowhere"
    from gpuscope._data.statistics import NOT_KEPT, explained  # Of a module that is there when something was recorded.

    if not account.exported and {*account.dropped, *account.lost} == {NOT_KEPT}:
        return f"none exported to {' and '.join(places)}: keep has kept none of {account.dropped[NOT_KEPT]:,}"
    others = explained({**account.dropped, **account.lost})
    sent = f"{account.exported:,} exported to {' and '.join(places)}"
    return f"{sent}; not exported: {others}" if others else sent


def _is_a_mistake(engine: Engine) -> bool:
    """Tell whether a period without a stage is worth a sentence: not in a launcher, and not beside a traceback."""
    nothing_to_blame = state.has_launched or state.has_recorded or hasattr(sys, "last_type") or hasattr(sys, "ps1")
    return not (nothing_to_blame or _is_apart() or engine.statistics().elided or engine.config.quiet)


def _is_watched(*, quiet: bool) -> bool:
    """Tell whether somebody sits at the terminal of this program, and wants to be told."""
    if quiet or is_silenced() or _is_apart():
        return False
    try:
        return state.audience is True or sys.stderr.isatty()
    except Exception:  # It may be closed, or an object of the program's.
        return False


def _is_apart() -> bool:
    """Tell whether this is a command of ours, a worker, a child, or a test run."""
    process = sys.modules.get("multiprocessing.process")
    is_child = (
        state.is_fork or is_of_multiprocessing() or (process is not None and process.parent_process() is not None)
    )
    is_worker = state.environ.get("LOCAL_RANK", "0") != "0"
    return state.audience is False or is_child or is_worker or "_pytest.config" in sys.modules
