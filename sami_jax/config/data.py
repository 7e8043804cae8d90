"""The settings of what is asked: queries, constitutions, and which answers are kept."""

import dataclasses

from sami_jax.config.chat import WriterConfig
from sami_jax.config.fields import setting
from sami_jax.errors import BadConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueriesConfig:
    """Where queries come from: a data set by its name, a file, or a function."""

    train: str = setting(
        "",
        "training queries; the alternating halves of their source serve odd and even iterations: tldr, hh_helpful or "
        "hh_harmless (of the Hub; with :PATH a copy of it), jsonl:FILE, parquet:FILE, module:function, or a file of "
        "JSON lines with example_id, text, and optionally facts for a judge",
        path=True,
    )
    evaluation: str = setting(
        "", "evaluation queries, named in the same way; of the same source some are held out for them", path=True
    )
    evaluation_count: int = setting(
        250, "queries that are evaluated on: held out of a source that is both, else its first so many", at_least=1
    )
    max_characters: int = setting(
        10_000, "drop a longer text, and count it; a plain file's texts are never dropped", at_least=1
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstitutionsConfig:
    """How the contrasting constitutions of a query are drawn."""

    principles: str = setting("", "JSON file of principles (name, definition, antithesis, held_out)", path=True)
    writer: WriterConfig = setting(WriterConfig, "")
    folder: str = setting(
        "",
        "instead of principles, a folder of the authors' with pairs of constitutions, 0.json, 1.json, ... (positive, "
        "negative, identifiers); each query gets one of the pairs as it stands, positive first",
        path=True,
    )
    count: int = setting(2, "C, contrasting constitutions per query", at_least=2)
    principles_per_query: int = setting(2, "principles in each constitution", at_least=1)
    pairing: str = setting(
        "symmetric",
        "of principles; symmetric: any sign patterns that differ; authors: the first has all definitions; diverse: the "
        "same, with more principles than one query gets",
        choices=("symmetric", "authors", "diverse"),
    )
    reshuffle: bool = setting(True, "shuffle the principles' order again in the training prompt")

    def __post_init__(self) -> None:
        if self.folder and self.principles:
            raise BadConfigError(
                "config.constitutions.folder and config.constitutions.principles are both given; leave one of them out."
            )
        if self.folder and (self.count != 2 or self.pairing == "diverse"):
            raise BadConfigError(
                "config.constitutions.folder has pairs of constitutions: set config.constitutions.count=2, and "
                "config.constitutions.pairing=authors or symmetric."
            )
        if self.principles_per_query > 16:  # each query's draw goes through all sign patterns, 65536 of them
            raise BadConfigError(
                f"config.constitutions.principles_per_query is {self.principles_per_query}; it must be at most 16."
            )
        written = self.writer.count - self.writer.held_out
        if self.to_be_written and self.principles_per_query > written:
            raise BadConfigError(
                f"config.constitutions.writer writes {written} principles to train on, but each constitution has "
                f"{self.principles_per_query}; raise config.constitutions.writer.count, or lower "
                "config.constitutions.principles_per_query."
            )
        if self.count > 2**self.principles_per_query:
            raise BadConfigError(
                f"config.constitutions.count is {self.count}, but {self.principles_per_query} principles per query "
                f"have {2**self.principles_per_query} sign patterns; lower it, or raise "
                "config.constitutions.principles_per_query."
            )

    @property
    def to_be_written(self) -> bool:
        """Whether a run has its principles written first; those that are given leave the writer nothing to do."""
        return self.writer.enabled and not self.place

    @property
    def place(self) -> str:
        """The file or folder that they are drawn from."""
        return self.folder or self.principles


@dataclasses.dataclass(frozen=True, kw_only=True)
class FiltersConfig:
    """Which sampled queries are kept; every drop is counted under its reason."""

    placeholders: tuple[str, ...] = setting(("[", "]", "Response"), "texts that mark a malformed response")
    evasive_beginnings: tuple[str, ...] = setting((), "what a response that evades the question begins with")
    sentence_ends: str = setting(".!?", "characters a finished response may end with")
