"""The settings of a miniature's base model."""

import dataclasses

from sami_jax.config.fields import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """The miniature's base model, made from scratch by `sami pretrain`."""

    enabled: bool = setting(False, "make the base model, principles and queries of a miniature world")
    cache_dir: str = setting(
        "runs/pretrained", "folder that keeps finished bases, each under the hash of what made it", path=True
    )
    seed: int = setting(0, "decides the world's habits, held-out principles, corpus and initial weights")
    vocab_size: int = setting(1024, "tokens of the byte-level BPE; the embedding has as many rows", at_least=512)
    embed_dim: int = setting(128, "D, width of the model", at_least=8)
    n_layers: int = setting(3, "L, layers", at_least=1)
    n_heads: int = setting(4, "N, attention heads", at_least=1)
    n_kv_heads: int = setting(2, "K, key/value heads", at_least=1)
    mlp_dim: int = setting(384, "F, width of the SwiGLU", at_least=8)
    max_positions: int = setting(8192, "longest sequence in tokens", at_least=64)
    steps: int = setting(2000, "optimizer steps", at_least=1)
    batch_size: int = setting(16, "documents per step", at_least=1)
    matrix_learning_rate: float = setting(0.02, "peak learning rate of Muon, on the layers' matrices", above=0)
    other_learning_rate: float = setting(3e-3, "peak learning rate of AdamW, on the rest", above=0)
    warmup_share: float = setting(
        0.05, "share of the steps in which the learning rate rises; then linear to 0", at_least=0
    )
    prompt_weight: float = setting(0.1, "weight of prompt tokens in the loss; response tokens have 1", at_least=0)
    train_queries: int = setting(8192, "posts for SAMI's training", at_least=2)
    validation_queries: int = setting(250, "posts to choose settings on", at_least=1)
    test_queries: int = setting(250, "posts to report results on, about people training never mentions", at_least=1)
