"""What a judge is, and what it says of a response."""

import dataclasses
from collections.abc import Callable, Sequence

from sami_jax.data.constitutions import Constitution
from sami_jax.data.queries import Query


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a judge says of one response.

    Attributes:
      well_formed: the response has the form that was asked for.
      faithful: its content is the query's own; False where it is not well-formed.
      followed: principle name -> the response does as the constitution asks; all False where it is not well-formed.
    """

    well_formed: bool
    faithful: bool
    followed: dict[str, bool]

    @property
    def adherence(self) -> float:
        """Share of the constitution's principles that were followed."""
        return sum(self.followed.values()) / len(self.followed)

    @property
    def score(self) -> float:
        """What a comparison goes by: adherence; a malformed response loses against any other."""
        return self.adherence if self.well_formed else -1.0

    @property
    def strict_score(self) -> float:
        """`score`, but wrong content counts as malformed."""
        return self.score if self.faithful else -1.0


@dataclasses.dataclass(frozen=True)
class Judge:
    """A way to judge responses.

    Attributes:
      check: refuses queries, and principles by their names, that it cannot read, by a BadDataError, before anything is
        sampled for it.
      judge: (query, constitution, response) -> verdict.
    """

    check: Callable[[Sequence[Query], Sequence[str]], None]
    judge: Callable[[Query, Constitution, str], Verdict]
