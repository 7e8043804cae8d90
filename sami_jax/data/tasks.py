"""Tasks: a query and the constitutions it is to be answered under."""

import dataclasses

from sami_jax.data.constitutions import Constitution
from sami_jax.data.queries import Query


@dataclasses.dataclass(frozen=True)
class Task:
    """A query and its C constitutions."""

    query: Query
    constitutions: tuple[Constitution, ...]
