"""Pools: what the constitutions of a query are drawn from, principles or the pairs of a folder."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sami_jax.config.data import ConstitutionsConfig
from sami_jax.data.authors import read_constitutions
from sami_jax.data.constitutions import Constitution, draw_constitutions
from sami_jax.data.principles import Principle, learned, read_principles
from sami_jax.errors import BadConfigError

LEARNED, HELD_OUT = "learned", "held_out"


@dataclasses.dataclass(frozen=True)
class Pool:
    """Where the contrasting constitutions of a query come from.

    Attributes:
      principles: to draw from, as `config` says; empty where there are pairs.
      pairs: of which one is drawn, as it stands.
      config: how principles are drawn.
    """

    principles: tuple[Principle, ...]
    pairs: tuple[tuple[Constitution, Constitution], ...]
    config: ConstitutionsConfig

    @property
    def names(self) -> list[str]:
        """The principles, by name."""
        in_pairs = (name for pair in self.pairs for constitution in pair for name in constitution.asked)
        return list(dict.fromkeys([*(principle.name for principle in self.principles), *in_pairs]))

    def draw(self, rng: np.random.Generator) -> tuple[Constitution, ...]:
        """The C constitutions of one query, by its own generator. Raises BadConfigError where there are too few."""
        if self.pairs:
            return self.pairs[int(rng.integers(len(self.pairs)))]
        config = self.config
        drawn = draw_constitutions(
            self.principles, rng, count=config.count, per_query=config.principles_per_query, pairing=config.pairing
        )
        return tuple(drawn)

    def every_pair(self) -> Iterator[tuple[Constitution, Constitution]]:
        """All pairs that a query may get, where each gets two constitutions; in the authors' folders they are six."""
        if self.pairs:
            yield from self.pairs
            return
        signs = list(itertools.product((True, False), repeat=self.config.principles_per_query))
        firsts = signs if self.config.pairing == "symmetric" else signs[:1]
        for drawn in itertools.permutations(self.principles, self.config.principles_per_query):
            for pattern in itertools.product(firsts, signs):
                if pattern[0] != pattern[1]:
                    positive, negative = (tuple(map(Principle.statement, drawn, asked)) for asked in pattern)
                    yield Constitution(positive), Constitution(negative)


def read_pools(path: Path, config: ConstitutionsConfig) -> dict[str, Pool]:
    """The pools of a file of principles or of a folder of constitutions.

    Args:
      path: `config.principles` or `config.folder`, wherever that is.
      config: how constitutions are drawn.

    Returns:
      LEARNED, what SAMI trains on; and HELD_OUT, what is only evaluated on, where there is enough for a constitution.

    Raises:
      BadConfigError: there are too few principles for the pairing.
      BadDataError: the file, and what is wrong with it.
    """
    if path.is_dir():
        return {LEARNED: Pool((), tuple(read_constitutions(path)), config)}
    principles = read_principles(path)
    held_out = tuple(principle for principle in principles if principle.held_out)
    pools = {LEARNED: Pool(tuple(learned(principles)), (), config)}
    per_query = config.principles_per_query
    if config.pairing == "diverse" and len(pools[LEARNED].principles) == per_query:
        raise BadConfigError(
            f"config.constitutions.pairing is diverse, which draws others for each query, but {path} has {per_query} "
            f"principles for {per_query} in each; give more, or set config.constitutions.pairing=authors."
        )
    if len(held_out) >= per_query:
        pools[HELD_OUT] = Pool(held_out, (), config)
    return pools
