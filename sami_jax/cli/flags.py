"""What the commands share: their parser, the types of their arguments, their settings and help texts."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from sami_jax.config.fields import describe_fields, no_local_path
from sami_jax.config.run import RunConfig, load_config
from sami_jax.errors import BadConfigError, ExitCode
from sami_jax.process_group import Place, read_place

AUTO = "auto"  # JAX finds the cluster
EXIT_CODES = (
    "Exit codes: 0 done, 64 usage, 65 bad data or checkpoint, 69 a server does not answer now (run it again later), "
    "70 not finite, no memory or internal, "
    "73 run directory in use, 74 could not save or download, 75 stopped safely (run it again), "
    "78 bad or changed config."
)


class Parser(argparse.ArgumentParser):
    """Ends wrong usage with the exit code of the contract."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(ExitCode.USAGE, f"{self.prog}: {message}\n")


def command(
    commands: Any, name: str, purpose: str, example: str, function: Any, settings_of: tuple[str, ...] = ("",)
) -> argparse.ArgumentParser:
    """One subcommand; its help lists the settings whose names begin with one of `settings_of`."""
    beginnings = tuple(f"config.{name}" for name in settings_of)
    settings = [setting for setting in describe_fields(RunConfig) if setting[0].startswith(beginnings)]
    lines = [f"example:\n  {example}"]
    if settings:
        lines.append("settings (--name=value, on top of the config file):")
        lines += [f"  --{field} = {default}\n        {meaning}" for field, default, meaning in settings]
    lines.append(EXIT_CODES)
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


def add_model(parser: argparse.ArgumentParser) -> None:
    """`--model`, a folder or a name on the Hub."""
    parser.add_argument(
        "--model",
        type=local_name,
        required=True,
        help="Hugging Face folder (config.json, safetensors, tokenizer), or name on the Hub: owner/name[@revision]",
    )


def positive_int(text: str) -> int:
    """The type of an argument that counts from 1."""
    if not text.isascii() or not text.isdigit() or not 0 < len(text) < 10 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def whole_number(text: str) -> int:
    """The type of an argument that counts from 0."""
    return 0 if text == "0" else positive_int(text)


def local_name(text: str) -> str:
    """The type of an argument that may be a path: no store's."""
    if problem := no_local_path(text):
        raise argparse.ArgumentTypeError(problem)
    return text


def local_path(text: str) -> Path:
    """The type of an argument that is a path: no store's."""
    return Path(local_name(text))


def place(text: str) -> Place | str:
    """The type of an argument that names a process of a group: AUTO, or HOST:PORT,N,I."""
    try:
        return text if text == AUTO else read_place(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def load_settings(arguments: argparse.Namespace) -> RunConfig:
    """The config file's settings, with the command line's on top."""
    return load_config(arguments.config, arguments.config_overrides)


def overrides_of(rest: Sequence[str], parser: argparse.ArgumentParser) -> dict[str, str]:
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


def refuse_unread(known: argparse.Namespace) -> None:
    """Refuses a setting that the command does not read: it would do nothing, in silence."""
    exist = {name for name, _, _ in describe_fields(RunConfig)}
    read = known.settings(known) if callable(known.settings) else known.settings  # some depend on what is to be done
    for name in known.config_overrides:
        setting = f"config.{name}"
        if not read:
            raise BadConfigError(f"{setting} is no setting of `sami {known.command}`, which has none; remove it.")
        if setting in exist and not setting.startswith(read):
            raise BadConfigError(
                f"`sami {known.command}` does not read {setting}; remove it (`sami {known.command} --help` lists what "
                "it reads)."
            )
