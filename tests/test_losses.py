"""The loss against arithmetic done by hand, numpy in float64, its invariances, its gradients and its edges."""

import functools
import hashlib
import itertools
import json
import math
import pathlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from jax.test_util import check_grads

from sami_jax import losses

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "losses.json"

# float32 rounds at 6e-8 relative; sums of a few dozen terms of size 1 lose a few of these. References are float64.
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
# Central differences with a step of 1e-2 along a random direction: float32 rounding of a value of size 4 leaves
# 2e-7 / 1e-2 = 2e-5, and the third derivative, of size 1, 1e-4; a direction has up to 66 entries, hence the margin.
# Not chex.assert_numerical_grads, which multiplies the tolerance by their number and mocks stop_gradient away.
assert_numerical_grads = functools.partial(check_grads, order=1, modes=["rev"], eps=1e-2, atol=1e-3, rtol=1e-3)

jit_and_eager: Any = chex.variants(with_jit=True, without_jit=True)

SIZES = tuple((size,) for size in range(2, 9))


class LossTestCase(chex.TestCase):
    variant: Any  # chex types it as a method that never returns


def np_log_softmax(x: np.ndarray, axis: int) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(axis=axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=axis, keepdims=True))


def random_logps(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, size]).normal(-3.0, 1.5, (size, size)).astype(np.float32)


def random_response(tokens: int = 6, vocab: int = 11) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng([tokens, vocab])
    logits = rng.normal(0.0, 2.0, (tokens, vocab)).astype(np.float32)
    targets = rng.integers(0, vocab, tokens).astype(np.int32)
    return logits, targets, np.arange(tokens) >= 2  # two prompt tokens, then the response


class TokenLogpsTest(LossTestCase):
    @jit_and_eager
    def test_by_hand(self):
        # Rows are log-probabilities shifted by 5 and by -7: log-softmax takes the shift off again.
        logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])) + jnp.array([[5.0], [-7.0]])
        actual = self.variant(losses.token_logps)(logits, jnp.array([1, 2]))
        assert_close(actual, [math.log(0.25), math.log(0.7)])

    @jit_and_eager
    def test_numpy_reference(self):
        logits, targets, _ = random_response(tokens=20, vocab=300)
        expected = np_log_softmax(logits, axis=1)[np.arange(20), targets]
        assert_close(self.variant(losses.token_logps)(logits, targets), expected)

    @jit_and_eager
    def test_a_shift_per_position_changes_nothing(self):
        rng = np.random.default_rng(0)
        logits = rng.integers(-9, 9, (5, 7)).astype(np.float32)  # integers: the shifted logits are exact
        targets = rng.integers(0, 7, 5)
        shifted = logits + np.array([[1024], [-1024], [0], [7], [65536]], np.float32)
        token_logps = self.variant(losses.token_logps)
        np.testing.assert_array_equal(token_logps(logits, targets), token_logps(shifted, targets))

    @jit_and_eager
    def test_ids_outside_the_vocabulary_are_nan_and_only_those(self):
        logits, _, _ = random_response(tokens=5, vocab=200)  # a vocabulary in which -100, wrapped, would be a token
        actual = self.variant(losses.token_logps)(logits, jnp.array([3, -100, -1, 200, 199]))
        np.testing.assert_array_equal(np.isnan(actual), [False, True, True, True, False])

    @jit_and_eager
    def test_gradient_is_onehot_minus_softmax(self):
        logits, targets, _ = random_response()
        actual = self.variant(jax.grad(lambda x: jnp.sum(losses.token_logps(x, jnp.asarray(targets)))))(logits)
        expected = np.eye(11)[targets] - np.exp(np_log_softmax(logits, axis=1))
        assert_close(actual, expected)

    @jit_and_eager
    def test_bfloat16_logits_are_normalised_in_float32(self):
        logits, targets, _ = random_response()
        logits = jnp.asarray(logits, jnp.bfloat16)
        token_logps = self.variant(losses.token_logps)
        actual = token_logps(logits, targets)
        self.assertEqual(actual.dtype, jnp.float32)
        np.testing.assert_array_equal(actual, token_logps(logits.astype(jnp.float32), targets))

    @jit_and_eager
    def test_refuses_wrong_shapes_and_types(self):
        token_logps = self.variant(losses.token_logps)
        for logits, targets in (
            (jnp.zeros((4, 3)), jnp.zeros(3, jnp.int32)),  # targets not shifted along with the logits
            (jnp.zeros((1, 4, 3)), jnp.zeros((1, 4), jnp.int32)),  # a batch where one query belongs
            (jnp.zeros((4, 3)), jnp.zeros(4)),
            (jnp.zeros((4, 3), jnp.int32), jnp.zeros(4, jnp.int32)),
        ):
            with self.assertRaises(AssertionError):
                token_logps(logits, targets)


