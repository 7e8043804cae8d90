"""Many responses with few slots: what has ended makes room for the next prompt, while the devices go on."""

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Sharding

from sami_jax.data.tokenizer import Tokenizer
from sami_jax.sampling.choosing import Choosing
from sami_jax.sampling.decoding import Joining, Slots, at_rest, go_on, join
from sami_jax.sampling.stop_text import Response, Stops, cut_response, has_stopped, settled_text
from sami_jax.types import Array, DecodeFn, Params, Prompts, Rows

# (the text so far, the response where it has ended) -> whether nobody can use it.
Hopeless = Callable[[str, Response | None], bool]

_SHORTEST = 64  # tokens of a prompt, of which a row has room for so many that the logits behind them stay small


class Request(NamedTuple):
    """A response that is asked for.

    Attributes:
      prompt: its ids, at least one.
      prefix_ids: how many of the last are words that the response begins with.
      key: [2] uint32, of `choosing.choose`.
      group: of the responses that are of use only together.
    """

    prompt: tuple[int, ...]
    prefix_ids: int
    key: np.ndarray
    group: int = 0

    @property
    def prefix(self) -> tuple[int, ...]:
        """The ids of those words."""
        return self.prompt[len(self.prompt) - self.prefix_ids :]


class Room(NamedTuple):
    """Shapes: what is compiled.

    Attributes:
      slots: texts that are written at once, a multiple of `parts`.
      parts: that the devices share.
      row: tokens of prompts that each part reads at once; no prompt is longer.
      length: of a slot; no prompt and its response together are longer.
      steps: tokens that are written between two looks at them.
    """

    slots: int
    parts: int
    row: int
    length: int
    steps: int


class Spent(NamedTuple):
    """What sampling took.

    Attributes:
      done: responses that have ended, or were given up.
      kept: the tokens of those that have ended.
      chunks: times that all slots went on by up to `Room.steps` tokens.
      fills: times that prompts were read.
      seconds: of all this.
    """

    done: int
    kept: int
    chunks: int
    fills: int
    seconds: float

    @property
    def speed(self) -> str:
        """For people."""
        return f"{self.kept / self.seconds:.0f} tokens/s" if self.seconds else ""


@dataclasses.dataclass
class _Text:
    """A text in a slot: the tokens that were read from the devices, and how many they have been asked to write."""

    request: int
    ids: list[int] = dataclasses.field(default_factory=list)
    asked: int = 0
    ended: bool = False


