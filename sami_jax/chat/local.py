"""A model folder as a chat: its own chat template, answered by the sampler, or by log-probs, on the device mesh."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sami_jax.chat.questions import Answer, Failure, Question, Reply, Spent, Take
from sami_jax.clock import time_now
from sami_jax.config.chat import ChatConfig
from sami_jax.config.mesh import MeshConfig
from sami_jax.config.sampling import SamplingConfig
from sami_jax.data.chat_template import ChatTemplate
from sami_jax.data.pairs import Pair
from sami_jax.data.prompts import Prompt
from sami_jax.errors import NonFiniteError, enough_memory
from sami_jax.huggingface.folder import folder_hash
from sami_jax.huggingface.hub import model_name
from sami_jax.huggingface.opened import LoadedModel, open_model
from sami_jax.responding import prompt_problem, respond
from sami_jax.sampling.stop_text import Response
from sami_jax.scoring.matrices import score_packed
from sami_jax.scoring.packed_rows import RowLimits, pack_rows
from sami_jax.sharding import batch_shards, more_devices
from sami_jax.types import Dtype

_ROUND_TOKENS_TO = 256  # a question with its choices is padded to a multiple, so that few shapes compile


class LocalModel:
    """Answers with a model on these devices: greedily, or with the most likely of a question's choices.

    Attributes:
      name: for people.
      settings: the model's contents, and the settings of sampling.
    """

    on_devices = True

    def __init__(self, folder: Path, config: ChatConfig, *, mesh: MeshConfig, compute_dtype: Dtype):
        """Opens the folder. The weights are read when the first question is asked.

        Args:
          folder: with a tokenizer that has a chat template.
          config: longest answer, and how many questions are answered together.
          mesh: the devices.
          compute_dtype: of activations and matmuls.

        Raises:
          BadDataError: the folder cannot be used, or has no chat template.
        """
        self.name = model_name(folder)
        self._config, self._dtype = config, compute_dtype
        self._opened = open_model(folder, mesh, compute_dtype)
        self._template = ChatTemplate(self._opened.tokenizer)
        self._template.check(folder)
        self.settings = {
            "model": folder_hash(folder),
            "max_tokens": config.max_tokens,
            "temperature": 0.0,
            "compute_dtype": compute_dtype,
        }

    def replies(
        self, take: Take, *, may_try_again: Callable[[int], bool], stopping: Callable[[], bool]
    ) -> Iterator[tuple[int, Reply]]:
        """See `Chat.replies`; `config.concurrency` questions are answered together."""
        taken = iter(take, None)
        while not stopping() and (chunk := list(itertools.islice(taken, self._config.concurrency))):
            numbers, asked = zip(*chunk, strict=True)
            yield from zip(numbers, self._answered(asked), strict=True)

    def _answered(self, questions: Sequence[Question]) -> list[Reply]:
        asked = [self._asked(question) for question in questions]
        fitting = [one for one in asked if not one.problem]
        free = [one.prompt for one in fitting if not one.choice_ids]
        closed = [one for one in fitting if one.choice_ids]
        with enough_memory(
            f"answering {len(questions)} questions at once",
            f"lower concurrency, now {self._config.concurrency}",
            more_devices(self._opened.mesh),
        ):
            sampling = SamplingConfig(max_new_tokens=self._config.max_tokens, stop=(), slots=self._config.concurrency)
            responses = iter(respond(self._loaded, free, sampling) if free else ())
            logps = iter(self._choice_logps(closed) if closed else ())
        replies: list[Reply] = []
        for one, question in zip(asked, questions, strict=True):
            if one.problem:
                replies.append(Failure("too_long", f"finds the question too long: it {one.problem.rstrip('.')}"))
            elif one.choice_ids:
                replies.append(self._chosen(one, question, next(logps)))
            else:
                replies.append(self._said(one, next(responses)))
        return replies

    def _asked(self, question: Question) -> "_Asked":
        tokenizer = self._opened.tokenizer
        spans = self._template.spans(question.system, question.user)
        prompt = Prompt("".join(span.text for span in spans), tuple(tokenizer.chat_ids(spans)))
        choices = [
            tuple(tokenizer.chat_response_ids(spans, self._template.lead + choice, behind=prompt.ids))
            for choice in question.choices
        ]
        new_tokens = max(map(len, choices), default=self._config.max_tokens)
        problem = prompt_problem(self._opened, prompt.ids, new_tokens, limit="max_tokens")
        return _Asked(prompt, tuple(choices), problem)

    def _choice_logps(self, asked: Sequence["_Asked"]) -> np.ndarray:
        """[Q, R] log-prob in nats of each choice behind its question."""
        pairs = [Pair(number, ("",), ("",), (one.prompt.ids,), one.choice_ids) for number, one in enumerate(asked)]
        loaded, shards = self._loaded, batch_shards(self._opened.mesh)
        longest = max(len(one.prompt.ids) + sum(map(len, one.choice_ids)) for one in asked)
        limits = RowLimits(
            shards=shards,
            rows_per_shard=-(-self._config.concurrency // shards),
            widest=longest,
            multiple=_ROUND_TOKENS_TO,
            dear_width=longest,
            queries=self._config.concurrency,
        )
        packing = pack_rows([pairs], limits)
        logps = score_packed(
            loaded.model.rows,
            loaded.params,
            packing,
            0,
            normalize="sum",
            mesh=loaded.mesh,
            scored=lambda done: None,
        )[:, 0]
        if not np.isfinite(logps).all():
            raise NonFiniteError(
                f"The log-probs of {self.name} are not finite; the model is damaged; bring back a copy."
            )
        return logps

    def _chosen(self, asked: "_Asked", question: Question, logps: np.ndarray) -> Answer:
        spent = Spent(len(asked.prompt.ids), max(map(len, asked.choice_ids)))
        text = question.choices[int(logps.argmax())]
        return Answer(text, True, self.name, time_now(), spent, logps=[float(logp) for logp in logps])

    def _said(self, asked: "_Asked", response: Response) -> Reply:
        spent = Spent(len(asked.prompt.ids), len(response.ids))
        if not response.text:
            return Failure("no_text", "answers without any text", spent)
        return Answer(response.text, response.finished, self.name, time_now(), spent)

    @functools.cached_property
    def _loaded(self) -> LoadedModel:
        return self._opened.loaded(self._dtype)


class _Asked(NamedTuple):
    """A question as the model is given it.

    Attributes:
      prompt: the chat, up to where the assistant begins.
      choice_ids: of the answers to choose between; () where it may say anything.
      problem: why it cannot be asked; "" where it can.
    """

    prompt: Prompt
    choice_ids: tuple[tuple[int, ...], ...]
    problem: str
