"""Packed rows and their log-probs against a model whose log-probs numpy sums one cell at a time."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import doubles
from sami_jax.config.mesh import MeshConfig
from sami_jax.data.pairs import Pair
from sami_jax.errors import BadDataError
from sami_jax.scoring.matrices import contrastive_logps, label_hidden, logps_and_kls, score_packed
from sami_jax.scoring.packed_rows import Packing
from sami_jax.sharding import make_mesh
from sami_jax.types import ContrastiveRows

VOCAB = 11
PARAMS = doubles.table_params(VOCAB, seed=1)
PAIRS = doubles.random_pairs(5, vocab=VOCAB, seed=1)
# The logits are exact integers; a log-softmax in float32 rounds at 6e-8 relative of values up to 100.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-5}


def scored(packing: Packing, *, normalize: str = "sum", params=PARAMS, seen=lambda done: None, mesh=None) -> np.ndarray:
    mesh = mesh or make_mesh(MeshConfig())
    return score_packed(doubles.MODEL, params, packing, 0, normalize=normalize, mesh=mesh, scored=seen)


def only_batch(packing: Packing) -> ContrastiveRows:
    [batch] = packing.micro_batches(0)
    return batch


class TestLayout:
    def test_by_hand(self):
        one = doubles.pair([[1, 2, 3], [4, 5]], [[6], [7, 8]])
        batch = only_batch(doubles.packing([one], rows=1, multiple=12))
        # The prompt but for its last token, then that token and what it leads to, once for each response.
        np.testing.assert_array_equal(batch.rows.tokens, [[1, 2, 3, 3, 7, 4, 5, 5, 7, 0, 0, 0]])
        np.testing.assert_array_equal(batch.rows.positions, [[0, 1, 2, 2, 3, 0, 1, 1, 2, 0, 0, 0]])
        np.testing.assert_array_equal(batch.rows.ends, [[5, 5, 3, 5, 5, 9, 7, 9, 9, 10, 11, 12]])
        np.testing.assert_array_equal(batch.at[0, :6], [2, 3, 4, 6, 7, 8])
        np.testing.assert_array_equal(batch.labels[0, :6], [6, 7, 8, 6, 7, 8])
        np.testing.assert_array_equal(batch.cells[0, :6], [0, 1, 1, 2, 3, 3])
        np.testing.assert_array_equal(batch.cells[0, 6:], 4)
        np.testing.assert_array_equal(batch.counts, [[[1, 2], [1, 2]]])
        np.testing.assert_array_equal(batch.queries, [0])
        assert {leaf.dtype for leaf in jax.tree.leaves(batch)} == {np.dtype(np.int32)}

    def test_end_of_sequence_is_appended_to_every_response_and_counts(self):
        one = doubles.pair([[1, 2, 3], [4, 5]], [[6], [7, 8]])
        batch = only_batch(doubles.packing([one], rows=2, multiple=7, eos_id=9))
        np.testing.assert_array_equal(batch.rows.tokens, [[1, 2, 3, 6, 3, 7, 8], [4, 5, 6, 5, 7, 8, 0]])
        np.testing.assert_array_equal(batch.labels[0, :10], [6, 9, 7, 8, 9, 6, 9, 7, 8, 9])
        np.testing.assert_array_equal(batch.at[0, :10], [2, 3, 4, 5, 6, 8, 9, 10, 11, 12])
        np.testing.assert_array_equal(batch.counts, [[[2, 3], [2, 3]]])

    def test_each_part_of_the_rows_has_its_own_labels(self):
        one = doubles.pair([[1, 2, 3], [4, 5]], [[6], [7, 8]])
        batch = only_batch(doubles.packing([one], shards=2, rows=1, multiple=6))
        np.testing.assert_array_equal(batch.rows.tokens, [[1, 2, 3, 3, 7, 0], [4, 5, 5, 7, 0, 0]])
        np.testing.assert_array_equal(batch.at[:, :3], [[2, 3, 4], [1, 2, 3]])  # slots of the part
        np.testing.assert_array_equal(batch.cells[:, :3], [[0, 1, 1], [2, 3, 3]])

    def test_rows_are_dealt_out_to_the_parts(self):
        """So that each has about as many labels, for which all have room."""
        pairs = [doubles.pair([[1, 2, 3]] * 2, [[4], [5]]) for _ in range(4)]
        batch = only_batch(doubles.packing(pairs, shards=2, rows=4, multiple=8))  # two packs of four to a row
        filled = np.asarray(batch.rows.tokens).any(axis=1).reshape(2, 4)
        np.testing.assert_array_equal(filled, [[True, True, False, False]] * 2)
        np.testing.assert_array_equal((batch.cells < batch.counts.size).sum(axis=1), [8, 8])

    def test_prompts_of_one_token_and_responses_without_any(self):
        pairs = [doubles.pair([[1], [2]], [[3], []]), doubles.pair([[1], [2, 4]], [[], []])]
        batch = only_batch(doubles.packing(pairs, rows=1, multiple=4))
        np.testing.assert_array_equal(batch.rows.tokens, [[1, 2, 2, 0]])
        np.testing.assert_array_equal(batch.counts, [[[1, 0], [1, 0]], [[0, 0], [0, 0]]])
        matrix = scored(doubles.packing(pairs, rows=2))
        expected = [[doubles.response_logps(PARAMS, prompt, [3]).sum()] for prompt in pairs[0].prompt_ids]
        np.testing.assert_allclose(matrix[0, :, :1], expected, rtol=1e-5)
        np.testing.assert_array_equal(matrix[0, :, 1], 0.0)
        np.testing.assert_array_equal(matrix[1], 0.0)

    @pytest.mark.parametrize(("shards", "rows"), [(1, 2), (1, 5), (2, 2), (4, 1)])
    def test_every_token_of_every_query_stands_once(self, shards, rows):
        pairs = doubles.random_pairs(23, vocab=VOCAB, seed=6, constitutions=3)
        packing = doubles.packing(pairs, shards=shards, rows=rows, widest=40, eos_id=9)
        seen, real = [], 0
        for batch in packing.micro_batches(0):
            own = [int(query) for query in batch.queries if query < len(pairs)]
            seen += own
            labelled = np.bincount(batch.cells.reshape(-1), minlength=packing.layout.queries * 9 + 1)[:-1]
            np.testing.assert_array_equal(labelled.reshape(-1, 3, 3), batch.counts)
            for place, query in enumerate(own):
                lengths = [len(ids) + 1 for ids in pairs[query].response_ids]
                np.testing.assert_array_equal(batch.counts[place], [lengths] * 3)
                real += sum(len(prompt) - 1 + sum(lengths) for prompt in pairs[query].prompt_ids)
            assert not batch.counts[len(own) :].any()
        assert sorted(seen) == list(range(len(pairs)))
        count = sum(1 for _ in packing.micro_batches(0))
        assert packing.real_share == real / (count * shards * rows * packing.layout.width)


class TestWidth:
    def lengths(self, *packs: int) -> list[Pair]:
        """Queries of two packs of so many tokens."""
        return [doubles.pair([[1] * (size - 3)] * 2, [[2, 3], [4, 5]], f"of {size}") for size in packs]

    def width(self, *packs: int, **limits: int) -> int:
        return doubles.packing(self.lengths(*packs), **limits).layout.width

    def test_is_a_multiple_that_holds_the_longest_pack(self):
        assert self.width(9, 20, 12, widest=24, multiple=8) == 24
        assert self.width(20, widest=20, multiple=16) == 32  # `widest` is rounded up

    def test_is_the_one_that_leaves_least_empty(self):
        # Rows of 20 hold two packs of 10 and are full, those of 12, 16, 24 or 28 are not.
        assert self.width(*[10] * 8, rows=2, widest=30, multiple=4) == 20
        # Packs of 14 leave 6 of 20 empty, in rows of 30 only 2.
        assert self.width(*[14] * 8, rows=2, widest=30, multiple=10) == 30

    def test_is_narrow_where_attention_is_dear(self):
        assert self.width(*[14] * 8, rows=2, widest=30, multiple=10, dear_width=10) == 20

    def test_is_chosen_by_all_groups_and_the_same_for_them(self):
        groups = self.lengths(10, 10), self.lengths(40)
        packing = doubles.packing(*groups, rows=2, multiple=5)
        shapes = {batch.rows.tokens.shape for group in (0, 1) for batch in packing.micro_batches(group)}
        assert shapes == {(2, 40)} and packing.layout.width == 40

    def test_leaves_room_for_every_query_where_packs_must_share_rows(self):
        # Eight packs in three rows: three of them in a row, 30 tokens.
        pairs = [doubles.pair([[1] * 7] * 8, [[2], [3], [4], [5]][:4] * 1, "many")]
        assert doubles.packing(pairs, rows=3, widest=100, multiple=10).layout.width == 30

    def test_refuses_a_pack_longer_than_the_widest_row(self):
        with pytest.raises(BadDataError) as error:
            self.width(12, 31, 14, widest=30)
        assert str(error.value) == (
            "Query 'of 31': a prompt and its 2 responses take 31 tokens, but a row has at most "
            "config.train.max_row_tokens=30; raise it to 31 or more, or shorten or remove the query."
        )

    def test_refuses_a_query_that_no_micro_batch_holds(self):
        with pytest.raises(BadDataError) as error:
            self.width(12, 16, 14, rows=1, widest=30)
        assert str(error.value) == (
            "Query 'of 16': its 2 prompts, each with all responses, take 32 tokens, and do not fit into the 1 x 30 "
            "tokens of rows that are in memory at once; raise config.train.rows_per_device, now 1, or "
            "config.train.max_row_tokens."
        )


class TestContrastiveLogps:
    def test_by_hand(self):
        # last = 0 but for two entries, so a row of logits is (ln 3, 0, ..., 0) or zeros: p = 3/13 or 1/13, else 1/11.
        params = {name: np.zeros((VOCAB, VOCAB), np.float32) for name in ("last", "context")}
        params["last"][2, 6] = math.log(3)  # after 2, token 6 has probability 3 / (3 + 10)
        params["last"][6, 7] = math.log(3)
        one = doubles.pair([[1, 2], [1, 3]], [[6, 7], [5]])
        expected = [
            [2 * math.log(3 / 13), math.log(1 / 13)],  # after 2: 6 then 7; 5
            [math.log(1 / 11) + math.log(3 / 13), math.log(1 / 11)],  # after 3: 6 unfavoured, then 7; 5
        ]
        np.testing.assert_allclose(scored(doubles.packing([one]), params=params)[0], expected, rtol=1e-6)

    @pytest.mark.parametrize("normalize", ["mean", "sum"])
    def test_numpy_reference_cell_by_cell(self, normalize):
        expected = np.stack([doubles.pair_logps(PARAMS, one, normalize=normalize) for one in PAIRS])
        # A matrix transposed, or with its diagonal shifted, would show.
        assert np.abs(expected - expected.transpose(0, 2, 1)).min(axis=0)[0, 1] > 0.1
        np.testing.assert_allclose(scored(doubles.packing(PAIRS), normalize=normalize), expected, **TOLERANCE)

    @pytest.mark.parametrize(("prompts", "responses"), [(3, 3), (1, 2), (2, 3)])
    def test_any_number_of_prompts_and_responses(self, prompts, responses):
        many = doubles.random_pairs(4, vocab=VOCAB, seed=2, constitutions=3)
        pairs = [doubles.pair(one.prompt_ids[:prompts], one.response_ids[:responses]) for one in many]
        expected = np.stack([doubles.pair_logps(PARAMS, one, normalize="mean") for one in pairs])
        np.testing.assert_allclose(scored(doubles.packing(pairs, rows=3), normalize="mean"), expected, **TOLERANCE)

    def test_the_mean_is_the_sum_over_the_number_of_tokens(self):
        lengths = np.array([[len(ids) for ids in one.response_ids] for one in PAIRS])
        means, sums = (scored(doubles.packing(PAIRS), normalize=how) for how in ("mean", "sum"))
        np.testing.assert_allclose(means * lengths[:, None, :], sums, rtol=1e-6)
        assert len(set(lengths.ravel().tolist())) > 1

    def test_end_of_sequence_is_scored_as_one_more_token(self):
        longer = [doubles.pair(one.prompt_ids, [(*ids, 9) for ids in one.response_ids]) for one in PAIRS]
        expected = np.stack([doubles.pair_logps(PARAMS, one, normalize="sum") for one in longer])
        np.testing.assert_allclose(scored(doubles.packing(PAIRS, eos_id=9)), expected, **TOLERANCE)

    def test_every_response_token_counts_and_no_prompt_token_does(self):
        # Token 10 stands at one place only; its log-prob there is made 1000 nats lower by its own column.
        params = {name: np.zeros((VOCAB, VOCAB), np.float32) for name in ("last", "context")}
        params["last"][:, 10] = -1000.0
        places = {"prompt's first": ([10, 2], [3, 4]), "prompt's last": ([1, 10], [3, 4])}
        places |= {"response's first": ([1, 2], [10, 4]), "response's last": ([1, 2], [3, 10])}
        seen = {}
        for name, (prompt, response) in places.items():
            one = doubles.pair([prompt] * 2, [response] * 2)
            seen[name] = bool((scored(doubles.packing([one]), params=params) < -900).all())
        assert seen == {
            "prompt's first": False,
            "prompt's last": False,
            "response's first": True,
            "response's last": True,
        }

    @pytest.mark.parametrize("pad", [2, 9])
    def test_what_stands_in_the_padding_changes_nothing(self, pad):
        # 2 is a token that prompts and responses use, 9 is the end of sequence in a tokenizer whose pad is its eos.
        batch = only_batch(doubles.packing(PAIRS, rows=5, multiple=50, eos_id=9))
        empty = np.asarray(batch.rows.ends) == np.arange(1, 51)
        assert empty.sum() > 50
        tokens = np.where(empty & (np.asarray(batch.rows.positions) == 0), pad, batch.rows.tokens).astype(np.int32)
        labels = np.where(batch.cells == batch.counts.size, pad, batch.labels).astype(np.int32)
        filled = batch._replace(rows=batch.rows._replace(tokens=tokens), labels=labels)
        before, after = (contrastive_logps(doubles.MODEL, PARAMS, x, normalize="mean") for x in (batch, filled))
        np.testing.assert_array_equal(before, after)

    def test_refuses_a_batch_whose_parts_do_not_belong_together(self):
        batch = only_batch(doubles.packing(PAIRS, rows=5))
        for broken in (
            batch._replace(rows=batch.rows._replace(ends=batch.rows.ends[:, :3])),
            batch._replace(labels=batch.labels[:, :1]),
            batch._replace(cells=batch.cells[..., :3]),
            batch._replace(queries=batch.queries[:1]),
        ):
            with pytest.raises(AssertionError):
                label_hidden(doubles.MODEL, PARAMS, broken)


class TestScorePacked:
    @pytest.mark.parametrize("rows", [2, 3, 10, 16])
    def test_any_number_of_rows_gives_every_pair_once_in_order(self, rows):
        expected = np.stack([doubles.pair_logps(PARAMS, one, normalize="mean") for one in PAIRS])
        actual = scored(doubles.packing(PAIRS, rows=rows, widest=16), normalize="mean")
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, **TOLERANCE)

    def test_says_how_many_queries_are_done(self):
        seen: list[int] = []
        scored(doubles.packing(PAIRS, rows=2, widest=20), seen=seen.append)
        assert len(seen) > 1 and seen == sorted(set(seen)) and seen[-1] == 5

    def test_groups_share_a_trace(self):
        model = doubles.MODEL._replace(hidden=chex.assert_max_traces(doubles.hidden, n=1))
        groups = [doubles.random_pairs(6, vocab=VOCAB, seed=seed) for seed in range(3)]
        packing, mesh = doubles.packing(*groups, widest=20), make_mesh(MeshConfig())
        for group in range(3):
            score_packed(model, PARAMS, packing, group, normalize="mean", mesh=mesh, scored=lambda done: None)

    def test_rows_split_over_devices_have_the_same_logps(self):
        mesh = make_mesh(MeshConfig(data=4))
        params = jax.device_put(PARAMS, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        actual = scored(doubles.packing(PAIRS, shards=4, rows=1), params=params, mesh=mesh)
        # The same sums of exact logits on other devices; only the log-softmax rounds.
        np.testing.assert_allclose(actual, scored(doubles.packing(PAIRS, rows=2)), rtol=1e-6)

    def test_room_for_more_queries_than_there_are(self):
        packing = doubles.packing(PAIRS[:2], queries=7, rows=4)
        assert only_batch(packing).queries.tolist() == [*only_batch(packing).queries[:2], 2, 2, 2, 2, 2]
        np.testing.assert_allclose(scored(packing), scored(doubles.packing(PAIRS))[:2], rtol=1e-6)


def test_a_model_of_bfloat16_has_float32_logps():
    batch = only_batch(doubles.packing(PAIRS, rows=5))
    rough = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
    assert logps_and_kls(doubles.MODEL, rough, batch)[0].dtype == jnp.float32
