"""Tools that watch Python itself: coverage.py, `sys.settrace`, `sys.setprofile` and `sys.monitoring`."""

from __future__ import annotations

import sys

import pytest

LINES = """
import gpuscope


@gpuscope.stage("plain")
def plain(wanted):
    if wanted:
        return 1
    return 2


@gpuscope.stage("generator")
def generator():
    for number in range(3):
        yield number


@gpuscope.stage("fails")
def fails():
    raise ValueError


def work():
    with gpuscope.stage("block"):
        total = plain(True) + sum(generator())
    try:
        fails()
    except ValueError:
        total += 1
    return total
"""
WATCHED = """
import gpuscope, json, sys
from program_under_watch import work

seen = []


def note(kind, code, line=None):
    if code.co_filename.endswith("program_under_watch.py"):
        seen.append([kind, code.co_name, line])


def trace(frame, event, argument):
    note(event, frame.f_code, frame.f_lineno)
    return trace


def monitor():
    monitoring, tool = sys.monitoring, sys.monitoring.COVERAGE_ID
    events = monitoring.events
    monitoring.use_tool_id(tool, "test")
    monitoring.register_callback(tool, events.LINE, lambda code, line: note("line", code, line))
    monitoring.register_callback(tool, events.PY_START, lambda code, offset: note("start", code))
    monitoring.register_callback(tool, events.PY_UNWIND, lambda code, offset, error: note("unwind", code))
    monitoring.register_callback(tool, events.PY_YIELD, lambda code, offset, value: note("yield", code))
    monitoring.set_events(tool, events.LINE | events.PY_START | events.PY_UNWIND | events.PY_YIELD)
    return lambda: monitoring.set_events(tool, 0)


def begin(tool):
    if tool == "monitoring":
        return monitor()
    set_watcher = getattr(sys, tool)
    set_watcher(trace)
    return lambda: set_watcher(None)


end = begin(sys.argv[1])
result = work()
end()
assert gpuscope.flush(10)
print(json.dumps([result, seen, gpuscope.statistics().exported]))
"""
STAGES = 1 + 1 + 4 + 1
"""A block, a call, three chunks of a generator and its end, and a call that raises."""


@pytest.fixture(autouse=True)
def program_under_watch(tmp_path):
    """The program, beside the one that watches it."""
    (tmp_path / "program_under_watch.py").write_text(LINES)


@pytest.mark.parametrize("tool", ["settrace", "setprofile", "monitoring"])
def test_a_watcher_sees_the_program_as_it_is(ask, tool):
    """Lines, calls, yields and exceptions of staged code are those of code without stages, and all stages recorded."""
    if tool == "monitoring" and sys.version_info < (3, 12):
        pytest.skip("`sys.monitoring` came with Python 3.12")
    *plain, none = ask(WATCHED, tool)
    *staged, exported = ask(WATCHED, tool, GPUSCOPE="1", GPUSCOPE_EXPORTER="file")
    assert plain[1]
    assert staged == plain
    assert (none, exported) == (0, STAGES)


COVERED = """
import coverage, json, sys

watcher = coverage.Coverage(data_file=None, branch=True, include=["*/program_under_watch.py"], config_file=False)
watcher.start()
from program_under_watch import work

result = work()
watcher.stop()
watcher.json_report(outfile="report.json")
with open("report.json") as report:
    (found,) = json.load(report)["files"].values()
print(json.dumps([result, found]))
"""


def test_coverage_reports_the_same_lines(ask):
    """coverage.py finds the same lines and branches run and missed, with recording on and off."""
    pytest.importorskip("coverage")
    result, plain = ask(COVERED)
    assert plain["missing_lines"]
    assert plain["missing_branches"]
    assert [result, plain] == ask(COVERED, GPUSCOPE="1", GPUSCOPE_EXPORTER="file")
