"""The judges that are programs, by the names that a config has for them."""

from sami_jax.evaluation.miniature_judge import MINIATURE
from sami_jax.evaluation.verdicts import Judge

JUDGES: dict[str, Judge] = {"miniature": MINIATURE}


def judge_by_name(name: str) -> Judge | None:
    """The judge of responses, each by itself, of a config's name; None where there is none, or one of pairs."""
    return JUDGES.get(name)