class SequenceLogpsTest(LossTestCase):
    # Powers of two: any other set of tokens has another sum.
    @jit_and_eager
    @parameterized.parameters(("sum", -2.0 - 4.0), ("mean", (-2.0 - 4.0) / 2))
    def test_by_hand(self, normalize, expected):
        mask = jnp.array([False, True, True, False])
        actual = self.variant(functools.partial(losses.sequence_logps, normalize=normalize))(
            jnp.array([-1.0, -2.0, -4.0, -8.0]), mask
        )
        self.assertEqual(actual, expected)

    @jit_and_eager
    @parameterized.parameters("sum", "mean")
    def test_numpy_reference(self, normalize):
        rng = np.random.default_rng(0)
        token_logps = -rng.exponential(1.0, 30).astype(np.float32)
        mask = rng.random(30) < 0.6
        actual = self.variant(functools.partial(losses.sequence_logps, normalize=normalize))(token_logps, mask)
        expected = getattr(np, normalize)(token_logps[mask].astype(np.float64))
        assert_close(actual, expected)

    @jit_and_eager
    @parameterized.product(normalize=("sum", "mean"), padding=(math.nan, math.inf, -math.inf, -5.0))
    def test_padding_changes_neither_value_nor_gradient(self, normalize, padding):
        token_logps = np.array([-0.5, -1.25, -3.0], np.float32)
        value_and_grad = self.variant(jax.value_and_grad(functools.partial(losses.sequence_logps, normalize=normalize)))
        value, gradient = value_and_grad(token_logps, np.ones(3, np.bool_))
        padded = np.full(8, padding, np.float32)
        padded[1:4] = token_logps
        padded_value, padded_gradient = value_and_grad(padded, np.isin(np.arange(8), [1, 2, 3]))
        self.assertEqual(padded_value, value)
        np.testing.assert_array_equal(padded_gradient, np.pad(gradient, (1, 4)))

    @jit_and_eager
    @parameterized.parameters(("sum", 1.0), ("mean", 0.25))
    def test_gradient_by_hand(self, normalize, per_token):
        mask = jnp.array([False, True, True, True, True, False])
        gradient = self.variant(jax.grad(functools.partial(losses.sequence_logps, normalize=normalize)))(
            -jnp.arange(6.0), mask
        )
        np.testing.assert_array_equal(gradient, [0.0, per_token, per_token, per_token, per_token, 0.0])

    @jit_and_eager
    @parameterized.product(normalize=("sum", "mean"), padding=(-1.0, math.nan))
    def test_no_tokens_give_zero_and_zero_gradient(self, normalize, padding):
        value, gradient = self.variant(
            jax.value_and_grad(functools.partial(losses.sequence_logps, normalize=normalize))
        )(jnp.full(4, padding), jnp.zeros(4, jnp.bool_))
        self.assertEqual(value, 0.0)
        np.testing.assert_array_equal(gradient, np.zeros(4))

    @jit_and_eager
    @parameterized.parameters("sum", "mean")
    def test_a_counted_nan_is_not_hidden(self, normalize):
        value = self.variant(functools.partial(losses.sequence_logps, normalize=normalize))(
            jnp.array([-1.0, math.nan]), jnp.array([True, True])
        )
        self.assertTrue(np.isnan(value))

    @jit_and_eager
    def test_bfloat16_is_summed_in_float32(self):
        # 257 lies between two bfloat16 numbers (256 and 258), so a sum or a result in bfloat16 cannot give it.
        value = self.variant(functools.partial(losses.sequence_logps, normalize="sum"))(
            -jnp.ones(257, jnp.bfloat16), jnp.ones(257, jnp.bool_)
        )
        self.assertEqual(value.dtype, jnp.float32)
        self.assertEqual(value, -257.0)

    @jit_and_eager
    def test_unknown_normalize_names_the_choices(self):
        misspelt: Any = "average"
        with self.assertRaisesRegex(ValueError, '"mean" or "sum", got \'average\''):
            self.variant(functools.partial(losses.sequence_logps, normalize=misspelt))(
                jnp.zeros(2), jnp.ones(2, jnp.bool_)
            )

    @jit_and_eager
    def test_refuses_wrong_shapes_and_types(self):
        sequence_logps = self.variant(functools.partial(losses.sequence_logps, normalize="sum"))
        for token_logps, mask in (
            (jnp.zeros(3), jnp.ones(4, jnp.bool_)),
            (jnp.zeros(3), jnp.ones(3)),  # a float mask would silently be a weight
            (jnp.zeros((2, 3)), jnp.ones((2, 3), jnp.bool_)),
        ):
            with self.assertRaises(AssertionError):
                sequence_logps(token_logps, mask)


