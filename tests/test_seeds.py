"""Draws depend on their names and on nothing else."""

import itertools

import jax
import numpy as np

from sami_jax.seeds import generator, jax_key

NAMES = [(), ("a",), ("b",), ("a", "b"), ("b", "a"), ("ab",), ("a", ""), ("a", 1), ("a", "1"), ("a", 11), (1, "a")]


def first_draws(seed: int, *names: str | int) -> tuple[int, ...]:
    return tuple(generator(seed, *names).integers(2**62, size=4).tolist())


def test_equal_names_draw_alike_whatever_was_drawn_before():
    before = first_draws(3, "sample", 2)
    generator(3, "other").normal(size=1000)
    np.random.default_rng(0).normal(size=10)
    assert first_draws(3, "sample", 2) == before


def test_different_names_or_seeds_draw_differently():
    draws = {(seed, *names): first_draws(seed, *names) for seed, names in itertools.product((0, 1, -1, 2**70), NAMES)}
    assert len(set(draws.values())) == len(draws)
    firsts = {values[0] for values in draws.values()}
    assert len(firsts) == len(draws)


def test_neighbours_are_not_related():
    # 200 generators in a row: means of 50 uniform draws lie around 0.5 with a standard error of 0.0029 for all 10000,
    # and neighbours' draws have no correlation (standard error 0.01).
    draws = np.stack([generator(0, "query", i).random(50) for i in range(200)])
    assert abs(draws.mean() - 0.5) < 5 * 0.0029
    assert abs(np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]) < 5 * 0.01


def test_the_draws_are_part_of_the_promise():
    # Every sealed output depends on these; they may never change.
    assert generator(0, "constitutions", 1, "train-00000").integers(1000, size=5).tolist() == [972, 726, 200, 513, 635]
    assert generator(7, "order", 1, 0).permutation(6).tolist() == [0, 2, 5, 3, 4, 1]


def test_jax_keys_follow_the_same_rule():
    keys = {(seed, *names): jax_key(seed, *names) for seed, names in itertools.product((0, 1), NAMES)}
    data = {tuple(jax.random.key_data(key).tolist()) for key in keys.values()}
    assert len(data) == len(keys)
    again = jax_key(1, "a", 1)
    np.testing.assert_array_equal(jax.random.key_data(again), jax.random.key_data(keys[1, "a", 1]))
    assert jax.random.key_impl(again) == "threefry2x32"  # whatever the default of this JAX is


def test_jax_draws_do_not_depend_on_the_default_generator():
    before = jax.random.normal(jax_key(0, "init"), (3,))
    with jax.default_prng_impl("rbg"):
        after = jax.random.normal(jax_key(0, "init"), (3,))
    np.testing.assert_array_equal(before, after)
