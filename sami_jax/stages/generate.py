"""The stage that answers prompts of the user's own: the lines of a prompts file, each with its response."""

import dataclasses
from pathlib import Path
from typing import Any

from sami_jax.config.mesh import MeshConfig
from sami_jax.config.run import RunConfig
from sami_jax.config.sampling import SamplingConfig
from sami_jax.data.rendering import plain_prompts
from sami_jax.errors import BadDataError, enough_memory
from sami_jax.files import read_jsonl
from sami_jax.huggingface.opened import open_model
from sami_jax.progress import Progress
from sami_jax.safe_point import SafePoint
from sami_jax.stages.answers import check_prompts, respond
from sami_jax.stages.stage import FileStage, Output, Source, settings_but
from sami_jax.types import Dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(FileStage):
    """Greedy responses to the prompts of a file.

    Attributes:
      model: folder.
      prompts: JSON lines, each an object with "prompt".
      sampling: how.
      rows: prompts sampled together, and kept together.
      compute_dtype: of activations and matmuls.
      mesh: the devices.
    """

    name = "generate"

    model: Source
    prompts: Source
    sampling: SamplingConfig = settings_but("chunk_queries")
    rows: int
    compute_dtype: Dtype
    mesh: MeshConfig

    @classmethod
    def of(cls, config: RunConfig, *, model: Source, prompts: Source, rows: int) -> "Generate":
        """The stage with a config's settings."""
        return cls(
            model=model,
            prompts=prompts,
            sampling=config.sampling,
            rows=rows,
            compute_dtype=config.compute_dtype,
            mesh=config.mesh,
        )

    def make(self, out: Output, safe_point: SafePoint) -> list[Any]:
        """The prompts' lines with response, response_ids and finished; see `FileStage.make`."""
        records = read_prompts(self.prompts.path)
        opened = open_model(self.model.path, self.mesh, self.compute_dtype)
        prompts = plain_prompts(opened.tokenizer, [record["prompt"] for record in records])
        check_prompts(opened, prompts, max_new_tokens=self.sampling.max_new_tokens)
        loaded = opened.loaded(self.compute_dtype)
        out.begin()
        chunks = [range(len(records))[start : start + self.rows] for start in range(0, len(records), self.rows)]
        first = sum(len(chunk) for number, chunk in enumerate(chunks) if out.stands(f"{number:05d}.jsonl"))
        progress = Progress("sampling", len(records), unit="prompts", done=first)
        lines: list[Any] = []
        for number, chunk in enumerate(chunks):

            def sampled(chunk: range = chunk) -> list[Any]:
                with enough_memory(f"sampling {len(chunk)} responses at once", f"lower --rows, now {self.rows}"):
                    responses = respond(loaded, [prompts[i] for i in chunk], self.sampling, rows=self.rows)
                return [
                    {**records[i], "response": r.text, "response_ids": list(r.ids), "finished": r.finished}
                    for i, r in zip(chunk, responses, strict=True)
                ]

            lines += out.part(f"{number:05d}.jsonl", sampled)
            progress.update(len(lines))
            safe_point()
        return lines


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """A prompts file. Raises BadDataError where an entry is no object with a prompt, or where there are none."""
    records = read_jsonl(path)
    for number, record in enumerate(records, start=1):
        prompt = record.get("prompt") if isinstance(record, dict) else None
        if not isinstance(prompt, str) or not prompt:
            raise BadDataError(f"{path}, entry {number}: expected an object with a non-empty prompt.")
    if not records:
        raise BadDataError(f"{path} holds no prompts.")
    return records
