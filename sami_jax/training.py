"""The SAMI optimizer step: matrices of log-probs, the loss, gradients accumulated over micro-batches, one update."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sami_jax.config import TrainConfig
from sami_jax.losses import contrast_accuracies, mi_lower_bound, response_kl, sami_loss
from sami_jax.scoring import cell_logps, response_logits
from sami_jax.seeds import generator
from sami_jax.sharding import gather
from sami_jax.types import Array, ContrastiveBatch, Params, ScoreFn, TrainState


class StepMetrics(NamedTuple):
    """What one optimizer step saw; means over its Q queries, before the update.

    Attributes:
      loss: SAMI loss plus kl_beta * kl, nats.
      over_responses: cross-entropy of the softmax over responses, nats.
      over_constitutions: cross-entropy of the softmax over constitutions, nats.
      mi_nats: log C - over_constitutions.
      accuracy_over_responses: share of responses that are the likeliest under their constitution.
      accuracy_over_constitutions: share of constitutions that are the likeliest for their response.
      mean_logp: log-prob of the responses under their own constitutions, nats, by `normalize`.
      kl: KL(policy || base) per response token, nats; 0 where kl_beta is 0, since then it is not computed.
      grad_norm: global norm of the gradient.
      share_changed: share of the weights that the update changed.
      finite: [] bool; False where loss or gradient was not, and the update was not applied.
      query_losses: [Q] SAMI loss of each query, to name the one that is not finite.
    """

    loss: Array
    over_responses: Array
    over_constitutions: Array
    mi_nats: Array
    accuracy_over_responses: Array
    accuracy_over_constitutions: Array
    mean_logp: Array
    kl: Array
    grad_norm: Array
    share_changed: Array
    finite: Array
    query_losses: Array


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """torch's AdamW or RMSprop at a constant learning rate (paper, appendix on training)."""
    if config.optimizer == "rmsprop":
        # torch.optim.RMSprop(alpha, eps): no bias correction, eps outside the root, second moment from 0.
        return optax.rmsprop(
            config.learning_rate,
            decay=config.rmsprop_decay,
            eps=config.eps,
            eps_in_sqrt=False,
            initial_scale=0.0,
            bias_correction=False,
        )
    return optax.adamw(
        config.learning_rate, b1=config.adam_b1, b2=config.adam_b2, eps=config.eps, weight_decay=config.weight_decay
    )


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def query_indices(n_pairs: int, step: int, *, seed: int, iteration: int, queries_per_step: int) -> list[int]:
    """Which pairs step 0, 1, ... trains on: epochs of seeded permutations, one after another.

    A pure function of its arguments, so that a resumed run sees the same queries in the same order.
    """
    places = range(step * queries_per_step, (step + 1) * queries_per_step)
    epochs = {
        epoch: generator(seed, "order", iteration, epoch).permutation(n_pairs)
        for epoch in {place // n_pairs for place in places}
    }
    return [int(epochs[place // n_pairs][place % n_pairs]) for place in places]


def micro_batches(batch: ContrastiveBatch, queries: int) -> ContrastiveBatch:
    """[Q, ...] leaves -> [Q / queries, queries, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, queries, *x.shape[1:]), batch)


TrainStep = Callable[[TrainState, Params, ContrastiveBatch], tuple[TrainState, StepMetrics]]


@functools.lru_cache(maxsize=8)
def make_train_step(score: ScoreFn, config: TrainConfig) -> TrainStep:
    """The jitted step (state, reference params, batch [M, m, ...]) -> (state, metrics).

    The M micro-batches are scanned, so that only m x C x C sequences are in memory at once; their gradients add up to
    that of the mean over all M x m queries. The reference (the base model) is read only where kl_beta > 0. The old
    state's memory is reused, its shardings are kept. An update whose loss or gradient is not finite leaves the state as
    it was.
    """
    optimizer = make_optimizer(config)

    def micro_loss(params: Params, reference: Params, batch: ContrastiveBatch) -> tuple[Array, dict[str, Array]]:
        logits = response_logits(score, params, batch)
        logps = cell_logps(logits, batch, normalize=config.normalize)  # [m, C, R]
        losses = jax.vmap(
            functools.partial(
                sami_loss,
                over_responses_weight=config.over_responses_weight,
                over_constitutions_weight=config.over_constitutions_weight,
            )
        )(logps)
        accuracies = jax.vmap(contrast_accuracies)(logps)
        kl = jnp.zeros(logps.shape[0], jnp.float32)
        if config.kl_beta > 0:
            kl = jax.vmap(_query_kl)(logits, response_logits(score, reference, batch), batch.target_mask)
        seen = {
            "over_responses": losses.over_responses,
            "over_constitutions": losses.over_constitutions,
            "mi_nats": jax.vmap(mi_lower_bound)(logps),
            "accuracy_over_responses": accuracies.over_responses,
            "accuracy_over_constitutions": accuracies.over_constitutions,
            "mean_logp": jnp.mean(jnp.diagonal(logps, axis1=1, axis2=2), axis=1),
            "kl": kl,
            "query_losses": losses.loss,
        }
        return jnp.mean(losses.loss + config.kl_beta * kl), seen

    def step(state: TrainState, reference: Params, batch: ContrastiveBatch) -> tuple[TrainState, StepMetrics]:
        gradient_of = jax.value_and_grad(micro_loss, has_aux=True)

        def accumulate(total: tuple, micro: ContrastiveBatch) -> tuple[tuple, dict[str, Array]]:
            (loss, seen), gradient = gradient_of(state.params, reference, micro)
            return (total[0] + loss, jax.tree.map(jnp.add, total[1], gradient)), seen

        start = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.params))
        (loss, gradients), seen = jax.lax.scan(accumulate, start, batch)
        count = batch.tokens.shape[0]
        loss, gradients = loss / count, jax.tree.map(lambda g: g / count, gradients)
        grad_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of its integer step count
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        updated = TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)
        kept = jax.tree.map(functools.partial(jnp.where, finite), updated, state)
        query_losses = seen.pop("query_losses").reshape(-1)
        metrics = StepMetrics(
            loss=loss,
            grad_norm=grad_norm,
            share_changed=_share_changed(state.params, kept.params),
            finite=finite,
            query_losses=query_losses,
            **{name: jnp.mean(values) for name, values in seen.items()},
        )
        return kept, metrics

    @functools.lru_cache(maxsize=8)
    def compiled(structure: Any, shardings: tuple[jax.sharding.Sharding, ...]) -> TrainStep:
        # Left to itself, the compiler splits the norms; the second step would then be another program than the first,
        # and a resumed run, which starts with the norms whole, would round differently from one that was never stopped.
        return jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.unflatten(structure, shardings), None))

    def train_step(state: TrainState, reference: Params, batch: ContrastiveBatch) -> tuple[TrainState, StepMetrics]:
        leaves, structure = jax.tree.flatten(state)
        return compiled(structure, tuple(leaf.sharding for leaf in leaves))(state, reference, batch)

    return train_step


def _query_kl(policy: Array, reference: Array, mask: Array) -> Array:
    """Mean over the C x R cells of one query: logits [C, R, K, V] twice, mask [R, K]."""
    over_responses = jax.vmap(response_kl)
    return jnp.mean(jax.vmap(over_responses, in_axes=(0, 0, None))(policy, reference, mask))


def _share_changed(before: Params, after: Params) -> Array:
    changed = [jnp.sum(a != b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)]
    total = sum(leaf.size for leaf in jax.tree.leaves(before))
    return sum(count.astype(jnp.float32) for count in changed) / total


def nonfinite_examples(metrics: StepMetrics, example_ids: Sequence[Any]) -> list[Any]:
    """The ids of the step's queries whose own loss is not finite."""
    return [i for i, loss in zip(example_ids, gather(metrics.query_losses), strict=True) if not np.isfinite(loss)]
