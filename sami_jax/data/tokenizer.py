"""Text to ids and back, with one exact rule for where a prompt ends and its response begins."""

import functools
import json
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


class Span(NamedTuple):
    """A piece of a rendered chat.

    Attributes:
      text: of it.
      control: the template wrote it, and its control tokens are control tokens; in other spans they are text.
    """

    text: str
    control: bool


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
        plain, whole = self.plain_ids("a"), list(self._backend("a")["input_ids"])
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
        return [*self.leading_ids, *self.plain_ids(text)]

    def response_ids(self, response: str, *, prompt: str, boundary: Boundary = "exact", prefix: str = "") -> list[int]:
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
          prefix: what the response begins with and what belongs to the prompt; its ids are left out.

        Returns:
          Token ids without BOS or EOS; empty for an empty response.

        Raises:
          BadDataError: the response does not begin with its prefix, or the tokenizer has no ids for it that begin where
            it does.
        """
        if prefix:
            head = self.response_ids(prefix, prompt=prompt, boundary=boundary)
            whole = self.response_ids(response, prompt=prompt, boundary=boundary)
            return self._behind(head, whole, prefix=prefix, response=response.lstrip())
        response = response.lstrip()
        if not response:
            return []
        if boundary == "authors":
            head, whole = self.plain_ids(prompt), self.plain_ids(prompt + response)
            ids = whole[len(head) :] if whole[: len(head)] == head else self.continuation_ids(response, behind=head)
            if ids is None:
                raise BadDataError(
                    f"the tokenizer merges the end of the prompt with the response {response[:40]!r}; set "
                    "config.prompts.boundary=exact."
                )
            return ids
        # A newline before the response leaves its first word without a space token in both kinds of tokenizer.
        anchor, text = ("\n", response) if prompt[-1:].isspace() else (":", f" {response}")
        head, whole = self.plain_ids(anchor), self.plain_ids(anchor + text)
        if whole[: len(head)] != head:
            raise BadDataError(
                f"the tokenizer merges {anchor!r} with what follows it, so the start of the response "
                f"{response[:40]!r} has no ids of its own; use pairs that store response_ids."
            )
        return whole[len(head) :]

    def _behind(self, head: list[int], whole: list[int], *, prefix: str, response: str) -> list[int]:
        """What of a response's ids comes behind those of its prefix."""
        if not response.startswith(prefix):
            raise BadDataError(f"the response {response[:40]!r} does not begin with its prefix {prefix!r}.")
        if whole[: len(head)] == head:
            return whole[len(head) :]
        ids = self.continuation_ids(response[len(prefix) :], behind=head)
        if ids is None:
            raise BadDataError(f"the tokenizer merges {prefix!r} with what follows it in {response[:40]!r}.")
        return ids

    def render_chat(self, turns: Sequence[tuple[str, str]], *, answered: bool) -> str:
        """The text of a chat in the tokenizer's own template.

        Args:
          turns: (role, text), in order.
          answered: the last turn is the assistant's; else the text ends where it begins.

        Raises:
          BadDataError: there is no template, or it refuses such a chat.
        """
        messages = [{"role": role, "content": text} for role, text in turns]
        try:
            return self._backend.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answered)
        except Exception as error:  # jinja2's, and what a template raises
            raise BadDataError(
                f"the tokenizer's chat template cannot be used ({str(error).partition(chr(10))[0]}); set "
                "config.prompts.style=base, or take a model with one."
            ) from error

    def chat_ids(self, spans: Sequence[Span]) -> list[int]:
        """The ids of a rendered chat: for texts that name no control token those of `transformers`.

        In the template's own spans control tokens become what they are; the same names in other spans become ordinary
        tokens. Raises BadDataError where the tokenizer cannot do that.
        """
        stand_ins = self._stand_ins
        names = "|".join(re.escape(name) for name in sorted(stand_ins.names, key=len, reverse=True))
        written = (
            re.sub(names, lambda name: stand_ins.names[name[0]], span.text) if span.control and names else span.text
            for span in spans
        )
        ids = stand_ins.backend.encode("".join(written), add_special_tokens=False).ids
        return [stand_ins.ids.get(token, token) for token in ids]

    def chat_response_ids(self, spans: Sequence[Span], text: str, *, behind: Sequence[int]) -> list[int]:
        """The ids of a text that goes on with a rendered chat, whose ids and perhaps the text's first are `behind`.

        Raises:
          BadDataError: the tokenizer has none that begin there.
        """
        behind, whole = list(behind), self.chat_ids([*spans, Span(text, False)])
        if whole[: len(behind)] == behind:
            return whole[len(behind) :]
        begun = len(self.spell(behind)) - len(self.spell(self.chat_ids(spans)))
        ids = self.continuation_ids(text[begun:], behind=behind)
        if ids is None:
            raise BadDataError(f"the tokenizer merges the chat with the response {text[:40]!r} behind it.")
        return ids

    @functools.cached_property
    def _stand_ins(self) -> "_StandIns":
        """A copy of the tokenizer that finds none of its own added tokens in a text, but a stand-in for each of them.

        A stand-in takes part in everything else as the token itself does: it cuts the text, and takes white space
        beside it along where that does. Its name is drawn anew in each process, so that no text can hold it.
        """
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Backend

        if not hasattr(self._backend, "backend_tokenizer"):
            raise BadDataError("config.prompts.style=chat needs a tokenizer.json, which this tokenizer does not have.")
        settings = json.loads(self._backend.backend_tokenizer.to_str())
        own = [token for token in settings["added_tokens"] if token["content"]]
        settings["added_tokens"] = [{**token, "special": True} for token in settings["added_tokens"]]
        backend = Backend.from_str(json.dumps(settings))
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        nonce = secrets.token_hex(8)
        names = {token["content"]: f"\ue000{nonce}.{number}\ue001" for number, token in enumerate(own)}
        alike = ("single_word", "lstrip", "rstrip")
        backend.add_tokens(
            [AddedToken(names[t["content"]], **{name: t[name] for name in alike}, normalized=False) for t in own]
        )
        ids = {backend.token_to_id(names[token["content"]]) or 0: token["id"] for token in own}
        return _StandIns(backend, names, ids)

    def continuation_ids(self, text: str, *, behind: Sequence[int]) -> list[int] | None:
        """Ids that spell the text behind these ids, white space included, or None where none were found.

        Tried behind several anchors, since a tokenizer may merge any one of them with what follows it.
        """
        spelled = self.decode(behind) + text
        for anchor in ("\n", ":", "a", ""):
            head, whole = self.plain_ids(anchor), self.plain_ids(anchor + text)
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

    def plain_ids(self, text: str) -> list[int]:
        """A text's ids, nothing in front of it, none of its words a special token."""
        return list(self._backend(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


class _StandIns(NamedTuple):
    """See `Tokenizer._stand_ins`.

    Attributes:
      backend: the copy.
      names: added token -> its stand-in.
      ids: id of a stand-in -> id of the token.
    """

    backend: Any
    names: dict[str, str]
    ids: dict[int, int]


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
