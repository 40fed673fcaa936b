"""A batch split by stage and kind of request: what each group holds."""

from __future__ import annotations

import numpy as np
import pytest

from gpuscope._collecting.aggregation.groups import DELAY, GPU, HOST, split
from gpuscope._data.batch import RowFlag

from .test_summary import batch_of, row

REPLAYED, WARM = int(RowFlag.IN_GRAPH), int(RowFlag.WARMUP)


def groups_of(*rows):
    """The groups of a batch, by stage, root and whether they are warm-up."""
    batch = batch_of(rows)
    names = [site.name for site in batch.sites]
    return {(names[batch.site[group.row]], names[batch.root[group.row]], group.warmup): group for group in split(batch)}


def test_calls_of_a_stage_in_a_kind_of_request_are_one_group():
    """Warm-up calls are another one, and so is the same stage in another kind of request."""
    groups = groups_of(
        row("infer", "chat", host=1.0),
        row("chat", "chat", host=2.0, flags=WARM),
        row("infer", "embed", host=3.0),
        row("infer", "chat", host=4.0),
        row("embed", "embed", host=5.0),
        row("infer", "chat", host=6.0, flags=WARM),
    )
    assert {key: (group.block[HOST].tolist(), group.host_ms) for key, group in groups.items()} == {
        ("infer", "chat", False): ([1.0, 4.0], 5.0),
        ("infer", "chat", True): ([6.0], 6.0),
        ("chat", "chat", True): ([2.0], 2.0),
        ("infer", "embed", False): ([3.0], 3.0),
        ("embed", "embed", False): ([5.0], 5.0),
    }
    assert groups["infer", "chat", False].row == 0


def test_only_calls_of_roots_are_requests():
    """A call inside another call of its own stage is part of that one."""
    groups = groups_of(
        row("infer", "chat", host=1.0, span=2, parent=1),
        row("chat", "chat", host=4.0, span=1, parent=77),
        row("embed", "embed", host=3.0, span=12, parent=11),
        row("embed", "embed", host=5.0, span=11),
        row("embed", "embed", host=2.0, span=13),
        row("rank", "rank", host=6.0, span=21),
        row("rank", "rank", host=1.0, span=22),
    )
    assert {key[0]: (group.requests, group.requests_ms) for key, group in groups.items()} == {
        "infer": (0, 0.0),
        "chat": (1, 4.0),
        "embed": (2, 7.0),
        "rank": (2, 7.0),
    }


def test_what_a_call_does_not_have_is_not_a_number():
    """Sums leave it out: the GPU times of some calls, host times and launches of those inside replays."""
    (group,) = groups_of(
        row("s", "s", host=2.0, gpu=3.0, delay=0.5),
        row("s", "s", host=4.0),
        row("s", "s", host=8.0, gpu=1.0, delay=0.25, flags=REPLAYED),
    ).values()
    assert (group.host_ms, group.gpu_ms) == (6.0, 4.0)
    np.testing.assert_array_equal(group.block[HOST], [2.0, 4.0, np.nan])
    np.testing.assert_array_equal(group.block[GPU], [3.0, np.nan, 1.0])
    np.testing.assert_array_equal(group.block[DELAY], [0.5, np.nan, np.nan])


@pytest.mark.parametrize("flags", [0, WARM])
def test_one_row_is_one_group(flags):
    """The smallest batch there is."""
    (key,) = groups_of(row("s", "s", flags=flags))
    assert key == ("s", "s", bool(flags))
