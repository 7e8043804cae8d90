"""Stands for srun: SLURM_NTASKS processes here, in the environment of a step; the first that fails ends the others.

Its code is the greatest of theirs, 128 and the signal's number for one that was killed. JOB names a folder: srun.jsonl
gets the arguments.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

arguments = sys.argv[1:]
with (pathlib.Path(os.environ["JOB"]) / "srun.jsonl").open("a") as calls:
    calls.write(json.dumps(arguments) + "\n")
place = next(number for number, argument in enumerate(arguments) if not argument.startswith("--"))
flags = dict(argument[2:].partition("=")[::2] for argument in arguments[:place])
count = int(os.environ["SLURM_NTASKS"])
tasks = []
for number in range(count):
    environment = os.environ | {
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": "0",  # each on a node of its own, whose name is this one's
    }
    log = open(flags["output"].replace("%t", str(number)).replace("%%", "%"), "a")
    tasks.append(subprocess.Popen(arguments[place:], env=environment, stdout=log, stderr=log, start_new_session=True))


def signal_all(number, *_):
    for task in tasks:
        try:
            os.killpg(task.pid, number)  # all processes of the task
        except ProcessLookupError:
            pass


(pathlib.Path(os.environ["JOB"]) / "srun.pid").write_text(str(os.getpid()))
signal.signal(signal.SIGTERM, lambda *_: signal_all(signal.SIGTERM))
deadline = None
while any(task.poll() is None for task in tasks):
    if deadline is None and flags.get("kill-on-bad-exit") == "1" and any(task.returncode for task in tasks):
        signal_all(signal.SIGTERM)
        deadline = time.monotonic() + 5
    if deadline is not None and time.monotonic() > deadline:
        signal_all(signal.SIGKILL)
    time.sleep(0.02)
sys.exit(max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks))
