"""The commands of a run: run it, make its base, show it, hand on its weights."""

import argparse
import os
from typing import Any

from sami_jax.cli.flags import AUTO, command, load_settings, local_name, local_path, place, positive_int
from sami_jax.errors import BadConfigError
from sami_jax.process_group import JOIN_S, find_place, joined, place_in_environment
from sami_jax.processes import agreed, is_writer


def add_run(commands: Any) -> None:
    """`sami run`: the whole loop."""
    parser = command(
        commands,
        "run",
        "the whole loop: sample, train, export, evaluate, report",
        "sami run --config=configs/miniature.py --workdir=runs/miniature --config.train.kl_beta=0",
        _run,
    )
    parser.add_argument(
        "--config", type=local_name, help="config file, path.py or path.py:argument; left out: go on with --workdir's"
    )
    parser.add_argument(
        "--workdir", required=True, type=local_path, help="run directory; an unfinished one is continued"
    )
    parser.add_argument(
        "--distributed",
        type=place,
        default=place_in_environment(os.environ),
        metavar="PLACE",
        help="run as one of several processes, which share the devices: `auto` on TPU VMs, GKE and SLURM, or "
        "HOST:PORT,N,I for process I of N, whose process 0 is at HOST:PORT (default: what SAMI_COORDINATOR, "
        "SAMI_NUM_PROCESSES and SAMI_PROCESS_ID say, else one process)",
    )
    parser.add_argument(
        "--join-timeout",
        type=positive_int,
        default=JOIN_S,
        metavar="SECONDS",
        help=f"for all processes to come (default {JOIN_S})",
    )


def _run(arguments: argparse.Namespace) -> None:
    if not arguments.config and arguments.config_overrides:
        raise BadConfigError("--config.* settings need --config; without it a run goes on with its own settings.")
    from sami_jax.report.tables import summary_table
    from sami_jax.run.loop import run

    timeout_s = arguments.join_timeout
    where = find_place(timeout_s) if arguments.distributed == AUTO else arguments.distributed
    with joined(where, timeout_s=timeout_s):
        with agreed():
            config = load_settings(arguments) if arguments.config else None
        page = run(config, arguments.workdir)
        if is_writer():
            print(f"\n{summary_table(arguments.workdir)}\nReport: {page}", flush=True)


def add_pretrain(commands: Any) -> None:
    """`sami pretrain`: the base of a miniature."""
    parser = command(
        commands,
        "pretrain",
        "make a miniature's base model and world, once",
        "sami pretrain --config=configs/miniature.py --config.pretraining.seed=1",
        _pretrain,
        ("pretraining.",),
    )
    parser.add_argument("--config", type=local_name, required=True, help="config file, path.py or path.py:argument")


def _pretrain(arguments: argparse.Namespace) -> None:
    config = load_settings(arguments)
    if not config.pretraining.enabled:
        raise BadConfigError(f"{arguments.config} has no pretraining; set config.pretraining.enabled=true.")
    from sami_jax.miniature.pretraining import pretrain
    from sami_jax.safe_point import stop_on_signal

    with stop_on_signal() as safe_point:
        print(pretrain(config.pretraining, safe_point=safe_point))


def add_report(commands: Any) -> None:
    """`sami report`: a run's page."""
    parser = command(
        commands,
        "report",
        "write a run's report/index.html anew",
        "sami report --workdir=runs/miniature",
        _report,
        (),
    )
    parser.add_argument("--workdir", required=True, type=local_path, help="run directory")


def _report(arguments: argparse.Namespace) -> None:
    from sami_jax.report.page import write_report
    from sami_jax.report.tables import summary_table

    page = write_report(arguments.workdir)
    print(f"{summary_table(arguments.workdir)}\nReport: {page}")


def add_export(commands: Any) -> None:
    """`sami export`: a run's weights."""
    parser = command(
        commands,
        "export",
        "write an iteration's weights as a Hugging Face folder elsewhere",
        "sami export --workdir=runs/miniature --iteration=3 --out=my-model --dtype=bfloat16 --verify",
        _export,
        (),
    )
    parser.add_argument("--workdir", required=True, type=local_path, help="run directory")
    parser.add_argument("--iteration", required=True, type=positive_int, help="1, 2, ...")
    parser.add_argument("--out", required=True, type=local_path, help="new folder")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights (default float32, as trained)",
    )
    parser.add_argument("--verify", action="store_true", help="load the new folder and compare its logits")


def _export(arguments: argparse.Namespace) -> None:
    from sami_jax.run.single_stages import export_folder

    to = {"dtype": arguments.dtype, "verify": arguments.verify}
    print(export_folder(arguments.workdir, arguments.iteration, arguments.out, **to))
