"""The settings of a chat: who is asked for short texts, in which way, and what it may cost."""

import dataclasses
import re
import urllib.parse

from sami_jax.config.fields import setting
from sami_jax.errors import BadConfigError

OPENAI_URL = "https://api.openai.com/v1"
REPLAY = "replay:"
# Settings of who may be asked, how fast and for how much: no answer depends on them.
FREE = (
    "api_key_env",
    "concurrency",
    "timeout_s",
    "max_cost_usd",
    "usd_per_million_input_tokens",
    "usd_per_million_output_tokens",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskingConfig:
    """How somebody is asked, and what it may cost."""

    base_url: str = setting(
        "", f"an OpenAI-compatible server (vLLM, llama.cpp, a provider); {OPENAI_URL} if only its model is named"
    )
    api_key_env: str = setting(
        "OPENAI_API_KEY", "environment variable that holds the server's key; a local server needs none"
    )
    max_tokens: int = setting(2048, "longest answer in tokens, a server's reasoning included", at_least=1)
    temperature: float = setting(
        0.0, "of a server's sampling; -1 sends none, for models that take none. A model on these devices is greedy"
    )
    concurrency: int = setting(
        8, "questions that are asked at once; a model on these devices answers so many together", at_least=1
    )
    timeout_s: float = setting(120.0, "seconds that a server has for an answer, six times", above=0)
    max_cost_usd: float = setting(
        0.0,
        "budget in US dollars; a question that might exceed it is not asked. 0: none",
        at_least=0,
    )
    usd_per_million_input_tokens: float = setting(0.0, "the server's price, for the budget", at_least=0)
    usd_per_million_output_tokens: float = setting(0.0, "the server's price, for the budget", at_least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig(AskingConfig):
    """A model on these devices, recorded answers, or an OpenAI-compatible server."""

    model: str = setting(
        "",
        "instead of a server, a model folder with a chat template, or its name on the Hub, sampled from on these "
        "devices; or replay:FILE, answers that were recorded",
        path=True,
    )
    chat_model: str = setting("", "the server's name of the model that answers")

    def __post_init__(self) -> None:
        if self.model and (self.base_url or self.chat_model):
            raise BadConfigError("model and a server (base_url, chat_model) are both given; leave one of them out.")
        if self.base_url and not self.chat_model:
            raise BadConfigError(f"base_url is {self.base_url}, but chat_model names no model of it; name one.")
        if self.temperature < 0 and self.temperature != -1:
            raise BadConfigError(f"temperature is {self.temperature}; it must be at least 0, or -1 to send none.")
        if self.model and self.temperature > 0:
            raise BadConfigError(
                f"temperature is {self.temperature}, but a model on these devices is greedy; set temperature=0."
            )
        if self.base_url:
            _check_url(self.base_url)
        if not re.fullmatch(r"[A-Za-z_]\w*", self.api_key_env):  # which may be the key itself: it is not shown
            raise BadConfigError("api_key_env is no name; name the environment variable that holds the server's key.")
        prices = self.usd_per_million_input_tokens, self.usd_per_million_output_tokens
        if self.max_cost_usd and self.chat_model and not all(prices):
            raise BadConfigError(
                f"max_cost_usd is {self.max_cost_usd}, but a price is missing: give the server's "
                "usd_per_million_input_tokens and usd_per_million_output_tokens."
            )

    @property
    def enabled(self) -> bool:
        """Whether anyone is asked."""
        return bool(self.model or self.chat_model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriterConfig(ChatConfig):
    """Who writes principles, and about what."""

    about: str = setting("", 'what the principles are for, as in "summaries of forum posts"')
    count: int = setting(20, "principles that are written", at_least=1)
    held_out: int = setting(0, "so many of them, the last, are kept from training, for evaluation only", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.enabled and not self.about.strip():
            raise BadConfigError('about is empty; say what the principles are for, as in "summaries of forum posts".')
        if self.about and not self.enabled:
            raise BadConfigError("Nobody is named who writes the principles: give model, or base_url and chat_model.")
        if self.held_out >= self.count:
            raise BadConfigError(f"held_out is {self.held_out} of a count of {self.count}: none is left to train on.")


def _check_url(url: str) -> None:
    """Raises BadConfigError for what is no server's URL, or holds a secret: it is printed and recorded."""
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable:
        raise BadConfigError(f"base_url is {url!r}; it must be a URL such as http://localhost:8000/v1.")
    if parts.username or parts.password or parts.query:
        raise BadConfigError(
            "base_url holds more than a server and a path, perhaps a key: put the key into the environment variable "
            "that api_key_env names."
        )
