"""The command that shows what a config's model will see: data."""

import argparse
import dataclasses
import json
import sys
from typing import Any

from sami_jax.cli.flags import command, load_settings, local_name, local_path, whole_number


def add_data(commands: Any) -> None:
    """`sami data`: queries, constitutions and prompts, before anything is sampled."""
    parser = command(
        commands,
        "data",
        "what the model will see: queries by split, what was dropped, constitutions and prompts",
        "sami data --config=configs/mistral_7b.py:summaries --config.queries.train=tldr:posts.parquet --limit=2",
        _data,
        (
            "seed",
            "model",
            "iterations",
            "queries.",
            "constitutions.",
            "prompts.",
            "train.steps",
            "train.queries_per_step",
            "train.passes",
            "mesh.",
            "pretraining.",
        ),
    )
    parser.add_argument("--config", type=local_name, required=True, help="config file, path.py or path.py:argument")
    parser.add_argument("--limit", type=whole_number, default=3, help="queries that are shown (default 3)")
    parser.add_argument(
        "--constitutions",
        type=local_path,
        metavar="DIR",
        help="also write every pair of constitutions that a query may get (learned principles), as a folder of the "
        "authors' format",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object, and nothing else, on standard output: splits, dropped, and examples with "
        "example_id, constitutions and the prompts that are sampled from",
    )


def _data(arguments: argparse.Namespace) -> None:
    config = load_settings(arguments)
    from sami_jax.data.authors import write_constitutions
    from sami_jax.outputs import check_folder
    from sami_jax.run.preview import every_pair, preview

    out = arguments.constitutions and check_folder(arguments.constitutions)
    found = preview(config, limit=arguments.limit, say=lambda sentence: print(sentence, file=sys.stderr))
    if out:
        write_constitutions(out, every_pair(config))
    if arguments.json:
        examples = [
            {"example_id": e.example_id, "constitutions": e.constitutions, "prompts": e.prompts} for e in found.examples
        ]
        print(json.dumps(dataclasses.asdict(found) | {"examples": examples}, ensure_ascii=False))
        return
    for name, split in found.splits.items():
        print(_split_text(name, split))
    for example in found.examples:
        print(_example_text(example))


def _split_text(name: str, split: dict[str, Any]) -> str:
    from sami_jax.data.sources import dropped_text

    commit = f" at {split['revision']}" if split["revision"] else ""
    halves = f", {split['halves'][0]} for odd and {split['halves'][1]} for even iterations" if "halves" in split else ""
    held_out = f"; {split['held_out']} held out for evaluation" if split.get("held_out") else ""
    rows = f"{split['rows']} rows, {split['kept']} kept, {dropped_text(split['dropped'])}{held_out}"
    lines = [f"{name}: {split['queries']} queries{halves}", f"  of {split['source']}{commit}: {rows}"]
    for what in ("query_tokens", "prompt_tokens"):
        if quantiles := split[what]:
            listed = ", ".join(f"{share} {count}" for share, count in quantiles.items())
            lines.append(f"  {what.replace('_', ' ')} of {split['measured']} queries: {listed}")
    return "\n".join(lines)


def _example_text(example: Any) -> str:
    parts = [f"\n===== {example.example_id}"]
    pairs = zip(example.prompts, example.training_prompts, strict=True)
    for number, (sampled, trained) in enumerate(pairs, start=1):
        parts.append(f"----- constitution {number}, prompt that is sampled from:\n{sampled}")
        if trained != sampled:
            parts.append(f"----- constitution {number}, prompt that is trained on:\n{trained}")
    return "\n".join(parts)
