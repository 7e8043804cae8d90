"""Contrastive pairs: per query C prompts and C responses, in the authors' JSON format."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sami_jax.data.tokenizer import Tokenizer
from sami_jax.errors import BadDataError
from sami_jax.run_directory import read_json, write_json


@dataclasses.dataclass(frozen=True)
class Pair:
    """One query's prompts and responses; response i was sampled under the constitution of prompt i.

    Attributes:
      example_id: the query's.
      prompts: C texts.
      responses: C texts.
      prompt_ids: C token id lists, BOS included where the tokenizer adds one.
      response_ids: C token id lists; as sampled where known.
    """

    example_id: str | int
    prompts: tuple[str, ...]
    responses: tuple[str, ...]
    prompt_ids: tuple[tuple[int, ...], ...]
    response_ids: tuple[tuple[int, ...], ...]


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Writes `{"0": [{"prompt", "response", "example_id", "response_ids"}, ...], "1": [...], ...}`.

    The first three keys are the authors'; `response_ids` keeps the tokens that were sampled.
    """
    count = len(pairs[0].prompts) if pairs else 0
    lists = {
        str(i): [
            {
                "prompt": pair.prompts[i],
                "response": pair.responses[i],
                "example_id": pair.example_id,
                "response_ids": list(pair.response_ids[i]),
            }
            for pair in pairs
        ]
        for i in range(count)
    }
    write_json(path, lists)


def read_pairs(path: Path, tokenizer: Tokenizer, *, max_positions: int, vocab_size: int) -> list[Pair]:
    """Reads a file of the authors' format, with or without `response_ids`.

    Args:
      path: the JSON file: one list per constitution, aligned by position and `example_id`.
      tokenizer: gives the ids of prompts, and of responses that have none.
      max_positions: the model's longest sequence, in tokens.
      vocab_size: the model's V; every id is below it.

    Raises:
      BadDataError: the file, the constitution's list, the entry, what is wrong and the remedy.
    """
    lists = read_json(path)
    if not isinstance(lists, dict) or sorted(lists, key=str) != sorted(str(i) for i in range(len(lists))):
        raise BadDataError(f'{path}: expected an object with the keys "0", "1", ..., one list per constitution.')
    if len(lists) < 2:
        raise BadDataError(f"{path}: {len(lists)} constitutions; SAMI contrasts at least two.")
    columns = [lists[str(i)] for i in range(len(lists))]
    if not all(isinstance(column, list) for column in columns):
        raise BadDataError(f"{path}: each constitution's value must be a list of entries.")
    lengths = [len(column) for column in columns]
    if len(set(lengths)) != 1:
        raise BadDataError(
            f"{path}: the constitutions' lists have different lengths {lengths}; entry i is query i in all."
        )
    if not lengths[0]:
        raise BadDataError(f"{path} holds no pairs.")
    pairs = []
    for index, entries in enumerate(zip(*columns, strict=True)):
        for constitution, entry in enumerate(entries):
            _check_entry(entry, f'{path}, "{constitution}", entry {index}')
        ids = [entry["example_id"] for entry in entries]
        if len(set(ids)) != 1:
            raise BadDataError(f"{path}, entry {index}: the example_ids {ids} differ between the constitutions.")
        prompts, responses = (tuple(entry[key] for entry in entries) for key in ("prompt", "response"))
        prompt_ids = tuple(tuple(tokenizer.prompt_ids(prompt)) for prompt in prompts)
        response_ids = []
        for constitution, entry in enumerate(entries):
            where = f'{path}, "{constitution}", entry {index} (example_id {ids[0]!r})'
            tokens = entry.get("response_ids")
            if tokens is None:
                tokens = tokenizer.response_ids(entry["response"], prompt=entry["prompt"])
            if not tokens:
                raise BadDataError(f"{where}: the response has no tokens; remove this query from all lists.")
            if not all(0 <= token < vocab_size for token in tokens):
                raise BadDataError(f"{where}: a response id is outside the model's vocabulary of {vocab_size} tokens.")
            response_ids.append(tuple(tokens))
        longest = max(map(len, prompt_ids)) + max(map(len, response_ids))
        if longest > max_positions:
            raise BadDataError(
                f"{path}, entry {index} (example_id {ids[0]!r}): prompt and response have {longest} tokens, but the "
                f"model has {max_positions} positions; shorten or remove this query."
            )
        if max((token for row in prompt_ids for token in row), default=0) >= vocab_size:
            raise BadDataError(
                f"{path}, entry {index}: the tokenizer gives ids beyond the model's vocabulary of {vocab_size} tokens; "
                "the tokenizer and the weights in the model folder do not belong together."
            )
        pairs.append(Pair(ids[0], prompts, responses, prompt_ids, tuple(response_ids)))
    return pairs


def _check_entry(entry: Any, where: str) -> None:
    if not isinstance(entry, dict):
        raise BadDataError(f"{where}: expected an object with prompt, response and example_id.")
    for key in ("prompt", "response"):
        if not isinstance(entry.get(key), str):
            raise BadDataError(f"{where}: {key} must be text.")
    if not isinstance(entry.get("example_id"), str | int) or isinstance(entry.get("example_id"), bool):
        raise BadDataError(f"{where}: example_id must be a text or a whole number.")
    if not entry["prompt"]:
        raise BadDataError(f"{where}: the prompt is empty.")
    ids = entry.get("response_ids", [0])
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise BadDataError(f"{where}: response_ids must be a list of whole numbers.")
