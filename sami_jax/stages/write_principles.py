"""The stage that has principles written by a language model."""

import dataclasses
from pathlib import Path
from typing import Any

from sami_jax.chat.opening import make_chat, open_answers
from sami_jax.chat.principle_writer import Written, prompt_hash, write_principles
from sami_jax.config.chat import FREE, WriterConfig
from sami_jax.config.mesh import MeshConfig
from sami_jax.config.run import RunConfig
from sami_jax.data.principles import Principle, read_principles
from sami_jax.errors import SamiError
from sami_jax.files import read_json, write_json
from sami_jax.progress import Progress, say
from sami_jax.safe_point import SafePoint
from sami_jax.stage_folder import check_sealed
from sami_jax.stages.stage import Output, Source, Stage, settings_but
from sami_jax.types import Dtype

PRINCIPLES, PROVENANCE = "principles.json", "provenance.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WritePrinciples(Stage):
    """Principles by a model on these devices, a server or a record of one; its answers stay in `answers/`.

    Attributes:
      writer: who writes, and about what.
      given: the folder of the writer's model, or the file of its recorded answers; None for a server.
      prompt_sha256: of the template that the writer is asked by.
      compute_dtype: of the activations and matmuls of a model on these devices.
      mesh: those devices.
    """

    name = "write_principles"
    outside = "answers"

    writer: WriterConfig = settings_but("model", *FREE)  # the model is a field of its own
    given: Source | None
    prompt_sha256: str
    compute_dtype: Dtype
    mesh: MeshConfig

    @classmethod
    def of(cls, config: RunConfig, *, given: Source | None) -> "WritePrinciples":
        """The stage with a config's settings."""
        return cls(
            writer=config.constitutions.writer,
            given=given,
            prompt_sha256=prompt_hash(),
            compute_dtype=config.compute_dtype,
            mesh=config.mesh,
        )

    def make(self, out: Output, safe_point: SafePoint) -> Any:
        """Makes `principles.json` and `provenance.json`; see `Stage.make`.

        Raises:
          BadConfigError: the budget is spent, or nobody can be asked.
          BadDataError: the writer writes nothing that can be used.
          UnavailableError: the server does not answer now.
        """
        writer, given = self.writer, self.given.path if self.given else None
        chat = make_chat(writer, given, mesh=self.mesh, compute_dtype=self.compute_dtype, say=say)
        out.begin()
        progress = Progress("writing principles", writer.count, unit="principles")
        log = out.folder / self.outside / "answers.jsonl"
        with open_answers(writer, chat, log, safe_point=safe_point, say=say) as answers:
            try:
                written = write_principles(
                    answers, about=writer.about, count=writer.count, held_out=writer.held_out, written=progress.update
                )
            except SamiError:
                if answers.log_is_empty:  # so that the mended command may ask somebody else in the same place
                    out.withdraw()
                raise
        out.write(PRINCIPLES, _write, [_plain(principle) for principle in written.principles])
        out.write(PROVENANCE, write_json, written.provenance)
        return {"principles": len(written.principles)}


def read_written(folder: Path) -> Written:
    """What the stage wrote. Raises BadDataError where it was changed since."""
    check_sealed(folder)
    return Written(read_principles(folder / PRINCIPLES), read_json(folder / PROVENANCE))


def _plain(principle: Principle) -> dict[str, Any]:
    plain = dataclasses.asdict(principle)
    return plain if principle.held_out else {name: value for name, value in plain.items() if name != "held_out"}


def _write(path: Path, principles: list[dict[str, Any]]) -> None:
    write_json(path, principles, sort_keys=False)
