"""The optimizer step against numpy: loss, accumulation, KL, refusal of the non-finite, order of the queries."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import doubles
from sami_jax.config.training import TrainConfig
from sami_jax.training import (
    TrainState,
    init_state,
    make_optimizer,
    make_train_step,
    nonfinite_examples,
    query_indices,
    round_to_dtypes,
)
from sami_jax.types import RowModel

VOCAB = 9
PAIRS = doubles.random_pairs(4, vocab=VOCAB, seed=4)
POISON = VOCAB - 1


def small_params(seed: int = 0) -> dict[str, jax.Array]:
    # A tenth of the double's integers: soft distributions, in which a gradient step has something to gain.
    return jax.tree.map(lambda x: jnp.asarray(x) / 10, doubles.table_params(VOCAB, seed=seed))


def config(**changes) -> TrainConfig:
    # eps = 1: the updates are nearly proportional to the gradient, so a gradient of the wrong size shows.
    return TrainConfig(**({"learning_rate": 0.1, "eps": 1.0, "weight_decay": 0.0, "queries_per_step": 4} | changes))


def micro(pairs=PAIRS, rows: int = 2):
    """All pairs in micro-batches of so many rows; those of two packs a row hold a query each."""
    return doubles.packing(pairs, rows=rows, widest=14).stacked(0)


def run(settings: TrainConfig, *, steps: int = 1, batch=None, params=None, reference=None, model=doubles.MODEL):
    train_step = make_train_step(model, settings)
    params = small_params() if params is None else params
    reference = small_params() if reference is None else reference
    state = init_state(jax.tree.map(jnp.copy, params), make_optimizer(settings))
    batch = micro() if batch is None else batch
    base = doubles.reference(model, reference, batch) if settings.kl_beta > 0 else None
    seen = []
    for _ in range(steps):
        state, metrics = train_step(state, base, batch)
        seen.append(metrics)
    return state, seen


def numpy_logps(params, normalize: str = "mean") -> np.ndarray:
    params = jax.tree.map(np.asarray, params)
    return np.stack([doubles.pair_logps(params, one, normalize=normalize) for one in PAIRS])


def diagonal_cross_entropy(logps: np.ndarray, axis: int) -> np.ndarray:
    """[Q] by the definition: -mean_i log softmax(logps over `axis`)[i, i]."""
    over_last = np.moveaxis(logps, axis, -1)
    return -np.mean(np.diagonal(doubles.log_softmax(over_last), axis1=1, axis2=2), axis=1)


class TestMetrics:
    @pytest.mark.parametrize("normalize", ["mean", "sum"])
    def test_numpy_reference(self, normalize):
        logps = numpy_logps(small_params(), normalize)  # [Q, C, R]
        over_responses, over_constitutions = (diagonal_cross_entropy(logps, axis) for axis in (2, 1))
        settings = config(normalize=normalize, over_responses_weight=0.25, over_constitutions_weight=0.75)
        _, [metrics] = run(settings)
        losses = 0.25 * over_responses + 0.75 * over_constitutions
        diagonal = np.diagonal(logps, axis1=1, axis2=2)
        expected = {
            "loss": losses.mean(),
            "over_responses": over_responses.mean(),
            "over_constitutions": over_constitutions.mean(),
            "mi_nats": math.log(2) - over_constitutions.mean(),
            "accuracy_over_responses": np.mean(diagonal > logps[:, [0, 1], [1, 0]]),
            "accuracy_over_constitutions": np.mean(diagonal > logps[:, [1, 0], [0, 1]]),
            "mean_logp": diagonal.mean(),
            "kl": 0.0,
        }
        assert abs(over_responses.mean() - over_constitutions.mean()) > 1e-3  # so that one for the other shows
        actual = {name: float(getattr(metrics, name)) for name in expected}
        # float32 log-softmax of values of size 10 over a handful of tokens: 1e-6 each.
        assert actual == pytest.approx(expected, rel=1e-5, abs=1e-5)
        np.testing.assert_allclose(metrics.query_losses, losses, rtol=1e-5)
        assert bool(metrics.finite)

    def test_gradient_norm_against_finite_differences(self):
        # d loss / d direction, with the direction the gradient itself, is its norm.
        params = jax.tree.map(np.asarray, small_params())
        state, [metrics] = run(config(optimizer="rmsprop", rmsprop_decay=0.0, eps=1e4, learning_rate=1e4))
        # With a huge eps, the update is learning_rate / eps x gradient = the gradient (to 1 in 1e4).
        gradient = jax.tree.map(lambda before, after: before - np.asarray(after), params, state.params)
        norm = math.sqrt(sum(float(np.sum(np.square(leaf, dtype=np.float64))) for leaf in gradient.values()))
        assert float(metrics.grad_norm) == pytest.approx(norm, rel=1e-3)

        def loss(step: float) -> float:
            logps = numpy_logps(jax.tree.map(lambda p, g: p.astype(np.float64) + step * g / norm, params, gradient))
            return float(np.mean(0.5 * diagonal_cross_entropy(logps, 2) + 0.5 * diagonal_cross_entropy(logps, 1)))

        # float64 on both sides; the difference quotient is good to step^2.
        assert (loss(1e-4) - loss(-1e-4)) / 2e-4 == pytest.approx(norm, rel=1e-3)


class TestAccumulation:
    def test_micro_batches_equal_one_big_batch(self):
        batches = [micro(rows=rows) for rows in (2, 8)]
        assert [len(batch.queries) for batch in batches] == [4, 1]
        (state, metrics), (big, big_metrics) = (run(config(kl_beta=0.3), batch=batch) for batch in batches)
        # The same float32 terms added in another order.
        chex.assert_trees_all_close(state, big, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(metrics, big_metrics, rtol=1e-5, atol=1e-6)

    def test_room_for_more_queries_changes_nothing(self):
        batch = doubles.packing(PAIRS, rows=8, queries=7).stacked(0)
        assert (batch.queries == len(PAIRS)).sum() == 3
        (state, metrics), (other, other_metrics) = (run(config(kl_beta=0.3), batch=b) for b in (batch, micro()))
        chex.assert_trees_all_close(state, other, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(metrics, other_metrics, rtol=1e-5, atol=1e-6)

    def test_an_empty_micro_batch_changes_nothing(self):
        """As a step has that needs fewer of them than another."""
        long = [doubles.pair([[1] * 6, [2] * 6], [[3] * 4, [4] * 4]) for _ in range(8)]
        packing = doubles.packing(PAIRS, long, rows=4, widest=14)
        batch = packing.stacked(0)
        assert (batch.counts.sum(axis=(1, 2, 3)) == 0).any()
        (state, metrics), (other, other_metrics) = (run(config(kl_beta=0.3), batch=b) for b in (batch, micro()))
        chex.assert_trees_all_close(state, other, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(metrics, other_metrics, rtol=1e-5, atol=1e-6)


class TestKL:
    def far(self):
        return jax.tree.map(lambda a, b: a + 3 * b, small_params(), small_params(7))

    def test_zero_at_the_reference_with_zero_gradient(self):
        _, [with_kl] = run(config(kl_beta=0.3))
        _, [without] = run(config())
        assert float(with_kl.kl) == pytest.approx(0.0, abs=1e-6)  # a sum of float32 terms that cancel
        np.testing.assert_allclose(with_kl.grad_norm, without.grad_norm, rtol=1e-4)

    def test_numpy_reference(self):
        far, reference = self.far(), small_params()
        cells = []
        for one in PAIRS:
            for prompt in one.prompt_ids:
                for ids in one.response_ids:
                    tokens = []
                    for k in range(len(ids)):
                        p, q = (
                            doubles.log_softmax(doubles.logits_after(jax.tree.map(np.asarray, x), [*prompt, *ids[:k]]))
                            for x in (far, reference)
                        )
                        tokens.append(np.sum(np.exp(p) * (p - q)))
                    cells.append(np.mean(tokens))
        _, [metrics] = run(config(kl_beta=0.3), params=far, reference=reference)
        _, [without] = run(config(), params=far, reference=reference)
        assert float(metrics.kl) == pytest.approx(np.mean(cells), rel=1e-5)
        assert float(metrics.loss) == pytest.approx(float(without.loss) + 0.3 * np.mean(cells), rel=1e-5)
        assert float(without.kl) == 0.0

    def test_its_gradient_pulls_back_to_the_reference(self):
        far, reference = self.far(), small_params()
        _, pulled = run(config(kl_beta=100.0, eps=100.0, learning_rate=1.0), steps=6, params=far, reference=reference)
        values = [float(metrics.kl) for metrics in pulled]
        assert values == sorted(values, reverse=True) and values[-1] < 0.9 * values[0]

    @pytest.mark.parametrize("kl_beta", [0.0, 0.3])
    def test_a_reference_where_there_is_none_or_none_where_there_is_one(self, kl_beta):
        settings = config(kl_beta=kl_beta)
        state = init_state(small_params(), make_optimizer(settings))
        base = None if kl_beta else doubles.reference(doubles.MODEL, small_params(), micro())
        with pytest.raises(ValueError, match="where kl_beta is above 0, and only there"):
            make_train_step(doubles.MODEL, settings)(state, base, micro())


class TestRounding:
    def roundings(self, values: list[float]) -> np.ndarray:
        """[4096, N] float32: one row for each key."""
        exact = jnp.asarray(values, jnp.float32)

        def one(key: jax.Array) -> jax.Array:
            return round_to_dtypes([exact], [exact.astype(jnp.bfloat16)], key)[0].astype(jnp.float32)

        return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 4096)))

    def test_goes_to_the_two_nearest_and_the_mean_is_the_value(self):
        values = [1.001, -1.001, 0.0200005, -3e20, 1e-20]
        rows = self.roundings(values)
        for column, value in zip(rows.T, values, strict=True):
            low, high = np.unique(column)
            assert low < value < high and (high - low) / abs(value) <= 2**-7
            # The mean of 4096 draws is within four of its standard deviations, at most half a unit / 64.
            assert abs(column.astype(np.float64).mean() - value) <= 4 * (high - low) / 2 / 64

    def test_what_bfloat16_holds_stays(self):
        values = [0.0, 1.0, -0.02001953125, 256.0, np.inf, -np.inf]
        np.testing.assert_array_equal(self.roundings(values), np.tile(np.float32(values), (4096, 1)))
        assert np.isnan(self.roundings([np.nan])).all()

    def test_leaves_and_entries_are_rounded_on_their_own(self):
        exact = jnp.full((2, 1000), 1.001, jnp.float32)
        leaves = round_to_dtypes([*exact], [*exact.astype(jnp.bfloat16)], jax.random.key(0))
        assert 0.05 < np.mean(np.asarray(leaves[0] != leaves[1])) < 0.5

    def test_without_a_key_it_goes_to_the_nearest(self):
        exact = jnp.asarray([1.001, 1.004, -1.004], jnp.float32)
        [nearest] = round_to_dtypes([exact], [exact.astype(jnp.bfloat16)], None)
        np.testing.assert_array_equal(nearest.astype(jnp.float32), np.float32([1.0, 1.0078125, -1.0078125]))

    def test_float32_and_counts_are_left_alone(self):
        tree = [jnp.asarray([1.001], jnp.float32), jnp.asarray(3, jnp.int32)]
        assert doubles.same_bits(round_to_dtypes(tree, tree, jax.random.key(0)), tree)


def in_float32(function):
    return lambda params, *rest: function(jax.tree.map(lambda x: x.astype(jnp.float32), params), *rest)


FLOAT32 = RowModel(in_float32(doubles.MODEL.hidden), in_float32(doubles.MODEL.head))


class TestBfloat16Weights:
    """Every step shrinks every weight by a ten-thousandth: a 20th of the smallest change that bfloat16 rounds up."""

    STEPS = 40
    PAIRS = doubles.random_pairs(2, vocab=40, seed=4)

    def trained(self, weights: str, *, seed: int = 0, start=None, steps: int = STEPS):
        settings = config(weights=weights, learning_rate=1e-2, weight_decay=1e-2, queries_per_step=2)

        train_step = make_train_step(FLOAT32, settings, seed=seed)
        rng = np.random.default_rng(0)
        tables = {name: jnp.asarray(rng.uniform(0.1, 0.5, (40, 40)), jnp.bfloat16) for name in ("context", "last")}
        params = jax.tree.map(lambda x: x.astype(settings.weights_dtype), tables)
        state = init_state(params, make_optimizer(settings)) if start is None else start
        before = jax.tree.map(np.array, state.params)
        shares = []
        for _ in range(steps):
            state, metrics = train_step(state, None, micro(self.PAIRS))
            shares.append(float(metrics.share_changed))
        unused = np.ones(40, bool)  # rows without gradient, which weight decay alone moves
        unused[[t for pair in self.PAIRS for ids in (*pair.prompt_ids, *pair.response_ids) for t in ids]] = False
        shrunk = [np.float64(state.params[name][unused]) / np.float64(before[name][unused]) for name in before]
        return state, shares, float(np.mean(np.log(shrunk))), unused.sum() * 80

    def test_rounded_stochastically_they_move_as_far_as_in_float32(self):
        exact, stochastic = (self.trained(weights) for weights in ("float32", "bfloat16_stochastic"))
        assert exact[2] == pytest.approx(-1e-4 * self.STEPS, rel=1e-3)
        # A rounding is off by at most 2^-7 of a weight, and goes that far up or down in 1 case of 50: over all weights
        # and steps the mean's standard deviation is 2^-7 (STEPS / 50 / weights) ** 0.5.
        assert stochastic[2] == pytest.approx(exact[2], abs=4 * 2**-7 * (self.STEPS / 50 / stochastic[3]) ** 0.5)
        assert min(exact[1]) > 0.99 and 0.001 < np.mean(stochastic[1]) < 0.2

    def test_rounded_to_nearest_they_do_not_move(self):
        """The authors' mode, and what the metric is for: only the few weights with a gradient may move."""
        _, shares, moved, _ = self.trained("bfloat16")
        assert moved == 0.0 and max(shares) < 0.2

    @pytest.mark.parametrize("weights", ["bfloat16", "bfloat16_stochastic"])
    def test_the_state_is_bfloat16_and_takes_half_the_memory(self, weights):
        state, half = self.trained(weights, steps=1)[0], self.trained("float32", steps=1)[0]
        dtypes = {leaf.dtype for leaf in jax.tree.leaves((state.params, state.opt_state)) if leaf.ndim}
        assert dtypes == {jnp.dtype(jnp.bfloat16)}
        sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(s) if leaf.ndim) for s in (state, half)]
        assert 2 * sizes[0] == sizes[1]

    def test_the_same_seed_rounds_alike_and_a_resumed_run_goes_on_alike(self):
        whole, other = (self.trained("bfloat16_stochastic", seed=seed, steps=6)[0] for seed in (3, 4))
        first = self.trained("bfloat16_stochastic", seed=3, steps=3)[0]
        assert doubles.same_bits(self.trained("bfloat16_stochastic", seed=3, start=first, steps=3)[0], whole)
        assert not doubles.same_bits(other.params, whole.params)

    def test_each_step_rounds_anew(self):
        """Else the same few weights would always be rounded up, and the rest never."""
        states = [self.trained("bfloat16_stochastic", steps=n)[0].params["last"] for n in (0, 1, 2)]
        moved = [np.asarray(a != b) for a, b in zip(states[1:], states, strict=False)]
        assert moved[0].any() and moved[1].any() and np.mean(moved[0] == moved[1]) < 1.0
        assert not (moved[0] & moved[1])[10:].all()


