"""What stands in for a device's functions stays, whatever the device becomes, on whatever thread and at any moment."""

from __future__ import annotations

import sys
import threading

import pytest

from gpuscope._cuda.entry_points import EntryPoints


class Device(EntryPoints):
    """A device that may become another."""

    def __init__(self):
        super().__init__()
        self.become("early")

    def become(self, name):
        """Have other functions from now on."""
        self._become(f"begin {name}", f"end {name}")


@pytest.fixture
def device():
    """A device with functions of its own."""
    return Device()


def test_what_stands_in_stays(device):
    """The device changes its own functions below it, and they are called once it is taken out."""
    device.swap("noted begin", "noted end")
    device.become("late")
    assert (device.begin, device.end) == ("noted begin", "noted end")
    assert device.usual == ("begin late", "end late")
    device.swap()
    assert (device.begin, device.end) == ("begin late", "end late")


def test_a_swap_between_the_question_and_the_answer_is_not_lost(device):
    """A thread that is interrupted as it changes the device's functions does not take out what came meanwhile."""
    swapping, lines = threading.Thread(target=device.swap, args=("noted begin", "noted end")), []

    def interrupt(frame, event, _):
        if frame.f_code is not EntryPoints._become.__code__:
            return None
        if event == "line" and device.usual == ("begin late", "end late"):
            lines.append(frame.f_lineno)
            if len(lines) == 2:  # It has asked what stands in, and is about to set its own.
                swapping.start()
                swapping.join(0.1)  # It waits for the lock.
        return interrupt

    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        device.become("late")
    finally:
        sys.settrace(before)
    swapping.join()
    assert len(lines) >= 2
    assert (device.begin, device.end) == ("noted begin", "noted end")
