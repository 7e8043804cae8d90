"""The one way from a constitution and a query to a prompt's tokens, for sampling, training and scoring."""

import functools
from collections.abc import Sequence

from sami_jax.config.prompts import PromptsConfig
from sami_jax.data.chat_template import ChatTemplate
from sami_jax.data.prompts import Prompt, render
from sami_jax.data.tasks import Task
from sami_jax.data.tokenizer import Span, Tokenizer


class Renderer:
    """Renders the prompts of a config for a tokenizer."""

    def __init__(self, config: PromptsConfig, tokenizer: Tokenizer):
        self._config, self._tokenizer = config, tokenizer

    def generation(self, task: Task) -> list[Prompt]:
        """The C prompts that a task is sampled from. Raises BadDataError where the chat template does not fit."""
        return [self.prompt(self._config.generation, c.text, task.query.text) for c in task.constitutions]

    def training(self, task: Task) -> list[Prompt]:
        """The C prompts that a task is trained and scored on; see `generation`."""
        return [self.prompt(self._config.training, c.text, task.query.text) for c in task.constitutions]

    def prompt(self, template: str, constitution: str, query: str) -> Prompt:
        """The prompt of one of the config's templates. Raises BadDataError where the chat template does not fit."""
        config, tokenizer = self._config, self._tokenizer
        prefix = config.response_prefix
        if config.style == "base":
            text = render(template, constitution=constitution, query=query)
            ids = tokenizer.prompt_ids(text)
            forced = tokenizer.response_ids(prefix, prompt=text, boundary=config.boundary)
        else:
            spans = self._spans(template, constitution, query)
            text, ids = "".join(span.text for span in spans), tokenizer.chat_ids(spans)
            forced = tokenizer.chat_response_ids(spans, self._chat.lead + prefix, behind=ids) if prefix else []
        return Prompt(text, (*ids, *forced), len(forced))

    @property
    def response_prefix(self) -> str:
        """What every response begins with; "" for nothing."""
        return self._config.response_prefix

    @property
    def tokenises_anew(self) -> bool:
        """Whether a response is not trained on the ids that were sampled."""
        return self._config.boundary == "authors" or self._config.chain_of_thought

    def response_ids(self, prompt: Prompt, response: str, constitution: str, query: str) -> tuple[int, ...]:
        """The ids of a response that is given as text, behind a training prompt's, which hold those of its prefix.

        Args:
          prompt: of the training template, the constitution and the query.
          response: its whole text, prefix included; "" has no ids.
          constitution: of the prompt.
          query: of the prompt.

        Raises:
          BadDataError: the tokenizer has no ids for it.
        """
        if not response:
            return ()
        config, tokenizer = self._config, self._tokenizer
        if config.style == "base":
            prefix, boundary = config.response_prefix, config.boundary
            return tuple(tokenizer.response_ids(response, prompt=prompt.text, boundary=boundary, prefix=prefix))
        spans = self._spans(config.training, constitution, query)
        return tuple(tokenizer.chat_response_ids(spans, self._chat.lead + response, behind=prompt.ids))

    def most_tokens(self, task: Task) -> int:
        """A number of tokens that no prompt of the task exceeds; quick, since nothing is tokenised."""
        config, query = self._config, task.query.text
        longest = max(
            len(render(config.system + template, constitution=c.text, query=query).encode())
            for template in (config.generation, config.training)
            for c in task.constitutions
        )
        return longest + self._most_other_tokens

    @functools.cached_property
    def _most_other_tokens(self) -> int:
        # A token is at least one byte, except those that the tokenizer puts in front, and the space of a first word.
        begin, prefix = len(self._tokenizer.leading_ids) + 2, len(self._config.response_prefix.encode())
        return begin + prefix + (self._chat.most_control_bytes + 2 if self._config.style == "chat" else 0)

    def _spans(self, template: str, constitution: str, query: str) -> Sequence[Span]:
        texts = (render(text, constitution=constitution, query=query) for text in (self._config.system, template))
        return self._chat.spans(*texts)

    @functools.cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self._tokenizer)


def plain_prompt(tokenizer: Tokenizer, text: str) -> Prompt:
    """A prompt that is given as text, without any template."""
    return Prompt(text, tuple(tokenizer.prompt_ids(text)))
