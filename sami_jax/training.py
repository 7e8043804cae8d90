"""The SAMI optimizer step: matrices of log-probs, the loss, gradients accumulated over micro-batches, one update."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sami_jax.config.training import TrainConfig
from sami_jax.losses import contrast_accuracies, mi_lower_bound, sami_loss
from sami_jax.scoring.matrices import logps_and_kls, over_cells
from sami_jax.seeds import generator, jax_key
from sami_jax.sharding import gather, replicated
from sami_jax.types import Array, ContrastiveRows, Params, Reference, RowModel, TrainState


class StepMetrics(NamedTuple):
    """Measurements of one optimizer step: means over its Q queries, before the update.

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


# What is measured of each query.
_OF_QUERIES = (
    "over_responses",
    "over_constitutions",
    "mi_nats",
    "accuracy_over_responses",
    "accuracy_over_constitutions",
    "mean_logp",
    "kl",
    "query_losses",
)


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


def abstract_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Shape, dtype and sharding of every leaf of the state; the optimizer's are sharded like their parameter.

    Args:
      params: tree of `jax.ShapeDtypeStruct`, sharded over one mesh.
      optimizer: of `make_optimizer`.
    """
    shapes = jax.eval_shape(functools.partial(init_state, optimizer=optimizer), params)
    whole = replicated(jax.tree.leaves(params)[0].sharding.mesh)

    def on(sharding: jax.sharding.Sharding, spec: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)

    opt_state = optax.tree_map_params(
        optimizer,
        lambda spec, param: on(param.sharding, spec),
        shapes.opt_state,
        params,
        transform_non_params=functools.partial(on, whole),
    )
    return shapes._replace(params=params, opt_state=opt_state, step=on(whole, shapes.step))


def pairs_needed(train: TrainConfig, iteration: int) -> int:
    """Number of pairs that the steps of iteration 1, 2, ... need, so that each is used at most `train.passes` times."""
    return math.ceil(train.steps[iteration - 1] * train.queries_per_step / train.passes)


def query_indices(n_pairs: int, step: int, *, seed: int, iteration: int, queries_per_step: int) -> list[int]:
    """Indices of the pairs that step 0, 1, ... trains on: epochs of seeded permutations, one after another.

    A pure function of its arguments, so that a resumed run sees the same queries in the same order.
    """
    positions = range(step * queries_per_step, (step + 1) * queries_per_step)
    epochs = {
        epoch: generator(seed, "order", iteration, epoch).permutation(n_pairs)
        for epoch in {position // n_pairs for position in positions}
    }
    return [int(epochs[position // n_pairs][position % n_pairs]) for position in positions]


def round_to_dtypes(tree: Any, like: Any, key: Array | None) -> Any:
    """The tree's values in the dtypes of `like`.

    Args:
      tree: arrays; where `like` is bfloat16, float32.
      like: tree of the same structure.
      key: of stochastic rounding, which goes to either of the two nearest bfloat16 values, to the nearer one as much
        more often as it is nearer, so that the mean of many roundings is the value; None rounds to the nearest.
    """
    leaves, structure = jax.tree.flatten(tree)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(like)]
    rounded = []
    for i, (leaf, dtype) in enumerate(zip(leaves, dtypes, strict=True)):
        if key is not None and dtype == jnp.bfloat16:
            # A bfloat16 is the upper half of a float32. Noise added to the lower half carries into the upper one as
            # often as the lower half is large.
            bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
            noise = jax.random.bits(jax.random.fold_in(key, i), leaf.shape, jnp.uint16).astype(jnp.uint32)
            noisy = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
            leaf = jnp.where(jnp.isfinite(leaf), noisy, leaf)
        rounded.append(leaf.astype(dtype))
    return jax.tree.unflatten(structure, rounded)


class TrainStep:
    """A step (state, reference [M, ...], batch [M, ...]) -> (state, metrics), compiled once for a kind of state."""

    def __init__(self, step: Callable):
        @functools.lru_cache(maxsize=8)
        def compiled(structure: Any, shardings: tuple[jax.sharding.Sharding, ...]) -> Any:
            # Pin the output shardings. Otherwise XLA shards the replicated norm weights after step 1, and step 2, or a
            # resumed run, is another program that rounds differently.
            return jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.unflatten(structure, shardings), None))

        self._compiled = compiled

    def __call__(
        self, state: TrainState, reference: Reference | None, batch: ContrastiveRows
    ) -> tuple[TrainState, StepMetrics]:
        return self.jitted(state)(state, reference, batch)

    def jitted(self, state: TrainState) -> Any:
        """The function for states sharded like this one, which may be abstract."""
        leaves, structure = jax.tree.flatten(state)
        return self._compiled(structure, tuple(leaf.sharding for leaf in leaves))


@functools.lru_cache(maxsize=8)
def make_train_step(model: RowModel, config: TrainConfig, *, seed: int = 0) -> TrainStep:
    """The optimizer step.

    The M micro-batches are scanned, so that the rows of one are in memory at once; their gradients add up to that of
    the mean over the config.queries_per_step queries that the batch holds. The reference is what the base model says of
    the batch's labels; it is None where kl_beta is 0. The old state's memory is reused, its shardings are kept. An
    update whose loss or gradient is not finite leaves the state as it was.

    Sums and updates are computed in float32 and rounded to the dtype of the state's params, stochastically where
    config.weights says so: by `seed` and the step's number, the same on any mesh.
    """
    optimizer, count = make_optimizer(config), config.queries_per_step

    def step(state: TrainState, reference: Reference | None, batch: ContrastiveRows) -> tuple[TrainState, StepMetrics]:
        if (reference is None) != (config.kl_beta == 0):
            raise ValueError("A reference is given where kl_beta is above 0, and only there.")
        rounding = _Rounding(jax.random.fold_in(jax_key(seed, "rounding"), state.step), config)
        loss_of = functools.partial(_micro_loss, model=model, config=config)
        loss, gradients, seen = _gradient(loss_of, state.params, reference, batch, rounding)
        grad_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updated = _updated(state, gradients, optimizer)
        updated = rounding.to_dtypes_of(state, updated, batch.queries.shape[0])
        kept = jax.tree.map(functools.partial(jnp.where, finite), updated, state)
        places = batch.queries.reshape(-1)
        seen = {name: jnp.zeros(count).at[places].set(values.reshape(-1), mode="drop") for name, values in seen.items()}
        query_losses = seen.pop("query_losses")
        metrics = StepMetrics(
            loss=loss,
            grad_norm=grad_norm,
            share_changed=_share_changed(state.params, kept.params),
            finite=finite,
            query_losses=query_losses,
            **{name: jnp.mean(values) for name, values in seen.items()},
        )
        return kept, metrics

    return TrainStep(step)


# A micro-batch -> [] its share of the mean loss over the step's queries, and what is logged of each of its own [Q].
def _micro_loss(
    params: Params, reference: Reference | None, batch: ContrastiveRows, *, model: RowModel, config: TrainConfig
) -> tuple[Array, dict[str, Array]]:
    label_logps, label_kls = logps_and_kls(model, params, batch, reference)  # [G, L]
    logps = over_cells(label_logps, batch, normalize=config.normalize)  # [Q, C, R]
    losses = jax.vmap(
        functools.partial(
            sami_loss,
            over_responses_weight=config.over_responses_weight,
            over_constitutions_weight=config.over_constitutions_weight,
        )
    )(logps)
    accuracies = jax.vmap(contrast_accuracies)(logps)
    kl = jnp.mean(over_cells(label_kls, batch, normalize="mean"), axis=(1, 2))  # of means over a cell's tokens
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
    present = batch.queries < config.queries_per_step
    loss = jnp.sum(jnp.where(present, losses.loss + config.kl_beta * kl, 0.0))
    return loss / config.queries_per_step, seen


# [M, ...] micro-batches -> [] loss and its float32 gradient, both sums over them, and what is logged [M, Q]
def _gradient(
    loss_of: Callable, params: Params, reference: Reference | None, batch: ContrastiveRows, rounding: "_Rounding"
) -> tuple[Array, Params, dict[str, Array]]:
    gradient_of = jax.value_and_grad(loss_of, has_aux=True)

    def added(total: tuple, reference: Reference | None, batch: ContrastiveRows, number: Array) -> tuple:
        (loss, seen), gradient = gradient_of(params, reference, batch)
        sums = jax.tree.map(jnp.add, _float32(total[1]), _float32(gradient))
        return (total[0] + loss, rounding.to_dtypes_of(total[1], sums, number)), seen

    def passed(total: tuple, reference: Reference | None, batch: ContrastiveRows, number: Array) -> tuple:
        return total, dict.fromkeys(_OF_QUERIES, jnp.zeros(batch.queries.shape, jnp.float32))

    def accumulate(total: tuple, micro: tuple) -> tuple[tuple, dict[str, Array]]:
        number, batch, hidden = micro
        base = None if reference is None else reference._replace(hidden=hidden)
        # Steps have as many micro-batches as the one that needs most; those that are left empty cost nothing.
        return jax.lax.cond(jnp.any(batch.counts > 0), added, passed, total, base, batch, number)

    start = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    micros = jnp.arange(batch.queries.shape[0]), batch, None if reference is None else reference.hidden
    (loss, gradients), seen = jax.lax.scan(accumulate, start, micros)
    return loss, _float32(gradients), seen


# gradient of a state's params -> the state after one update, in float32
def _updated(state: TrainState, gradients: Params, optimizer: optax.GradientTransformation) -> TrainState:
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of its integer step count
        params = _float32(state.params)
        updates, opt_state = optimizer.update(gradients, _float32(state.opt_state), params)
    return TrainState(optax.apply_updates(params, updates), opt_state, state.step + 1)


class _Rounding:
    """How the sums of one step are rounded: to the nearest, or stochastically, by the step's key."""

    def __init__(self, key: Array, config: TrainConfig):
        self._key, self._is_stochastic = key, config.weights == "bfloat16_stochastic"

    def to_dtypes_of(self, like: Any, tree: Any, number: Array | int) -> Any:
        """The tree in the dtypes of `like`; `number` tells the roundings of a step apart."""
        return round_to_dtypes(tree, like, jax.random.fold_in(self._key, number) if self._is_stochastic else None)


def _float32(tree: Any) -> Any:
    """bfloat16 leaves in float32; counts stay counts."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _share_changed(before: Params, after: Params) -> Array:
    def changed(a: Array, b: Array) -> Array:
        in_a_row = jnp.sum(a != b, axis=-1)
        return jnp.sum(in_a_row.astype(jnp.float32))  # a stack of layers has more entries than an int32 can count

    counts = jax.tree.map(changed, before, after)
    return jnp.sum(jnp.stack(jax.tree.leaves(counts))) / float(sum(leaf.size for leaf in jax.tree.leaves(before)))


def nonfinite_examples(metrics: StepMetrics, example_ids: Sequence[Any]) -> list[Any]:
    """The ids of the step's queries whose loss is not finite: their own, or that of one in the same row."""
    return [i for i, loss in zip(example_ids, gather(metrics.query_losses), strict=True) if not np.isfinite(loss)]
