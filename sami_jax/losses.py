"""The SAMI objective and its diagnostics: arrays in, arrays out, one query per call.

Nothing here knows a model, a tokenizer or a device, so any JAX training stack can take this file alone (it needs jax
and chex). Every function speaks of ONE query; batch with `jax.vmap`. Axes: C constitutions, R responses, T tokens,
V vocab. Responses are in the order of the constitutions they were sampled under, so R = C and the diagonal of
`logps [C, R]` holds the positives. All logarithms are natural, all reductions run in float32 whatever comes in, and
masks are bool with True = counts. A NaN in anything that counts comes out as NaN: hiding it is no service.

Source: Fränken et al., "Self-Supervised Alignment with Mutual Information: Learning to Follow Principles without
Preference Labels", NeurIPS 2024, arXiv:2404.14313 ("the paper").
"""

from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp


class SamiLoss(NamedTuple):
    """The two-sided contrastive loss of one query and its two sides, in nats, lower is better, chance is log C."""

    loss: jax.Array  # []: weighted sum of the two sides; the one to differentiate
    over_responses: jax.Array  # []: cross-entropy of choosing a constitution's response among the R, mean over C
    over_constitutions: jax.Array  # []: cross-entropy of choosing a response's constitution among the C, mean over R


class ContrastAccuracies(NamedTuple):
    """How often the positive strictly beats all its negatives, each in [0, 1], or NaN where a log-probability is."""

    over_responses: jax.Array  # []: share of constitutions whose own response is the likeliest of the R
    over_constitutions: jax.Array  # []: share of responses whose own constitution makes them likeliest of the C


