"""The command that has principles written, and finds out which of them a base model can read: principles."""

import argparse
import dataclasses
import sys
from typing import Any

from sami_jax.cli.flags import command, load_settings, local_name, local_path
from sami_jax.config.chat import WriterConfig

_WRITER = "constitutions.writer."
_WRITING = ("constitutions.writer.", "compute_dtype", "mesh.", "platform")


def add_principles(commands: Any) -> None:
    """`sami principles`: written by a model or a server."""
    parser = command(
        commands,
        "principles",
        "have principles written by a language model: names, definitions and antitheses",
        "sami principles --base_url=http://localhost:8000/v1 --chat_model=NAME --about='summaries of forum posts' "
        "--count=20 --out=principles.json",
        _principles,
        _WRITING,
    )
    for field in dataclasses.fields(WriterConfig):
        parser.add_argument(f"--{field.name}", metavar="VALUE", help=_help(field))
    parser.add_argument(
        "--out",
        required=True,
        type=local_path,
        help="gets the principles; OUT's name with .provenance.json says who wrote them, when and how, and OUT.writer/ "
        "keeps the answers, so that nothing is paid twice",
    )
    parser.add_argument("--config", type=local_name, help="config file for the settings below")


def _help(field: dataclasses.Field) -> str:
    default = f" (default {field.default})" if field.default else ""
    return f"{field.metadata['help']}{default}".replace("%", "%%")


def _principles(arguments: argparse.Namespace) -> None:
    flags = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(WriterConfig)}
    given = {f"{_WRITER}{name}": value for name, value in flags.items() if value is not None}
    arguments.config_overrides = {**arguments.config_overrides, **given}
    config = load_settings(arguments)
    from sami_jax.run.principles import write_principles_file

    written = write_principles_file(config, out=arguments.out)
    for principle in written.principles:
        held_out = " (held out)" if principle.held_out else ""
        print(f"{principle.name}{held_out}\n  + {principle.definition}\n  - {principle.antithesis}")
    about = written.provenance
    dropped = "".join(f", {count} {reason.replace('_', ' ')}" for reason, count in about["dropped"].items() if count)
    cost = f", ${about['cost_usd']:.4f}" if about["cost_usd"] else ""
    print(
        f"{len(written.principles)} principles by {', '.join(about['model'])} in {arguments.out} ({about['answers']} "
        f"answers, {about['malformed']} malformed{dropped}{cost})",
        file=sys.stderr,
    )
