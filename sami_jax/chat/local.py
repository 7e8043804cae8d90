"""A model folder as a chat: its own chat template, answered by the sampler on the device mesh."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sami_jax.chat.questions import Answer, Failure, Question, Reply, Spent, Take
from sami_jax.clock import time_now
from sami_jax.config.chat import ChatConfig
from sami_jax.config.mesh import MeshConfig
from sami_jax.config.sampling import SamplingConfig
from sami_jax.data.chat_template import ChatTemplate
from sami_jax.data.prompts import Prompt
from sami_jax.errors import BadDataError, enough_memory
from sami_jax.huggingface.folder import folder_hash
from sami_jax.huggingface.hub import model_name
from sami_jax.huggingface.opened import LoadedModel, open_model
from sami_jax.responding import prompt_problem, respond
from sami_jax.sharding import more_devices
from sami_jax.types import Dtype


class LocalModel:
    """Answers greedily with a model on these devices.

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
        try:
            self._template.spans("", "a")
        except BadDataError as error:
            reason = str(error).partition(" (")[0]
            raise BadDataError(
                f"{folder} cannot chat: {reason}. Take an instruction-tuned model with a chat template, or a server."
            ) from error
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
        prompts = [self._prompt(question) for question in questions]
        limit = self._config.max_tokens
        problems = [prompt_problem(self._opened, prompt.ids, limit, limit="max_tokens") for prompt in prompts]
        fitting = [prompt for prompt, problem in zip(prompts, problems, strict=True) if not problem]
        with enough_memory(
            f"answering {len(questions)} questions at once",
            f"lower concurrency, now {self._config.concurrency}",
            more_devices(self._opened.mesh),
        ):
            sampling = SamplingConfig(max_new_tokens=limit, stop=())
            responses = iter(respond(self._loaded, fitting, sampling, rows=len(fitting)) if fitting else ())
        replies: list[Reply] = []
        for prompt, problem in zip(prompts, problems, strict=True):
            if problem:
                replies.append(Failure("too_long", f"finds the question too long: it {problem.rstrip('.')}"))
                continue
            response = next(responses)
            spent = Spent(len(prompt.ids), len(response.ids))
            if response.text:
                replies.append(Answer(response.text, response.finished, self.name, time_now(), spent))
            else:
                replies.append(Failure("no_text", "answers without any text", spent))
        return replies

    def _prompt(self, question: Question) -> Prompt:
        spans = self._template.spans(question.system, question.user)
        return Prompt("".join(span.text for span in spans), tuple(self._opened.tokenizer.chat_ids(spans)))

    @functools.cached_property
    def _loaded(self) -> LoadedModel:
        return self._opened.loaded(self._dtype)
