"""The settings of sampling."""

import dataclasses

from sami_jax.config.fields import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Greedy sampling of responses."""

    max_new_tokens: int = setting(350, "longest response in tokens", at_least=1)
    stop: tuple[str, ...] = setting(("Human:", "###"), "texts that end a response; what follows is cut")
    slots: int = setting(128, "responses that are written at once; one that ends makes room for the next", at_least=1)
    shard_queries: int = setting(
        256,
        "queries whose responses are kept together, and lost together when killed: several times the slots",
        at_least=1,
    )
    chunk_steps: int = setting(16, "tokens that each slot writes between two looks at what has ended", at_least=1)
    prefill_tokens: int = setting(
        1024, "tokens of prompts that each device reads at once; more where one prompt is longer", at_least=1
    )
