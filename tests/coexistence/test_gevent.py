"""gevent, which replaces threads by greenlets: unsupported, detected, and said."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("gevent")

PROGRAM = """
import sys
if "patch" in sys.argv:
    from gevent import monkey

    monkey.patch_all()
import gevent
import json
import gpuscope
from gpuscope.testing import capture


def request(number):
    with gpuscope.stage(f"request {number}"):
        gevent.sleep(0.01)
        with gpuscope.stage(f"infer {number}"):
            gevent.sleep(0.01)


with capture() as spans:
    gevent.joinall([gevent.spawn(request, number) for number in range(3)], raise_error=True)
names = {span.span_id: span.name for span in spans}
print(json.dumps({span.name: names.get(span.parent_id) for span in spans}))
"""


@pytest.fixture
def run(run_python):
    """Return a function that runs the program; it returns each stage's parent and what was logged."""

    def run(*arguments):
        done = run_python(PROGRAM, *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    return run


def test_a_patched_program_is_told_once(run):
    """
    Where gevent has patched `threading` one warning says that this is unsupported.

    The program runs on, and stages of greenlets that take turns have their own parents.
    """
    parents, log = run("patch")
    assert parents == {
        f"{kind} {n}": f"request {n}" if kind == "infer" else None for n in range(3) for kind in ("request", "infer")
    }
    assert log.count("gevent") == 1
    assert log.startswith("gpuscope: gevent has patched `threading`, which is unsupported")
    assert len(log.splitlines()) == 1


def test_gevent_without_patching_is_no_reason_to_warn(run):
    """A program that only uses gevent, with threads as they are, gets its stages and no warning."""
    parents, log = run()
    assert parents["infer 1"] == "request 1"
    assert log == ""
