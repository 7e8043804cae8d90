"""The settings of evaluation."""

import dataclasses
from typing import Any

from sami_jax.config.chat import REPLAY, AskingConfig, ChatConfig
from sami_jax.config.fields import setting
from sami_jax.errors import BadConfigError
from sami_jax.types import Orders

MODEL, SERVER = "model:", "server"
# Settings that judges of pairs alone read.
ASKING = (*(field.name for field in dataclasses.fields(AskingConfig)), "judge_model", "orders", "per_principle")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig(AskingConfig):
    """What is measured of the base and of every iteration; with a judge that is a language model, how it is asked."""

    judge: str = setting(
        "none",
        "none: mutual information and lengths only; miniature: the miniature world's grammar; server: evaluation."
        "judge_model compares responses with the base's; model:DIR: an instruction-tuned model on these devices does, "
        "a folder or a name on the Hub; replay:FILE: recorded answers do",
        path=True,
    )
    judge_model: str = setting("", "the server's name of the model that judges")
    orders: Orders = setting(
        "both",
        "both: each pair is judged twice, with either response first; paper: once, in a drawn order",
        choices=("both", "paper"),
    )
    per_principle: bool = setting(False, "a judge is asked about one principle at a time, not all of a constitution")
    instruct: str = setting(
        "",
        "an instruction-tuned model, a folder or a name on the Hub: it answers the same queries through its chat "
        "template, and responses are compared with its own, too",
        path=True,
    )
    held_out: bool = setting(True, "also evaluate on the held-out principles, where there are enough")

    def __post_init__(self) -> None:
        named = any(self.judge.startswith(kind) and self.judge != kind for kind in (MODEL, REPLAY))
        if not named and self.judge not in ("none", "miniature", SERVER):
            raise BadConfigError(
                f"config.evaluation.judge is {self.judge!r}; choose one of none, miniature, server, model:DIR, "
                "replay:FILE."
            )
        if self.instruct and self.judge == "none":
            raise BadConfigError("config.evaluation.instruct is to be compared with, but config.evaluation.judge=none.")
        if self.judge == SERVER and not self.judge_model:
            raise BadConfigError("The judge is a server, but judge_model names no model of it; name one.")
        if self.judge != SERVER and (self.base_url or self.judge_model):
            raise BadConfigError(
                f"base_url and judge_model are a server's, but the judge is {self.judge!r}; set judge=server, or leave "
                "them out."
            )
        if self.is_asked:
            _ = self.chat  # for what it refuses

    @property
    def is_asked(self) -> bool:
        """Whether the judge is a language model, or a record of one: it compares, and is asked through a chat."""
        return self.judge not in ("none", "miniature")

    @property
    def chat(self) -> ChatConfig:
        """Who is asked, of a judge that `is_asked`."""
        how: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(AskingConfig)}
        who: dict[str, Any] = (
            {"chat_model": self.judge_model} if self.judge == SERVER else {"model": self.judge.removeprefix(MODEL)}
        )
        return ChatConfig(**who, **how)
