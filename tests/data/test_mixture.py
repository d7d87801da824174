"""The mixture of stores: even, complete, and a function of the row's number alone."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tw_jax.data.mixture import Mixture, Shares

WEIGHTS = st.lists(st.floats(0.01, 10), min_size=1, max_size=5).map(tuple)
SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=50)
@given(weights=WEIGHTS, seed=SEEDS, rows=st.integers(1, 60_000))
def test_every_prefix_holds_each_store_in_its_share(weights, seed, rows):
    stores = Mixture(Shares(weights, weights), seed).stores(np.arange(rows))
    counts = np.bincount(stores, minlength=len(weights))
    expected = rows * np.array(weights) / sum(weights)
    # The sequence's discrepancy; a random draw would be off by sqrt(rows), 245 at 60,000.
    assert np.abs(counts - expected).max() <= 3 + 2 * math.log(rows + 1)


@settings(max_examples=30)
@given(first=WEIGHTS, seed=SEEDS, ramp=st.integers(1, 50_000), data=st.data())
def test_shares_reach_their_final_values(first, seed, ramp, data):
    last = data.draw(st.tuples(*[st.floats(0.01, 10)] * len(first)))
    mixture = Mixture(Shares(first, last, ramp), seed)
    at_end = mixture.stores(np.arange(ramp, ramp + 20_000))
    shares = np.bincount(at_end, minlength=len(first)) / 20_000
    np.testing.assert_allclose(shares, np.array(last) / sum(last), atol=2e-3)
    ramping = mixture.stores(np.arange(ramp))
    middle = (np.array(first) / sum(first) + np.array(last) / sum(last)) / 2
    counts = np.bincount(ramping, minlength=len(first))
    assert np.abs(counts - ramp * middle).max() <= 8 + 0.01 * ramp


@settings(max_examples=20)
@given(weights=WEIGHTS, seed=SEEDS, starts=st.lists(st.integers(0, 100_000), max_size=6))
def test_a_row_is_a_function_of_its_number_and_stores_are_used_in_order(weights, seed, starts):
    shares = Shares(weights, tuple(reversed(weights)), 50_000)
    stores = Mixture(shares, seed).stores(np.arange(100_020))
    mixture = Mixture(shares, seed)  # asked at random places, as a resumed run does
    for start in starts:
        for n in range(start, start + 20):
            store, index = mixture.row(n)
            assert store == stores[n]
            assert index == np.count_nonzero(stores[:n] == store)


def test_a_store_of_weight_zero_comes_only_once_it_has_one():
    mixture = Mixture(Shares((1.0, 0.0), (0.0, 1.0), 1000), 0)
    stores = mixture.stores(np.arange(5000))
    assert (stores[1000:] == 1).all()
    assert stores[:100].mean() < 0.1 < 0.9 < stores[900:1000].mean()
    assert not Mixture(Shares((1.0, 0.0), (1.0, 0.0)), 0).stores(np.arange(5000)).any()


def test_far_rows_are_as_even_as_near_ones():
    rows = np.arange(2**39, 2**39 + 10_000)
    counts = np.bincount(Mixture(Shares((1.0, 2.0), (1.0, 2.0)), 3).stores(rows))
    assert counts[0] == pytest.approx(10_000 / 3, abs=12)


def test_the_seed_moves_the_sequence():
    rows = np.arange(1000)
    shares = Shares((1.0, 1.0), (1.0, 1.0))
    assert (Mixture(shares, 0).stores(rows) != Mixture(shares, 1).stores(rows)).any()
