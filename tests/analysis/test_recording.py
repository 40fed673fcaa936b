"""Which rows of a recording are what."""

from __future__ import annotations

from gpuscope._data.batch import RowFlag

from .recordings import Stage, recording

WARMUP = int(RowFlag.WARMUP)


class TestWarmup:
    """The three questions about warm-up, each with a mask of its own."""

    def test_a_warmup_call_inside_a_request(self):
        """It spoils its request for a verdict, and not for the figures."""
        inside = [Stage("decode", 0, 10, flags=WARMUP), Stage("decode", 20, 30)]
        found = recording(Stage("request", 0, 100, inside=inside))
        assert found.warmup.tolist() == [False, True, False]
        assert found.in_warmup_request.tolist() == [False, True, False]
        assert found.around_warmup.tolist() == [True, True, False]

    def test_a_request_that_is_warmup(self):
        """It spoils the calls inside for the figures, and not for a verdict on them."""
        found = recording(Stage("request", 0, 100, inside=[Stage("decode", 0, 10)], flags=WARMUP))
        assert found.warmup.tolist() == [True, False]
        assert found.in_warmup_request.tolist() == [True, True]
        assert found.around_warmup.tolist() == [True, False]


def test_masks_are_computed_once():
    """Whoever asks for a mask gets the same array."""
    found = recording(Stage("request", 0, 100))
    for name in ("in_graph", "leaf", "measured", "warmup", "in_warmup_request", "around_warmup"):
        assert getattr(found, name) is getattr(found, name)
