"""What the benchmarks here share: queries whose lengths are like those of TL;DR's posts and summaries, and what the
authors' layout makes of them."""

from collections.abc import Sequence

import numpy as np

from sami_jax.data.pairs import Pair
from sami_jax.model.shape import DecoderConfig


def draw_pairs(queries: int, constitutions: int, *, vocab: int, length: float = 1.0) -> list[Pair]:
    """Prompts of 460 +- 90 tokens, responses log-normal with a mean of 109; `length` times these lengths."""
    rng = np.random.default_rng(0)

    def ids(count: float) -> tuple[int, ...]:
        return tuple(int(i) for i in rng.integers(3, vocab, max(1, round(count * length))))

    pairs = []
    for number in range(queries):
        post = rng.normal(460, 90)
        prompts = [ids(np.clip(post + rng.normal(0, 10), 80, 900)) for _ in range(constitutions)]
        responses = [ids(np.clip(rng.lognormal(np.log(94), 0.56), 5, 350)) for _ in range(constitutions)]
        pairs.append(Pair(number, (), (), tuple(prompts), tuple(responses)))
    return pairs


def full_sequences(pairs: Sequence[Pair]) -> list[int]:
    """The width of each query's C x C sequences in the authors' layout: the longest prompt and response together."""
    return [max(map(len, one.prompt_ids)) + max(map(len, one.response_ids)) for one in pairs]


def full_flops(shape: DecoderConfig, pairs: Sequence[Pair]) -> float:
    """A step in the authors' layout: 2 FLOPs a weight and token forward, 4 backward, and causal attention."""
    weights = matmul_weights(shape) + shape.embed_dim * shape.vocab_size
    total = 0.0
    for pair, width in zip(pairs, full_sequences(pairs), strict=True):
        tokens = len(pair.prompt_ids) * len(pair.response_ids) * width
        total += 6 * weights * tokens + 3 * 4 * shape.n_layers * shape.n_heads * shape.head_dim * tokens * width / 2
    return total


def matmul_weights(shape: DecoderConfig) -> int:
    """Of all layers, those that a token meets."""
    attention = 2 * shape.n_heads * shape.head_dim + 2 * shape.n_kv_heads * shape.head_dim
    mlps = 3 * shape.mlp_dim * (shape.experts_per_token or 1)
    return shape.n_layers * shape.embed_dim * (attention + mlps + (shape.n_experts or 0))