class SamiLossTest(LossTestCase):
    @jit_and_eager
    def test_by_hand(self):
        logps = jnp.log(jnp.array([[0.6, 0.2], [0.3, 0.3]]))
        actual = self.variant(losses.sami_loss)(logps)
        # Over responses, along the rows:          0.6 / (0.6 + 0.2) = 3/4,  0.3 / (0.3 + 0.3) = 1/2.
        over_responses = -(math.log(3 / 4) + math.log(1 / 2)) / 2
        # Over constitutions, down the columns:    0.6 / (0.6 + 0.3) = 2/3,  0.3 / (0.2 + 0.3) = 3/5.
        over_constitutions = -(math.log(2 / 3) + math.log(3 / 5)) / 2
        assert_close(actual.over_responses, over_responses)
        assert_close(actual.over_constitutions, over_constitutions)
        assert_close(actual.loss, (over_responses + over_constitutions) / 2)

    @jit_and_eager
    @parameterized.parameters(*SIZES)
    def test_numpy_reference(self, size):
        logps = random_logps(size)
        actual = self.variant(losses.sami_loss)(logps)
        over_responses = -np.mean(np.diag(np_log_softmax(logps, axis=1)))
        over_constitutions = -np.mean(np.diag(np_log_softmax(logps, axis=0)))
        expected = [(over_responses + over_constitutions) / 2, over_responses, over_constitutions]
        assert_close(actual, expected)

    @jit_and_eager
    @parameterized.parameters(*SIZES)
    def test_transposing_swaps_the_sides(self, size):
        logps = random_logps(size)
        sami_loss = self.variant(losses.sami_loss)
        straight, transposed = sami_loss(logps), sami_loss(logps.T)
        assert_close(transposed.over_responses, straight.over_constitutions)
        assert_close(transposed.over_constitutions, straight.over_responses)
        assert_close(transposed.loss, straight.loss)

    @jit_and_eager
    @parameterized.parameters(*SIZES)
    def test_a_constant_per_row_or_column_leaves_one_side_as_it_is(self, size):
        logps = random_logps(size)
        shift = np.linspace(-8.0, 5.0, size, dtype=np.float32)
        sami_loss = self.variant(losses.sami_loss)
        plain = sami_loss(logps)
        per_constitution = sami_loss(logps + shift[:, None])  # some constitutions make every response likelier
        per_response = sami_loss(logps + shift[None, :])  # some responses are likelier under every constitution
        # The shifted entries are rounded at size 10, half a unit in the last place being 5e-7.
        np.testing.assert_allclose(per_constitution.over_responses, plain.over_responses, rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(per_response.over_constitutions, plain.over_constitutions, rtol=2e-6, atol=2e-6)
        self.assertGreater(abs(per_constitution.over_constitutions - plain.over_constitutions), 0.1)
        self.assertGreater(abs(per_response.over_responses - plain.over_responses), 0.1)

    @jit_and_eager
    @parameterized.parameters(*SIZES)
    def test_renaming_the_constitutions_changes_nothing(self, size):
        logps = random_logps(size)
        order = np.roll(np.arange(size), 1)
        sami_loss = self.variant(losses.sami_loss)
        assert_close(sami_loss(logps[order][:, order]), sami_loss(logps))

    @jit_and_eager
    @parameterized.parameters(*SIZES)
    def test_chance_is_log_c_and_certainty_is_zero(self, size):
        sami_loss = self.variant(losses.sami_loss)
        assert_close(sami_loss(jnp.full((size, size), -2.5)), [math.log(size)] * 3)
        # Sums of log-probabilities over hundreds of tokens: exp(-500) underflows, the loss must not.
        assert_close(sami_loss(500.0 * jnp.eye(size) - 900.0), [0.0] * 3)
        # Surely wrong: each positive loses to size - 1 equal negatives by 500 nats, 500 + log(size - 1).
        wrong = [500.0 + math.log(size - 1)] * 3
        assert_close(sami_loss(-500.0 * jnp.eye(size) - 900.0), wrong)

    @jit_and_eager
    @parameterized.parameters((1.0, 0.0), (0.0, 1.0), (0.25, 2.0))
    def test_weights_weigh_the_side_they_name(self, over_responses_weight, over_constitutions_weight):
        actual = self.variant(
            functools.partial(
                losses.sami_loss,
                over_responses_weight=over_responses_weight,
                over_constitutions_weight=over_constitutions_weight,
            )
        )(random_logps(3))
        expected = over_responses_weight * actual.over_responses + over_constitutions_weight * actual.over_constitutions
        self.assertGreater(abs(actual.over_responses - actual.over_constitutions), 0.01)
        assert_close(actual.loss, expected)

    @jit_and_eager
    @parameterized.parameters(*SIZES)
    def test_gradient_reaches_every_cell(self, size):
        logps = random_logps(size)
        actual = self.variant(jax.grad(lambda x: losses.sami_loss(x).loss))(logps)
        # Each side's gradient is (softmax - onehot) / C, and each side counts half.
        softmaxes = np.exp(np_log_softmax(logps, axis=1)) + np.exp(np_log_softmax(logps, axis=0))
        assert_close(actual, (softmaxes / 2 - np.eye(size)) / size)
        self.assertTrue(np.all(actual != 0.0))

    @jit_and_eager
    @parameterized.parameters(*SIZES)
    def test_gradient_numerically(self, size):
        loss = self.variant(lambda x: losses.sami_loss(x).loss)
        assert_numerical_grads(loss, (jnp.asarray(random_logps(size)),))

    @jit_and_eager
    def test_bfloat16_is_reduced_in_float32(self):
        logps = jnp.asarray(random_logps(5), jnp.bfloat16)
        sami_loss = self.variant(losses.sami_loss)
        actual = sami_loss(logps)
        chex.assert_type(list(actual), jnp.float32)
        np.testing.assert_array_equal(actual, sami_loss(logps.astype(jnp.float32)))

    @jit_and_eager
    def test_a_nan_is_not_hidden(self):
        actual = self.variant(losses.sami_loss)(jnp.array([[-1.0, -2.0], [math.nan, -1.0]]))
        np.testing.assert_array_equal(np.isnan(actual), [True, True, True])

    @jit_and_eager
    def test_contrast_functions_refuse_what_is_not_a_square_float_matrix(self):
        for function in (losses.sami_loss, losses.mi_lower_bound, losses.contrast_accuracies):
            for logps in (
                jnp.zeros((2, 3)),
                jnp.zeros((1, 1)),  # would be a loss of 0: perfect, and meaningless
                jnp.zeros((4, 2, 2)),
                jnp.zeros((2, 2), jnp.int32),
            ):
                with self.assertRaises(AssertionError):
                    self.variant(function)(logps)

    @jit_and_eager
    @parameterized.parameters("sum", "mean")
    def test_only_response_tokens_receive_a_gradient(self, normalize):
        rng = np.random.default_rng(0)
        logits = rng.normal(0.0, 1.0, (2, 2, 6, 9)).astype(np.float32)  # [C, R, T, V]
        targets = jnp.asarray(rng.integers(0, 9, (2, 6)))  # [R, T]
        targets = targets.at[:, :2].set(-100).at[1, 5:].set(-100)  # what torch collators write where nothing counts
        mask = targets >= 0

        def loss(logits):
            token_logps = jax.vmap(jax.vmap(losses.token_logps), in_axes=(0, None))(logits, targets)
            sequence_logps = functools.partial(losses.sequence_logps, normalize=normalize)
            logps = jax.vmap(jax.vmap(sequence_logps), in_axes=(0, None))(token_logps, mask)
            return losses.sami_loss(logps).loss

        gradient = np.asarray(self.variant(jax.grad(loss))(logits))
        reached = np.any(gradient != 0.0, axis=-1)  # [C, R, T]
        np.testing.assert_array_equal(reached, np.broadcast_to(mask, reached.shape))
        self.assertTrue(np.all(np.isfinite(gradient)))


def mean_over_outputs(score, critic: np.ndarray, channel: np.ndarray) -> float:
    """Averages a score of logps over all outputs of a channel p(y | c), one response per constitution: exact.

    Args:
      score: logps [C, R] -> [].
      critic: [C, Y], the scores of each output under each constitution that stand in for log p(y | c).
      channel: [C, Y], the true p(y | c).
    """
    size, outputs = channel.shape
    responses = np.array(list(itertools.product(range(outputs), repeat=size)))  # [Y^C, R]
    probs = np.prod(channel[np.arange(size), responses].astype(np.float64), axis=1)
    logps = np.stack([critic[:, response] for response in responses]).astype(np.float32)  # [Y^C, C, R]
    return float(np.sum(probs * np.asarray(jax.vmap(score)(logps), np.float64)))


def mutual_information(channel: np.ndarray) -> float:
    marginal = channel.mean(axis=0)
    return float(np.mean(np.sum(channel * np.log(channel / marginal), axis=1)))


def random_channel(size: int, outputs: int = 3) -> np.ndarray:
    return np.random.default_rng(size).dirichlet(np.ones(outputs), size)


class MutualInformationTest(LossTestCase):
    @jit_and_eager
    def test_by_hand(self):
        logps = jnp.log(jnp.array([[0.6, 0.2], [0.3, 0.3]]))
        # Down the columns: 0.6 / 0.9 = 2/3 and 0.3 / 0.5 = 3/5.
        expected = math.log(2) + (math.log(2 / 3) + math.log(3 / 5)) / 2
        assert_close(self.variant(losses.mi_lower_bound)(logps), expected)

    @jit_and_eager
    @parameterized.parameters(*SIZES)
    def test_ceiling_chance_and_no_floor(self, size):
        mi_lower_bound = self.variant(losses.mi_lower_bound)
        assert_close(mi_lower_bound(500.0 * jnp.eye(size)), math.log(size))
        # A model that ignores its constitution: equal rows, whatever the responses' own log-probabilities.
        assert_close(mi_lower_bound(jnp.tile(-jnp.arange(1.0, size + 1), (size, 1))), 0.0)
        self.assertLess(mi_lower_bound(-10.0 * jnp.eye(size)), -5.0)

    @jit_and_eager
    @parameterized.parameters(*SIZES)
    def test_is_log_c_minus_the_loss_over_constitutions(self, size):
        logps = random_logps(size)
        expected = math.log(size) - self.variant(losses.sami_loss)(logps).over_constitutions
        assert_close(losses.mi_lower_bound(jnp.asarray(logps)), expected)

    def test_binary_channel(self):
        channel = np.array([[0.9, 0.1], [0.1, 0.9]])  # a fair constitution bit, flipped with probability 0.1
        critic = np.log(channel)
        # I = log 2 - H(0.1)
        information = math.log(2) + 0.1 * math.log(0.1) + 0.9 * math.log(0.9)
        self.assertAlmostEqual(information, 0.368, places=3)
        self.assertAlmostEqual(mutual_information(channel), information, places=12)
        bound = mean_over_outputs(losses.mi_lower_bound, critic, channel)
        assert_close(bound, information)

        # Over responses: 0.81 both as meant, each row 0.9 : 0.1; 0.01 both flipped, 0.1 : 0.9; 0.18 equal, 1 : 1.
        contrast = math.log(2) + 0.81 * math.log(0.9) + 0.01 * math.log(0.1) + 0.18 * math.log(0.5)
        self.assertAlmostEqual(contrast, 0.460, places=3)
        over_responses = mean_over_outputs(lambda x: losses.sami_loss(x).over_responses, critic, channel)
        assert_close(math.log(2) - over_responses, contrast)
        self.assertGreater(contrast, information)  # why that side is no bound

    @parameterized.parameters(2, 3, 4)
    def test_true_log_probabilities_reach_the_information(self, size):
        channel = random_channel(size)
        bound = mean_over_outputs(losses.mi_lower_bound, np.log(channel), channel)
        assert_close(bound, mutual_information(channel))

    @parameterized.product(size=(2, 3, 4), seed=(0, 1, 2, 3, 4))
    def test_no_critic_exceeds_the_information(self, size, seed):
        channel = random_channel(size)
        noise = np.random.default_rng([seed, size]).normal(0.0, 1.0, channel.shape)
        for critic in (noise, np.log(channel) + 0.3 * noise, np.log(channel) / 7.0, np.log(channel) * 2.0):
            bound = mean_over_outputs(losses.mi_lower_bound, critic, channel)
            self.assertLess(bound, mutual_information(channel))


class ContrastAccuraciesTest(LossTestCase):
    @jit_and_eager
    def test_by_hand(self):
        logps = jnp.array(
            [
                [-2.0, -1.0, -9.0],  # wrong: -1 beats -2
                [-3.0, -0.5, -8.0],  # right
                [-4.0, -7.0, -6.0],  # wrong: -4 beats -6
            ]
        )  # columns: -2 right, -0.5 right, -6 right
        actual = self.variant(losses.contrast_accuracies)(logps)
        assert_close(actual, [1 / 3, 1.0])

    @jit_and_eager
    @parameterized.parameters(*SIZES)
    def test_numpy_reference(self, size):
        logps = random_logps(size)
        hits = np.arange(size)  # no ties in random numbers, so argmax will do
        over_responses = np.mean(logps.argmax(axis=1) == hits)
        over_constitutions = np.mean(logps.argmax(axis=0) == hits)
        contrast_accuracies = self.variant(losses.contrast_accuracies)
        assert_close(contrast_accuracies(logps), [over_responses, over_constitutions])
        assert_close(contrast_accuracies(logps.T), [over_constitutions, over_responses])

    @jit_and_eager
    @parameterized.parameters(*SIZES)
    def test_a_tie_is_not_right(self, size):
        contrast_accuracies = self.variant(losses.contrast_accuracies)
        self.assertEqual(contrast_accuracies(jnp.full((size, size), -1.5)), (0.0, 0.0))
        self.assertEqual(contrast_accuracies(jnp.full((size, size), -jnp.inf)), (0.0, 0.0))
        self.assertEqual(contrast_accuracies(jnp.eye(size)), (1.0, 1.0))
        one_tie = jnp.eye(size).at[0, size - 1].set(1.0)  # ties in the first row and in the last column
        assert_close(contrast_accuracies(one_tie), [1 - 1 / size] * 2)

    @jit_and_eager
    def test_a_nan_is_not_a_wrong_answer(self):
        actual = self.variant(losses.contrast_accuracies)(jnp.array([[-1.0, -2.0], [math.nan, -1.0]]))
        np.testing.assert_array_equal(np.isnan(actual), [True, True])

    @jit_and_eager
    def test_bfloat16_gives_float32(self):
        chex.assert_type(list(self.variant(losses.contrast_accuracies)(jnp.eye(3, dtype=jnp.bfloat16))), jnp.float32)


class ResponseKlTest(LossTestCase):
    @jit_and_eager
    def test_by_hand(self):
        policy = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1], [0.5, 0.5]])) + 3.0
        reference = jnp.log(jnp.array([[0.25, 0.75], [0.9, 0.1], [0.01, 0.99]])) - 4.0
        actual = self.variant(losses.response_kl)(policy, reference, jnp.array([True, True, False]))
        # Token 0: 1/2 log(1/2 : 1/4) + 1/2 log(1/2 : 3/4); token 1: equal, 0; token 2: not counted.
        expected = (0.5 * math.log(2) + 0.5 * math.log(2 / 3) + 0.0) / 2
        assert_close(actual, expected)

    @jit_and_eager
    def test_numpy_reference(self):
        policy, _, mask = random_response()
        reference = policy + np.random.default_rng(1).normal(0.0, 1.0, policy.shape).astype(np.float32)
        log_p, log_q = np_log_softmax(policy, axis=1), np_log_softmax(reference, axis=1)
        expected = np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=1)[mask])
        assert_close(self.variant(losses.response_kl)(policy, reference, mask), expected)

    @jit_and_eager
    @parameterized.parameters(0.0, 1e-3, 0.1, 10.0)
    def test_is_not_negative_and_zero_for_equal_models(self, difference):
        policy, _, mask = random_response(tokens=8, vocab=500)
        reference = policy + difference * np.random.default_rng(2).normal(0.0, 1.0, policy.shape).astype(np.float32)
        actual = self.variant(losses.response_kl)(policy, reference, mask)
        self.assertGreaterEqual(actual, -1e-6)  # rounding of 500 terms that nearly cancel
        if difference == 0.0:
            self.assertEqual(actual, 0.0)

    @jit_and_eager
    def test_gradient_numerically_and_through_the_policy_only(self):
        policy, _, mask = random_response()
        reference = np.roll(policy, 1, axis=1)
        response_kl = self.variant(losses.response_kl)
        assert_numerical_grads(lambda x: response_kl(x, reference, mask), (jnp.asarray(policy),))
        gradient = jax.grad(response_kl, argnums=1)(policy, reference, mask)
        np.testing.assert_array_equal(gradient, np.zeros_like(reference))

    @jit_and_eager
    @parameterized.parameters(math.nan, math.inf, -math.inf, 4.0)
    def test_padding_changes_neither_value_nor_gradient(self, padding):
        policy, _, mask = random_response()
        reference = np.roll(policy, 1, axis=1)
        value_and_grad = self.variant(jax.value_and_grad(losses.response_kl))
        value, gradient = value_and_grad(policy[mask], reference[mask], mask[mask])
        policy, reference = (np.where(mask[:, None], x, np.float32(padding)) for x in (policy, reference))
        padded_value, padded_gradient = value_and_grad(policy, reference, mask)
        assert_close(padded_value, value)
        assert_close(padded_gradient[mask], gradient)
        np.testing.assert_array_equal(padded_gradient[~mask], 0.0)

    @jit_and_eager
    @parameterized.parameters(1.0, math.nan)
    def test_no_tokens_give_zero_and_zero_gradient(self, padding):
        value, gradient = self.variant(jax.value_and_grad(losses.response_kl))(
            jnp.full((3, 4), padding), jnp.zeros((3, 4)), jnp.zeros(3, jnp.bool_)
        )
        self.assertEqual(value, 0.0)
        np.testing.assert_array_equal(gradient, np.zeros((3, 4)))

    @jit_and_eager
    def test_tokens_that_are_ruled_out(self):
        value_and_grad = self.variant(jax.value_and_grad(losses.response_kl))
        narrow, wide, mask = jnp.array([[0.0, 0.0, -jnp.inf]]), jnp.zeros((1, 3)), jnp.array([True])
        value, gradient = value_and_grad(narrow, wide, mask)
        assert_close(value, math.log(3 / 2))  # two halves against two thirds
        assert_close(gradient, np.zeros((1, 3)))
        self.assertEqual(value_and_grad(wide, narrow, mask)[0], math.inf)
        value, gradient = value_and_grad(narrow, narrow, mask)  # both rule it out, as a shared logit mask does
        self.assertEqual(value, 0.0)
        np.testing.assert_array_equal(gradient, np.zeros((1, 3)))

    @jit_and_eager
    def test_bfloat16_logits_are_normalised_in_float32(self):
        policy, _, mask = random_response()
        policy = jnp.asarray(policy, jnp.bfloat16)
        reference = jnp.roll(policy, 1, axis=1)
        response_kl = self.variant(losses.response_kl)
        actual = response_kl(policy, reference, mask)
        self.assertEqual(actual.dtype, jnp.float32)
        self.assertEqual(actual, response_kl(policy.astype(jnp.float32), reference.astype(jnp.float32), mask))

    @jit_and_eager
    def test_refuses_wrong_shapes_and_types(self):
        response_kl = self.variant(losses.response_kl)
        for policy, reference, mask in (
            (jnp.zeros((4, 3)), jnp.zeros((4, 5)), jnp.ones(4, jnp.bool_)),
            (jnp.zeros((4, 3)), jnp.zeros((4, 3)), jnp.ones(3, jnp.bool_)),
            (jnp.zeros((4, 3)), jnp.zeros((4, 3)), jnp.ones(4)),
        ):
            with self.assertRaises(AssertionError):
                response_kl(policy, reference, mask)


