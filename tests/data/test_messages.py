"""What is refused is described: no object of the program's is printed, because a tensor's text waits for the GPU."""

from __future__ import annotations

import pytest

import gpuscope
from gpuscope.integrations.modules import stage_children


class Unprintable:
    """Counts how often somebody makes a text of it, or asks how long it is."""

    def __init__(self):
        self.asked = []

    def __repr__(self):
        self.asked.append("repr")
        return "printed"

    def __str__(self):
        self.asked.append("str")
        return "printed"

    def __len__(self):
        self.asked.append("len")
        return 3

    def __format__(self, spec):
        self.asked.append("format")
        return "printed"


@pytest.mark.parametrize(
    "use",
    [
        lambda thing: gpuscope.overlap([1], thing),
        lambda thing: gpuscope.overlap([1], print, post=thing),
        gpuscope.measure,
        gpuscope.warm_up,
        gpuscope.stage,
        lambda thing: gpuscope.stage("x", attributes=thing),
        lambda thing: gpuscope.stage("x", stream=thing),
        lambda thing: gpuscope.stage("x", warmup=thing),
        gpuscope.stage("x"),
        gpuscope.PinnedBuffer,
        lambda thing: gpuscope.PinnedPool(3, "float32", buffers=thing),
        lambda thing: gpuscope.PinnedPool(3, "float32", when_exhausted=thing),
        lambda thing: gpuscope.PinnedBuffer(3).to(thing),
        gpuscope.profile,
        gpuscope.instrument.instrument,
        lambda thing: gpuscope.instrument.instrument([thing]),
        stage_children,
    ],
)
def test_what_is_refused_is_not_printed(use):
    """The message names its type."""
    thing = Unprintable()
    with pytest.raises((TypeError, ValueError, AttributeError)) as raised:
        use(thing)
    assert "printed" not in str(raised.value)
    assert thing.asked == []
