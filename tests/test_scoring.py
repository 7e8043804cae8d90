"""Contrastive batches and their log-probs against a model whose log-probs numpy sums one cell at a time."""

import math

import chex
import jax
import numpy as np
import pytest

import doubles
from sami_jax.data.pairs import Pair
from sami_jax.scoring import batch_widths, contrastive_logps, make_batch, response_logits, score_pairs
from sami_jax.types import ContrastiveBatch

VOCAB = 11
PARAMS = doubles.table_params(VOCAB, seed=1)
PAIRS = doubles.random_pairs(5, vocab=VOCAB, seed=1)
# The logits are exact integers; a log-softmax in float32 rounds at 6e-8 relative of values up to 100.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-5}


def logps_of(pairs: list[Pair], *, normalize: str = "sum", width: int = 12, response_width: int = 6) -> np.ndarray:
    batch = make_batch(pairs, width=width, response_width=response_width, eos_id=None)
    return np.asarray(contrastive_logps(doubles.MODEL, PARAMS, batch, normalize=normalize))


def scored(pairs: list[Pair], *, rows: int, normalize: str = "mean", round_to: int = 4, seen=lambda done: None):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return score_pairs(
        doubles.MODEL,
        PARAMS,
        pairs,
        normalize=normalize,
        rows=rows,
        round_to=round_to,
        sharding=sharding,
        scored=seen,
    )


class TestMakeBatch:
    def test_by_hand(self):
        one = doubles.pair([[1, 2, 3], [4, 5]], [[6], [7, 8]])
        batch = make_batch([one], width=6, response_width=3, eos_id=None)
        expected_tokens = [
            [[1, 2, 3, 6, 0, 0], [1, 2, 3, 7, 8, 0]],  # constitution 0 before responses 0 and 1
            [[4, 5, 6, 0, 0, 0], [4, 5, 7, 8, 0, 0]],
        ]
        np.testing.assert_array_equal(batch.tokens[0], expected_tokens)
        np.testing.assert_array_equal(batch.prompt_lengths, [[3, 2]])
        np.testing.assert_array_equal(batch.targets, [[[6, 0, 0], [7, 8, 0]]])
        np.testing.assert_array_equal(batch.target_mask, [[[True, False, False], [True, True, False]]])
        assert (batch.tokens.dtype, batch.prompt_lengths.dtype, batch.target_mask.dtype) == (np.int32, np.int32, bool)

    def test_end_of_sequence_is_appended_to_every_response_and_counts(self):
        one = doubles.pair([[1, 2, 3], [4, 5]], [[6], [7, 8]])
        batch = make_batch([one], width=6, response_width=3, eos_id=9)
        np.testing.assert_array_equal(batch.tokens[0, 0], [[1, 2, 3, 6, 9, 0], [1, 2, 3, 7, 8, 9]])
        np.testing.assert_array_equal(batch.tokens[0, 1], [[4, 5, 6, 9, 0, 0], [4, 5, 7, 8, 9, 0]])
        np.testing.assert_array_equal(batch.targets, [[[6, 9, 0], [7, 8, 9]]])
        np.testing.assert_array_equal(batch.target_mask, [[[True, True, False], [True, True, True]]])

    @pytest.mark.parametrize(
        ("round_to", "eos_id", "expected"),
        [(1, None, (5, 2)), (1, 9, (6, 3)), (4, None, (8, 4)), (5, None, (5, 5)), (5, 9, (10, 5))],
    )
    def test_widths_hold_the_longest_prompt_with_the_longest_response(self, round_to, eos_id, expected):
        # Longest prompt 3 + longest response 2 = 5, although constitution 0's own response has one token only.
        pairs = [doubles.pair([[1, 2, 3], [4, 5]], [[6], [7, 8]]), doubles.pair([[1], [2]], [[3], [4]])]
        assert batch_widths(pairs, round_to=round_to, eos_id=eos_id) == expected

    def test_responses_without_tokens_still_make_a_batch(self):
        pairs = [doubles.pair([[1, 2], [3]], [[], []])]
        assert batch_widths(pairs, round_to=1, eos_id=None) == (2, 1)
        assert scored(pairs, rows=1).shape == (1, 2, 2)

    @pytest.mark.parametrize("eos_id", [None, 9])
    def test_the_widths_are_enough_and_no_more(self, eos_id):
        width, response_width = batch_widths(PAIRS, round_to=1, eos_id=eos_id)
        make_batch(PAIRS, width=width, response_width=response_width, eos_id=eos_id)
        with pytest.raises(ValueError):
            make_batch(PAIRS, width=width - 1, response_width=response_width, eos_id=eos_id)
        with pytest.raises(ValueError):
            make_batch(PAIRS, width=width, response_width=response_width - 1, eos_id=eos_id)


