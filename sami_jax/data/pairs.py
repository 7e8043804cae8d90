"""Contrastive pairs: per query C prompts and C responses, in the authors' JSON format."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sami_jax.data.tokenizer import Tokenizer
from sami_jax.errors import BadDataError
from sami_jax.files import read_json, write_json
from sami_jax.stage_folder import check_sealed
from sami_jax.types import Boundary


@dataclasses.dataclass(frozen=True)
class Pair:
    """One query's prompts and responses; response i was sampled under the constitution of prompt i.

    Attributes:
      example_id: the query's.
      prompts: C texts.
      responses: C texts.
      prompt_ids: C token id lists, BOS included where the tokenizer adds one, and behind the prompt the response's
        prefix.
      response_ids: C token id lists, without the prefix; as sampled where known.
      response_prefix: what every response begins with, and what is given, not trained.
    """

    example_id: str | int
    prompts: tuple[str, ...]
    responses: tuple[str, ...]
    prompt_ids: tuple[tuple[int, ...], ...]
    response_ids: tuple[tuple[int, ...], ...]
    response_prefix: str = ""


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Writes `{"0": [{"prompt", "response", "example_id", "prompt_ids", "response_ids"}, ...], "1": [...], ...}`.

    One key per query, in order; one list entry per constitution. The first three fields are the authors'; the ids are
    the tokens that the model was given and that it sampled. Where responses have a prefix, it stands in them, and in
    `response_prefix`; its ids are the prompt's last.
    """
    write_json(path, {str(number): _entries(pair) for number, pair in enumerate(pairs)}, sort_keys=False)


def _entries(pair: Pair) -> list[dict[str, Any]]:
    prefix = {"response_prefix": pair.response_prefix} if pair.response_prefix else {}
    columns = zip(pair.prompts, pair.responses, pair.prompt_ids, pair.response_ids, strict=True)
    return [
        {
            "prompt": prompt,
            "response": response,
            **prefix,
            "example_id": pair.example_id,
            "prompt_ids": list(prompt_ids),
            "response_ids": list(response_ids),
        }
        for prompt, response, prompt_ids, response_ids in columns
    ]


def read_pairs(
    path: Path, tokenizer: Tokenizer, *, boundary: Boundary, max_positions: int, vocab_size: int
) -> list[Pair]:
    """Reads a file of the authors' format, with or without ids, in the file's order.

    Args:
      path: the JSON file: one key per query, whose list has one entry per constitution, equally many for all queries.
      tokenizer: gives the ids of prompts and responses that have none.
      boundary: between a prompt and a response that has no ids; see `Tokenizer.response_ids`.
      max_positions: the model's longest sequence, in tokens.
      vocab_size: the model's V; every id is below it.

    Raises:
      BadDataError: the file, the query's key, the entry, what is wrong and the remedy.
    """
    check_sealed(path)
    pairs = []
    for key, entries in read_entries(path).items():
        where = f"{path}, query {key!r}"
        pair = _to_pair(entries, tokenizer, boundary, where)
        _check_fit(pair, where, max_positions=max_positions, vocab_size=vocab_size)
        pairs.append(pair)
    return pairs


def read_entries(path: Path) -> dict[str, list[dict[str, Any]]]:
    """A pairs file as it stands, checked as far as no tokenizer is needed; see `read_pairs`.

    Raises:
      BadDataError: the file, the query's key, the entry, what is wrong and the remedy.
    """
    queries = read_json(path)
    if not isinstance(queries, dict):
        raise BadDataError(f'{path}: expected an object with one key per query ("0", "1", ...).')
    if not queries:
        raise BadDataError(f"{path} holds no pairs.")
    count = None
    for key, entries in queries.items():
        where = f"{path}, query {key!r}"
        if not isinstance(entries, list) or len(entries) < 2:
            raise BadDataError(f"{where}: expected a list with one entry per constitution, at least two.")
        for constitution, entry in enumerate(entries):
            _check_entry(entry, f"{where}, entry {constitution}")
        ids = [entry["example_id"] for entry in entries]
        if len({entry.get("response_prefix", "") for entry in entries}) != 1:
            raise BadDataError(f"{where}: its entries have different response_prefixes; a query has one.")
        if len(set(ids)) != 1:
            raise BadDataError(f"{where}: its entries have different example_ids {ids}; a query has one.")
        count = count or len(entries)
        if len(entries) != count:
            raise BadDataError(f"{where}: {len(entries)} constitutions, but the queries before it have {count}.")
    return queries


def _to_pair(entries: Sequence[dict[str, Any]], tokenizer: Tokenizer, boundary: Boundary, where: str) -> Pair:
    prompts, responses = (tuple(entry[key] for entry in entries) for key in ("prompt", "response"))
    prompt_ids, response_ids = [], []
    for constitution, entry in enumerate(entries):
        given, prefix, tokens = (entry.get(key) for key in ("prompt_ids", "response_prefix", "response_ids"))
        if given is None:
            given = tokenizer.prompt_ids(entry["prompt"])
            given += tokenizer.response_ids(prefix or "", prompt=entry["prompt"], boundary=boundary)
        if tokens is None:
            tokens = tokenizer.response_ids(
                entry["response"], prompt=entry["prompt"], boundary=boundary, prefix=prefix or ""
            )
        if not tokens:
            raise BadDataError(f"{where}, entry {constitution}: the response has no tokens; remove this query.")
        prompt_ids.append(tuple(given))
        response_ids.append(tuple(tokens))
    prefix = entries[0].get("response_prefix", "")
    return Pair(entries[0]["example_id"], prompts, responses, tuple(prompt_ids), tuple(response_ids), prefix)


def _check_fit(pair: Pair, where: str, *, max_positions: int, vocab_size: int) -> None:
    longest = max(map(len, pair.prompt_ids)) + max(map(len, pair.response_ids))
    if longest > max_positions:
        raise BadDataError(
            f"{where}: prompt and response have {longest} tokens, but the model has room for {max_positions}; shorten "
            "or remove this query."
        )
    for constitution, (prompt, response) in enumerate(zip(pair.prompt_ids, pair.response_ids, strict=True)):
        if not all(0 <= token < vocab_size for token in response):
            raise BadDataError(
                f"{where}, entry {constitution}: a response id is outside the model's vocabulary of {vocab_size} "
                "tokens."
            )
        if not prompt:
            raise BadDataError(f"{where}, entry {constitution}: the prompt has no tokens.")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise BadDataError(
                f"{where}: the prompt has ids outside the model's vocabulary of {vocab_size} tokens; the tokenizer (or "
                "the file's prompt_ids) and the weights in the model folder do not belong together."
            )


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
    for key in ("prompt_ids", "response_ids"):
        ids = entry.get(key, [0])
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise BadDataError(f"{where}: {key} must be a list of whole numbers.")
    prefix = entry.get("response_prefix", "")
    if not isinstance(prefix, str) or not entry["response"].startswith(prefix):
        raise BadDataError(f"{where}: response_prefix must be text that the response begins with.")
