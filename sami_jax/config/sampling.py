"""The settings of sampling."""

import dataclasses
from typing import Literal

from sami_jax.config.fields import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How responses are sampled."""

    max_new_tokens: int = setting(350, "longest response in tokens", at_least=1)
    stop: tuple[str, ...] = setting(("Human:", "###"), "texts that end a response; what follows is cut")
    temperature: float = setting(0.0, "0 takes the likeliest token; above it, tokens are drawn", at_least=0)
    top_p: float = setting(
        1.0, "draw from the likeliest tokens that together have this probability; 1 for all", above=0, at_most=1
    )
    min_p: float = setting(
        0.0, "draw only tokens with this share of the likeliest one's probability; 0 for all", at_least=0, at_most=1
    )
    long_prompts: Literal["refuse", "drop"] = setting(
        "refuse",
        "what becomes of training queries, and of prompts of `sami generate`, that may not fit with a response",
        choices=("refuse", "drop"),
    )
    slots: int = setting(128, "responses that are written at once; one that ends makes room for the next", at_least=1)
    shard_queries: int = setting(
        512,
        "queries whose responses are kept together, and lost together when killed: several times the slots",
        at_least=1,
    )
    chunk_steps: int = setting(16, "tokens that each slot writes between two looks at what has ended", at_least=1)
    prefill_tokens: int = setting(
        1024, "tokens of prompts that each device reads at once; more where one prompt is longer", at_least=1
    )

    @property
    def manifest(self) -> dict[str, float]:
        """How tokens were chosen, to be written beside the data."""
        return {"temperature": self.temperature, "top_p": self.top_p, "min_p": self.min_p}