class TestContrastiveLogps:
    def test_by_hand(self):
        # last = 0 but for two entries, so a row of logits is (ln 3, 0, ..., 0) or zeros: p = 3/13 or 1/13, else 1/11.
        params = {name: np.zeros((VOCAB, VOCAB), np.float32) for name in ("last", "context")}
        params["last"][2, 6] = math.log(3)  # after 2, token 6 has probability 3 / (3 + 10)
        params["last"][6, 7] = math.log(3)
        one = doubles.pair([[1, 2], [1, 3]], [[6, 7], [5]])
        batch = make_batch([one], width=4, response_width=2, eos_id=None)
        logps = contrastive_logps(doubles.MODEL, params, batch, normalize="sum")
        expected = [
            [2 * math.log(3 / 13), math.log(1 / 13)],  # after 2: 6 then 7; 5
            [math.log(1 / 11) + math.log(3 / 13), math.log(1 / 11)],  # after 3: 6 unfavoured, then 7; 5
        ]
        np.testing.assert_allclose(logps[0], expected, rtol=1e-6)

    @pytest.mark.parametrize("normalize", ["mean", "sum"])
    def test_numpy_reference_cell_by_cell(self, normalize):
        expected = np.stack([doubles.pair_logps(PARAMS, one, normalize=normalize) for one in PAIRS])
        # A matrix transposed, or with its diagonal shifted, would show.
        assert np.abs(expected - expected.transpose(0, 2, 1)).min(axis=0)[0, 1] > 0.1
        np.testing.assert_allclose(logps_of(PAIRS, normalize=normalize), expected, **TOLERANCE)

    def test_three_constitutions(self):
        pairs = doubles.random_pairs(2, vocab=VOCAB, seed=2, constitutions=3)
        expected = np.stack([doubles.pair_logps(PARAMS, one, normalize="mean") for one in pairs])
        np.testing.assert_allclose(logps_of(pairs, normalize="mean"), expected, **TOLERANCE)

    def test_the_mean_is_the_sum_over_the_number_of_tokens(self):
        lengths = np.array([[len(ids) for ids in one.response_ids] for one in PAIRS])
        means, sums = logps_of(PAIRS, normalize="mean"), logps_of(PAIRS)
        np.testing.assert_allclose(means * lengths[:, None, :], sums, rtol=1e-6)
        assert len(set(lengths.ravel().tolist())) > 1

    def test_end_of_sequence_is_scored_as_one_more_token(self):
        width, response_width = batch_widths(PAIRS, round_to=1, eos_id=9)
        batch = make_batch(PAIRS, width=width, response_width=response_width, eos_id=9)
        longer = [doubles.pair(one.prompt_ids, [(*ids, 9) for ids in one.response_ids]) for one in PAIRS]
        expected = np.stack([doubles.pair_logps(PARAMS, one, normalize="sum") for one in longer])
        actual = contrastive_logps(doubles.MODEL, PARAMS, batch, normalize="sum")
        np.testing.assert_allclose(actual, expected, **TOLERANCE)

    def test_every_response_token_counts_and_no_prompt_token_does(self):
        # Token 10 stands at one place only; its log-prob there is made 1000 nats lower by its own column.
        params = {name: np.zeros((VOCAB, VOCAB), np.float32) for name in ("last", "context")}
        params["last"][:, 10] = -1000.0
        places = {"prompt's first": ([10, 2], [3, 4]), "prompt's last": ([1, 10], [3, 4])}
        places |= {"response's first": ([1, 2], [10, 4]), "response's last": ([1, 2], [3, 10])}
        seen = {}
        for name, (prompt, response) in places.items():
            batch = make_batch([doubles.pair([prompt] * 2, [response] * 2)], width=6, response_width=3, eos_id=None)
            logps = np.asarray(contrastive_logps(doubles.MODEL, params, batch, normalize="sum"))
            seen[name] = bool((logps < -900).all())
        assert seen == {
            "prompt's first": False,
            "prompt's last": False,
            "response's first": True,
            "response's last": True,
        }

    @pytest.mark.parametrize(("width", "response_width"), [(9, 4), (16, 4), (9, 9), (32, 16)])
    def test_widths_change_nothing(self, width, response_width):
        exact = logps_of(PAIRS)
        np.testing.assert_allclose(logps_of(PAIRS, width=width, response_width=response_width), exact, rtol=1e-6)

    @pytest.mark.parametrize("pad", [0, 2, 9])
    def test_what_stands_in_the_padding_changes_nothing(self, pad):
        # 2 is a token that prompts and responses use, 9 is the end of sequence in a tokenizer whose pad is its eos.
        batch = make_batch(PAIRS, width=12, response_width=6, eos_id=9)
        filled = np.full_like(batch.tokens, pad)
        for b, one in enumerate(PAIRS):
            for c, prompt in enumerate(one.prompt_ids):
                for r, ids in enumerate(one.response_ids):
                    length = len(prompt) + len(ids) + 1
                    filled[b, c, r, :length] = batch.tokens[b, c, r, :length]
        targets = np.where(batch.target_mask, batch.targets, pad).astype(np.int32)
        padded = ContrastiveBatch(filled, batch.prompt_lengths, targets, batch.target_mask)
        before, after = (contrastive_logps(doubles.MODEL, PARAMS, x, normalize="mean") for x in (batch, padded))
        np.testing.assert_array_equal(before, after)

    def test_logits_of_response_positions_are_asked_for_and_exist(self):
        batch = make_batch(PAIRS, width=9, response_width=4, eos_id=None)
        logits = np.asarray(response_logits(doubles.MODEL, PARAMS, batch))
        assert logits.shape == (5, 2, 2, 4, VOCAB)
        one = PAIRS[2]
        prefix = [*one.prompt_ids[1], *one.response_ids[0]]
        np.testing.assert_array_equal(logits[2, 1, 0, 0], doubles.logits_after(PARAMS, one.prompt_ids[1]))
        last = len(one.response_ids[0]) - 1
        np.testing.assert_array_equal(logits[2, 1, 0, last], doubles.logits_after(PARAMS, prefix[:-1]))

    def test_a_long_prompt_with_a_short_response_stays_inside_the_tokens(self):
        # The first pair decides the width of 6, the second the response width of 4: from the first's prompt, four
        # places on lie outside the tokens.
        pairs = [doubles.pair([[1, 2, 3, 4, 5]] * 2, [[6], [7]]), doubles.pair([[1], [2]], [[3, 4, 5, 6], [7]])]
        width, response_width = batch_widths(pairs, round_to=1, eos_id=None)
        assert (width, response_width) == (6, 4)
        expected = np.stack([doubles.pair_logps(PARAMS, one, normalize="sum") for one in pairs])
        np.testing.assert_allclose(logps_of(pairs, width=width, response_width=response_width), expected, **TOLERANCE)

    def test_refuses_a_batch_whose_parts_do_not_belong_together(self):
        batch = make_batch(PAIRS, width=9, response_width=4, eos_id=None)
        for broken in (
            batch._replace(prompt_lengths=batch.prompt_lengths[:2]),
            batch._replace(targets=batch.targets[:, :1]),
            batch._replace(target_mask=batch.target_mask[..., :3]),
        ):
            with pytest.raises(AssertionError):
                response_logits(doubles.MODEL, PARAMS, broken)


