"""The running quantile per kind of request."""

from __future__ import annotations

import numpy as np
import pytest

from gpuscope._collecting.keeping.quantiles import Quantiles


def test_nothing_is_beyond_before_there_are_enough():
    """Two hundred of a kind, or as many as have two beyond the quantile."""
    assert [Quantiles(each).least for each in (0.5, 0.95, 0.99, 0.999)] == [200, 200, 200, 2000]
    quantiles = Quantiles(0.99)
    assert not quantiles.beyond("a", np.arange(1, 200)).any()
    assert not quantiles.beyond("a", np.array([10**12])).any()
    assert quantiles.beyond("a", np.array([10**12 - 1, 10**12 + 1])).tolist() == [True, True]
    assert not quantiles.beyond("b", np.array([10**12])).any()


@pytest.mark.parametrize("size", [1, 7, 500, 5000])
def test_one_in_a_hundred_is_beyond(size):
    """Whatever the size of the batches that requests come in, about so many are beyond: of 50,000, from 1 % on."""
    random = np.random.default_rng(3)
    durations = (random.lognormal(16, 0.7, 50_000)).astype(np.int64)
    quantiles = Quantiles(0.99)
    beyond = np.concatenate([quantiles.beyond("a", part) for part in np.array_split(durations, 50_000 // size)])
    assert 350 < beyond.sum() < 700
    assert durations[beyond].min() > np.quantile(durations, 0.97)


def test_requests_that_all_take_the_same_are_not_beyond():
    """Otherwise every one of them would be kept."""
    quantiles = Quantiles(0.99)
    assert not any(quantiles.beyond("a", np.full(100, 7)).any() for _ in range(50))


def test_it_follows_a_change():
    """After requests have become slower for good, the quantile is that of the newest."""
    quantiles, random = Quantiles(0.99), np.random.default_rng(4)
    fast, slow = (random.normal(mean, mean / 20, 6000).astype(np.int64) for mean in (1e6, 1e8))
    quantiles.beyond("a", fast)
    first = quantiles.beyond("a", slow[:100])
    assert first.all()
    quantiles.beyond("a", slow[100:5000])
    assert quantiles.beyond("a", slow[5000:]).sum() < 60


def test_kinds_are_bounded():
    """A program that names each request anew has no quantiles for the later ones, and no memory without a bound."""
    quantiles = Quantiles(0.5)
    for kind in range(1000):
        quantiles.beyond(str(kind), np.arange(1, 1000))
    assert len(quantiles._windows) == 256
    assert quantiles.beyond("0", np.array([10**9])).all()
    assert not quantiles.beyond("999", np.array([10**9])).any()