class TestProgressOfTraining:
    @pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
    def test_the_loss_falls_and_weights_move(self, optimizer):
        state, seen = run(config(optimizer=optimizer, learning_rate=0.5), steps=8)
        losses = [float(metrics.loss) for metrics in seen]
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.05
        assert all(0.5 < float(metrics.share_changed) <= 1.0 for metrics in seen)
        assert int(state.step) == 8

    def test_share_changed_counts_the_weights_that_differ(self):
        # Without weight decay, the weights of tokens that occur nowhere have no gradient and stay.
        batch = micro([doubles.pair([[1, 2], [3]], [[2], [3]])] * 2)
        settings = config(queries_per_step=2)
        before = jax.tree.map(np.array, small_params())
        state, [metrics] = run(settings, batch=batch)
        moved = sum(int(np.sum(np.asarray(state.params[name]) != before[name])) for name in before)
        assert 0 < moved < 2 * VOCAB**2
        assert float(metrics.share_changed) == pytest.approx(moved / (2 * VOCAB**2), rel=1e-6)

    def test_an_update_below_the_last_place_changes_nothing_and_says_so(self):
        big = jax.tree.map(lambda x: x + 1000.0, small_params())
        _, [metrics] = run(config(learning_rate=1e-9), params=big)
        assert float(metrics.share_changed) == 0.0

    def test_one_trace_serves_all_steps(self):
        model = doubles.MODEL._replace(hidden=chex.assert_max_traces(doubles.hidden, n=1))
        packing = doubles.packing(*(doubles.random_pairs(4, vocab=VOCAB, seed=seed) for seed in range(3)))
        train_step = make_train_step(model, config())
        state = init_state(small_params(), make_optimizer(config()))
        for seed in range(3):
            state, _ = train_step(state, None, packing.stacked(seed))


