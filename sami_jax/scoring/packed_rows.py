"""Contrastive queries as packed rows: each prompt once, its responses behind it, several of them in a row.

A pack is one constitution of one query. Its shared part is the prompt without its last token; then comes a branch for
each response, which begins with its own copy of the prompt's last token and ends before the response's last one:

    slot      0 1 2 | 3  4  5  | 6  7
    token     p p p | p' a0 a1 | p' b0        prompt p p p p', responses a = a0 a1 a2 and b = b0 b1
    position  0 1 2 | 3  4  5  | 3  4
    end       8 8 8 | 6  6  6  | 8  8         slot before which a token is seen: `types.Rows`
    label     - - - | a0 a1 a2 | b0 b1

So every token sees its prompt and its own branch, at the positions it would have in a sequence of its own, and the
matrix of log-probs, its gradients included, is that of one sequence per cell (tests/test_packed_rows.py), of which a
pack saves all prompts but one.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import jax
import numpy as np

from sami_jax.data.pairs import Pair
from sami_jax.errors import BadDataError
from sami_jax.sharding import padded_size
from sami_jax.types import Array, ContrastiveRows, Rows

_LABELS_TO = 16  # the labels of a shard are padded to multiples of this, many of them more coarsely
_TRIED_QUERIES = 256  # the width is chosen on so many of a run's queries, the first
_TRIED_PACKS = 8  # and rows of so many of the longest packs are the widest that are tried


class RowLimits(NamedTuple):
    """What rows may be like.

    Attributes:
      shards: parts that a micro-batch's rows are split into, one for each device that shares them.
      rows_per_shard: rows of a micro-batch in each part.
      widest: tokens of the widest row, rounded up to `multiple`.
      multiple: a width is a multiple of this.
      dear_width: width of rows whose attention costs as much time as all else; infinite where width costs nothing.
      queries: a micro-batch has room for so many queries, where it holds fewer, too.
    """

    shards: int
    rows_per_shard: int
    widest: int
    multiple: int
    dear_width: float
    queries: int = 1


class Layout(NamedTuple):
    """The one shape of all micro-batches.

    Attributes:
      shards: parts that the rows are split into.
      rows: N, in all parts together.
      width: S, tokens of a row.
      labels: L, labelled tokens of a part, at most.
      queries: Q, whole queries of a micro-batch, at most.
    """

    shards: int
    rows: int
    width: int
    labels: int
    queries: int


class _Place(NamedTuple):
    """Where a pack stands: the query's index in its group, the constitution, the row, the first slot."""

    query: int
    constitution: int
    row: int
    start: int