class BatchingTest(LossTestCase):
    @jit_and_eager
    @parameterized.parameters(*SIZES)
    def test_vmapped_equals_looped_over_matrices(self, size):
        batch = np.stack([random_logps(size, seed) for seed in range(4)])  # [B, C, R]
        for function in (losses.sami_loss, losses.mi_lower_bound, losses.contrast_accuracies):
            looped = jax.tree.map(lambda *xs: np.stack(xs), *[function(logps) for logps in batch])
            chex.assert_trees_all_close(self.variant(jax.vmap(function))(batch), looped, rtol=1e-6, atol=1e-6)

    @jit_and_eager
    def test_vmapped_equals_looped_over_responses(self):
        rng = np.random.default_rng(0)
        logits = rng.normal(0.0, 1.0, (4, 5, 7)).astype(np.float32)
        reference = np.roll(logits, 1, axis=0)
        targets = rng.integers(0, 7, (4, 5))
        mask = np.arange(5) < np.array([[5], [1], [0], [3]])  # ragged, one of them empty

        def mean_logps_and_kl(logits, reference, targets, mask):
            logps = losses.sequence_logps(losses.token_logps(logits, targets), mask, normalize="mean")
            return logps, losses.response_kl(logits, reference, mask)

        batch = (logits, reference, targets, mask)
        looped = [mean_logps_and_kl(*(x[i] for x in batch)) for i in range(4)]
        actual = self.variant(jax.vmap(mean_logps_and_kl))(*batch)
        assert_close(np.stack(actual, axis=1), np.array(looped))
        self.assertEqual((actual[0][2], actual[1][2]), (0.0, 0.0))


