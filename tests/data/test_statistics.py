"""The account as text: what a person reads in a log."""

from __future__ import annotations

from gpuscope._data.statistics import Statistics

NOTHING = Statistics(0, 0, 0, {}, {}, {}, None, ())


def test_an_account_of_nothing():
    """Figures that are always there."""
    assert str(NOTHING) == "recorded 0, exported 0, pending 0, dropped 0, lost 0, untimed 0"


def test_what_was_lost_is_told_with_its_reasons():
    """Sums, and in brackets what they are made of, in alphabetical order; a GPU has its uncertainty."""
    account = Statistics(
        recorded=20,
        exported=9,
        pending=1,
        dropped={"unsampled": 2, "queue_full": 1},
        lost={"shutdown": 7},
        untimed={"given_up": 3, "captured": 1},
        clock_uncertainty_ns=3_550,
        exporters=("otlp",),
        graph_stages={"timed": 4, "left": 1},
        elided={"a.py:1 f": 2, "b.py:2 g": 1},
    )
    assert str(account) == (
        "recorded 20, exported 9, pending 1, dropped 3 (queue_full 1, unsampled 2), lost 7 (shutdown 7), "
        "untimed 4 (captured 1, given_up 3), in graphs left 1, timed 4, compiled away at 2 places, "
        "GPU clock within 3.5 µs"
    )
    assert account.as_dict()["lost"] == {"shutdown": 7}
