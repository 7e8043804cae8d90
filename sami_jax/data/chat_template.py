"""A tokenizer's own chat template, around texts that nobody vouches for."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from sami_jax.data.tokenizer import Span, Tokenizer
from sami_jax.errors import BadDataError

_MARK = "\ue000{}\ue001"  # stands for a text while the template's own pieces are found out; private use characters
_CHANGES: tuple[Callable[[str], str], ...] = (str, str.strip, str.lstrip, str.rstrip)


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """Renders chats of an optional system turn and a user turn, up to where the assistant begins.

    A system turn that the template refuses, or leaves out, is folded into the user's: it stands in front of it, with an
    empty line between them.
    """

    tokenizer: Tokenizer

    def spans(self, system: str, user: str) -> list[Span]:
        """The chat's spans, whose texts together are what `transformers` renders.

        Raises:
          BadDataError: the tokenizer has no chat template, or one that changes texts.
        """
        texts = [system, user] if system else [user]
        if system and self._folds_system:
            texts = [f"{system}\n\n{user}"]
        whole, pieces = self._render(texts), self._pieces[len(texts)]
        for changes in itertools.product(_CHANGES, repeat=len(texts)):
            changed = [change(text) for change, text in zip(changes, texts, strict=True)]
            spans = [Span(piece, True) if isinstance(piece, str) else Span(changed[piece], False) for piece in pieces]
            if "".join(span.text for span in spans) == whole:
                return spans
        raise BadDataError(
            f"the tokenizer's chat template changes the text of a turn ({user[:40]!r}...), so that its control tokens "
            "cannot be told from that text; set config.prompts.style=base, or mend the template."
        )

    def check(self, folder: Path) -> None:
        """Raises BadDataError, which names the model folder, where nobody can chat by this template."""
        try:
            self.spans("", "a")
        except BadDataError as error:
            reason = str(error).partition(" (")[0]
            raise BadDataError(
                f"{folder} cannot chat: {reason}. Take an instruction-tuned model with a chat template, or a server."
            ) from error

    @functools.cached_property
    def lead(self) -> str:
        """What the template writes between the beginning of the assistant's turn and its text: mostly nothing."""
        turns = [("user", "a"), ("assistant", _MARK.format("answer"))]
        opened = self.tokenizer.render_chat(turns[:1], answered=False)
        whole = self.tokenizer.render_chat(turns, answered=True)
        if not whole.startswith(opened):
            return ""
        lead, found, _ = whole[len(opened) :].partition(turns[1][1])
        return lead if found and not lead.strip() else ""

    @functools.cached_property
    def _folds_system(self) -> bool:
        """Whether the template has no place for a system turn."""
        mark = _MARK.format("system")
        try:
            return mark not in self._render([mark, "a"])
        except BadDataError:
            self._render(["a"])  # a template that takes no user either is none at all
            return True

    @functools.cached_property
    def _pieces(self) -> dict[int, list[str | int]]:
        """By the number of turns: the template's own pieces, and between them the turns by their numbers."""
        pieces = {}
        for count in (1,) if self._folds_system else (1, 2):
            marks = [_MARK.format(number) for number in range(count)]
            parts = re.split(f"({'|'.join(marks)})", self._render(marks))
            if sorted(part for part in parts if part in marks) != marks:
                raise BadDataError(
                    "the tokenizer's chat template leaves out the text of a turn, or has it twice; set "
                    "config.prompts.style=base, or mend the template."
                )
            pieces[count] = [marks.index(part) if part in marks else part for part in parts]
        return pieces

    @property
    def most_control_bytes(self) -> int:
        """Bytes of the template's own pieces, where they are most."""
        return max(sum(len(p.encode()) for p in pieces if isinstance(p, str)) for pieces in self._pieces.values())

    def _render(self, texts: Sequence[str]) -> str:
        roles = ("system", "user")[-len(texts) :]
        return self.tokenizer.render_chat(list(zip(roles, texts, strict=True)), answered=False)
