"""The SAMI loss inside somebody else's training loop: any model that gives logits, optax, and three lines of sami_jax.

    python examples/swap_loss.py

The model here is a table of bigrams per constitution, so that everything else fits on a page. Runs in seconds on a
CPU, prints the loss falling and the lower bound on the mutual information rising towards its ceiling log C, and prints
the same numbers every time. A real run takes a handful of steps, not 60: overdone, SAMI makes models write gibberish.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sami_jax import losses

QUERIES, CONSTITUTIONS, TOKENS, VOCAB = 16, 3, 8, 12  # B; C, and as many responses R; T; V
STEPS = 60


# --- Yours: a model, and responses that an earlier version of it wrote, one under each constitution. ------------------


def base_params(rng: np.random.Generator) -> jax.Array:
    """[C, V, V]: next-token logits given a constitution and the last token. The constitution matters only a little."""
    shared = rng.normal(0.0, 1.0, (1, VOCAB, VOCAB))
    return jnp.asarray(shared + rng.normal(0.0, 0.3, (CONSTITUTIONS, VOCAB, VOCAB)), jnp.float32)


def sampled_responses(rng: np.random.Generator, params: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Token ids [B, R, T + 1], the first being the query's last token, and a ragged response_mask [B, R, T]."""
    probs = np.asarray(jax.nn.softmax(params, axis=-1), np.float64)
    probs /= probs.sum(axis=-1, keepdims=True)
    ids = np.zeros((QUERIES, CONSTITUTIONS, TOKENS + 1), np.int32)
    ids[:, :, 0] = rng.integers(0, VOCAB, (QUERIES, 1))
    for b, r, t in np.ndindex(QUERIES, CONSTITUTIONS, TOKENS):
        ids[b, r, t + 1] = rng.choice(VOCAB, p=probs[r, ids[b, r, t]])
    lengths = rng.integers(TOKENS // 2, TOKENS + 1, (QUERIES, CONSTITUTIONS, 1))
    return jnp.asarray(ids), jnp.asarray(np.arange(TOKENS) < lengths)


def model(params: jax.Array, constitution: jax.Array, ids: jax.Array) -> jax.Array:
    """Next-token logits [T, V] for ids [T] read under a constitution: stands where your transformer stands."""
    return params[constitution, ids]


# --- The swap: score every response under every constitution, then three lines of sami_jax. --------------------------


def query_logps(params: jax.Array, ids: jax.Array, response_mask: jax.Array) -> jax.Array:
    """logps [C, R] of one query, from ids [R, T + 1] and response_mask [R, T]."""

    def cell(constitution: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
        logits = model(params, constitution, ids[:-1])  # logits [T, V] at a position predict the token after it
        token_logps = losses.token_logps(logits, ids[1:])  # <- line 1: log p of each response token
        return losses.sequence_logps(token_logps, mask, normalize="mean")  # <- line 2: of each response

    over_responses = jax.vmap(cell, in_axes=(None, 0, 0))
    over_constitutions = jax.vmap(over_responses, in_axes=(0, None, None))
    return over_constitutions(jnp.arange(CONSTITUTIONS), ids, response_mask)


def batch_loss(params: jax.Array, ids: jax.Array, response_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The loss to differentiate, and the lower bound on the mutual information in nats, both means over queries."""
    logps = jax.vmap(query_logps, in_axes=(None, 0, 0))(params, ids, response_mask)  # [B, C, R]
    loss = jax.vmap(losses.sami_loss)(logps).loss  # <- line 3: of each query
    return jnp.mean(loss), jnp.mean(jax.vmap(losses.mi_lower_bound)(logps))


# --- Yours again: any optax loop. -------------------------------------------------------------------------------------


def main() -> None:
    rng = np.random.default_rng(0)
    params = base_params(rng)
    ids, response_mask = sampled_responses(rng, params)
    optimizer = optax.adamw(learning_rate=0.05, weight_decay=0.01)
    opt_state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, opt_state, ids, response_mask):
        (loss, mi_nats), gradient = jax.value_and_grad(batch_loss, has_aux=True)(params, ids, response_mask)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, mi_nats

    for step in range(STEPS + 1):
        params, opt_state, loss, mi_nats = train_step(params, opt_state, ids, response_mask)
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss:.4f}  mi_lower_bound {mi_nats:.4f} of {np.log(CONSTITUTIONS):.4f} nats")


if __name__ == "__main__":
    main()
