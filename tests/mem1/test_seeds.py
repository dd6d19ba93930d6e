"""Every stream of random numbers is its own."""

from __future__ import annotations

from typing import get_args

import pytest

from mem1.seeds import LARGEST, Purpose, derive_seed


def test_no_two_streams_are_the_same():
    purposes: tuple[Purpose, ...] = get_args(Purpose)
    seeds = {
        derive_seed(run, purpose, update, index)
        for run in range(5)
        for purpose in purposes
        for update in range(10)
        for index in range(20)
    }
    assert len(seeds) == 5 * len(purposes) * 10 * 20
    assert all(0 <= seed < LARGEST for seed in seeds)


def test_a_stream_stays_what_it_is():
    """The same on every machine and with every version: what a saved run goes on from."""
    assert derive_seed(0, "training", 0, 1) == 3085074342906508
    assert derive_seed(7, "weights") != derive_seed(7, "weights", 0)


@pytest.mark.parametrize("seed", [0, 2**53 - 1])
def test_any_seed_of_a_run_can_be_used(seed):
    assert 0 <= derive_seed(seed, "sampling", 3) < LARGEST
