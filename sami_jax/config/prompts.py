"""The settings of prompts: what a model is asked, and which part of its answer counts."""

import dataclasses

from sami_jax.config.fields import setting
from sami_jax.errors import BadConfigError
from sami_jax.types import Boundary, PromptStyle

FIELDS = ("{constitution}", "{query}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Templates with the fields {constitution} and {query}, and where a response begins and ends."""

    style: PromptStyle = setting(
        "base",
        "base: a template is the text that the model goes on with; chat: it is what the user says, in the tokenizer's "
        "own chat template",
        choices=("base", "chat"),
    )
    generation: str = setting(
        "{constitution}\n\n{query}\n\n", "template the model samples from: its text, or file:PATH", text_file=True
    )
    training: str = setting(
        "{constitution}\n\n{query}\n\n", "template it is trained and scored on, in the same way", text_file=True
    )
    system: str = setting(
        "", "chat: template of a system turn in front, which may have the fields instead; none if empty", text_file=True
    )
    response_prefix: str = setting(
        "", "words that every response begins with (the authors': The post); given to the model, never trained"
    )
    chain_of_thought: bool = setting(
        False, "responses reason first: what stands behind prompts.answer_marker is trained, judged and scored"
    )
    answer_marker: str = setting("Answer:", "text behind which the answer begins; a response without it is dropped")
    boundary: Boundary = setting(
        "exact",
        "where a response begins; exact: as it was sampled, so both prompts must end in the same white space; authors: "
        "the training prompt and the response are tokenised as one text, without a space between them",
        choices=("exact", "authors"),
    )

    def __post_init__(self) -> None:
        if self.system and self.style == "base":
            raise BadConfigError("config.prompts.system is given, but config.prompts.style=base has no system turn.")
        templates = {"generation": self.generation, "training": self.training}
        for name, template in templates.items():
            for field in FIELDS:
                if (self.system + template).count(field) != 1:
                    where = f"config.prompts.{name}" + (" and config.prompts.system together" if self.system else "")
                    raise BadConfigError(f"{where} must contain {field} exactly once.")
        if self.response_prefix != self.response_prefix.strip():
            raise BadConfigError(
                f"config.prompts.response_prefix is {self.response_prefix!r}; leave out the white space around it."
            )
        if self.response_prefix and self.chain_of_thought:
            raise BadConfigError(
                "config.prompts.response_prefix would begin the reasoning of config.prompts.chain_of_thought; ask for "
                "these words in the template instead."
            )
        if self.chain_of_thought and not self.answer_marker.strip():
            raise BadConfigError("config.prompts.answer_marker is empty; name the text behind which an answer begins.")
        if self.style == "chat" and self.boundary == "authors":
            raise BadConfigError(
                "config.prompts.boundary=authors is the authors' plain prompts'; set config.prompts.style=base."
            )
        generation, training = map(_ending, templates.values())
        as_sampled = self.style == "base" and self.boundary == "exact" and not self.chain_of_thought
        if as_sampled and generation != training:
            raise BadConfigError(
                f"config.prompts.generation ends in {generation!r}, but config.prompts.training in {training!r}: the "
                "model would be trained on a boundary that it never sampled. End both alike, or set "
                "config.prompts.boundary=authors."
            )


def _ending(template: str) -> str:
    """The template's last white space; behind a field, whose text may end in more of it, with that field."""
    text = template.rstrip()
    field = next((field for field in FIELDS if text.endswith(field)), "")
    return field + template[len(text) :]
