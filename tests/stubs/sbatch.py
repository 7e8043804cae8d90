"""Stands for sbatch: runs the job here, from a copy as SLURM does, and again while it is put into the queue again.

JOB names a folder: sbatch.jsonl gets the arguments; `requeued`, which the stub of scontrol makes, starts it again.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

job = pathlib.Path(os.environ["JOB"])
arguments = sys.argv[1:]
with (job / "sbatch.jsonl").open("a") as calls:
    calls.write(json.dumps(arguments) + "\n")
place = next(number for number, argument in enumerate(arguments) if not argument.startswith("--"))
flags = dict(argument[2:].partition("=")[::2] for argument in arguments[:place])
(job / "spool").mkdir(exist_ok=True)
script = shutil.copy(arguments[place], job / "spool" / "slurm_script")
tasks = int(flags["nodes"]) * int(flags["ntasks-per-node"])
starts = 0
while True:
    (job / "requeued").unlink(missing_ok=True)
    environment = os.environ | {
        "SLURM_JOB_ID": "4097",
        "SLURM_RESTART_COUNT": str(starts),
        "SLURM_NTASKS": str(tasks),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_SUBMIT_DIR": os.getcwd(),
    }
    with (job / "batch.log").open("a") as log:
        batch = subprocess.Popen(
            ["bash", script, *arguments[place + 1 :]],
            cwd=flags.get("chdir"),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        (job / "batch.pid").write_text(str(batch.pid))
        batch.wait()
    starts += 1
    if not (job / "requeued").exists():
        sys.exit(batch.returncode)
