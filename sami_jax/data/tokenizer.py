"""Text to ids and back, with one exact rule for where a prompt ends and its response begins."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sami_jax.errors import BadDataError
from sami_jax.types import Boundary

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "added_tokens.json",
    "chat_template.jinja",
)


class Tokenizer:
    """A Hugging Face tokenizer folder, as the sampler and the scorer use it.

    Text is untrusted: `</s>` inside a post becomes ordinary tokens, never the special one.
    """

    def __init__(self, backend: Any):
        self._backend = backend

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, or None where the tokenizer has none."""
        return self._backend.eos_token_id

    def end_id(self) -> int:
        """`eos_id`, where one is needed. Raises BadDataError if the tokenizer has none."""
        if self.eos_id is None:
            raise BadDataError("the tokenizer has no end-of-sequence token; name one in its tokenizer_config.json.")
        return self.eos_id

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return len(self._backend)

    @functools.cached_property
    def leading_ids(self) -> tuple[int, ...]:
        """The ids that the tokenizer's template puts in front of a text: BOS where it has one.

        Raises:
          BadDataError: the template does more than put ids in front of a text and behind it.
        """
        plain, whole = self._plain_ids("a"), list(self._backend("a")["input_ids"])
        starts = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
        # A template that has the text twice in a row does so without its special tokens, too.
        doubled = bool(plain) and plain == 2 * plain[: len(plain) // 2]
        if len(starts) != 1 or doubled:
            raise BadDataError(
                f"the tokenizer's template turns a text of the ids {plain} into {whole}, which cannot be taken apart "
                "into what goes in front, the text once, and what ends it; mend post_processor in tokenizer.json."
            )
        return tuple(whole[: starts[0]])

    def prompt_ids(self, text: str) -> list[int]:
        """The prompt's ids behind `leading_ids`; an end token that the tokenizer would add is left out."""
        return [*self.leading_ids, *self._plain_ids(text)]

    def response_ids(self, response: str, *, prompt: str, boundary: Boundary = "exact") -> list[int]:
        """The ids of a response that is given as text, behind its prompt.

        "exact": what a sampler would have emitted after the prompt, which is the ids of a space and the response, or of
        the response alone where the prompt ends in white space. They are read off behind an anchor character, because
        at the very start of a text tokenizers treat a space specially: Metaspace (Mistral, Llama) prepends one,
        byte-level BPE does not.

        "authors": prompt and response tokenised as one text, without a space between them, as the authors train. Where
        a token would reach over the boundary (the authors then train on its end, or leave it out), the response's ids
        begin at the boundary.

        Args:
          response: the response's text; white space in front of it does not count.
          prompt: the prompt's text.
          boundary: "exact" or "authors".

        Returns:
          Token ids without BOS or EOS; empty for an empty response.

        Raises:
          BadDataError: the tokenizer has no ids for the response that begin where it does.
        """
        response = response.lstrip()
        if not response:
            return []
        if boundary == "authors":
            head, whole = self._plain_ids(prompt), self._plain_ids(prompt + response)
            ids = whole[len(head) :] if whole[: len(head)] == head else self.continuation_ids(response, behind=head)
            if ids is None:
                raise BadDataError(
                    f"the tokenizer merges the end of the prompt with the response {response[:40]!r}; set "
                    "config.prompts.boundary=exact."
                )
            return ids
        # A newline before the response leaves its first word without a space token in both kinds of tokenizer.
        anchor, text = ("\n", response) if prompt[-1:].isspace() else (":", f" {response}")
        head, whole = self._plain_ids(anchor), self._plain_ids(anchor + text)
        if whole[: len(head)] != head:
            raise BadDataError(
                f"the tokenizer merges {anchor!r} with what follows it, so the start of the response "
                f"{response[:40]!r} has no ids of its own; use pairs that store response_ids."
            )
        return whole[len(head) :]

    def continuation_ids(self, text: str, *, behind: Sequence[int]) -> list[int] | None:
        """Ids that spell the text behind these ids, white space included, or None where none were found.

        Tried behind several anchors, since a tokenizer may merge any one of them with what follows it.
        """
        spelled = self.decode(behind) + text
        for anchor in ("\n", ":", "a", ""):
            head, whole = self._plain_ids(anchor), self._plain_ids(anchor + text)
            ids = whole[len(head) :]
            if whole[: len(head)] == head and self.decode([*behind, *ids]) == spelled:
                return ids
        return None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return self._backend.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def spell(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens by their names."""
        return self._backend.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @functools.cached_property
    def token_texts(self) -> list[str]:
        """[V] each token's own text; pieces of a character show as U+FFFD."""
        return [self.spell([i]) for i in range(self.vocab_size)]

    def _plain_ids(self, text: str) -> list[int]:
        return list(self._backend(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def load_tokenizer(folder: Path) -> Tokenizer:
    """Reads the tokenizer of a model folder; nothing in the folder is executed, nothing is downloaded.

    Raises:
      BadDataError: the folder has no tokenizer that can be read, or one whose template cannot be taken apart.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise BadDataError(f"{folder} has no tokenizer.json; copy the tokenizer files of the model into it.")
    try:
        backend = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the library raises many kinds, down to a bare Exception
        raise BadDataError(f"{folder}: the tokenizer cannot be read ({error}).") from error
    tokenizer = Tokenizer(backend)
    try:
        tokenizer.leading_ids  # noqa: B018  refused here, not at the first prompt
    except BadDataError as error:
        raise BadDataError(f"{folder}: {error}") from error
    return tokenizer
