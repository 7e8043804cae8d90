"""Text to ids and back, with one exact rule for where a prompt ends and its response begins."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sami_jax.errors import BadDataError

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
        """`eos_id`, for who cannot do without. Raises BadDataError where the tokenizer has none."""
        if self.eos_id is None:
            raise BadDataError("the tokenizer has no end-of-sequence token; name one in its tokenizer_config.json.")
        return self.eos_id

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return len(self._backend)

    def prompt_ids(self, text: str) -> list[int]:
        """The prompt's ids as the tokenizer gives them by default, BOS included where it adds one."""
        return list(self._backend(text, split_special_tokens=True)["input_ids"])

    def response_ids(self, response: str, *, prompt: str) -> list[int]:
        """The ids a sampler would have emitted after the prompt: those of a space and the response.

        Where the prompt already ends in white space, none is added. The ids are read off behind an anchor character,
        because at the very start of a text tokenizers treat a space specially: Metaspace (Mistral, Llama) prepends one,
        byte-level BPE does not. White space in front of the response does not count.

        Args:
          response: the response's text.
          prompt: the prompt's text; only whether it ends in white space matters.

        Returns:
          Token ids without BOS or EOS; empty for an empty response.

        Raises:
          BadDataError: the tokenizer merges the anchor with what follows it.
        """
        response = response.lstrip()
        if not response:
            return []
        # A newline before the response leaves its first word without a space token in both kinds of tokenizer.
        anchor, text = ("\n", response) if prompt[-1:].isspace() else (":", f" {response}")
        head, whole = self._plain_ids(anchor), self._plain_ids(anchor + text)
        if whole[: len(head)] != head:
            raise BadDataError(
                f"the tokenizer merges {anchor!r} with what follows it, so the start of the response "
                f"{response[:40]!r} has no ids of its own; use pairs that store response_ids."
            )
        return whole[len(head) :]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return self._backend.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def token_texts(self) -> list[str]:
        """[V] each token's own text; pieces of a character show as U+FFFD."""
        return [self._backend.decode([i], clean_up_tokenization_spaces=False) for i in range(self.vocab_size)]

    def _plain_ids(self, text: str) -> list[int]:
        return list(self._backend(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def load_tokenizer(folder: Path) -> Tokenizer:
    """Reads the tokenizer of a model folder; nothing in the folder is executed, nothing is downloaded.

    Raises:
      BadDataError: the folder has no tokenizer that can be read.
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
    return Tokenizer(backend)
