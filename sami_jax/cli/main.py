"""The command line: `sami <command>`, also `python -m sami_jax`."""

import argparse
import sys
import traceback
from collections.abc import Sequence

from sami_jax.cli.data_commands import add_data
from sami_jax.cli.flags import EXIT_CODES, Parser, overrides_of, refuse_unread
from sami_jax.cli.judge_command import add_judge
from sami_jax.cli.model_commands import add_evaluate, add_generate, add_score, add_train
from sami_jax.cli.principle_commands import add_principles
from sami_jax.cli.run_commands import add_export, add_pretrain, add_report, add_run
from sami_jax.compiled import keep_compiled
from sami_jax.errors import ExitCode, SamiError, exit_code, is_out_of_memory
from sami_jax.process_group import explained, leave


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code (see `errors.ExitCode`)."""
    parser = _build_parser()
    known, rest = parser.parse_known_args(arguments)
    keep_compiled()
    try:
        known.config_overrides = overrides_of(rest, parser)
        refuse_unread(known)
        known.function(known)
    except (Exception, KeyboardInterrupt) as raised:
        error = explained(raised)
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
        leave(error, sentence)
        return int(exit_code(error))
    return ExitCode.DONE


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="sami", description=__doc__ + " SAMI: arXiv:2404.14313.", epilog=EXIT_CODES, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    for add in (
        add_run,
        add_data,
        add_principles,
        add_pretrain,
        add_generate,
        add_score,
        add_train,
        add_evaluate,
        add_judge,
        add_report,
        add_export,
    ):
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
