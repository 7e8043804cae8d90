"""The judges by the names that a config has for them."""

from sami_jax.errors import BadConfigError
from sami_jax.evaluation.miniature_judge import MINIATURE
from sami_jax.evaluation.verdicts import Judge

JUDGES: dict[str, Judge | None] = {"none": None, "miniature": MINIATURE}


def judge_by_name(name: str) -> Judge | None:
    """The judge of a config's name; None for "none". Raises BadConfigError for another name, and lists the known."""
    if name not in JUDGES:
        raise BadConfigError(f"config.evaluation.judge is {name!r}; choose one of {', '.join(JUDGES)}.")
    return JUDGES[name]