def poisoned(params, rows):
    """The double, but a row with the token POISON is NaN."""
    return jnp.where(jnp.any(rows.tokens == POISON, axis=1)[:, None, None], jnp.nan, doubles.hidden(params, rows))


class TestNonFinite:
    good = [doubles.pair([[1, 2], [3, 4]], [[5], [n]], f"good-{n}") for n in range(4)]
    bad = doubles.pair([[1, 2], [3, POISON]], [[5], [6]], "bad")

    @pytest.mark.parametrize("kl_beta", [0.0, 1.0])
    def test_the_state_stays_bitwise_and_the_queries_are_named(self, kl_beta):
        settings = config(kl_beta=kl_beta)
        model = doubles.MODEL._replace(hidden=poisoned)
        train_step = make_train_step(model, settings)
        state = init_state(small_params(), make_optimizer(settings))

        def stepped(pairs):
            base = doubles.reference(model, small_params(), micro(pairs)) if kl_beta else None
            return train_step(state, base, micro(pairs))

        state, metrics = stepped(self.good)
        assert bool(metrics.finite)
        before = jax.tree.map(np.array, state)
        pairs = [self.good[0], self.good[1], self.bad, self.good[3]]
        state, metrics = stepped(pairs)
        assert not bool(metrics.finite)
        assert doubles.same_bits(state, before)
        assert int(state.step) == 1
        assert nonfinite_examples(metrics, [pair.example_id for pair in pairs]) == ["bad"]
        assert float(metrics.share_changed) == 0.0
        state, metrics = stepped(self.good)  # and the next step is an ordinary one
        assert bool(metrics.finite) and int(state.step) == 2

    def test_a_gradient_that_overflows_behind_a_finite_loss_is_refused(self):
        @jax.custom_vjp
        def explode(x):
            return x

        explode.defvjp(lambda x: (x, None), lambda _, g: (g * jnp.inf,))
        model = doubles.MODEL._replace(hidden=lambda *args: explode(doubles.hidden(*args)))
        state, [metrics] = run(config(), model=model)
        assert np.isfinite(metrics.loss) and not bool(metrics.finite)
        assert doubles.same_bits(state.params, jax.tree.map(np.asarray, small_params()))
        assert nonfinite_examples(metrics, ["a", "b", "c", "d"]) == []


