"""The command that has principles written, and that scores them under a base model: principles."""

import argparse
import dataclasses
import sys
from typing import Any

from sami_jax.cli.flags import command, load_settings, local_name, local_path
from sami_jax.config.chat import WriterConfig
from sami_jax.errors import BadConfigError

_WRITER = "constitutions.writer."
_ANYWAY = ("compute_dtype", "mesh.", "platform")
_WRITING = (_WRITER, *_ANYWAY)
_SCORING = (
    "seed",
    "model",
    "queries.",
    "constitutions.principles",
    "prompts.",
    "sampling.",
    "train.normalize",
    "train.rows_per_device",
    "train.max_row_tokens",
    "pretraining.",
    *_ANYWAY,
)
_FIELDS = [field for field in dataclasses.fields(WriterConfig) if field.name != "model"]


def add_principles(commands: Any) -> None:
    """`sami principles`: written by a model or a server, or scored."""
    parser = command(
        commands,
        "principles",
        "have principles written by a language model; with --score, find out which of them a base model can read",
        "sami principles --base_url=http://localhost:8000/v1 --chat_model=NAME --about='summaries of forum posts' "
        "--count=20 --out=principles.json\n"
        "  sami principles --score --principles=principles.json --model=DIR --queries=posts.jsonl --out=scores.jsonl",
        _principles,
        (_WRITER, *_SCORING),
    )
    parser.set_defaults(settings=_settings_read)
    parser.add_argument(
        "--model",
        type=local_name,
        metavar="MODEL",
        help="a folder, or a name on the Hub; the writer, an instruction-tuned model with a chat template, or "
        "replay:FILE, answers that were recorded; with --score the base model",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=local_path,
        help="gets the principles; its name with .provenance.json says who wrote them, when and how, and OUT.writer/ "
        "keeps the answers, so that nothing is paid twice. With --score JSON lines, one a principle; OUT.parts/ keeps "
        "what is done until it stands",
    )
    parser.add_argument("--config", type=local_name, help="config file for the settings below")
    writing = parser.add_argument_group("writing")
    for field in _FIELDS:
        writing.add_argument(f"--{field.name}", metavar="VALUE", help=_help(field))
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument("--score", action="store_true", help="score principles instead of writing any")
    scoring.add_argument("--principles", type=local_path, metavar="FILE", help="what is scored")
    scoring.add_argument(
        "--queries",
        metavar="SOURCE",
        help="what the base is asked about: JSON lines, or a source as config.queries.evaluation names it; the first "
        "config.queries.evaluation_count of them",
    )


def _help(field: dataclasses.Field) -> str:
    default = f" (default {field.default})" if field.default else ""
    return f"{field.metadata['help']}{default}".replace("%", "%%")


def _settings_read(arguments: argparse.Namespace) -> tuple[str, ...]:
    return tuple(f"config.{name}" for name in (_SCORING if arguments.score else _WRITING))


def _principles(arguments: argparse.Namespace) -> None:
    _refuse_unread_flags(arguments)
    if arguments.score:
        _score(arguments)
    else:
        _write(arguments)


def _refuse_unread_flags(arguments: argparse.Namespace) -> None:
    names = [field.name for field in _FIELDS] if arguments.score else ["principles", "queries"]
    if unread := [f"--{name}" for name in names if getattr(arguments, name) is not None]:
        kind = "written" if arguments.score else "scored, by --score,"
        raise BadConfigError(f"{', '.join(unread)} is for principles that are {kind} alone; remove it.")


def _override(arguments: argparse.Namespace, flags: dict[str, Any]) -> None:
    given = {setting: str(value) for setting, value in flags.items() if value is not None}
    arguments.config_overrides = {**arguments.config_overrides, **given}


def _write(arguments: argparse.Namespace) -> None:
    names = ["model", *(field.name for field in _FIELDS)]
    _override(arguments, {f"{_WRITER}{name}": getattr(arguments, name) for name in names})
    config = load_settings(arguments)
    from sami_jax.run.single_stages import write_principles_file

    written = write_principles_file(config, out=arguments.out)
    for principle in written.principles:
        held_out = " (held out)" if principle.held_out else ""
        print(f"{principle.name}{held_out}\n  + {principle.definition}\n  - {principle.antithesis}")
    about = written.provenance
    dropped = "".join(f", {count} {reason.replace('_', ' ')}" for reason, count in about["dropped"].items() if count)
    cost = f", ${about['cost_usd']:.4f}" if about["cost_usd"] else ""
    print(
        f"{len(written.principles)} principles by {about['model']} in {arguments.out} ({about['answers']} "
        f"answers, {about['malformed']} malformed{dropped}{cost})",
        file=sys.stderr,
    )


def _score(arguments: argparse.Namespace) -> None:
    _override(
        arguments,
        {
            "model": arguments.model,
            "constitutions.principles": arguments.principles,
            "queries.evaluation": arguments.queries,
        },
    )
    config = load_settings(arguments)
    from sami_jax.run.single_stages import score_principles_file
    from sami_jax.stages.score_principles import scores_table

    lines = score_principles_file(config, out=arguments.out)
    print(scores_table(lines), file=sys.stderr)