@dataclasses.dataclass(frozen=True)
class Packing:
    """Groups of queries, each group packed into micro-batches for itself.

    Attributes:
      layout: the shape of every micro-batch.
      groups: the queries.
      ending: ids behind each response, trained like its own.
      depth: most micro-batches of a group.
      real_share: share of all slots that hold a token.
    """

    layout: Layout
    groups: Sequence[Sequence[Pair]]
    ending: tuple[int, ...]
    depth: int
    real_share: float
    _placed: Sequence[Sequence[Sequence[_Place]]]

    def micro_batches(self, group: int) -> Iterator[ContrastiveRows]:
        """The micro-batches of a group, as numpy arrays; `queries` are indices into the group."""
        for places in self._placed[group]:
            yield self._micro_batch(group, places)

    def stacked(self, group: int) -> ContrastiveRows:
        """[depth, ...] micro-batches of a group, empty ones behind the others."""
        filled = list(self.micro_batches(group))
        filled += [self._micro_batch(group, ())] * (self.depth - len(filled))
        return jax.tree.map(lambda *leaves: np.stack(leaves), *filled)

    def describe(self) -> str:
        """A sentence's part for people."""
        rows, queries = self.layout.rows, self.layout.queries
        counts = f"{rows} row{'s' * (rows != 1)} of {self.layout.width} tokens, {self.real_share:.0%} of them real"
        return f"{counts}, up to {queries} {'query' if queries == 1 else 'queries'} at once"

    def _micro_batch(self, group: int, places: Sequence[_Place]) -> ContrastiveRows:
        pairs, layout = self.groups[group], self.layout
        constitutions, responses = len(self.groups[0][0].prompt_ids), len(self.groups[0][0].response_ids)
        cells = layout.queries * constitutions * responses
        tokens, positions = np.zeros((2, layout.rows, layout.width), np.int32)
        ends = np.tile(np.arange(1, layout.width + 1, dtype=np.int32), (layout.rows, 1))
        counts = np.zeros((layout.queries, constitutions, responses), np.int32)
        queries = np.full(layout.queries, len(pairs), np.int32)
        labelled: list[list[np.ndarray]] = [[np.zeros((3, 0), np.int32)] for _ in range(layout.shards)]
        rows_per_shard = layout.rows // layout.shards
        members = list(dict.fromkeys(place.query for place in places))
        queries[: len(members)] = members
        for index, constitution, row, start in places:
            query, pair = members.index(index), pairs[index]
            prompt = pair.prompt_ids[constitution]
            slot = start + len(prompt) - 1
            tokens[row, start:slot] = prompt[:-1]
            positions[row, start:slot] = np.arange(slot - start)
            ends[row, start:slot] = start + _pack_length(pair, constitution, self.ending)
            for number, response in enumerate(pair.response_ids):
                ids = (*response, *self.ending)
                counts[query, constitution, number] = len(ids)
                if not ids:
                    continue
                end = slot + len(ids)
                tokens[row, slot:end] = (prompt[-1], *ids[:-1])
                positions[row, slot:end] = len(prompt) - 1 + np.arange(len(ids))
                ends[row, slot:end] = end
                cell = (query * constitutions + constitution) * responses + number
                at = row % rows_per_shard * layout.width + np.arange(slot, end)
                labelled[row // rows_per_shard].append(np.stack([at, ids, np.full(len(ids), cell)]).astype(np.int32))
                slot = end
        at, labels, of = np.tile(np.array([[[0]], [[0]], [[cells]]], np.int32), (1, layout.shards, layout.labels))
        for shard, parts in enumerate(labelled):
            columns = np.concatenate(parts, axis=1)
            at[shard, : columns.shape[1]], labels[shard, : columns.shape[1]], of[shard, : columns.shape[1]] = columns
        # The arrays stay in the host's memory: the caller knows the devices.
        arrays = cast(list[Array], [at, labels, of, counts, queries])
        return ContrastiveRows(Rows(*cast(list[Array], [tokens, positions, ends])), *arrays)


def pack_rows(groups: Sequence[Sequence[Pair]], limits: RowLimits, *, eos_id: int | None = None) -> Packing:
    """Packs queries into rows of one width, whole queries in each micro-batch, the largest first.

    The width is the one that takes the least time on the queries themselves: few rows, and yet no wide ones, since
    attention is quadratic in the width.

    Args:
      groups: queries of C constitutions and R responses each; those of one group share micro-batches.
      limits: of the rows.
      eos_id: appended to every response and trained, or None.

    Raises:
      BadDataError: a pack is longer than the widest row, or a query has no room in a micro-batch.
    """
    ending = () if eos_id is None else (eos_id,)
    sizes = [[_sizes(pair, ending) for pair in group] for group in groups]
    width = _chosen_width(groups, sizes, limits)
    rows = limits.shards * limits.rows_per_shard
    placed = [[[_spread(place, limits) for place in micro] for micro in _placed(group, rows, width)] for group in sizes]
    micro_batches = [micro for group in placed for micro in group]
    labels, queries = 1, limits.queries
    for group, packed in zip(groups, placed, strict=True):
        for micro in packed:
            queries = max(queries, len({place.query for place in micro}))
            in_shards = np.zeros(limits.shards, int)
            for place in micro:
                in_shards[place.row // limits.rows_per_shard] += _label_count(group[place.query], ending)
            labels = max(labels, int(in_shards.max()))
    layout = Layout(limits.shards, rows, width, padded_size(labels, _LABELS_TO), queries)
    real = sum(size for group in sizes for packs in group for size in packs)
    share = real / (len(micro_batches) * rows * width)
    return Packing(layout, groups, ending, max(map(len, placed)), share, placed)


def _spread(place: _Place, limits: RowLimits) -> _Place:
    """Deals the rows out to the parts like cards, since the first ones are the fullest."""
    return place._replace(row=place.row % limits.shards * limits.rows_per_shard + place.row // limits.shards)


def _pack_length(pair: Pair, constitution: int, ending: tuple[int, ...]) -> int:
    return len(pair.prompt_ids[constitution]) - 1 + _label_count(pair, ending)


def _label_count(pair: Pair, ending: tuple[int, ...]) -> int:
    return sum(len(ids) + len(ending) for ids in pair.response_ids)


def _sizes(pair: Pair, ending: tuple[int, ...]) -> list[int]:
    return [_pack_length(pair, constitution, ending) for constitution in range(len(pair.prompt_ids))]


def _chosen_width(groups: Sequence[Sequence[Pair]], sizes: Sequence[Sequence[list[int]]], limits: RowLimits) -> int:
    """The width that takes the least time, of those that every query has room in."""
    rows = limits.shards * limits.rows_per_shard
    every = list(zip(itertools.chain.from_iterable(groups), itertools.chain.from_iterable(sizes), strict=True))
    pair, packs = max(every, key=lambda one: max(one[1]))
    longest = max(1, *packs)
    if longest > limits.widest:
        raise BadDataError(
            f"Query {pair.example_id!r}: a prompt and its {len(pair.response_ids)} responses take {longest} tokens, "
            f"but a row has at most config.train.max_row_tokens={limits.widest}; raise it to {longest} or more, or "
            "shorten or remove the query."
        )
    widest = min(limits.widest, max(_TRIED_PACKS * longest, *(sum(packs) for _, packs in every)))
    first, last = (-(-size // limits.multiple) * limits.multiple for size in (longest, widest))
    widths = list(range(first, last + 1, limits.multiple))
    if len(packs) > rows:  # else each pack of a query has a row of its own
        for pair, packs in every:
            fitting = (i for i, width in enumerate(widths) if _MicroBatch(rows, width).take(0, packs))
            if (enough := next(fitting, None)) is None:
                raise BadDataError(
                    f"Query {pair.example_id!r}: its {len(packs)} prompts, each with all responses, take {sum(packs)} "
                    f"tokens, and do not fit into the {rows} x {limits.widest} tokens of rows that are in memory at "
                    f"once; raise config.train.rows_per_device, now {limits.rows_per_shard}, or "
                    "config.train.max_row_tokens."
                )
            widths = widths[enough:]
    tried = _first_queries(sizes)

    def time(width: int) -> float:
        slots = sum(len(_placed(group, rows, width)) for group in tried) * width
        return slots * (1 + width / limits.dear_width)

    return min(widths, key=time)


def _first_queries(sizes: Sequence[Sequence[list[int]]]) -> list[Sequence[list[int]]]:
    """The first _TRIED_QUERIES, in their groups."""
    found, left = [], _TRIED_QUERIES
    for group in sizes:
        if left > 0:
            found.append(group[:left])
            left -= len(group)
    return found


def _placed(group: Sequence[list[int]], rows: int, width: int) -> list[list[_Place]]:
    """Micro-batches of a group: first-fit decreasing, by whole queries."""
    micro_batches: list[_MicroBatch] = []
    for query in sorted(range(len(group)), key=lambda query: -sum(group[query])):
        if not any(micro.take(query, group[query]) for micro in micro_batches):
            micro_batches.append(_MicroBatch(rows, width))
            assert micro_batches[-1].take(query, group[query])
    return [micro.places for micro in micro_batches]


class _MicroBatch:
    """A micro-batch that is being filled."""

    def __init__(self, rows: int, width: int):
        self.places: list[_Place] = []
        self._rows, self._width = rows, width
        self._left: list[int] = []  # of each row that is begun, the tokens that it still takes
        self._room = rows * width

    def take(self, query: int, packs: Sequence[int]) -> bool:
        """Takes all packs of a query, the largest first, each into the first row that has room; or none of them."""
        if sum(packs) > self._room:
            return False
        left, places = list(self._left), []
        for constitution in sorted(range(len(packs)), key=lambda constitution: -packs[constitution]):
            row = next((row for row, tokens in enumerate(left) if tokens >= packs[constitution]), len(left))
            if row == self._rows:
                return False
            left += [self._width] * (row == len(left))
            places.append(_Place(query, constitution, row, self._width - left[row]))
            left[row] -= packs[constitution]
        self.places += places
        self._left, self._room = left, self._room - sum(packs)
        return True
