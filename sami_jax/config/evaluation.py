"""The settings of evaluation."""

import dataclasses

from sami_jax.config.fields import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured of the base and of every iteration."""

    judge: str = setting("none", "none: mutual information and lengths only; miniature: the miniature world's grammar")
    held_out: bool = setting(True, "also evaluate on the held-out principles, where there are enough")
