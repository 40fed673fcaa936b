"""Dumps: how often, how many, and what becomes of one that cannot be written."""

from __future__ import annotations

import os
import re
import stat

import pytest

from gpuscope._data import flight as layout
from gpuscope._flight import dumps as module
from gpuscope._flight.dumps import KEPT, Dumps, copies, copy, keep_of_the_dead


class Clock:
    """Seconds that pass when told to."""

    now_s = 1000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def dumps(tmp_path):
    """Dumps of some bytes."""
    return Dumps(tmp_path / "flight", bytearray(layout.RING_AT), Clock())


def test_a_dump_is_a_copy_beside_the_file(dumps, tmp_path):
    """Its name has the reason and the time, its head the reason; nobody else may read it."""
    path = dumps.make("slow")
    assert re.fullmatch(r"flight\.slow-\d{8}T\d{6}\.\d{3}Z", path.name)
    data = path.read_bytes()
    assert (len(data), data[layout.REASON_AT + 4 : layout.REASON_AT + 8]) == (layout.RING_AT, b"slow")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert dumps._mapped[layout.REASON_AT] == 0
    assert [path.name for path in tmp_path.iterdir()] == [path.name]


def test_a_dump_leaves_room_for_others(dumps, tmp_path, monkeypatch):
    """It takes no more than a part of what is free, as the file itself: PyTorch's loaders are there, too."""
    monkeypatch.setattr(module, "SHARE", 1 << 60)
    with pytest.raises(OSError, match="more than half of what is free"):
        dumps.make("slow")
    assert list(tmp_path.iterdir()) == []


def test_dumps_are_rare(dumps):
    """One in 10 s; and for one reason each waits twice as long as the one before, up to 10 min."""
    made = []
    for second in range(4000):
        dumps._clock.now_s = 1000.0 + second
        if dumps.make("slow") is not None:
            made.append(second)
    assert made == [0, 10, 30, 70, 150, 310, 630, 1230, 1830, 2430, 3030, 3630]


def test_another_reason_waits_less(dumps):
    """Only until the last dump, whatever it was for, is 10 s old."""
    assert dumps.make("slow")
    assert dumps.make("oom") is None
    dumps._clock.now_s += 10
    assert dumps.make("oom")
    dumps._clock.now_s += 10
    assert dumps.make("slow")


def test_a_signal_does_not_wait(dumps, tmp_path):
    """Somebody wants a dump now, whatever was made a moment ago; others wait after it, and 8 are kept."""
    assert dumps.make("slow")
    made = [dumps.make("signal") for _ in range(2 * KEPT)]
    assert None not in made
    assert dumps.make("oom") is None
    assert sorted(reason for _, reason, _ in copies(tmp_path / "flight")) == ["signal"] * (KEPT - 1) + ["slow"]


def test_few_are_kept_and_of_each_reason_some(dumps, tmp_path):
    """Of the reason with most of them the oldest goes, so that a rare one stays."""
    kept = dumps.make("oom")
    os.utime(kept, (1.0, 1.0))
    for number in range(3 * KEPT):
        dumps._clock.now_s += 1000
        path = dumps.make("slow")
        os.utime(path, (1e6 + number, 1e6 + number))
    found = copies(tmp_path / "flight")
    assert len(found) == KEPT
    assert found[0][2] == kept
    assert found[-1][2] == path


def test_what_has_another_name_is_not_counted(dumps, tmp_path):
    """Files of the user's beside it stay."""
    for name in ("flight.jsonl", "flight.slow-notes", "flight.bak", "flight2.slow-20260101T000000.000Z"):
        (tmp_path / name).touch()
    dumps.make("slow")
    assert len(copies(tmp_path / "flight")) == 1


def test_files_of_the_dead_are_bounded_too(tmp_path):
    """A program that dies again and again fills no disk."""
    for number in range(2 * KEPT):
        path = tmp_path / (f"flight.{number}" if number % 2 else "flight")
        path.touch()
        keep_of_the_dead(path, 1_700_000_000.0 + number % 3)
    assert [reason for _, reason, _ in copies(tmp_path / "flight")] == ["died"] * KEPT


def test_nothing_is_left_of_a_copy_that_failed(tmp_path):
    """Where the folder is gone, and where the disk is full."""
    with pytest.raises(OSError, match="No such file"):
        copy(bytes(10), tmp_path / "no folder" / "copy")
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            copy(bytes(3 << 20), tmp_path / "copy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
