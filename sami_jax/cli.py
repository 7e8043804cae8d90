"""The command line: `sami <command>`, also `python -m sami_jax`."""

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from sami_jax.config import RunConfig, describe_fields, load_config, no_local_path
from sami_jax.errors import (
    BadConfigError,
    ExitCode,
    SamiError,
    exit_code,
    is_out_of_memory,
)

_EXIT_CODES = (
    "Exit codes: 0 done, 64 usage, 65 bad data or checkpoint, 70 not finite, no memory or internal, "
    "73 run directory in use, 74 could not save or download, 75 stopped safely (run it again), "
    "78 bad or changed config."
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(ExitCode.USAGE, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code (see `errors.ExitCode`)."""
    parser = _build_parser()
    known, rest = parser.parse_known_args(arguments)
    try:
        known.config_overrides = _overrides(rest, parser)
        _refuse_unread(known)
        known.function(known)
    except (Exception, KeyboardInterrupt) as error:
        sentence = str(error)
        if isinstance(error, KeyboardInterrupt):
            sentence = "interrupted."
        elif isinstance(error, OSError):
            sentence = f"{error}."
        elif is_out_of_memory(error) and not isinstance(error, SamiError):
            reason = str(error).partition("\n")[0]
            sentence = (
                f"out of memory ({reason}): take more devices by config.mesh.fsdp, or a machine with more memory."
            )
        elif not isinstance(error, SamiError):
            traceback.print_exc()
            sentence = "this is a defect of sami_jax; please report the lines above."
        print(f"sami {known.command}: {sentence}", file=sys.stderr, flush=True)
        return int(exit_code(error))
    return ExitCode.DONE


def _overrides(rest: Sequence[str], parser: argparse.ArgumentParser) -> dict[str, str]:
    """`--config.a.b=value` or `--config.a.b value` -> {"a.b": "value"}."""
    overrides, words = {}, list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--config."):
            parser.error(f"unknown argument {word}")
        name, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            if not words:
                parser.error(f"{word} needs a value")
            value = words.pop(0)
        overrides[name] = value
    return overrides


def _refuse_unread(known: argparse.Namespace) -> None:
    """Refuses a setting that the command does not read: it would do nothing, in silence."""
    exist = {name for name, _, _ in describe_fields()}
    for name in known.config_overrides:
        setting = f"config.{name}"
        if not known.settings:
            raise BadConfigError(f"{setting} is no setting of `sami {known.command}`, which has none; remove it.")
        if setting in exist and not setting.startswith(known.settings):
            raise BadConfigError(
                f"`sami {known.command}` does not read {setting}; remove it (`sami {known.command} --help` lists what "
                "it reads)."
            )


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sami", description=__doc__ + " SAMI: arXiv:2404.14313.", epilog=_EXIT_CODES, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    run = _command(
        commands,
        "run",
        "the whole loop: sample, train, export, evaluate, report",
        "sami run --config=configs/miniature.py --workdir=runs/miniature --config.train.kl_beta=0",
        _run,
    )
    run.add_argument(
        "--config", type=_local, help="config file, path.py or path.py:argument; left out: go on with --workdir's"
    )
    run.add_argument("--workdir", required=True, type=_path, help="run directory; an unfinished one is continued")

    pretrain = _command(
        commands,
        "pretrain",
        "make a miniature's base model and world, once",
        "sami pretrain --config=configs/miniature.py --config.pretraining.seed=1",
        _pretrain,
        ("pretraining.",),
    )
    pretrain.add_argument("--config", type=_local, required=True, help="config file, path.py or path.py:argument")

    generate = _command(
        commands,
        "generate",
        "greedy responses to prompts: JSON lines in, JSON lines out",
        "sami generate --model=DIR --prompts=prompts.jsonl --out=responses.jsonl --config.sampling.max_new_tokens=100",
        _generate,
        (
            "sampling.max_new_tokens",
            "sampling.stop",
            "sampling.round_prompt_tokens_to",
            "compute_dtype",
            "mesh.",
        ),
    )
    _add_model(generate)
    generate.add_argument("--prompts", required=True, type=_path, help='JSON lines, each an object with "prompt"')
    generate.add_argument(
        "--out",
        required=True,
        type=_path,
        help="gets the same lines with response, response_ids, finished; OUT.parts/ keeps what is done until it stands",
    )
    generate.add_argument("--config", type=_local, help="config file for the settings below")
    generate.add_argument("--rows", type=_positive, default=16, help="prompts sampled together (default 16)")

    score = _command(
        commands,
        "score",
        "the matrix of log-probs, loss and MI bound of each query of a pairs file",
        "sami score --model=DIR --pairs=pairs.json --normalize=sum --out=scores.jsonl",
        _score,
        (
            "train.normalize",
            "train.over_responses_weight",
            "train.over_constitutions_weight",
            "train.micro_batch_queries",
            "train.round_tokens_to",
            "prompts.boundary",
            "compute_dtype",
            "mesh.",
        ),
    )
    _add_model(score)
    score.add_argument("--pairs", required=True, type=_path, help="JSON in the authors' format, one list per query")
    score.add_argument(
        "--normalize", choices=("mean", "sum"), help="a response's log-prob: mean over its tokens or sum"
    )
    score.add_argument(
        "--out",
        type=_path,
        help="JSON lines, of which OUT.parts/ keeps what is done until it stands; left out: standard output",
    )
    score.add_argument("--config", type=_local, help="config file for the settings below")

    train = _command(
        commands,
        "train",
        "train a model folder on a pairs file",
        "sami train --model=DIR --pairs=pairs.json --out=trained --config.train.steps='(4,)' "
        "--config.train.learning_rate=5e-7 --config.train.queries_per_step=128",
        _train,
        ("seed", "train.", "prompts.boundary", "compute_dtype", "mesh."),
    )
    _add_model(train)
    train.add_argument("--pairs", required=True, type=_path, help="JSON in the authors' format, one list per query")
    train.add_argument(
        "--out",
        required=True,
        type=_path,
        help="the trained folder; OUT.training keeps metrics, and checkpoints meanwhile",
    )
    train.add_argument("--config", type=_local, help="config file for the settings below")

    evaluate = _command(
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
            "queries.evaluation",
            "constitutions.principles",
            "constitutions.count",
            "constitutions.pairing",
            "prompts.",
            "sampling.",
            "train.normalize",
            "train.micro_batch_queries",
            "train.round_tokens_to",
            "evaluation.",
            "mesh.",
            "pretraining.",
        ),
    )
    _add_model(evaluate)
    evaluate.add_argument(
        "--config", type=_local, required=True, help="config file, path.py or path.py:argument; its model is the base"
    )
    evaluate.add_argument("--baseline", type=_path, help="the base's evaluation folder, to compare with")
    evaluate.add_argument("--out", required=True, type=_path, help="gets summary.json and results.jsonl")

    report = _command(
        commands,
        "report",
        "write a run's report/index.html anew",
        "sami report --workdir=runs/miniature",
        _report,
        (),
    )
    report.add_argument("--workdir", required=True, type=_path, help="run directory")

    export = _command(
        commands,
        "export",
        "write an iteration's weights as a Hugging Face folder elsewhere",
        "sami export --workdir=runs/miniature --iteration=3 --out=my-model --dtype=bfloat16 --verify",
        _export,
        (),
    )
    export.add_argument("--workdir", required=True, type=_path, help="run directory")
    export.add_argument("--iteration", required=True, type=_positive, help="1, 2, ...")
    export.add_argument("--out", required=True, type=_path, help="new folder")
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights (default float32, as trained)",
    )
    export.add_argument("--verify", action="store_true", help="load the new folder and compare its logits")
    return parser


def _command(
    commands: Any, name: str, purpose: str, example: str, function: Any, settings_of: tuple[str, ...] = ("",)
) -> argparse.ArgumentParser:
    """One subcommand; its help lists the settings whose names begin with one of `settings_of`."""
    beginnings = tuple(f"config.{name}" for name in settings_of)
    settings = [setting for setting in describe_fields() if setting[0].startswith(beginnings)]
    lines = [f"example:\n  {example}"]
    if settings:
        lines.append("settings (--name=value, on top of the config file):")
        lines += [f"  --{field} = {default}\n        {meaning}" for field, default, meaning in settings]
    lines.append(_EXIT_CODES)
    parser = commands.add_parser(
        name,
        help=purpose,
        description=purpose[0].upper() + purpose[1:] + ".",
        epilog="\n".join(lines).replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(function=function, settings=beginnings)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=_local,
        required=True,
        help="Hugging Face folder (config.json, safetensors, tokenizer), or name on the Hub: owner/name[@revision]",
    )


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < len(text) < 10 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def _local(text: str) -> str:
    if problem := no_local_path(text):
        raise argparse.ArgumentTypeError(problem)
    return text


def _path(text: str) -> Path:
    return Path(_local(text))


def _load(arguments: argparse.Namespace) -> RunConfig:
    return load_config(arguments.config, arguments.config_overrides)


def _run(arguments: argparse.Namespace) -> None:
    if not arguments.config and arguments.config_overrides:
        raise BadConfigError("--config.* settings need --config; without it a run goes on with its own settings.")
    config = _load(arguments) if arguments.config else None
    from sami_jax.report.tables import summary_table
    from sami_jax.run.loop import run

    page = run(config, arguments.workdir)
    print(f"\n{summary_table(arguments.workdir)}\nReport: {page}")


def _pretrain(arguments: argparse.Namespace) -> None:
    config = _load(arguments)
    if not config.pretraining.enabled:
        raise BadConfigError(f"{arguments.config} has no pretraining; set config.pretraining.enabled=true.")
    from sami_jax.pretraining import pretrain
    from sami_jax.safe_point import stop_on_signal

    with stop_on_signal() as safe_point:
        print(pretrain(config.pretraining, safe_point=safe_point))


def _generate(arguments: argparse.Namespace) -> None:
    config = _load(arguments)
    from sami_jax.run.single_stages import generate_file

    prompts, out = arguments.prompts, arguments.out
    lines = generate_file(config, model=arguments.model, prompts=prompts, out=out, rows=arguments.rows)
    print(f"{len(lines)} responses in {out}", file=sys.stderr)


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


def _train(arguments: argparse.Namespace) -> None:
    config = _load(arguments)
    from sami_jax.run.single_stages import train_folder

    print(train_folder(config, model=arguments.model, pairs=arguments.pairs, out=arguments.out))


def _evaluate(arguments: argparse.Namespace) -> None:
    config = _load(arguments)
    from sami_jax.run.single_stages import evaluate_folder

    print(evaluate_folder(config, model=arguments.model, baseline=arguments.baseline, out=arguments.out))


def _report(arguments: argparse.Namespace) -> None:
    from sami_jax.report.page import write_report
    from sami_jax.report.tables import summary_table

    page = write_report(arguments.workdir)
    print(f"{summary_table(arguments.workdir)}\nReport: {page}")


def _export(arguments: argparse.Namespace) -> None:
    from sami_jax.run.single_stages import export_folder

    to = {"dtype": arguments.dtype, "verify": arguments.verify}
    print(export_folder(arguments.workdir, arguments.iteration, arguments.out, **to))


if __name__ == "__main__":
    sys.exit(main())
