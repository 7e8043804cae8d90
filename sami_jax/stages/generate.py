"""The stage that answers prompts of the user's own: the lines of a prompts file, each with its response."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from sami_jax.config.mesh import MeshConfig
from sami_jax.config.prompts import PromptsConfig
from sami_jax.config.run import RunConfig
from sami_jax.config.sampling import SamplingConfig
from sami_jax.data.authors import AnsweredQuestion, read_responses, responses_text
from sami_jax.data.prompts import Prompt
from sami_jax.data.rendering import Renderer, plain_prompt
from sami_jax.data.tokenizer import Tokenizer
from sami_jax.errors import BadDataError, enough_memory
from sami_jax.files import is_json_object, read_jsonl
from sami_jax.huggingface.opened import open_model
from sami_jax.progress import Progress
from sami_jax.responding import check_prompts, respond, too_long
from sami_jax.safe_point import SafePoint
from sami_jax.sampling.slots import Spent
from sami_jax.sampling.stop_text import Response
from sami_jax.stages.stage import FileStage, Output, Source
from sami_jax.types import Dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(FileStage):
    """Responses to the prompts of a file.

    Attributes:
      model: folder.
      prompts: see `read_prompts`.
      templates: of the prompts that are given as a constitution and a question.
      format: of what is written: JSON lines, or the authors' responses.
      sampling: how.
      samples: responses to each prompt.
      seed: decides what is drawn where the temperature is above 0.
      compute_dtype: of activations and matmuls.
      mesh: the devices.
    """

    name = "generate"

    model: Source
    prompts: Source
    templates: PromptsConfig
    format: Literal["jsonl", "authors"]
    sampling: SamplingConfig
    samples: int
    seed: int
    compute_dtype: Dtype
    mesh: MeshConfig

    @classmethod
    def of(
        cls,
        config: RunConfig,
        *,
        model: Source,
        prompts: Source,
        rows: int,
        samples: int,
        format: Literal["jsonl", "authors"],
    ) -> "Generate":
        """The stage with a config's settings; `rows` prompts are answered at once, four times as many kept together."""
        return cls(
            model=model,
            prompts=prompts,
            templates=config.prompts,
            format=format,
            sampling=dataclasses.replace(config.sampling, slots=rows, shard_queries=4 * rows),
            samples=samples,
            seed=config.seed,
            compute_dtype=config.compute_dtype,
            mesh=config.mesh,
        )

    def make(self, out: Output, safe_point: SafePoint) -> list[Any]:
        """The prompts' lines with response, response_ids and finished; see `FileStage.make`."""
        records = read_prompts(self.prompts.path, format=self.format)
        opened = open_model(self.model.path, self.mesh, self.compute_dtype)
        prompts = self._prompts(opened.tokenizer, records)
        prefix = {"response_prefix": self.templates.response_prefix}
        given = [prefix if prompt.prefix_ids else {} for prompt in prompts]
        most = self.sampling.max_new_tokens
        dropping = self.sampling.long_prompts == "drop"
        long = {i for i, prompt in enumerate(prompts) if dropping and too_long(opened, prompt.ids, most)}
        check_prompts(opened, [prompt for i, prompt in enumerate(prompts) if i not in long], max_new_tokens=most)
        loaded = opened.loaded(self.compute_dtype)
        out.begin()
        size, slots = self.sampling.shard_queries, self.sampling.slots
        asked = [(i, sample) for i in range(len(records)) for sample in range(self.samples)]
        chunks = [asked[start : start + size] for start in range(0, len(asked), size)]
        first = sum(len(chunk) for number, chunk in enumerate(chunks) if out.stands(f"{number:05d}.jsonl"))
        progress = Progress("sampling", len(asked), unit="responses", done=first)
        lines: list[Any] = []
        for number, chunk in enumerate(chunks):

            def progressed(spent: Spent, done: int = len(lines)) -> None:
                progress.update(done, f"{spent.done} more answered, {spent.speed}", spent.done)

            def sampled(
                chunk: list[tuple[int, int]] = chunk, progressed: Callable[[Spent], None] = progressed
            ) -> list[Any]:
                asked = [(i, sample) for i, sample in chunk if i not in long]
                with enough_memory(f"sampling {slots} responses at once", f"lower --rows, now {slots}"):
                    responses = respond(
                        loaded,
                        [prompts[i] for i, _ in asked],
                        self.sampling,
                        seed=self.seed,
                        names=[("text", "generate", *one) for one in asked],
                        progressed=progressed,
                    )
                found = {one: _fields(response) for one, response in zip(asked, responses, strict=True)}
                return [{**records[i], **given[i], **self._number(k), **found.get((i, k), _DROPPED)} for i, k in chunk]

            lines += out.part(f"{number:05d}.jsonl", sampled)
            progress.update(len(lines))
            safe_point()
        return lines

    def counts(self, lines: list[Any]) -> Any:
        """How many, and how their tokens were chosen."""
        dropped = sum(line.get("dropped") == "too_long" for line in lines)
        return {
            "responses": len(lines),
            "dropped": {"too_long": dropped},
            "samples": self.samples,
            "sampling": self.sampling.manifest,
        }

    def _number(self, sample: int) -> dict[str, int]:
        return {"sample": sample} if self.samples > 1 else {}

    def text(self, lines: list[Any]) -> str:
        """JSON lines, or what the authors' judge reads."""
        if self.format == "jsonl":
            return super().text(lines)
        return responses_text([AnsweredQuestion(*(line[name] for name in AnsweredQuestion._fields)) for line in lines])

    def read(self, file: Path) -> list[Any]:
        """See `FileStage.read`."""
        return super().read(file) if self.format == "jsonl" else list(read_responses(file))

    def _prompts(self, tokenizer: Tokenizer, records: Sequence[dict[str, Any]]) -> list[Prompt]:
        """Prompts as they are given, and those of the generation template where constitution and question are."""
        renderer = Renderer(self.templates, tokenizer)
        return [
            plain_prompt(tokenizer, record["prompt"])
            if "prompt" in record
            else renderer.prompt(self.templates.generation, record["constitution"], record["question"])
            for record in records
        ]


