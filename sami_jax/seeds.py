"""Random generators derived from names, so that order, batch size, host count and restarts change nothing."""

import hashlib
import json

import jax
import numpy as np


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """The generator of (seed, names): equal arguments give equal draws, whatever was drawn before elsewhere.

    Args:
      seed: the run's seed.
      *names: what the draws are for, for instance ("constitutions", iteration, example_id).
    """
    return np.random.Generator(np.random.Philox(key=number(seed, *names)))


def number(seed: int, *names: str | int) -> int:
    """The 128-bit number of (seed, names): where a single draw is wanted, without a generator."""
    digest = hashlib.blake2b(json.dumps([seed, *names]).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


def jax_key(seed: int, *names: str | int) -> jax.Array:
    """The JAX key of (seed, names), by the same rule."""
    return jax.random.key(int(generator(seed, *names).integers(2**31)), impl="threefry2x32")


def key_data(seed: int, *names: str | int) -> np.ndarray:
    """[2] uint32, the data of a threefry key of (seed, names), for keys that are put together on the host."""
    return np.array(divmod(number(seed, *names) % 2**64, 2**32), np.uint32)
