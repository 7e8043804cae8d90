"""The head in chunks, against float64 and against the logits of everything at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sami_jax.config.mesh import MeshConfig
from sami_jax.losses import response_kl, token_logps
from sami_jax.model.decoder import make_model
from sami_jax.scoring.head import default_chunk, label_terms, logits_of
from sami_jax.sharding import axes_sharding, batch_sharding, make_mesh, put_on_devices
from sami_jax.types import Reference
from tiny_models import tiny_config

G, L = 2, 21  # no multiple of the chunks below


class Case:
    """Two parts of labels, and cotangents of which half are 0, as padding has."""

    def __init__(self, vocab: int, *, columns: int | None = None, embed: int = 64, labels: int = L, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.vocab, columns = vocab, columns or vocab
        self.hidden, self.other = rng.normal(size=(2, G, labels, embed)).astype(np.float32)
        self.head, self.other_head = (rng.normal(size=(2, embed, columns)) * 2 * embed**-0.5).astype(np.float32)
        self.labels = rng.integers(0, vocab, (G, labels)).astype(np.int32)
        self.labels[0, :2] = 0, vocab - 1
        self.cotangents = rng.normal(size=(2, G, labels)).astype(np.float32) * rng.integers(0, 2, (2, G, labels))

    def reference(self) -> Reference:
        return Reference(jnp.asarray(self.other), jnp.asarray(self.other_head))

    def exact(self):
        """log-probs, KL, d_hidden, d_head by the definitions, in float64."""
        x, w, v = self.hidden.astype(np.float64), self.head[:, : self.vocab].astype(np.float64), self.vocab

        def log_softmax(z):
            z = z - z.max(axis=-1, keepdims=True)
            return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))

        p, q = log_softmax(x @ w), log_softmax(self.other.astype(np.float64) @ self.other_head[:, :v])
        logps = np.take_along_axis(p, self.labels[..., None], axis=-1)[..., 0]
        kls = np.sum(np.exp(p) * (p - q), axis=-1)
        chosen = np.arange(v) == self.labels[..., None]
        slope = self.cotangents[0][..., None] * (chosen - np.exp(p))
        slope += self.cotangents[1][..., None] * np.exp(p) * (p - q - kls[..., None])
        d_head = np.zeros(self.head.shape)
        d_head[:, :v] = np.einsum("gld,glv->dv", x, slope)
        return logps, kls, slope @ w.T, d_head

    def ours(self, *, dtype="float32", **how):
        """The same."""
        reference = jax.tree.map(lambda x: x.astype(dtype), self.reference())

        @jax.jit
        def outcome(hidden, head):
            of = functools.partial(label_terms, labels=self.labels, reference=reference, **how)
            out, pull = jax.vjp(of, hidden, head)
            return *out, *pull(tuple(map(jnp.asarray, self.cotangents)))

        return outcome(*(jnp.asarray(x, dtype) for x in (self.hidden, self.head)))


def relative(actual, expected) -> float:
    return float(np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max())


class TestFloat64:
    @pytest.mark.parametrize(("vocab", "chunk"), [(1000, 7), (1000, None), (32000, 16), (128256, 32)])
    def test_float32(self, vocab, chunk):
        case = Case(vocab)
        for ours, expected, tolerance in zip(
            case.ours(chunk=chunk), case.exact(), (1e-5, 5e-5, 5e-6, 5e-6), strict=True
        ):
            if tolerance >= 1e-5:  # nats: sums over the vocabulary of float32 terms near 10
                np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance)
            else:
                assert relative(ours, expected) < tolerance

    @pytest.mark.parametrize("vocab", [1000, 128256])
    def test_bfloat16_operands_and_float32_sums(self, vocab):
        case = Case(vocab)
        case.hidden, case.head, case.other, case.other_head = (
            np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
            for x in (case.hidden, case.head, case.other, case.other_head)
        )
        logps, kls, d_hidden, d_head = case.ours(dtype="bfloat16", chunk=16)
        expected = case.exact()
        np.testing.assert_allclose(logps, expected[0], rtol=0, atol=1e-5)  # of bfloat16 sums it would be 0.05
        np.testing.assert_allclose(kls, expected[1], rtol=0, atol=5e-5)
        assert logps.dtype == kls.dtype == jnp.float32 and d_hidden.dtype == d_head.dtype == jnp.bfloat16
        # 2^-8 for the cotangents of the logits, and once more for the result.
        assert relative(d_hidden, expected[2]) < 1e-2 and relative(d_head, expected[3]) < 1e-2

    @pytest.mark.parametrize(("vocab", "least"), [(1000, 0.03), (32000, 1e-3), (128256, 3e-4)])
    def test_a_padded_vocabulary(self, vocab, least):
        columns = vocab + 512 - vocab % 512 if vocab % 512 else vocab + 512
        case = Case(vocab, columns=columns)
        expected = case.exact()
        logps, kls, _, d_head = case.ours(chunk=16, vocab_size=vocab)
        np.testing.assert_allclose(logps, expected[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(kls, expected[1], rtol=0, atol=5e-5)
        assert relative(d_head, expected[3]) < 5e-6
        np.testing.assert_array_equal(d_head[:, vocab:], 0)
        # Unmasked, the padding takes its share of the probability: the test above would see it.
        assert np.abs(np.asarray(case.ours(chunk=16)[0]) - expected[0]).max() > least


class TestDefinitions:
    """`losses` is what a person reads; of all logits at once it is the same."""

    def test_token_logps_and_response_kl(self):
        case = Case(1000)
        logits, others = (logits_of(jnp.asarray(x), w) for x, w in ((case.hidden, case.head), case.reference()))
        logps, kls, *_ = case.ours(chunk=16)
        np.testing.assert_allclose(logps, jax.vmap(token_logps)(logits, case.labels), rtol=0, atol=1e-5)
        means = jax.vmap(response_kl)(logits, others, np.ones((G, L), bool))
        np.testing.assert_allclose(np.mean(kls, axis=1), means, rtol=1e-5)

    def test_kl_to_itself_is_zero_with_no_gradient(self):
        case = Case(1000)
        case.other, case.other_head, case.cotangents[0] = case.hidden, case.head, 0
        _, kls, d_hidden, d_head = case.ours(chunk=16)
        np.testing.assert_array_equal(kls, 0)
        np.testing.assert_array_equal(d_hidden, 0)
        np.testing.assert_array_equal(d_head, 0)

    def test_without_a_reference_there_is_no_kl(self):
        case = Case(1000)
        logps, kls = label_terms(case.hidden, case.head, jnp.asarray(case.labels), chunk=16)
        np.testing.assert_array_equal(kls, 0)
        np.testing.assert_array_equal(logps, case.ours(chunk=16)[0])

    def test_no_gradient_reaches_the_reference(self):
        case = Case(1000)

        def total(reference):
            return jnp.sum(label_terms(case.hidden, case.head, jnp.asarray(case.labels), reference)[1])

        for leaf in jax.grad(total)(case.reference()):
            np.testing.assert_array_equal(leaf, 0)

    @pytest.mark.parametrize("label", [-100, -1, 1000])
    def test_a_label_outside_the_vocabulary_is_nan(self, label):
        case = Case(1000, columns=1024)
        case.labels[0, 3] = label
        logps = np.asarray(case.ours(chunk=16, vocab_size=1000)[0])
        assert np.isnan(logps[0, 3]) and np.isnan(logps).sum() == 1

    def test_shapes_that_do_not_belong_together(self):
        case = Case(1000)
        labels, reference = jnp.asarray(case.labels), case.reference()
        for hidden, head, wrong, other in (
            (case.hidden[0], case.head, labels, None),
            (case.hidden, case.head, labels[:, 1:], None),
            (case.hidden, case.head, labels.astype(jnp.float32), None),
            (case.hidden, case.head, labels, reference._replace(head=reference.head[:, 1:])),
            (case.hidden, case.head, labels, reference._replace(hidden=reference.hidden[:1])),
        ):
            with pytest.raises(AssertionError):
                label_terms(hidden, head, wrong, other)


def test_fifty_bfloat16_steps_stay_with_float32_sums():
    """Gradients of a head in 64 chunks, descended on, against those of all logits in float32 on the same operands."""
    case = Case(500, embed=32, labels=256)
    start = jnp.asarray(case.head)
    hidden, labels = jnp.asarray(case.hidden, jnp.bfloat16), jnp.asarray(case.labels)
    exact = hidden.astype(jnp.float32)

    def in_chunks(head):
        return -jnp.mean(label_terms(hidden, head, labels, chunk=4)[0])

    def at_once(head):
        # The same rounding of the operand, passed straight through by the gradient.
        rounded = head + jax.lax.stop_gradient(head.astype(jnp.bfloat16).astype(jnp.float32) - head)
        return -jnp.mean(jax.vmap(token_logps)(exact @ rounded, labels))

    def trained(loss):
        def step(head, _):
            value, gradient = jax.value_and_grad(loss)(head)
            return head - 20.0 * gradient, value

        return jax.jit(lambda: jax.lax.scan(step, start, length=50))()

    (ours, losses), (expected, expected_losses) = trained(in_chunks), trained(at_once)
    assert expected_losses[-1] < 0.5 * expected_losses[0]
    # Each cotangent of a logit is rounded to bfloat16, by up to 2^-9 and without bias.
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-3)
    moved = float(jnp.linalg.norm(expected - start))
    assert float(jnp.linalg.norm(ours - expected)) < 2e-3 * moved


class TestMemory:
    def temporaries(self, chunk: int | None, kl: bool = False) -> float:
        """Bytes of temporaries of value and gradient, in units of the logits of all labels."""
        case = Case(4000, labels=512)
        reference = case.reference() if kl else None

        def total(hidden, head):
            return sum(map(jnp.sum, label_terms(hidden, head, jnp.asarray(case.labels), reference, chunk=chunk)))

        compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(case.hidden, case.head).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (4 * G * 512 * 4000)

    def test_no_more_than_a_few_chunks(self):
        whole, chunked, with_kl = self.temporaries(None), self.temporaries(64), self.temporaries(64, kl=True)
        assert whole >= 1  # the logits
        assert chunked < 0.5 and with_kl < 0.7

    def test_the_platform_decides_how_many_labels(self):
        assert default_chunk(32000, 4096, "cpu") == 2097 and default_chunk(32000, 4096, "tpu") == 4194
        assert default_chunk(128256, 8192, "gpu") == 8192  # whose logits take what the head's gradient takes
        assert default_chunk(10**9, 8192, "cpu") == 1
        config = tiny_config()
        assert make_model(config).rows.head_chunk == default_chunk(config.vocab_size, config.embed_dim, "cpu")
        assert make_model(config, head_chunk=5).rows.head_chunk == 5


@pytest.mark.parametrize("layout", [MeshConfig(fsdp=2, tensor=2), MeshConfig(data=2, expert=2)])
def test_on_several_devices_the_gradient_is_summed_where_the_weight_lives(layout):
    case, mesh = Case(1000), make_mesh(layout)
    sharding = axes_sharding(mesh, ("embed", "vocab"))
    expected = case.ours(chunk=16)
    spread = {"hidden": batch_sharding(mesh), "other": batch_sharding(mesh), "head": sharding, "other_head": sharding}
    if mesh.shape["data"] > 1:  # a part for each of the devices that share the batch
        case.hidden, case.other = (x.reshape(4, -1, 64)[:, :10] for x in (case.hidden[:, :20], case.other[:, :20]))
        case.labels, case.cotangents = case.labels[:, :20].reshape(4, 10), case.cotangents[..., :20].reshape(2, 4, 10)
        expected = case.ours(chunk=16)
    for name, one in spread.items():
        setattr(case, name, put_on_devices(getattr(case, name), one))
    for ours, theirs in zip(case.ours(chunk=16, sharding=sharding), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * float(jnp.abs(theirs).max()))
    assert case.ours(chunk=16, sharding=sharding)[3].sharding.is_equivalent_to(sharding, 2)