class TestScorePairs:
    @pytest.mark.parametrize("rows", [1, 2, 5, 8])
    def test_any_batch_size_gives_every_pair_once_in_order(self, rows):
        expected = np.stack([doubles.pair_logps(PARAMS, one, normalize="mean") for one in PAIRS])
        actual = scored(PAIRS, rows=rows)
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, **TOLERANCE)

    def test_sum_and_mean_differ_as_they_should(self):
        expected = np.stack([doubles.pair_logps(PARAMS, one, normalize="sum") for one in PAIRS])
        np.testing.assert_allclose(scored(PAIRS, rows=2, normalize="sum"), expected, **TOLERANCE)

    def test_says_how_many_queries_are_done(self):
        seen: list[int] = []
        scored(PAIRS, rows=2, seen=seen.append)
        assert seen == [2, 4, 5]

    def test_batches_of_one_shape_share_a_trace(self):
        model = doubles.MODEL._replace(hidden=chex.assert_max_traces(doubles.hidden, n=1))
        for seed in range(3):
            batch = make_batch(doubles.random_pairs(2, vocab=VOCAB, seed=seed), width=12, response_width=6, eos_id=None)
            contrastive_logps(model, PARAMS, batch, normalize="mean")

    def test_a_batch_split_over_devices_has_the_same_logps(self):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        params = jax.device_put(PARAMS, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        actual = score_pairs(
            doubles.MODEL,
            params,
            PAIRS,
            normalize="mean",
            rows=4,
            round_to=4,
            sharding=sharding,
            scored=lambda done: None,
        )
        # The same sums of exact logits on other devices; only the log-softmax rounds.
        np.testing.assert_allclose(actual, scored(PAIRS, rows=4), rtol=1e-6)
