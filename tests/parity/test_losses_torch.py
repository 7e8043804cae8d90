"""The loss against torch, live: values and gradients, in the formulation of the authors' code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sami_jax import losses

# Both sides compute in float32, which rounds at 6e-8 relative; the orders of summation differ.
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)

SIZES = range(2, 9)
# Nats per token, and sums over hundreds of tokens: there the entries themselves are rounded at 1e-5, alike for both.
MEANS_AND_SUMS = ((-2.0, 0.5), (-300.0, 20.0))


def random_logps(size: int, location: float, scale: float) -> np.ndarray:
    return np.random.default_rng(size).normal(location, scale, (size, size)).astype(np.float32)


def random_response(tokens: int = 12, vocab: int = 50) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng([tokens, vocab])
    logits = rng.normal(0.0, 3.0, (tokens, vocab)).astype(np.float32)
    mask = (np.arange(tokens) >= 3) & (np.arange(tokens) < tokens - 2)  # prompt, response, padding
    return logits, rng.integers(0, vocab, tokens), mask


@pytest.mark.parametrize("location, scale", MEANS_AND_SUMS)
@pytest.mark.parametrize("size", SIZES)
def test_sami_loss_and_gradient(size, location, scale):
    inputs = random_logps(size, location, scale)
    logps = torch.tensor(inputs, requires_grad=True)
    positives = torch.arange(size)
    over_responses = F.cross_entropy(logps, positives)
    over_constitutions = F.cross_entropy(logps.T, positives)
    loss = (over_responses + over_constitutions) / 2
    (gradient,) = torch.autograd.grad(loss, logps)

    actual = losses.sami_loss(jnp.asarray(inputs))
    expected = [loss.item(), over_responses.item(), over_constitutions.item()]
    assert_close(actual, expected)
    actual_gradient = jax.grad(lambda x: losses.sami_loss(x).loss)(jnp.asarray(inputs))
    assert_close(actual_gradient, gradient)


@pytest.mark.parametrize("size", SIZES)
def test_one_sided_gradients(size):
    inputs = random_logps(size, -2.0, 0.5)
    logps = torch.tensor(inputs, requires_grad=True)
    for side, matrix in (("over_responses", logps), ("over_constitutions", logps.T)):
        (expected,) = torch.autograd.grad(F.cross_entropy(matrix, torch.arange(size)), logps)
        weights = {"over_responses_weight": 0.0, "over_constitutions_weight": 0.0, f"{side}_weight": 1.0}
        loss = functools.partial(losses.sami_loss, **weights)
        actual = jax.grad(lambda x, loss=loss: loss(x).loss)(jnp.asarray(inputs))
        assert_close(actual, expected)


def test_token_logps():
    logits, targets, _ = random_response()
    expected = torch.tensor(logits).log_softmax(-1).gather(-1, torch.tensor(targets)[:, None])[:, 0]
    actual = losses.token_logps(jnp.asarray(logits), jnp.asarray(targets))
    assert_close(actual, expected)


@pytest.mark.parametrize("normalize", ["mean", "sum"])
def test_sequence_logps_and_gradient(normalize):
    inputs, targets, mask = random_response()
    logits = torch.tensor(inputs, requires_grad=True)
    # Torch marks what does not count with its ignore label, -100, and leaves its cross-entropy at 0.
    labels = torch.tensor(np.where(mask, targets, -100))
    expected = -F.cross_entropy(logits, labels, reduction=normalize)
    (gradient,) = torch.autograd.grad(expected, logits)

    def sequence_logps(logits):
        token_logps = losses.token_logps(logits, jnp.asarray(labels.numpy()))
        return losses.sequence_logps(token_logps, jnp.asarray(mask), normalize=normalize)

    actual, actual_gradient = jax.value_and_grad(sequence_logps)(jnp.asarray(inputs))
    assert_close(actual, expected.item())
    assert_close(actual_gradient, gradient)


def test_response_kl_and_gradient():
    inputs, _, mask = random_response()
    reference_inputs = inputs + np.random.default_rng(7).normal(0.0, 1.0, inputs.shape).astype(np.float32)
    policy, reference = torch.tensor(inputs, requires_grad=True), torch.tensor(reference_inputs)
    # F.kl_div(a, b) is KL(b || a).
    kl = F.kl_div(reference.log_softmax(-1), policy.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    expected = kl[torch.tensor(mask)].mean()
    (gradient,) = torch.autograd.grad(expected, policy)

    actual, actual_gradient = jax.value_and_grad(losses.response_kl)(
        jnp.asarray(inputs), jnp.asarray(reference_inputs), jnp.asarray(mask)
    )
    assert_close(actual, expected.item())
    assert_close(actual_gradient, gradient)