def token_logps(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Computes the log-probability of each target token, by log-softmax in float32.

    log p(target_t) = logits[t, target_t] - log sum_v exp(logits[t, v])

    The caller aligns them: logits[t] must be the prediction *for* targets[t], which for a causal decoder are the logits
    one position earlier.

    Args:
      logits: [T, V] any float dtype, unnormalised.
      targets: [T] int, token ids in [0, V). An id outside, such as torch's ignore label -100, yields NaN rather than
        the log-probability of some other token; where the mask of `sequence_logps` excludes it, it does no harm.

    Returns:
      [T] float32, nats.

    Raises:
      AssertionError: if ranks, lengths or dtypes are not those above.

    Source: the factorisation log p(y | x, c) = sum_t log p(y_t | x, c, y_<t) under the paper's equations.
    """
    chex.assert_rank([logits, targets], [2, 1])
    chex.assert_type([logits, targets], [float, int])
    chex.assert_equal_shape_prefix([logits, targets], 1)

    vocab_size = logits.shape[-1]
    targets = targets.astype(jnp.int32)
    # Indexing counts negative ids from the end; sent past the end instead, they meet the NaN of mode="fill".
    targets = jnp.where(targets < 0, vocab_size, targets)
    logps = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)  # [T, V]
    return jnp.take_along_axis(logps, targets[:, None], axis=-1, mode="fill", fill_value=jnp.nan)[:, 0]


def sequence_logps(token_logps: jax.Array, mask: jax.Array, *, normalize: Literal["mean", "sum"]) -> jax.Array:
    """Computes the log-probability of one response, as the sum or the mean over its counted tokens.

    sum:  sum_t mask_t token_logps_t              log p(y | x, c), as the paper's equations have it
    mean: (sum_t mask_t token_logps_t) / (sum_t mask_t)    as the authors' code has it; ours by default

    The two train differently: InfoNCE holds for any critic, and the mean is a looser one. Say which one a number used.

    A response of zero counted tokens gives exactly 0 with zero gradient. That keeps a padded batch finite and is NOT a
    log-probability that may enter a contrast (0 would be the likeliest response of all): the caller must refuse such
    responses before they get here.

    Whatever stands in masked-out positions, NaN and infinity included, reaches neither the value nor the gradient with
    respect to `token_logps`. It cannot undo a NaN made earlier: NaN *logits* still send NaN to the weights behind them.

    Args:
      token_logps: [T] any float dtype, nats.
      mask: [T] bool, True = a response token that counts. Prompt, constitution and padding are False.
      normalize: "mean" (nats per token) or "sum" (nats).

    Returns:
      [] float32, nats or nats per token.

    Raises:
      ValueError: if `normalize` is neither "mean" nor "sum".
      AssertionError: if ranks, lengths or dtypes are not those above.

    Source: the paper's log p(y | x, c) ("sum"); the authors' released code ("mean").
    """
    if normalize not in ("mean", "sum"):
        raise ValueError(f'normalize must be "mean" or "sum", got {normalize!r}.')
    chex.assert_rank([token_logps, mask], 1)
    chex.assert_type([token_logps, mask], [float, bool])
    chex.assert_equal_shape([token_logps, mask])

    total = _masked_sum(token_logps, mask)
    return total if normalize == "sum" else total / _at_least_one(mask)


def sami_loss(
    logps: jax.Array, *, over_responses_weight: float = 0.5, over_constitutions_weight: float = 0.5
) -> SamiLoss:
    """Computes the SAMI loss of one query: the two-sided InfoNCE cross-entropy of its log-probability matrix.

    over_responses     = -1/C sum_c log( exp logps[c, c] / sum_r exp logps[c, r] )
    over_constitutions = -1/C sum_r log( exp logps[r, r] / sum_c exp logps[c, r] )
    loss               = over_responses_weight * over_responses + over_constitutions_weight * over_constitutions

    Gradients flow through all C x C entries, negatives included. With weights of one half each, transposing `logps`
    leaves the loss as it is and swaps the sides; adding a constant to each row leaves over_responses as it is, adding
    one to each column over_constitutions.

    Args:
      logps: [C, R] any float dtype, R = C >= 2: log p(response r | query, constitution c), from `sequence_logps`.
        Response r was sampled under constitution r.
      over_responses_weight: weight of the side that compares responses; 0.5 is the paper's objective.
      over_constitutions_weight: weight of the side that compares constitutions; 0.5 is the paper's objective. One
        weight of 0 gives a one-sided loss.

    Returns:
      `SamiLoss`, three [] float32, nats (of the critic: with mean log-probabilities the critic is nats per token).

    Raises:
      AssertionError: if `logps` is not a square float matrix of at least 2 x 2.

    Source: the paper's two-sided InfoNCE objective (the mean of the contrast over responses and the contrast over
    constitutions).
    """
    _assert_contrast_matrix(logps)

    over_responses = _cross_entropy_of_diagonal(logps, axis=1)
    over_constitutions = _cross_entropy_of_diagonal(logps, axis=0)
    loss = over_responses_weight * over_responses + over_constitutions_weight * over_constitutions
    return SamiLoss(loss=loss, over_responses=over_responses, over_constitutions=over_constitutions)


def mi_lower_bound(logps: jax.Array) -> jax.Array:
    """Computes one query's estimate of a lower bound on the mutual information of response and constitution, in nats.

    mi_lower_bound = log C - over_constitutions = log C + 1/C sum_r log q(c = r | y_r),
    q(c | y_r) = exp logps[c, r] / sum_c' exp logps[c', r]

    What it bounds: I(Y; C | X = x) for a constitution drawn uniformly from the C shown and a response sampled under it.
    H(C) = log C and any guess q gives E log q(C | Y) <= -H(C | Y), so the *expectation* over sampled responses is at
    most I, with equality when logps are the true log p(y | x, c). One draw of responses may lie above I; average over
    queries. With greedy responses it speaks of the greedy responses, not of samples. Mean instead of summed
    log-probabilities are another q: still a bound, as a rule a looser one.

    Its ceiling is log C: information beyond that does not show. It has no floor; below 0, q is worse than guessing.

    Why there is no such function for the other side: over_responses would need negatives drawn independently from the
    marginal p(y | x). Here they come one from each *other* constitution, never twice from the same, which makes the
    positive easier to find: log C - over_responses can exceed I. (Two constitutions, one binary response that is
    flipped with probability 0.1: I = 0.368 nats, this bound 0.368, the other side 0.460.) It and the mean of both
    sides are contrast scores capped at log C, not bounds.

    Args:
      logps: [C, R] any float dtype, R = C >= 2: log p(response r | query, constitution c); response r was sampled under
        constitution r.

    Returns:
      [] float32, nats, at most log C.

    Raises:
      AssertionError: if `logps` is not a square float matrix of at least 2 x 2.

    Source: the paper's InfoNCE lower bound on I(Y; C | X), its constitution side; as Barber & Agakov (2003).
    """
    _assert_contrast_matrix(logps)

    return jnp.log(jnp.float32(logps.shape[0])) - _cross_entropy_of_diagonal(logps, axis=0)


def contrast_accuracies(logps: jax.Array) -> ContrastAccuracies:
    """Computes how often the positive is strictly the likeliest, among responses and among constitutions.

    over_responses     = share of c with logps[c, c] > logps[c, r] for all r != c
    over_constitutions = share of r with logps[r, r] > logps[c, r] for all c != r

    A positive that merely equals a negative is not right, so a model that ignores its constitution scores 0 over
    constitutions, not 1 as an argmax that takes the first would often have it. Not differentiable.

    Args:
      logps: [C, R] any float dtype, R = C >= 2: log p(response r | query, constitution c); response r was sampled under
        constitution r.

    Returns:
      `ContrastAccuracies`, two [] float32. A row or column with a NaN makes its side NaN.

    Raises:
      AssertionError: if `logps` is not a square float matrix of at least 2 x 2.

    Source: ours; a reading of the paper's contrast that does not depend on the scale of the log-probabilities.
    """
    _assert_contrast_matrix(logps)

    logps = logps.astype(jnp.float32)
    positives = jnp.diagonal(logps)
    negatives = jnp.where(jnp.eye(logps.shape[0], dtype=jnp.bool_), -jnp.inf, logps)

    def accuracy(axis: int) -> jax.Array:
        right = (positives > jnp.max(negatives, axis=axis)).astype(jnp.float32)
        # A comparison with NaN is False: without this a broken model would read as a merely bad one.
        return jnp.mean(jnp.where(jnp.any(jnp.isnan(logps), axis=axis), jnp.nan, right))

    return ContrastAccuracies(over_responses=accuracy(axis=1), over_constitutions=accuracy(axis=0))


def response_kl(policy_logits: jax.Array, reference_logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Computes the mean per-token KL(policy || reference) over one response's counted tokens, in nats per token.

    kl = (sum_t mask_t sum_v p_t(v) (log p_t(v) - log q_t(v))) / (sum_t mask_t),  p policy, q reference

    Exact over the vocabulary at each position, hence non-negative up to float32 rounding. The reference is frozen:
    `stop_gradient` is applied to it here, and gradients flow through the policy only. Masked-out positions reach
    neither value nor gradient, NaN logits included. Zero counted tokens give exactly 0 with zero gradient. A token
    the policy rules out (logit -inf) contributes 0; one that only the reference rules out gives infinity, as it must.

    The authors' code averages over all positions, prompt and padding included; ours over response tokens only.

    Args:
      policy_logits: [T, V] any float dtype, unnormalised.
      reference_logits: [T, V] any float dtype, unnormalised.
      mask: [T] bool, True = a response token that counts.

    Returns:
      [] float32, nats per token.

    Raises:
      AssertionError: if ranks, shapes or dtypes are not those above.

    Source: the optional regulariser beta * KL(policy || reference) of the authors' released code; off by default.
    """
    chex.assert_rank([policy_logits, reference_logits, mask], [2, 2, 1])
    chex.assert_type([policy_logits, reference_logits, mask], [float, float, bool])
    chex.assert_equal_shape([policy_logits, reference_logits])
    chex.assert_equal_shape_prefix([policy_logits, mask], 1)

    # Masked before the softmax: masked after it, a NaN row would still come back as 0 * NaN in the gradient.
    policy_logits = jnp.where(mask[:, None], policy_logits.astype(jnp.float32), 0.0)
    reference_logits = jnp.where(mask[:, None], reference_logits.astype(jnp.float32), 0.0)
    policy = jax.nn.log_softmax(policy_logits, axis=-1)
    reference = jax.lax.stop_gradient(jax.nn.log_softmax(reference_logits, axis=-1))

    probs = jnp.exp(policy)
    log_ratio = jnp.where(probs > 0.0, policy - reference, 0.0)  # 0 log 0 = 0, and no -inf - -inf
    kl = jnp.sum(probs * log_ratio, axis=-1)  # [T]
    return _masked_sum(kl, mask) / _at_least_one(mask)


def _masked_sum(values: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(mask, values.astype(jnp.float32), 0.0))


def _at_least_one(mask: jax.Array) -> jax.Array:
    """Counts what the mask keeps, as a denominator that is never 0."""
    return jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)


def _cross_entropy_of_diagonal(logps: jax.Array, *, axis: int) -> jax.Array:
    return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logps.astype(jnp.float32), axis=axis)))


def _assert_contrast_matrix(logps: jax.Array) -> None:
    chex.assert_rank(logps, 2)
    chex.assert_type(logps, float)
    chex.assert_shape(logps, (logps.shape[0], logps.shape[0]))  # one response per constitution
    chex.assert_axis_dimension_gteq(logps, 0, 2)  # a lone response has nothing to be contrasted with