_DROPPED = {"response": "", "response_ids": [], "finished": False, "dropped": "too_long"}


def _fields(response: Response) -> dict[str, Any]:
    return {"response": response.text, "response_ids": list(response.ids), "finished": response.finished}


_QUESTION = ("constitution", "question")


def read_prompts(path: Path, *, format: Literal["jsonl", "authors"]) -> list[dict[str, Any]]:
    """A prompts file: JSON lines with a prompt, or constitution and question; or one object of the authors' responses.

    Args:
      path: the file.
      format: of what is to be written; "authors" needs constitution and question in any case.

    Raises:
      BadDataError: the entry, and what it lacks; or there are none.
    """
    if is_json_object(path):
        return _questions(path)
    records = read_jsonl(path)
    if not records:
        raise BadDataError(f"{path} holds no prompts.")
    columns = records[0] if len(records) == 1 and isinstance(records[0], dict) else {}
    if all(isinstance(columns.get(name), dict) for name in AnsweredQuestion._fields):
        return _questions(path)
    for number, record in enumerate(records, start=1):
        texts = record if isinstance(record, dict) else {}
        asked = all(isinstance(texts.get(name), str) and texts[name] for name in _QUESTION)
        prompt = isinstance(texts.get("prompt"), str) and bool(texts["prompt"])
        if not (prompt or (asked and "prompt" not in texts)):
            raise BadDataError(
                f"{path}, entry {number}: expected an object with a non-empty prompt, or constitution and question."
            )
        if format == "authors" and not asked:
            raise BadDataError(
                f"{path}, entry {number}: --format=authors needs a non-empty constitution and question with the prompt."
            )
    return records


def _questions(path: Path) -> list[dict[str, Any]]:
    return [{name: getattr(row, name) for name in _QUESTION} for row in read_responses(path)]
