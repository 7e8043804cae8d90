"""The commands on a model folder and files of the user's own: generate, score, train, evaluate."""

import argparse
import json
import sys
from typing import Any

from sami_jax.cli.flags import add_model, command, load_settings, local_name, local_path, positive_int
from sami_jax.config.run import load_config


def add_generate(commands: Any) -> None:
    """`sami generate`: answers to prompts."""
    parser = command(
        commands,
        "generate",
        "greedy responses to prompts: JSON lines in, JSON lines or the authors' format out",
        "sami generate --model=DIR --prompts=prompts.jsonl --out=responses.jsonl --config.sampling.max_new_tokens=100",
        _generate,
        (
            "sampling.max_new_tokens",
            "sampling.stop",
            "sampling.long_prompts",
            "sampling.temperature",
            "sampling.top_p",
            "sampling.min_p",
            "seed",
            "sampling.chunk_steps",
            "sampling.prefill_tokens",
            "prompts.style",
            "prompts.generation",
            "prompts.training",
            "prompts.system",
            "prompts.response_prefix",
            "prompts.boundary",
            "compute_dtype",
            "mesh.",
            "platform",
        ),
    )
    add_model(parser)
    parser.add_argument(
        "--prompts",
        required=True,
        type=local_path,
        help="JSON lines, each an object with prompt, or with constitution and question, which the generation template "
        "puts together; or responses in the authors' format, whose questions are answered anew",
    )
    parser.add_argument(
        "--format",
        choices=("jsonl", "authors"),
        default="jsonl",
        help="of --out: JSON lines (default), or one object of constitution, question and response, as the authors' "
        "judge reads it",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=local_path,
        help="gets the same lines with response, response_ids, finished; OUT.parts/ keeps what is done until it stands",
    )
    parser.add_argument("--config", type=local_name, help="config file for the settings below")
    parser.add_argument(
        "--rows",
        type=positive_int,
        default=16,
        help="prompts answered at once; one that ends makes room for the next (default 16)",
    )
    parser.add_argument(
        "--samples",
        type=positive_int,
        default=1,
        help="responses to each prompt (default 1), drawn at config.sampling.temperature; sample is its number",
    )


def _generate(arguments: argparse.Namespace) -> None:
    config = load_settings(arguments)
    from sami_jax.run.single_stages import generate_file

    prompts, out = arguments.prompts, arguments.out
    settings = {"rows": arguments.rows, "samples": arguments.samples, "format": arguments.format}
    lines = generate_file(config, model=arguments.model, prompts=prompts, out=out, **settings)
    print(f"{len(lines)} responses in {out}", file=sys.stderr)


def add_score(commands: Any) -> None:
    """`sami score`: matrices of log-probs."""
    parser = command(
        commands,
        "score",
        "the matrix of log-probs, loss and MI bound of each query of a pairs file",
        "sami score --model=DIR --pairs=pairs.json --normalize=sum --out=scores.jsonl",
        _score,
        (
            "train.normalize",
            "train.over_responses_weight",
            "train.over_constitutions_weight",
            "train.rows_per_device",
            "train.max_row_tokens",
            "prompts.boundary",
            "compute_dtype",
            "mesh.",
            "platform",
        ),
    )
    add_model(parser)
    parser.add_argument(
        "--pairs", required=True, type=local_path, help="JSON in the authors' format, one list per query"
    )
    parser.add_argument(
        "--normalize", choices=("mean", "sum"), help="a response's log-prob: mean over its tokens or sum"
    )
    parser.add_argument(
        "--out",
        type=local_path,
        help="JSON lines, of which OUT.parts/ keeps what is done until it stands; left out: standard output",
    )
    parser.add_argument("--config", type=local_name, help="config file for the settings below")


def _score(arguments: argparse.Namespace) -> None:
    overrides = arguments.config_overrides
    if arguments.normalize:
        overrides = {**overrides, "train.normalize": arguments.normalize}
    config = load_config(arguments.config, overrides)
    from sami_jax.run.single_stages import score_file
    from sami_jax.stages.score import score_summary

    lines = score_file(config, model=arguments.model, pairs=arguments.pairs, out=arguments.out)
    if not arguments.out:
        print("\n".join(json.dumps(line) for line in lines))
    print(score_summary(lines), file=sys.stderr)


def add_train(commands: Any) -> None:
    """`sami train`: a trained folder."""
    parser = command(
        commands,
        "train",
        "train a model folder on a pairs file",
        "sami train --model=DIR --pairs=pairs.json --out=trained --config.train.steps='(4,)' "
        "--config.train.learning_rate=5e-7 --config.train.queries_per_step=128",
        _train,
        ("seed", "train.", "prompts.boundary", "compute_dtype", "mesh.", "platform"),
    )
    add_model(parser)
    parser.add_argument(
        "--pairs", required=True, type=local_path, help="JSON in the authors' format, one list per query"
    )
    parser.add_argument(
        "--out",
        required=True,
        type=local_path,
        help="the trained folder; OUT.training keeps metrics, and checkpoints meanwhile",
    )
    parser.add_argument("--config", type=local_name, help="config file for the settings below")


def _train(arguments: argparse.Namespace) -> None:
    config = load_settings(arguments)
    from sami_jax.run.single_stages import train_folder

    print(train_folder(config, model=arguments.model, pairs=arguments.pairs, out=arguments.out))


def add_evaluate(commands: Any) -> None:
    """`sami evaluate`: an evaluated folder."""
    parser = command(
        commands,
        "evaluate",
        "MI bound, adherence, length and win rate of a model folder on the config's evaluation queries",
        "sami evaluate --config=configs/miniature.py --model=runs/miniature/iter_003/export --out=evaluated "
        "--baseline=runs/miniature/iter_000/eval",
        _evaluate,
        (
            "seed",
            "model",
            "compute_dtype",
            "queries.",
            "constitutions.principles",
            "constitutions.folder",
            "constitutions.count",
            "constitutions.pairing",
            "prompts.",
            "sampling.",
            "train.normalize",
            "train.rows_per_device",
            "train.max_row_tokens",
            "evaluation.",
            "mesh.",
            "platform",
            "pretraining.",
        ),
    )
    add_model(parser)
    parser.add_argument(
        "--config",
        type=local_name,
        required=True,
        help="config file, path.py or path.py:argument; its model is the base",
    )
    parser.add_argument("--baseline", type=local_path, help="the base's evaluation folder, to compare with")
    parser.add_argument(
        "--out",
        required=True,
        type=local_path,
        help="gets summary.json and results.jsonl, and with a judge the comparisons in OUT/judge/",
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    config = load_settings(arguments)
    from sami_jax.evaluation.comparison_table import comparison_table
    from sami_jax.run.judging import JUDGE
    from sami_jax.run.single_stages import evaluate_folder
    from sami_jax.stages.judge import read_comparison

    print(evaluate_folder(config, model=arguments.model, baseline=arguments.baseline, out=arguments.out))
    for folder in sorted((arguments.out / JUDGE).glob("*/*/")):
        opponent, split = folder.parts[-2:]
        print(f"\nagainst {opponent}, {split}\n{comparison_table(*read_comparison(folder))}", file=sys.stderr)
