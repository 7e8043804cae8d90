"""The settings of sampling."""

import dataclasses

from sami_jax.config.fields import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Greedy sampling of responses."""

    max_new_tokens: int = setting(350, "longest response in tokens", at_least=1)
    stop: tuple[str, ...] = setting(("Human:", "###"), "texts that end a response; what follows is cut")
    chunk_queries: int = setting(64, "queries sampled together, and lost together when killed", at_least=1)
    round_prompt_tokens_to: int = setting(
        32, "pad prompts to a multiple of this (long ones coarser): few shapes compile", at_least=1
    )
