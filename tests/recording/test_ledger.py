"""The account by itself: where each stage is, and what became of it."""

from __future__ import annotations

import pytest

from gpuscope._recording.ledger import Ledger


@pytest.fixture
def ledger():
    """An account of nothing yet."""
    return Ledger()


def fates(ledger):
    """Return (recorded, exported, pending, dropped, lost), which add up; without reasons of which there are none."""
    s = ledger.statistics()
    dropped, lost = ({reason: count for reason, count in each.items() if count} for each in (s.dropped, s.lost))
    assert s.recorded == s.exported + s.pending + sum(dropped.values()) + sum(lost.values())
    return s.recorded, s.exported, s.pending, dropped, lost


def take(ledger, stages):
    """Have the collector take so many stages."""
    ledger.take(lambda: [None] * stages)


def test_what_is_with_the_collector_or_with_exporters_is_pending(ledger):
    """It is recorded once, wherever it is."""
    take(ledger, 5)
    assert fates(ledger) == (5, 0, 5, {}, {})
    delivery = ledger.deliver(3, 1)
    assert fates(ledger) == (5, 0, 5, {}, {})
    delivery.settle(3)
    ledger.drop("unsampled", 2)
    assert fates(ledger) == (5, 3, 0, {"unsampled": 2}, {})


def test_a_stage_that_never_reached_the_queue_is_lost_by_its_reason(ledger):
    """One at a time; those that will not come later are dropped."""
    for _ in range(2):
        ledger.fail("stage_error")
    ledger.refuse("late", 3)
    assert fates(ledger) == (5, 0, 0, {"late": 3}, {"stage_error": 2})


def test_the_end_counts_all_that_is_on_its_way_as_lost(ledger):
    """With the collector and with exporters; what is reported afterwards changes nothing."""
    take(ledger, 7)
    delivery = ledger.deliver(4, 1)
    ledger.close("shutdown")
    assert fates(ledger) == (7, 0, 0, {}, {"shutdown": 7})
    delivery.settle(4)
    ledger.lose("refused", 1)
    ledger.drop("unsampled", 1)
    ledger.deliver(1, 1)
    ledger.close("shutdown")
    assert fates(ledger) == (7, 0, 0, {}, {"shutdown": 7})


@pytest.mark.parametrize(
    ("exported", "reasons", "lost"),
    [
        (4, {"refused": 6}, {"refused": 6}),
        (4, {"refused": 2, "too_large": 3}, {"too_large": 3, "refused": 2, "unaccounted": 1}),
        (8, {"refused": 5, "too_large": 1}, {"refused": 2}),
        (10, {"refused": 5}, {}),
    ],
)
def test_what_an_exporter_has_lost_is_as_much_as_it_has_not_exported(ledger, exported, reasons, lost):
    """Whatever its reasons add up to; the most frequent comes first."""
    take(ledger, 10)
    ledger.deliver(10, 1).settle(exported, reasons)
    assert fates(ledger) == (10, exported, 0, {}, lost)


def test_stages_without_gpu_times_and_those_in_graphs_are_counted_beside_their_fate(ledger):
    """By reason, and not as recorded."""
    ledger.untimed("captured", 2)
    ledger.untimed("captured")
    ledger.graph_stage("timed", 4)
    found = ledger.statistics()
    assert (found.recorded, found.untimed, found.graph_stages) == (0, {"captured": 3}, {"timed": 4})
