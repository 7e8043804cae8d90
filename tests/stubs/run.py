"""Stands for the interpreter of a process, started as `python -m sami_jax run ...`: plays how each start of a run ends.

runs.jsonl of the folder that CLOUD names gets arguments and some of the environment. outcomes.json there holds a code
for each start, or a list with one for each worker: "preempt" has the node preempted, "wait" ends with 75 on SIGTERM.
"""

import json
import os
import pathlib
import signal
import sys
import time

cloud = pathlib.Path(os.environ["CLOUD"])
worker = int(os.environ.get("TPU_WORKER_ID") or os.environ["SLURM_PROCID"])
runs = cloud / "runs.jsonl"
everyone = int(os.environ.get("SLURM_NTASKS") or len(os.environ["TPU_WORKER_HOSTNAMES"].split(",")))


def starts():
    workers = [json.loads(line)["worker"] for line in runs.read_text().splitlines()] if runs.exists() else []
    return [workers.count(number) for number in range(everyone)]


start = starts()[worker]
names = ("HF_TOKEN", "HF_HOME", "OTHER", "JAX_PLATFORMS", "JAX_COORDINATOR_PORT", "JAX_LOCAL_DEVICE_IDS", "no_proxy")
outcomes = json.loads((cloud / "outcomes.json").read_text())
outcome = outcomes[min(start, len(outcomes) - 1)]
if isinstance(outcome, list):
    outcome = outcome[worker]
if outcome == "wait":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
with runs.open("a") as log:
    here = {name: os.environ[name] for name in names if name in os.environ}
    log.write(json.dumps({"worker": worker, "arguments": sys.argv[1:], "environment": here}) + "\n")
print(f"run {start} of worker {worker}", flush=True)
if outcome == "wait":
    time.sleep(60)
deadline = time.monotonic() + 2
while min(starts()) <= start and time.monotonic() < deadline:  # the processes of a run meet first
    time.sleep(0.02)
if outcome == "preempt":
    for name, state in (("queue.json", "SUSPENDED"), ("node.json", "PREEMPTED")):
        if (cloud / name).exists():
            new = cloud / f"{name}.new"  # another call may be reading
            new.write_text(json.dumps(json.loads((cloud / name).read_text()) | {"state": state}))
            new.replace(cloud / name)
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(outcome))
