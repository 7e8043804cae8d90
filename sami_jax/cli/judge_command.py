"""The command that compares two files of responses by a judge, and that attacks the judge: judge."""

import argparse
import dataclasses
import sys
from typing import Any

from sami_jax.cli.flags import command, load_settings, local_name, local_path
from sami_jax.config.evaluation import ASKING, EvaluationConfig
from sami_jax.errors import BadConfigError

_FIELDS = {field.name: field for field in dataclasses.fields(EvaluationConfig)}
_OTHERS = ("seed", "compute_dtype", "mesh.", "platform")
_READ = ("evaluation.judge", *(f"evaluation.{name}" for name in ASKING), *_OTHERS)


def add_judge(commands: Any) -> None:
    """`sami judge`: who won."""
    parser = command(
        commands,
        "judge",
        "have a language model compare the responses of two files, and say who won, and how sure that is",
        "sami judge --responses=iter_003/eval/results.jsonl --baseline=iter_000/eval/results.jsonl --out=judged "
        "--judge=server --base_url=http://localhost:8000/v1 --judge_model=NAME\n"
        "  sami judge --attack --judge=model:DIR",
        _judge,
        _READ,
    )
    for name, whose in (("responses", "the trained model's"), ("baseline", "those that it is compared with")):
        parser.add_argument(
            f"--{name}",
            type=local_path,
            metavar="FILE",
            help=f"{whose}: a results.jsonl of an evaluation, or a file in the authors' format",
        )
    parser.add_argument(
        "--split",
        choices=("learned", "held_out"),
        default="",
        help="of a results.jsonl; left out: a query's responses of both, averaged",
    )
    parser.add_argument(
        "--out",
        type=local_path,
        help="gets summary.json, verdicts.jsonl (each pair, each order, what the judge said) and details.json; "
        "OUT/answers/ keeps what the judge answered, so that nothing is paid twice",
    )
    parser.add_argument(
        "--attack",
        action="store_true",
        help="try texts on the judge that ask for a verdict instead of earning it, and print what became of them",
    )
    parser.add_argument(
        "--judge",
        metavar="JUDGE",
        help="server: --judge_model at --base_url; model:DIR: an instruction-tuned model on these devices, a folder or "
        "a name on the Hub; replay:FILE: recorded answers",
    )
    parser.add_argument("--config", type=local_name, help="config file for the settings below")
    for name in ASKING:
        _add(parser, name)


def _add(parser: argparse.ArgumentParser, name: str) -> None:
    field = _FIELDS[name]
    default = f" (default {field.default})" if field.default else ""
    how: dict[str, Any] = {"metavar": "VALUE"}
    if field.metadata["choices"]:
        how = {"choices": field.metadata["choices"]}
    elif field.type is bool:
        how = {"action": "store_const", "const": "true"}
    parser.add_argument(f"--{name}", help=f"{field.metadata['help']}{default}".replace("%", "%%"), **how)


def _judge(arguments: argparse.Namespace) -> None:
    flags = {f"evaluation.{name}": getattr(arguments, name) for name in ("judge", *ASKING)}
    given = {setting: value for setting, value in flags.items() if value is not None}
    arguments.config_overrides = {**arguments.config_overrides, **given}
    config = load_settings(arguments)
    files = [arguments.responses, arguments.baseline]
    if not arguments.attack or any(files):
        named = zip(("--responses", "--baseline", "--out"), [*files, arguments.out], strict=True)
        if missing := [name for name, value in named if value is None]:
            raise BadConfigError(
                f"There is nothing to judge without {', '.join(missing)}; name them, or give --attack."
            )
    from sami_jax.run.judging import attack_with, judge_files

    if any(files):
        from sami_jax.evaluation.comparison_table import comparison_table
        from sami_jax.stages.judge import read_comparison

        where = {"responses": arguments.responses, "baseline": arguments.baseline, "split": arguments.split}
        judge_files(config, **where, out=arguments.out)
        print(comparison_table(*read_comparison(arguments.out)))
        print(f"All verdicts are in {arguments.out}/verdicts.jsonl", file=sys.stderr)
    if arguments.attack:
        print(attack_with(config, out=arguments.out))
