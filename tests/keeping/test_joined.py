"""Small batches that become few: the same rows, in whatever batches they came."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

import gpuscope
from gpuscope._collecting.keeping.held import rows_of
from gpuscope._collecting.keeping.joined import joined
from gpuscope._data.batch import StageBatch

from ..keeps_batches import KeepsBatches


@pytest.fixture
def batches(make_bench):
    """Batches of stages and of light spans, as exporters get them."""
    keeps = KeepsBatches()
    bench = make_bench(exporters=(keeps,))
    for number in range(6):
        with gpuscope.stage(f"request {number % 4}"):
            token = gpuscope.here()
            with gpuscope.stage("infer") as inner:
                inner.set_attribute("number", number)
                bench.clock.advance(0.01)
        with gpuscope.stage("predict", members=[token]):
            pass
        bench.collect()
    return keeps.batches


def rows(batch):
    """Return each row as what it says, without the tables that it refers to."""
    shared = None if batch.shared is None else batch.shared
    return [
        (
            batch.sites[batch.site[row]].name,
            batch.sites[batch.root[row]].name,
            batch.threads[batch.thread[row]].ident,
            *(getattr(batch, name)[row].item() for name in COLUMNS if getattr(batch, name) is not None),
            batch.details.get(row) and (batch.details[row].attributes, batch.details[row].linked is not None),
            batch.devices[batch.device[row].item()].uuid if batch.device[row] >= 0 else "",
            shared and tuple(getattr(shared, each.name)[row].item() for each in fields(shared)),
        )
        for row in range(len(batch.site))
    ]


COLUMNS = [
    each.name
    for each in fields(StageBatch)
    if str(each.type).startswith("NDArray") and each.name not in ("site", "root", "thread")
]


def test_the_rows_are_the_same(batches):
    """One batch of stages, and one of light spans."""
    together = list(joined(batches))
    assert [batch.shared is None for batch in together] == [True, False]
    for kind, batch in zip((True, False), together, strict=True):
        assert rows(batch) == [row for each in batches if (each.shared is None) == kind for row in rows(each)]
    assert len(together[0].sites) == len({site.name for site in together[0].sites}) == 6


def test_every_column_is_joined_or_looked_up(batches):
    """A column that is added to batches has to be joined, too."""
    (stages, _) = joined(batches)
    for each in fields(StageBatch):
        value = getattr(stages, each.name)
        if isinstance(value, np.ndarray):
            assert len(value) == len(stages.site), each.name


def test_parts_that_were_taken_out_are_joined(batches):
    """Rows of light spans, too."""
    light = [each for each in batches if each.shared is not None]
    (one,) = joined([rows_of(each, np.ones(1, np.bool_)) for each in light])
    (less,) = joined([rows_of(one, np.arange(6) % 2 == 0)])
    assert rows(less) == rows(one)[::2]


def test_batches_stay_small(batches):
    """Encoding keeps the GIL for as long as a batch is large."""
    stages = [each for each in batches if each.shared is None]
    found = list(joined(stages * 1500))
    assert sum(len(batch.site) for batch in found) == 1500 * sum(len(each.site) for each in stages)
    assert max(len(batch.site) for batch in found) <= 2048
    assert len(found) < 20