class GoldensTest(LossTestCase):
    """Against numbers that torch computed in float64 (tests/goldens/make_losses.py); needs no torch."""

    def test_are_those_of_the_script(self):
        script = GOLDENS.with_name("make_losses.py").read_bytes()
        self.assertEqual(json.loads(GOLDENS.read_text())["script"], hashlib.sha256(script).hexdigest())

    @jit_and_eager
    def test_contrast(self):
        cases = json.loads(GOLDENS.read_text())["contrast"]
        self.assertEqual([len(case["logps"]) for case in cases], list(range(2, 9)))
        for case in cases:
            logps = np.array(case["logps"], np.float32)
            actual = self.variant(losses.sami_loss)(logps)
            expected = [case["loss"], case["over_responses"], case["over_constitutions"]]
            assert_close(actual, expected)
            gradient = self.variant(jax.grad(lambda x: losses.sami_loss(x).loss))(logps)
            assert_close(gradient, case["gradient"])

    @jit_and_eager
    def test_response(self):
        case = json.loads(GOLDENS.read_text())["response"]
        logits, reference = np.array(case["logits"], np.float32), np.array(case["reference_logits"], np.float32)
        targets, mask = np.array(case["targets"], np.int32), np.array(case["mask"], np.bool_)
        token_logps = self.variant(losses.token_logps)(logits, targets)
        assert_close(token_logps, case["token_logps"])
        for normalize in ("mean", "sum"):
            actual = self.variant(functools.partial(losses.sequence_logps, normalize=normalize))(token_logps, mask)
            assert_close(actual, case[f"{normalize}_logps"])
        assert_close(self.variant(losses.response_kl)(logits, reference, mask), case["kl"])
