"""The settings of training."""

import dataclasses

from sami_jax.config.fields import setting
from sami_jax.errors import BadConfigError
from sami_jax.types import Dtype, Normalize, Remat


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """SAMI training from the base model."""

    steps: tuple[int, ...] = setting((2, 4, 6), "optimizer steps of iteration 1, 2, ...; `sami train` uses the first")
    queries_per_step: int = setting(128, "queries in one optimizer step", at_least=1)
    rows_per_device: int = setting(
        2, "rows of packed queries in memory at once, for each device that shares the batch", at_least=1
    )
    max_row_tokens: int = setting(
        4096, "widest row: one prompt with all its responses must fit; rows are as wide as is fastest", at_least=1
    )
    head_chunk: int = setting(
        0,
        "response tokens whose logits are in memory at once, for each device that shares the batch; 0: as many as fill "
        "256 MiB on a CPU, elsewhere 512 MiB, or as many as the model is wide",
        at_least=0,
    )
    passes: float = setting(1.0, "how often a kept query is used at most, on average", at_least=1.0)
    optimizer: str = setting("adamw", "with torch's defaults", choices=("adamw", "rmsprop"))
    learning_rate: float = setting(5e-7, "constant, no warm-up", above=0)
    adam_b1: float = setting(0.9, "adamw: decay of the first moment", at_least=0, below=1)
    adam_b2: float = setting(0.999, "adamw: decay of the second moment", at_least=0, below=1)
    rmsprop_decay: float = setting(0.99, "rmsprop: decay of the squared gradient (torch's alpha)", at_least=0, below=1)
    eps: float = setting(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = setting(0.01, "adamw: decoupled weight decay", at_least=0)
    normalize: Normalize = setting(
        "mean", "a response's log-prob: mean over its tokens (authors' code) or sum (paper)", choices=("mean", "sum")
    )
    over_responses_weight: float = setting(0.5, "weight of the softmax over responses", at_least=0)
    over_constitutions_weight: float = setting(0.5, "weight of the softmax over constitutions", at_least=0)
    kl_beta: float = setting(0.0, "weight of KL(policy || base), mean over response tokens and cells", at_least=0)
    train_eos: bool = setting(False, "append the end-of-sequence token to the responses")
    checkpoint_every: int = setting(10, "optimizer steps between checkpoints", at_least=1)
    keep_checkpoints: bool = setting(False, "keep them when the exported model was written and read back")
    weights: str = setting(
        "float32",
        "how weights and optimizer state are kept; bfloat16 takes half the memory, but rounded to the nearest (the "
        "authors' mode) most weights never move",
        choices=("float32", "bfloat16_stochastic", "bfloat16"),
    )
    remat: Remat = setting(
        "full",
        "what the backward pass recomputes: none of a layer; all but the dots, its matmuls; or the full layer, in the "
        "least memory",
        choices=("none", "dots", "full"),
    )

    def __post_init__(self) -> None:
        if self.over_responses_weight + self.over_constitutions_weight <= 0:
            raise BadConfigError("config.train.over_responses_weight and over_constitutions_weight are both 0.")

    @property
    def weights_dtype(self) -> Dtype:
        """The format in which weights, gradients and optimizer state are kept."""
        return "float32" if self.weights == "float32" else "bfloat16"