class TestQueryIndices:
    def order(self, n_pairs: int, steps: int, *, size: int = 4, seed: int = 0, iteration: int = 1) -> list[int]:
        return [
            index
            for step in range(steps)
            for index in query_indices(n_pairs, step, seed=seed, iteration=iteration, queries_per_step=size)
        ]

    @pytest.mark.parametrize(("n_pairs", "size"), [(10, 4), (8, 4), (3, 7), (1, 3)])
    def test_every_epoch_is_a_permutation(self, n_pairs, size):
        order = self.order(n_pairs, steps=-(-5 * n_pairs // size), size=size)
        for epoch in range(5):
            assert sorted(order[epoch * n_pairs : (epoch + 1) * n_pairs]) == list(range(n_pairs))

    def test_epochs_iterations_and_seeds_differ(self):
        order = self.order(40, 20)
        assert order[:40] != order[40:80] and order[:40] != list(range(40))
        assert order != self.order(40, 20, iteration=2) and order != self.order(40, 20, seed=1)

    def test_a_step_does_not_depend_on_the_steps_before_it(self):
        assert self.order(10, 6)[20:] == query_indices(10, 5, seed=0, iteration=1, queries_per_step=4)
        assert self.order(10, 6) == self.order(10, 3, size=8)  # nor on how many queries share a step

    def test_the_order_is_part_of_the_promise(self):
        # D0: the same on every machine and after every upgrade; written down once.
        assert self.order(7, 1, size=7) == [3, 6, 2, 1, 0, 5, 4]


def adamw_by_torch(p, gradients, *, lr, b1, b2, eps, weight_decay):
    """torch.optim.AdamW, from the algorithm box of its documentation, in float64."""
    p, m, v = p.astype(np.float64), 0.0, 0.0
    for t, g in enumerate(gradients, start=1):
        p = p - lr * weight_decay * p
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        p = p - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return p


def rmsprop_by_torch(p, gradients, *, lr, alpha, eps):
    """torch.optim.RMSprop without momentum, not centered, in float64."""
    p, v = p.astype(np.float64), 0.0
    for g in gradients:
        v = alpha * v + (1 - alpha) * g**2
        p = p - lr * g / (np.sqrt(v) + eps)
    return p


class TestOptimizers:
    start = np.random.default_rng(0).normal(size=20).astype(np.float32)
    # Sizes from 1e-9 to 10: eps matters for some, not for others.
    gradients = np.random.default_rng(1).normal(size=(4, 20)) * np.geomspace(1e-9, 10, 20)

    def updated(self, settings: TrainConfig) -> np.ndarray:
        optimizer = make_optimizer(settings)
        params = {"w": jnp.asarray(self.start)}
        state = optimizer.init(params)
        for gradient in self.gradients.astype(np.float32):
            with jax.numpy_dtype_promotion("standard"):  # as in the train step
                updates, state = optimizer.update({"w": jnp.asarray(gradient)}, state, params)
            params = optax.apply_updates(params, updates)
        return np.asarray(params["w"])

    def assert_same(self, settings: TrainConfig, expected: np.ndarray):
        # optax forms 1 - b2^t in float32, torch in float64. At b2 = 0.999 and t = 1 that is 0.001 +- 6e-8, after the
        # root 3e-5 of an update of 0.05 = 1.5e-6, and 1/2, 1/3, 1/4 of it at t = 2, 3, 4. The rest rounds at 1e-7.
        np.testing.assert_allclose(self.updated(settings), expected, rtol=0, atol=4e-6)

    @pytest.mark.parametrize(
        ("b1", "b2", "eps", "weight_decay"), [(0.9, 0.999, 1e-8, 0.01), (0.6, 0.8, 1e-2, 0.3), (0.9, 0.9, 1e-8, 0.0)]
    )
    def test_adamw_is_torchs(self, b1, b2, eps, weight_decay):
        changes = {"adam_b1": b1, "adam_b2": b2, "eps": eps, "weight_decay": weight_decay}
        expected = adamw_by_torch(self.start, self.gradients, lr=0.05, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
        settings = TrainConfig(optimizer="adamw", learning_rate=0.05, **changes)
        self.assert_same(settings, expected)

    @pytest.mark.parametrize(("alpha", "eps"), [(0.99, 1e-8), (0.7, 1e-2)])
    def test_rmsprop_is_torchs(self, alpha, eps):
        expected = rmsprop_by_torch(self.start, self.gradients, lr=0.05, alpha=alpha, eps=eps)
        settings = TrainConfig(optimizer="rmsprop", learning_rate=0.05, rmsprop_decay=alpha, eps=eps, weight_decay=0.5)
        self.assert_same(settings, expected)

    def test_rmsprops_first_update_is_ten_learning_rates_per_weight(self):
        # v = 0.01 g^2, so g / sqrt(v) = 10.
        settings = TrainConfig(optimizer="rmsprop", learning_rate=1e-3)
        optimizer = make_optimizer(settings)
        params = {"w": jnp.array([1.0, -2.0])}
        updates, _ = optimizer.update({"w": jnp.array([3.0, -0.5])}, optimizer.init(params), params)
        np.testing.assert_allclose(updates["w"], [-1e-2, 1e-2], rtol=1e-6)

    def test_the_defaults_are_the_papers(self):
        assert (TrainConfig().learning_rate, TrainConfig().weight_decay, TrainConfig().eps) == (5e-7, 0.01, 1e-8)
        assert (TrainConfig().adam_b1, TrainConfig().adam_b2, TrainConfig().rmsprop_decay) == (0.9, 0.999, 0.99)


def test_the_first_state_has_step_zero_and_moments_of_zero():
    state = init_state(small_params(), make_optimizer(config()))
    assert isinstance(state, TrainState) and int(state.step) == 0 and state.step.dtype == jnp.int32
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 4 and all(not np.any(leaf) for leaf in moments)