class Sampler:
    """Writes responses with a model.

    Every process makes the same decisions, from the same tokens.
    """

    def __init__(
        self,
        decode: DecodeFn,
        params: Params,
        tokenizer: Tokenizer,
        *,
        stops: Stops,
        choosing: Choosing,
        max_new_tokens: int,
        vocab_size: int,
        room: Room,
        sharding: Sharding,
        everywhere: Sharding,
    ):
        """Prepares; nothing runs yet.

        Args:
          decode: the model.
          params: its parameters.
          tokenizer: turns ids to text.
          stops: what ends a response.
          choosing: how tokens are chosen.
          max_new_tokens: longest response.
          vocab_size: V of the model.
          room: the shapes.
          sharding: of the slots, over the parts.
          everywhere: of what all devices hold.
        """
        self._decode, self._params, self._tokenizer, self._stops = decode, params, tokenizer, stops
        self._choosing, self._most, self._room = choosing, max_new_tokens, room
        self._sharding, self._everywhere = sharding, everywhere
        self._ends = np.zeros(vocab_size, bool)
        self._ends[[token for token in stops.end_ids if token < vocab_size]] = True

    def responses(
        self, requests: Sequence[Request], progressed: Callable[[Spent], None], *, hopeless: Hopeless | None = None
    ) -> list[Response | None]:
        """The responses, in order.

        Args:
          requests: what is asked for.
          progressed: hears of the responses that have ended.
          hopeless: where one of a group is, the others are given up: those that have not ended are None, and their
            slots free. The one that is hopeless is the response so far.
        """
        found: list[Response | None] = [None] * len(requests)
        waiting = collections.deque(range(len(requests)))
        texts: dict[int, _Text] = {}  # by slot
        written: tuple[Array, dict[int, _Text]] | None = None
        spent, started = Spent(0, 0, 0, 0, 0.0), time.monotonic()
        slots = at_rest(self._decode, slots=self._room.slots, length=self._room.length, sharding=self._sharding)
        while waiting or texts or written:
            while filling := self._filling(requests, waiting, texts):
                slots = join(self._decode, self._params, slots, *filling, choosing=self._choosing)
                spent = spent._replace(fills=spent.fills + 1)
            before, written = written, None
            if texts:
                tokens, slots = self._go_on(slots, texts)
                spent = spent._replace(chunks=spent.chunks + 1)
                written = tokens, dict(texts)
                for slot, text in written[1].items():
                    text.asked += self._room.steps
                    if text.asked >= self._most:  # it ends with this chunk, whatever it says
                        del texts[slot]
            if before is None:
                continue
            # The devices are busy with the next tokens, while those before are looked at.
            given_up: set[int] = set()
            for text in self._read(*before, requests):
                request = requests[text.request]
                response, lost = self._looked_at(text, request, hopeless)
                if text.ended:
                    found[text.request] = response
                    spent = spent._replace(done=spent.done + 1, kept=spent.kept + len(response.ids))
                if lost:
                    given_up.add(request.group)
            running = [*before[1].values(), *(written[1].values() if written else ())]
            spent = spent._replace(done=spent.done + _give_up(given_up, requests, waiting, running))
            for slot in [slot for slot, text in texts.items() if text.ended]:
                del texts[slot]
            progressed(spent._replace(seconds=time.monotonic() - started))
        return found

    def _looked_at(self, text: _Text, request: Request, hopeless: Hopeless | None) -> tuple[Response, bool]:
        """The response so far, and whether it is hopeless."""
        if text.ended:
            response = cut_response(text.ids, self._tokenizer, self._stops, prefix=request.prefix)
            return response, hopeless is not None and hopeless(response.text, response)
        if hopeless is None:
            return Response("", (), finished=False), False
        so_far = settled_text(text.ids, self._tokenizer, self._stops, prefix=request.prefix)
        text.ended = hopeless(so_far, None)
        return Response(so_far, (), finished=False), text.ended

    def _go_on(self, slots: Slots, texts: dict[int, _Text]) -> tuple[Array, Slots]:
        alive = np.zeros(self._room.slots, bool)
        alive[list(texts)] = True
        return go_on(
            self._decode,
            self._params,
            slots,
            alive,
            self._ends,
            steps=self._room.steps,
            choosing=self._choosing,
            everywhere=self._everywhere,
        )

    def _read(self, tokens: Array, texts: dict[int, _Text], requests: Sequence[Request]) -> list[_Text]:
        """Brings a chunk's tokens to the host. Returns the texts that were not over before it."""
        rows = np.asarray(tokens)
        going_on = {slot: text for slot, text in texts.items() if not text.ended}
        for slot, text in going_on.items():
            new = rows[slot, : self._most - len(text.ids)].tolist()
            text.ids += new
            prefix = requests[text.request].prefix
            text.ended = len(text.ids) >= self._most or has_stopped(
                text.ids, self._tokenizer, self._stops, new=len(new), prefix=prefix
            )
        return list(going_on.values())

    def _filling(
        self, requests: Sequence[Request], waiting: collections.deque[int], texts: dict[int, _Text]
    ) -> tuple[Prompts, Joining] | None:
        """Takes waiting requests into free slots, as many as a row of each part holds; None where it does not pay."""
        room = self._room
        each = room.slots // room.parts
        free = [[slot for slot in range(each) if part * each + slot not in texts] for part in range(room.parts)]
        most = min(each, -(-room.row // _SHORTEST))
        placed: list[list[tuple[int, int]]] = [[] for _ in range(room.parts)]  # (request, slot) by part
        used = [0] * room.parts
        for number in waiting:
            length = len(requests[number].prompt)
            open_parts = [
                part
                for part in range(room.parts)
                if used[part] + length <= room.row and len(placed[part]) < min(most, len(free[part]))
            ]
            if not open_parts:
                break
            part = min(open_parts, key=lambda part: used[part])
            placed[part].append((number, free[part][len(placed[part])]))
            used[part] += length
        count = sum(map(len, placed))
        full, many_free = 2 * sum(used) >= room.parts * room.row, 4 * sum(map(len, free)) >= room.slots
        if not count or (texts and not full and not many_free):
            return None
        for part, those in enumerate(placed):
            for number, slot in those:
                waiting.popleft()
                texts[part * each + slot] = _Text(number)
        return self._laid_out(requests, placed, each=each, most=most)

    def _laid_out(
        self, requests: Sequence[Request], placed: Sequence[Sequence[tuple[int, int]]], *, each: int, most: int
    ) -> tuple[Prompts, Joining]:
        parts, width = self._room.parts, self._room.row
        tokens, positions, last = (np.zeros(shape, np.int32) for shape in ((parts, width),) * 2 + ((parts, most),))
        ends = np.tile(np.arange(1, width + 1, dtype=np.int32), (parts, 1))
        slots, to = np.full((parts, width), each, np.int32), np.full((parts, most), each, np.int32)
        lengths, left = np.ones((parts, most), np.int32), np.zeros((parts, most), np.int32)
        keys = np.zeros((parts, most, 2), np.uint32)
        for part, those in enumerate(placed):
            start = 0
            for place, (number, slot) in enumerate(those):
                request = requests[number]
                stop = start + len(request.prompt)
                tokens[part, start:stop], positions[part, start:stop] = request.prompt, np.arange(stop - start)
                ends[part, start:stop], slots[part, start:stop] = stop, slot
                last[part, place], to[part, place] = stop - 1, slot
                lengths[part, place], left[part, place] = stop - start, self._most
                keys[part, place] = request.key
                start = stop
        prompts = Prompts(Rows(tokens, positions, ends), slots, last)  # type: ignore[arg-type]
        joining = Joining(to, lengths, left, keys)  # type: ignore[arg-type]
        return prompts, joining


def _give_up(
    groups: set[int], requests: Sequence[Request], waiting: collections.deque[int], running: Sequence[_Text]
) -> int:
    """Gives up what is left of groups, waiting or running. Returns how many responses that is."""
    left = [number for number in waiting if requests[number].group in groups]
    for number in left:
        waiting.remove(number)
    others = {id(text): text for text in running if not text.ended and requests[text.request].group in groups}
    for text in others.values():
        text.ended = True
    return len(left) + len(others)
